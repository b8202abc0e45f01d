"""Tests the tasks: invariants of their data, and tables of (text, reward) rows.

The tests over all TASKS take their problem from EXAMPLES, or else from the task
itself, so that a new task needs no entry here.
"""

import collections
import dataclasses
import fractions
import importlib
import itertools
import json
import random
import re
import subprocess
import sys
import time

import pyarrow
import pytest
from pyarrow import parquet

from configs import base
from dmpo_jax import check, types
from dmpo_jax.tasks import TASKS, answers, arithmetic, countdown, datasets, sudoku

GENERATED = ('countdown', 'sudoku')  # test_reasoning.py has the others

SPLITS = datasets.SPLITS
SMALL = types.TaskOptions(train_size=200, validation_size=60, test_size=60)
GRID = '1234341221434321'
PUZZLE = '0234341221434001'  # empty: cells 0, 13, 14 -> 1, 3, 2
SUDOKU = {'puzzle': PUZZLE, 'solution': GRID}
COUNTDOWN = {'numbers': [7, 3, 5], 'target': 22}
EXAMPLES = {
  'sudoku': SUDOKU,
  'countdown': COUNTDOWN,
  'gsm8k': {'question': 'How many?', 'answer': 'Two.\n#### 2'},
  'math': {'problem': '1+1?', 'solution': 'It is $\\boxed{2}$.'},
}


def example_of(name):
  """Returns a problem of the task; skips the test of a task that needs files."""
  if name in EXAMPLES:
    return EXAMPLES[name]
  try:
    return TASKS[name].load('train', SMALL)[0]
  except ValueError as error:
    pytest.skip(f'{name} generates no problems, and EXAMPLES has none: {error}')


def most_of(name):
  """Returns the sum of the terms that the task's own target gets."""
  task, example = TASKS[name], example_of(name)
  return sum(task.reward(task.target(example, 'chat'), example, 'strict').values())


def options(path, **kwargs):
  return dataclasses.replace(SMALL, path=str(path), **kwargs)


def valid_grid(grid):
  groups = [range(4 * r, 4 * r + 4) for r in range(4)]
  groups += [range(c, 16, 4) for c in range(4)]
  groups += [(a, a + 1, a + 4, a + 5) for a in (0, 2, 8, 10)]
  return all({grid[at] for at in group} == set('1234') for group in groups)


def fits(puzzle, grid):
  return all(p in ('0', g) for p, g in zip(puzzle, grid, strict=True))


# ---- invariants of the data


def test_the_288_grids_are_distinct_and_valid():
  assert len(set(sudoku.grids())) == 288
  assert all(valid_grid(grid) for grid in sudoku.grids())


@pytest.mark.parametrize('split', SPLITS)
def test_generated_puzzles_are_distinct_and_have_one_solution(split):
  examples = sudoku.load(split, dataclasses.replace(SMALL, max_blanks=12))
  assert len({e['puzzle'] for e in examples}) == len(examples)
  for e in examples:
    found = [g for g in sudoku.grids() if fits(e['puzzle'], g)]
    assert found == [e['solution']]


def test_blanks_are_uniform_in_their_range():
  examples = sudoku.load(
    'train', dataclasses.replace(SMALL, train_size=2000, min_blanks=3, max_blanks=12)
  )
  counts = collections.Counter(e['puzzle'].count('0') for e in examples)
  assert sorted(counts) == list(range(3, 13))
  assert all(140 < count < 260 for count in counts.values()), counts


@pytest.mark.parametrize('seed', [0, 1])
def test_sudoku_splits_share_no_solution(seed):
  parts = sudoku.split_grids(seed)
  assert [len(parts[split]) for split in SPLITS] == [201, 43, 44]
  assert sorted(sum(parts.values(), [])) == list(sudoku.grids())
  for split in SPLITS:
    examples = sudoku.load(split, dataclasses.replace(SMALL, seed=seed))
    assert {e['solution'] for e in examples} <= set(parts[split])


def test_countdown_splits_share_no_problem():
  problems = {}
  for split in SPLITS:
    examples = countdown.load(split, SMALL)
    keys = {(*sorted(e['numbers']), e['target']) for e in examples}
    assert len(keys) == len(examples)
    for key in keys:
      assert problems.setdefault(key, split) == split
  shares = collections.Counter(
    countdown.split_of([a, b, 1], 7) for a in range(60) for b in range(60)
  )
  assert 0.75 < shares['train'] / 3600 < 0.85
  assert 0.07 < shares['test'] / 3600 < 0.13
  # Literal, as files and runs of other years must fall into the same splits.
  assert countdown.split_of([5, 7, 3], 22) == countdown.split_of([3, 5, 7], 22)
  assert [countdown.split_of([3, 5, 7], t) for t in (22, 15, 27)] == [
    'train',
    'validation',
    'test',
  ]


def test_countdown_holds_out_sets_of_numbers(tmp_path):
  """With held = numbers all targets of a set are in one split, also of a file."""
  options = dataclasses.replace(SMALL, held='numbers', train_size=400, largest=9)
  path = tmp_path / 'all.jsonl'
  lines = [{'nums': [a, b, 1], 'target': a + b} for a in range(1, 9) for b in (2, 3)]
  path.write_text('\n'.join(map(json.dumps, lines)))
  for given in (options, dataclasses.replace(options, path=str(path))):
    sets = {}
    for split in SPLITS:
      for e in countdown.load(split, given):
        assert sets.setdefault((*sorted(e['numbers']),), split) == split
    assert set(sets.values()) == set(SPLITS)
  assert [countdown.split_of(n, 1, 'numbers') for n in ([7, 3, 5], [1, 2, 3])] == [
    countdown.split_of([3, 5, 7], 99, 'numbers'),
    'train',
  ]


