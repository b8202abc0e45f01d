"""DMPO from random weights on 4x4 sudoku: a laptop, two cores, under ten minutes.

python main.py --config=configs/quickstart.py

A masked diffusion model of 140 k parameters is fine-tuned on solved puzzles for half a
minute, too short to learn the rules. RL then improves it on puzzles of the training
grids. No validation or test puzzle has a solution grid of the training set.

`--config=configs/quickstart.py:espo` trains with another objective, at its own defaults
and with the sampler fields that it needs; --config.objective.name=espo is the same.
`:dmpo` resets the objective to the paper's values; sampler and log-probs stay those
below. With one update per buffer all importance ratios are 1: set
--config.train.inner=2 to make them matter. Learning rates are not tuned for other
objectives; docs/comparison.md searches them.

Why these settings (docs/quickstart.md has the numbers):
* Many puzzles: 64 per buffer, one update on each buffer, two mask draws a completion.
* The pick rule `entropy` unmasks certain tokens at once. It depends on the state alone,
  so log p_ref - log p_old is exact along the recorded trajectory; two states estimate
  it.
* `best = 1` scales down a group without a right answer: it has little of the target's
  mass, and would teach the least wrong answer.
"""

from configs import base
from dmpo_jax import config


def get_config(objective=''):
  c = base.get_config()
  c.name = 'quickstart'
  c.data.task = 'sudoku'
  c.data.train_size = 20000
  c.data.min_blanks = 2
  c.data.max_blanks = 4
  c.data.test_size = 512
  c.sft.steps = 75
  c.sft.lr = 3e-3
  c.train.iterations = 220
  c.train.prompts = 64
  c.train.group = 8
  c.train.inner = 1
  c.train.microbatches = 8
  c.sampler.temperature = 0.8
  c.sampler.pick = 'entropy'
  c.sampler.entropy_bound = 0.02
  c.objective.draws = 2
  c.objective.strength = 0.3
  c.objective.best = 1.0
  c.logprob.estimator = 'trajectory'
  c.logprob.states = 2
  c.optim.lr = 8e-4
  c.optim.warmup = 20
  updates = c.train.get_ref('iterations') * c.train.get_ref('inner')
  c.optim.decay_steps = updates  # to zero at the end
  c.optim.b2 = 0.999
  c.eval.every = 20
  c.mesh.cpu = 2
  if objective:
    config.choose_objective(c, objective)
  return c
