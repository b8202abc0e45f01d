"""DMPO from nothing on 4x4 sudoku: a laptop, two cores, minutes.

python main.py --config=configs/quickstart.py
"""

from configs import base


def get_config():
  c = base.get_config()
  c.name = 'quickstart'
  c.data.task = 'sudoku'
  c.sft.steps = 150
  c.train.iterations = 60
  c.train.prompts = 16
  c.train.group = 16
  c.logprob.estimator = 'trajectory'
  c.eval.every = 5
  return c
