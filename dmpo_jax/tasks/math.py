r"""MATH: competition problems whose answer is a LaTeX expression.

Files are the field's, with columns problem and solution (the last \boxed of
the solution is the answer) and perhaps answer. data.path is a directory with a
train and a test file, or one file that a hash of the problem shares among the
splits.

'paper' is DMPO reward_func.py:240-287 with math500_utils.py, two terms of at
most 3.0 together, and eval/parse_and_get_acc.py:99-155 for the grade. Where
there is no \boxed the grade reads the first <answer>, as the reference means
to; its helper hands back the whole text there. Only the last MAX_TEXT
characters are read.
'strict' reads the last \boxed with balanced braces, of the last <answer> if
there is one, and also compares numbers as numbers and expressions as
expressions (symbolic.py: math-verify in a process that may be killed). A hedge
or a false equation around the right number is wrong ('7x = 5' for 5).
"""

import fractions
import re

from dmpo_jax.tasks import answers, gsm8k, symbolic
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
  # The lineage's evaluation asks of MATH what it asks of GSM8K.
  'eval': gsm8k.EVAL.replace('{question}', '{problem}'),
  'boxed': gsm8k.TEMPLATES['boxed'].replace('question', 'problem'),
}
MAX_DIGITS = 100  # of a number that is compared exactly
DECIMAL = r'(-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?)'
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
NAME = re.compile(  # of what an answer is the value of: x, y_1, f(x), \theta
  rf'(?:[a-zA-Z]+|\\(?i:{GREEK})|m?\\angle[a-zA-Z0-9]+'
  r'|\\(?:text|mathrm|mathbf|vec|overline)\{[a-zA-Z]+\})'
  r"(?:_(?:[a-zA-Z0-9]|\{[a-zA-Z0-9]+\}))?(?:'*|\^\{-1\})(?:\([^()]*\))?"
)
BASE = re.compile(r'[0-9]_(\{[^{}]*\}|.)')
SIGN = re.compile(r'\^\{\\circ\}|\^\\circ|\\?\$|\\%')


def load(split, options):
  """Examples {'problem', 'solution'}; ValueError without readable files."""
  if not options.path:
    raise ValueError(
      'data.task = math needs data.path: a directory with train.jsonl and '
      'test.jsonl, with columns problem and solution (on the hub: '
      'ankner/math-500 for training, HuggingFaceH4/MATH-500 for the test)'
    )
  return answers.take(
    'math',
    _read,
    lambda e: answers.split_by(e['problem']),
    lambda e: answers.words(e['problem']),
    split,
    options,
  )


def _read(path):
  for line, record in answers.read_texts(path, ('problem', 'solution')):
    if gold(record) is None:
      raise ValueError(f'{path}:{line}: the solution has no \\boxed answer')
    yield record


def gold(example):
  r"""What the solution's last \boxed holds, or None."""
  return answers.last_boxed(example['solution'])


def prompt(example, style):
  """The user's message; ValueError for an unknown style."""
  return answers.choose('style', style, TEMPLATES).format(problem=example['problem'])


def target(example, style):
  """The solution in the wanted format; ValueError for an unknown style."""
  answers.choose('style', style, TEMPLATES)
  boxed = f'\\boxed{{{gold(example)}}}'
  if style == 'bare':
    return boxed
  return (
    f'<reasoning>\n{example["solution"].strip()}\n</reasoning>\n'
    f'<answer>\n{boxed}\n</answer>\n'
  )


