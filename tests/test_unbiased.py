"""The gradient of every objective against its exact counterpart, enumerated.

Three tokens of three symbols. The model is a table of logits, one for each of
the 64 partly masked states, so that nothing is shared between states and an
error anywhere shows. Completions and trajectories are enumerated; masks are
enumerated by drawing very many.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.sampler import SampleConfig, picks
from dmpo_jax.types import TrainBatch

L, V, M = 3, 3, 3  # M: the mask
OUTPUTS = np.array(list(itertools.product(range(V), repeat=L)))
# Not too flat: confidences on both sides of a threshold of 0.5.
THETA = jnp.asarray(np.random.default_rng(0).normal(size=(64, L, V)), jnp.float32)
REWARD = np.random.default_rng(1).random(len(OUTPUTS)).astype(np.float32)


def index_of(tokens):
  """The state's row in the table; (..., L) -> (...)."""
  return tokens @ np.array([16, 4, 1])


def logp_at(theta, states, tokens):
  """(..., L) log p(token | state) at every place."""
  logp = jax.nn.log_softmax(theta[index_of(states)])
  return jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]


def read(theta, tokens_RxL, masked_RxKxL):
  """What `logprob.token_logp` gives of this model."""
  tokens = jnp.broadcast_to(tokens_RxL[:, None], masked_RxKxL.shape)
  states = jnp.where(masked_RxKxL, M, tokens)
  logits = theta[index_of(states)]
  own = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
  out = dict(
    logp=own - jax.nn.logsumexp(logits, -1),
    centred=own - logits.mean(-1),
    score=(logits.max(-1) - jax.nn.logsumexp(logits, -1)) / TAU,
  )
  return {name: jnp.where(masked_RxKxL, x, 0.0) for name, x in out.items()}


TAU = 0.5  # of the Plackett-Luce positions


# --- samplers: a rule gives [(positions, probability, fallback)] of a state


def random_rule(theta, state):
  places = [i for i in range(L) if state[i] == M]
  return [((i,), 1 / len(places), False) for i in places]


def left_rule(theta, state):
  return [((next(i for i in range(L) if state[i] == M),), 1.0, False)]


def threshold_rule(theta, state):
  """All that are sure enough, else the leftmost: by the table as it is."""
  places = [i for i in range(L) if state[i] == M]
  best = np.exp(np.asarray(jax.nn.log_softmax(THETA[index_of(np.array(state))]))).max(
    -1
  )
  sure = tuple(i for i in places if best[i] >= 0.5)
  return [(sure, 1.0, False)] if sure else [((places[0],), 1.0, True)]


def luce_rule(theta, state, size=2):
  """Plackett-Luce sets of two by the largest probability of each place."""
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
  """All of them under THETA: tokens, order, fallback, place (N, L), p (N,)."""
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
  """d E[r] / d theta of a sampler: the probabilities multiplied out."""
  tokens, order, _, _, _ = trajectories(rule)

  def value(theta):
    total = 0.0
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
    return total + jnp.sum(jnp.exp(logp) * reward_of(tokens))

  return np.asarray(jax.jit(jax.grad(value))(THETA))


def places_logp(theta, tokens, order):
  """Log-probs of the positions of whole trajectories, set by set."""
  total = []
  for x, at in zip(tokens, order, strict=True):
    logp = 0.0
    for step in range(at.max() + 1):
      state = tuple(np.where(at >= step, M, x))
      chance = dict((c, p) for c, p, _ in luce_rule(theta, state))
      logp += jnp.log(chance[tuple(np.nonzero(at == step)[0])])
    total.append(logp)
  return jnp.stack(total)


# --- what an objective makes of it