@pytest.mark.parametrize('name', GENERATED)
def test_loading_is_a_function_of_seed_and_split(name):
  task = TASKS[name]
  assert task.load('train', SMALL) == task.load('train', SMALL)
  other = dataclasses.replace(SMALL, seed=1)
  assert task.load('train', SMALL) != task.load('train', other)
  assert len(task.load('test', SMALL)) == 60


def test_countdown_generates_only_smaller_numbers():
  """Splits share no problem, and a size that cannot be reached is refused."""
  few = types.TaskOptions(train_size=300, test_size=60, largest=9)
  found = {split: countdown.load(split, few) for split in ('train', 'test')}
  for examples in found.values():
    assert {n for e in examples for n in e['numbers']} == set(range(1, 10))
  keys = [
    {(*sorted(e['numbers']), e['target']) for e in examples}
    for examples in found.values()
  ]
  assert not keys[0] & keys[1] and [len(k) for k in keys] == [300, 60]
  with pytest.raises(ValueError, match='data.test_size.*data.largest = 9'):
    countdown.load('test', dataclasses.replace(few, test_size=5000))
  with pytest.raises(ValueError, match='data.largest = 100 must be 2 to 99'):
    countdown.load('test', dataclasses.replace(few, largest=100))


@pytest.mark.parametrize('protocol', answers.PROTOCOLS)
@pytest.mark.parametrize('name', GENERATED)
def test_targets_get_the_full_reward(name, protocol):
  task = TASKS[name]
  for e in task.load('validation', SMALL):
    more = () if protocol == 'paper' else ('bare', 'steps')
    styles = [style for style in ('chat', *more) if style in task.styles]
    for style in styles:  # the paper's rewards need the <answer> tags
      text = task.target(e, style)
      assert task.reward(text, e, protocol) == {name: 1.0}
      assert task.grade(text, e, protocol) == 1.0


def test_functions_stand_in_their_own_fields():
  """`Task(load, prompt, ...)` is filled by position."""
  for name, task in TASKS.items():
    module = importlib.import_module(f'dmpo_jax.tasks.{name}')
    for field, value in task._asdict().items():
      assert value == getattr(module, field, value), (name, field)


def test_prompts_contain_the_problem():
  assert sudoku.prompt(SUDOKU, 'bare') == PUZZLE
  assert f'Solve the following Sudoku puzzle: {PUZZLE}' in sudoku.prompt(SUDOKU, 'chat')
  assert countdown.prompt(COUNTDOWN, 'bare') == '7,3,5=22'
  assert 'Numbers: [7, 3, 5]\nTarget: 22' in countdown.prompt(COUNTDOWN, 'chat')
  assert countdown.target(COUNTDOWN, 'bare') == '7+3*5'
  assert countdown.prompt(COUNTDOWN, 'steps') == ' 3, 5, 7=22:'
  assert countdown.target(COUNTDOWN, 'steps') == ' 3* 5=15; 7+15=22'
  fractions = {'numbers': [3, 3, 8, 8], 'target': 24}
  assert (
    countdown.target(fractions, 'steps') == ' 8/ 3=(8/3); 3-(8/3)=(1/3); 8/(1/3)=24'
  )


@pytest.mark.parametrize('name', TASKS)
def test_every_style_has_its_own_prompt(name):
  """'bare' is one line. Other styles differ, and no brace or backslash is left over."""
  task, example = TASKS[name], example_of(name)
  texts = {style: task.prompt(example, style) for style in task.styles}
  assert set(answers.STYLES) <= set(texts)
  assert '\n' not in texts['bare']
  assert not any('{{' in text or '\\\n' in text for text in texts.values())
  if name == 'sudoku':  # its evaluation differs from 'chat' only in the prefill
    assert texts.pop('eval') == texts['chat']
  assert len(set(texts.values())) == len(texts)


@pytest.mark.parametrize('name', TASKS)
def test_unknown_choices_list_the_allowed_ones(name):
  task, e = TASKS[name], example_of(name)
  for call in (task.prompt, task.target):
    with pytest.raises(ValueError, match='bare, chat'):
      call(e, 'terse')
  for call in (task.reward, task.grade):
    with pytest.raises(ValueError, match='paper, strict'):
      call('', e, 'legacy')
  with pytest.raises(ValueError, match='train, validation, test'):
    task.load('dev', dataclasses.replace(SMALL, path=__file__))


def test_sudoku_is_drawn_as_a_grid():
  """The rows in their order; an empty cell is a dot, and a wrong cell has a star."""
  solution = SUDOKU['solution']
  wrong = '2' if solution[0] == '1' else '1'
  for text, stars in (
    (f'<answer>{solution}</answer>', 0),
    (wrong + solution[1:], 1),
    ('I do not know', 0),
  ):
    head, *rows, note = sudoku.show(SUDOKU, text).splitlines()
    assert head.split() == ['puzzle', 'answer', 'solution'] and '0 in the text' in note
    assert sum(row.count('*') for row in rows) == stars and '----+-----' in rows[2]
    columns = [''.join(row[at : at + 14] for row in rows) for at in (0, 16, 32)]
    cells = [re.sub(r'[^\d.]', '', column) for column in columns]
    assert cells[0].replace('.', '0') == PUZZLE and cells[2] == solution
    assert cells[1] == text[-16:] or stars == 0
    assert ('no grid' in columns[1]) == ('know' in text)


