"""The gradient of every objective against its exact counterpart, enumerated.

Three tokens of three symbols. The model is a table of logits with one entry for each of
the 64 partly masked states: no two states share a parameter, so an error in any state
shows. Completions and trajectories are enumerated; masks are drawn many times.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax import logprob
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.sampler import SampleConfig, picks
from dmpo_jax.types import Canvas, Record, Text, TrainBatch, ViewLogp, Views

L, V, M = 3, 3, 3  # M: the mask
TAU = 0.5  # temperature of the Plackett-Luce draw of positions
OUTPUTS = np.array(list(itertools.product(range(V), repeat=L)))
# Sharp enough that confidences lie on both sides of a threshold of 0.5.
THETA = jnp.asarray(np.random.default_rng(0).normal(size=(64, L, V)), jnp.float32)
REWARD = np.random.default_rng(1).random(len(OUTPUTS)).astype(np.float32)


def index_of(tokens):
  """Returns the state's row in the table; (..., L) -> (...)."""
  return tokens @ np.array([16, 4, 1])


def logp_at(theta, states, tokens):
  """Returns log p(token | state) at every position, (..., L)."""
  logp = jax.nn.log_softmax(theta[index_of(states)])
  return jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]


def view(theta, tokens_RxL, masks):
  """Returns what `logprob.view_logp` does, with every read, of this model."""
  tokens = jnp.broadcast_to(tokens_RxL[:, None], masks.masked.shape)
  logits = theta[index_of(jnp.where(masks.masked, M, tokens))]
  own = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
  numbers = dict(
    logp=own - jax.nn.logsumexp(logits, -1),
    centred=own - logits.mean(-1),
    score=(logits.max(-1) - jax.nn.logsumexp(logits, -1)) / TAU,
  )
  numbers = {name: jnp.where(masks.masked, x, 0.0) for name, x in numbers.items()}
  return ViewLogp(numbers.pop('logp'), numbers)


def elbo(theta, tokens_RxL, masks):
  return logprob.seq_elbo(view(theta, tokens_RxL, masks).logp, masks.weight)


# --- samplers: a rule maps a state to [(positions, probability, fallback)]


def random_rule(theta, state):
  places = [i for i in range(L) if state[i] == M]
  return [((i,), 1 / len(places), False) for i in places]


def left_rule(theta, state):
  return [((next(i for i in range(L) if state[i] == M),), 1.0, False)]


def threshold_rule(theta, state):
  """Takes all that are sure enough by THETA, else the leftmost."""
  places = [i for i in range(L) if state[i] == M]
  best = np.exp(np.asarray(jax.nn.log_softmax(THETA[index_of(np.array(state))]))).max(
    -1
  )
  sure = tuple(i for i in places if best[i] >= 0.5)
  return [(sure, 1.0, False)] if sure else [((places[0],), 1.0, True)]


def luce_rule(theta, state, size=2):
  """Draws sets of two by Plackett-Luce, by each position's largest probability."""
  places = [i for i in range(L) if state[i] == M]
  best = jax.nn.log_softmax(theta[index_of(np.array(state))]).max(-1) / TAU
  out = []
  for chosen in itertools.combinations(places, min(size, len(places))):
    total = 0.0
    for order in itertools.permutations(chosen):
      left, p = list(places), 1.0
      for i in order:
        p *= jnp.exp(best[i] - jax.nn.logsumexp(best[np.array(left)]))
        left.remove(i)
      total += p
    out.append((chosen, total, False))
  return out


RULES = dict(
  random=random_rule, left=left_rule, threshold=threshold_rule, luce=luce_rule
)


@functools.cache
def trajectories(rule):
  """Returns all under THETA: tokens, order, fallback, place (N, L), p (N,)."""
  found = []

  def walk(state, order, fallback, place, p, step):
    if M not in state:
      found.append((state, order, fallback, place, p))
      return
    law = np.exp(np.asarray(jax.nn.log_softmax(THETA[index_of(np.array(state))])))
    for chosen, chance, forked in RULES[rule](THETA, state):
      for tokens in itertools.product(range(V), repeat=len(chosen)):
        new, at, fb, pl, q = (
          list(state),
          list(order),
          list(fallback),
          list(place),
          p * float(chance),
        )
        for i, token in zip(chosen, tokens, strict=True):
          new[i], at[i], fb[i] = token, step, forked
          pl[i], q = np.log(float(chance)), q * law[i, token]
        walk(tuple(new), tuple(at), tuple(fb), tuple(pl), q, step + 1)

  walk((M,) * L, (-1,) * L, (False,) * L, (0.0,) * L, 1.0, 0)
  return tuple(np.array(x) for x in zip(*found, strict=True))


