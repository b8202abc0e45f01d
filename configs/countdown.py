"""DMPO from nothing on countdown with three numbers, on a laptop.

python main.py --config=configs/countdown.py

Numbers to 15: of those to 99 a model of this size learns the form of an answer
and no arithmetic, and no reward follows. To 15 it solves one new problem in
seven after these supervised steps, five minutes, and RL adds little to that,
nor to one in five after 4,000 of them (docs/comparison.md): with rewards so
rare it is the hard case. The rate is a fourth of sudoku's; at 6e-4 it forgets.
"""

from configs import quickstart


def get_config():
  c = quickstart.get_config()
  c.name = 'countdown'
  c.data.task = 'countdown'
  c.data.train_size = 4000
  c.data.largest = 15
  c.sft.steps = 1500
  c.optim.lr = 2e-4
  c.sampler.length = c.sampler.block = c.sampler.steps = 12
  e = c.eval.sampler
  e.length = e.block = e.steps = 12
  return c
