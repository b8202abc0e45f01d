r"""MATH: competition problems whose answer is a LaTeX expression.

Files have the field's columns, problem and solution. The last \boxed of the solution
is the answer.

'paper' follows DMPO reward_func.py:240-287 with math500_utils.py for the reward (two
terms, at most 3.0 in sum) and eval/parse_and_get_acc.py:99-155 for the grade. Where
we differ, on purpose: without a \boxed the grade reads the first <answer>, which the
reference intends. Its helper returns the whole text there. Only the last MAX_TEXT
characters are read.
'strict' reads the last \boxed with balanced braces, within the last <answer> if there
is one. Empty boxes behind it are passed over, and boxes that only ',', 'and' or 'or'
part are one list. `latex` has the grammar of an answer, symbolic.py compares values
(math-verify, exactly, in a process that can be killed). So:
- An operation or a word that the truth has not is wrong ('2\times3' for 6, '5 more').
- A unit may be left out or added, not changed. Only known units and plural nouns of
  word problems may be added. 'thousand' and 'dozen' multiply.
- A name before '=' is dropped. What else stands there must be equal: '8 + 23 = 31' is
  right for 31, '7x = 5' is wrong for 5. A leading \approx is dropped.
- An inequality of one variable equals its interval.
- Plain text counts as LaTeX: pi/2, exp(16), sqrt(3), 1.6e-19, 1 1/4.
- Where brackets are in doubt the truth decides: '3,5' equals '\{3,5\}'.
"""

import fractions
import re
from collections.abc import Iterator

from dmpo_jax.tasks import answers, datasets, gsm8k, latex, symbolic
from dmpo_jax.types import Task

CHAT = """You are an expert in mathematics. Solve the problem step by step. \
Think between <reasoning> and </reasoning>, then write the final answer in \
\\boxed{{}} between <answer> and </answer>:

<reasoning>
...
</reasoning>
<answer>
\\boxed{{...}}
</answer>

{problem}"""

TEMPLATES = {
  'bare': '{problem}',
  'chat': CHAT,
  # The evaluations of d1 and DMPO use one prompt for MATH and GSM8K.
  'eval': gsm8k.EVAL.replace('{question}', '{problem}'),
  'boxed': gsm8k.TEMPLATES['boxed'].replace('question', 'problem'),
}
FRACTION = re.compile(r'(-?)\\frac\{(-?[0-9]+)\}\{(-?[0-9]+)\}')
DEGREES = (r'^{\circ}', r'^\circ')
BASE = re.compile(r'[0-9]_(\{[^{}]*\}|.)')
# What may stand between two boxes of one list.
BETWEEN = re.compile(
  r'(?:\s|\$|\\[()\[\]]|,|;|&|\b(?:and|or)\b|\\text\{ *(?:and|or) *\})*'
)
MAX_BOXES = 30
GROUP = re.compile(r'[(\[]|\\\{|\\[pm]{2}(?![a-z])')  # several values in one body


def _read(path: str) -> Iterator[dict]:
  for line, record in datasets.read_texts(path, ('problem', 'solution')):
    boxed = answers.last_boxed(record['solution'])
    if boxed is None:
      raise ValueError(f'{path}:{line}: the solution has no \\boxed answer')
    if not latex.clean(boxed):
      raise ValueError(f'{path}:{line}: the last \\boxed of the solution is empty')
    yield record


SOURCE = datasets.word_problems(
  'math',
  'huggingface.co/datasets: ankner/math-500 (train.parquet or .jsonl) and '
  'HuggingFaceH4/MATH-500 (test.jsonl)',
  _read,
  'problem',
)


def gold(example: dict) -> str:
  r"""Returns the content of the solution's last \boxed, which the readers checked."""
  boxed = answers.last_boxed(example['solution'])
  assert boxed is not None, example
  return boxed


