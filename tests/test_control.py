"""The controller: its score, its laws of u, rows with numbers of their own, its runs.

Closed forms and enumerations are of a model that is a table; see TABLE.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from marks import mostly_slow
from scipy.stats import norm
from tiny_run import (
  INNER,
  fail_at,
  interrupt,
  letters,
  rows,
  run,
  same,
  same_run,
  stop_at,
  vary,
  watched,
)

from dmpo_jax import (
  build,
  check,
  config,
  control,
  evaluate,
  hf,
  logprob,
  mesh,
  model,
  resume,
  rng,
  sampler,
  score,
  step,
)
from dmpo_jax.objectives import OBJECTIVES, dmpo, espo
from dmpo_jax.sampler import SampleConfig
from dmpo_jax.tools import cards
from dmpo_jax.types import (
  Control,
  Rollouts,
  Sampled,
  Scored,
  Scores,
  TrainBatch,
  forwards_of,
)

pytest_plugins = ('tiny_run',)
pytestmark = pytest.mark.usefixtures('plain_saves')

LAW = SampleConfig(3, 3, 3, 1.0, 'threshold', rank='max', threshold=0.5)


def controller(law=LAW, **fields):
  return control.Controller(control.Config(on=True, **fields), law)


def logit(x):
  return np.log(x) - np.log1p(-x)


# --- a model that is a table: q(token | position, state), by enumeration


class TABLE:
  def __init__(self, length, vocab, seed, scale=1.2):
    self.length, self.vocab = length, vocab
    states = itertools.product(range(vocab + 1), repeat=length)
    random = np.random.default_rng(seed)
    self.logits = {s: scale * random.normal(size=(length, vocab)) for s in states}

  def law(self, state):
    e = np.exp(self.logits[state])
    return e / e.sum(-1, keepdims=True)

  def masked(self, state):
    return [i for i, t in enumerate(state) if t == self.vocab]

  def cuts(self):
    """The thresholds at which a trajectory may change."""
    found = {self.law(s)[i].max() for s in self.logits for i in self.masked(s)}
    return np.array(sorted(found))

  def walk(self, threshold, other=None):
    """(x, steps, p, p of another table) of each trajectory of pick threshold."""
    out = []

    def go(state, steps, p, q):
      places, law = self.masked(state), self.law(state)
      if not places:
        return out.append((state, steps, p, q))
      best = law.max(-1)
      take = [i for i in places if best[i] >= threshold]
      take = take or [max(places, key=lambda i: (best[i], -i))]
      theirs = other.law(state) if other else law
      for tokens in itertools.product(range(self.vocab), repeat=len(take)):
        at = (take, list(tokens))
        new = np.array(state)
        new[take] = tokens
        go(tuple(new.tolist()), steps + 1, p * law[at].prod(), q * theirs[at].prod())

    go((self.vocab,) * self.length, 0, 1.0, 1.0)
    return out


def sampled_of(rows_, steps_R, length):
  """A Sampled of rows that took so many forwards."""
  count = len(steps_R)
  order = np.repeat(np.asarray(steps_R, np.int32)[:, None] - 1, length, 1)
  tokens, zero = np.zeros((count, length), np.int32), np.zeros((count, length))
  zero = zero.astype(np.float32)
  valid = np.ones((count, length), bool)
  rollouts = Rollouts(tokens, valid, order, zero, None, zero, None, rows_)
  return Sampled(rollouts, valid, np.arange(count, dtype=np.int32))


def batch_of(rows_, groups):
  blank = np.zeros((len(rows_.u), 1), np.int32)
  yes = blank == 0
  weight, total = np.zeros(len(rows_.u), np.float32), np.float32(len(rows_.u))
  return TrainBatch(
    blank, yes, yes, blank[:, 0], weight, {}, np.float32(groups), total, control=rows_
  )


def slope_of(law, params, rows_, groups):
  """The gradient of the controller's loss."""
  loss = lambda p: step.steer(law, {'control': p}, batch_of(rows_, groups))[0]
  return jax.grad(loss)(params)


# --- the score


