"""DMPO from nothing on 4x4 sudoku: a laptop, two cores, minutes.

python main.py --config=configs/quickstart.py

A masked diffusion model of 140 k parameters sees solved puzzles for a minute,
too short to learn the rules, and then improves by reinforcement on puzzles of
the training grids. Validation and test puzzles have solution grids that were
never trained on. Seed 0, twelve minutes on two busy cores: the base model
solves 48 % of the test puzzles, the tuned one 79 %.

What matters here, measured as the cosine of one update's direction with that
of supervised training on the true solutions (64 prompts by 16 completions, the
base model at a third of its samples right): baseline individual at strength
0.5: 0.67, none 0.64, group 0.56, individual at full strength 0.54.
"""

from configs import base


def get_config():
  c = base.get_config()
  c.name = 'quickstart'
  c.data.task = 'sudoku'
  c.data.train_size = 20000
  c.data.max_blanks = 6
  c.sft.steps = 120
  c.sft.lr = 3e-3
  c.train.iterations = 80
  c.train.prompts = 64
  c.train.group = 8
  c.train.inner = 2
  c.objective.baseline = 'individual'
  c.objective.strength = 0.5
  c.sampler.temperature = 0.8
  c.logprob.estimator = 'trajectory'
  c.optim.lr = 3e-4
  c.optim.decay_steps = 2 * c.train.get_ref('iterations')
  c.optim.b2 = 0.999
  c.eval.every = 5
  return c
