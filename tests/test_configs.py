"""Config files can run, defaults stand once, and an objective brings its own."""

import ast
import dataclasses
import importlib
import inspect
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, slices
from dmpo_jax import build, check, config, optim, sampler
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.objectives.shared import Common
from dmpo_jax.tasks import TASKS

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(
  p.stem
  for p in (ROOT / 'configs').glob('*.py')
  if p.stem not in ('__init__', 'base', 'slices')
)
STUDIES = 'apart', 'attention', 'baselines', 'collapse', 'compare', 'toolbox'
TRAINS = [stem for stem in FILES if stem not in STUDIES]
BLOCKS = (
  'sdar_math', 'sdar_gsm8k', 'fast_dllm_math', 'tiny_a2d_gsm8k', 'llada2_math',
  'llada2_flash_math', 'sdar_moe_math',
)  # fmt: skip
PUBLISHED = [s for s in TRAINS if s.startswith(('llada', 'dream')) or s in BLOCKS]
NAMED = ('quickstart', 'llada_math')  # where each objective is named in turn
CLASSES = sorted(
  {*config.SECTIONS.values()}, key=lambda cls: (cls.__module__, cls.__qualname__)
)


def file_of(stem):
  return importlib.import_module(f'configs.{stem}')


def values(section):
  """The fields of a section alone, as JSON has them."""
  return {k: v for k, v in json.loads(section.to_json()).items() if k != 'sampler'}


# --- the files


@pytest.mark.smoke
@pytest.mark.parametrize('stem', FILES)
def test_config_file_can_run(stem):
  """Each file and each point of its sweeps pass the check, with base's types."""
  module = file_of(stem)
  points = [{}]
  if hasattr(module, 'sweep'):
    assert module.SWEEPS, 'a sweep needs its name in SWEEPS'
    points += [point for name in module.SWEEPS for point in module.sweep(name)]
  known = check.flatten(base.get_config())
  for point in points:
    c = module.get_config().lock()
    config.update(c, point)
    for field, value in check.flatten(c).items():
      own = field.startswith(('objective.', 'reward.weights.'))
      assert own or type(value) is type(known[field]), field
    check.config(c, c.mesh.fsdp * c.mesh.tensor)


@pytest.mark.parametrize('stem', PUBLISHED)
def test_recipe_paper_is_the_release(stem):
  """Our settings differ from the release's in strength, best and the cache alone."""
  ours, paper = (check.flatten(file_of(stem).get_config(x)) for x in ('ours', 'paper'))
  different = {name for name in ours if ours[name] != paper[name]}
  assert {'objective.strength'} <= different
  assert different <= {
    'objective.strength', 'objective.best', 'sampler.cache', 'eval.sampler.cache',
  }  # fmt: skip
  assert paper['objective.strength'] == 1 and paper['objective.best'] == 0


@pytest.mark.parametrize('stem', BLOCKS)
def test_configs_of_block_models(stem):
  """The weights are exact, only the answer is paid, lengths are whole blocks, and each
  objective after the colon fits or is refused for its own reason."""
  c = file_of(stem).get_config()
  hp, block = check.settings(sampler.SampleConfig, c.sampler), build.build(c).model
  assert block.block_causal == (4 if 'sdar' in stem else 32)
  assert hp.order_from() == 'state' and hp.temperature == 1 and hp.cache == 'block'
  assert (c.logprob.estimator, c.logprob.states) == ('trajectory', 0)
  terms = TASKS[c.data.task].terms
  assert {t for t in terms if c.reward.weights[t]} == {'correctness'}
  for s in (c.sampler, c.eval.sampler):
    assert s.eos_stop and s.length % block.block_causal == 0
  assert not c.eval.sampler.temperature
  for name, objective in OBJECTIVES.items():
    other = file_of(stem).get_config(name)
    other.train.microbatches = 1
    if objective.whole_text:
      with pytest.raises(ValueError, match=objective.whole_text):
        build.build(other)
    else:
      assert build.build(other).setup.objective is objective


