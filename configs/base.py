"""The config that every experiment starts from.

Each section holds the fields of its dataclass at their defaults, with this page's
changes. The dataclasses say what each field means: dmpo_jax/config.py, SampleConfig in
dmpo_jax/sampler, LogprobConfig in dmpo_jax/logprob.py, and Config in health.py, in
optim.py and in the file of each objective. An experiment file calls `get_config()` and
says only what differs; the command line sets any field with
--config.section.field=value.
"""

import ml_collections

from dmpo_jax import config, curriculum, health, logprob, optim


def get_config():
  section = config.section
  c = ml_collections.ConfigDict()
  c.name = 'base'  # name of the experiment; the default workdir begins with it
  c.seed = 0  # seed of everything random but the problems (data.seed); 0 to 2**32 - 1
  c.cache = True  # keep compiled programs in ~/.cache/dmpo_jax; never for CPUs

  c.model = section(config.Model)
  c.lora = section(config.Lora)
  c.data = section(config.Data)
  c.reward = section(config.Reward)
  c.sft = section(config.Sft)
  c.pairs = section(config.Pairs)
  c.sampler = section(config.Sampler, temperature=1.0)  # rollouts
  config.choose_objective(c, 'dmpo')
  c.reference = section(config.Reference)
  c.logprob = section(logprob.LogprobConfig)  # estimates of log p_ref and log p_old
  c.train = section(config.Train)
  c.curriculum = section(curriculum.Config)
  c.optim = section(optim.Config)
  c.eval = section(config.Eval)
  c.eval.sampler = section(config.Sampler)  # greedy
  c.checkpoint = section(config.Checkpoint)
  c.health = section(health.Config)
  c.mesh = section(config.Mesh)
  c.log = section(config.Log)
  return c.lock()  # a field that is not above is refused