def prompt(example: dict, style: str) -> str:
  """Returns the user's message; ValueError for an unknown style."""
  return answers.choose('style', style, TEMPLATES).format(problem=example['problem'])


def target(example: dict, style: str) -> str:
  """Returns the solution as the prompt asks for it; ValueError: unknown style."""
  answers.choose('style', style, TEMPLATES)
  boxed = f'\\boxed{{{gold(example)}}}'
  if style == 'bare':
    return boxed
  steps = example['solution'].strip()
  return steps if style == 'boxed' else answers.tagged(steps, boxed, style)


def reward(text: str, example: dict, protocol: str) -> dict[str, float]:
  """Returns {'correctness', 'format'}, at most 3.0 in sum; ValueError: protocol."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  text = answers.clip(text)
  if protocol == 'strict':
    answer = _strict_answer(text)
    boxed = answer is not None and answers.last_answer(text) is not None
    return {
      'correctness': 2.0 * equal(answer, gold(example)),
      'format': 0.5 * answers.formatted(text.strip()) + 0.5 * boxed,
    }
  _, *parts = text.split('<answer>')
  boxed = (
    1.0 if '\\boxed' in (parts[0].split('</answer>')[0] if parts else text) else 0.5
  )
  return {
    'correctness': 2.0 * equal_text(_rewarded(text), gold(example)),
    'format': 0.5 * (bool(parts) + boxed),
  }


def grade(text: str, example: dict, protocol: str) -> float:
  """Returns 1.0 if the answer is right, else 0.0; ValueError as for `reward`."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  text = answers.clip(text)
  if protocol == 'strict':
    return float(equal(_strict_answer(text), gold(example)))
  found = answers.last_boxed(text) or (answers.first_answer(text) or '').strip()
  return float(bool(found) and equal_text(found, gold(example)))


def extra(text: str, example: dict) -> dict[str, float]:
  r"""Returns {'well_formed'}: 1.0 if a closed \boxed stands where it should."""
  del example
  return {'well_formed': float(_strict_answer(answers.clip(text)) is not None)}


def answer(text: str, example: dict, protocol: str) -> str | None:
  """Returns the normalised answer, for a majority vote; None without an answer."""
  del example
  text = answers.clip(text)
  if protocol == 'strict':
    answer = _strict_answer(text)
  else:
    answer = answers.last_boxed(text) or answers.first_answer(text)
  if not answer:
    return None
  exact = value(answer)
  try:
    if exact is not None:
      return str(exact)
    return latex.clean(answer) if protocol == 'strict' else normal(answer)
  except (ValueError, IndexError):
    return answer


def _rewarded(text: str) -> str:
  r"""Returns what the reference's reward compares: the last \boxed, else the text.

  Without any \boxed the reference finds \fbox{...} and leaves the command on it.
  """
  answer = answers.last_boxed(text)
  if answer is None and '\\boxed' not in text and '\\fbox' in text:
    inner = answers.braced(text, text.rfind('\\fbox') + len('\\fbox'))
    return text if inner is None else f'\\fbox{{{inner}}}'
  return text if answer is None else answer


def _strict_answer(text: str) -> str | None:
  r"""Returns the last \boxed, within the last <answer> if there is one, or None.

  Empty boxes at the end are passed over. Boxes that only commas, 'and' or 'or' part
  are one list.
  """
  answer = answers.last_answer(text)
  text = text if answer is None else answer
  found = []
  for _ in range(MAX_BOXES):
    start, boxed = text.rfind('\\boxed'), answers.last_boxed(text, strict=True)
    if boxed is None:
      break
    if latex.clean(boxed):
      found.insert(0, boxed)
      text = text[:start]
      between = text[text.rfind('}') + 1 :] if '\\boxed' in text else 'none'
      if not BETWEEN.fullmatch(between) or not re.search(r'[,;a-z]', between):
        break
      if not text[: len(text) - len(between)].endswith('}'):
        break
    else:
      text = text[:start]
  return ','.join(found) if found else None