def reward(text, example, protocol):
  """{'correctness', 'format'}, 3.0 at most; ValueError: unknown protocol."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  text = answers.clip(text)
  if protocol == 'paper':
    answer = (
      text.split('<answer>')[1].split('</answer>')[0] if ('<answer>' in text) else None
    )
    where = text if answer is None else answer
    boxed = 1.0 if '\\boxed' in where else 0.5
    return {
      'correctness': 2.0 * equal_text(_rewarded(text), gold(example)),
      'format': 0.5 * ((answer is not None) + boxed),
    }
  answer = answers.last_answer(text)
  return {
    'correctness': 2.0 * equal(_strict_answer(text), gold(example)),
    'format': 0.5 * answers.formatted(text.strip())
    + 0.5
    * (answer is not None and answers.last_boxed(answer, strict=True) is not None),
  }


def grade(text, example, protocol):
  """1.0 if the answer is right, else 0.0; ValueError as for `reward`."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  text = answers.clip(text)
  if protocol == 'strict':
    return float(equal(_strict_answer(text), gold(example)))
  answer = answers.last_boxed(text)
  if not answer:
    answer = (answers.first_answer(text) or '').strip() or None
  return float(answer is not None and equal_text(answer, gold(example)))


def extra(text, example):
  r"""{'well_formed'}: 1.0 if there is a closed \boxed where it should be."""
  del example
  return {'well_formed': float(_strict_answer(answers.clip(text)) is not None)}


def answer(text, example, protocol):
  """What a majority vote counts: the answer, normalised; None without one."""
  del example
  text = answers.clip(text)
  found = (
    _strict_answer(text)
    if protocol == 'strict'
    else answers.last_boxed(text) or answers.first_answer(text)
  )
  if not found:
    return None
  exact = value(found)
  try:
    return normal(found) if exact is None else str(exact)
  except (ValueError, IndexError):
    return found


def _rewarded(text):
  r"""What the reward compares: the last \boxed, else the whole text.

  A lone \fbox is found by the reference's helper, its command left on.
  """
  answer = answers.last_boxed(text)
  if answer is None and '\\boxed' not in text and '\\fbox' in text:
    inner = answers.braced(text, text.rfind('\\fbox') + len('\\fbox'))
    return text if inner is None else f'\\fbox{{{inner}}}'
  return text if answer is None else answer


def _strict_answer(text):
  r"""The last \boxed, within the last <answer> if there is one, or None."""
  answer = answers.last_answer(text)
  return answers.last_boxed(text if answer is None else answer, strict=True)


# ---- equality


def equal_text(left, right):
  """Whether two answers are the same string once normalised.

  The field's `is_equiv` (math500_utils.py:33-50): what cannot be normalised is
  compared as it stands.
  """
  try:
    return normal(left) == normal(right)
  except (ValueError, IndexError):
    return left == right


def equal(left, right):
  """As `equal_text`, or as numbers, or as expressions; None equals nothing.

  What says more than the truth does, another number or a false equation, is
  not equal. Expressions are compared in a process that is killed at its
  deadline.
  """
  if left is None or right is None:
    return False
  left, right = _measured(left), _measured(right)
  if '=' not in right:
    left = _unnamed(left)
  elif '=' not in left:
    right = _unnamed(right)
  if _strays(left, right):
    return False
  values = value(left), value(right)
  if None not in values:
    return values[0] == values[1]
  # Side by side: `normal` would drop what stands before '='.
  sides = left.split('='), right.split('=')
  same = len(sides[0]) == len(sides[1]) and all(map(equal_text, *sides))
  return same or bool(left) and symbolic.equal(left, right)


def _measured(text):
  r"""`text` without the unit at its end, where `normal` sees a unit in all that
  follows a '\text{ '."""
  text = text.strip()
  found = UNIT.fullmatch(text) if text.endswith(('}', '.', '2', '3')) else None
  return (found[1] if found else text).replace('\\text{ ', '\\text{')


def _unnamed(text):
  """`text` without the names in it: 'x = 1, y_1 = 2' -> '1,2'."""
  parts = JOINED.split(text)
  for i, part in enumerate(parts):
    name, equals, found = part.partition('=')
    if equals and NAME.fullmatch(re.sub(r'\\[,;:! ]|\s', '', name)):
      parts[i] = found.strip()
  return ''.join(parts)


