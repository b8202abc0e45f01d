"""What an objective may ask for, set and weigh: the rules of the three seams.

Nothing here compiles more than a single operation.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax import logprob, masking, objectives, rng, types
from dmpo_jax.objectives import OBJECTIVES, shared
from dmpo_jax.sampler import RECORDS, SampleConfig
from dmpo_jax.types import Masks, Scored, Scores, TrainBatch, Views, Wants

pytestmark = pytest.mark.smoke
CONFIGS = {name: objective.Config for name, objective in OBJECTIVES.items()}
CONFIGS['common'] = shared.Common


# --- Wants


@pytest.mark.parametrize('field', ['sequence', 'elbo', 'views'])
def test_wants_refuses_an_unknown_policy(field):
  with pytest.raises(ValueError, match=rf"Wants\.{field} .*odl.*'old', 'ref'"):
    Wants(**{field: ('odl',)})


def test_wants_refuses_an_unknown_field():
  with pytest.raises(TypeError, match='eblo'):
    Wants(eblo=('old',))


@pytest.mark.parametrize('field', ['reads', 'records'])
def test_an_objective_with_an_unknown_read_or_record_is_refused(field):
  """The sentence names the objective, the field and the names that exist."""
  known = {'reads': logprob.READS, 'records': RECORDS}[field]
  objective = OBJECTIVES['wd1']._replace(wants=lambda hp: Wants(**{field: ('oops',)}))
  with pytest.raises(
    ValueError, match=rf'toy: Wants\.{field} .*oops.*{next(iter(known))}'
  ):
    objectives.checked('toy', objective)


def test_an_objective_that_reweighs_needs_the_function():
  objective = OBJECTIVES['wd1']._replace(wants=lambda hp: Wants(reweigh=True))
  with pytest.raises(ValueError, match=r'toy: Wants\.reweigh .*Objective\.reweigh'):
    objectives.checked('toy', objective)


def other_settings(name):
  """Returns Configs of an objective that differ from the default in one field."""
  default = CONFIGS[name]()
  out = [default]
  for field in dataclasses.fields(default):
    value = getattr(default, field.name)
    others = {'choose': shared.CHOICES, 'beta': (0.0, 0.1), 'loss': ('wdce', 'ddo')}
    for other in others.get(field.name, (not value,) if value in (True, False) else ()):
      out.append(dataclasses.replace(default, **{field.name: other}))
  return out


@pytest.mark.parametrize('name', OBJECTIVES)
def test_wants_has_known_names_under_every_setting(name):
  """`objectives.checked` sees the default alone; no flag may ask for more."""
  for hp in other_settings(name):
    OBJECTIVES[name].wants(hp)
    objectives.checked(name, OBJECTIVES[name]._replace(Config=lambda hp=hp: hp))


# --- fields that were not asked for


def test_reading_what_was_not_asked_for_names_wants():
  """The error names the field, so that the objective's author knows what to add."""
  batch = TrainBatch(*[None] * 6, norm=jnp.float32(1), total=jnp.float32(1))
  scored = Scored(jnp.zeros((1, 2)), jnp.ones((1, 2), int))
  for part, fields in (
    (batch.old, ('elbo', 'logp', 'reads')),
    (batch.ref, ('elbo', 'logp', 'reads')),
    (scored, ('logp_old', 'logp_ref', 'guess')),
  ):
    for field in fields:
      with pytest.raises(AttributeError, match=rf'\.{field} .*Wants'):
        getattr(part, field)


def test_a_computed_field_is_read_and_the_others_are_not():
  view = Views(elbo=jnp.zeros((2, 1)))
  assert view.has('elbo') and not view.has('logp') and not view.has('reads')
  assert view.elbo.shape == (2, 1)
  assert Scored(jnp.zeros((1, 2)), None).live_of() is None
  # A tree map leaves what is missing missing.
  assert not jax.tree.map(lambda x: x + 1, Scores(old=view)).old.has('logp')