@pytest.mark.parametrize(
  'bad',
  [
    {'min_blanks': 5, 'max_blanks': 4},
    {'min_blanks': 0},
    {'max_blanks': 13},
    {'validation_size': 0},
    {'validation_size': 689, 'min_blanks': 1, 'max_blanks': 1},
  ],
)
def test_sudoku_refuses_unusable_options(bad):
  with pytest.raises(ValueError, match='data.(min_blanks|validation_size)|only 688'):
    sudoku.load('validation', dataclasses.replace(SMALL, **bad))


def test_countdown_refuses_unusable_sizes():
  for size in (0, 10**9):
    with pytest.raises(ValueError, match='data.train_size'):
      countdown.load('train', dataclasses.replace(SMALL, train_size=size))


def test_tasks_do_not_import_jax():
  code = 'import sys, dmpo_jax.tasks; sys.exit("jax" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0


# ---- arithmetic


def random_tree(rng, depth):
  """(text, value) of a random expression; value None on division by zero."""
  if depth == 0 or rng.random() < 0.2:
    number = rng.randrange(0, 30)
    return str(number), fractions.Fraction(number)
  (a, x), (b, y) = (random_tree(rng, depth - 1) for _ in range(2))
  op = rng.choice('+-*/')
  gap = rng.choice(['', ' '])
  text = f'({a}){gap}{op}{gap}({b})'
  if x is None or y is None or (op == '/' and y == 0):
    return text, None
  return text, {
    '+': lambda: x + y,
    '-': lambda: x - y,
    '*': lambda: x * y,
    '/': lambda: x / y,
  }[op]()


def test_evaluate_agrees_with_random_trees():
  rng = random.Random(0)
  values = 0
  for _ in range(1000):
    text, value = random_tree(rng, 3)
    if len(text) > arithmetic.MAX_LENGTH or value is None:
      with pytest.raises(arithmetic.Refused):
        arithmetic.evaluate(text)
    else:
      values += 1
      assert arithmetic.evaluate(text) == value
      assert arithmetic.evaluate(text, lenient=True) == value
  assert values > 500


@pytest.mark.parametrize(
  'text, value',
  [
    ('7', 7),
    ('2+3*4', 14),
    ('2-3-4', -5),
    ('8/4/2', 1),
    ('8/(4/2)', 4),
    ('(2+3)*4', 20),
    (' 1 /\n3 ', fractions.Fraction(1, 3)),
    ('((7))', 7),
    ('3*(5-7)', -6),
    ('0/5', 0),
  ],
)
def test_evaluate(text, value):
  assert arithmetic.evaluate(text) == value


@pytest.mark.parametrize(
  'text, why',
  [
    ('', 'empty'),
    ('  ', 'empty'),
    ('2**3', 'Pow'),
    ('7//2', 'FloorDiv'),
    ('1.5', 'Constant'),
    ('.5', 'Constant'),
    ('...', 'Constant'),
    ('x', 'characters'),
    ('2^3', 'characters'),
    ('1,2', 'characters'),
    ('\0', 'characters'),
    ('٣', 'characters'),
    ('1_0', 'characters'),
    ('1 # 2', 'characters'),
    ('-3', 'USub'),
    ('2*-3', 'USub'),
    ('(+3)', 'UAdd'),
    ('1/0', 'zero'),
    ('1/(3-3)', 'zero'),
    ('(1', 'malformed'),
    ('1)', 'malformed'),
    ('1)+(2', 'malformed'),
    ('()', 'Tuple'),
    ('2(3)', 'Call'),
    ('(2)(3)', 'Call'),
    ('(*2)', 'malformed'),
    ('2 3', 'malformed'),
    ('2\n3', 'malformed'),
    ('1+', 'malformed'),
    ('* 2', 'malformed'),
    ('07', 'malformed'),
    ('1' * 10, '9 digits'),
    ('1=1', 'characters'),
    ('(' * 33 + '1' + ')' * 33, '32 parentheses'),
    ('1+' * 200 + '1', '256'),
  ],
)
def test_evaluate_refuses(text, why):
  with pytest.raises(arithmetic.Refused, match=why):
    arithmetic.evaluate(text)


@pytest.mark.parametrize(
  'text, value',
  [
    ('-3+5', 2),
    ('--3', 3),
    ('2*-3', -6),
    ('3.5*2', 7),
    ('.5', 0.5),
    ('3.', 3),
    ('-' * 255 + '1', -1),
    ('(1\n+2)', 3),
    ('2**3', None),
    ('7//2', None),
    ('1..2', None),
    ('.', None),
    ('1\n+2', None),
    ('07', None),
    ('07.5', 7.5),
    ('123456789.123456789', fractions.Fraction(123456789123456789, 10**9)),
  ],
)
def test_lenient_accepts_what_python_accepts(text, value):
  if value is None:
    with pytest.raises(arithmetic.Refused):
      arithmetic.evaluate(text, lenient=True)
  else:
    assert arithmetic.evaluate(text, lenient=True) == value


def test_numbers():
  assert arithmetic.numbers('(7+3)*5 - 12x') == [7, 3, 5, 12]
  with pytest.raises(arithmetic.Refused):
    arithmetic.numbers('1' * 10)


def test_solver_finds_an_expression_only_where_one_exists():
  rng = random.Random(1)
  for _ in range(150):
    numbers = [rng.randrange(1, 30) for _ in range(rng.randrange(2, 6))]
    goal = rng.choice([rng.randrange(-20, 99), sum(numbers)])
    written = countdown.solve(numbers, goal)
    if written:
      assert sorted(arithmetic.numbers(written)) == sorted(numbers)
      assert arithmetic.evaluate(written) == goal
    else:
      assert goal != sum(numbers)
  assert countdown.solve([3, 3, 8, 8], 24) == '8/(3-8/3)'
  assert countdown.solve([1, 1], 5) == ''
  assert arithmetic.evaluate(countdown.solve([2, 4, 6, 8, 10, 12], 46080)) == 46080


