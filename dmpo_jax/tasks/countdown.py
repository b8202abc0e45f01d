r"""Countdown: reach a target with + - * / and each given number once.

Generated problems have three numbers and at least one solution. A problem is
its sorted numbers and its target; a hash of that puts it in a split (80% train,
10% validation, 10% test), so that splits share no problem, whatever the file
or the seed. Files are the field's JSONL: `input` and `output`, or `nums` (or
`numbers`) and `target`; lines with fewer than 2 or more than 6 numbers are
left out, and with `TaskOptions.numbers` (the field: 3) all with others.

'paper' is DMPO reward_func.py:96-180 for the reward and DMPO
eval/parse_and_get_acc.py:158-266 for the grade, without their `eval`.
Deviations: `**` and `//` count as an evaluation error, as do more than 256
characters, 32 open parentheses or 9 digits; only the last MAX_TEXT characters
are read; values are exact. And where there is no \boxed the grade reads the
first <answer>, as the reference means to; its helper hands back the whole text
there, so that its <answer> branch only runs for a \boxed that never closes.
'strict' wants the bare expression and gives 0.1 only if it uses the numbers.
"""

import collections
import fractions
import functools
import itertools
import math
import re
import zlib

import numpy as np

from dmpo_jax.tasks import answers, arithmetic
from dmpo_jax.types import Task

LARGEST = 99  # of generated targets, and the most for the numbers
MAX_GENERATED = 200_000  # problems per split; with numbers to 99 there are more
MISSES = 5000  # draws in a row without a new problem: there are no more
TOLERANCE = fractions.Fraction(1, 100_000)  # the reference's, kept in 'paper'
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
TEMPLATES = {'bare': '{written}={target}', 'chat': CHAT, 'eval': EVAL}

_BEFORE_EQUALS = '0123456789+-*/() '
_AFTER_EQUALS = '0123456789. '


def split_of(numbers, target_value):
  """The split that owns a problem, from a hash which never changes."""
  key = f'{",".join(map(str, sorted(numbers)))}={target_value}'
  bucket = zlib.crc32(key.encode()) % 10
  return 'train' if bucket < 8 else answers.SPLITS[bucket - 7]


def load(split, options):
  """Examples {'numbers', 'target', 'expression'}; see `TaskOptions`.

  Raises ValueError for an unknown split, a size out of range and a bad file.
  """
  size, count = answers.size_of(split, options), options.numbers
  if count not in (0, 2, 3, 4, 5, 6):
    raise ValueError(f'numbers={count}: need 2 to 6, or 0 for all of these')
  if count not in (0, 3) and not options.path:
    raise ValueError(
      f'numbers={count}: generated problems have 3; others need a file (data.path)'
    )
  if options.path:
    chosen = answers.take(
      'countdown',
      _read,
      _place,
      lambda e: (*sorted(e['numbers']), e['target']),
      split,
      options,
      keep=lambda e: count in (0, len(e['numbers'])),
    )
    return [dict(e, expression=solve(e['numbers'], e['target'])) for e in chosen]
  if not 1 <= size <= MAX_GENERATED:
    raise ValueError(f'{split}_size={size}: need 1 to {MAX_GENERATED}')
  if not 2 <= options.largest <= LARGEST:
    raise ValueError(f'largest={options.largest}: need 2 to {LARGEST}')
  rng = np.random.default_rng([options.seed, answers.SPLITS.index(split)])
  seen, examples, misses = set(), [], 0
  while len(examples) < size:
    misses += 1
    if misses > MISSES:
      raise ValueError(
        f'{split}_size={size}: with numbers to '
        f'{options.largest} only {len(examples)} were found'
      )
    numbers = rng.integers(1, options.largest + 1, 3).tolist()
    reach = {
      n: written
      for (n, d), (written, _) in _table(tuple(numbers)).items()
      if d == 1 and 1 <= n <= LARGEST
    }
    # Of this split's targets, so that no draw of numbers is wasted on others.
    mine = [value for value in reach if split_of(numbers, value) == split]
    if not mine:
      continue
    value = mine[rng.integers(len(mine))]
    key = (*sorted(numbers), value)
    if key not in seen:
      seen.add(key)
      misses = 0
      examples.append({'numbers': numbers, 'target': value, 'expression': reach[value]})
  return examples


