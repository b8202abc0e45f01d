r"""4x4 Sudoku: a puzzle is 16 digits, row by row, with '0' in an empty cell.

There are only 288 solution grids. The field's split shares all of them between
train and test, so a model can learn them by heart. Here each split owns its
solution grids: 70 % train, 15 % validation, 15 % test, permuted by the seed of
`TaskOptions`. Files have the field's columns, Puzzle and Solution.

'paper' follows DMPO reward_func.py:183-237 for the reward and DMPO
eval/parse_and_get_acc.py:269-353 for the grade. Both are the share of empty cells
that match, and given cells are not checked. Only the last MAX_TEXT characters are
read. Its accuracy is over all empty cells together, so a puzzle counts by their
number.
'strict' wants 16 digits that keep the given cells, and grades whole puzzles. Any grid
that keeps the rules is right, even if the file has another solution.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np

from dmpo_jax.tasks import answers, datasets
from dmpo_jax.types import Task, TaskOptions

CELLS = 16
MAX_BLANKS = 12  # no 4x4 puzzle with fewer than 4 given cells is unique
BATCH = 2048  # candidates drawn at once
PATIENCE = 32  # batches without a new puzzle; then generation gives up

CHAT = """Below is a 4x4 Sudoku puzzle, written as 16 digits: the four rows \
from top to bottom, each from left to right. A 0 is an empty cell.

Put a digit from 1 to 4 in every empty cell so that each row, each column and \
each of the four 2x2 boxes holds every digit from 1 to 4 once. Leave the given \
digits as they are.

First think between <reasoning> and </reasoning>. Then write the whole solved \
grid between <answer> and </answer>: 16 digits, nothing between them.