def _strays(left, right):
  """Whether `left` has what no way to write `right` has: an equation, a sign
  amid a number, a doubt, or another base."""
  if '=' in left and '=' not in right:
    return True
  bases = [
    sorted(base.strip('{ }') for base in BASE.findall(text)) for text in (left, right)
  ]
  if all(bases) and bases[0] != bases[1]:
    return True
  amid = lambda text: re.search(
    r'[0-9.]#+[0-9.]', SIGN.sub('#', ''.join(text.replace('\\!', '').split()))
  )
  return bool(
    amid(left) and not amid(right) or DOUBT.search(left) and not DOUBT.search(right)
  )


def normal(text):
  """The field's `strip_string` (math500_utils.py:155-221), as a string.

  ValueError or IndexError where the reference raises: units named twice, a
  trailing \\frac or \\sqrt, a slash between things that are no integers.
  """
  for old, new in (
    ('\n', ''),
    ('\\!', ''),
    ('\\\\', '\\'),
    ('tfrac', 'frac'),
    ('dfrac', 'frac'),
    ('\\left', ''),
    ('\\right', ''),
    *((d, '') for d in DEGREES),
    ('\\$', ''),
  ):
    text = text.replace(old, new)
  head, *units = text.split('\\text{ ')  # units stand on the right
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


def _braced_roots(text):
  r"""\sqrt3 -> \sqrt{3}."""
  head, *parts = text.split('\\sqrt')
  return head + ''.join(
    '\\sqrt' + (part if part[0] == '{' else f'{{{part[0]}}}{part[1:]}')
    for part in parts
  )


def _braced_fractions(text):
  r"""\frac12 -> \frac{1}{2}, \frac1{72} -> \frac{1}{72}."""
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


def _fraction_of_slash(text):
  r"""3/4 -> \frac{3}{4}; ValueError where a side is no integer."""
  sides = text.split('/')
  if len(sides) != 2:
    return text
  above, below = map(int, sides)
  return f'\\frac{{{above}}}{{{below}}}' if (text == f'{above}/{below}') else text


def value(text):
  """The exact value of a plain integer, decimal or fraction, else None.

  A dollar sign before it, commas between thousands and degrees are allowed; a
  per cent sign is not, for 50 % is 0.5 or 50, as one likes.
  """
  if len(text) > MAX_DIGITS:
    return None
  for sign in (*DEGREES, '\\$', '$', '\\!', '{,}'):
    text = text.replace(sign, ',' if sign == '{,}' else '')
  text = text.replace('\N{MINUS SIGN}', '-').strip()
  try:
    text = _braced_fractions(text.replace('dfrac', 'frac').replace('tfrac', 'frac'))
  except IndexError:
    return None
  fraction = FRACTION.fullmatch(text)
  if fraction:
    sign, above, below = fraction.groups()
    ratio = fractions.Fraction(int(above), int(below)) if int(below) else None
    return -ratio if sign and ratio is not None else ratio
  above, slash, below = text.partition('/')
  parts = [
    re.fullmatch(DECIMAL, side.strip())
    for side in ((above, below) if slash else (above,))
  ]
  if not all(part and any(map(str.isdigit, part[1])) for part in parts):
    return None
  ratio = fractions.Fraction(parts[0][1].replace(',', ''))
  divisor = fractions.Fraction(parts[1][1].replace(',', '')) if slash else 1
  return ratio / divisor if divisor else None


def record(example):
  """(problem, the answer as LaTeX)."""
  return example['problem'], gold(example)


def recall(question, truth):
  """The example of a saved generation; ValueError if truth is no text, or its
  braces do not pair."""
  if isinstance(truth, str) and truth.strip():
    example = {'problem': question, 'solution': f'\\boxed{{{truth}}}'}
    if gold(example) == truth:
      return example
  raise ValueError(f'ground_truth {truth!r} is not an answer')


TASK = Task(
  load=load,
  prompt=prompt,
  target=target,
  reward=reward,
  grade=grade,
  extra=extra,
  answer=answer,
  record=record,
  recall=recall,
  styles=tuple(TEMPLATES),
  threads=True,
)