def _read(path):
  for line, record in answers.read_jsonl(path):
    numbers, value = _problem(record, f'{path}:{line}')
    if 2 <= len(numbers) <= 6:
      yield {'numbers': numbers, 'target': value}


def _place(example):
  return split_of(example['numbers'], example['target'])


def _problem(record, where):
  """(numbers, target) of a line; ValueError if they are not whole numbers."""
  fields = [names for names in FIELDS if all(n in record for n in names)]
  if not fields:
    raise ValueError(f'{where}: neither input and output nor nums and target')
  numbers, value = (record[name] for name in fields[0])
  if isinstance(numbers, str):
    numbers = numbers.split(',')
  if not isinstance(numbers, list):
    raise ValueError(f'{where}: numbers {numbers!r} are no list')
  numbers = [_whole(number, where) for number in numbers]
  if any(number < 1 for number in numbers):
    raise ValueError(f'{where}: numbers {numbers} are not all positive')
  return numbers, _whole(value, where)


def _whole(value, where):
  """An int of at most MAX_DIGITS digits; ValueError for anything else."""
  written = str(value).strip() if type(value) in (int, str) else ''
  pattern = f'-?[0-9]{{1,{arithmetic.MAX_DIGITS}}}'
  if not re.fullmatch(pattern, written):
    raise ValueError(f'{where}: {value!r} is not a whole number')
  return int(written)


# ---- the solver: all trees over all partitions of the numbers. Values are
# reduced (numerator, denominator) pairs: exact like Fraction, and much faster.


def _combine(x, y):
  """Yields (value, operator, whether it is y op x) for all six results."""
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


def _reduced(n, d):
  common = math.gcd(n, d) if d > 0 else -math.gcd(n, d)
  return n // common, d // common


def _write(left, operator, right):
  """(expression, precedence) with only the parentheses that are needed."""
  (a, rank_a), (b, rank_b) = left, right
  rank = 1 if operator in '+-' else 2
  a = f'({a})' if rank_a < rank else a
  # a-(b-c) and a/(b*c) need them on the right, a+(b-c) and a*(b/c) do not.
  b = f'({b})' if rank_b < rank + (operator in '-/') else b
  return a + operator + b, rank


