"""One optimizer step: masks, log-probs, loss, gradient, update.

Everything here is a plain function; build.py compiles them.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from dmpo_jax import logprob, masking, optim, rng
from dmpo_jax.types import TrainState

SCALARS = ('norm', 'total')  # fields of TrainBatch without a row axis
# Of TrainBatch.extra: what has an axis of inner steps after that of rows.
INNER = ('elbo_ref', 'tokens_old', 'tokens_ref', 'centred_old')
DROPOUT = 1 << 20  # folded into an inner step's key: beyond any inner step
ANCHOR, FRESH = DROPOUT + 1, DROPOUT + 2


def init_state(trainable, optimizer):
  return TrainState(jnp.int32(0), trainable, optimizer.init(trainable))


def split_rows(x, microbatches):
  """(R, ...) -> (M, R/M, ...), striped so that devices keep their rows."""
  x = x.reshape((-1, microbatches) + x.shape[1:])
  return jnp.swapaxes(x, 0, 1)


def join_rows(x):
  """The inverse of `split_rows`."""
  x = jnp.swapaxes(x, 0, 1)
  return x.reshape((-1,) + x.shape[2:])


def in_microbatches(fn, rows, microbatches):
  """fn over the rows of a pytree, M pieces one after the other."""
  if microbatches == 1:
    return fn(rows)
  pieces = jax.tree.map(lambda x: split_rows(x, microbatches), rows)
  return jax.tree.map(join_rows, jax.lax.map(fn, pieces))


def split_batch(batch, microbatches):
  split = lambda x: split_rows(x, microbatches)
  return batch._replace(
    **{
      name: jnp.broadcast_to(x, (microbatches,))
      if name in SCALARS
      else jax.tree.map(split, x)
      for name, x in batch._asdict().items()
    }
  )


def record_of(rollouts, needs):
  """Returns what an objective may see of the sampler's record; None: nothing."""
  if 'record' not in needs:
    return None
  return dict(
    order=rollouts.order,
    logp=rollouts.logp,
    confidence=rollouts.confidence,
    **(rollouts.more or {}),
  )


def draw(
  objective, hp, key, row_R, tokens_RxS, valid_RxS, completion_RxL, record, *, cfg, law
):
  """The loss's Masks; an objective sees no more than it needs."""
  needs, length = objective.needs(hp), completion_RxL.shape[1]
  seen = dict(record) if 'record' in needs else {}
  if 'prompt' in needs:
    seen['prompt'] = valid_RxS[:, :-length]
  if 'block' in needs:
    seen['block'] = law.block
  if 'record' in needs:
    seen['text'] = tokens_RxS[:, -length:] != cfg.eos_id
  return objective.draw(key, row_R, completion_RxL, hp, *([seen] * bool(seen)))


def reading(objective, hp, cfg, law, more=()):
  """What the loss reads of the logits: see `logprob.reader`."""
  needs = objective.needs(hp)
  more += tuple(name for name in ('centred', 'score') if name in needs)
  return logprob.reader(cfg, law if 'law' in needs else None, more)


def batch_logp(params, batch, key, cfg, objective, hp, dropout=False, law=None):
  """(logp_RxKxL, Masks) of a batch under the loss's masks of this key.

  In the log-probs' place a dict, where the objective needs more of the logits.
  """
  extra = batch.extra or {}
  masks = draw(
    objective,
    hp,
    key,
    batch.row,
    batch.tokens,
    batch.valid,
    batch.completion,
    extra.get('record'),
    cfg=cfg,
    law=law,
  )
  keys = rng.row_keys(jax.random.fold_in(key, DROPOUT), batch.row)
  logp = logprob.token_logp(
    cfg,
    params,
    batch.tokens,
    masks.masked,
    batch.valid,
    keys if dropout else None,
    masks.prompt,
    reading(objective, hp, cfg, law),
  )
  return logp, masks


