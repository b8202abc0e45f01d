r"""MATH: competition problems whose answer is a LaTeX expression.

Files have the field's columns, problem and solution. The last \boxed of the solution
is the answer.

'paper' follows DMPO reward_func.py:240-287 with math500_utils.py for the reward (two
terms, at most 3.0 in sum) and eval/parse_and_get_acc.py:99-155 for the grade. Where
we differ, on purpose: without a \boxed the grade reads the first <answer>, which the
reference intends. Its helper returns the whole text there. Only the last MAX_TEXT
characters are read.
'strict' reads the last \boxed with balanced braces, within the last <answer> if there
is one. It also compares numbers as numbers and expressions as expressions
(symbolic.py: math-verify in a process that can be killed). A hedge or a false equation
around the right number is wrong ('7x = 5' for 5).
"""

import fractions
import re
from collections.abc import Iterator

from dmpo_jax.tasks import answers, datasets, gsm8k, symbolic
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
DOUBT = re.compile(r'\b(?:not|maybe|perhaps|probably)\b')
UNIT = re.compile(
  rf'(.*\S) *\\text\{{ (?![^{{}}]*(?:\b(?:or|and)\b|{DOUBT.pattern}))'
  r'[a-zA-Z. /]+\}(?:\^\{?[23]\}?)?\.?',
  re.DOTALL,
)
JOINED = re.compile(r'(,|\\text\{ *(?:or|and) *\})')
GREEK = (
  'alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|'
  'rho|sigma|tau|phi|varphi|chi|psi|omega'
)
NAME = re.compile(  # the left side of an answer such as x = 5: x, y_1, f(x), \theta
  rf'(?:[a-zA-Z]+|\\(?i:{GREEK})|m?\\angle[a-zA-Z0-9]+'
  r'|\\(?:text|mathrm|mathbf|vec|overline)\{[a-zA-Z]+\})'
  r"(?:_(?:[a-zA-Z0-9]|\{[a-zA-Z0-9]+\}))?(?:'*|\^\{-1\})(?:\([^()]*\))?"
)
BASE = re.compile(r'[0-9]_(\{[^{}]*\}|.)')
SIGN = re.compile(r'\^\{\\circ\}|\^\\circ|\\?\$|\\%')


def _read(path: str) -> Iterator[dict]:
  for line, record in datasets.read_texts(path, ('problem', 'solution')):
    if answers.last_boxed(record['solution']) is None:
      raise ValueError(f'{path}:{line}: the solution has no \\boxed answer')
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
  """Returns the solution in the wanted format; ValueError for an unknown style."""
  answers.choose('style', style, TEMPLATES)
  boxed = f'\\boxed{{{gold(example)}}}'
  if style == 'bare':
    return boxed
  steps = example['solution'].strip()
  return f'<reasoning>\n{steps}\n</reasoning>\n<answer>\n{boxed}\n</answer>\n'


def reward(text: str, example: dict, protocol: str) -> dict[str, float]:
  """Returns {'correctness', 'format'}, at most 3.0 in sum; ValueError: protocol."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  text = answers.clip(text)
  if protocol == 'strict':
    answer = answers.last_answer(text)
    boxed = answer is not None and answers.last_boxed(answer, strict=True) is not None
    return {
      'correctness': 2.0 * equal(_strict_answer(text), gold(example)),
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
    return normal(answer) if exact is None else str(exact)
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
  r"""Returns the last \boxed, within the last <answer> if there is one, or None."""
  answer = answers.last_answer(text)
  return answers.last_boxed(text if answer is None else answer, strict=True)


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
  """Returns whether two answers are equal as text, as numbers or as expressions.

  None equals nothing. An answer that adds to the truth (another number, a false
  equation) is not equal. Expressions are compared in a process that is killed at its
  deadline.
  """
  if left is None:
    return False
  left, right = _without_unit(left), _without_unit(right)
  if '=' not in right:
    left = _without_names(left)
  elif '=' not in left:
    right = _without_names(right)
  if _adds(left, right):
    return False
  values = value(left), value(right)
  if None not in values:
    return values[0] == values[1]
  # Compare each side of '=' on its own: `normal` would drop the left one.
  sides = left.split('='), right.split('=')
  same = len(sides[0]) == len(sides[1]) and all(map(equal_text, *sides))
  return same or bool(left) and symbolic.equal(left, right)


def _without_unit(text: str) -> str:
  r"""Returns `text` without the unit at its end.

  `normal` takes all that follows a '\text{ ' for a unit, so that space goes too.
  """
  text = text.strip()
  unit = UNIT.fullmatch(text) if text.endswith(('}', '.', '2', '3')) else None
  return (unit[1] if unit else text).replace('\\text{ ', '\\text{')


def _without_names(text: str) -> str:
  """Returns `text` without the names in it: 'x = 1, y_1 = 2' -> '1,2'."""
  parts = JOINED.split(text)
  for i, part in enumerate(parts):
    name, equals, content = part.partition('=')
    if equals and NAME.fullmatch(re.sub(r'\\[,;:! ]|\s', '', name)):
      parts[i] = content.strip()
  return ''.join(parts)


def _adds(left: str, right: str) -> bool:
  """Returns whether `left` has something that no way to write `right` has.

  That is an equation, a sign within a number, a doubt, or another base.
  """
  if '=' in left and '=' not in right:
    return True
  bases = [
    sorted(base.strip('{ }') for base in BASE.findall(text)) for text in (left, right)
  ]
  if all(bases) and bases[0] != bases[1]:
    return True
  split_number = lambda text: re.search(
    r'[0-9.]#+[0-9.]', SIGN.sub('#', ''.join(text.replace('\\!', '').split()))
  )
  return any(find(left) and not find(right) for find in (split_number, DOUBT.search))


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
  text = text.replace('{,}', ',').replace('\N{MINUS SIGN}', '-')
  for removed in (*DEGREES, '\\$', '$', '\\!'):
    text = text.replace(removed, '')
  text = text.strip().replace('dfrac', 'frac').replace('tfrac', 'frac')
  try:
    fraction = FRACTION.fullmatch(_braced_fractions(text))
  except IndexError:
    return None
  if fraction:
    sign, above, below = fraction.groups()
    sides = [int(f'{sign}1') * int(above), int(below)]
  else:
    sides = text.split('/', 1)
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
  if isinstance(truth, str) and truth.strip():
    solution = f'\\boxed{{{truth}}}'
    if answers.last_boxed(solution) == truth:
      return {'problem': question, 'solution': solution}
  raise ValueError(f'ground_truth {truth!r} is not an answer')


TASK = Task(
  SOURCE.load, prompt, target, reward, grade, extra, answer, record, recall,
  styles=tuple(TEMPLATES), threads=True, options={'generated': (), 'file': ()},
  terms=('correctness', 'format'),
)  # fmt: skip
