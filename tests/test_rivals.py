"""The loss of every objective but DMPO against a NumPy version of its formula.

The NumPy versions loop over rows, copies and positions in float64, from the papers'
formulas. Masks come from each objective's own `draw`.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax import masking, types
from dmpo_jax.objectives import OBJECTIVES, egspo, shared, spg, vrpo
from dmpo_jax.sampler import picks
from dmpo_jax.types import (
  Canvas,
  Record,
  Scored,
  Text,
  TrainBatch,
  ViewLogp,
  Views,
  to_rows,
)

B, G, R, L, P, W = 2, 4, 8, 8, 3, 4
RNG = np.random.default_rng(0)
REWARD = np.array([[0, 2, 1, 2], [1, 0, 0, 3]], np.float32)
LENGTH = RNG.integers(3, L + 1, R)
COMPLETION = np.arange(L)[None] < LENGTH[:, None]
WORDS = COMPLETION & (np.arange(L) < 6)
# Two tokens a step, block by block.
ORDER = np.concatenate(
  [np.argsort(RNG.random((R, W)), 1) // 2 + 2 * block for block in range(L // W)],
  axis=1,
)
LOGP = -RNG.exponential(size=(R, L))
CONFIDENCE = RNG.random((R, L))
ENTROPY = RNG.random((R, L))
# Both tokens of a step have one flag, and one log-prob of their positions.
FALLBACK = np.take_along_axis(RNG.random((R, L)) < 0.5, ORDER, 1)
PLACE = np.take_along_axis(-RNG.random((R, L)), ORDER, 1)
MORE = {'entropy': ENTROPY, 'fallback': FALLBACK, 'place': PLACE}
KEY = jax.random.key(7)


def close(a, b, tol=2e-5):
  np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


def text_of(completion=COMPLETION, record=None, block=0):
  """Returns the Text of rows with whole prompts; block: the attention block."""
  rows, words = len(completion), completion & (np.arange(L) < 6)
  prompt = jnp.ones((rows, P), bool)
  return Text(
    jnp.asarray(completion),
    jnp.asarray(words),
    prompt,
    W,
    Canvas(len(completion[0]), block),
    record,
  )


def scored(**more):
  return Scored(jnp.asarray(REWARD), jnp.asarray(LENGTH.reshape(B, G)), **more)


class Case:
  """One objective with its masks, log-probs and batch, in JAX and in NumPy.

  The batch holds what the objective asks for and nothing else.
  """

  def __init__(self, name, block=0, **changes):
    self.objective = OBJECTIVES[name]
    self.hp = self.objective.Config(**changes)
    assert self.hp.problems() == []
    self.wants = self.objective.wants(self.hp)
    record = None
    if self.wants.records is not None:
      more = {name: MORE[name] for name in self.wants.records}
      record = jax.tree.map(jnp.asarray, Record(ORDER, LOGP, CONFIDENCE, more))
    text = text_of(record=record, block=block)
    self.masks = self.objective.draw(KEY, jnp.arange(R), text, self.hp)
    self.masked = np.asarray(self.masks.masked)
    self.K = self.masked.shape[1]
    self.weight = np.asarray(self.masks.weight, np.float64)[..., 0]
    self.counted = self.masked
    if self.masks.counted is not None:
      self.counted = np.broadcast_to(self.masks.counted, self.masked.shape)
    self.draw_numbers(np.random.default_rng(1))
    guess = jnp.asarray(self.guess) if self.wants.guess else None
    known = scored(guess=guess, record=record, block=block)
    weight, own, _ = self.objective.weigh(known, self.hp)
    self.batch = TrainBatch(
      tokens=None,
      valid=None,
      completion=jnp.asarray(COMPLETION),
      row=jnp.arange(R),
      weight=to_rows(weight),
      own={name: to_rows(x) for name, x in own.items()},
      norm=jnp.float32(B),
      total=jnp.float32(R),
      record=record,
      old=self.views('old', self.old, {'centred': self.centred_old}),
      ref=self.views('ref', self.ref, {}),
    )

  def draw_numbers(self, rng):
    """Draws log-probs: those of old and ref near, so that some ratios are clipped."""
    only_masked = lambda x: np.where(self.masked, x, 0.0)
    draw = lambda: only_masked(-rng.exponential(size=self.masked.shape))
    near = lambda x: only_masked(x + 0.4 * rng.normal(size=self.masked.shape))
    self.now, self.centred, self.centred_old, self.score = (draw() for _ in range(4))
    self.old, self.ref = near(self.now), near(self.now)
    self.guess = rng.random((B, G, self.K)).astype(np.float32)
    self.elbo_old, self.elbo_ref = self.elbo(self.old), self.elbo(self.ref)

  def elbo(self, logp):
    return np.mean(self.weight * logp.sum(-1), axis=1)

  def views(self, policy, logp, reads):
    """Returns the Views of a policy, with what is asked for."""
    view = Views()
    if policy in self.wants.elbo:
      view = view._replace(elbo=jnp.asarray(self.elbo(logp)))
    if policy in self.wants.views:
      reads = {name: jnp.asarray(x) for name, x in reads.items()}
      view = view._replace(logp=jnp.asarray(logp), reads=reads)
    return view

  def loss(self, batch=None):
    reads = {'centred': self.centred, 'score': self.score}
    now = ViewLogp(
      jnp.asarray(self.now),
      {name: jnp.asarray(reads[name]) for name in self.wants.reads},
    )
    return float(self.objective.loss(now, self.masks, batch or self.batch, self.hp)[0])

  def tokens(self):
    """Returns (r, k, i) of the tokens that count."""
    return zip(*np.nonzero(self.counted), strict=True)


def ppo(gap, advantage, low, high):
  rho = np.exp(gap)
  return min(rho * advantage, np.clip(rho, 1 - low, 1 + high) * advantage)


def advantage_of(kind):
  """Returns advantages (R,) by their definitions, one group at a time."""
  out = []
  for group in REWARD.astype(np.float64):
    for g in range(G):
      others = np.delete(group, g)
      out.append(
        {
          'mean': group[g] - group.mean(),
          'loo': group[g] - others.mean(),
          'zscore': (group[g] - group.mean()) / (group.std() or 1),
        }[kind]
      )
  return np.array(out)


def k3(gap):
  return np.exp(-gap) + gap - 1


# --- what is shared


@pytest.mark.smoke
@pytest.mark.parametrize('kind', shared.ADVANTAGES)
def test_advantages_match_their_definitions(kind):
  """A group of equal rewards has advantages of exactly zero."""
  close(shared.advantages(REWARD, kind).ravel(), advantage_of(kind))
  for reward in (1, 0.1, 1 / 3):  # whose mean is not the same in float32
    equal = jnp.full((1, 8), float(reward))
    assert not np.asarray(jax.jit(lambda x: shared.advantages(x, kind))(equal)).any()


def test_surrogate_is_the_clipped_one():
  """It is min(rho A, clip(rho) A); at a tie it has the gradient of rho A."""
  gaps = np.linspace(-1, 1, 9)
  for gap, a in itertools.product(gaps, (-2.0, 0.0, 1.5)):
    got = shared.surrogate(jnp.float32(gap), jnp.float32(a), 0.2, 0.3)
    close(got, ppo(gap, a, 0.2, 0.3))
  slope = jax.grad(shared.surrogate)
  for a in (-2.0, 1.5):
    assert float(slope(0.0, a, 0.0, 0.0)) == a
    assert float(slope(0.1 * np.sign(a), a, 0.0, 0.0)) == 0  # already moved that way
    assert float(slope(-0.1 * np.sign(a), a, 0.0, 0.0)) != 0
  # Value and gradient are finite for gaps of any size and sign.
  far = jax.vmap(jax.value_and_grad(shared.surrogate), (0, 0, None, None))(
    jnp.array([300.0, -300.0, 300.0]), jnp.array([1.0, -1.0, -1.0]), 0.2, 0.2
  )
  assert np.isfinite(far).all()


def test_kl_estimators_have_the_right_mean_and_gradient():
  """k1 and k3 have the KL as mean, k2 its second order."""
  now = np.log([0.5, 0.3, 0.2])
  ref = np.log([0.45, 0.35, 0.2])
  exact = np.sum(np.exp(now) * (now - ref))
  for kind in ('k1', 'k3'):
    assert np.sum(np.exp(now) * shared.kl(kind, now, ref)) == pytest.approx(
      exact, rel=1e-5
    )
  assert np.sum(np.exp(now) * shared.kl('k2', now, ref)) == pytest.approx(
    exact, rel=0.1
  )
  # On policy the mean gradient is that of the KL. k3 is finite for large gaps.
  at = jnp.array([0.3, -0.2, 0.5])
  law = jax.nn.softmax(at)
  whole = jax.grad(
    lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - ref))
  )(at)
  for kind in ('k1', 'k2'):
    close(
      jax.grad(
        lambda x, kind=kind: jnp.sum(law * shared.kl(kind, jax.nn.log_softmax(x), ref))
      )(at),
      whole,
      1e-4,
    )  # noqa: B023
  far, slope = jax.value_and_grad(lambda x: shared.kl('k3', x, 0.0))(-500.0)
  assert np.isfinite(far) and slope < -1e8
  close(shared.kl('k3_ratio', now, ref, ref), np.exp(now - ref) * k3(now - ref))


def test_scales_make_means():
  """They make means over completions, or over the tokens of groups that count."""
  close(shared.per_row(scored()), np.full((B, G), 1 / G))
  close(shared.per_token(scored()), np.full((B, G), B / LENGTH.sum()))
  live = scored(live=jnp.array([False, True]))
  close(shared.per_token(live), np.full((B, G), 1 / LENGTH[G:].sum()))


def test_draw_random_is_uniform_over_counts():
  """The weight of m masked positions is L / m. No mask is empty."""
  masks = shared.draw_random(KEY, jnp.arange(2000), types.Canvas(5), 3)
  count = np.asarray(masks.masked).sum(-1)
  share = np.bincount(count.ravel(), minlength=6) / count.size
  close(share[1:], np.full(5, 0.2), 0.02)
  assert share[0] == 0
  close(shared.step_weight(masks), 5 / count)


@pytest.mark.parametrize('choose', shared.CHOOSE)
@pytest.mark.parametrize('draws', [3, 12])
def test_chosen_steps_estimate_the_mean_over_all(choose, draws):
  """The weighted mean over copies estimates the mean over the wanted steps."""
  rng = np.random.default_rng(2)
  wanted = np.array([[1, 0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0, 0, 0], [0] * 8], bool)
  entropy = rng.random((3, 8)).astype(np.float32)
  value = rng.normal(size=(3, 8))
  copies = 1 if choose == 'top' else 3000
  tile = lambda x: jnp.repeat(jnp.asarray(x), copies, axis=0)
  step, weight = shared.choose_steps(
    KEY, jnp.arange(3 * copies), tile(wanted), tile(entropy), choose, draws
  )
  if choose in ('each', 'top'):
    draws = min(draws, 8)
  assert step.shape == weight.shape == (3 * copies, draws)
  got = np.mean(
    np.asarray(weight)
    * np.take_along_axis(np.asarray(tile(value)), np.asarray(step), 1),
    1,
  ).reshape(3, copies)
  for r in range(3):
    steps = np.nonzero(wanted[r])[0]
    if choose == 'top':
      steps = steps[np.argsort(-entropy[r][steps])][:draws]
    want = value[r][steps].mean() if len(steps) else 0.0
    assert got[r].mean() == pytest.approx(want, abs=0.03)
    exact = len(steps) <= draws and choose in ('each', 'top')
    assert not exact or np.ptp(got[r]) < 1e-6
    used = np.asarray(step).reshape(3, copies, draws)[r]
    live = np.asarray(weight).reshape(3, copies, draws)[r] > 0
    assert set(used[live]) <= set(steps)


def test_draw_steps_masks_what_a_step_or_a_later_one_unmasks():
  """The tokens of the step itself are counted; eos_stop leaves a tail masked."""
  hp = OBJECTIVES['just_grpo'].Config(draws=0)
  order = ORDER.copy()
  order[0, -2:] = -1  # never unmasked: eos_stop
  record = Record(jnp.asarray(order), None, None, {})
  wanted = shared.shown_steps(record, jnp.asarray(COMPLETION))
  masks = shared.draw_steps(KEY, jnp.arange(R), record, wanted, hp)
  weight = shared.step_weight(masks)
  for r in range(R):
    steps = sorted(
      {order[r, i] for i in range(L) if COMPLETION[r, i] and order[r, i] >= 0}
    )
    for k in range(L):
      if k >= len(steps):
        assert weight[r, k] == 0 and not masks.counted[r, k].any()
        continue
      close(weight[r, k], L / len(steps))
      np.testing.assert_array_equal(
        masks.masked[r, k], (order[r] >= steps[k]) | (order[r] < 0)
      )
      np.testing.assert_array_equal(masks.counted[r, k], order[r] == steps[k])


def test_draw_prompt_masks_real_tokens_at_its_rate():
  """The draw does not depend on the padding before the prompt."""
  valid = jnp.ones((400, 6), bool).at[:, 0].set(False)
  got = masking.draw_prompt(KEY, jnp.arange(400), valid, 2, 0.15)
  assert not got[:, :, 0].any()
  assert np.asarray(got)[:, :, 1:].mean() == pytest.approx(0.15, abs=0.02)
  more = masking.draw_prompt(
    KEY, jnp.arange(400), jnp.pad(valid, ((0, 0), (4, 0))), 2, 0.15
  )
  np.testing.assert_array_equal(more[:, :, 4:], got)


# --- the formulas


@pytest.mark.parametrize('beta', [0.0, 0.04])
def test_diffu_grpo(beta):
  """PPO and k3 on tokens of one fully masked copy, a mean over the batch's tokens."""
  c = Case('diffu_grpo', beta=beta)
  assert c.masked.all() and c.K == 1
  a, total = advantage_of('mean'), 0.0
  for r, k, i in c.tokens():
    total -= ppo(c.now[r, k, i] - c.old[r, k, i], a[r], 0.5, 0.5)
    total += beta * k3(c.now[r, k, i] - c.ref[r, k, i])
  close(c.loss(), total / COMPLETION.sum())