@pytest.mark.parametrize(
  'stem, argument, hint',
  [
    ('llada_math', 'papr', "did you mean 'paper'"),
    ('llada_math', 'espoo', "did you mean 'espo'"),
    ('llada_math', 'h1000', "did you mean 'h100"),
    ('llada_math', 'espo,wd1', 'one recipe and one slice'),
    ('llada_math', 'h100,v5e16', 'one recipe and one slice'),
    ('sdar_math', 'l40s', 'slice l40s .* model.preset = sdar_4b: h100.* have'),
    ('compare', 'chess', 'sudoku or countdown'),
    ('toolbox', 'chess', 'sudoku'),
    ('apart', 'chess', 'sudoku or countdown'),
    ('attention', 'chess', 'whole or blocks'),
    ('quickstart', 'esp', "did you mean 'espo'"),
    ('baselines', 'espo', 'nothing after the colon'),
  ],
)
def test_wrong_argument_after_the_colon_is_refused(stem, argument, hint):
  with pytest.raises(ValueError, match=hint):
    config.load(f'{ROOT}/configs/{stem}.py:{argument}')


def test_missing_config_file_is_refused_with_the_nearest_name():
  with pytest.raises(ValueError, match='quikstart.*configs/quickstart.py'):
    config.load(f'{ROOT}/configs/quikstart.py')
  with pytest.raises(ValueError, match='configs/quickstart.py'):
    config.load(f'{ROOT}/configs/quickstart')
  with pytest.raises(ValueError, match='no such file'):
    config.load('nowhere/at_all.py:espo')


PLACED = [
  (stem, name)
  for stem in PUBLISHED
  for name, where in slices.SLICES.items()
  if file_of(stem).get_config().model.preset in where.models
  and (stem, name) != ('llada_s1k', 'v5p64')  # d1's 16 rows on 32 devices
]


@pytest.mark.parametrize('stem, name', PLACED)
def test_slice_changes_how_a_run_is_computed(stem, name):
  """It can run there, and its rows are whole microbatches of the planned size."""
  where, plain = slices.SLICES[name], file_of(stem).get_config()
  c = file_of(stem).get_config(name)
  check.config(c, where.devices, 'tpu' if name.startswith('v') else 'gpu')
  before, after = check.flatten(plain), check.flatten(c)
  free = {'train.microbatches', 'model.remat', 'model.quantize', 'eval.batch'}
  free |= {
    'sampler.slots',
    'mesh.fsdp',
    'mesh.expert',
    'mesh.gather',
    'sft.microbatches',
  }
  assert {field for field in before if before[field] != after[field]} <= free
  rows = c.train.prompts * c.train.group
  piece = rows // where.devices // c.train.microbatches
  assert piece <= where.models[c.model.preset][0]
  assert piece * where.devices * c.train.microbatches == rows
  assert c.sampler.cache == ('block' if stem in BLOCKS else 'dual')


@pytest.mark.parametrize('stem', sorted({*PUBLISHED} - {*BLOCKS}))
def test_only_the_papers_recipe_samples_without_a_cache(stem):
  get = file_of(stem).get_config
  for recipe, cache in (
    ('ours', 'dual'), ('espo', 'dual'), ('paper', 'none'), ('paper,h100', 'dual'),
  ):  # fmt: skip
    c = get(recipe)
    assert (c.sampler.cache, c.eval.sampler.cache) == (cache, cache), recipe


@pytest.mark.parametrize('name', OBJECTIVES)
def test_slice_and_objective_combine(name):
  """Both orders are the same; the objective's own settings stay."""
  get = file_of('llada_math').get_config
  c = get(f'{name},v5e16')
  assert check.flatten(c) == check.flatten(get(f'v5e16,{name}'))
  check.config(c, 16, 'tpu')
  alone, both = check.flatten(get(name)), check.flatten(c)
  assert all(
    both[field] == alone[field] for field in both if field.startswith('objective.')
  )
  assert both['model.quantize'] == 'int8'