def test_solver_reaches_the_values_of_random_trees():
  rng = random.Random(2)
  for _ in range(300):
    numbers = [rng.randrange(1, 20) for _ in range(rng.randrange(2, 5))]
    parts = [(str(n), fractions.Fraction(n)) for n in numbers]
    while len(parts) > 1:
      rng.shuffle(parts)
      (a, x), (b, y), op = parts.pop(), parts.pop(), rng.choice('+-*/')
      if op == '/' and y == 0:
        op = '*'
      value = {'+': x + y, '-': x - y, '*': x * y}.get(op)
      parts.append((f'({a}{op}{b})', x / y if value is None else value))
    text, value = parts[0]
    if value.denominator == 1:
      written = countdown.solve(numbers, int(value))
      assert written, text
      assert arithmetic.evaluate(written) == value
      assert len(written) <= len(text)


# ---- rewards

A = '<answer>{}</answer>'.format


@pytest.mark.parametrize(
  'text, paper, strict, accuracy',
  [
    (A(GRID), 1, 1, 1),
    (GRID, 0, 1, 1),
    (f'<reasoning>x</reasoning>\n<answer>\n{GRID}\n</answer>', 1, 1, 1),
    (A('1234 3412\n2143 4321'), 1, 1, 1),
    (A('2' + GRID[1:]), 2 / 3, 2 / 3, 2 / 3),
    (A('1234341221434111'), 1 / 3, 1 / 3, 1 / 3),
    (A('1434341221434321'), 1, 0, 1),  # changes a given cell
    (A(GRID + '1'), 1, 0, 1),  # 17 digits
    (A(GRID[:14]), 2 / 3, 0, 2 / 3),  # padded with 0
    (A('4x4: ' + GRID), 1 / 3, 0, 0),  # shifted by two, one hit by luck
    (A(f'grid: {GRID}'), 1, 0, 0),  # non-digits are dropped
    (A('3' * 16) + A(GRID), 1, 1, 1),  # the last one counts
    (A(GRID) + A('no'), 0, 0, 0),
    (f'<answer>{GRID}', 0, 0, 0),  # never closed
    (A(''), 0, 0, 0),
    ('', 0, 0, 0),
  ],
)
def test_sudoku_reward(text, paper, strict, accuracy):
  assert sudoku.reward(text, SUDOKU, 'paper') == {'sudoku': paper}
  assert sudoku.reward(text, SUDOKU, 'strict') == {'sudoku': strict}
  assert sudoku.grade(text, SUDOKU, 'strict') == (strict == 1)
  assert sudoku.extra(text, SUDOKU) == {'cell_accuracy': accuracy}


@pytest.mark.parametrize(
  'text, share',
  [
    (A(GRID), 1),
    ('<answer>so\n```\n1234\n3412\n2143\n4321\n```</answer>', 1),
    (f'<answer>{GRID}<|eot_id|>', 1),
    (f'<answer>{GRID}', 1),  # by the last pattern
    (f'<answer></answer> {GRID}<|endoftext|>junk', 1),
    (f'{GRID}\n</answer>', 1),
    (f'It is {GRID}.', 1),
    (A(f'x{GRID}'), 0),  # non-digits are kept, so cells shift
    (A('2' + GRID[1:]) + A(GRID), 2 / 3),  # the first one counts
    (A('12'), 1 / 3),
    (f'{GRID}1', 0),
    ('', 0),
  ],
)
def test_sudoku_paper_grade(text, share):
  assert sudoku.grade(text, SUDOKU, 'paper') == share


def test_a_full_puzzle_is_solved_only_by_itself():
  full = {'puzzle': GRID, 'solution': GRID}
  assert sudoku.reward(GRID, full, 'strict') == {'sudoku': 1.0}
  assert sudoku.reward(A(GRID), full, 'paper') == {'sudoku': 0.0}


def test_every_solution_is_right():
  """A puzzle of a file may have two; the reference accepts only the file's."""
  other, example = (
    '2134341212434321',
    {'puzzle': '00' + GRID[2:8] + '00' + GRID[10:], 'solution': GRID},
  )
  assert valid_grid(other) and fits(example['puzzle'], other)
  for grid, strict, paper in (
    (GRID, 1, 1),
    (other, 1, 0),
    ('1234341212434321', 0.5, 0.5),
  ):
    assert sudoku.reward(A(grid), example, 'strict') == {'sudoku': strict}
    assert sudoku.grade(A(grid), example, 'strict') == (strict == 1)
    assert sudoku.reward(A(grid), example, 'paper') == {'sudoku': paper}
    assert sudoku.grade(A(grid), example, 'paper') == paper


def reference_sudoku_answer(text):
  """Returns what the five patterns of DMPO eval/parse_and_get_acc.py find."""
  end = r'<\|eot_id\|>|<\|endoftext\|>'
  patterns = [
    r'<answer>.*?```\s*([\d\s]+)```',
    rf'<answer>(.*?)(?:{end}|</answer>)',
    rf'</answer>\s*(.*?)(?:{end}|$)',
    r'.*?(\d{16})\s*</answer>',
    r'\b(\d{16})\b',
  ]
  for pattern in patterns:
    match = re.search(pattern, text, re.DOTALL)
    if match and match.group(1).strip():
      return re.sub(r'\s', '', match.group(1))
  return ''