def test_gradient_is_that_of_the_closed_form(tiny):
  """J(mu, sigma) is a sum over the thresholds between which nothing changes; its
  derivatives are the means of the estimates of groups of four."""
  groups, group, mean, sigma = 100_000, 4, 0.3, 1.2
  table, random = TABLE(3, 3, 4), np.random.default_rng(8)
  good = {x for x in itertools.product(range(3), repeat=3) if random.random() < 0.45}
  law = controller(sigma=sigma, cost=0.4, learn_sigma=True, features='none', pull=0.0)
  cuts = table.cuts()
  ends = np.r_[0, cuts, 1]
  trajectories = [table.walk(x) for x in (ends[1:] + ends[:-1]) / 2]
  u = mean + sigma * random.normal(size=(groups, group))
  interval = np.searchsorted(logit(cuts), u)
  reward, steps, means = np.zeros(u.shape), np.zeros(u.shape, int), []
  for k, found in enumerate(trajectories):
    p, at = np.array([x[2] for x in found]), interval == k
    assert abs(p.sum() - 1) < 1e-9  # each threshold's law is normalised
    drawn = random.choice(len(found), at.sum(), p=p / p.sum())
    right, n = np.array([x[0] in good for x in found]), np.array([x[1] for x in found])
    reward[at], steps[at] = right[drawn], n[drawn]
    means.append(p @ (right * (1 - 0.4 * n / 3)))
  edges = np.r_[-np.inf, logit(cuts), np.inf]
  value = lambda m, s: np.diff(norm.cdf((edges - m) / s)) @ means
  want = [
    (value(mean + 1e-5, sigma) - value(mean - 1e-5, sigma)) / 2e-5,
    sigma * (value(mean, sigma + 1e-5) - value(mean, sigma - 1e-5)) / 2e-5,
  ]
  params = {'offset': jnp.float32(mean), 'log_sigma': jnp.log(jnp.float32(sigma))}
  flat = jnp.asarray(u.ravel(), jnp.float32)
  rows_ = Control(law.bound(flat), flat, law.logp(flat, mean, sigma), None)
  setup = step.Setup(tiny, OBJECTIVES['espo'], espo.Config(), control=law)
  sampled = sampled_of(rows_, steps.ravel(), 3)
  scored = Scored(jnp.asarray(reward, jnp.float32), jnp.asarray(steps))
  plain, paid = score.steered(scored, sampled, setup)
  np.testing.assert_array_equal(plain.reward, reward)  # tokens are paid as before
  made, _ = score.control_rows(paid, sampled, setup, None)
  got = slope_of(law, params, made, groups)
  found = [-float(got['offset']), -float(got['log_sigma'])]
  z = (u - mean) / sigma
  each = np.asarray(made.weight).reshape(u.shape) * [z / sigma, z**2 - 1]
  error = each.sum(2).std(1) / groups**0.5
  assert np.all(np.abs(np.subtract(found, want)) < 4 * error), (found, want, error)
  assert 4 * error[0] < 0.1 * abs(want[0])  # by the group's mean it would be 25 % less
  half, _ = score.control_rows(paid, sampled, setup, jnp.full(groups, 0.5))
  np.testing.assert_allclose(half.weight, made.weight / 2)
  on = dataclasses.replace(law, hp=dataclasses.replace(law.hp, tokens=True))
  plain, _ = score.steered(scored, sampled, dataclasses.replace(setup, control=on))
  np.testing.assert_allclose(plain.reward, reward * (1 - 0.4 * steps / 3), rtol=1e-6)


def test_law_of_u_and_its_divergence():
  """Log-density and KL are the normal's; a ratio is clipped where it is too large."""
  law = controller(sigma=0.9, learn_sigma=True)
  law = dataclasses.replace(law, law=dataclasses.replace(LAW, threshold=0.45))
  x = np.linspace(-12, 12, 40001).astype(np.float32)
  p = np.exp(law.logp(x, 0.3, 0.6), dtype=np.float64)
  np.testing.assert_allclose(p, norm.pdf(x, 0.3, 0.6), atol=1e-6)
  q = norm.pdf(x, logit(0.45), 0.9)
  with np.errstate(divide='ignore', invalid='ignore'):
    terms = np.where(p > 0, p * np.log(p / q), 0)
  want = np.trapezoid(terms, x)
  np.testing.assert_allclose(
    law.kl(jnp.full(1, 0.3), jnp.float32(0.6)), want, rtol=1e-4
  )
  u = jnp.array([1.0, 1.0])
  params = {'offset': jnp.float32(0.5), 'log_sigma': jnp.float32(np.log(0.9))}
  far = Control(u, u, law.logp(u, 0.5, 0.9) - 1, None, jnp.array([1.0, -1.0]))
  one = dataclasses.replace(law, hp=dataclasses.replace(law.hp, pull=0.0))
  one = dataclasses.replace(one, hp=dataclasses.replace(one.hp, features='none'))
  got = [
    slope_of(one, params, jax.tree.map(lambda x, i=i: x[i : i + 1], far), 1)['offset']
    for i in (0, 1)
  ]
  assert got[0] == 0 and got[1] > 0  # a good u is stopped at 1 + clip, a bad one not