HEAD = 'from configs import base\n\n\ndef get_config():\n  c = base.get_config()\n  '
# The line of a config file -> what its refusal names.
WRONG_LINES = {
  'c.train.itertions = 3': "line 6: itertions.*did you mean 'iterations'",
  'c.train.update(itertions=3)': "line 6: itertions.*did you mean 'iterations'",
  'c.seed = c.train.itertions': "line 6: itertions.*did you mean 'iterations'",
  'c.extra = 3': 'line 6: extra is not a field',
  'c.objective.alhpa = 0.1': "line 6: alhpa.*did you mean 'alpha'",
  'c.reward.weights.maths = 0.0': 'line 6: maths is not a field',
  'c.train = {"itertions": 3}': 'train.iterations.*missing; begin with configs.base',
  'c.objective.name = "espo"': "missing.*choose_objective.*'espo'",
  'c.objective.name = "esp"': "did you mean 'espo'",
  'c.train.iterations = 3.5': 'line 6: iterations = 3.5 must be a whole number',
  'c.train.iterations = None': 'train.iterations = None must be a whole number',
  'c.train.iterations = True': 'train.iterations = True must be a whole number',
  'c.model.preset = 3': 'line 6: preset = 3 must be a text',
  'c.reference.of = "base"': 'line 6: of = base must be a tuple',
  'import nothing_of_this_name': 'line 6: ModuleNotFoundError.*nothing_of_this_name',
  'c.seed = 1 / 0': 'line 6: ZeroDivisionError',
  'c = dict(c)': 'must return the ConfigDict.*a dict',
  'c = None': 'must return the ConfigDict.*a NoneType',
  'c = type(c)({"seed": 3})': 'config.name.*missing; begin with configs.base',
}


@pytest.mark.parametrize('line, named', WRONG_LINES.items())
def test_wrong_line_in_a_config_file_is_refused(line, named, tmp_path):
  """Misspelt fields: IDSIA/sacred#90, volcengine/OpenViking#856, gflags#61."""
  file = tmp_path / 'mine.py'
  file.write_text(f'{HEAD}{line}\n  return c\n')
  with pytest.raises(ValueError, match=f'(?s)--config=.*mine.py: .*{named}') as error:
    config.load(str(file))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'name, text, named',
  [
    ('a.py', 'def get_config(:', 'SyntaxError.*line 1'),
    ('a.py', '\0', 'null bytes'),
    ('a.py', 'x = 1', 'no function get_config'),
    ('a.py', 'get_config = 3', 'no function get_config'),
    ('a.py', 'def get_config(x):\n  return x', "missing 1.*'x'"),
    ('config.json', '{}', 'no Python file'),
    ('folder/a.py', '', 'a folder'),
  ],
)
def test_what_is_no_config_file_is_refused(name, text, named, tmp_path):
  file = tmp_path / name
  file.parent.mkdir(exist_ok=True)
  file.write_text(text)
  path = file.parent if 'folder' in name else file
  with pytest.raises(ValueError, match=f'--config=.*{named}'):
    config.load(str(path))


# --- defaults stand once


@pytest.mark.parametrize('name', config.SECTIONS)
def test_base_is_made_of_the_defaults(name):
  """A section has the fields of its dataclass, and no others can be added."""
  c, cls = base.get_config(), config.SECTIONS[name]
  section = c
  for key in name.split('.'):
    section = section[key]
  assert section.is_locked
  assert values(section).keys() == {field.name for field in dataclasses.fields(cls)}
  changes = {}
  if name == 'sampler':  # rollouts are drawn, the evaluation is greedy
    changes['temperature'] = 1.0
  assert values(section) == values(config.section(cls, **changes))


def test_base_has_no_field_of_its_own_but_three():
  heads = {name.split('.')[0] for name in config.SECTIONS}
  assert set(base.get_config()) - heads == {'name', 'seed', 'cache', 'objective'}


@pytest.mark.parametrize('cls', CLASSES, ids=lambda cls: cls.__qualname__)
def test_every_field_has_a_comment(cls):
  """On its line or on those before it, as 'meaning; unit or values; what 0 means'."""
  bare = []
  for kind in cls.__mro__[:-1]:
    lines, before = inspect.getsource(kind).splitlines(), ''
    for line in lines:
      match = re.match(r'  (\w+): [\w\[\], .|]+( = [^#]+?)?( +#.*)?$', line)
      if match and match[1] in {field.name for field in dataclasses.fields(cls)}:
        if not match[3] and not before.strip().startswith('#'):
          bare.append(match[1])
      before = line
  assert not bare


