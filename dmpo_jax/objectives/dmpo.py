"""DMPO: match the policy to p*(x|q) ~ p_ref(x|q) exp(r(x)/alpha).

Distribution Matching Policy Optimization, arXiv 2510.08233. Over a group of
completions of one prompt, drawn from p_old:

  w = softmax_g( c (log p_ref - log p_old + r/alpha) )      alpha > 0
  w = softmax_g( c r )                                      alpha = 0
  weight = w - strength * baseline

  loss = sum_g weight_g 1/K sum_k 1/m_k sum_masked -log p_theta(x_i|q, x_masked)

`weight` is fixed at rollout time, but for the 'model' baseline. c < 1 is the
proximal form: its target is p_old^(1-c) p_ref^c exp(c r/alpha). `best` scales
groups by how near they come to the target's mass (`coverage`; ours).

Where we differ from the released code (dmpo_trainer.py), on purpose:
* c by ESS, the reported ESS, the group mean and the softmax of the 'model'
  baseline are taken over the whole group; the release takes them over what
  one process happens to hold (:448-461, :166-178).
* c by ESS is found by bisection (ESS falls with c), not by scipy from 0.5.
* `loss_tail=False` masks only up to the first EOS; the release inverts an int
  mask and so indexes rows (:144-146).
* DDO: its weights sum to one over a group and are summed, not averaged again,
  so that both terms have equal scale; gaps are means over draws (:186-203).
  With `antithetic` its two halves are complements, hence not independent, and
  under common masks the gaps on policy are each other's negative: `check`
  refuses both. It has no baseline; groups that count less do so in both terms.
* alpha = -1 (crashes in the release, :462-471) is refused.
* Sums over a group are averaged over the prompts of the batch; the release's
  scale depends on the batch of a process (:184).
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmpo_jax import logprob, masking
from dmpo_jax.types import Objective, to_groups, to_rows

BASELINES = ('none', 'group', 'individual', 'model')


@dataclasses.dataclass(frozen=True)
class Config:
  alpha: float = 0.04  # temperature of the target; 0 = reward alone
  coef: float = 1.0  # c in (0, 1], proximal coefficient
  ess: float = 0.0  # 0 = c as given; else c per group for this ESS in (0, 1)
  baseline: str = 'individual'  # none | group | individual | model
  strength: float = 1.0  # of the baseline
  best: float = 0.0  # the largest reward there is: see `coverage`; 0 = off
  loss: str = 'wdce'  # wdce | ddo
  ddo_alpha: float = 1.0  # scale of the term that pushes down
  ddo_beta: float = 1.0  # inverse temperature of the ELBO gap
  draws: int = 4  # K masked copies of a completion per update
  spread: bool = False  # masked counts spread evenly over the draws
  low: float = 0.1  # mask rate ~ U(low, high)
  high: float = 1.0
  antithetic: bool = True  # second half of the draws = complement
  loss_tail: bool = True  # train the tokens after the first EOS too
  common_masks: bool = False  # model: log p_old under the loss's own masks


def target_weights(reward_BxG, log_rnd_BxG, alpha, coef=1.0):
  """(w, w with the sign of the reward turned), each (B, G), rows sum to one.

  log_rnd = log p_ref - log p_old in nats; coef is a scalar or (B,).
  Paper eq. of the target; dmpo_trainer.py:456-460. ValueError if alpha < 0.
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


def effective_size(weight_BxG):
  """(B,) 1 / (G sum w^2): 1 = all equal, 1/G = one holds everything."""
  return 1 / (weight_BxG.shape[-1] * jnp.sum(weight_BxG**2, axis=-1))