def gradient(name, tokens, weight, record=None, copies=1, weigh=True, **hp):
  """Minus the mean gradient of the loss on rows with given weights.

  On policy: old, recorded and reference log-probs are those of THETA. The loss
  is divided by `copies`, so that it is the expectation over masks of the sum
  over rows.
  """
  objective = OBJECTIVES[name]
  hp = objective.hp(**hp)
  assert objective.check(hp) == []
  tile = lambda x: jnp.repeat(jnp.asarray(x), copies, axis=0)
  tokens, weight = tile(tokens), tile(np.float32(weight))
  rows = len(tokens)
  seen = {'prompt': jnp.ones((rows, 1), bool)}
  if record:
    seen |= {n: tile(x) for n, x in record.items()}
    seen['text'] = jnp.ones((rows, L), bool)
  needs = objective.needs(hp)
  asked = {'prompt', 'block', 'record'} & needs

  def loss(theta, old, tokens, weight, seen):
    masks = objective.draw(
      jax.random.key(3),
      jnp.arange(rows),
      jnp.ones((rows, L), bool),
      hp,
      *([{**seen, 'block': L}] * bool(asked)),
    )
    now, before = (read(x, tokens, masks.masked) for x in (theta, old))
    elbo = jnp.mean(masks.weight * before['logp'].sum(-1), 1)
    extra = dict(
      now,
      tokens_old=before['logp'],
      tokens_ref=before['logp'],
      centred_old=before['centred'],
      elbo_ref=elbo,
    )
    if record:
      extra['record'] = seen
    batch = TrainBatch(
      tokens,
      None,
      None,
      None,
      weight,
      jnp.full(rows, 1.0),
      None,
      jnp.float32(copies),
      jnp.float32(rows),
      extra,
    )
    return objective.loss(now['logp'], masks, batch, elbo, hp)[0]

  run = jax.jit(jax.grad(loss))  # its data as arguments: constants are folded
  return -np.asarray(run(THETA, THETA, tokens, weight, seen))


def exact_elbo(theta):
  """(27,) ELBOs of all completions, by all masks of all sizes."""
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
  """d sum_x weight(x) ELBO(x)."""
  return np.asarray(jax.grad(lambda theta: jnp.sum(weight * exact_elbo(theta)))(THETA))


def reweighed_gradient(name, fresh, copies=4000, **hp):
  """(the mean, the exact) gradient of the loss with weights of `reweigh`, off
  policy: the reference is another table. One group of all completions."""
  objective = OBJECTIVES[name]
  hp = objective.hp(**hp)
  other = THETA + 0.5 * np.random.default_rng(5).normal(size=THETA.shape).astype(
    np.float32
  )
  tile = lambda x: jnp.tile(jnp.asarray(x), (copies,) + (1,) * (x.ndim - 1))
  group = len(OUTPUTS)

  def batch_of(weight, elbo_ref, rows, norm):
    positive = REWARD if name == 'vrpo' else np.full(group, 1 / group)
    return TrainBatch(
      None,
      None,
      jnp.ones((rows, L), bool),
      None,
      weight,
      jnp.tile(jnp.float32(positive), rows // group),
      None,
      jnp.float32(norm),
      jnp.float32(rows),
      {'elbo_ref': elbo_ref},
    )

  def loss(theta, tokens, weight):
    rows = len(tokens)
    draw = lambda seed: objective.draw(
      jax.random.key(seed), jnp.arange(rows), jnp.ones((rows, L), bool), hp
    )
    masks = draw(0)
    judged = draw(1) if fresh else masks
    elbo = lambda theta: jnp.mean(
      judged.weight * read(theta, tokens, judged.masked)['logp'].sum(-1), axis=1
    )
    batch = batch_of(weight, elbo(other), rows, copies)
    batch = batch._replace(
      weight=objective.reweigh(
        jax.lax.stop_gradient(elbo(theta)), None, batch, group, hp
      )
    )
    return objective.loss(
      read(theta, tokens, masks.masked)['logp'], masks, batch, None, hp
    )[0]

  got = -np.asarray(
    jax.jit(jax.grad(loss))(THETA, tile(OUTPUTS), tile(np.float32(WEIGHT)))
  )
  exact = batch_of(jnp.float32(WEIGHT), exact_elbo(other), group, 1)
  weight = objective.reweigh(exact_elbo(THETA), None, exact, group, hp)
  return got, elbo_gradient(np.asarray(weight))


def record_of(rule, entropy=True):
  """(tokens, p, record) of a rule's trajectories, as a sampler records them."""
  tokens, order, fallback, place, p = trajectories(rule)
  logp, entropies = np.zeros(order.shape), np.zeros(order.shape)
  for step in range(L):
    states = np.where(order >= step, M, tokens)
    now = np.asarray(logp_at(THETA, states, jnp.asarray(tokens)))
    law = np.asarray(jax.nn.log_softmax(THETA[index_of(states)]))
    at = order == step
    logp[at] = now[at]
    entropies[at] = -np.sum(np.exp(law) * law, -1)[at]
  record = dict(
    order=order,
    logp=np.float32(logp),
    fallback=fallback,
    place=np.float32(place),
    entropy=np.float32(entropies),
  )
  return tokens, p, record


def error(got, want):
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def cosine(a, b):
  return np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)