def test_joint_weights_recover_the_target_of_numbers_and_tokens(tiny):
  """Enumerated over six numbers and all trajectories: sum to the target, whose marginal
  of u is pi_0 Z_ref; matching leaves the tokens' weights as they are."""
  alpha, cost = 0.25, 0.4
  table, other = TABLE(3, 3, 4), TABLE(3, 3, 5)
  random = np.random.default_rng(1)
  good = {x for x in itertools.product(range(3), repeat=3) if random.random() < 0.45}
  numbers = np.array([0.35, 0.45, 0.5, 0.55, 0.62, 0.8])
  old = random.dirichlet(np.ones(6))
  law = controller(cost=cost, sigma=0.7, features='none')
  first = np.exp(law.first_logp(jnp.asarray(logit(numbers))))
  found = [(k, *x) for k in range(6) for x in table.walk(numbers[k], other)]
  k, n = np.array([x[0] for x in found]), np.array([x[2] for x in found])
  p, q = np.array([x[3] for x in found]), np.array([x[4] for x in found])
  reward = np.array([x[1] in good for x in found], np.float32)
  nats = reward / alpha - cost * n / 3
  u = jnp.asarray(logit(numbers)[k], jnp.float32)
  rows_ = Control(law.bound(u), u, jnp.log(jnp.asarray(old[k], jnp.float32)), None)
  sampled = sampled_of(rows_, n, 3)
  log = lambda x: jnp.log(jnp.asarray(x, jnp.float32))
  scores = Scores(logp_old=log(p), logp_ref=log(q))

  def packed(learn, tokens):
    hp = dmpo.Config(alpha=alpha, baseline='none')
    mine = dataclasses.replace(law.hp, learn=learn, tokens=tokens)
    mine = learn and dataclasses.replace(law, hp=mine)
    setup = step.Setup(tiny, OBJECTIVES['dmpo'], hp, len(k), control=mine or None)
    return score.pack(sampled, reward[None], scores, setup)[0]

  def total(weight):  # of all trajectories, drawn from the old law
    x = old[k] * p * np.asarray(weight, np.float64)
    return x / x.sum()

  joint, matching = packed('joint', True), packed('matching', False)
  star = first[k] * q * np.exp(nats)
  star /= star.sum()
  np.testing.assert_allclose(total(joint.weight), star, atol=2e-6)
  np.testing.assert_allclose(joint.control.weight, joint.weight, rtol=1e-6)
  partition = np.array([(q * np.exp(nats))[k == i].sum() for i in range(6)])
  want = first * partition / (first @ partition)
  np.testing.assert_allclose(np.bincount(k, total(joint.weight)), want, atol=1e-5)
  ascent = old * partition / (old @ partition)
  np.testing.assert_allclose(
    np.bincount(k, total(matching.control.weight)), ascent, atol=1e-5
  )
  np.testing.assert_array_equal(matching.weight, packed('', False).weight)
  paid = packed('matching', True)
  np.testing.assert_allclose(total(paid.weight), total(paid.control.weight), atol=1e-6)
  np.testing.assert_allclose(paid.control.level, 1 / len(k), rtol=1e-5)