def at_inner(batch, inner):
  """The batch with what its extras hold for this inner step alone."""
  if not batch.extra:
    return batch
  return batch._replace(
    extra={name: x[:, inner] if name in INNER else x for name, x in batch.extra.items()}
  )


def anchor(params, batch, key, cfg, common):
  """- coef times the mean ELBO per token of the rollouts (DiPOD)."""
  length = batch.completion.shape[1]
  masks = masking.draw_stratified(
    jax.random.fold_in(key, ANCHOR), batch.row, length, common.elbo_draws
  )
  elbo = logprob.elbo(cfg, params, batch.tokens, batch.valid, masks) / length
  return -common.elbo_coef * jnp.sum(elbo) / batch.total


def reweighed(
  params, batch, key, inner, microbatches, *, cfg, objective, hp, group, law=None
):
  """The batch with weights that depend on the current policy.

  A pass without gradient over all rows first, so that a group's softmax is
  whole however the rows are cut into microbatches.
  """

  def elbo(part):
    logp, masks = batch_logp(params, part, key, cfg, objective, hp, law=law)
    return logprob.seq_elbo(logp, masks.weight)

  rows = split_batch(batch, microbatches)
  elbo_R = join_rows(jax.lax.map(elbo, rows))
  old_R = batch.elbo_old[:, inner]
  return batch._replace(weight=objective.reweigh(elbo_R, old_R, batch, group, hp))


def train_step(
  state,
  frozen,
  batch,
  key,
  inner,
  *,
  cfg,
  objective,
  hp,
  optimizer,
  group,
  microbatches=1,
  law=None,
  common=None,
  drift=False,
  moves=None,
):
  """One update on a TrainBatch; returns (TrainState, metrics).

  key addresses the masks of this inner step; the microbatches add up to the
  whole batch's gradient exactly (losses are sums over a fixed norm). If loss
  or gradient is not finite the state is returned unchanged, with
  metrics['finite'] = 0. law: the sampler's, for objectives that need it.
  drift: metrics['elbo_drift'] is the policy's ELBO less batch.elbo_old, mean
  over rows, in nats. moves: (every, mix) of a moving reference (optim).
  """
  key = jax.random.fold_in(key, inner)
  batch = at_inner(batch, inner)
  if 'policy' in objective.needs(hp):
    params = {**frozen, **state.trainable}
    batch = reweighed(
      params,
      batch,
      key,
      inner,
      microbatches,
      cfg=cfg,
      objective=objective,
      hp=hp,
      group=group,
      law=law,
    )
  if 'fresh' in objective.needs(hp):
    key = jax.random.fold_in(key, FRESH)

  def loss_fn(trainable, part):
    params = {**frozen, **trainable}
    logp, masks = batch_logp(
      params, part, key, cfg, objective, hp, bool(cfg.lora_dropout), law
    )
    if isinstance(logp, dict):
      more = {name: x for name, x in logp.items() if name != 'logp'}
      logp, part = logp['logp'], part._replace(extra={**(part.extra or {}), **more})
    old_R = part.elbo_old[:, inner]
    loss, metrics = objective.loss(logp, masks, part, old_R, hp)
    if drift:
      gap = jnp.sum(logprob.seq_elbo(logp, masks.weight) - old_R)
      metrics = {**metrics, 'elbo_drift': gap / part.total}
    if common and common.elbo_coef:
      loss += anchor(params, part, key, cfg, common)
    return loss, metrics

  new, metrics = update(state, loss_fn, split_batch(batch, microbatches), optimizer)
  return optim.follow(state, new, *moves) if moves else new, metrics


def update(state, loss_fn, parts, optimizer):
  """Adds loss_fn's gradients over the leading axis of `parts`, then steps."""
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def add(total, part):
    (loss, metrics), grad = grad_fn(state.trainable, part)
    return jax.tree.map(jnp.add, total, (loss, metrics, grad)), None

  first = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(grad_fn, state.trainable, first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (*shapes[0], shapes[1]))
  (loss, metrics, grad), _ = jax.lax.scan(add, zeros, parts)
  norm = optax.tree.norm(grad)
  updates, opt_state = optimizer.update(grad, state.opt_state, state.trainable)
  new = TrainState(
    state.step + 1, optax.apply_updates(state.trainable, updates), opt_state
  )
  finite = jnp.isfinite(loss + norm + optax.tree.norm(updates))
  new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
  return new, {
    **metrics,
    'loss': loss,
    'grad_norm': norm,
    'finite': finite.astype(jnp.float32),
  }