@pytest.mark.parametrize('strength', [1.0, 0.0])
def test_wd1(strength):
  """Sums of log-probs are weighed by two softmaxes of the advantage over psi."""
  c = Case('wd1', alpha=0.8, strength=strength)
  a, total = advantage_of('mean').reshape(B, G), 0.0
  e = np.exp(a / 0.8), np.exp(-a / 0.8)
  w = e[0] / e[0].sum(1, keepdims=True), e[1] / e[1].sum(1, keepdims=True)
  for r, k, i in c.tokens():
    b, g = divmod(r, G)
    total += (-w[0][b, g] + strength * w[1][b, g]) * c.now[r, k, i]
  close(c.loss(), total / B)


@pytest.mark.parametrize(
  'changes',
  [
    {},
    dict(clip=0.0, beta=0.1),
    dict(beta=0.1, kl='k1', clip_high=0.5),
    dict(beta=0.1, kl='k3', masks='random', advantage='mean'),
  ],
)
def test_espo(changes):
  """The ratio is that of sequences to the power 1/L; the KL is divided by L."""
  c = Case('espo', **changes)
  hp, a, total = c.hp, advantage_of(changes.get('advantage', 'loo')), 0.0
  now = c.elbo(c.now)
  for r in range(R):
    total -= (
      ppo((now[r] - c.elbo_old[r]) / L, a[r], hp.clip, hp.clip_high or hp.clip) / R
    )
    gap = now[r] - c.elbo_ref[r]
    kl = {'k1': gap, 'k2': gap**2 / 2, 'k3': k3(gap)}[hp.kl]
    total += hp.beta * kl / L / R
  close(c.loss(), total)