def reward_of(tokens):
  return REWARD[tokens @ np.array([9, 3, 1])]


@functools.cache
def policy_gradient(rule):
  """Returns d E[r] / d theta of a sampler, with all probabilities multiplied out."""
  tokens, order, _, _, _ = trajectories(rule)

  def value(theta):
    logp = jnp.zeros(len(tokens))
    for step in range(L):
      hidden = order >= step
      states = jnp.where(hidden, M, tokens)
      now = logp_at(theta, states, jnp.asarray(tokens))
      logp += jnp.sum(jnp.where(order == step, now, 0.0), axis=1)
    if rule == 'luce':
      logp += places_logp(theta, tokens, order)
    if rule == 'random':
      logp -= np.log(6)
    return jnp.sum(jnp.exp(logp) * reward_of(tokens))

  return np.asarray(jax.jit(jax.grad(value))(THETA))


def places_logp(theta, tokens, order):
  """Returns log-probs of the positions of whole trajectories, set by set."""
  law = functools.cache(
    lambda state: {chosen: jnp.log(p) for chosen, p, _ in luce_rule(theta, state)}
  )
  total = []
  for x, at in zip(tokens, order, strict=True):
    states = [
      tuple(np.where(at >= step, M, x).tolist()) for step in range(at.max() + 1)
    ]
    sets = [tuple(np.nonzero(at == step)[0].tolist()) for step in range(at.max() + 1)]
    total.append(
      sum(law(state)[chosen] for state, chosen in zip(states, sets, strict=True))
    )
  return jnp.stack(total)


# --- gradients of objectives


def text_of(rows, record=None):
  """Returns the Text of whole completions in one block."""
  words = jnp.ones((rows, L), bool)
  return Text(words, words, jnp.ones((rows, 1), bool), L, Canvas(L), record)


def batch_of(rows, weight, norm, **more):
  """Returns a TrainBatch of whole completions; `tokens` and `valid` are not read."""
  return TrainBatch(
    tokens=None,
    valid=None,
    completion=jnp.ones((rows, L), bool),
    row=jnp.arange(rows),
    weight=weight,
    norm=jnp.float32(norm),
    total=jnp.float32(rows),
    **{'own': {'scale': jnp.ones(rows)}, **more},
  )


def gradient(name, tokens, weight, record=None, copies=1, credit=None, **hp):
  """Returns minus the mean gradient of the loss on rows with given weights.

  On policy: old, recorded and reference log-probs are those of THETA. The loss
  is divided by `copies`, so that it is the expectation over masks of the sum
  over rows. credit: weights of single tokens.
  """
  objective = OBJECTIVES[name]
  hp = objective.Config(**hp)
  assert hp.problems() == []
  tile = lambda x: jnp.repeat(jnp.asarray(x), copies, axis=0)
  own = {} if credit is None else {'credit': np.float32(credit)}
  args = jax.tree.map(tile, (tokens, np.float32(weight), record, own))
  tokens, rows = args[0], len(args[0])

  def loss(theta, old, tokens, weight, record, own):
    masks = objective.draw(
      jax.random.key(3), jnp.arange(rows), text_of(rows, record), hp
    )
    before = view(old, tokens, masks)
    views = Views(
      logprob.seq_elbo(before.logp, masks.weight), before.logp, before.reads
    )
    batch = batch_of(rows, weight, copies, record=record, old=views, ref=views)
    batch = batch._replace(own={**batch.own, **own})
    return objective.loss(view(theta, tokens, masks), masks, batch, hp)[0]

  run = jax.jit(jax.grad(loss))  # its data as arguments: constants are folded
  return -np.asarray(run(THETA, THETA, *args))