PIECES = [
  '<answer>',
  '</answer>',
  '<answer>',
  '</answer>',
  '```',
  '`',
  ' ',
  '\n',
  '<|eot_id|>',
  '<|endoftext|>',
  GRID,
  '1234',
  '21',
  'x',
  '.',
  '٣',
  '\xa0',
  '\0',
  '7+3*5',
  '22',
  '=',
  ' = 22',
  '(',
  ')',
  '-',
  '**',
  '//',
  '0.5',
  '\\boxed{',
  '}',
  '{',
  '\\boxed ',
  '$',
  '\\times',
  '7',
  '3',
  '5',
  '+',
  '*',
  '\ud800',
  '²',
  '<reasoning>',
  '9' * 30,
]


def random_text(rng, pieces=PIECES, most=14):
  return ''.join(rng.choice(pieces) for _ in range(rng.randrange(most)))


def test_sudoku_grade_finds_what_the_five_patterns_find():
  rng = random.Random(3)
  found = 0
  for _ in range(4000):
    text = random_text(rng, PIECES[:18])
    want = reference_sudoku_answer(text)
    found += bool(want)
    assert sudoku._graded(text) == want, text
  assert 1000 < found < 3900


@pytest.mark.parametrize(
  'text, paper, strict, formed',
  [
    (A('7+3*5'), 1, 1, 1),
    ('7+3*5', 0, 1, 1),
    (A('\n 5 * 3 + 7 \n'), 1, 1, 1),
    (A('(7)+((3*5))'), 1, 1, 1),
    # Steps, as style steps writes them.
    ('3*5=15;7+15=22', 0, 1, 1),
    (' 3* 5=15; 7+15=22', 0, 1, 1),
    ('7+3=10;10+5=15', 0, 0.1, 1),  # wrong value
    ('3*5=15;15+15=30', 0, 0, 1),  # a result twice
    ('3*5=15;15+5=20', 0, 0, 1),  # a number twice
    ('3*5=15;7+3=10', 0, 0, 0),  # a result that nothing uses
    ('3*5=16;6+16=22', 0, 0, 0),  # a false step
    ('3*5=15;7+015=22', 0, 0, 0),
    ('5/0=5;7+15=22', 0, 0, 0),
    ('3/5=(3/5);7*(3/5)=(21/5)', 0, 0.1, 1),
    ('3/5=(3/0);7*(3/0)=22', 0, 0, 0),
    ('3*5=15;7+15', 0, 0, 0),
    (A('3*5=15;7+15=22'), 0.1, 1, 1),
    (A('7+3+5'), 0.1, 0.1, 1),  # wrong value
    (A('7+5*3-0'), 0.1, 0, 1),  # a number too many
    (A('7+15'), 0.1, 0, 1),
    (A('7+3*5=22'), 0.1, 0, 0),
    (A('-3*-5+7'), 1, 0, 0),  # unary signs
    (A('7+3*(5'), 0.1, 0, 0),
    (A('7+3**5'), 0.1, 0, 0),
    (A('7//3*5'), 0.1, 0, 0),
    (A('7.3*5'), 0.1, 0, 0),
    (A('7/(3-5+2)'), 0.1, 0, 0),
    (A('5/(7-3)'), 0.1, 0.1, 1),
    (A('7 3 5'), 0.1, 0, 0),
    (A('07+3*5'), 0.1, 0, 0),
    (A('7+\n3*5'), 0.1, 1, 1),  # Python stops at the line break
    (A('junk'), 0.1, 0, 0),
    (A('7+3*5') + A('no'), 0.1, 0, 0),  # the last one counts
    (A('no') + A('7+3*5'), 1, 1, 1),
    (A(''), 0.1, 0, 0),
    ('<answer>7+3*5', 0, 0, 0),
    ('', 0, 0, 0),
    # In the box that the prompt of style eval asks for, also as LaTeX.
    (A(r'\boxed{7+3*5}'), 0.1, 1, 1),
    (r'so \boxed{7+3*5}', 0, 1, 1),
    (A(r'\boxed{7 + 3 \times 5 = 22}'), 0.1, 1, 1),
    (A(r'\boxed{\left(7\right) + 3 \cdot 5}'), 0.1, 1, 1),
    (A(r'\boxed{7 + \frac{3}{5}}'), 0.1, 0.1, 1),
    (A(r'\boxed{7+3*5=23}'), 0.1, 0, 0),
    (A(r'\boxed{7+3**5}'), 0.1, 0, 0),
    (A(r'\boxed{7+3*5'), 0.1, 0, 0),
    (A(r'\boxed{7+3+5}'), 0.1, 0.1, 1),
  ],
)
def test_countdown_reward(text, paper, strict, formed):
  assert countdown.reward(text, COUNTDOWN, 'paper') == {'countdown': paper}
  assert countdown.reward(text, COUNTDOWN, 'strict') == {'countdown': strict}
  assert countdown.grade(text, COUNTDOWN, 'strict') == (strict == 1)
  assert countdown.extra(text, COUNTDOWN) == {'well_formed': formed}


def test_decimals_count_in_the_paper_protocol_alone():
  example = {'numbers': [3, 5, 2], 'target': 7}
  assert countdown.reward(A('3.5*2'), example, 'paper') == {'countdown': 1.0}
  assert countdown.reward(A('3.5*2'), example, 'strict') == {'countdown': 0.0}


def test_the_paper_protocol_has_a_tolerance():
  example = {'numbers': [22, 1, 999999], 'target': 22}
  text = A('22+1/999999')
  assert countdown.reward(text, example, 'paper') == {'countdown': 1.0}
  assert countdown.reward(text, example, 'strict') == {'countdown': 0.1}