@pytest.mark.parametrize('masks', ['bernoulli', 'rounded'])
def test_gdpo(masks):
  """ELBOs are sums over Gauss nodes; the ratio is of whole ELBOs."""
  c = Case('gdpo', masks=masks, beta=0.05)
  nodes = np.array([0.1127016654, 0.5, 0.8872983346])
  weights = np.array([5, 8, 5]) / 18
  elbo = lambda x: np.sum(weights / nodes * x.sum(-1), axis=1)
  if masks == 'rounded':
    assert (c.masked.sum(-1) == np.maximum(np.round(nodes * L), 1)).all()
  a, total = advantage_of('mean'), 0.0
  now, old, ref = elbo(c.now), elbo(c.old), elbo(c.ref)
  for r in range(R):
    total -= ppo(now[r] - old[r], a[r], 0.2, 0.2) / L / R
    total += 0.05 * (now[r] - ref[r]) ** 2 / 2 / L / R
  close(c.loss(), total, 1e-4)


@pytest.mark.parametrize('variant', ['released', 'unit', 'elbo'])
def test_coupled_grpo(variant):
  """A token's log-prob is a mean over p0, a mask and its complement."""
  c = Case('coupled_grpo', variant=variant, low=0.3, high=0.7)
  a, total = advantage_of('loo'), 0.0
  if variant == 'elbo':
    m = c.masked.sum(-1)
    factor = np.where(m > 0, (L + 1) / np.maximum(m, 1), 0) / 2
    np.testing.assert_array_equal(c.masked[:, 0], ~c.masked[:, 1])
  else:
    assert c.masked[:, 0].all()
    np.testing.assert_array_equal(c.masked[:, 1], ~c.masked[:, 2])
    scale = 1 / 2 if variant == 'released' else 1 / 3
    rate = 1 / (c.weight[:, 1] / c.weight[:, 0])
    assert ((0.3 <= rate) & (rate <= 0.7)).all()
    factor = scale * np.stack([np.ones(R), 1 / rate, 1 / (1 - rate)], 1)
  logp = lambda x, r, i: np.sum(factor[r] * x[r, :, i])
  for r, i in zip(*np.nonzero(COMPLETION), strict=True):
    now, old, ref = (logp(x, r, i) for x in (c.now, c.old, c.ref))
    total -= ppo(now - old, a[r], 0.5, 0.5)
    total += 0.01 * k3(now - ref)
  close(c.loss(), total / COMPLETION.sum(), 1e-4)