def test_control_variate_of_target_weights_has_no_mean():
  """Under the law that drew u, wherever the policy is: by Gauss-Hermite quadrature. The
  rest is the gradient of the cross-entropy."""
  law = controller(learn='matching', sigma=0.7, features='none')
  x, weight = np.polynomial.hermite_e.hermegauss(60)
  weight = jnp.asarray(weight / weight.sum(), jnp.float32)
  u = jnp.asarray(0.2 + 0.7 * x, jnp.float32)
  rows_ = Control(law.bound(u), u, law.logp(u, 0.2, 0.7), None, 0 * weight, weight)
  params = {'offset': jnp.float32(0.5)}
  assert abs(float(slope_of(law, params, rows_, 1)['offset'])) < 1e-5
  toward = weight * jax.nn.softmax(u) * 60
  rows_ = rows_._replace(weight=toward, level=0 * weight)
  want = -float(jnp.sum(toward * (u - 0.5))) / 0.49
  np.testing.assert_allclose(slope_of(law, params, rows_, 1)['offset'], want, rtol=1e-4)


@pytest.mark.parametrize('alpha, coef', [(0.04, 1.0), (0.0, 25.0)])
def test_cost_is_in_nats_whatever_the_temperature(alpha, coef):
  """A row of half the forwards weighs exp(cost / 2) times as much; wd1 likewise."""
  reward = jnp.ones((1, 2))
  cost = jnp.array([[0.2, 0.1]])
  scored = Scored(reward, jnp.ones((1, 2), int), 0 * reward, 0 * reward, cost=cost)
  _, own, _ = dmpo.weigh(scored, dmpo.Config(alpha=alpha, coef=coef))
  ratio = own['target'][0, 1] / own['target'][0, 0]
  np.testing.assert_allclose(ratio, math.exp(0.1), rtol=1e-4)
  objective = OBJECTIVES['wd1']
  plus, _, _ = objective.weigh(scored, objective.Config(alpha=0.04, strength=0.0))
  np.testing.assert_allclose(plus[0, 1] / plus[0, 0], math.exp(0.1), rtol=1e-4)


def test_head_tells_prompts_apart(tiny):
  """Two prompts with opposite best numbers: by features they get their own, without
  them one. The gradient is the buffer's, the optimizer the run's."""
  group, prompts, updates = 8, 32, 150
  random = np.random.default_rng(0)
  h = random.normal(size=(2, 48))
  h = (h - h.mean(1, keepdims=True)) / h.std(1, keepdims=True)
  which = jnp.arange(prompts * group) // group % 2
  setup_ = lambda law: step.Setup(tiny, OBJECTIVES['espo'], espo.Config(), control=law)

  def learned(features):
    law = controller(cost=0.0, features=features)
    seen = jnp.asarray(h, jnp.float32)[which] if features == 'prompt' else None
    optimizer = optax.adam(control.Config.lr, b1=0.9, b2=0.99)
    params = law.init(48)

    def update(carry, key):
      params, state = carry
      keys = jax.random.split(key, len(which))
      rows_ = law.draw(params, seen, keys, len(which))
      good = jnp.where(which == 0, -rows_.u, rows_.u)  # the best is far off, each way
      reward = jax.nn.sigmoid(good).reshape(prompts, group)
      scored = Scored(reward, jnp.ones(reward.shape, int))
      sampled = sampled_of(rows_, np.ones(len(which), int), 3)
      made, _ = score.control_rows(scored, sampled, setup_(law), None)
      grad = slope_of(law, params, made, prompts)
      moved, state = optimizer.update(grad, state, params)
      return (optax.apply_updates(params, moved), state), None

    keys = jax.random.split(jax.random.key(0), updates)
    (params, _), _ = jax.lax.scan(update, (params, optimizer.init(params)), keys)
    return np.asarray(law.bound(law.mean(params, seen, len(which))))[[0, group]]

  low, high = learned('prompt')
  assert low < 0.25 and high > 0.75
  assert abs(np.diff(learned('none'))) == 0


# --- rows with numbers of their own

NUMBERS = {
  'threshold': [0.15, 0.2, 0.25, 0.3, 0.35, 0.95],
  'entropy': [0.0, 0.5, 1.0, 2.0, 4.0, 9.0],
  'factor': [0.0, 0.5, 1.0, 1.5, 2.0, 4.0],
}
OWN = [
  *itertools.product(NUMBERS, ('none', 'prefix', 'dual', 'block'), (0,)),
  *(('threshold', cache, 3) for cache in ('none', 'prefix', 'block')),
]
QUICK = [('threshold', 'none', 0), ('factor', 'block', 0)]