@pytest.mark.parametrize(
  'text, right',
  [
    (r'\boxed{7+3*5}', 1),
    (r'\boxed{7+3*5=22}', 1),
    (r'\boxed{7 + 3 \times 5 = 22.}', 1),
    (r'\boxed{7+3\cdot5}', 1),
    (r'\boxed{\frac{7}{1}}', 0),
    (r'\boxed{1} \boxed{7+3*5}', 1),  # the last one counts
    (r'\boxed{7+3*5} \boxed{1}', 0),
    (r'so \boxed 7+3*5$ it is', 1),
    (r'\boxed{7+3*5', 0),  # never closed: all of the text
    (r'\boxed{1' + A('7+3*5'), 1),
    (A('7+3*5') + A('1'), 1),  # the first one counts
    ('7+3*5', 1),
    ('so 7+3*5 = 22', 1),
    ('7+3*5 = x, 7+3*5 = 22', 1),
    ('so 7+3*5', 0),
    (r'\boxed{7+3**5}', 0),
    (r'\boxed{}', 0),
    ('', 0),
  ],
)
def test_countdown_paper_grade(text, right):
  assert countdown.grade(text, COUNTDOWN, 'paper') == right


def test_the_expression_before_an_equals_sign_is_the_regex_match():
  rng = random.Random(4)
  for _ in range(3000):
    text = random_text(rng, PIECES[9:29], 10)
    match = re.search(r'([0-9+\-*/() ]+)=[0-9. ]+', text)
    want = match.group(1).strip() if match else text
    assert countdown._graded(text) == want


@pytest.mark.parametrize('name', TASKS)
def test_no_text_raises_or_leaves_the_range(name):
  task, e, rng, most = TASKS[name], example_of(name), random.Random(5), most_of(name)
  for _ in range(2500):
    text = random_text(rng)
    for protocol in answers.PROTOCOLS:
      terms = task.reward(text, e, protocol)
      assert -0.25 <= sum(terms.values()) <= most
      assert 0 <= task.grade(text, e, protocol) <= 1
    assert all(0 <= value <= 1 for value in task.extra(text, e).values())


@pytest.mark.parametrize('name', TASKS)
def test_no_text_takes_long(name):
  long = 100_000
  bodies = [
    '99**98**97',
    '9**9**9',
    '(' * long,
    '-' * long,
    '1' * long,
    ' ' * long,
    '1+' * long,
    '1 ' * long,
    '`' * long,
    '=' * long,
    '```1' * long,
    '\0' * long,
    '\\boxed{' * long,
    '<answer>' * long,
    '</answer>' * long,
    '1234341221434321 ' * long,
    '🙂' * long,
  ]
  texts = [t for body in bodies for t in (body, A(body), '<answer>' + body)]
  texts += [f'{"<answer>```1" * 2000}{" " * 5000}', '1' * 16 + ' ' * 19000]
  task, example = TASKS[name], example_of(name)
  for text, protocol in itertools.product(texts, answers.PROTOCOLS):
    start = time.perf_counter()
    task.reward(text, example, protocol)
    task.grade(text, example, protocol)
    task.extra(text, example)
    assert time.perf_counter() - start < 1, (protocol, text[:40])


# ---- finding answers


def test_answers_are_what_the_regex_finds():
  rng = random.Random(6)
  for _ in range(2000):
    text = random_text(rng, PIECES[:10])
    found = re.findall('<answer>(.*?)</answer>', text, re.DOTALL) or [None]
    assert answers.first_answer(text) == found[0]
    assert answers.last_answer(text) == found[-1]


@pytest.mark.parametrize(
  'text, paper, strict',
  [
    (r'\boxed{1}', '1', '1'),
    (r'\boxed{1} \boxed{2}', '2', '2'),
    (r'\boxed{\frac{1}{2}} x', r'\frac{1}{2}', r'\frac{1}{2}'),
    (r'\boxed{1', None, None),
    ('1', None, None),
    (r'\boxed', None, None),
    (r'\boxed{1} \boxed{2', None, None),
    (r'\boxed 3$ x', '3', '3'),
    (r'first \boxed 3$, no: \boxed{5}', '3', '5'),
    (r'\boxed3', None, None),
    (r'\boxed{5} or \boxed 3$', '3', '3'),
    (r'\boxed {5} x', '{5} x', '5'),
    (r'\boxed 3$ \boxed', '3', None),
  ],
)
def test_last_boxed(text, paper, strict):
  assert answers.last_boxed(text) == paper
  assert answers.last_boxed(text, strict=True) == strict
  example = {'problem': '', 'solution': r'\boxed{5}'}
  for name, problem in (('math', example), ('gsm8k', {'answer': '#### 5'})):
    graded = TASKS[name].grade(f'<answer>{text}</answer>', problem, 'strict')
    assert graded == (strict == '5')


def test_long_texts_keep_their_end():
  text = 'x' * answers.MAX_TEXT
  assert answers.last_answer(text + A('1')) == '1'
  assert answers.last_answer(A('1') + text) is None


# ---- files


def test_sudoku_csv(tmp_path):
  path = tmp_path / 'puzzles.csv'
  rows = [f'0{grid[1:]},{grid}' for grid in sudoku.grids()]
  path.write_text('\ufeffPuzzle,Solution\n' + '\n'.join(rows), 'utf-8')
  parts = sudoku.split_grids(0)
  for split in SPLITS:
    examples = sudoku.load(split, options(path, **{f'{split}_size': 0}))
    assert {e['solution'] for e in examples} == set(parts[split])
    assert examples[:5] == sudoku.load(split, options(path, **{f'{split}_size': 5}))
    assert examples[0] == {
      'puzzle': '0' + examples[0]['solution'][1:],
      'solution': examples[0]['solution'],
    }


