"""The device half of a rollout buffer: log-probs of completions, and weights.

`score` computes the log-probs that weights and losses compare with; `pack` weighs the
groups and makes the TrainBatch. build.py compiles both.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmpo_jax import agreement, logprob, mesh, rng
from dmpo_jax.objectives.shared import advantages
from dmpo_jax.rng import AnyKey
from dmpo_jax.step import Rows, Setup, canvas_of, draw, view
from dmpo_jax.types import (
  Array,
  Control,
  FloatB,
  FloatBG,
  FloatR,
  IntRKL,
  Params,
  Record,
  Sampled,
  Scored,
  Scores,
  TrainBatch,
  ViewLogp,
  Views,
  to_groups,
  to_rows,
)


def rows_of(sampled: Sampled, setup: Setup) -> Rows:
  """Returns the fields of a rollout buffer that a pass needs."""
  r, record = sampled.rollouts, None
  partly = setup.cfg.block_causal or (setup.law and setup.law.eos_stop)
  if setup.wants.records is not None:
    record = Record(r.order, r.logp, r.confidence, dict(r.more or {}))
  return Rows(
    r.tokens,
    r.valid,
    sampled.completion,
    sampled.row,
    r.order >= 0 if partly else None,
    record,
    r.routes if record and setup.experts.replay else None,
    logprob.made_of(r),
  )


class Policies(NamedTuple):
  """Whose log-probs are taken: parameter trees of the whole network."""

  old: Params  # the policy that sampled
  refs: tuple  # what p_ref is the mean of, by Setup.weights


def policies(trainable: Params, frozen: Params, references: tuple = ()) -> Policies:
  """Returns the policies of a run; `references` are trees laid over `frozen`."""
  refs = tuple({**frozen, **tree} for tree in references) or (frozen,)
  return Policies({**frozen, **trainable}, refs)


def score(
  who: Policies, sampled: Sampled, key: AnyKey, loss_key: AnyKey, setup: Setup
) -> Scores:
  """Computes the log-probs of a buffer that weights and losses compare with.

  Old and reference share their masks or recorded steps. key: of the sequence
  log-probs; loss_key: of the loss's own masks, as `train_step` gets it. With
  setup.measure logp_old, logp_ref and old.elbo are computed whatever the objective
  wants; old.elbo is then under the masks of the last inner update.
  """
  wants = setup.wants
  out = sequence_scores(who, sampled, key, setup)
  under = lambda params, i: under_masks(params, i, sampled, loss_key, setup)
  common = 'old' in wants.elbo and wants.common_masks
  old = views_of(lambda i: under(who.old, i), 'old', setup, common)
  if 'old' in wants.elbo and not common:
    old = old._replace(elbo=repeat(elbo_of_rows(who.old, sampled, key, setup), setup))
  elif setup.measure and not common:
    last = under(who.old, setup.inner - 1)[0]
    old = old._replace(elbo=repeat(last, setup))
  of_refs = lambda i: of_references(under, who, i, setup)
  ref = views_of(of_refs, 'ref', setup, 'ref' in wants.elbo)
  guess = guesses(who.old, sampled, loss_key, setup) if wants.guess else None
  routes = None
  if setup.experts.measure:
    law: Any = setup.law
    of_rows = lambda x: agreement.agreement(setup.cfg, who.old, x.rollouts, law)
    routes = over_rows(of_rows, sampled, setup)
  return out._replace(old=old, ref=ref, guess=guess, routes=routes)


def repeat(elbo_R: FloatR, setup: Setup) -> Array:
  """Returns (R, I): one estimate for all inner updates."""
  return jnp.repeat(elbo_R[:, None], setup.inner, axis=1)


def over_rows(fn: Callable, sampled: Sampled, setup: Setup) -> Any:
  """Applies fn to a Sampled in microbatches."""
  rollouts = sampled.rollouts._replace(forwards=None)  # it has no row axis
  return mesh.in_microbatches(
    fn, sampled._replace(rollouts=rollouts), setup.microbatches
  )


def sequence_scores(
  who: Policies, sampled: Sampled, key: AnyKey, setup: Setup
) -> Scores:
  """Returns logp_old and logp_ref as far as they are wanted."""
  how = setup.logprob
  wanted = ('old', 'ref') if setup.measure else setup.wants.sequence
  if how.estimator == 'trajectory':
    if not wanted:
      return Scores()
    refs, olds = zip(
      *(along_trajectory(params, who.old, sampled, key, setup) for params in who.refs),
      strict=True,
    )
    return Scores(logp_old=olds[0], logp_ref=mixed(refs, setup))
  if how.fuse and set(wanted) == {'old', 'ref'}:
    return fused(who.old, sampled, key, setup)
  elbo = lambda params: elbo_of_rows(params, sampled, key, setup, how.tail)
  out = Scores()
  if 'old' in wanted:
    out = out._replace(logp_old=elbo(who.old))
  if 'ref' in wanted:
    refs = [elbo(params) for params in who.refs]
    out = out._replace(logp_ref=mixed(refs, setup))
  return out


def mixed(logps: Any, setup: Setup) -> FloatR:
  """Returns log p_ref of completions from the log p_k of all references, nats.

  Geometric: the log of the product of p_k^w_k, up to its norm. It maximises
  E r - alpha sum_k w_k KL(p || p_k), so DMPO's target with it is exact. Harmonic:
  -log sum_k w_k / p_k, which MRPO (arXiv 2405.16388) gets from a bound. Log-probs of
  completions differ by many nats, so it is the least p_k in effect. setup.clip keeps
  each log p_k within so many nats of the first one.
  """
  if setup.weights in ((), (1.0,)):
    return logps[0]
  if setup.clip:
    low, high = logps[0] - setup.clip, logps[0] + setup.clip
    logps = [logps[0], *(jnp.clip(logp, low, high) for logp in logps[1:])]
  pairs = list(zip(setup.weights, logps, strict=True))
  if setup.mean == 'harmonic':
    return -jax.nn.logsumexp(jnp.stack([jnp.log(w) - x for w, x in pairs]), axis=0)
  return sum(w * x for w, x in pairs)


def of_references(
  under: Callable, who: Policies, i: Any, setup: Setup
) -> tuple[FloatR, ViewLogp]:
  """Returns (ELBO, ViewLogp) of p_ref under the loss's masks of inner update i.

  All references see the same masks. The ViewLogp is the first one's: a product of laws
  of single tokens has no norm, so `check` lets objectives that read it have but one.
  """
  elbos, views = zip(*(under(params, i) for params in who.refs), strict=True)
  return mixed(elbos, setup), views[0]


def along_trajectory(
  params: Params, policy: Params, sampled: Sampled, key: AnyKey, setup: Setup
) -> tuple[FloatR, FloatR]:
  """Returns log-probs along the recorded steps: under `params`, and as recorded."""
  states, law = setup.logprob.states, setup.law
  if law is None:
    raise ValueError('logprob.estimator = trajectory needs the sampling law: Setup.law')

  def fn(part):
    u_R = rng.per_row(key, part.row, jax.random.uniform) if states else None
    how, rollouts = logprob.Along(states, u_R, policy), part.rollouts
    if not setup.experts.replay:
      rollouts = rollouts._replace(routes=None)
    return logprob.trajectory_logp(setup.cfg, params, rollouts, law, how)

  return over_rows(fn, sampled, setup)


def elbo_of(
  params: Params, part: Sampled, key: AnyKey, setup: Setup, tail: bool
) -> FloatR:
  """Returns the ELBO under config.logprob's masks; tail: count after the first EOS."""
  rows, counted = rows_of(part, setup), None if tail else part.completion
  masks = logprob.draw(key, rows.row, canvas_of(setup.cfg, rows), setup.logprob)
  masks = masks._replace(sampled=rows.sampled, made=rows.made)
  return logprob.elbo(setup.cfg, params, rows.tokens, rows.valid, masks, counted)


