"""DMPO taken apart: each of its settings alone, at equal numbers of forwards.

python main.py --config=configs/apart.py:sudoku --sweep=objectives:0

This is one run, with a base model of its own. `python -m benchmarks.compare
--study=apart` does them all: the model, the problems, the sampler, the budget and the
search of the rate are those of configs/compare.py, with a fourth rate. FAMILIES has the
questions, and the arms that answer each. docs/apart.md has the results.

An arm's name says what it sets: `best+copies`, `group-inner4`. Two arms of the same
settings are one run, under the name of the first.
"""

import itertools

from configs import compare

SWEEPS = ('objectives',)
BUDGET = compare.BUDGET
RATES = (2.5e-5, *compare.RATES)
SEEDS = compare.SEEDS
TASKS = compare.TASKS
MODES = compare.MODES
ROWS = 128  # completions of a buffer, whatever their group

# The release's settings, with exact log-ratios; and what our configs turn on.
AGAINST = 'plain'
START = {
  **compare.fields_of('dmpo-exact'),
  'objective.alpha': 0.04,
  'objective.coef': 1.0,
  'objective.ess': 0.0,
  'objective.baseline': 'individual',
  'objective.common_masks': False,
  'objective.masks': 'random',
  'train.group': 8,
  'train.prompts': ROWS // 8,
  'train.inner': compare.INNER,
}
OURS = START | compare.OURS
SWITCHES = {
  'strength': 'objective.strength',
  'best': 'objective.best',
  'copies': 'objective.draws',
}


def switches():
  """Yields each of our three settings alone, in pairs, and all of them."""
  for count in range(len(SWITCHES) + 1):
    for names in itertools.combinations(SWITCHES, count):
      fields = {SWITCHES[name]: OURS[SWITCHES[name]] for name in names}
      yield '+'.join(names) or AGAINST, START | fields


def targets():
  """Yields alpha x completions of a group x updates of a buffer."""
  for alpha, group, inner in itertools.product(
    (0.04, 0.16, 0.64), (4, 8, 16), (1, 2, 4)
  ):
    yield (
      f'alpha{alpha}-group{group}-inner{inner}',
      OURS
      | {
        'objective.alpha': alpha,
        'train.group': group,
        'train.prompts': ROWS // group,
        'train.inner': inner,
      },
    )


def baselines():
  """Yields each baseline at full strength, on policy and off."""
  for name, inner in itertools.product(
    ('none', 'group', 'individual', 'model'), (1, 2, 4, 8)
  ):
    common = {'objective.common_masks': True} if name == 'model' else {}
    yield (
      f'{name}-inner{inner}',
      START | {'objective.baseline': name, 'train.inner': inner} | common,
    )


def proximal():
  """Yields c fixed, and c that gives a group's weights an effective size."""
  for coef in (0.1, 0.3, 1.0):
    yield f'coef{coef}', OURS | {'objective.coef': coef}
  for ess in (0.3, 0.5, 0.7):
    yield f'ess{ess}', OURS | {'objective.ess': ess}


def masks():
  """Yields the states that are trained: random, recorded, of one random order."""
  for name, draws in itertools.product(('random', 'order', 'rounds'), (2, 8)):
    yield f'{name}{draws}', OURS | {'objective.masks': name, 'objective.draws': draws}


def cheap():
  """Yields buffers that cost less: fewer scored states, fewer updates.

  Two states of eight estimate log p_ref - log p_old without bias.
  """
  changes = {'states2': {'logprob.states': 2}, 'once': {'train.inner': 1}}
  for names in ((), ('states2',), ('once',), ('states2', 'once')):
    fields = {k: v for name in names for k, v in changes[name].items()}
    yield '+'.join(names) or 'ours', OURS | fields


FAMILIES = {
  'switches': switches,
  'cheap': cheap,
  'baselines': baselines,
  'proximal': proximal,
  'masks': masks,
  'targets': targets,
}


def arms():
  """Returns {arm: fields}, each setting once, and {family: [its arms]}."""
  found, families = {}, {}
  for family, of in FAMILIES.items():
    families[family] = []
    for name, fields in of():
      same = [arm for arm, there in found.items() if there == fields]
      families[family].append(same[0] if same else name)
      found.setdefault(families[family][-1], fields)
  return found, families


DMPO, OF_FAMILY = arms()
ARMS = tuple(DMPO)


def cost_of(arm):
  """(sampling, scoring, one update) in forwards over a buffer's rows."""
  fields = DMPO[arm]
  # The baseline 'model' takes log p_old under the masks of every update, and trains it.
  draws = fields['objective.draws']
  own = draws * (fields['objective.baseline'] == 'model')
  scored = fields['logprob.states'] or 8  # 0 = all
  return 8, scored + fields['train.inner'] * own, 3 * draws + own


COSTS = {arm: cost_of(arm) for arm in ARMS}


def inner_of(arm):
  """Returns the updates on a buffer."""
  return DMPO[arm]['train.inner']


def get_config(task='sudoku'):
  c = compare.get_config(task)
  c.name = f'apart-{task}'
  return c


def fields_of(arm):
  """Returns {config field: value} of an arm, for config.update."""
  count = compare.buffers_of(COSTS[arm], inner_of(arm))
  return DMPO[arm] | {'name': 'apart', 'train.iterations': count}


def sweep(name):
  return {'objectives': [fields_of(arm) for arm in ARMS]}[name]