@pytest.mark.parametrize('bound', ('elbo', 'eubo', 'mix', 'none'))
@pytest.mark.parametrize('variant', ['released', 'formula'])
def test_spg(bound, variant):
  """The ELBO counts where A > 0, elsewhere the bound; in both variants."""
  c = Case('spg', bound=bound, variant=variant, power=1.5, mix=0.3, draws=4)
  a, total = advantage_of('mean'), 0.0
  for r in range(R):
    sums = [c.now[r, k][c.counted[r, k]].sum() for k in range(4)]
    m = c.counted[r].sum(-1)
    share = m / LENGTH[r]
    upper = []
    for i in range(L):
      mean = np.mean(
        [
          np.exp(1.5 * c.now[r, k, i]) / share[k] if c.counted[r, k, i] else 0.0
          for k in range(4)
        ]
      )
      upper += [np.log(mean) / 1.5] if mean > 0 else []
    if variant == 'released':
      elbo, eubo = np.mean(sums / m), np.mean(upper)
      scale = LENGTH[r] / LENGTH.sum()
    else:
      elbo, eubo, scale = np.mean(sums / share), np.sum(upper), 1 / R
    below = {'elbo': elbo, 'eubo': eubo, 'none': 0.0, 'mix': 0.3 * eubo + 0.7 * elbo}[
      bound
    ]
    total -= a[r] * (elbo if a[r] > 0 else below) * scale
  close(c.loss(), total, 1e-4)