def elbo_of_rows(
  params: Params, sampled: Sampled, key: AnyKey, setup: Setup, tail: bool = True
) -> FloatR:
  """Returns `elbo_of` all rows, in microbatches."""
  return over_rows(lambda part: elbo_of(params, part, key, setup, tail), sampled, setup)


def fused(policy: Params, sampled: Sampled, key: AnyKey, setup: Setup) -> Scores:
  """Returns both log-probs in one pass of twice the rows: zero adapters are p_ref."""
  tail = setup.logprob.tail

  def pair(part):
    lora = jax.tree.map(lambda x: jnp.stack([x, jnp.zeros_like(x)]), policy['lora'])
    of = lambda lora: elbo_of({**policy, 'lora': lora}, part, key, setup, tail)
    return jax.vmap(of)(lora).T

  old, ref = over_rows(pair, sampled, setup).T
  return Scores(logp_old=old, logp_ref=ref)


def under_masks(
  params: Params, i: Any, sampled: Sampled, loss_key: AnyKey, setup: Setup
) -> tuple[FloatR, ViewLogp]:
  """Returns (ELBO, ViewLogp) under the loss's masks of inner update i, no gradient."""

  def fn(part):
    rows = rows_of(part, setup)
    now, masks = view(setup, params, jax.random.fold_in(loss_key, i), rows)
    return logprob.seq_elbo(now.logp, masks.weight), now._replace(routed=None)

  return over_rows(fn, sampled, setup)


