r"""Countdown: reach a target with + - * / and each given number once.

Generated problems have three numbers and at least one solution. A problem is
its sorted numbers and its target. A hash of these puts it in a split (80 % train,
10 % validation, 10 % test), so splits share no problem, whatever the file or the
seed. With `TaskOptions.held` = 'numbers' the hash is of the numbers alone. Files have
the field's columns: `input` and `output`, or `nums` (or `numbers`) and `target`.
Problems with fewer than 2 or more than 6 numbers are left out. With
`TaskOptions.numbers` (the field's value: 3) only problems with that many numbers stay.

'paper' follows DMPO reward_func.py:96-180 for the reward and DMPO
eval/parse_and_get_acc.py:158-266 for the grade, without their `eval`. Where we
differ, on purpose:
* `**` and `//` are an evaluation error, as are more than 256 characters, 32 open
  parentheses or 9 digits. Only the last MAX_TEXT characters are read. Values are
  exact.
* Without a \boxed the grade reads the first <answer>, which the reference intends.
  Its helper returns the whole text there, so its <answer> branch runs only for a
  \boxed that never closes.
'strict' wants the bare expression, or one in the \boxed that style 'eval' asks for, or
the steps of style 'steps', 3*5=15; 7+15=22: each is true, and no number or result is
used twice. It gives 0.1 only if it uses the numbers. In a \boxed the operators may be
LaTeX's, and '= target' may follow.
"""

import collections
import fractions
import functools
import itertools
import math
import re
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from dmpo_jax.tasks import answers, arithmetic, datasets
from dmpo_jax.types import Task, TaskOptions

LARGEST = 99  # upper bound of generated targets and of `TaskOptions.largest`
MAX_GENERATED = 200_000  # problems per split; with numbers to 99 there are more
MISSES = 5000  # draws in a row without a new problem; then generation gives up
TOLERANCE = fractions.Fraction(1, 100_000)  # of the reference; 'paper' keeps it
FIELDS = (('input', 'output'), ('nums', 'target'), ('numbers', 'target'))

CHAT = """Write an arithmetic expression whose value is exactly the target. \
Use every given number once and no other number; the operations are +, -, * \
and /, and parentheses are allowed.

First think between <reasoning> and </reasoning>. Then write just the \
expression between <answer> and </answer>, without an equals sign and without \
the target.

Numbers: {numbers}
Target: {target}
"""

EVAL = """Find an arithmetic expression that uses every number of the list \
once and whose value is the target. The operations are +, -, * and /. Reason \
step by step, and put the expression in \\boxed{{}}. Answer in this form:

<reasoning>
your reasoning
</reasoning>
<answer>
\\boxed{{...}}
</answer>

Numbers: {numbers}
Target: {target}"""
STEPS = '{padded}={target:2}:'  # ' 3, 5,12=27:'
TEMPLATES = {'bare': '{written}={target}', 'chat': CHAT, 'eval': EVAL, 'steps': STEPS}
_TERM = r' *([0-9]{1,9}|\([0-9]{1,9}/[0-9]{1,9}\)) *'
STEP = re.compile(f'{_TERM}([-+*/]){_TERM}={_TERM}')  # 3*5=15, 8/3=(8/3)

LATEX = tuple(
  (re.compile(latex), plain)
  for latex, plain in (
    (r'\\(?:left|right)(?![a-z])|\\[,;:!() ]|\$', ''),
    (r'\\(?:times|cdot|ast)(?![a-z])|[\u00d7\u22c5\u00b7\u2217]', '*'),
    (r'\\div(?![a-z])|\u00f7', '/'),
    (r'\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}', r'((\1)/(\2))'),
    ('[\u2212\u2013]', '-'),
  )
)
_BEFORE_EQUALS = '0123456789+-*/() '
_AFTER_EQUALS = '0123456789. '

# ---- problems