@pytest.mark.parametrize(
  'row, why',
  [
    (f'{GRID[:15]},{GRID}', 'puzzle'),
    (f'5{GRID[1:]},{GRID}', 'puzzle'),
    (f'{PUZZLE},{PUZZLE}', 'solution'),
    (f'{PUZZLE},{"1234" * 4}', 'rule'),
    (f'4{PUZZLE[1:]},{GRID}', 'given'),
    (f'{PUZZLE}', 'cells'),
    (f'"{PUZZLE},{GRID}', 'unexpected end'),
    ('\udcff,1', 'UTF-8'),
  ],
)
def test_sudoku_csv_errors_name_file_and_line(tmp_path, row, why):
  path = tmp_path / 'puzzles.csv'
  text = f'Puzzle,Solution\n{PUZZLE},{GRID}\n{row}\n'
  path.write_bytes(text.encode('utf-8', 'surrogateescape'))
  with pytest.raises(ValueError, match=f'puzzles.csv:3: .*{why}'):
    sudoku.load('train', options(path))


@pytest.mark.parametrize(
  'text, why',
  [
    ('', 'empty'),
    ('Puzzle,Solution\n', 'empty'),
    ('\n\n', 'empty'),
    ('Puzzle,Answer\n1,2\n', 'column Solution .*columns are Puzzle, Answer'),
  ],
)
def test_sudoku_csv_without_rows(tmp_path, text, why):
  path = tmp_path / 'puzzles.csv'
  path.write_text(text)
  with pytest.raises(ValueError, match=why):
    sudoku.load('train', options(path))


def test_countdown_jsonl(tmp_path):
  path = tmp_path / 'problems.jsonl'
  records = [
    {'input': '30,100,93', 'output': '23'},
    {'nums': [7, 3, 5], 'target': 22},
    {'numbers': '1, 1', 'target': 5},
    {'nums': [9], 'target': 9},
    {'nums': [2.0, '4.0'], 'target': 6.0},
    {'nums': [1, 2, 3, 4, 5, 6, 7], 'target': 9},
    {'nums': [3, 5, 7], 'target': '15'},
  ]
  path.write_text('\n\n'.join(map(json.dumps, records)))
  loaded = []
  for split in SPLITS:
    part = countdown.load(split, options(path))
    assert all(countdown.split_of(e['numbers'], e['target']) == split for e in part)
    loaded += part
  assert sorted((e['numbers'], e['target']) for e in loaded) == [
    ([1, 1], 5),
    ([2, 4], 6),
    ([3, 5, 7], 15),
    ([7, 3, 5], 22),
    ([30, 100, 93], 23),
  ]
  by_target = {e['target']: e for e in loaded}
  assert by_target[5]['expression'] == ''
  assert countdown.target(by_target[23], 'bare') == '30+93-100'
  with pytest.raises(ValueError, match='no expression'):
    countdown.target(by_target[5], 'bare')
  path.write_text(json.dumps(records[0]))
  with pytest.raises(ValueError, match='no example falls in the test split'):
    countdown.load('test', options(path))


@pytest.mark.parametrize(
  'count, found', [(0, {2, 3, 4, 5, 6}), (2, {2}), (3, {3}), (6, {6})]
)
def test_countdown_files_keep_only_the_wanted_count(tmp_path, count, found):
  """In every split, of a file and of a folder; other counts are refused."""
  for name, first in (('train', 1), ('test', 500)):
    (tmp_path / f'{name}.jsonl').write_text(
      '\n'.join(
        json.dumps({'nums': [1] * (size - 1) + [i], 'target': i + size - 1})
        for i in range(first, first + 30)
        for size in range(1, 9)
      )
    )
  for path in (tmp_path, tmp_path / 'train.jsonl'):
    for split in SPLITS:
      examples = countdown.load(
        split, options(path, numbers=count, **{f'{split}_size': 0})
      )
      assert {len(e['numbers']) for e in examples} == found
  for wrong, path in ((1, tmp_path), (7, tmp_path), (7, ''), (-3, tmp_path)):
    with pytest.raises(ValueError, match=f'data.numbers = {wrong} must be 2 to 6'):
      countdown.load('train', options(path, numbers=wrong))
  with pytest.raises(ValueError, match='data.numbers = 4 needs a file'):
    countdown.load('train', options('', numbers=4))


@pytest.mark.parametrize(
  'line, why',
  [
    ('{', 'not JSON'),
    ('[1]', 'object'),
    ('{"nums": [1, 2]}', 'nums and target'),
    ('{"nums": 3, "target": 4}', 'no list'),
    ('[' * 10**5, 'not JSON'),
    ('{"nums": [1, 2.5], "target": 4}', 'whole'),
    ('{"nums": [1, true], "target": 4}', 'whole'),
    ('{"nums": "1,x", "target": 4}', 'whole'),
    ('{"nums": [1, 2], "target": "4.5"}', 'whole'),
    ('{"nums": [1, 2], "target": 1e10}', 'whole'),
    ('{"nums": [0, 2], "target": 4}', 'positive'),
    ('"\udcff"', 'UTF-8'),
  ],
)
def test_countdown_jsonl_errors_name_file_and_line(tmp_path, line, why):
  path = tmp_path / 'problems.jsonl'
  text = f'{{"nums": [7, 3, 5], "target": 22}}\n{line}\n'
  path.write_bytes(text.encode('utf-8', 'surrogateescape'))
  with pytest.raises(ValueError, match=f'problems.jsonl:2: .*{why}'):
    countdown.load('train', options(path))