def sft_step(
  state, tokens_RxS, valid_RxS, row_R, key, *, cfg, length, optimizer, microbatches=1
):
  """One step of LLaDA's SFT loss: sum of CE/p over the masks, per length.

  Only completions are masked; EOS padding counts as part of the answer
  (LLaDA GUIDELINES.md). Returns (TrainState, metrics).
  """
  total = tokens_RxS.shape[0]

  def loss_fn(trainable, part):
    tokens, valid, row = part
    masks = masking.draw_sft(key, row, length)
    logp = logprob.token_logp(cfg, trainable, tokens, masks.masked, valid)
    nll = -logprob.seq_elbo(logp, masks.weight) / length
    return jnp.sum(nll) / total, {}

  parts = jax.tree.map(
    lambda x: split_rows(x, microbatches), (tokens_RxS, valid_RxS, row_R)
  )
  return update(state, loss_fn, parts, optimizer)


def score(
  trainable,
  frozen,
  rollouts,
  row_R,
  completion_RxL,
  key,
  loss_key,
  references=(),
  *,
  cfg,
  objective,
  hp,
  how,
  law,
  inner,
  microbatches=1,
  measure=False,
  weights=(),
):
  """Log-probs of rollouts: dict of 'old', 'ref' (R,) and 'elbo_old' (R, I).

  `how` is a LogprobConfig. p_old is {**frozen, **trainable} as it stands now;
  p_ref is `frozen` alone, or with `references` (trees laid over it, weights w)
  the product of p_k^w_k. Old and ref share their masks or states. With
  hp.common_masks elbo_old is taken under each inner step's own masks (the
  noise of the gap to p_theta cancels); else one estimate serves all. measure:
  all three, needed or not; elbo_old then under the last inner step's masks.
  """
  needs = set(objective.needs(hp))
  # `forwards` has no row axis; the row ids take its place in the split.
  rows = (rollouts._replace(forwards=row_R), completion_RxL)

  def over_rows(fn):
    return in_microbatches(lambda part: fn(*part), rows, microbatches)

  policy = {**frozen, **trainable}
  out = pair_scores(
    over_rows,
    needs | ({'old', 'ref'} if measure else set()),
    policy,
    [{**frozen, **tree} for tree in references] or [frozen],
    weights,
    key,
    cfg,
    how,
    law,
  )
  under = functools.partial(
    under_masks, over_rows, loss_key, cfg=cfg, objective=objective, hp=hp, law=law
  )
  if 'elbo_old' in needs and hp.common_masks:
    old = jax.lax.map(lambda i: under(policy, i)['elbo'], jnp.arange(inner))
    out['elbo_old'] = jnp.moveaxis(old, 0, 1)
  elif 'elbo_old' in needs:
    old = elbo_of_rows(over_rows, policy, key, cfg, how)
    out['elbo_old'] = jnp.repeat(old[:, None], inner, axis=1)
  elif measure:
    old = under(policy, inner - 1)['elbo']
    out['elbo_old'] = jnp.repeat(old[:, None], inner, axis=1)
  return out | extras(
    needs, functools.partial(under, policy), functools.partial(under, frozen), inner
  )