def split_of(numbers: Sequence[int], target_value: int, held: str = 'problem') -> str:
  """Returns the split that owns a problem, by a fixed hash of the problem.

  held: 'numbers' hashes the numbers alone, so all their targets share a split.
  """
  key = ','.join(map(str, sorted(numbers)))
  if held == 'problem':
    key += f'={target_value}'
  bucket = zlib.crc32(key.encode()) % 10
  return 'train' if bucket < 8 else datasets.SPLITS[bucket - 7]


def load(split: str, options: TaskOptions) -> list[dict]:
  """Returns examples {'numbers', 'target', 'expression'}; see `TaskOptions`.

  Raises ValueError for an unknown split, a size out of range and a bad file.
  """
  size, count = datasets.size_of(split, options), options.numbers
  if count not in (0, 2, 3, 4, 5, 6):
    raise ValueError(f'data.numbers = {count} must be 2 to 6, or 0 for all of these')
  if options.path:
    source = datasets.Source(
      'countdown',
      'huggingface.co/datasets/Jiayi-Pan/Countdown-Tasks-3to4 (train.jsonl), and '
      'countdown_cd3_test.jsonl of github.com/dllm-reasoning/d1 (test.jsonl)',
      _read,
      lambda e: split_of(e['numbers'], e['target'], options.held),
      lambda e: (*sorted(e['numbers']), e['target']),
      lambda e: count in (0, len(e['numbers'])),
      {'test': 'countdown_cd3_test.jsonl'},
    )
    chosen = source.load(split, options)
    return [dict(e, expression=solve(e['numbers'], e['target'])) for e in chosen]
  if count not in (0, 3):
    raise ValueError(
      f'data.numbers = {count} needs a file (data.path): generated problems have 3'
    )
  if not 1 <= size <= MAX_GENERATED:
    raise ValueError(f'data.{split}_size = {size} must be 1 to {MAX_GENERATED}')
  if not 2 <= options.largest <= LARGEST:
    raise ValueError(f'data.largest = {options.largest} must be 2 to {LARGEST}')
  return _generate(split, size, options)


def _generate(split: str, size: int, options: TaskOptions) -> list[dict]:
  rng = np.random.default_rng([options.seed, datasets.SPLITS.index(split)])
  examples, misses = {}, 0
  while len(examples) < size:
    misses += 1
    if misses > MISSES:
      raise ValueError(
        f'data.{split}_size = {size} is too large: with data.largest = '
        f'{options.largest} only {len(examples)} problems were found'
      )
    numbers = rng.integers(1, options.largest + 1, 3).tolist()
    # Only targets of this split, so that no draw of numbers is wasted.
    expressions = {
      n: written
      for (n, d), (written, _) in _table(tuple(numbers)).items()
      if d == 1 and 1 <= n <= LARGEST and split_of(numbers, n, options.held) == split
    }
    if not expressions:
      continue
    value = list(expressions)[rng.integers(len(expressions))]
    key = (*sorted(numbers), value)
    if key not in examples:
      misses = 0
      examples[key] = {
        'numbers': numbers,
        'target': value,
        'expression': expressions[value],
      }
  return list(examples.values())


def _read(path: str) -> Iterator[dict]:
  for line, record in datasets.read_rows(path):
    example = _problem(record, f'{path}:{line}')
    if 2 <= len(example['numbers']) <= 6:
      yield example


def _problem(record: dict, where: str) -> dict:
  """Returns {'numbers', 'target'} of a record; ValueError if they are no numbers."""
  fields = [names for names in FIELDS if all(n in record for n in names)]
  if not fields:
    raise ValueError(
      f'{where}: the columns must be input and output, or nums and target, '
      f'they are {", ".join(record)}'
    )
  numbers, value = (record[name] for name in fields[0])
  if isinstance(numbers, str):
    numbers = numbers.split(',')
  if not isinstance(numbers, list):
    raise ValueError(f'{where}: numbers {numbers!r} are no list')
  numbers = [_whole(number, where) for number in numbers]
  if any(number < 1 for number in numbers):
    raise ValueError(f'{where}: numbers {numbers} are not all positive')
  return {'numbers': numbers, 'target': _whole(value, where)}