@pytest.mark.parametrize(
  'pick, cache, slots', mostly_slow(OWN, QUICK, pytest.mark.long)
)
def test_rows_take_their_own_numbers(pick, cache, slots, tiny, weights):
  """Each row's tokens and order are those that all rows would have with its number;
  log-probs along the record do not need the number."""
  cfg = dataclasses.replace(tiny, block_causal=4 if cache == 'block' else 0)
  params = weights(cfg)
  field = sampler.SAMPLERS[pick].bound
  hp = SampleConfig(12, 4, 12, 0.8, pick, rank='max', cache=cache, slots=slots)
  prompts = jax.random.randint(jax.random.key(0), (6, 5), 0, 8)
  valid = jnp.arange(5)[None] >= jnp.array([0, 1, 2, 0, 3, 0])[:, None]
  keys = rng.row_keys(jax.random.key(1), jnp.arange(6))
  numbers = jnp.array(NUMBERS[pick], jnp.float32)
  args = prompts, valid, jax.random.clone(keys)

  @jax.jit
  def draw(numbers):
    return sampler.sample(cfg, params, prompts, valid, keys, hp, (), numbers)

  out = draw(numbers)
  for i, number in enumerate(NUMBERS[pick]):
    alone = draw(jnp.full(6, number, jnp.float32))
    np.testing.assert_array_equal(out.tokens[i], alone.tokens[i])
    np.testing.assert_array_equal(out.order[i], alone.order[i])
    np.testing.assert_allclose(out.logp[i], alone.logp[i], atol=1e-5)
  fixed = dataclasses.replace(hp, **{field: NUMBERS[pick][3]})
  want = jax.jit(lambda *args: sampler.sample(cfg, params, *args, fixed))(*args)
  np.testing.assert_array_equal(out.tokens[3], want.tokens[3])
  np.testing.assert_array_equal(out.order[3], want.order[3])
  assert len(set(np.asarray(out.order).max(1).tolist())) > 2
  assert forwards_of(out.order)[0] == int(out.order[0].max()) + 1
  if cache in ('none', 'block') and not slots:
    now, recorded = logprob.trajectory_logp(cfg, params, out, hp)
    np.testing.assert_allclose(now, recorded, atol=5e-5)


def test_fallback_is_recorded_by_the_rows_own_number(tiny, weights):
  prompts = jnp.zeros((2, 3), jnp.int32)
  keys = rng.row_keys(jax.random.key(1), jnp.arange(2))
  hp = SampleConfig(8, 8, 8, 1.0, 'threshold', rank='max')
  out = sampler.sample(
    tiny, weights(tiny), prompts, prompts == 0, keys, hp, ('fallback',),
    jnp.array([0.01, 1.0]),
  )  # fmt: skip
  assert not out.more['fallback'][0].any() and out.more['fallback'][1].all()


@pytest.mark.parametrize('block', [0, 4])
def test_features_are_the_prompts_alone(block, tiny, weights):
  """No padding, neighbour or number of pieces changes them; of a block-causal model
  they are what the first block sees."""
  cfg = dataclasses.replace(tiny, block_causal=block)
  params, hp = weights(cfg), SampleConfig(8, 4, 8, 1.0, 'threshold', rank='max')
  prompts = jax.random.randint(jax.random.key(0), (4, 7), 0, 8)
  valid = jnp.arange(7)[None] >= jnp.array([0, 3, 1, 6])[:, None]
  seen = jax.jit(
    lambda prompts, valid, hp=hp: control.features(cfg, params, prompts, valid, hp)
  )
  out = seen(prompts, valid)
  np.testing.assert_allclose(np.mean(out, 1), np.zeros(4), atol=1e-5)
  np.testing.assert_allclose(np.std(out, 1), np.ones(4), atol=1e-3)
  row = prompts[1:2, 3:]
  np.testing.assert_allclose(out[1], seen(row, row == row)[0], atol=2e-4)
  pieces = dataclasses.replace(hp, slots=2)
  few = jax.jit(lambda *args: control.features(cfg, params, *args, pieces))
  np.testing.assert_allclose(few(prompts, valid), out, atol=1e-5)
  # By hand: the mean state of the prompt's tokens before masks, whole or a block's.
  masks = jnp.full((1, 8), cfg.mask_id, jnp.int32)
  text = jnp.concatenate([row, masks], 1)
  h = jax.jit(lambda text: model.hidden(cfg, params, text)[0])(text)
  h = np.asarray(h, np.float64)[0, :4].mean(0)
  np.testing.assert_allclose(out[1], (h - h.mean()) / h.std(), atol=2e-3)