class Reads(ast.NodeVisitor):
  """Names of attributes and strings that a module reads."""

  def __init__(self):
    self.names = set()

  def visit_Attribute(self, node):
    self.names.add(node.attr)
    self.generic_visit(node)

  def visit_Constant(self, node):
    self.names.add(node.value)


@pytest.mark.parametrize(
  'cls',
  [*CLASSES, Common, *(objective.Config for objective in OBJECTIVES.values())],
  ids=lambda cls: f'{cls.__module__}.{cls.__qualname__}',
)
def test_every_field_is_read(cls):
  """By a module that is not of the config: a dead field would do nothing."""
  reads = Reads()
  for path in (ROOT / 'dmpo_jax').rglob('*.py'):
    if path.name not in ('config.py', 'check.py') or path.parent.name != 'dmpo_jax':
      reads.visit(ast.parse(path.read_text()))
  passed_whole = cls is optim.Config  # as **c.optim
  for field in dataclasses.fields(cls):
    built = f'_{field.name.rpartition("_")[2]}'  # as f'{split}_size'
    assert passed_whole or {field.name, built} & reads.names, field.name


# --- what a field changes


def text_of(fn, *args):
  """The traced program, without the addresses of functions."""
  return re.sub(r'0x[0-9a-f]+', '', str(jax.make_jaxpr(fn)(*args)))


@pytest.mark.parametrize('name', [f.name for f in dataclasses.fields(optim.Config)])
def test_every_optimizer_field_changes_the_update(name):
  params = {'kernel': jnp.ones((2, 2))}

  def step(**changes):
    maker = optim.make_optimizer(optim.Config(**{'decay_steps': 50, **changes}))

    def run(grads):
      return maker.update(grads, maker.init(params), params)

    return text_of(run, params), jax.tree.leaves(run(params))

  value = vars(optim.Config(decay_steps=50))[name]
  changed = value * 2 if isinstance(value, int) else value * 0.5 or 0.3
  (text, numbers), (other_text, other) = step(), step(**{name: changed})
  same = all(np.array_equal(x, y) for x, y in zip(numbers, other, strict=True))
  assert text != other_text or not same


# --- naming an objective


def named(stem, name, *flags):
  """The config of a file with --config.objective.name=NAME and more flags."""
  c = file_of(stem).get_config()
  config.override(c, [f'--config.objective.name={name}', *flags])
  return c


@pytest.mark.parametrize('stem', NAMED)
@pytest.mark.parametrize('name', OBJECTIVES)
def test_an_objective_named_alone_has_its_own_defaults(stem, name):
  """Its dataclass's, its paper's sampler, and the config can run."""
  c = named(stem, name)
  hp = OBJECTIVES[name].Config()
  assert dict(c.objective) == {'name': name, **vars(hp), **vars(Common())}
  for field, value in OBJECTIVES[name].sampler.items():
    assert c.sampler[field] == value
  check.config(c, 1, 'cpu')


@pytest.mark.parametrize('stem', TRAINS)
def test_colon_flag_file_and_sweep_choose_alike(stem):
  for name in ('dmpo', 'espo', 'just_grpo', 'diffu_grpo'):
    flag = named(stem, name)
    point, file = file_of(stem).get_config(), file_of(stem).get_config()
    config.override(point, [], {'objective.name': name})
    config.choose_objective(file, name)
    colon = file_of(stem).get_config(name)
    for other in (point, file, colon):
      assert other.to_json() == flag.to_json()


@pytest.mark.parametrize('stem', NAMED)
def test_explicit_fields_stay_in_any_order(stem):
  flags = ['--config.objective.beta=0.5', '--config.sampler.pick=random']
  name = '--config.objective.name=agrpo'
  for order in ([*flags, name], [name, *flags]):
    c = file_of(stem).get_config()
    given = config.override(c, order)
    assert (c.objective.name, c.objective.beta) == ('agrpo', 0.5)
    assert c.sampler.pick == 'random' and c.objective.draws == 24
    assert given == {
      'objective.beta': 0.5,
      'sampler.pick': 'random',
      'objective.name': 'agrpo',
    }
  c = named(stem, 'fork_grpo', '--config.sampler.threshold=0.7')
  assert (c.sampler.pick, c.sampler.threshold) == ('threshold', 0.7)
  c = file_of(stem).get_config()
  config.override(c, [], {'objective.clip': 0.3, 'objective.name': 'espo'})
  assert (c.objective.name, c.objective.clip) == ('espo', 0.3)


