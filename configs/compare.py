"""Every objective from one base model, at equal network forwards.

python main.py --config=configs/compare.py:sudoku --sweep=objectives:0

is one run, with a base model of its own; all of them, each searched over RATES
and with five seeds from one base a task, is `python -m benchmarks.compare`, and
docs/comparison.md what came out. The part after the colon is the task: sudoku
or countdown.

A forward is one of all rows of a buffer; a backward pass counts as two more.
An objective gets as many buffers as BUDGET pays at its COSTS; validation is
free. All share the model, the problems, the base, and the sampler but where
SAMPLERS of configs/rivals.py has another: two tokens a step, the most probable
places first. The rate is constant after its warm-up, so that a run is the
beginning of a longer one.
"""

from configs import countdown, quickstart, rivals
from dmpo_jax.objectives import OBJECTIVES

SWEEPS = ('objectives',)
BUDGET = 1600  # forwards of a buffer's rows
RATES = (7e-5, 2e-4, 6e-4)
SEEDS = (0, 1, 2, 3, 4)
TASKS = {'sudoku': quickstart, 'countdown': countdown}
LENGTH = 16  # tokens; so that both tasks cost the same
INNER = 2  # updates a buffer

PAPER = {
  'logprob.estimator': 'elbo',
  'objective.strength': 1.0,
  'objective.best': 0.0,
  'objective.draws': 4,
}
EXACT = {**PAPER, 'logprob.estimator': 'trajectory', 'logprob.states': 0}
OURS = {'objective.strength': 0.3, 'objective.best': 1.0, 'objective.draws': 2}
# DMPO with the release's weights, with exact ones and nothing else changed,
# the same with the paper's other baselines; as our configs have it, and that
# with the release's weights.
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

# Forwards of a buffer: (sampling, scoring, one update). tests/test_compare.py
# counts them in the traced programs, without what remat does again.
COSTS = {
  **dict.fromkeys(DMPO, (8, 8, 12)),
  'dmpo-model': (8, 16, 16),
  'dmpo': (8, 8, 6),
  'dmpo-elbo': (8, 8, 6),
  'agrpo': (8, 0, 72),
  'coupled_grpo': (8, 12, 9),
  'diffpo': (8, 8, 6),
  'diffu_grpo': (8, 4, 3),
  'egspo': (8, 8, 24),
  'espo': (8, 16, 12),
  'fork_grpo': (16, 0, 48),
  'gdpo': (8, 12, 9),
  'gdsd': (8, 16, 12),
  'just_grpo': (16, 0, 48),
  'mapg': (8, 0, 36),
  'residual': (8, 8, 16),
  'spg': (8, 0, 6),
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


def fields_of(arm):
  """{config field: value} of an arm."""
  fields = rivals.fields_of('dmpo' if arm in DMPO else arm) | DMPO.get(arm, {})
  if fields.get('sampler.block') == 1:
    fields['sampler.steps'] = LENGTH
  sample, score, update = COSTS[arm]
  count = max(1, round(BUDGET / (sample + score + INNER * update)))
  return fields | {'name': f'compare-{arm}', 'train.iterations': count}


def sweep(name):
  return {'objectives': [fields_of(arm) for arm in ARMS]}[name]
