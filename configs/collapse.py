"""Policy gradients on guessed log-probs, driven until they collapse, and what stops it.

python main.py --config=configs/collapse.py:sudoku --sweep=objectives:0

`python -m benchmarks.compare --study=collapse` makes all runs, and `python -m
benchmarks.collapse` says when each collapsed, and which number showed it before. The
base, the problems and the sampler are those of configs/compare.py. The learning rate is
the highest one of its search; all runs take as many updates. Each arm after the first
of its objective changes one setting. docs/comparison.md has the results.
"""

from configs import compare

SWEEPS = ('objectives',)
RATES = (6e-4,)
SEEDS = (0, 1, 2)
TASKS = {'sudoku': compare.TASKS['sudoku']}
MODES = {}
BUFFERS = 60  # two updates each: reports of collapse name 50 to 120 updates

# Advantages by the standard deviation, wide clips and no penalty, as in most reports.
START = {'objective.advantage': 'zscore', 'objective.clip': 0.5, 'objective.beta': 0.0}
CHANGES = {
  '': {},
  '+kl': {'objective.beta': 0.04},  # d1's
  '+kl10': {'objective.beta': 0.4},
  '+mean': {'objective.advantage': 'mean'},
  '+clip': {'objective.clip': 0.1},
}
DMPO = {'dmpo-plain': compare.DMPO['dmpo-exact'], 'dmpo': compare.DMPO['dmpo']}
ARMS_OF = {
  f'{name}{change}': {'objective.name': name, **START, **fields}
  for name in ('diffu_grpo', 'coupled_grpo')
  for change, fields in CHANGES.items()
} | {name: {'objective.name': 'dmpo', **fields} for name, fields in DMPO.items()}
ARMS = tuple(ARMS_OF)
AGAINST = 'diffu_grpo'


def cost_of(arm):
  """Returns what configs/compare.py says, without what health.measure adds."""
  known = {'dmpo-plain': 'dmpo-exact'}.get(arm, arm.partition('+')[0])
  return compare.COSTS[known]


COSTS = {arm: cost_of(arm) for arm in ARMS}
# Forwards of the dearest arm: the harness' pictures have them on their axis.
BUDGET = BUFFERS * max(a + b + compare.INNER * u for a, b, u in COSTS.values())
inner_of = compare.inner_of


def get_config(task='sudoku'):
  c = compare.get_config(task)
  c.name = f'collapse-{task}'
  c.health.measure = True  # kl_ref of every objective
  return c


def fields_of(arm):
  """Returns {config field: value} of an arm, for config.update."""
  return ARMS_OF[arm] | {'name': f'collapse-{arm}', 'train.iterations': BUFFERS}


def sweep(name):
  return {'objectives': [fields_of(arm) for arm in ARMS]}[name]