def _whole(value: object, where: str) -> int:
  """Returns an int of at most MAX_DIGITS digits; ValueError for anything else.

  6.0 is one too: tables with a missing value store all their numbers so.
  """
  written = str(value).strip() if type(value) in (int, float, str) else ''
  found = re.fullmatch(rf'(-?[0-9]{{1,{arithmetic.MAX_DIGITS}}})(?:\.0*)?', written)
  if not found:
    raise ValueError(f'{where}: {value!r} is not a whole number')
  return int(found[1])


# ---- the solver tries all trees over all partitions of the numbers. A value is a
# reduced (numerator, denominator) pair, exact like a Fraction and much faster.

Numbers = tuple[int, ...]
Value = tuple[int, int]
Written = tuple[str, int]  # an expression; its precedence: 1 sum, 2 product, 3 number


def _combine(x: Value, y: Value) -> Iterator[tuple[Value, str, bool]]:
  """Yields (value, operator, whether the operands are swapped) of all six results."""
  (xn, xd), (yn, yd) = x, y
  yield _reduced(xn * yd + yn * xd, xd * yd), '+', False
  yield _reduced(xn * yn, xd * yd), '*', False
  difference, d = _reduced(xn * yd - yn * xd, xd * yd)
  yield (difference, d), '-', False
  yield (-difference, d), '-', True
  if yn:
    yield _reduced(xn * yd, xd * yn), '/', False
  if xn:
    yield _reduced(yn * xd, yd * xn), '/', True


def _reduced(n: int, d: int) -> Value:
  common = math.gcd(n, d) if d > 0 else -math.gcd(n, d)
  return n // common, d // common


def _write(left: Written, operator: str, right: Written) -> Written:
  """Returns left operator right, with only the parentheses that are needed."""
  (a, rank_a), (b, rank_b) = left, right
  rank = 1 if operator in '+-' else 2
  a = f'({a})' if rank_a < rank else a
  # a-(b-c) and a/(b*c) need them on the right, a+(b-c) and a*(b/c) do not.
  b = f'({b})' if rank_b < rank + (operator in '-/') else b
  return a + operator + b, rank