Solve the following Sudoku puzzle: {puzzle}
"""

SHOWN = (  # worked examples: (puzzle, solution)
  ('0102300023010020', '4132321423411423'),
  ('0040140242000004', '2341143242133124'),
  ('0010000230011403', '2314413232411423'),
)
TEMPLATES = {'bare': '{puzzle}', 'chat': CHAT, 'eval': CHAT}
TEMPLATES |= {
  name: CHAT.replace(
    'Solve the following',
    '\n\n'.join(
      f'Solve the following Sudoku puzzle: {puzzle}\n\n<answer>\n{solution}\n</answer>'
      for puzzle, solution in SHOWN[:count]
    )
    + '\n\nSolve the following',
  )
  for name, count in (('one_shot', 1), ('three_shot', 3))
}

_FENCE = re.compile(r'```([\d\s]+)```')
_CLOSED = re.compile(r'(\d{16})\s*</answer>')
_ALONE = re.compile(r'\b(\d{16})\b')
_END = re.compile(r'<\|eot_id\|>|<\|endoftext\|>')
_END_OR_CLOSE = re.compile(rf'{_END.pattern}|</answer>')


@functools.cache
def grids() -> tuple[str, ...]:
  """Returns the 288 solution grids in lexicographic order."""
  rows = [''.join(digits) for digits in itertools.permutations('1234')]
  bands = [a + b for a in rows for b in rows if len(set(a[:2] + b[:2])) == 4]
  return tuple(
    a + b
    for a in bands
    for b in bands
    if all(len({*(a + b)[column::4]}) == 4 for column in range(4))
  )


def split_grids(seed: int) -> dict[str, list[str]]:
  """Returns the solution grids of each split; disjoint, together all 288."""
  order = np.random.default_rng(seed).permutation(len(grids()))
  cut = [len(order) * 70 // 100, len(order) * 85 // 100]
  return {
    split: [grids()[at] for at in part]
    for split, part in zip(datasets.SPLITS, np.split(order, cut), strict=True)
  }


def load(split: str, options: TaskOptions) -> list[dict]:
  """Returns examples {'puzzle', 'solution'} of a split; see `TaskOptions`.

  Raises ValueError for an unknown split, unusable options and a bad file.
  """
  size = datasets.size_of(split, options)
  owned = split_grids(options.seed)
  if options.path:
    split_of = {grid: name for name, part in owned.items() for grid in part}
    return datasets.Source(
      'sudoku',
      '4x4_sudoku_unique_puzzles.csv (train.csv) and 4x4_test_sudoku.csv (test.csv) '
      'of github.com/dllm-reasoning/d1',
      _read,
      lambda e: split_of[e['solution']],
      lambda e: e['puzzle'],
      published={
        'train': '4x4_sudoku_unique_puzzles.csv',
        'test': '4x4_test_sudoku.csv',
      },
    ).load(split, options)
  least, most = options.min_blanks, options.max_blanks
  if not 1 <= least <= most <= MAX_BLANKS:
    raise ValueError(
      f'data.min_blanks = {least} and data.max_blanks = {most} must keep '
      f'1 <= min_blanks <= max_blanks <= {MAX_BLANKS}'
    )
  if size < 1:
    raise ValueError(f'data.{split}_size = {size} must be at least 1')
  rng = np.random.default_rng([options.seed, datasets.SPLITS.index(split)])
  blanks = rng.integers(least, most + 1, size)
  # One pool per number of blanks: rejection would otherwise favour few blanks.
  pools = {
    k: iter(_generate(rng, owned[split], k, int((blanks == k).sum())))
    for k in np.unique(blanks).tolist()
  }
  return [next(pools[k]) for k in blanks.tolist()]


def _read(path: str) -> Iterator[dict]:
  for line, row in datasets.read_texts(path, ('Puzzle', 'Solution')):
    puzzle, solution = row['Puzzle'], row['Solution']
    where = f'{path}:{line}'
    if len(puzzle) != CELLS or puzzle.strip('01234'):
      raise ValueError(f'{where}: puzzle {puzzle!r} is not 16 digits 0-4')
    if len(solution) != CELLS or solution.strip('1234'):
      raise ValueError(f'{where}: solution {solution!r} is not 16 digits 1-4')
    if solution not in grids():
      raise ValueError(f'{where}: solution {solution!r} breaks a Sudoku rule')
    if not _keeps(puzzle, solution):
      raise ValueError(f'{where}: solution {solution!r} changes a given cell')
    yield {'puzzle': puzzle, 'solution': solution}


def _keeps(puzzle: str, grid: str) -> bool:
  """Returns whether the 16 cells of `grid` keep the given ones of `puzzle`."""
  return all(p in ('0', g) for p, g in zip(puzzle, grid, strict=True))


def _generate(
  rng: np.random.Generator, solutions: Sequence[str], blanks: int, size: int
) -> list[dict]:
  """Returns `size` distinct puzzles with one solution each; ValueError if too few."""
  cells = np.array([list(grid) for grid in solutions])
  puzzles, stale = {}, 0
  while len(puzzles) < size:
    pick = rng.integers(len(solutions), size=BATCH)
    rank = rng.random((BATCH, CELLS)).argsort(1)
    drawn = np.where(rank < blanks, '0', cells[pick])
    before = len(puzzles)
    for at in np.flatnonzero(_count(drawn) == 1).tolist():
      puzzles[''.join(drawn[at])] = solutions[pick[at]]
    stale = 0 if len(puzzles) > before else stale + 1
    if stale == PATIENCE:
      raise ValueError(
        f'only {len(puzzles)} distinct puzzles with {blanks} empty cells were found, '
        f'{size} are wanted: lower data.*_size, or widen data.min_blanks, max_blanks'
      )
  return [
    {'puzzle': puzzle, 'solution': solution}
    for puzzle, solution in itertools.islice(puzzles.items(), size)
  ]


def _one_hot(cells_NxC: np.ndarray) -> np.ndarray:
  hot = cells_NxC[:, :, None] == np.array(list('1234'))
  return hot.reshape(len(hot), -1).astype(np.float32)


def _count(puzzles_NxC: np.ndarray) -> np.ndarray:
  """Returns how many of the 288 grids agree with each puzzle's given cells."""
  hot = _one_hot(puzzles_NxC)
  agree = hot @ _one_hot(np.array([list(grid) for grid in grids()])).T
  return (agree == hot.sum(1, keepdims=True)).sum(1)