def test_an_empty_jsonl_is_refused(tmp_path):
  path = tmp_path / 'problems.jsonl'
  path.write_text('\n \n')
  with pytest.raises(ValueError, match='empty'):
    countdown.load('train', options(path))


def test_countdown_reads_parquet(tmp_path):
  """As on the hub: the target first, numbers as lists; a missing value makes floats."""
  path = tmp_path / 'train-00000-of-00001.parquet'
  records = [{'target': 22, 'nums': [7, 3, 5]}, {'target': 23, 'nums': [30, 100, 93]}]
  parquet.write_table(pyarrow.Table.from_pylist(records), path)
  assert len(countdown.load('train', options(path))) == 2
  table = pyarrow.table({'target': [22.0, 23.0], 'nums': [r['nums'] for r in records]})
  parquet.write_table(table, path)
  assert len(countdown.load('train', options(path))) == 2


# ---- data files that are not what they seem; the same for every task and split


def write_texts(path, count, first=0, end=''):
  rows = [
    {'question': f'Problem {i}?{end}', 'answer': '#### 5'}
    for i in range(first, first + count)
  ]
  if path.suffix == '.parquet':
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)
  else:
    path.write_text('\n'.join(map(json.dumps, rows)))


@pytest.mark.parametrize('split', SPLITS)
def test_half_a_character_is_named_with_its_line(tmp_path, split):
  """JSON can hold half an emoji, cut by a writer; no tokenizer reads it."""
  bad = '{"question": "bad \\ud83d end", "answer": "#### 5"}'
  for name, first in (('train', 0), ('test', 500)):
    write_texts(tmp_path / f'{name}.jsonl', 60, first)
  name = 'test' if split == 'test' else 'train'
  with open(tmp_path / f'{name}.jsonl', 'a') as f:
    f.write('\n' + bad)
  for path in (tmp_path, tmp_path / f'{name}.jsonl'):
    with pytest.raises(ValueError, match=f'{name}.jsonl:61: column question .*d83d'):
      TASKS['gsm8k'].load(split, options(path))
  (tmp_path / f'{name}.jsonl').write_text(bad.replace('ud83d', 'ud83d\\ude00'))
  TASKS['gsm8k'].load('test', options(tmp_path))  # both halves


@pytest.mark.parametrize(
  'content, message',
  [
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0', 'git-lfs pointer'),
    (b'<!DOCTYPE html>', 'a web page'),
    (b'\x1f\x8b\x08', 'gzip'),
  ],
)
@pytest.mark.parametrize('ending', ['jsonl', 'csv', 'parquet'])
@pytest.mark.parametrize('name', TASKS)
def test_stand_ins_are_named(tmp_path, name, ending, content, message):
  path = tmp_path / f'train.{ending}'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f'train.{ending}: it is .*{message}'):
    TASKS[name].load('train', options(path))


def test_damaged_parquet_is_named(tmp_path):
  """Wherever it is damaged: at its end, or in pages behind a good header."""
  path = tmp_path / 'x.parquet'
  write_texts(path, 60, end='?' * 500)
  whole, refused = path.read_bytes(), 0
  places = range(8, len(whole) - 9, len(whole) // 40)
  damaged = [whole[:at] + bytes([255] * 8) + whole[at + 8 :] for at in places]
  for content in [b'', whole[:100], *damaged]:
    path.write_bytes(content)
    try:
      TASKS['gsm8k'].load('train', options(path))
    except ValueError as error:
      assert 'x.parquet' in str(error)
      refused += 1
  assert 6 < refused < len(damaged)


@pytest.mark.parametrize('ending', ['jsonl', 'parquet'])
def test_shards_are_read_together(tmp_path, ending):
  """All of them, in order; a missing one is refused."""
  load = lambda split: [
    e['question'] for e in TASKS['gsm8k'].load(split, options(tmp_path, test_size=0))
  ]
  write_texts(tmp_path / f'train.{ending}', 40)
  for i in range(3):
    write_texts(tmp_path / f'test-0000{i}-of-00003.{ending}', 5, 100 + 5 * i)
  assert load('test') == [f'Problem {i}?' for i in range(100, 115)]
  assert len(load('train') + load('validation')) == 40
  (tmp_path / f'test-00001-of-00003.{ending}').unlink()
  with pytest.raises(ValueError, match='all shards of one .*it holds: test-00000'):
    load('test')
  (tmp_path / f'test-00002-of-00003.{ending}').unlink()
  with pytest.raises(ValueError, match='it holds: test-00000-of-00003'):
    load('test')


def test_white_space_does_not_move_a_problem_to_another_split(tmp_path):
  path = tmp_path / 'x.jsonl'
  rows = [
    {'question': text, 'answer': '#### 5'}
    for i in range(60)
    for text in (f'Problem {i} of  all?', f' Problem {i}\nof all?')
  ]
  path.write_text('\n'.join(map(json.dumps, rows)))
  found = {
    split: {' '.join(e['question'].split()) for e in TASKS['gsm8k'].load(split, o)}
    for split in SPLITS
    for o in [options(path)]
  }
  assert sum(map(len, found.values())) == 60


@pytest.mark.parametrize('field', ['seed', 'train_size', 'test_size', 'numbers'])
def test_negative_options_are_refused(field):
  c = base.get_config()
  c.data[field] = -1
  with pytest.raises(ValueError, match=f'data.{field} = -1 must be >= 0'):
    check.config(c, 1)