def test_spg_masks_by_blocks():
  """Before the chosen block nothing is masked; after it and after EOS all is."""
  copies, hp = 300, spg.Config(draws=2, mask_prompt=0.0)
  rows, text = jnp.arange(R * copies), text_of(np.repeat(COMPLETION, copies, 0))
  masks = spg.draw(KEY, rows, text, hp)
  masked = np.asarray(masks.masked).reshape(R, copies * 2, L)
  for r in range(R):
    inside = COMPLETION[r]
    assert masked[r][:, ~inside].all()
    # The first block with a mask is the chosen one.
    first = np.argmax(masked[r], 1) // W
    assert set(first) == set(range(-(-LENGTH[r] // W)))
    for block in set(first):
      own = (np.arange(L) // W == block) & inside
      some = masked[r][first == block]
      assert some[:, (np.arange(L) // W > block) & inside].all()
      share = np.bincount(some[:, own].sum(1), minlength=own.sum() + 1)
      assert share[0] == 0
      close(share[1:] / share.sum(), np.full(own.sum(), 1 / own.sum()), 0.15)
  noisy = spg.draw(KEY, rows, text, spg.Config(draws=2))
  clean = ~masked.reshape(-1, 2, L)
  rate = np.asarray(noisy.masked)[clean].mean()
  assert rate == pytest.approx(0.15, abs=0.01)
  assert np.asarray(noisy.prompt).mean() == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize(
  'changes',
  [{}, dict(variant='released', clip=0.1), dict(clip=0.1, beta=0.0), dict(centre=True)],
)
def test_gdsd(changes):
  """The loss is the square of (gap - psi A) of each pair, and a KL on log-probs."""
  c = Case('gdsd', alpha=0.5, **changes)
  hp, a, total = c.hp, advantage_of('loo'), 0.0
  m = c.masked.sum(-1)
  now, old = (c.centred, c.centred_old) if hp.centre else (c.now, c.old)

  def pair(x, r, j):
    out = 0.0
    for k in (j, j + 2):
      w = 1 if hp.variant == 'released' else (L + 1) / m[r, k] if m[r, k] else 0
      out += w * x[r, k].sum() / 2
    return out

  for r, j in itertools.product(range(R), range(2)):
    gap = pair(now, r, j) - pair(old, r, j)
    ends = np.log(1 - hp.clip), np.log(1 + hp.clip)
    if hp.variant == 'released':
      gap = np.clip(gap, *ends) / L if hp.clip else gap / L
    else:
      gap = np.clip(gap / L, *ends) if hp.clip else gap / L
    total += (gap - a[r] / 0.5) ** 2 / R / 2
    far = pair(c.now, r, j) - pair(c.ref, r, j)
    total += hp.beta / L * far**2 / 2 / R / (4 if hp.variant == 'released' else 2)
  close(c.loss(), total, 1e-4)


@pytest.mark.parametrize('per_token', [False, True])
def test_residual(per_token):
  """Its weights are the gradient of alpha/2 (d - A/alpha)^2 by autodiff."""
  c = Case('residual', alpha=0.3, per_token=per_token)
  a = advantage_of('mean').reshape(B, G)
  elbo = c.elbo(c.now)

  def squares(elbo_R):
    gap = (elbo_R - c.elbo_ref) / (L if per_token else 1)
    gap = gap.reshape(B, G)
    gap = gap - gap.mean(1, keepdims=True)
    return jnp.sum(0.3 / 2 * (gap - a / 0.3) ** 2) / R

  weight = c.objective.reweigh(jnp.asarray(elbo), c.batch, G, c.hp)
  want = jax.grad(squares)(jnp.asarray(elbo, jnp.float32))
  close(-np.asarray(weight) / B, want, 1e-4)
  close(
    c.loss(c.batch._replace(weight=weight)),
    -np.sum(np.asarray(weight) * elbo) / B,
    1e-4,
  )


@pytest.mark.parametrize('variant', ['all', 'best'])
def test_vrpo(variant):
  """Its weights are the gradient of DPO's loss on the group's pairs by autodiff."""
  c = Case('vrpo', variant=variant, beta=0.3)
  elbo = c.elbo(c.now)

  def dpo(elbo_R):
    gap, out = (elbo_R - c.elbo_ref).reshape(B, G), 0.0
    for b in range(B):
      r = REWARD[b]
      pairs = [(i, j) for i in range(G) for j in range(G) if r[i] > r[j]]
      if variant == 'best':
        pairs = [(int(np.argmax(r)), int(np.argmin(r)))]
      for i, j in pairs:
        loss = -jax.nn.log_sigmoid(0.3 * (gap[b, i] - gap[b, j]))
        loss -= 0.05 * elbo_R.reshape(B, G)[b, i] / L
        out += loss / len(pairs) / B
    return out

  weight = c.objective.reweigh(jnp.asarray(elbo), c.batch, G, c.hp)
  close(-np.asarray(weight) / B, jax.grad(dpo)(jnp.asarray(elbo, jnp.float32)), 1e-4)
  none = vrpo.pairs(jnp.ones((1, G)), c.hp)
  assert not np.asarray(none).any()


def step_loss(c, a, low, high, beta=0.0):
  """Returns the mean over rows and weighted copies of a step's token terms."""
  total = 0.0
  for r, k, i in c.tokens():
    gap = c.now[r, k, i] - LOGP[r, i]
    term = -ppo(gap, a[r], low, high)
    term += beta * np.exp(gap) * k3(c.now[r, k, i] - c.ref[r, k, i])
    total += c.weight[r, k] * term / c.K / R
  return total


@pytest.mark.parametrize('choose', ['uniform', 'entropy'])
def test_agrpo(choose):
  """Trains steps up to the last one that unmasked a token other than EOS."""
  c = Case('agrpo', choose=choose, draws=6, beta=0.1)
  close(c.loss(), step_loss(c, advantage_of('mean'), 0.2, 0.2, 0.1), 1e-4)
  for r in range(R):
    last = ORDER[r][WORDS[r]].max()
    shown = {ORDER[r, i] for k in range(6) for i in np.nonzero(c.counted[r, k])[0]}
    assert max(shown) <= last
    if choose == 'entropy':  # weight = 1/(T + 1) / p_s
      sums = np.array([ENTROPY[r][ORDER[r] == s].sum() for s in range(last + 1)])
      for k in range(6):
        s = ORDER[r][c.counted[r, k]][0]
        close(c.weight[r, k], sums.sum() / sums[s] / (last + 1), 1e-4)


def test_just_grpo():
  """Trains all tokens, or the few of most entropy, with z-scores."""
  a = advantage_of('zscore')
  c = Case('just_grpo')
  close(c.loss(), step_loss(c, a, 0.2, 0.2), 1e-4)
  fast = Case('just_grpo', choose='top', draws=2)
  close(fast.loss(), step_loss(fast, a, 0.2, 0.2), 1e-4)


def test_fork_grpo():
  """Trains fallback steps alone; a row without one adds nothing."""
  c = Case('fork_grpo', draws=6)
  close(c.loss(), step_loss(c, advantage_of('zscore'), 0.2, 0.2), 1e-4)
  for r, _, i in c.tokens():
    assert FALLBACK[r, i]
  for r in range(R):
    want = {ORDER[r, i] for i in range(L) if FALLBACK[r, i] and COMPLETION[r, i]}
    got = {ORDER[r, i] for k in range(6) for i in np.nonzero(c.counted[r, k])[0]}
    assert got == want


@pytest.mark.parametrize('norm', ['sequence', 'token'])
def test_diffpo(norm):
  """Counts each token once: up to tau given the prompt, after it given the state."""
  c = Case('diffpo', truncate=1.5, norm=norm)
  size = {'sequence': R * LENGTH, 'token': np.full(R, COMPLETION.sum())}[norm]
  a, total = advantage_of('mean'), 0.0
  np.testing.assert_array_equal(c.counted.sum(1), COMPLETION)
  for r in range(R):
    tau = ORDER[r][~c.masked[r, 1]].max()
    np.testing.assert_array_equal(c.masked[r, 1], ORDER[r] > tau)
    assert not (c.counted[r, 0] & c.masked[r, 1]).any()
  for r, k, i in c.tokens():
    fix = min(np.exp(c.old[r, k, i] - LOGP[r, i]), 1.5)
    term = -ppo(c.now[r, k, i] - c.old[r, k, i], a[r] * fix, 0.2, 0.2)
    term += 0.04 * k3(c.now[r, k, i] - c.ref[r, k, i])
    total += term / size[r]
  close(c.loss(), total, 1e-4)


def test_egspo():
  """Trains the steps of most mean entropy, each with its advantage and ratio."""
  c = Case('egspo', draws=2)
  reward = REWARD[..., None] + 0.5 * (REWARD[..., None] - c.guess)
  a = (reward - reward.mean(1, keepdims=True)) / 1.5
  total = 0.0
  for r, k in itertools.product(range(R), range(2)):
    b, g = divmod(r, G)
    at = np.nonzero(c.counted[r, k])[0]
    gap = sum(c.now[r, k, i] - LOGP[r, i] for i in at)
    total -= ppo(gap, a[b, g, k], 0.2, 0.5) / 2 / R
    mean = {s: ENTROPY[r][ORDER[r] == s].mean() for s in set(ORDER[r][COMPLETION[r]])}
    assert ORDER[r, at[0]] in sorted(mean, key=mean.get)[-2:]
  close(c.loss(), total, 1e-4)


def test_egspo_ignores_copies_of_no_step():
  """With fewer steps than copies the rest has weight 0 and is in no mean."""
  guess = np.random.default_rng(0).random((2, 4, 3)).astype(np.float32)
  guess[0, 1, 2] = np.nan
  weight, _, more = egspo.weigh(scored(guess=jnp.asarray(guess)), egspo.Config())
  value = REWARD[..., None] + 0.5 * (REWARD[..., None] - guess)
  close(
    weight, np.nan_to_num((value - np.nanmean(value, 1, keepdims=True)) / 1.5 / 4), 1e-5
  )
  close(more['guess_reward'], np.nanmean(guess), 1e-5)


def plackett_luce(score, taken):
  """Returns the log of the sum over all orders of draws without replacement."""
  total, w = 0.0, np.exp(score)
  for order in itertools.permutations(taken):
    p, left = 1.0, w.sum()
    for i in order:
      p, left = p * w[i] / left, left - w[i]
    total += p
  return np.log(total)


@pytest.mark.parametrize('spread', [0.1, 1.0, 4.0])
def test_plackett_luce_logp_is_the_sum_over_orders(spread):
  """The integral equals the sum, for any number of positions."""
  rng = np.random.default_rng(3)
  for size in (1, 2, 3, 5):
    score = spread * rng.normal(size=5)
    taken = np.zeros(6, bool)
    taken[rng.permutation(5)[:size]] = True
    got = picks.plackett_luce_logp(
      jnp.asarray([*score, 0.3], jnp.float32), jnp.arange(6) < 5, taken
    )
    close(got, plackett_luce(score, np.nonzero(taken)[0]), 1e-4)


@pytest.mark.parametrize('places', [True, False])
def test_mapg(places):
  """Each step has two ratios, of its tokens and of its positions."""
  c = Case('mapg', draws=5, places=places)
  a, total = advantage_of('mean'), 0.0
  for r, k in itertools.product(range(R), range(5)):
    at = np.nonzero(c.counted[r, k])[0]
    gap = sum(c.now[r, k, i] - LOGP[r, i] for i in at)
    value = ppo(gap, a[r], 0.2, 0.2)
    if places:
      block = at[-1] // W
      among = [i for i in range(L) if c.masked[r, k, i] and i // W == block]
      now = plackett_luce(c.score[r, k][among], [among.index(i) for i in at])
      value += ppo(now - PLACE[r, at[0]], a[r], 0.2, 0.2)
    total -= c.weight[r, k] * value / 5 / R
  close(c.loss(), total, 1e-4)


# --- recorded rounds


def rounds_by_hand(block, shrink):
  """Returns the round of each token (R, L): its step's number within its block."""
  out = np.zeros((R, L), int)
  for r, i in itertools.product(range(R), range(L)):
    own = [j for j in range(L) if not block or j // block == i // block]
    out[r, i] = sorted({ORDER[r, j] for j in own}).index(ORDER[r, i]) // shrink
  return out


def round_terms(c, rounds, counted, term):
  """Returns the sum over tokens of term(r, i, now, other view), each read once."""
  copies = int(c.weight.shape[1])
  assert (c.masks.masked == (rounds[:, None] >= np.arange(copies)[:, None])).all()
  total = 0.0
  for r, i in zip(*np.nonzero(counted), strict=True):
    (k,) = np.nonzero(c.counted[r, :, i])[0]
    assert k == rounds[r, i]
    total += term(r, k, i)
  assert c.counted.sum() == counted.sum()
  return total


@pytest.mark.parametrize('norm', ['constant', 'released'])
@pytest.mark.parametrize('block, shrink', [(0, 1), (0, 2), (4, 1), (4, 2), (4, 4)])
def test_tracerl(block, shrink, norm):
  """Every token is read once, in its round; the KL is to the policy that sampled."""
  c = Case('tracerl', block, shrink=shrink, beta=0.1, norm=norm)
  rounds, a = rounds_by_hand(block, shrink), advantage_of('zscore')

  def term(r, k, i):
    gap = c.now[r, k, i] - (c.old[r, k, i] if shrink > 1 else LOGP[r, i])
    return -ppo(gap, a[r], 0.2, 0.2) + 0.1 * k3(gap)

  rows = R
  if norm == 'released':  # a row for each round up to the last trained
    rows = sum(rounds[r][COMPLETION[r]].max() + 1 for r in range(R))
  close(c.loss(), round_terms(c, rounds, COMPLETION, term) / rows / L, 1e-4)


@pytest.mark.parametrize('norm', ['constant', 'released'])
@pytest.mark.parametrize('block', [0, 4])
def test_dipo(block, norm):
  """Ratios are clipped to 0.8 and 1.28; all sampled tokens are trained."""
  c = Case('dipo', block, beta=0.1, norm=norm)
  rounds, a = rounds_by_hand(block, 1), advantage_of('zscore')
  count = [rounds[r].max() + 1 for r in range(R)]
  rows = np.array([sum(count[r // G * G : r // G * G + G]) for r in range(R)])
  # Tokens of a group's rows / W, and the mean over groups; or rows times length.
  size = R * L if norm == 'constant' else B * rows * L / (block or L)

  def term(r, k, i):
    gap, far = c.now[r, k, i] - LOGP[r, i], c.now[r, k, i] - c.ref[r, k, i]
    loss = -ppo(gap, a[r], 0.2, 0.28) + 0.1 * k3(far)
    return loss / (size if norm == 'constant' else size[r])

  every = np.ones((R, L), bool)
  close(c.loss(), round_terms(c, rounds, every, term), 1e-4)


def test_dipo_clips_above_at_another_ratio_than_below():
  gaps = np.log([0.79, 0.81, 1.27, 1.29])
  hp = OBJECTIVES['dipo'].Config()
  slope = jax.vmap(
    jax.grad(lambda gap, a: shared.surrogate(gap, a, *hp.bounds)), (0, None)
  )
  assert (slope(gaps, 1.0) != 0).tolist() == [True, True, True, False]
  assert (slope(gaps, -1.0) != 0).tolist() == [False, True, True, True]


@pytest.mark.parametrize('name', ['tracerl', 'dipo'])
def test_a_constant_norm_has_no_length_bias(name):
  """A token weighs the same in short and long completions, and in all groups."""
  c = Case(name, 4)
  np.testing.assert_allclose(c.batch.own['scale'], 1 / (G * L), rtol=1e-6)
  released = Case(name, 4, norm='released').batch.own['scale']
  assert (released != c.batch.own['scale']).all()


@pytest.mark.parametrize('block', [0, 4])
@pytest.mark.parametrize('draws', [1, 2, 3])
def test_few_rounds_stand_for_all(block, draws):
  """The mean over draws is the sum over all trained tokens; masks are of the rounds."""
  copies = 4000
  tile = lambda x: jnp.repeat(jnp.asarray(x), copies, axis=0)
  value = np.random.default_rng(3).normal(size=(R, L))
  rounds, most = shared.recorded_rounds(tile(ORDER), block)
  np.testing.assert_array_equal(rounds[::copies], rounds_by_hand(block, 1))
  masks = shared.draw_rounds(
    KEY, jnp.arange(R * copies), rounds, tile(COMPLETION), most, draws
  )
  assert masks.masked.shape[1] == draws
  sums = np.asarray(shared.logprob.seq_elbo(tile(value)[:, None], masks.weight))
  sums = sums.reshape(R, copies)
  want = np.sum(value * COMPLETION, axis=1)
  error = sums.std(1) / copies**0.5
  assert (np.abs(sums.mean(1) - want) <= 4 * error + 1e-4).all()
  if draws >= rounds_by_hand(block, 1).max() + 1:
    close(sums, np.broadcast_to(want[:, None], sums.shape), 1e-4)


def test_rounds_of_tokens_that_were_never_masked_count_nothing():
  order = np.where(np.arange(L) < 5, np.arange(L), -1)[None]
  for block, most in ((0, L), (4, 4)):
    rounds, limit = shared.recorded_rounds(jnp.asarray(order), block)
    assert limit == most and (np.asarray(rounds)[0, 5:] == -1).all()
    masks = shared.draw_rounds(
      KEY, jnp.arange(1), rounds, jnp.ones((1, L), bool), limit, 0
    )
    assert not np.asarray(masks.masked)[..., 5:].any()
    assert not np.asarray(masks.weight)[..., 5:].any()
    close(np.asarray(masks.weight).mean(1)[0, :5], np.ones(5))