def pair_scores(over_rows, needs, policy, parts, weights, key, cfg, how, law):
  """'old' and 'ref', as far as `needs` has them; see `score`.

  parts: what p_ref is the product of, to the powers of `weights`.
  """

  def product(logps):
    if weights in ((), (1.0,)):
      return logps[0]
    return sum(w * logp for w, logp in zip(weights, logps, strict=True))

  wanted = needs & {'old', 'ref'}
  if how.estimator == 'trajectory':
    if 'ref' not in wanted:
      return {}
    refs, olds = zip(
      *(
        over_rows(
          lambda part, _, params=params: logprob.trajectory_logp(
            cfg, params, part, law, how.states, key, part.forwards
          )
        )
        for params in parts
      ),
      strict=True,
    )
    return {'ref': product(refs), 'old': olds[0]}
  if how.fuse and len(wanted) == 2:
    return fused(over_rows, policy, key, cfg, how)
  elbo = lambda params: elbo_of_rows(over_rows, params, key, cfg, how, how.tail)
  out = {'old': elbo(policy)} if 'old' in wanted else {}
  if 'ref' in wanted:
    out['ref'] = product([elbo(params) for params in parts])
  return out


def elbo_of_rows(over_rows, params, key, cfg, how, tail=True):
  """(R,) ELBO under the masks of `how`; tail: after the first EOS, too."""

  def fn(part, completion):
    masks = logprob.draw(key, part.forwards, completion.shape[1], how)
    return logprob.elbo(
      cfg, params, part.tokens, part.valid, masks, None if tail else completion
    )

  return over_rows(fn)


def fused(over_rows, policy, key, cfg, how):
  """Both in one pass of twice the rows: zero adapters are the reference."""

  def pair(part, completion):
    masks = logprob.draw(key, part.forwards, completion.shape[1], how)
    lora = jax.tree.map(lambda x: jnp.stack([x, jnp.zeros_like(x)]), policy['lora'])
    return jax.vmap(
      lambda lora: logprob.elbo(
        cfg,
        {**policy, 'lora': lora},
        part.tokens,
        part.valid,
        masks,
        None if how.tail else completion,
      )
    )(lora).T

  old, ref = over_rows(pair).T
  return {'old': old, 'ref': ref}


def under_masks(over_rows, loss_key, params, i, more=(), *, cfg, objective, hp, law):
  """The loss's pass of inner step i over all rows, without gradient: a dict of
  logp_RxKxL, elbo_R and what the loss reads besides."""
  read = reading(objective, hp, cfg, law, more)

  def one(part, completion):
    masks = draw(
      objective,
      hp,
      jax.random.fold_in(loss_key, i),
      part.forwards,
      part.tokens,
      part.valid,
      completion,
      record_of(part, objective.needs(hp)),
      cfg=cfg,
      law=law,
    )
    found = logprob.token_logp(
      cfg, params, part.tokens, masks.masked, part.valid, None, masks.prompt, read
    )
    found = found if isinstance(found, dict) else {'logp': found}
    if more:  # the tokens that were not masked stay; -1: a draw of no step
      own = part.tokens[:, None, -completion.shape[1] :]
      guess = jnp.where(masks.masked, found['guess'], own)
      found['guess'] = jnp.where(masks.weight[..., None] > 0, guess, -1)
    return {**found, 'elbo': logprob.seq_elbo(found['logp'], masks.weight)}

  return over_rows(one)


def extras(needs, of_old, of_ref, inner):
  """What `score` adds where `needs` asks for it; of_*(i) are dicts."""

  def each(fn, *names):
    found = jax.lax.map(
      lambda i: {name: fn(i)[name] for name in names}, jnp.arange(inner)
    )
    return [jnp.moveaxis(found[name], 0, 1) for name in names]

  out = {}
  if 'tokens_old' in needs and 'centred' in needs:
    out['tokens_old'], out['centred_old'] = each(of_old, 'logp', 'centred')
  elif 'tokens_old' in needs:
    (out['tokens_old'],) = each(of_old, 'logp')
  if 'tokens_ref' in needs:
    (out['tokens_ref'],) = each(of_ref, 'logp')
  if 'elbo_ref' in needs:
    (out['elbo_ref'],) = each(of_ref, 'elbo')
  if 'guess' in needs:
    out['guess'] = of_old(0, ('guess',))['guess'].astype(jnp.int32)
  return out
