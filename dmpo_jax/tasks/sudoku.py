"""4x4 Sudoku: a puzzle is 16 digits, row by row, '0' where a cell is empty.

There are only 288 solution grids. The field's split shares all of them between
train and test, so that a model can learn them by heart. Here a split owns its
solution grids: 70% train, 15% validation, 15% test, permuted by the seed of
`TaskOptions`. Files are the field's CSV, with columns Puzzle and Solution.

'paper' is DMPO reward_func.py:183-237 for the reward and DMPO
eval/parse_and_get_acc.py:269-353 for the grade: the share of empty cells that
match, given cells unchecked; only the last MAX_TEXT characters are read. Its
accuracy is of all empty cells together, so a puzzle counts by how many it has.
'strict' wants 16 digits that keep the given cells, and grades whole puzzles; a
grid by the rules is right, though the file may tell another.
"""

import functools
import itertools
import re

import numpy as np

from dmpo_jax.tasks import answers
from dmpo_jax.types import Task

CELLS = 16
MAX_BLANKS = 12  # no 4x4 puzzle with fewer than 4 given cells is unique
BATCH = 2048  # candidates drawn at once
PATIENCE = 32  # batches without a new puzzle before giving up

CHAT = """Below is a 4x4 Sudoku puzzle, written as 16 digits: the four rows \
from top to bottom, each from left to right. A 0 is an empty cell.

Put a digit from 1 to 4 in every empty cell so that each row, each column and \
each of the four 2x2 boxes holds every digit from 1 to 4 once. Leave the given \
digits as they are.

First think between <reasoning> and </reasoning>. Then write the whole solved \
grid between <answer> and </answer>: 16 digits, nothing between them.

Solve the following Sudoku puzzle: {puzzle}
"""