def test_probabilities():
  """Each rule's trajectories sum to one; random order has six each."""
  for rule in RULES:
    assert trajectories(rule)[-1].sum() == pytest.approx(1, abs=1e-5)
  assert len(trajectories('random')[0]) == 6 * 27
  assert len(trajectories('left')[0]) == 27
  assert 0 < trajectories('threshold')[2].mean() < 1


MANY = 20000  # draws of masks for each completion
WEIGHT = (REWARD - REWARD.mean()) / len(REWARD)


def test_residual_is_unbiased_with_fresh_masks():
  """Off policy too; under one mask for both its noise pulls it aside."""
  hp = dict(alpha=0.3, draws=2, copies=MANY)
  assert error(*reweighed_gradient('residual', True, **hp)) < 0.03
  assert error(*reweighed_gradient('residual', False, **hp)) > 0.1


def test_vrpo_is_biased_by_its_noise():
  """The sigmoid of a noisy ELBO: less so with more draws."""
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
    ('gdpo', 1 / L, dict(draws=2)),
    ('coupled_grpo', 1, dict(variant='elbo')),
    ('gdsd', 20 / L, {}),
    ('residual', 1, {}),
    ('vrpo', 1, {}),
  ],
)
def test_elbo_gradients(name, scale, hp):
  """On policy the mean over masks is the weighted gradient of exact ELBOs."""
  got = gradient(name, OUTPUTS, WEIGHT, copies=MANY, **hp)
  assert error(got, scale * elbo_gradient(WEIGHT)) < 0.03


def test_rounded_counts_are_biased():
  """GDPO's rounded counts are off by far more than noise at three tokens."""
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
def test_policy_gradients(name, rule, hp):
  """Times the number of steps it is the gradient of the expected reward."""
  tokens, p, record = record_of(rule)
  steps = record['order'].max(1) + 1
  assert np.ptp(steps) == 0
  copies = 1 if hp.get('choose') in (None, 'each') else 2000
  got = steps[0] * gradient(name, tokens, p * reward_of(tokens), record, copies, **hp)
  exact = policy_gradient(rule)
  assert error(got, exact) < (2e-4 if copies == 1 else 0.03)


def test_positions_have_a_gradient():
  """Without its position term MAPG is not the gradient of its sampler."""
  tokens, p, record = record_of('luce')
  got = 2 * gradient(
    'mapg', tokens, p * reward_of(tokens), record, choose='each', draws=0, places=False
  )
  assert error(got, policy_gradient('luce')) > 0.1


def test_fork_is_the_part_of_its_tokens():
  """Exact for fallbacks, the rest taken as given; nothing else is moved."""
  tokens, p, record = record_of('threshold')
  got = gradient('fork_grpo', tokens, p * reward_of(tokens), record, draws=L)
  forked, order = record['fallback'], record['order']

  def value(theta):
    total = 0.0
    for step in range(L):
      states = jnp.where(order >= step, M, tokens)
      now = logp_at(theta, states, jnp.asarray(tokens))
      own = jnp.sum(jnp.where((order == step) & forked, now, 0.0), axis=1)
      total += own / np.maximum(forked.sum(1), 1)
    return jnp.sum(p * reward_of(tokens) * total)

  assert error(got, np.asarray(jax.grad(value)(THETA))) < 2e-4


# Cosines with the gradient of E[r] of the random-order sampler: measured once.
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


def test_measured_bias():
  """Not one is the random-order policy's gradient; how near they come."""
  tokens, p, record = record_of('random')
  exact = policy_gradient('random')
  weight = p * (reward_of(tokens) - np.sum(p * reward_of(tokens)))
  found = {
    name: cosine(gradient(name, tokens, weight, record, 500, **hp), exact)
    for name, hp in BIASED.items()
  }
  assert all(0 < value < 0.999 for value in found.values())
  whole = cosine(
    gradient('agrpo', tokens, weight, record, choose='each', draws=0), exact
  )
  assert whole > 0.9999


def test_the_pick_and_its_law_agree():
  """Frequencies of the sampler's plackett_luce are the recorded law."""
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
  taken = np.asarray(
    picks.pick_plackett_luce(look, SampleConfig(4, 4, 2, rank_temperature=TAU))
  )
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
