"""Curricula and credit of single steps, on and off, at equal numbers of forwards.

python main.py --config=configs/toolbox.py --sweep=objectives:0

This is one run, with a base model of its own. `python -m benchmarks.toolbox` does them
all from one base; docs/toolbox.md has the results. The setting is that of
configs/compare.py but for three things that a curriculum is made for:

* Puzzles of 2 to 10 empty cells, so that some are easy and some hopeless.
* A reward of 1 for a right grid and 0 for others: the laws of the signals assume it.
* PROBLEMS puzzles for RL, so that each returns a few times.
"""

import pathlib

from configs import compare

SWEEPS = ('objectives',)
BUDGET = compare.BUDGET
SEEDS = compare.SEEDS
INNER, inner_of = compare.INNER, compare.inner_of
PROBLEMS = 96
# Both on sudoku: paid for a right grid, or for the share of right cells (quickstart).
TASKS = ('sudoku', 'cells')
REWARD = pathlib.Path(__file__).parents[1] / 'benchmarks' / 'whole.py'

# The settings of an arm without the tool, and its learning rate: that of
# docs/comparison.md. agrpo has fewer draws, so that it sees as many buffers, and the
# picks of the others, so that completions share their first steps.
OFF = {
  'dmpo': ({**compare.DMPO['dmpo'], 'objective.name': 'dmpo'}, 7e-5),
  'diffpo': ({'objective.name': 'diffpo', 'objective.norm': 'token'}, 2e-4),
  'agrpo': (
    {
      'objective.name': 'agrpo',
      'objective.draws': 4,
      'objective.advantage': 'loo',
      'sampler.pick': 'confidence',
    },
    2e-4,
  ),
}
# What each arm sets: (the arm that it is compared with, fields).
TOOLS = {
  'dmpo-own': ('dmpo', {'curriculum.signal': 'objective'}),
  'dmpo-other': ('dmpo', {'curriculum.signal': 'policy_gradient'}),
  'dmpo-correct': (
    'dmpo',
    {'curriculum.signal': 'objective', 'curriculum.correct': True},
  ),
  'dmpo-resample': ('dmpo', {'curriculum.resample': 1}),
  'diffpo-own': ('diffpo', {'curriculum.signal': 'objective'}),
  'diffpo-other': ('diffpo', {'curriculum.signal': 'matching'}),
  'agrpo-prefix': ('agrpo', {'objective.advantage': 'prefix'}),
  'dmpo-pairs': (
    'dmpo',
    {'train.iterations': 27, 'pairs.lr': 1e-4, 'pairs.batch': 8, 'pairs.warmup': 2},
  ),
}
# RL, DPO on pairs of its rollouts, and RL again, `train.iterations` each.
MODES = {'dmpo-pairs': ('--mode=rounds', '--rounds=1')}
ARMS = (*OFF, *TOOLS)
# (sampling, scoring, one update), as in configs/compare.py.
COSTS = {'dmpo': (8, 8, 6), 'diffpo': (8, 8, 6), 'agrpo': (8, 0, 12)}
COSTS |= {arm: COSTS[off] for arm, (off, _) in TOOLS.items()}
COSTS['dmpo-resample'] = (16, 8, 6)  # some group has equal rewards in every buffer
# An update on a pair, in forwards of its two rows: vrpo's, with one set of masks.
PAIR = compare.COSTS['vrpo'][1] // compare.INNER + compare.COSTS['vrpo'][2]


def get_config(task='sudoku'):
  if task not in TASKS:
    raise ValueError(f'{task!r} after the colon must be {" or ".join(TASKS)}')
  c = compare.get_config()
  c.name = f'toolbox-{task}'
  c.data.max_blanks = 10
  c.sft.steps = 90
  c.train.prompts = 8
  c.train.microbatches = 1
  if task == 'sudoku':
    c.reward.file = f'{REWARD}:whole'
    c.reward.task = False
  return c


def rates_of(arm):
  """Returns the learning rates that are searched: one."""
  return (OFF[off_of(arm)][1],)


def off_of(arm):
  """Returns the arm that this one is compared with; itself for one without a tool."""
  return TOOLS[arm][0] if arm in TOOLS else arm


def fields_of(arm):
  """Returns {config field: value} of an arm, for config.update."""
  count = compare.buffers_of(COSTS[arm], INNER)
  run = {
    'name': f'toolbox-{arm}',
    'data.train_size': PROBLEMS,
    'train.iterations': count,
  }
  tool = TOOLS[arm][1] if arm in TOOLS else {}
  return {**OFF[off_of(arm)][0], **run, **tool}


def sweep(name):
  return {'objectives': [fields_of(arm) for arm in ARMS]}[name]