def prompt(example: dict, style: str) -> str:
  """Returns the user's message; ValueError for an unknown style."""
  return answers.choose('style', style, TEMPLATES).format(puzzle=example['puzzle'])


def target(example: dict, style: str) -> str:
  """Returns a correct completion; ValueError for an unknown style."""
  answers.choose('style', style, TEMPLATES)
  if style == 'bare':
    return example['solution']
  return answers.closing(style) + f'<answer>\n{example["solution"]}\n</answer>'


def reward(text: str, example: dict, protocol: str) -> dict[str, float]:
  """Returns {'sudoku': share of empty cells}; ValueError for an unknown protocol."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  if protocol == 'strict':
    return {'sudoku': _strict(_answer(text), example)}
  # str.isdigit, because the reference counts any digit, not only 0 to 9.
  digits = ''.join(c for c in answers.last_answer(text) or '' if c.isdigit())
  return {'sudoku': _share(digits, example)}


def grade(text: str, example: dict, protocol: str) -> float:
  """Returns the share of empty cells ('paper'), or 1.0 if all is right ('strict')."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  if protocol == 'strict':
    return float(_strict(_answer(text), example) == 1.0)
  return _share(_graded(answers.clip(text)), example)


def extra(text: str, example: dict) -> dict[str, float]:
  """Returns {'cell_accuracy'}: the share of empty cells, other cells unchecked."""
  return {'cell_accuracy': _share(_answer(text), example)}


def answer(text: str, example: dict, protocol: str) -> str | None:
  """Returns the grid as written, for a majority vote; None without one."""
  del example
  return (
    _answer(text) if protocol == 'strict' else _graded(answers.clip(text))
  ) or None


def counts(example: dict, protocol: str) -> int:
  """Returns a puzzle's weight in the accuracy: its empty cells ('paper'), or 1."""
  return example['puzzle'].count('0') if protocol == 'paper' else 1


def _share(grid: str, example: dict) -> float:
  """Returns the share of empty cells where `grid` has the solution's digit."""
  empty = [at for at in range(CELLS) if example['puzzle'][at] == '0']
  grid = grid.ljust(CELLS, '0')
  right = sum(grid[at] == example['solution'][at] for at in empty)
  return right / len(empty) if empty else 0.0


def partial(text: str, example: dict) -> float:
  """Returns the share of the cells so far that break no rule.

  A cell breaks one that is no digit from 1 to 4, changes a given cell, or repeats a
  digit of its row, column or box. Text before <answer> is not read.
  """
  opened = text.rfind('<answer>')
  if opened < 0 and '<reasoning>' in text:
    return 1.0
  grid = text[opened + len('<answer>') :] if opened >= 0 else text
  grid = ''.join(grid.partition('</answer>')[0].split())[:CELLS]
  bad = sum(_breaks(grid, at, example['puzzle'][at]) for at in range(len(grid)))
  return 1 - bad / max(1, len(grid))