def test_field_of_another_objective_is_refused_with_the_own_ones():
  with pytest.raises(ValueError, match='alpha.*espo.*advantage.*beta.*kl'):
    named('quickstart', 'espo', '--config.objective.alpha=0.5')
  with pytest.raises(ValueError, match='objective.clip.*dmpo.*strength'):
    config.override(base.get_config(), ['--config.objective.clip=0.5'])
  with pytest.raises(ValueError, match='psi.*wd1.*alpha'):
    config.override(
      base.get_config(), [], {'objective.name': 'wd1', 'objective.psi': 1}
    )


def test_unknown_objective_is_refused_with_the_nearest():
  with pytest.raises(ValueError, match="did you mean 'espo'"):
    named('quickstart', 'esppo')


def test_objective_without_its_fields_is_refused():
  """A name alone, written into the section, is not enough; the remedy is named."""
  c = base.get_config()
  c.objective.name = 'espo'
  with pytest.raises(ValueError, match="choose_objective.*'espo'"):
    check.config(c, 1)


def test_diffu_grpo_of_a_published_model_is_d1():
  """Its learning rate, group, temperature and updates per buffer; small models not."""
  for stem, inner in (('llada_math', 12), ('llada_countdown', 8)):
    c = named(stem, 'diffu_grpo')
    assert (c.optim.lr, c.train.group, c.train.inner) == (3e-6, 6, inner)
    assert c.train.prompts * c.train.group == 96 and c.sampler.temperature == 0.9
    assert (c.objective.clip, c.objective.beta, c.objective.kl) == (0.5, 0.04, 'k3')
    check.config(c, 16 if c.mesh.fsdp == 16 else 1, 'cpu')
  small = named('quickstart', 'diffu_grpo')
  assert small.optim.lr == file_of('quickstart').get_config().optim.lr


def test_dropout_is_off_where_log_p_old_is_compared():
  assert named('llada_math', 'espo').lora.dropout == 0
  assert named('llada_math', 'dmpo').lora.dropout == 0.05
  c = named('llada_math', 'espo', '--config.lora.dropout=0.1')
  with pytest.raises(ValueError, match='lora.dropout = 0.1.*espo.*set 0'):
    check.config(c, 1)


# --- unknown fields and values out of range


@pytest.mark.parametrize(
  'field, hint',
  [
    ('optim.lrr', "'optim.lr'"),
    ('lr', "'control.lr' or 'optim.lr' or 'pairs.lr'"),
    ('sampler.pik', "'sampler.pick'"),
    ('objective.alhpa', "'objective.alpha'"),
    ('eval.sampler.temprature', "'eval.sampler.temperature'"),
  ],
)
def test_unknown_field_is_refused_with_the_nearest(field, hint):
  pattern = re.escape(f'config.{field} is not a field') + f'.*did you mean {hint}'
  with pytest.raises(ValueError, match=pattern):
    config.override(base.get_config(), [f'--config.{field}=1'])
  with pytest.raises(ValueError, match=pattern):
    config.update(base.get_config(), {field: 1})


def test_field_set_by_sweep_and_flag_is_refused():
  c = base.get_config()
  with pytest.raises(ValueError, match='optim.lr.*both by --sweep and by a flag'):
    config.override(c, ['--config.optim.lr=1'], {'optim.lr': 1.0, 'seed': 2})


