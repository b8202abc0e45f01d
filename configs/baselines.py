"""The paper's finding at laptop size: which baseline to subtract from the weights.

Twelve runs at equal budgets, four baselines with three seeds each, two minutes a run
on two quiet cores:

for i in $(seq 0 11); do
  python main.py --config=configs/baselines.py --sweep=baseline:$i
done
python main.py --mode=report --runs='runs/baselines-*' --by=objective.baseline

The objective is the paper's: full strength, no `best`. Log-probs come from four
recorded states, and each completion has two mask draws. A puzzle has one more empty
cell than in the quickstart, a buffer half the puzzles, and the learning rate is half.
There are two updates per buffer: with one, `model` equals `group`, because its softmax
is over log p_theta - log p_old, which is 0 until the policy moves. docs/quickstart.md
has the result.
"""

from configs import quickstart

SWEEPS = ('baseline',)


def get_config():
  c = quickstart.get_config()
  c.name = 'baselines'
  c.data.min_blanks = 3
  c.data.max_blanks = 5
  c.sft.steps = 95
  c.sampler.entropy_bound = 0.1
  c.logprob.states = 4
  c.train.iterations = 50
  c.train.inner = 2
  c.train.prompts = 32
  c.objective.strength = 1.0
  c.objective.best = 0.0
  c.objective.common_masks = True
  c.optim.lr = 4e-4
  return c


def sweep(name):
  baselines = ('none', 'group', 'individual', 'model')
  return {
    'baseline': [
      {'objective.baseline': b, 'seed': s} for s in (0, 1, 2) for b in baselines
    ]
  }[name]
