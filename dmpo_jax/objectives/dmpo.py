"""DMPO: match the policy to p*(x|q) ~ p_ref(x|q) exp(r(x)/alpha).

Distribution Matching Policy Optimization, arXiv 2510.08233. Over a group of
completions of one prompt, drawn from p_old:

  w = softmax_g( c (log p_ref - log p_old + r/alpha) )      alpha > 0
  w = softmax_g( c r )                                      alpha = 0
  weight = w - strength * baseline

  loss = sum_g weight_g 1/K sum_k 1/m_k sum_masked -log p_theta(x_i|q, x_masked)

`weight` is fixed when the buffer is weighed, except under the 'model' baseline. c < 1
is the proximal form: its target is p_old^(1-c) p_ref^c exp(c r/alpha). `best` scales
groups by how near they come to the target's mass (`coverage`; ours).

masks = rounds trains the recorded states instead of random ones (ours):
-sum_g weight_g log p^F(x_g) / L, with p^F the law of a sampler that unmasks in the
recorded order. With target weights that is the maximum-likelihood fit of this law to
p*; random masks fit all orders.

Where we differ from the released code (dmpo_trainer.py), on purpose:
* c by ESS, the reported ESS, the group mean and the softmax of the 'model' baseline
  are taken over the whole group. The release takes them over the completions that one
  process happens to hold (:448-461, :166-178).
* c by ESS is found by bisection (ESS falls with c), not by scipy from 0.5.
* `loss_tail=False` masks only up to the first EOS. The release inverts an int mask and
  so indexes rows (:144-146).
* DDO: its weights sum to one over a group and are summed, not averaged again, so that
  both terms have equal scale; gaps are means over copies (:186-203). With `antithetic`
  its two halves are complements, hence not independent, and under common masks the
  on-policy gaps are each other's negative: `problems` refuses both. It has no
  baseline. Groups that count less do so in both terms.
* alpha = -1 (crashes in the release, :462-471) is refused.
* Sums over a group are averaged over the prompts of the batch. The release's scale
  depends on the batch of a process (:184).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dmpo_jax import logprob, masking
from dmpo_jax.objectives import shared
from dmpo_jax.rng import AnyKey
from dmpo_jax.types import (
  Array,
  FloatB,
  FloatBG,
  FloatR,
  FloatRKL,
  IntR,
  Masks,
  Objective,
  Scored,
  Text,
  TrainBatch,
  ViewLogp,
  Wants,
  to_groups,
  to_rows,
)

BASELINES = ('none', 'group', 'individual', 'model')


@dataclasses.dataclass(frozen=True)
class Config(shared.Settings):
  OWN = {
    **dict.fromkeys(('alpha', 'strength', 'ddo_alpha'), shared.least(0)),
    **dict.fromkeys(('coef', 'ddo_beta'), shared.above(0)),
    'baseline': shared.one_of(*BASELINES),
    'loss': shared.one_of('wdce', 'ddo'),
    'masks': shared.one_of('random', 'order', 'rounds'),
    'ess': shared.chance,
  }
  WHOLE_TEXT = masking.WHOLE_TEXT
  alpha: float = 0.04  # temperature of the target; 0 = weigh by the reward alone
  coef: float = 1.0  # proximal coefficient c in (0, 1]; > 0 where alpha = 0
  ess: float = 0.0  # c per group for this effective size in (0, 1); 0 = coef as given
  baseline: str = 'individual'  # wdce subtracts: none | group | individual | model
  strength: float = 1.0  # factor of the baseline
  best: float = 0.0  # largest reward, scales groups far from it down; 0 = off
  loss: str = 'wdce'  # wdce (denoising cross-entropy) | ddo (discriminative)
  ddo_alpha: float = 1.0  # ddo: factor of the term that pushes down
  ddo_beta: float = 1.0  # ddo: inverse temperature of the ELBO gap
  # Masked copies: random counts | order (of one random order of the tokens) | rounds
  # (the recorded ones: of attention blocks, else the row's steps).
  masks: str = 'random'
  draws: int = 4  # K masked copies of a completion per update
  spread: bool = False  # stratify the masked counts over a completion's copies
  low: float = 0.1  # mask ratio ~ U(low, high)
  high: float = 1.0  # the release's value; its comment says 0.9
  antithetic: bool = True  # the second half of the copies is the complement
  loss_tail: bool = True  # train the tokens sampled after the first EOS
  common_masks: bool = False  # model: log p_old under the loss's own masks

  def idle(self) -> dict[str, str]:
    ddo, model = self.loss == 'ddo', self.baseline == 'model'
    random = self.masks == 'random'
    subtracts = self.baseline != 'none' and not ddo
    return shared.without_effect(
      ('coef', not self.ess, 'objective.ess = 0'),
      ('baseline', not ddo, 'objective.loss = wdce'),
      ('strength', subtracts, 'objective.loss = wdce, with a baseline'),
      ('ddo_alpha ddo_beta', ddo, 'objective.loss = ddo'),
      ('common_masks', model, 'objective.baseline = model'),
      ('spread low high antithetic', random, 'objective.masks = random'),
    )

  def problems(self) -> list[str]:
    bad = super().problems()
    if self.coef > 1 and self.alpha:
      bad.append(
        f'objective.coef = {self.coef} must be in (0, 1] (with objective.alpha = 0: '
        'above 0)'
      )
    if self.best and not self.alpha:
      bad.append(f'objective.best = {self.best} needs objective.alpha > 0')
    random = self.masks == 'random'
    antithetic, spread = random and self.antithetic, random and self.spread
    if antithetic and self.draws % 2:
      bad.append(
        f'objective.draws = {self.draws} must be even with objective.antithetic=True: '
        'masks come in pairs of complements'
      )
    if spread and self.draws < 2 + 2 * antithetic:
      bad.append(
        f'objective.spread = True needs objective.draws >= 2, or >= 4 with '
        f'objective.antithetic=True; it is {self.draws}'
      )
    right = 0 <= self.low < self.high <= 1
    bad += shared.rates(self, right, '0 <= low < high <= 1')
    model = self.loss == 'wdce' and self.baseline == 'model'
    if not random and (self.loss == 'ddo' or model and not self.common_masks):
      bad.append(
        f'objective.masks = {self.masks} compares with log p_old under masks of its '
        'own: set objective.loss = wdce, and objective.common_masks = True with '
        'objective.baseline = model'
      )
    dependent = antithetic or spread or self.common_masks
    if self.loss == 'ddo' and (dependent or self.draws % 2):
      bad.append(
        'objective.loss = ddo needs independent halves of an even number of copies: '
        'set objective.antithetic=False, objective.spread=False, '
        'objective.common_masks=False'
      )
    return bad


def target_weights(
  reward_BxG: FloatBG, log_rnd_BxG: FloatBG, alpha: float, coef: Any = 1.0
) -> tuple[FloatBG, FloatBG]:
  """Returns (w, w under negated rewards); each group's weights sum to one.

  log_rnd = log p_ref - log p_old, nats; coef is a scalar or (B,). Paper equation of
  the target; dmpo_trainer.py:456-460. ValueError if alpha < 0.
  """
  if alpha < 0:
    raise ValueError(f'alpha = {alpha} must be >= 0')
  coef = jnp.reshape(jnp.asarray(coef, jnp.float32), (-1, 1))
  if alpha == 0:
    plus, minus = reward_BxG, -reward_BxG
  else:
    tilt = reward_BxG / alpha
    plus, minus = log_rnd_BxG + tilt, log_rnd_BxG - tilt
  return jax.nn.softmax(coef * plus, -1), jax.nn.softmax(coef * minus, -1)


def effective_size(weight_BxG: FloatBG) -> FloatB:
  """Returns ESS / G = 1 / (G sum w^2): 1 = all equal, 1/G = one holds everything."""
  return 1 / (weight_BxG.shape[-1] * jnp.sum(weight_BxG**2, axis=-1))


def adaptive_coef(
  reward_BxG: FloatBG, log_rnd_BxG: FloatBG, alpha: float, ess: float
) -> FloatB:
  """Returns c in [0.01, 0.99] whose weights have the effective size `ess`.

  The effective size falls as c grows, so bisection finds it. Where even the ends miss
  it, the nearer end is returned. dmpo_trainer.py:629-676.
  """

  def halve(_, ends):
    low, high = ends
    middle = (low + high) / 2
    weight, _ = target_weights(reward_BxG, log_rnd_BxG, alpha, middle)
    flat = effective_size(weight) > ess  # too flat: c may grow
    return jnp.where(flat, middle, low), jnp.where(flat, high, middle)

  ends = jnp.full(reward_BxG.shape[:1], 0.01), jnp.full(reward_BxG.shape[:1], 0.99)
  low, high = jax.lax.fori_loop(0, 30, halve, ends)
  return (low + high) / 2


def coverage(reward_BxG: FloatBG, alpha: float, best: float) -> Array:
  """Returns how near a group's best comes to the target's mass, (B, 1) in (0, 1].

  p* of a perfect completion exceeds that of the group's best by
  exp((best - max r) / alpha). A group without a perfect completion has weights that
  sum to one all the same and would teach the least bad; this factor scales them down.
  Ours, not the paper's.
  """
  gap = jnp.max(reward_BxG, axis=-1, keepdims=True) - best
  return jnp.exp(jnp.minimum(gap, 0.0) / alpha)


def weigh(scored: Scored, hp: Config) -> tuple[FloatBG, dict, dict]:
  """Returns signed weights, the target weights as own['target'], and metrics."""
  log_rnd = jnp.zeros_like(scored.reward)
  if hp.alpha:
    log_rnd = scored.logp_ref - scored.logp_old
  coef = hp.coef
  if hp.ess:
    coef = adaptive_coef(scored.reward, log_rnd, hp.alpha, hp.ess)
  # A cost in nats, as a reward: with alpha = 0 the exponent is coef times the reward.
  unit = hp.alpha or 1 / jnp.reshape(jnp.asarray(coef, jnp.float32), (-1, 1))
  paid = scored.reward - unit * scored.cost_of()
  target, negative = target_weights(paid, log_rnd, hp.alpha, coef)
  baseline = {'group': 1 / target.shape[-1], 'individual': negative}
  weight = target - hp.strength * baseline.get(hp.baseline, 0.0)
  if hp.loss == 'ddo':  # its second term takes all completions alike
    weight = jnp.full_like(target, 1 / target.shape[-1])
  scale = jnp.ones_like(target[:, :1])
  if hp.best:
    scale = coverage(scored.reward, hp.alpha, hp.best)
  metrics = {
    'ess': jnp.mean(effective_size(target)),
    'coef': jnp.mean(coef),
    'log_rnd_std': jnp.mean(jnp.std(log_rnd, axis=-1)),
    'coverage': jnp.mean(scale),
    'weight_abs': jnp.mean(jnp.sum(jnp.abs(weight * scale), axis=-1)),
  }
  return weight * scale, {'target': target * scale}, metrics


def reweigh(elbo_R: FloatR, batch: TrainBatch, group: int, hp: Config) -> FloatR:
  """Subtracts the 'model' baseline: softmax_g(log p_theta - log p_old), no gradient.

  These are self-normalised importance weights of the current policy: the control
  variate whose expectation vanishes under p_theta. dmpo_trainer.py:166-174.
  """
  gap = to_groups(elbo_R - batch.old.elbo, group)
  baseline = jax.nn.softmax(jax.lax.stop_gradient(gap), axis=-1)
  target = batch.own['target']
  mass = jnp.sum(to_groups(target, group), -1, keepdims=True)
  return target - hp.strength * to_rows(baseline * mass)


def draw(key: AnyKey, row_R: IntR, text: Text, hp: Config) -> Masks:
  """Draws the K masked copies of each completion.

  The mask ratio is U(low, high); with `antithetic` that of the second half is one minus
  it. `spread` keeps the law of each copy, and so the expectation of the loss. On (0, 1)
  all counts 0..L are equally likely, and the expectation of 1/m times the masked sum is
  the ELBO over L + 1.

  masks = order reads `draws` places of one random order of a block's tokens (of all
  tokens, where the model sees the whole text), and masks what comes later in it: the
  ELBO. masks = rounds reads `draws` of the recorded rounds: the log-prob of the
  completion along its recorded states. Both are exact in attention blocks of at most
  `draws` tokens, and unbiased in longer ones.
  """
  if hp.masks != 'random':
    return draw_rounds(key, row_R, text, hp)
  kind = masking.draw_even if hp.spread else masking.draw_bernoulli
  rates, canvas = (hp.low, hp.high), text.canvas
  if canvas.block and not hp.loss_tail:
    free = masking.free_of(canvas, row_R) & text.completion
    return kind(key, row_R, canvas._replace(free=free), hp.draws)
  masks = kind(key, row_R, canvas, hp.draws, rates, hp.antithetic)
  return masks if hp.loss_tail else masking.restrict(masks, text.completion)


def draw_rounds(key: AnyKey, row_R: IntR, text: Text, hp: Config) -> Masks:
  """Draws the states before the places of one random order, or the recorded rounds."""
  canvas = text.canvas
  counted = masking.free_of(canvas, row_R) & (text.completion | hp.loss_tail)
  if hp.masks == 'rounds':
    rounds, most = shared.recorded_rounds(text.record.order, canvas.block)
    return shared.draw_rounds(key, row_R, rounds, counted, most, hp.draws)
  return shared.draw_order(key, row_R, canvas._replace(free=counted), hp.draws)


def wdce(logp_RxKxL: FloatRKL, masks: Masks, weight_R: FloatR) -> Array:
  """Returns the weighted denoising cross-entropy: a sum over rows.

  sum_r weight_r 1/K sum_k 1/max(m, 1) sum_masked -logp (dmpo_trainer.py:150-184). In
  attention blocks, each with its own count m_b of W_b free tokens, 1/m becomes
  (W_b / m_b) / L. Of an order or of rounds it is that of the tokens read, over L. logp
  must be 0 where not masked.
  """
  if masks.weight.shape[-1] > 1:
    nll = -logprob.copy_sums(logp_RxKxL, masks.weight) / logp_RxKxL.shape[-1]
  else:
    nll = -jnp.sum(logp_RxKxL, axis=-1) / masking.masked_count(masks.masked)
  return jnp.sum(weight_R * jnp.mean(nll, axis=-1))


def ddo(now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Config) -> Array:
  """Returns the direct discriminative loss on the gaps ELBO_theta - ELBO_old.

  -sum w log s(beta gap_1) - a/G sum log s(-beta gap_2) per group, each gap from its
  own half of the copies (dmpo_trainer.py:186-203).
  """
  half = masks.weight.shape[1] // 2
  gap = [
    logprob.seq_elbo(now.logp[:, part], masks.weight[:, part]) - batch.old.elbo
    for part in (slice(half), slice(half, None))
  ]
  up = batch.own['target'] * jax.nn.log_sigmoid(hp.ddo_beta * gap[0])
  down = batch.weight * jax.nn.log_sigmoid(-hp.ddo_beta * gap[1])
  return -jnp.sum(up + hp.ddo_alpha * down)


def loss(now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Config) -> tuple:
  """Returns (sum over rows / norm, metrics that add up over microbatches)."""
  if hp.loss == 'ddo':
    value = ddo(now, masks, batch, hp)
  else:
    value = wdce(now.logp, masks, batch.weight)
  nll = -jnp.sum(now.logp) / (masks.masked.shape[1] * batch.total)
  return value / batch.norm, {'nll': nll}


def wants(hp: Config) -> Wants:
  """ddo and the 'model' baseline compare with the ELBO of the old policy.

  Of recorded rounds log-probs are the sampling law's.
  """
  rounds = hp.masks == 'rounds'
  model = hp.loss == 'wdce' and hp.baseline == 'model'
  return Wants(
    sequence=('old', 'ref') if hp.alpha else (),
    elbo=('old',) if model or hp.loss == 'ddo' else (),
    common_masks=hp.common_masks,
    reweigh=model,
    records=() if rounds else None,
    recorded=not rounds,
    law=rounds,
  )


def turned(hp: Config) -> float:
  """Returns the factor of the turned reward's weights (Objective.strength)."""
  subtracts = hp.baseline == 'individual' and hp.loss == 'wdce'
  return hp.strength if subtracts else 0.0


OBJECTIVE = Objective(Config, wants, draw, weigh, loss, reweigh, strength=turned)