@pytest.mark.parametrize('name', config.SECTIONS)
def test_numbers_out_of_range_are_refused(name):
  """-1, nan and inf are values of no number; the complaint names the field."""
  c = base.get_config()
  assert config.part(c, name).problems() == []
  leaf = name.rpartition('.')[2]
  for field in dataclasses.fields(config.SECTIONS[name]):
    value = getattr(config.part(c, name), field.name)
    if isinstance(value, int | float) and not isinstance(value, bool):
      huge = float('nan'), float('inf'), 1e39  # float32 has no 1e39
      wrongs = (-1.0, *huge) if isinstance(value, float) else (-1,)
      if field.name == 'logp_token':  # a log-prob is below 0
        wrongs = (1.0, *huge)
      if field.name == 'attention_block':  # -1: the checkpoint's own
        wrongs = (-2,)
      if (name, field.name) == ('draft', 'temperature'):  # -1: the sampler's
        wrongs = (-2.0, *huge)
      if (name, field.name) == ('routing', 'sft_load'):  # -1: the checkpoint's
        wrongs = (-2.0, *huge)
      for wrong in wrongs:
        changed = dataclasses.replace(config.part(c, name), **{field.name: wrong})
        text = '\n'.join(changed.problems())
        assert f'{leaf}.{field.name} = {wrong} must be' in text


def test_mesh_data_takes_what_the_others_leave():
  """It has one right value on given devices, and 0 stands for it."""
  changes = {'train.prompts': 2, 'train.group': 4, 'train.microbatches': 1}
  c = base.get_config()
  config.update(c, changes | {'mesh.data': 4, 'mesh.fsdp': 2, 'eval.batch': 8})
  assert dict(build.build(c).mesh.shape) == dict(data=4, fsdp=2, tensor=1)
  c.mesh.data = 2
  with pytest.raises(ValueError, match='mesh.data.* = 2, 2, 1, 1 .*8 devices'):
    check.config(c, 8)


def test_sampler_defaults_of_scripts_stay():
  """Outside scripts build a SampleConfig themselves: greedy, LLaDA's ranking."""
  hp = sampler.SampleConfig(length=16, block=16, steps=16)
  assert (hp.temperature, hp.rank) == (0.0, 'token')


# --- fields without effect

CLEAR = {'sampler.pick': 'confidence', 'logprob.estimator': 'elbo'}
# What makes a field useless -> that field, and the field that its refusal names. A
# config of quickstart.py is meant, but for CLEAR.
USELESS = [
  *(
    ({'sampler.pick': pick}, 'sampler.steps', 'sampler.pick')
    for pick in ('threshold', 'factor', 'entropy', 'random_order', 'wino')
  ),
  *(
    ({}, f'sampler.{field}', 'sampler.pick')
    for field in ('threshold', 'factor', 'entropy_bound', 'verify')
  ),
  *(
    ({'sampler.pick': pick}, 'sampler.rank', 'sampler.pick')
    for pick in ('entropy', 'margin', 'lowest_entropy', 'random', 'random_order')
  ),
  *(
    ({'sampler.pick': pick}, 'sampler.rank_law', 'sampler.pick')
    for pick in ('random', 'random_order', 'origin')
  ),
  *(
    ({'logprob.estimator': 'trajectory'}, f'logprob.{field}', 'logprob.estimator')
    for field in ('draws', 'elbo', 'low', 'high', 'antithetic')
  ),
  *(
    ({'logprob.elbo': 'stratified'}, f'logprob.{field}', 'logprob.elbo')
    for field in ('low', 'high', 'antithetic')
  ),
  ({}, 'logprob.states', 'logprob.estimator'),
  *(
    (
      {'objective.alpha': 0.0, 'objective.best': 0.0},
      f'logprob.{field}',
      'objective.alpha > 0',
    )
    for field in ('estimator', 'draws', 'tail', 'low')
  ),
  ({'objective.ess': 0.5}, 'objective.coef', 'objective.ess'),
  *(
    ({'objective.loss': 'ddo'}, f'objective.{field}', 'objective.loss')
    for field in ('baseline', 'strength')
  ),
  ({}, 'objective.ddo_alpha', 'objective.loss'),
  ({}, 'objective.ddo_beta', 'objective.loss'),
  ({'objective.baseline': 'none'}, 'objective.strength', 'a baseline'),
  ({}, 'objective.common_masks', 'objective.baseline'),
  ({}, 'objective.elbo_draws', 'objective.elbo_coef'),
  ({'objective.name': 'espo', 'objective.beta': 0.0}, 'objective.kl', 'objective.beta'),
  ({}, 'reference.every', 'reference.of'),
  ({}, 'reference.mix', 'reference.of'),
  ({}, 'reference.clip', 'reference.of'),
  ({}, 'objective.skip_scale', 'objective.skip_equal'),
  ({}, 'lora.alpha', 'lora.rank'),
  ({}, 'lora.targets', 'lora.rank'),
  *(
    ({'model.attention_block': 4}, field, 'sees the whole text')
    for field in (
      'objective.low',
      'objective.antithetic',
      'logprob.high',
      'logprob.antithetic',
    )
  ),
  ({'objective.masks': 'rounds'}, 'objective.low', 'objective.masks'),
  ({}, 'data.overlong', 'data.prompt_length'),
  ({'data.attend_padding': True}, 'data.bucket', 'data.attend_padding'),
  ({'data.template': __file__, 'sft.steps': 0}, 'data.style', 'data.template'),
  ({'eval.template': __file__}, 'eval.style', 'eval.template'),
  ({'model.checkpoint': 'x'}, 'model.preset', 'model.checkpoint'),
  ({}, 'data.largest', 'data.task = countdown'),
  ({}, 'data.numbers', 'data.task = countdown'),
  ({'data.path': 'x'}, 'data.min_blanks', 'data.task = sudoku .generated'),
  ({'data.task': 'countdown'}, 'data.max_blanks', 'data.task = sudoku'),
  ({'data.task': 'math'}, 'data.seed', 'data.task'),
  ({}, 'reward.weights.xmlcount', 'data.task = gsm8k'),
  ({'data.task': 'math'}, 'reward.weights.int', 'data.task = gsm8k'),
  ({'sampler.temperature': 0.0}, 'sampler.top_p', 'sampler.temperature > 0'),
  ({}, 'eval.sampler.top_k', 'eval.sampler.temperature > 0'),
  ({}, 'eval.sampler.threshold', 'eval.sampler.pick'),
  ({'sft.steps': 0}, 'sft.lr', 'sft.steps'),
  ({'train.iterations': 0}, 'optim.lr', 'train.iterations'),
  ({'train.iterations': 0}, 'objective.strength', 'train.iterations'),
  ({'health.action': 'none'}, 'health.empty', 'health.action'),
]