# --- a run

ON = {
  'control.on': True,
  'control.cost': 0.9,
  'sampler.pick': 'threshold',
  'sampler.threshold': 0.1,
  'eval.sampler.pick': 'threshold',
  'eval.sampler.threshold': 0.1,
  'train.overlap': True,
  'train.iterations': 3,
}


@pytest.fixture(scope='module')
def steered(base_params):
  c = tiny_run.tiny()
  c.update_from_flattened_dict(ON)
  parts = build.build(c)
  return parts._replace(task=parts.task._replace(reward=letters))


@pytest.fixture(scope='module')
def finished(steered, base_params, tmp_path_factory):
  """(workdir, final parameters, controls that each update saw) of a whole run."""
  seen, workdir = [], tmp_path_factory.mktemp('steered')
  part = watched(steered, noting(seen))
  return workdir, run(part, workdir, base_params), seen


def noting(seen):
  def watch(name, args):
    if name == 'update':
      seen.append(jax.device_get(args[2].control))

  return watch


def test_run_learns_and_resumes_to_the_bit(finished, steered, base_params, tmp_path):
  """Killed while it grades a buffer and between the updates on one: u, its log-prob,
  features and weights come back with the batch."""
  workdir, final, seen = finished
  assert float(final['control']['offset']) != pytest.approx(logit(0.1))
  assert np.abs(final['control']['slope']).max() > 0
  places = (
    (
      'graded',
      lambda part: watched(part, stop_at('reward', 11 + 8 + 8 + 11 + 3, interrupt)),
    ),
    ('trained', lambda part: fail_at(part, INNER + 2, interrupt)),
  )
  for name, stopped in places:
    part = vary(steered, checkpoint={'every': 2})
    with pytest.raises(KeyboardInterrupt):
      run(stopped(part), tmp_path / name, base_params, kill=True)
    again = []
    got = run(watched(part, noting(again)), tmp_path / name, base_params)
    same_run(got, tmp_path / name, (workdir, final))
    for one, two in zip(again[::-1], seen[::-1], strict=False):
      same(one, two)
    assert len(again) < len(seen)


def test_metrics_and_evaluation_of_a_run(finished, steered, base_params, tmp_path):
  """Ratios are 1 at the first update; validation is at the mean; the base has none."""
  workdir, final, seen = finished
  found = rows(workdir)
  first, last = found['eval'][0], found['eval'][-1]
  assert first['bound'] == pytest.approx(0.1, abs=1e-6) != last['bound']
  for row in found['rl']:
    assert row['control/bound_std'] > 0 and row['row_forwards'] <= row['forwards']
  assert found['update'][0]['control/ratio_log_abs'] < 1e-5
  assert found['update'][INNER - 1]['control/ratio_log_abs'] > 1e-3
  assert {'control/mean', 'control/sigma', 'control/grad_norm'} <= set(
    found['update'][0]
  )
  bounds = seen[0].bound.reshape(2, 4)
  assert all(len(set(group)) == 4 for group in bounds.tolist())  # each row its own
  np.testing.assert_allclose(bounds.ravel(), 1 / (1 + np.exp(-seen[0].u)), rtol=1e-5)
  card = cards.run(steered, final, str(tmp_path / 'cards'), 'latest')[0]
  assert card['bound_std'] > 0 and card['batch_forwards'] >= card['forwards']
  held = build.problems(steered, 'test')
  generate = lambda params, sample: next(
    evaluate.generate(steered, params, held, sample, 1, 0)
  )
  assert 'bound' not in generate(base_params, steered.steps.sample_eval)
  asked = steered.config.eval.sampler.copy_and_resolve_references()
  asked.threshold = 0.3  # a number that somebody asks for is taken as it is
  assert 'bound' not in generate(final, steered.steps.sampler_of(asked))


