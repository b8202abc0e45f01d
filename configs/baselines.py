"""The paper's finding at laptop size: which baseline to subtract.

Twelve runs at equal budgets, four baselines by three seeds, each as long as the
quickstart:

for i in $(seq 0 11); do
  python main.py --config=configs/baselines.py --sweep=baseline:$i
done
python main.py --mode=report --runs='runs/baselines-*' --by=objective.baseline
"""

from configs import quickstart

SWEEPS = ('baseline',)


def get_config():
  c = quickstart.get_config()
  c.name = 'baselines'
  return c


def sweep(name):
  baselines = ('none', 'group', 'individual', 'model')
  return {'baseline': [{'objective.baseline': b, 'seed': s}
                       for b in baselines for s in (0, 1, 2)]}[name]