def views_of(under: Callable, policy: str, setup: Setup, elbo: bool) -> Views:
  """Returns the Views of a policy; under(i) is (ELBO, ViewLogp) of inner update i."""
  wanted = policy in setup.wants.views
  if not elbo and not wanted:
    return Views()

  def of_inner(i):
    elbo_R, now = under(i)
    own = (now.logp, now.reads) if wanted else ()
    return Views(elbo_R if elbo else None, *own)

  views = jax.lax.map(of_inner, jnp.arange(setup.inner))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), views)


def guesses(policy: Params, sampled: Sampled, loss_key: AnyKey, setup: Setup) -> IntRKL:
  """Returns the loss's copies at the first update, completed in one step, int32.

  Tokens that are not masked stay; -1 marks a copy of no step.
  """

  def fn(part):
    rows = rows_of(part, setup)
    masks = draw(setup, jax.random.fold_in(loss_key, 0), rows)
    if rows.sampled is not None:  # what the sampler left masked is completed, too
      masks = masks._replace(masked=masks.masked | ~rows.sampled[:, None], sampled=None)
    read = logprob.reader(setup.cfg, setup.law, ('guess',))
    now = logprob.view_logp(
      setup.cfg, policy, rows.tokens, masks, rows.valid, read=read
    )
    own = rows.tokens[:, None, -rows.completion.shape[1] :]
    guess = jnp.where(masks.masked, now.reads['guess'], own)
    return jnp.where(masks.weight > 0, guess, -1)

  return over_rows(fn, sampled, setup).astype(jnp.int32)


# --- weights


def steered(scored: Scored, sampled: Sampled, setup: Setup) -> tuple[Scored, Scored]:
  """Returns what the tokens and what the controller is weighed by.

  The controller pays for forwards: policy gradients by reward, target weights by their
  exponent. The tokens do with control.tokens alone.
  """
  law, rows = setup.control, sampled.rollouts.control
  assert law is not None and rows is not None
  group = scored.reward.shape[1]
  cost = to_groups(law.nats(sampled.rollouts.order), group)
  paid = scored._replace(cost=cost)
  by_reward = setup.objective.strength(setup.hp) is None
  if law.hp.learn == 'gradient' or by_reward:
    paid = paid._replace(reward=scored.reward * (1 - cost))
  if law.hp.learn == 'joint':
    old, first = rows.logp, law.first_logp(rows.u)
    paid = paid._replace(
      logp_old=scored.logp_old + to_groups(old, group),
      logp_ref=scored.logp_ref + to_groups(first, group),
    )
  if not law.hp.tokens:
    return scored, paid
  if law.hp.learn == 'joint' or by_reward:
    return paid, paid
  return scored._replace(cost=cost), paid