def test_a_presets_attention_block_counts_as_the_models():
  c = file_of('sdar_math').get_config()
  assert (c.model.attention_block, c.model.checkpoint) == (-1, '')
  assert check.with_block(c).model.attention_block == 4
  with pytest.raises(ValueError, match='objective.antithetic = .*attends in blocks'):
    check.effects(c, {'objective.antithetic'})
  c.model.preset = 'llada_8b'
  assert check.with_block(c).model.attention_block == 0


@pytest.mark.parametrize('fields, useless, needs', USELESS, ids=str)
def test_a_field_without_effect_is_refused_on_the_command_line(fields, useless, needs):
  c = file_of('quickstart').get_config()
  ddo = {'objective.antithetic': False} if 'objective.loss' in fields else {}
  config.update(c, {**CLEAR, **ddo, **fields})
  with pytest.raises(ValueError, match=f'{useless} = .*needs .*{needs}'):
    check.effects(c, {useless})
  assert not check.effects(c, {'seed'}).count('\n')


def test_a_rule_of_fields_without_effect_refuses_nothing():
  """Masks of attention blocks come in no pairs, so a number of copies may be odd."""
  c = file_of('quickstart_block').get_config()
  fields = {'logprob.estimator': 'elbo', 'logprob.draws': 3, 'objective.draws': 4}
  config.update(c, {**fields, 'objective.loss': 'ddo', 'objective.spread': False})
  check.config(c, 1)
  config.update(c, {'objective.loss': 'wdce', 'objective.draws': 3})
  check.config(c, 1)
  assert not check.effects(c, {'objective.draws', 'objective.loss'})
  c.model.attention_block = 0
  with pytest.raises(ValueError, match='objective.draws = 3 must be even'):
    check.config(c, 1)


@pytest.mark.parametrize('stem', [*TRAINS, 'base'])
def test_a_config_of_ours_sets_no_field_without_effect(stem):
  assert check.effects(file_of(stem).get_config(), ()) == ''


def test_heads_alone_do_not_make_gqa():
  c = base.get_config()
  c.model.heads = 4
  assert build.build(c).model.kv_heads == 4
  c.model.kv_heads = 2
  assert build.build(c).model.kv_heads == 2