@pytest.mark.slow
def test_controller_is_left_out_of_an_export_and_kept_by_mix(
  finished, steered, base_params, tmp_path
):
  _, final, _ = finished
  report = hf.export(steered, final, base_params, str(tmp_path / 'out'), 'merged')
  assert report['left_out'] == 'control'
  assert report['max_logit_difference'] < 1e-3 * report['max_logit']
  mixed = resume.mixed(final, base_params, 0.5)
  same(mixed['control'], final['control'])
  frozen = {**final, 'params': base_params['params']}
  with pytest.raises(ValueError, match='equals its base'):
    hf.export(steered, frozen, base_params, str(tmp_path / 'none'), 'merged')


@pytest.mark.slow
def test_devices_change_no_number(steered, finished):
  """One device, eight, and eight by pmap draw the same u and the same tokens."""
  _, final, _ = finished
  held = build.problems(steered, 'train')
  row = np.arange(8, dtype=np.int32)
  found = []
  one = build.build(steered.config, jax.devices()[:1])
  pmap = build.build(vary(steered, sampler={'parallel': 'pmap'}).config)
  for built in (steered, one, pmap):
    params = jax.device_put(final, mesh.replicated(built.mesh))
    out = built.steps.sample(params, held.tokens[:8], held.valid[:8], row)
    found.append(jax.device_get(out.rollouts))
  for other in found[1:]:
    np.testing.assert_allclose(found[0].control.u, other.control.u, atol=1e-6)
    np.testing.assert_array_equal(found[0].tokens, other.tokens)


@pytest.mark.slow
@pytest.mark.parametrize('learn', ['joint', 'matching'])
def test_other_targets_run(learn, base_params, tmp_path):
  """With adapters, a moving reference and microbatches."""
  c = tiny_run.tiny()
  c.update_from_flattened_dict(
    {
      **ON,
      'control.learn': learn,
      'control.tokens': learn == 'joint',
      'control.features': 'none',
      'lora.rank': 2,
      'train.group': 8,
      'train.microbatches': 2,
      'train.iterations': 1,
      'reference.of': ('moving',),
    }
  )
  parts = build.build(c)
  parts = parts._replace(task=parts.task._replace(reward=letters))
  final = run(parts, tmp_path, base_params)
  assert set(final) == {'params', 'lora', 'control'}
  assert set(final['control']) == {'offset'}
  assert abs(float(final['control']['offset']) - logit(0.1)) > 1e-3


# --- what is refused


@pytest.mark.parametrize(
  'fields, named',
  [
    ({'sampler.pick': 'confidence'}, 'sampler.pick = confidence'),
    ({'sampler.pick': 'wino', 'sampler.cache': 'none'}, 'sampler.pick = wino'),
    ({'sampler.threshold': 1.0}, 'sampler.threshold = 1.0'),
    ({'sampler.pick': 'factor', 'sampler.factor': 0.0}, 'sampler.factor = 0.0'),
    ({'sampler.rank': 'token', 'sampler.order_logp': True}, 'sampler.order_logp'),
    ({'control.learn': 'joint'}, 'control.tokens'),
    ({'control.learn': 'matching', 'objective.name': 'espo'}, 'control.learn'),
    (
      {'control.learn': 'joint', 'control.tokens': True, 'objective.alpha': 0.0},
      'objective.alpha',
    ),
    ({'control.learn': 'matching', 'control.learn_sigma': True}, 'learn_sigma'),
    ({'control.sigma': 0.0}, 'control.sigma'),
    ({'control.learn': 'both'}, 'control.learn'),
  ],
)
def test_impossible_settings_are_refused(fields, named):
  c = tiny_run.tiny()
  fields = {**ON, **fields}
  if 'objective.name' in fields:
    config.choose_objective(c, fields.pop('objective.name'))
  c.update_from_flattened_dict(fields)
  with pytest.raises(ValueError, match=named):
    check.config(c, 8)


def test_a_rule_without_a_number_is_refused_by_the_sampler(tiny):
  hp = SampleConfig(4, 4, 4, 1.0)
  prompts = jnp.zeros((1, 2), jnp.int32)
  keys = rng.row_keys(jax.random.key(0), jnp.arange(1))
  with pytest.raises(ValueError, match=r'sampler.pick = confidence.*threshold'):
    sampler.sample(tiny, {}, prompts, prompts == 0, keys, hp, (), jnp.ones(1))