def adaptive_coef(reward_BxG, log_rnd_BxG, alpha, ess):
  """(B,) c in [0.01, 0.99] whose weights have the effective size `ess`.

  The effective size falls as c grows, so bisection finds it; where even the
  ends miss it, the nearer end is returned. dmpo_trainer.py:629-676.
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


def coverage(reward_BxG, alpha, best):
  """(B, 1) in (0, 1]: how near a group's best comes to the target's mass.

  p* of a perfect completion exceeds that of the group's best by
  exp((best - max r) / alpha). Where a group has none, its weights, which sum
  to one all the same, would teach the least bad: they are scaled down by this.
  Ours, not the paper's.
  """
  gap = jnp.max(reward_BxG, axis=-1, keepdims=True) - best
  return jnp.exp(jnp.minimum(gap, 0.0) / alpha)


def weigh(scored, hp):
  """Signed weights and target weights, each (B, G), and metrics."""
  log_rnd = scored.logp_ref - scored.logp_old
  coef = hp.coef
  if hp.ess:
    coef = adaptive_coef(scored.reward, log_rnd, hp.alpha, hp.ess)
  positive, negative = target_weights(scored.reward, log_rnd, hp.alpha, coef)
  baseline = {'group': 1 / positive.shape[-1], 'individual': negative}
  weight = positive - hp.strength * baseline.get(hp.baseline, 0.0)
  if hp.loss == 'ddo':  # its second term takes all alike
    weight = jnp.full_like(positive, 1 / positive.shape[-1])
  scale = jnp.ones_like(positive[:, :1])
  if hp.best:
    scale = coverage(scored.reward, hp.alpha, hp.best)
  metrics = {
    'ess': jnp.mean(effective_size(positive)),
    'coef': jnp.mean(coef),
    'log_rnd_std': jnp.mean(jnp.std(log_rnd, axis=-1)),
    'coverage': jnp.mean(scale),
    'weight_abs': jnp.mean(jnp.sum(jnp.abs(weight * scale), axis=-1)),
  }
  return weight * scale, positive * scale, metrics


def reweigh(elbo_R, elbo_old_R, batch, group, hp):
  """The 'model' baseline: softmax_g(log p_theta - log p_old), no gradient.

  Self-normalised importance weights of the current policy: the control
  variate whose expectation vanishes under p_theta. dmpo_trainer.py:166-174.
  """
  gap = to_groups(elbo_R - elbo_old_R, group)
  baseline = jax.nn.softmax(jax.lax.stop_gradient(gap), axis=-1)
  held = jnp.sum(to_groups(batch.positive, group), -1, keepdims=True)
  return batch.positive - hp.strength * to_rows(baseline * held)


def draw(key, row_R, completion_RxL, hp):
  """The loss's K masked copies of each completion.

  Both kinds are draws of one law: rate ~ U(low, high), or 1 - rate; so the
  loss keeps its expectation. On (0, 1) all counts 0..L are alike, and that of
  1/m times the masked sum is the ELBO over L + 1.
  """
  kind = masking.draw_even if hp.spread else masking.draw_bernoulli
  masks = kind(
    key, row_R, completion_RxL.shape[1], hp.draws, hp.low, hp.high, hp.antithetic
  )
  return masks if hp.loss_tail else masking.restrict(masks, completion_RxL)


def wdce(logp_RxKxL, masked_RxKxL, weight_R):
  """Weighted denoising cross-entropy: a sum over rows.

  sum_r weight_r 1/K sum_k 1/max(m, 1) sum_masked -logp (dmpo_trainer.py:
  150-184). logp must be 0 where not masked.
  """
  count = jnp.maximum(jnp.sum(masked_RxKxL, axis=-1), 1)
  nll = -jnp.sum(logp_RxKxL, axis=-1) / count
  return jnp.sum(weight_R * jnp.mean(nll, axis=-1))


def ddo(logp_RxKxL, masks, batch, elbo_old_R, hp):
  """Direct discriminative loss on the gaps ELBO_theta - ELBO_old.

  -sum w log s(beta gap_1) - a/G sum log s(-beta gap_2) per group, each gap
  from its own half of the draws (dmpo_trainer.py:186-203).
  """
  half = masks.weight.shape[1] // 2
  gap = [
    logprob.seq_elbo(logp_RxKxL[:, part], masks.weight[:, part]) - elbo_old_R
    for part in (slice(half), slice(half, None))
  ]
  up = batch.positive * jax.nn.log_sigmoid(hp.ddo_beta * gap[0])
  down = batch.weight * jax.nn.log_sigmoid(-hp.ddo_beta * gap[1])
  return -jnp.sum(up + hp.ddo_alpha * down)


def loss(logp_RxKxL, masks, batch, elbo_old_R, hp):
  """(sum over rows / norm, metrics that add up over microbatches)."""
  if hp.loss == 'ddo':
    value = ddo(logp_RxKxL, masks, batch, elbo_old_R, hp)
  else:
    value = wdce(logp_RxKxL, masks.masked, batch.weight)
  nll = -jnp.sum(logp_RxKxL) / (masks.masked.shape[1] * batch.total)
  return value / batch.norm, {'nll': nll}


def needs(hp):
  """Which log-probs the rollout must provide; 'policy': call `reweigh`."""
  wanted = {'old', 'ref'} if hp.alpha else set()
  if hp.loss == 'ddo':
    wanted |= {'elbo_old'}
  elif hp.baseline == 'model':
    wanted |= {'elbo_old', 'policy'}
  return wanted


def check(hp):
  """What is impossible in a Config, one sentence each."""
  found = []
  if not hp.alpha >= 0:
    found.append(
      f'objective.alpha = {hp.alpha} must be >= 0 (0 weighs by the reward alone)'
    )
  if not 0 < hp.coef <= (1 if hp.alpha else float('inf')):
    found.append(
      f'objective.coef = {hp.coef} must be in (0, 1] (with '
      'objective.alpha = 0: above 0)'
    )
  if hp.best and not hp.alpha:
    found.append(f'objective.best = {hp.best} needs objective.alpha > 0')
  if not 0 <= hp.ess < 1:
    found.append(f'objective.ess = {hp.ess} must be in [0, 1); 0 = off')
  if hp.baseline not in BASELINES:
    found.append(
      f'objective.baseline = {hp.baseline!r} must be one of {", ".join(BASELINES)}'
    )
  if hp.loss not in ('wdce', 'ddo'):
    found.append(f'objective.loss = {hp.loss!r} must be wdce or ddo')
  if hp.draws < 1 or (hp.antithetic and hp.draws % 2):
    found.append(
      f'objective.draws = {hp.draws} must be even with '
      'objective.antithetic (pairs of complements), else >= 1'
    )
  if hp.spread and hp.draws < 2 + 2 * hp.antithetic:
    found.append(
      'objective.spread = True needs draws to spread: '
      'objective.draws >= 2, or 4 with objective.antithetic'
    )
  if not 0 <= hp.low < hp.high <= 1:
    found.append(
      f'objective.low = {hp.low}, objective.high = {hp.high} must '
      'be 0 <= low < high <= 1'
    )
  if hp.loss == 'ddo' and (
    hp.antithetic or hp.draws % 2 or hp.spread or hp.common_masks
  ):
    found.append(
      'objective.loss = ddo needs independent halves of an even '
      'number of draws: set objective.antithetic=False, '
      'objective.spread=False, objective.common_masks=False'
    )
  return found


OBJECTIVE = Objective(
  hp=Config,
  needs=needs,
  check=check,
  draw=draw,
  weigh=weigh,
  reweigh=reweigh,
  loss=loss,
)
