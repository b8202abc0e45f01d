"""Attention in blocks against attention over the whole text: one task, one size.

python main.py --config=configs/attention.py:blocks --sweep=objectives:0

`python -m benchmarks.compare --study=attention` makes all runs: DMPO with our settings
on the sudokus of configs/compare.py, two tokens a step, exact log-ratios. The part
after the colon is the attention: `whole`, or `blocks` of four tokens, sampled from left
to right with an exact cache. Each has a base of its own, with supervised steps so
chosen that both have about as many puzzles right. Both take BUFFERS buffers at a
constant learning rate, so a curve may be read at any number of forwards or tokens.
docs/comparison.md has the results.
"""

from configs import compare

SWEEPS = ('objectives',)
RATES = compare.RATES
SEEDS = (0, 1, 2)
MODES = {}
BLOCK = 4
TASKS = {'whole': None, 'blocks': None}
BUFFERS = 90
ARMS = ('dmpo',)
DMPO = {'dmpo': compare.DMPO['dmpo']}
AGAINST = 'dmpo'
# Of attention over the whole text. In blocks scoring is one packed pass.
COSTS = {'dmpo': compare.COSTS['dmpo']}
BUDGET = BUFFERS * 28
inner_of = compare.inner_of


def get_config(task='whole'):
  if task not in TASKS:
    raise ValueError(f'{task!r} after the colon must be {" or ".join(TASKS)}')
  c = compare.get_config('sudoku')
  c.name = f'attention-{task}'
  if task == 'blocks':
    c.model.attention_block = BLOCK
    c.sft.steps = 80  # 33 % right; over the whole text 100 steps give 37 %
    for section, per_step in ((c.sampler, 2), (c.eval.sampler, 1)):
      section.length = compare.LENGTH + BLOCK  # a prompt may end within a block
      section.steps = section.length // per_step
      section.block = BLOCK
      section.cache = 'block'
  return c


def fields_of(arm):
  """Returns {config field: value} of an arm, for config.update."""
  return {
    'objective.name': 'dmpo',
    **DMPO[arm],
    'name': 'attention',
    'train.iterations': BUFFERS,
  }


def sweep(name):
  return {'objectives': [fields_of(arm) for arm in ARMS]}[name]