def _halves(numbers):
  """All ways to part the numbers in two, the smaller part first."""
  places = range(len(numbers))
  for size in range(1, len(numbers) // 2 + 1):
    for part in itertools.combinations(places, size):
      rest = tuple(numbers[at] for at in places if at not in part)
      yield tuple(numbers[at] for at in part), rest


@functools.lru_cache(maxsize=1024)
def _table(numbers):
  """dict from each value of the numbers to its shortest (expression, rank)."""
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


def solve(numbers, target_value):
  """An expression with minimal parentheses, or '' if there is none."""
  written = _search(tuple(numbers), (target_value, 1))
  return written[0] if written else ''


def _search(numbers, goal):
  """(expression, rank) or None, working back from the goal.

  Tables of four and more numbers are large; the values that make the goal from
  one half's value are six, and they are those of goal op value.
  """
  if len(numbers) <= 3:
    return _table(numbers).get(goal)
  for part, rest in _halves(numbers):
    for x, left in _table(part).items():
      for y in {value for value, _, _ in _combine(goal, x)}:
        right = _search(rest, y)
        for value, operator, swapped in _combine(x, y) if right else ():
          if value == goal:
            pair = (right, left) if swapped else (left, right)
            return _write(pair[0], operator, pair[1])
  return None


# ---- prompts and rewards


def prompt(example, style):
  """The user's message; ValueError for an unknown style."""
  numbers = list(example['numbers'])
  return answers.choose('style', style, TEMPLATES).format(
    numbers=numbers, target=example['target'], written=','.join(map(str, numbers))
  )


def target(example, style):
  """A correct completion; ValueError if unsolvable or the style is unknown."""
  answers.choose('style', style, TEMPLATES)
  written = example.get('expression') or solve(example['numbers'], example['target'])
  if not written:
    raise ValueError(f'no expression of {example["numbers"]} makes {example["target"]}')
  return written if style == 'bare' else f'<answer>\n{written}\n</answer>'


def reward(text, example, protocol):
  """{'countdown': 0, 0.1 or 1}; ValueError for an unknown protocol."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  if protocol == 'strict':
    value = _value(_answer(text), example)
    score = 0.0 if value is None else 1.0 if value == example['target'] else 0.1
    return {'countdown': score}
  answer = answers.last_answer(text)
  if answer is None:
    return {'countdown': 0.0}
  return {'countdown': 1.0 if _close(answer, example) else 0.1}


def grade(text, example, protocol):
  """1.0 if the answer is right, else 0.0; ValueError as for `reward`."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  if protocol == 'strict':
    return float(_value(_answer(text), example) == example['target'])
  return float(_close(_graded(text), example))


def extra(text, example):
  """{'well_formed'}: 1.0 if the strict answer parses, whatever its numbers."""
  del example
  try:
    arithmetic.evaluate(_answer(text))
  except arithmetic.Refused:
    return {'well_formed': 0.0}
  return {'well_formed': 1.0}


def answer(text, example, protocol):
  """What a majority vote counts: the value reached; None if not a legal one."""
  value = (
    _value(_answer(text), example)
    if protocol == 'strict'
    else _value(_graded(text), example, lenient=True)
  )
  return None if value is None else str(value)


def _answer(text):
  """The last <answer>, else the whole text."""
  answer = answers.last_answer(text)
  return (answers.clip(text) if answer is None else answer).strip()


def _value(expression, example, lenient=False):
  """The value, or None unless it is arithmetic on exactly the numbers."""
  try:
    used = collections.Counter(arithmetic.numbers(expression))
    if used != collections.Counter(example['numbers']):
      return None
    return arithmetic.evaluate(expression, lenient)
  except arithmetic.Refused:
    return None


def _close(expression, example):
  """The reference's test: the right numbers, and a value within 1e-5."""
  value = _value(expression, example, lenient=True)
  return value is not None and abs(value - example['target']) < TOLERANCE


def _graded(text):
  """The evaluation's answer: boxed, else first <answer>, else everything."""
  text = answers.clip(text)
  answer = answers.last_boxed(text)
  if answer is None:
    answer = answers.first_answer(text)
  answer = text if answer is None else answer.strip()
  for latex, plain in (('\\div', '/'), ('\\times', '*'), ('\\cdot', '*')):
    answer = answer.replace(latex, plain)
  # r'([0-9+\-*/() ]+)=[0-9. ]+' searched in one pass: '=' parts the runs.
  parts = answer.split('=')
  for left, right in itertools.pairwise(parts):
    run = left[len(left.rstrip(_BEFORE_EQUALS)) :]
    if run and right and right[0] in _AFTER_EQUALS:
      return run.strip()
  return answer


def record(example):
  """(the problem, [numbers, target])."""
  return prompt(example, 'bare'), [list(example['numbers']), example['target']]


def recall(question, truth):
  """The example of a saved generation; ValueError if truth is none."""
  del question
  if not isinstance(truth, list) or len(truth) != 2:
    raise ValueError(f'ground_truth {truth!r} is not [numbers, target]')
  numbers, value = _problem({'nums': truth[0], 'target': truth[1]}, 'ground_truth')
  return {'numbers': numbers, 'target': value}


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
)