def _halves(numbers: Numbers) -> Iterator[tuple[Numbers, Numbers]]:
  """Yields all ways to divide the numbers in two, the smaller part first."""
  indices = range(len(numbers))
  for size in range(1, len(numbers) // 2 + 1):
    for part in itertools.combinations(indices, size):
      rest = tuple(numbers[at] for at in indices if at not in part)
      yield tuple(numbers[at] for at in part), rest


@functools.lru_cache(maxsize=1024)
def _table(numbers: Numbers) -> dict[Value, Written]:
  """Returns the shortest expression of each value that the numbers can make."""
  if len(numbers) == 1:
    return {(numbers[0], 1): (str(numbers[0]), 3)}
  table = {}
  for part, rest in _halves(numbers):
    for (x, left), (y, right) in itertools.product(
      _table(part).items(), _table(rest).items()
    ):
      for value, operator, swapped in _combine(x, y):
        pair = (right, left) if swapped else (left, right)
        written = _write(pair[0], operator, pair[1])
        if value not in table or len(written[0]) < len(table[value][0]):
          table[value] = written
  return table


def solve(numbers: Sequence[int], target_value: int) -> str:
  """Returns an expression with minimal parentheses, or '' if there is none."""
  written = _search(tuple(numbers), (target_value, 1))
  return written[0] if written else ''


def _search(numbers: Numbers, goal: Value) -> Written | None:
  """Works back from the goal, because tables of four and more numbers are large.

  Only six values make the goal from one half's value: those of goal op value.
  """
  if len(numbers) <= 3:
    return _table(numbers).get(goal)
  for part, rest in _halves(numbers):
    for x, left in _table(part).items():
      for y in {value for value, _, _ in _combine(goal, x)}:
        right = _search(rest, y)
        if right is None:
          continue
        for value, operator, swapped in _combine(x, y):
          if value == goal:
            pair = (right, left) if swapped else (left, right)
            return _write(pair[0], operator, pair[1])
  return None


def chain(values: tuple[Value, ...], goal: int, whole: bool = True) -> list[str] | None:
  """Returns steps such as ' 3* 5=15' and ' 7+15=22'; None if there are none.

  whole: results are natural numbers; else they are 0 and fractions, too. Integers have
  two places, so that a small model finds each at its own position.
  """
  if len(values) == 1:
    return [] if values[0] == (goal, 1) else None
  for i, j in itertools.permutations(range(len(values)), 2):
    rest = tuple(x for at, x in enumerate(values) if at not in (i, j))
    for made, operator, swapped in _combine(values[i], values[j]):
      twice = swapped or (operator in '+*' and i > j)
      if twice or made[0] < whole or (whole and made[1] != 1):
        continue
      if (more := chain((*rest, made), goal, whole)) is not None:
        x, y, z = (
          f'{n:2}' if d == 1 else f'({n}/{d})' for n, d in (values[i], values[j], made)
        )
        return [f'{x}{operator}{y}={z}', *more]
  return None


def _composed(text: str) -> str:
  """Returns the expression that steps build, '' if one is false or leads nowhere.

  Text that is no steps is returned as it is.
  """
  parts = text.split(';')
  steps = [found for part in parts if (found := STEP.fullmatch(part))]
  if len(steps) < len(parts):
    return text
  made, written = {}, ''  # result -> expressions that no later step has used
  for left, operator, right, value in (step.groups() for step in steps):
    a, b = (made[x].pop() if made.get(x) else x for x in (left, right))
    written = f'({a}{operator}{b})'
    try:
      if arithmetic.evaluate(left + operator + right) != arithmetic.evaluate(value):
        return ''
    except arithmetic.Refused:
      return ''
    made.setdefault(value, []).append(written)
  return written if sum(map(len, made.values())) == 1 else ''


# ---- prompts and rewards


def prompt(example: dict, style: str) -> str:
  """Returns the user's message; ValueError for an unknown style."""
  numbers = list(example['numbers'])
  return answers.choose('style', style, TEMPLATES).format(
    numbers=numbers,
    target=example['target'],
    written=','.join(map(str, numbers)),
    padded=','.join(f'{n:2}' for n in sorted(numbers)),
  )


def target(example: dict, style: str) -> str:
  """Returns a correct completion; ValueError if unsolvable or the style is unknown."""
  answers.choose('style', style, TEMPLATES)
  if style == 'steps':
    values = tuple((n, 1) for n in sorted(example['numbers']))
    goal = example['target']
    if not (steps := chain(values, goal) or chain(values, goal, whole=False)):
      raise ValueError(f'no steps from {example["numbers"]} make {example["target"]}')
    return ';'.join(steps)
  written = example.get('expression') or solve(example['numbers'], example['target'])
  if not written:
    raise ValueError(f'no expression of {example["numbers"]} makes {example["target"]}')
  if style == 'bare':
    return written
  written = f'\\boxed{{{written}}}' if style == 'eval' else written
  return answers.closing(style) + f'<answer>\n{written}\n</answer>'


def reward(text: str, example: dict, protocol: str) -> dict[str, float]:
  """Returns {'countdown': 0, 0.1 or 1}; ValueError for an unknown protocol."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  if protocol == 'strict':
    value = _value(_strict_answer(text, example), example)
    attempted, right = value is not None, value == example['target']
  else:
    answer = answers.last_answer(text)
    attempted = answer is not None
    right = answer is not None and _close(answer, example)
  return {'countdown': 1.0 if right else 0.1 if attempted else 0.0}


def grade(text: str, example: dict, protocol: str) -> float:
  """Returns 1.0 if the answer is right, else 0.0; ValueError as for `reward`."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  if protocol == 'strict':
    return float(reward(text, example, protocol)['countdown'] == 1)
  return float(_close(_graded(text), example))


def extra(text: str, example: dict) -> dict[str, float]:
  """Returns {'well_formed'}: 1.0 if the strict answer parses, whatever its numbers."""
  try:
    arithmetic.evaluate(_strict_answer(text, example))
  except arithmetic.Refused:
    return {'well_formed': 0.0}
  return {'well_formed': 1.0}


def answer(text: str, example: dict, protocol: str) -> str | None:
  """Returns the value reached, for a majority vote; None if the answer is not legal."""
  lenient = protocol == 'paper'
  value = _value(
    _graded(text) if lenient else _strict_answer(text, example), example, lenient
  )
  return None if value is None else str(value)


def _strict_answer(text: str, example: dict) -> str:
  r"""Returns the last <answer>, else the text; of a \boxed in it what it holds."""
  text = answers.answer_or_text(text)
  boxed = answers.last_boxed(text, strict=True)
  if boxed is None:
    return _composed(text)
  for latex, plain in LATEX:
    boxed = latex.sub(plain, boxed)
  left, equals, right = boxed.partition('=')
  return left if equals and right.strip() == str(example['target']) else boxed


def _value(
  expression: str, example: dict, lenient: bool = False
) -> fractions.Fraction | None:
  """Returns the value, or None unless it is arithmetic on exactly the numbers."""
  try:
    used = collections.Counter(arithmetic.numbers(expression))
    if used != collections.Counter(example['numbers']):
      return None
    return arithmetic.evaluate(expression, lenient)
  except arithmetic.Refused:
    return None


def _close(expression: str, example: dict) -> bool:
  """Returns the reference's verdict: the right numbers, and a value within 1e-5."""
  value = _value(expression, example, lenient=True)
  return value is not None and abs(value - example['target']) < TOLERANCE


def _graded(text: str) -> str:
  r"""Returns the evaluation's answer: the last \boxed, else the first <answer>, else
  the whole text; of an equation what stands before '='."""
  text = answers.clip(text)
  answer = answers.last_boxed(text)
  if answer is None:
    answer = answers.first_answer(text)
  answer = text if answer is None else answer.strip()
  for latex, plain in (('\\div', '/'), ('\\times', '*'), ('\\cdot', '*')):
    answer = answer.replace(latex, plain)
  # Searches r'([0-9+\-*/() ]+)=[0-9. ]+' in one pass over the parts around '='.
  for left, right in itertools.pairwise(answer.split('=')):
    run = left[len(left.rstrip(_BEFORE_EQUALS)) :]
    if run and right and right[0] in _AFTER_EQUALS:
      return run.strip()
  return answer


def record(example: dict) -> tuple[str, list]:
  """Returns (the problem, [numbers, target]), as generations are saved."""
  return prompt(example, 'bare'), [list(example['numbers']), example['target']]


def recall(question: str, truth: object) -> dict:
  """Returns the example of a saved generation; ValueError if truth is no problem."""
  del question
  if not isinstance(truth, list) or len(truth) != 2:
    raise ValueError(f'ground_truth {truth!r} is not [numbers, target]')
  return _problem({'nums': truth[0], 'target': truth[1]}, 'ground_truth')


TASK = Task(
  load, prompt, target, reward, grade, extra, answer, record, recall,
  styles=tuple(TEMPLATES), terms=('countdown',), reasons=True,
  options={'generated': ('seed', 'largest', 'held'), 'file': ('numbers', 'held')},
  unpaid=('bare', 'steps', 'eval'), best=1.0,
)  # fmt: skip