# ---- equality


def equal_text(left: str, right: str) -> bool:
  """Returns whether two answers are the same string once normalised.

  The field's `is_equiv` (math500_utils.py:33-50): if one cannot be normalised, both
  are compared as they stand.
  """
  try:
    return normal(left) == normal(right)
  except (ValueError, IndexError):
    return left == right


def equal(left: str | None, right: str) -> bool:
  """Returns whether two answers are equal by the grammar of `latex`.

  None and an empty answer equal nothing. An answer that has a form, a word or a sign
  beyond the truth's is not equal. Expressions are compared in a process that is
  killed at its deadline.
  """
  if left is None:
    return False
  left, right = latex.clean(left), latex.clean(right)
  if not (left and right):
    return False
  if latex.squeeze(left) == latex.squeeze(right):
    return True
  if max(len(left), len(right)) > latex.MAX_LENGTH:
    return False
  said = latex.words(right) if '\\text' in left + right else None
  if said and said == latex.words(left):
    return True
  if _bases_differ(left, right):
    return False
  without = lambda text: BASE.sub(lambda m: m[0][0], text)
  left, right = (
    side if BASE.search(other) else without(side)
    for side, other in ((left, right), (right, left))
  )
  return any(_same(*sides) for sides in _readings(left, right))


def _readings(left: str, right: str) -> Iterator[tuple[latex.Read, latex.Read]]:
  """Yields the ways to read both: without names, as they stand, as intervals."""
  for named in (True, False):
    one, other = latex.read(left, named), latex.read(right, named)
    if one and other:
      names = [side.names for side in (one, other) if any(side.names)]
      if len(names) < 2 or names[0] == names[1]:
        yield one, other
    if '=' not in left + right:
      break
  spans = latex.intervals(left), latex.intervals(right)
  one, other = spans[0] or latex.read(left), spans[1] or latex.read(right)
  if any(spans) and one and other and len({one.names[0], other.names[0]} - {''}) < 2:
    yield one, other


def _bases_differ(left: str, right: str) -> bool:
  bases = [
    sorted(base.strip('{ }') for base in BASE.findall(text)) for text in (left, right)
  ]
  return bool(bases[0]) and bases[0] != (bases[1] or ['10'] * len(bases[0]))


def _same(left: latex.Read, right: latex.Read) -> bool:
  """Returns whether values and units agree and what `left` claims beside is true."""
  if right.claims or not latex.same_units(left, right):
    return False
  bodies = [','.join(side.bodies) for side in (left, right)]
  if len(left.bodies) != len(right.bodies) and not GROUP.search(''.join(bodies)):
    return False
  mine, its = (value(body) for body in bodies)
  if mine is not None and its is not None:
    percent = [latex.PERCENT in side.units for side in (left, right)]
    factors = (1, 100) if percent[0] != percent[1] else (1,)
    more, less = (mine, its) if percent[0] else (its, mine)
    if not any(more == factor * less for factor in factors):
      return False
  elif latex.forms(bodies[0]) - latex.forms(bodies[1], truth=True):
    return False
  elif not _equal_values(*bodies):
    return False
  return all(_equal_values(*claim) for claim in left.claims)


def _equal_values(left: str, right: str) -> bool:
  """Returns whether two expressions are equal, whatever their forms."""
  if latex.squeeze(left) == latex.squeeze(right):
    return True
  values = value(left), value(right)
  if None not in values:
    return values[0] == values[1]
  return symbolic.equal(*(latex.signs(text) for text in (left, right)))