def _breaks(grid: str, at: int, given: str) -> bool:
  """Returns whether a cell of a grid that is not finished breaks a rule."""
  digit, unit = grid[at], lambda x: (x // 4, x % 4, (x // 8, x % 4 // 2))
  if digit not in '1234' or given not in ('0', digit):
    return True
  near = (x for x in range(len(grid)) if x != at and grid[x] == digit)
  return any(a == b for x in near for a, b in zip(unit(x), unit(at), strict=True))


def _answer(text: str) -> str:
  """Returns the last <answer>, else the whole text, without any white space."""
  return ''.join(answers.answer_or_text(text).split())


def _strict(grid: str, example: dict) -> float:
  if len(grid) != CELLS or grid.strip('1234') or not _keeps(example['puzzle'], grid):
    return 0.0
  # A file's puzzle may have more solutions than the one in the file.
  return 1.0 if grid in grids() else _share(grid, example)


def _graded(text: str) -> str:
  """Returns the evaluation's answer: the first of its five patterns with content.

  Patterns 1-3 are `<answer>.*?(fence)`, `<answer>(.*?)(end)` and
  `</answer>\\s*(.*?)(end)`. A search for each piece from the first tag finds the
  same, because later tags see less text, without their quadratic backtracking.
  """
  opened, closed = text.find('<answer>'), text.find('</answer>')
  found = []
  if opened >= 0:
    opened += len('<answer>')
    fence = _FENCE.search(text, opened)
    end = _END_OR_CLOSE.search(text, opened)
    found += [fence and fence.group(1), end and text[opened : end.start()]]
  if closed >= 0:
    closed += len('</answer>')
    end = _END.search(text, closed)
    found += [text[closed : end.start() if end else len(text)]]
  for pattern in (_CLOSED, _ALONE):
    match = pattern.search(text)
    found += [match and match.group(1)]
  return next((''.join(f.split()) for f in found if f and f.strip()), '')


def record(example: dict) -> tuple[str, str]:
  """Returns (puzzle, solution), as generations are saved."""
  return example['puzzle'], example['solution']


def recall(question: str, truth: object) -> dict:
  """Returns the example of a saved generation; ValueError without puzzle or grid.

  The puzzle begins the question, or stands after 'Sudoku puzzle: '.
  """
  puzzle = re.search(r'^[0-4]{16}|(?<=Sudoku puzzle: )[0-4]{16}', question)
  if not puzzle:
    raise ValueError(f'no puzzle in the question {question[-60:]!r}')
  if not (isinstance(truth, str) and truth in grids() and _keeps(puzzle[0], truth)):
    raise ValueError(f'ground_truth {truth!r} does not solve {puzzle[0]}')
  return {'puzzle': puzzle[0], 'solution': truth}


def show(example: dict, text: str) -> str:
  """Draws the puzzle, the answer and a solution; * marks a wrong cell."""
  solution, grid = example['solution'], _answer(text)
  right = solution if _strict(grid, example) < 1 else grid
  pictures = {
    'puzzle': drawn(example['puzzle']),
    'answer': drawn(grid, right)
    if re.fullmatch('[0-9]{16}', grid)
    else ['no grid', *[''] * 4],
    'solution': drawn(right),
  }
  lines = zip(*([name, *rows] for name, rows in pictures.items()), strict=True)
  rows = ['  '.join(f'{cell:14}' for cell in line).rstrip() for line in lines]
  note = '. is an empty cell, 0 in the text, which has the rows from top to bottom'
  return '\n'.join([*rows, note])


def drawn(grid: str, right: str = '') -> list[str]:
  """Returns the five lines of a grid; a cell that is not as in `right` has a *."""
  marked = [
    ('.' if cell == '0' else cell) + '* '[cell == wanted]
    for cell, wanted in zip(grid, right or grid, strict=True)
  ]
  rows = [marked[at : at + 4] for at in range(0, CELLS, 4)]
  lines = [f'{"".join(row[:2])}| {"".join(row[2:])}' for row in rows]
  return [*lines[:2], '----+-----', *lines[2:]]


TASK = Task(
  load, prompt, target, reward, grade, extra, answer, record, recall, counts,
  styles=tuple(TEMPLATES), terms=('sudoku',),
  options={'generated': ('seed', 'min_blanks', 'max_blanks'), 'file': ('seed',)},
  unpaid=('bare',), show=show, partial=partial,
)  # fmt: skip