SHOWN = (  # worked examples; their grids are 3 of the 288
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
_END_OR_CLOSE = re.compile(r'<\|eot_id\|>|<\|endoftext\|>|</answer>')


@functools.cache
def grids():
  """The 288 solution grids as strings, in lexicographic order."""
  rows = [''.join(digits) for digits in itertools.permutations('1234')]
  bands = [a + b for a in rows for b in rows if len(set(a[:2] + b[:2])) == 4]
  return tuple(
    a + b
    for a in bands
    for b in bands
    if all(len({*(a + b)[column::4]}) == 4 for column in range(4))
  )


def split_grids(seed):
  """dict from split to its solution grids; disjoint, together all 288."""
  order = np.random.default_rng(seed).permutation(len(grids()))
  cut = [len(order) * 70 // 100, len(order) * 85 // 100]
  return {
    split: [grids()[at] for at in part]
    for split, part in zip(answers.SPLITS, np.split(order, cut), strict=True)
  }


def load(split, options):
  """Examples {'puzzle', 'solution'} of a split; see `TaskOptions`.

  Raises ValueError for an unknown split, unusable options and a bad file.
  """
  size = answers.size_of(split, options)
  owned = split_grids(options.seed)
  if options.path:
    places = {grid: name for name, part in owned.items() for grid in part}
    return answers.take(
      'sudoku',
      _read,
      lambda e: places[e['solution']],
      lambda e: e['puzzle'],
      split,
      options,
    )
  if not 1 <= options.min_blanks <= options.max_blanks <= MAX_BLANKS:
    raise ValueError(
      f'min_blanks={options.min_blanks}, max_blanks={options.max_blanks}: '
      f'need 1 <= min_blanks <= max_blanks <= {MAX_BLANKS}'
    )
  if size < 1:
    raise ValueError(f'{split}_size={size}: need at least one puzzle')
  rng = np.random.default_rng([options.seed, answers.SPLITS.index(split)])
  blanks = rng.integers(options.min_blanks, options.max_blanks + 1, size)
  # One pool per number of blanks: rejection would otherwise favour few blanks.
  pools = {
    k: iter(_generate(rng, owned[split], k, int((blanks == k).sum())))
    for k in np.unique(blanks).tolist()
  }
  return [next(pools[k]) for k in blanks.tolist()]


def _read(path):
  for line, row in answers.read_csv(path, ('Puzzle', 'Solution')):
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


def _keeps(puzzle, grid):
  """Whether the 16 cells of `grid` keep the given ones of `puzzle`."""
  return all(p in ('0', g) for p, g in zip(puzzle, grid, strict=True))


def _generate(rng, solutions, blanks, size):
  """`size` distinct puzzles with one solution; ValueError if not found."""
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
        f'found only {len(puzzles)} distinct puzzles with {blanks} empty '
        f'cells, {size} are wanted: ask for fewer or widen the blanks'
      )
  return [
    {'puzzle': puzzle, 'solution': solution}
    for puzzle, solution in itertools.islice(puzzles.items(), size)
  ]


@functools.cache
def _one_hot_grids():
  return _one_hot(np.array([list(grid) for grid in grids()]))


def _one_hot(cells_NxC):
  hot = cells_NxC[:, :, None] == np.array(list('1234'))
  return hot.reshape(len(hot), -1).astype(np.float32)


def _count(puzzles_NxC):
  """How many of the 288 grids agree with each puzzle's given cells."""
  hot = _one_hot(puzzles_NxC)
  agree = hot @ _one_hot_grids().T  # given cells on which they agree
  return (agree == hot.sum(1, keepdims=True)).sum(1)


def prompt(example, style):
  """The user's message; ValueError for an unknown style."""
  return answers.choose('style', style, TEMPLATES).format(puzzle=example['puzzle'])


def target(example, style):
  """A correct completion; ValueError for an unknown style."""
  answers.choose('style', style, TEMPLATES)
  if style == 'bare':
    return example['solution']
  return f'<answer>\n{example["solution"]}\n</answer>'


def reward(text, example, protocol):
  """{'sudoku': share of empty cells}; ValueError for an unknown protocol."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  if protocol == 'strict':
    return {'sudoku': _strict(text, example)}
  answer = answers.last_answer(text) or ''
  # str.isdigit and not '0' <= c <= '9': the reference counts any digit.
  digits = ''.join(c for c in answer if c.isdigit())
  return {'sudoku': _share(digits, example)}


def grade(text, example, protocol):
  """'paper': share of empty cells; 'strict': 1.0 if all is right, else 0.0."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  if protocol == 'strict':
    return float(_strict(text, example) == 1.0)
  return _share(_graded(answers.clip(text)), example)


def extra(text, example):
  """{'cell_accuracy'}: the strict answer, compared where it has a cell."""
  return {'cell_accuracy': _share(_answer(text), example)}


def answer(text, example, protocol):
  """What a majority vote counts: the grid as written; None without one."""
  del example
  return (
    _answer(text) if protocol == 'strict' else _graded(answers.clip(text))
  ) or None


def counts(example, protocol):
  """How much a puzzle counts in the accuracy; 'paper': by its empty cells."""
  return example['puzzle'].count('0') if protocol == 'paper' else 1


def _share(answer, example):
  """Share of empty cells where `answer` has the solution's digit."""
  empty = [at for at in range(CELLS) if example['puzzle'][at] == '0']
  answer = answer.ljust(CELLS, '0')
  right = sum(answer[at] == example['solution'][at] for at in empty)
  return right / len(empty) if empty else 0.0


def _answer(text):
  """The last <answer>, else the whole text, without white space."""
  answer = answers.last_answer(text)
  return ''.join((answers.clip(text) if answer is None else answer).split())


def _strict(text, example):
  answer = _answer(text)
  if len(answer) != CELLS or answer.strip('1234'):
    return 0.0
  if not _keeps(example['puzzle'], answer):
    return 0.0
  # A file's puzzle may have more solutions than the one told.
  return 1.0 if answer in grids() else _share(answer, example)


def _graded(text):
  """The evaluation's answer: the first of its five patterns with content.

  Patterns 1-3 are `<answer>.*?(fence)`, `<answer>(.*?)(end)` and
  `</answer>\\s*(.*?)(end)`. Searching each piece from the first tag finds the
  same, as later tags see less text, without their quadratic backtracking.
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


def record(example):
  """(puzzle, solution)."""
  return example['puzzle'], example['solution']


def recall(question, truth):
  """The example of a saved generation: the puzzle begins the question, or
  stands behind 'Sudoku puzzle: '. ValueError if there is none, or no grid."""
  found = re.match(r'[0-4]{16}', question) or re.search(
    r'(?<=Sudoku puzzle: )[0-4]{16}', question
  )
  if not found:
    raise ValueError(f'no puzzle in the question {question[-60:]!r}')
  if truth not in grids() or not _keeps(found[0], truth):
    raise ValueError(f'ground_truth {truth!r} does not solve {found[0]}')
  return {'puzzle': found[0], 'solution': truth}


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
  counts=counts,
  styles=tuple(TEMPLATES),
)