def normal(text: str) -> str:
  """Returns the text as the field's `strip_string` has it (math500_utils.py:155-221).

  Raises ValueError or IndexError where the reference raises: two units, a trailing
  \\frac or \\sqrt, a slash between things that are no integers.
  """
  text = text.replace('\n', '').replace('\\!', '').replace('\\\\', '\\')
  text = text.replace('tfrac', 'frac').replace('dfrac', 'frac')
  for removed in ('\\left', '\\right', *DEGREES, '\\$'):
    text = text.replace(removed, '')
  head, *units = text.split('\\text{ ')  # a unit stands on the right
  if len(units) > 1:
    raise ValueError('more than one \\text{ ')
  text = head.replace('\\%', '').replace(' .', ' 0.').replace('{.', '{0.')
  if not text:
    return text
  text = '0' + text if text[0] == '.' else text
  name, *rest = text.split('=')
  if len(rest) == 1 and len(name) <= 2:  # 'x = 5'
    text = rest[0]
  text = _braced_fractions(_braced_roots(text).replace(' ', ''))
  return _fraction_of_slash('\\frac{1}{2}' if text == '0.5' else text)


def _braced_roots(text: str) -> str:
  r"""Writes \sqrt3 as \sqrt{3}."""
  head, *parts = text.split('\\sqrt')
  return head + ''.join(
    '\\sqrt' + (part if part[0] == '{' else f'{{{part[0]}}}{part[1:]}')
    for part in parts
  )


def _braced_fractions(text: str) -> str:
  r"""Writes \frac12 as \frac{1}{2}, and \frac1{72} as \frac{1}{72}."""
  head, *parts = text.split('\\frac')
  for part in parts:
    head += '\\frac'
    if part[0] == '{':
      head += part
    elif len(part) < 2:
      return text
    else:
      below = part[1] if part[1] == '{' else f'{{{part[1]}}}'
      head += f'{{{part[0]}}}{below}{part[2:]}'
  return head


def _fraction_of_slash(text: str) -> str:
  r"""Writes 3/4 as \frac{3}{4}; ValueError where a side is no integer."""
  sides = text.split('/')
  if len(sides) != 2:
    return text
  above, below = map(int, sides)
  return f'\\frac{{{above}}}{{{below}}}' if (text == f'{above}/{below}') else text


def value(text: str) -> fractions.Fraction | None:
  """Returns the exact value of a plain integer, decimal or fraction, else None.

  A dollar sign, commas between thousands and degrees are allowed. A per cent sign is
  not, because 50 % may mean 0.5 or 50.
  """
  if len(text) > gsm8k.MAX_DIGITS:
    return None
  text = latex.clean(text).replace(',\\!', ',')
  for removed in DEGREES:
    text = text.replace(removed, '')
  text = re.sub(r'^(-?)\s*\\\$\s*', r'\1', text.strip())
  fraction = FRACTION.fullmatch(text)
  if fraction:
    sign, above, below = fraction.groups()
    sides = [int(f'{sign}1') * int(above), int(below)]
  else:
    sides = text.removeprefix('+').split('/', 1)
    if not all(gsm8k.EXACT.fullmatch(side.strip()) for side in sides):
      return None
    sides = [fractions.Fraction(side.strip().replace(',', '')) for side in sides]
  above, below = (*sides, 1)[:2]
  return fractions.Fraction(above) / below if below else None


def record(example: dict) -> tuple[str, str]:
  """Returns (problem, the answer as LaTeX), as generations are saved."""
  return example['problem'], gold(example)


def recall(question: str, truth: object) -> dict:
  """Returns the example of a saved generation; ValueError if truth is no answer.

  The truth must be text whose braces pair.
  """
  if isinstance(truth, str) and latex.clean(truth):
    solution = f'\\boxed{{{truth}}}'
    if answers.last_boxed(solution) == truth:
      return {'problem': question, 'solution': solution}
  raise ValueError(f'ground_truth {truth!r} is not an answer')


TASK = Task(
  SOURCE.load, prompt, target, reward, grade, extra, answer, record, recall,
  styles=tuple(TEMPLATES), threads=True, options={'generated': (), 'file': ()},
  terms=('correctness', 'format'), forms=('format',), reasons=True,
)  # fmt: skip
