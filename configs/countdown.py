"""DMPO from random weights on countdown with three numbers, on a laptop.

python main.py --config=configs/countdown.py
"""

from configs import quickstart
from dmpo_jax import config


def get_config(objective=''):
  c = quickstart.get_config()
  c.name = 'countdown'
  c.data = config.section(
    config.Data,
    task='countdown',
    style='steps',
    held='numbers',
    largest=9,
    train_size=1500,
    validation_size=160,
    test_size=160,
  )
  c.model.attention_block = 4
  for sampler in (c.sampler, c.eval.sampler):
    sampler.length = sampler.steps = 20
    sampler.block = 4
    sampler.cache = 'block'
  c.sampler.temperature = 1.0
  c.logprob.states = 0
  c.sft.steps = 1200
  c.sft.batch = 32
  c.sft.lr = 2e-3
  c.sft.decay = 'linear'
  c.train.iterations = 600
  c.train.prompts = 16
  c.train.group = 16
  c.train.inner = 2
  c.train.microbatches = 2
  c.optim.lr = 4e-4
  c.mesh.cpu = 2
  if objective:
    config.choose_objective(c, objective)
  return c