# --- settings


@pytest.mark.parametrize('name', CONFIGS)
def test_default_settings_have_no_problems(name):
  assert CONFIGS[name]().problems() == []


def test_rules_refuse_what_is_just_outside_their_range():
  """Each rule of RULES returns '' for a good value, and a remedy for a bad one."""
  good_and_bad = {
    'advantage': ('loo', 'mode'),
    'clip': (0.0, 1.0),
    'clip_high': (0.0, -0.1),
    'beta': (0.0, -0.1),
    'kl': ('k2', 'k9'),
    'choose': ('top', 'all'),
    'draws': (1, 0),
    'mask_prompt': (0.0, 1.0),
    'elbo_draws': (2, 3),
  }
  assert good_and_bad.keys() == shared.RULES.keys()
  for field, (good, bad) in good_and_bad.items():
    assert shared.RULES[field](good) == '', field
    assert shared.RULES[field](bad).startswith('must be '), field
  assert shared.above(0)(0) and not shared.above(0)(1e-6)
  assert shared.pairs(0) and shared.pairs(-2) and not shared.pairs(4)
  nan = float('nan')
  assert shared.least(0)(nan) and shared.above(0)(nan) and shared.chance(nan)


RULED = [
  (name, field.name)
  for name, Config in CONFIGS.items()
  for field in dataclasses.fields(Config)
  if field.name in Config().rules()
]


@pytest.mark.parametrize('name, field', RULED)
def test_every_rule_refuses_a_bad_value_and_names_its_field(name, field):
  default = CONFIGS[name]()
  value = getattr(default, field)
  bads = [float('nan'), float('inf'), 1e39] if isinstance(value, float) else []
  if field in {**shared.RULES, **default.OWN}:
    bads.append(-1)
  if isinstance(value, str):
    bads = ['no such value']
  for bad in bads:
    problems = dataclasses.replace(default, **{field: bad}).problems()
    assert any(
      text.startswith(f'objective.{field} = {bad!r} must') for text in problems
    )


@pytest.mark.parametrize(
  'name, fields, named',
  [
    ('dmpo', dict(coef=0.0), 'objective.coef'),
    ('dmpo', dict(coef=1.5), 'objective.coef'),
    ('dmpo', dict(alpha=0.0, best=1.0), 'objective.alpha > 0'),
    ('dmpo', dict(draws=3), 'objective.antithetic'),
    ('dmpo', dict(spread=True, draws=2), 'objective.draws >= 2'),
    ('dmpo', dict(low=0.5, high=0.5), 'objective.high'),
    ('dmpo', dict(high=1.1), 'objective.high'),
    ('dmpo', dict(loss='ddo'), 'objective.antithetic=False'),
    ('dmpo', dict(masks='rounds', loss='ddo'), 'objective.loss = wdce'),
    ('dmpo', dict(masks='order', baseline='model'), 'objective.common_masks = True'),
    ('tracerl', dict(shrink=0), 'objective.shrink'),
    ('coupled_grpo', dict(high=1.0), 'objective.high'),
    ('coupled_grpo', dict(low=0.9), 'objective.low'),
    ('spg', dict(low=0.6, high=0.5), 'objective.low'),
    ('espo', dict(draws=3), 'objective.draws'),
    ('gdsd', dict(draws=3), 'objective.draws'),
    ('residual', dict(draws=1), 'objective.draws'),
    ('agrpo', dict(draws=0), 'objective.draws'),
    ('just_grpo', dict(draws=0, choose='top'), 'objective.draws'),
    ('fork_grpo', dict(draws=0), 'objective.draws'),
  ],
)
def test_rules_between_fields_name_what_to_set(name, fields, named):
  problems = CONFIGS[name](**fields).problems()
  assert problems and all(text.startswith('objective.') for text in problems)
  assert any(named in text for text in problems)


