"""DMPO from nothing on countdown with three numbers, on a laptop.

python main.py --config=configs/countdown.py
"""

from configs import quickstart


def get_config():
  c = quickstart.get_config()
  c.name = 'countdown'
  c.data.task = 'countdown'
  c.data.train_size = 20000
  c.sampler.length = c.sampler.block = c.sampler.steps = 12
  e = c.eval.sampler
  e.length = e.block = e.steps = 12
  return c
