"""DMPO from random weights on countdown with three numbers, on a laptop.

python main.py --config=configs/countdown.py

The numbers go to 15. With numbers to 99 a model of this size learns the form of an
answer but no arithmetic, and is never rewarded. With numbers to 15 it solves one new
problem in seven after these supervised steps (five minutes). RL adds little to that,
and little to one in five after 4,000 steps (docs/comparison.md): with so few rewards
this is the hard case. The learning rate is a fourth of the sudoku's; at 6e-4 the model
forgets. `:espo` after the file name chooses another objective, as in quickstart.py.
"""

from configs import quickstart
from dmpo_jax import config


def get_config(objective=''):
  c = quickstart.get_config()
  c.name = 'countdown'
  sizes = dict(train_size=4000, test_size=512, largest=15)
  c.data = config.section(config.Data, task='countdown', **sizes)  # no blanks
  c.sft.steps = 1500
  c.optim.lr = 2e-4
  c.sampler.length = c.sampler.block = c.sampler.steps = 12
  e = c.eval.sampler
  e.length = e.block = e.steps = 12
  if objective:
    config.choose_objective(c, objective)
  return c