@pytest.mark.parametrize(
  'name, fields',
  [
    ('dmpo', dict(alpha=0.0, coef=5.0)),
    ('dmpo', dict(draws=3, antithetic=False)),
    ('dmpo', dict(draws=3, masks='order')),
    ('dmpo', dict(masks='rounds', baseline='model', common_masks=True)),
    ('dmpo', dict(loss='ddo', antithetic=False)),
    ('vrpo', dict(draws=1)),  # its masks do not come in pairs
    ('espo', dict(draws=3, masks='random')),
    ('agrpo', dict(draws=0, choose='each')),
    ('spg', dict(low=0.5, high=0.5)),
  ],
)
def test_rules_between_fields_let_good_settings_pass(name, fields):
  assert CONFIGS[name](**fields).problems() == []


# --- samplers


@pytest.mark.parametrize(
  'name, field, bad',
  [
    ('just_grpo', 'block', 4),
    ('fork_grpo', 'pick', 'entropy'),
    ('mapg', 'pick', 'confidence'),
    ('mapg', 'rank', 'token'),
    ('mapg', 'rank_law', 'sampling'),
  ],
)
def test_an_objective_names_the_sampler_field_that_it_cannot_use(name, field, bad):
  """Objective.sampler passes its own rule."""
  objective = OBJECTIVES[name]
  good = SampleConfig(
    **dict(length=8, block=4, steps=8, rank='max') | objective.sampler
  )
  assert objective.sampler_problems(good) == []
  (text,) = objective.sampler_problems(dataclasses.replace(good, **{field: bad}))
  assert f'sampler.{field} = {bad}' in text and 'set ' in text


# --- weights of masks


def test_a_weight_for_each_token_may_replace_one_for_each_copy():
  """Equal weights of (R, K, L) give the sums of (R, K, 1)."""
  draw = np.random.default_rng(0)
  logp = jnp.asarray(-draw.exponential(size=(3, 4, 5)), jnp.float32)
  masks = masking.draw_stratified(jax.random.key(0), jnp.arange(3), types.Canvas(5), 4)
  masks = masks._replace(counted=masks.masked)
  each = jnp.broadcast_to(masks.weight, logp.shape)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
  batch = TrainBatch(*[None] * 6, norm=jnp.float32(2), total=jnp.float32(3))
  close(logprob.seq_elbo(logp, each), logprob.seq_elbo(logp, masks.weight))
  close(
    shared.total(logp, masks._replace(weight=each), batch),
    shared.total(logp, masks, batch),
  )
  # Weights that differ: the sum is over positions, the mean over copies.
  each = jnp.asarray(draw.random((3, 4, 5)), jnp.float32)
  want = np.sum(np.asarray(each, float) * np.asarray(logp, float), axis=2).mean(1)
  close(logprob.seq_elbo(logp, each), want)
  counted = Masks(masks.masked, each, jnp.ones(logp.shape, bool))
  close(shared.total(logp, counted, batch), want.sum() / 2)


# --- random numbers


def test_no_substream_has_the_key_of_a_row():
  """The keys of all uses within a stream differ, so that draws are independent."""
  key = jax.random.key(0)
  data = lambda keys: [tuple(x) for x in np.asarray(jax.random.key_data(keys))]
  rows = data(rng.row_keys(key, jnp.arange(4097)))
  uses = {name: tuple(jax.random.key_data(rng.substream(key, name)).tolist())
          for name in rng.SUBSTREAMS}  # fmt: skip
  assert len(set(rows)) == len(rows) and len(set(uses.values())) == len(uses)
  shared_keys = [name for name, use in uses.items() if use in set(rows)]
  assert not shared_keys, f'{shared_keys} have the key of a row'


# --- rows and groups


def test_rows_are_prompt_major():
  x = jnp.arange(12).reshape(2, 3, 2)
  np.testing.assert_array_equal(types.to_rows(x)[4], x[1, 1])
  np.testing.assert_array_equal(types.to_groups(types.to_rows(x), 3), x)