def exact_elbo(theta):
  """Returns ELBOs (27,) of all completions, by all masks of all sizes."""
  total = 0.0
  for masked in itertools.product([False, True], repeat=L):
    m = sum(masked)
    if m:
      masked = np.broadcast_to(np.array(masked), OUTPUTS.shape)
      states = np.where(masked, M, OUTPUTS)
      logp = logp_at(theta, states, jnp.asarray(OUTPUTS))
      share = 1 / L * (L / m) / len(list(itertools.combinations(range(L), m)))
      total += share * jnp.sum(logp * masked, axis=1)
  return total


def elbo_gradient(weight):
  """Returns d sum_x weight(x) ELBO(x) / d theta."""
  return np.asarray(jax.grad(lambda theta: jnp.sum(weight * exact_elbo(theta)))(THETA))


def reweighed_gradient(name, fresh, copies=4000, **hp):
  """Returns the mean and the exact gradient of the loss with weights of `reweigh`.

  Off policy: the reference is another table. One group holds all completions.
  """
  objective = OBJECTIVES[name]
  hp = objective.Config(**hp)
  other = THETA + 0.5 * np.random.default_rng(5).normal(size=THETA.shape).astype(
    np.float32
  )
  group = len(OUTPUTS)
  own = {'scale': np.full(group, 1 / group), 'reward': REWARD}

  def reweighed(elbo_R, elbo_ref_R, weight_R, norm):
    rows = len(weight_R)
    tiled = {name: jnp.tile(jnp.float32(x), rows // group) for name, x in own.items()}
    batch = batch_of(rows, weight_R, norm, own=tiled, ref=Views(elbo=elbo_ref_R))
    weight = objective.reweigh(jax.lax.stop_gradient(elbo_R), batch, group, hp)
    return batch._replace(weight=weight)

  def loss(theta, tokens, weight):
    rows = len(tokens)
    masks, judged = (
      objective.draw(jax.random.key(seed), jnp.arange(rows), text_of(rows), hp)
      for seed in (0, int(fresh))
    )
    elbos = (elbo(table, tokens, judged) for table in (theta, other))
    batch = reweighed(*elbos, weight, copies)
    return objective.loss(view(theta, tokens, masks), masks, batch, hp)[0]

  tile = lambda x: jnp.tile(jnp.asarray(x), (copies,) + (1,) * (x.ndim - 1))
  run = jax.jit(jax.grad(loss))
  got = -np.asarray(run(THETA, tile(OUTPUTS), tile(np.float32(WEIGHT))))
  exact = reweighed(exact_elbo(THETA), exact_elbo(other), jnp.float32(WEIGHT), 1)
  return got, elbo_gradient(np.asarray(exact.weight))


def record_of(rule):
  """Returns (tokens, p, Record) of a rule's trajectories, as a sampler records them."""
  tokens, order, fallback, place, p = trajectories(rule)
  logp, entropies = np.zeros(order.shape), np.zeros(order.shape)
  for step in range(L):
    states = np.where(order >= step, M, tokens)
    now = np.asarray(logp_at(THETA, states, jnp.asarray(tokens)))
    law = np.asarray(jax.nn.log_softmax(THETA[index_of(states)]))
    at = order == step
    logp[at] = now[at]
    entropies[at] = -np.sum(np.exp(law) * law, -1)[at]
  more = dict(fallback=fallback, place=np.float32(place), entropy=np.float32(entropies))
  record = Record(order, np.float32(logp), np.zeros_like(logp), more)
  return tokens, p, record


def error(got, want):
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def cosine(a, b):
  return np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)


def test_probabilities_of_trajectories_sum_to_one():
  """Random order has six trajectories of each completion, left to right one."""
  for rule in RULES:
    assert trajectories(rule)[-1].sum() == pytest.approx(1, abs=1e-5)
  assert len(trajectories('random')[0]) == 6 * 27
  assert len(trajectories('left')[0]) == 27
  assert 0 < trajectories('threshold')[2].mean() < 1


MANY = 20000  # mask draws of each completion
WEIGHT = (REWARD - REWARD.mean()) / len(REWARD)


def test_residual_is_unbiased_with_fresh_masks():
  """It is off policy, too. With the gradient's own masks it is biased."""
  hp = dict(alpha=0.3, draws=2, copies=MANY)
  assert error(*reweighed_gradient('residual', True, **hp)) < 0.03
  assert error(*reweighed_gradient('residual', False, **hp)) > 0.1


def test_vrpo_is_biased_by_noise():
  """The sigmoid of a noisy ELBO is biased, and less so with more masks."""
  errors = [
    error(*reweighed_gradient('vrpo', False, beta=1.0, sft_coef=0.0, draws=draws))
    for draws in (1, 8)
  ]
  assert errors[0] > 2 * errors[1] and errors[1] < 0.15, errors


@pytest.mark.parametrize(
  'name, scale, hp',
  [
    ('espo', 1 / L, {}),
    ('espo', 1 / L, dict(masks='random')),
    ('espo', 1 / L, dict(masks='order', draws=2)),
    ('gdpo', 1 / L, dict(draws=2)),
    ('coupled_grpo', 1, dict(variant='elbo')),
    ('gdsd', 20 / L, {}),
    ('residual', 1, {}),
    ('vrpo', 1, {}),
  ],
)
def test_mean_gradient_is_that_of_exact_elbos(name, scale, hp):
  """It is the mean over masks, on policy, of a weighted sum."""
  got = gradient(name, OUTPUTS, WEIGHT, copies=MANY, **hp)
  assert error(got, scale * elbo_gradient(WEIGHT)) < 0.03


def test_gdpo_with_rounded_counts_is_biased():
  """At three tokens the bias is far above the noise."""
  got = gradient('gdpo', OUTPUTS, WEIGHT, copies=MANY, draws=2, masks='rounded')
  assert error(L * got, elbo_gradient(WEIGHT)) > 0.1


@pytest.mark.parametrize(
  'name, rule, hp',
  [
    ('just_grpo', 'left', {}),
    ('just_grpo', 'left', dict(choose='uniform', draws=2)),
    ('agrpo', 'random', dict(choose='each', draws=0)),
    ('agrpo', 'random', dict(choose='uniform', draws=2)),
    ('agrpo', 'random', dict(choose='entropy', draws=2)),
    ('mapg', 'luce', dict(choose='each', draws=0)),
  ],
)
def test_gradient_is_that_of_the_expected_reward(name, rule, hp):
  """It is, times the number of steps."""
  tokens, p, record = record_of(rule)
  steps = record.order.max(1) + 1
  assert np.ptp(steps) == 0
  copies = 1 if hp.get('choose') in (None, 'each') else 2000
  got = steps[0] * gradient(name, tokens, p * reward_of(tokens), record, copies, **hp)
  exact = policy_gradient(rule)
  assert error(got, exact) < (2e-4 if copies == 1 else 0.03)


@pytest.mark.parametrize('name', ['tracerl', 'dipo'])
@pytest.mark.parametrize('rule', ['random', 'threshold'])
@pytest.mark.parametrize('draws', [0, 2])
def test_gradient_of_recorded_rounds_is_that_of_the_expected_reward(name, rule, draws):
  """Whether steps unmask one token or several."""
  tokens, p, record = record_of(rule)
  copies = 2000 if draws else 1
  weight = p * reward_of(tokens)
  got = gradient(name, tokens, weight, record, copies, draws=draws, beta=0.0)
  assert error(got, policy_gradient(rule)) < (0.03 if draws else 2e-4)


@pytest.mark.parametrize('rule', ['random', 'threshold'])
def test_ratios_of_recorded_rounds_have_mean_one(rule):
  """E_old of a token's ratio is one, for each of the three; so the record is p_old."""
  tokens, p, record = record_of(rule)
  objective, rows = OBJECTIVES['dipo'], len(tokens)
  text = text_of(rows, jax.tree.map(jnp.asarray, record))
  masks = objective.draw(jax.random.key(0), jnp.arange(rows), text, objective.Config())
  other = THETA + np.random.default_rng(6).normal(size=THETA.shape).astype(np.float32)
  gap = view(other, jnp.asarray(tokens), masks).logp - record.logp[:, None]
  ratio = np.where(masks.counted, np.exp(gap), 0.0)
  assert ratio.max() > 2
  assert np.sum(p[:, None] * ratio.sum(1)) == pytest.approx(L, abs=1e-4)
  one = np.where(record.order == 0, ratio.sum(1), 0.0).sum(1)
  size = (record.order == 0).sum(1)
  assert np.sum(p * one / size) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize('masks', ['order', 'rounds'])
def test_dmpo_fits_an_order_or_the_recorded_rounds(masks):
  """Its gradient is that of the ELBO, or of the log-prob along the record, over L."""
  if masks == 'order':
    tokens, weight, record, exact = OUTPUTS, WEIGHT, None, elbo_gradient(WEIGHT)
  else:
    tokens, p, record = record_of('threshold')
    weight = p * reward_of(tokens)
    exact = policy_gradient('threshold')
  copies = MANY if masks == 'order' else MANY // 4
  got = gradient(
    'dmpo', tokens, weight, record, copies, masks=masks, draws=2, antithetic=False
  )
  assert error(L * got, exact) < 0.03


def test_mapg_needs_its_position_term():
  """Without it its gradient is not that of the expected reward."""
  tokens, p, record = record_of('luce')
  got = 2 * gradient(
    'mapg', tokens, p * reward_of(tokens), record, choose='each', draws=0, places=False
  )
  assert error(got, policy_gradient('luce')) > 0.1


def test_fork_grpo_is_exact_for_fallbacks():
  """It is the gradient of their log-probs, given the other tokens."""
  tokens, p, record = record_of('threshold')
  got = gradient('fork_grpo', tokens, p * reward_of(tokens), record, draws=L)
  forked, order = record.more['fallback'], record.order

  def value(theta):
    total = 0.0
    for step in range(L):
      states = jnp.where(order >= step, M, tokens)
      now = logp_at(theta, states, jnp.asarray(tokens))
      own = jnp.sum(jnp.where((order == step) & forked, now, 0.0), axis=1)
      total += own / np.maximum(forked.sum(1), 1)
    return jnp.sum(p * reward_of(tokens) * total)

  assert error(got, np.asarray(jax.grad(value)(THETA))) < 2e-4


# Compared with the gradient of E[r] of the random-order sampler.
BIASED = {
  'espo': {},
  'diffu_grpo': dict(mask_prompt=0.0),
  'wd1': dict(mask_prompt=0.0),
  'coupled_grpo': dict(beta=0.0),
  'spg': dict(mask_prompt=0.0, masks='random', draws=4),
  'gdsd': dict(variant='released'),
  'vrpo': {},
  'diffpo': {},
}


def test_cosines_with_the_policy_gradient_are_below_one():
  """AGRPO alone has the gradient of the policy that samples in random order."""
  tokens, p, record = record_of('random')
  exact = policy_gradient('random')
  weight = p * (reward_of(tokens) - np.sum(p * reward_of(tokens)))
  found = {
    name: cosine(gradient(name, tokens, weight, record, 100, **hp), exact)
    for name, hp in BIASED.items()
  }
  assert all(0 < value < 0.999 for value in found.values())
  whole = cosine(
    gradient('agrpo', tokens, weight, record, choose='each', draws=0), exact
  )
  assert whole > 0.9999


def test_plackett_luce_draws_by_its_recorded_law():
  """Frequencies of pairs of positions equal exp(plackett_luce_logp)."""
  score = np.array([-0.2, -1.0, -0.5, -2.0], np.float32)
  rows = 20000
  look = picks.Look(
    None,
    jnp.broadcast_to(jnp.exp(score), (rows, 4)),
    jnp.ones((rows, 4), bool),
    jnp.full(rows, 2),
    None,
    jax.random.uniform(jax.random.key(0), (rows, 4)),
  )
  hp = SampleConfig(4, 4, 2, pick='plackett_luce', rank_temperature=TAU)
  taken = np.asarray(picks.pick_plackett_luce(look, hp))
  for pair in itertools.combinations(range(4), 2):
    chosen = np.isin(np.arange(4), pair)
    share = np.mean((taken == chosen).all(1))
    law = np.exp(
      float(
        picks.plackett_luce_logp(
          jnp.asarray(score / TAU), jnp.ones(4, bool), jnp.asarray(chosen)
        )
      )
    )
    assert share == pytest.approx(law, abs=0.012)
