"""Every objective from one base model, at equal numbers of network forwards.

python main.py --config=configs/compare.py:sudoku --sweep=objectives:0

This is one run, with a base model of its own. `python -m benchmarks.compare` does them
all: each arm searched over RATES, then with five seeds, from one base per task.
docs/comparison.md has the results. The part after the colon is the task: sudoku or
countdown.

One forward is a pass over all rows of a buffer; a backward pass counts as two more. An
arm gets as many buffers as BUDGET pays for at its COSTS; validation is free. All arms
share the model, the problems, the base and the sampler (two tokens a step, the most
probable positions first), except where an objective needs another sampler. The learning
rate is constant after its warm-up, so a run is the beginning of a longer one.
"""

from configs import countdown, quickstart
from dmpo_jax.objectives import OBJECTIVES

SWEEPS = ('objectives',)
BUDGET = 1600  # forwards over a buffer's rows, for a whole run
RATES = (7e-5, 2e-4, 6e-4)  # learning rates that are searched
SEEDS = (0, 1, 2, 3, 4)
MODES = {}  # flags of main.py of arms that are not plain runs
TASKS = {'sudoku': quickstart, 'countdown': countdown}
LENGTH = 16  # tokens of a completion; the same for both tasks, so they cost the same
INNER = 2  # updates per buffer

PAPER = {
  'logprob.estimator': 'elbo',
  'objective.strength': 1.0,
  'objective.best': 0.0,
  'objective.draws': 4,
}
EXACT = {**PAPER, 'logprob.estimator': 'trajectory', 'logprob.states': 0}
OURS = {'objective.strength': 0.3, 'objective.best': 1.0, 'objective.draws': 2}
# DMPO with the release's estimate of log p_ref - log p_old (paper), with the exact one
# (exact), the same with the paper's other baselines, with our settings (dmpo), and our
# settings with the release's estimate (dmpo-elbo).
DMPO = {
  'dmpo-paper': PAPER,
  'dmpo-exact': EXACT,
  'dmpo-none': {**EXACT, 'objective.baseline': 'none'},
  'dmpo-group': {**EXACT, 'objective.baseline': 'group'},
  'dmpo-model': {
    **EXACT,
    'objective.baseline': 'model',
    'objective.common_masks': True,
  },
  'dmpo': {**EXACT, **OURS},
  'dmpo-elbo': {**PAPER, **OURS},
}
ARMS = (*DMPO, *(name for name in OBJECTIVES if name != 'dmpo'))
AGAINST = 'dmpo-paper'  # the arm that the tables compare with

# Forwards over a buffer's rows: (sampling, scoring, one update). tests/test_compare.py
# counts them in the traced programs, without those that remat repeats.
COSTS = {
  **dict.fromkeys(DMPO, (8, 8, 12)),
  'dmpo-model': (8, 16, 16),
  'dmpo': (8, 8, 6),
  'dmpo-elbo': (8, 8, 6),
  'agrpo': (8, 0, 72),
  'coupled_grpo': (8, 12, 9),
  'diffpo': (8, 8, 6),
  'diffu_grpo': (8, 4, 3),
  'dipo': (8, 0, 48),
  'egspo': (8, 8, 24),
  'espo': (8, 16, 12),
  'fork_grpo': (16, 0, 48),
  'gdpo': (8, 12, 9),
  'gdsd': (8, 16, 12),
  'just_grpo': (16, 0, 48),
  'mapg': (8, 0, 36),
  'residual': (8, 8, 16),
  'spg': (8, 0, 6),
  'tracerl': (8, 0, 48),
  'vrpo': (8, 16, 32),
  'wd1': (8, 0, 3),
}


def get_config(task='sudoku'):
  if task not in TASKS:
    raise ValueError(f'{task!r} after the colon must be {" or ".join(TASKS)}')
  c = TASKS[task].get_config()
  c.name = f'compare-{task}'
  c.data.train_size, c.sft.steps = {'sudoku': (4000, 100), 'countdown': (6500, 4000)}[
    task
  ]
  c.model.remat = 'dots'  # faster on a CPU: fewer arrays to write and read
  c.train.prompts = 16
  c.train.group = 8
  c.train.inner = INNER
  c.train.microbatches = 2
  c.sampler.pick = 'confidence'
  for section in (c.sampler, c.eval.sampler):
    section.length = section.block = section.steps = LENGTH
  c.sampler.steps = LENGTH // 2
  c.optim.warmup = 10
  c.optim.decay_steps = 0
  c.optim.b2 = 0.99
  c.checkpoint.every = 1000
  c.mesh.cpu = 1
  return c


def inner_of(arm):
  """Returns the updates on a buffer: the same for all."""
  return INNER


def buffers_of(cost, inner):
  """Returns how many buffers of this cost, as in COSTS, the budget pays for."""
  sample, score, update = cost
  return max(1, round(BUDGET / (sample + score + inner * update)))


def fields_of(arm):
  """Returns {config field: value} of an arm, for config.update."""
  name = 'dmpo' if arm in DMPO else arm
  count = buffers_of(COSTS[arm], INNER)
  run = {'name': f'compare-{arm}', 'train.iterations': count}
  return {'objective.name': name, **DMPO.get(arm, {}), **run}


def sweep(name):
  return {'objectives': [fields_of(arm) for arm in ARMS]}[name]