def control_rows(
  paid: Scored, sampled: Sampled, setup: Setup, share_B: FloatB | None
) -> tuple[Control, dict]:
  """Returns the controller's rows of a TrainBatch, and metrics.

  paid: of `steered`. Groups of equal rewards count: their forwards differ.
  """
  law, rows = setup.control, sampled.rollouts.control
  assert law is not None and rows is not None
  share = 1.0 if share_B is None else share_B[:, None]
  if law.hp.learn == 'gradient':
    weight = share * advantages(paid.reward, 'loo') / paid.reward.shape[1]
    out = rows._replace(weight=to_rows(weight))
  else:
    weight = share * setup.objective.weigh(paid, setup.hp)[1]['target']
    level = jnp.broadcast_to(jnp.mean(weight, axis=1, keepdims=True), weight.shape)
    out = rows._replace(weight=to_rows(weight), level=to_rows(level))
  return out, {
    'control/bound': jnp.mean(rows.bound),
    'control/bound_std': jnp.std(rows.bound),
    'control/u': jnp.mean(rows.u),
    'control/u_std': jnp.std(rows.u),
  }


def pack(
  sampled: Sampled,
  reward_BxG: FloatBG,
  scores: Scores,
  setup: Setup,
  share_B: FloatB | None = None,
) -> tuple[TrainBatch, dict]:
  """Returns the TrainBatch and weight metrics of rollouts, rewards and log-probs.

  share_B: a factor of each group's weights; None = 1.
  With setup.common.skip_equal groups of equal rewards weigh nothing. The others weigh
  more in proportion (DAPO's dynamic sampling, without sampling again), unless
  skip_scale is off. Where a group is live with chance s, independently, their factor
  B / n_live multiplies the mean update by (1 - (1 - s)^B) / s.
  """
  groups, group = reward_BxG.shape
  grouped = lambda x: None if x is None else to_groups(x, group)
  skip = setup.common.skip_equal
  differ_B = jnp.max(reward_BxG, axis=1) > jnp.min(reward_BxG, axis=1)
  live_B: Any = differ_B if skip else None
  rows: Any = rows_of(sampled, setup)
  steps: dict[str, Any] = {}
  if setup.wants.records is not None:
    tokens = rows.tokens[:, -sampled.completion.shape[1] :]
    steps = {'block': setup.cfg.block_causal, 'tokens': tokens}
  scored = Scored(
    reward_BxG,
    to_groups(jnp.sum(sampled.completion, axis=1), group),
    grouped(scores.logp_old),
    grouped(scores.logp_ref),
    grouped(scores.guess_reward),
    live_B,
    rows.record,
    **steps,
  )
  control, numbers = None, {}
  if setup.control:
    scored, paid = steered(scored, sampled, setup)
    control, numbers = control_rows(paid, sampled, setup, share_B)
  weight, own, metrics = setup.objective.weigh(scored, setup.hp)
  if skip:
    alive_B = live_B.astype(jnp.float32)
    if setup.common.skip_scale:
      alive_B *= groups / jnp.maximum(jnp.sum(live_B), 1)
    share_B = alive_B if share_B is None else alive_B * share_B
    metrics = {**metrics, 'groups_skipped': jnp.mean(~live_B)}
  if share_B is not None:
    scale = lambda x: jnp.einsum('b,b...->b...', share_B, x)
    weight, own = scale(weight), {name: scale(x) for name, x in own.items()}
  batch = TrainBatch(
    **rows._asdict(),
    weight=to_rows(weight),
    own={name: to_rows(x) for name, x in own.items()},
    norm=jnp.float32(groups),
    total=jnp.float32(len(sampled.row)),
    old=scores.old,
    ref=scores.ref,
    control=control,
  )
  return batch, {**metrics, **logp_metrics(scores), **numbers}


def logp_metrics(scores: Scores) -> dict:
  """Returns means of the sequence log-probs; completions are of the old policy.

  kl_ref estimates KL(old || ref). With several references of weights that add up to one
  it is sum_k w_k KL(old || p_k) for the geometric mean. That exceeds the KL to the mean
  made a distribution by -log sum_x prod_k p_k(x)^w_k.
  """
  found = {'logp_old': scores.logp_old, 'logp_ref': scores.logp_ref}
  metrics = {name: jnp.mean(x) for name, x in found.items() if x is not None}
  if len(metrics) == len(found):
    metrics['kl_ref'] = metrics['logp_old'] - metrics['logp_ref']
  shares = {name: jnp.mean(x) for name, x in (scores.routes or {}).items()}
  return metrics | shares
