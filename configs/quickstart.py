"""DMPO from nothing on 4x4 sudoku: a laptop, two cores, under ten minutes.

python main.py --config=configs/quickstart.py

A masked diffusion model of 140 k parameters sees solved puzzles for half a
minute, too short to learn the rules, and then improves by reinforcement on
puzzles of the training grids. Validation and test puzzles have solution grids
that were never trained on.

What matters here (docs/quickstart.md has the numbers):
* many puzzles: 64 a buffer, one update each, two masked copies a completion;
* pick `entropy` unmasks what is certain at once; it looks at the state alone,
  so that log p_ref - log p_old can be taken along the recorded trajectory,
  here from two of its states;
* `best` = 1: where none of the eight answers is right the group has little
  of the target's mass, and would else teach the least wrong one.
"""

from configs import base


def get_config():
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
  return c
