"""One optimizer step: masks, log-probs, loss, gradient, update.

Everything here is a plain function; build.py compiles them.
"""

import jax
import jax.numpy as jnp
import optax

from dmpo_jax import logprob, masking, rng
from dmpo_jax.types import TrainState

SCALARS = ('norm', 'total')  # fields of TrainBatch without a row axis
DROPOUT = 1 << 20  # folded into an inner step's key: beyond any inner step


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
  return batch._replace(**{
      name: jnp.broadcast_to(x, (microbatches,)) if name in SCALARS
      else split_rows(x, microbatches) for name, x in batch._asdict().items()})


def batch_logp(params, batch, key, cfg, objective, hp, dropout=False):
  """(logp_RxKxL, Masks) of a batch under the loss's masks of this key."""
  masks = objective.draw(key, batch.row, batch.completion, hp)
  keys = rng.row_keys(jax.random.fold_in(key, DROPOUT), batch.row)
  logp = logprob.token_logp(cfg, params, batch.tokens, masks.masked,
                            batch.valid, keys if dropout else None)
  return logp, masks


def reweighed(params, batch, key, inner, microbatches, *, cfg, objective, hp,
              group):
  """The batch with weights that depend on the current policy.

  A pass without gradient over all rows first, so that a group's softmax is
  whole however the rows are cut into microbatches.
  """
  def elbo(part):
    logp, masks = batch_logp(params, part, key, cfg, objective, hp)
    return logprob.seq_elbo(logp, masks.weight)

  rows = split_batch(batch, microbatches)
  elbo_R = join_rows(jax.lax.map(elbo, rows))
  old_R = batch.elbo_old[:, inner]
  return batch._replace(
      weight=objective.reweigh(elbo_R, old_R, batch, group, hp))


def train_step(state, frozen, batch, key, inner, *, cfg, objective, hp,
               optimizer, group, microbatches=1, drift=False):
  """One update on a TrainBatch; returns (TrainState, metrics).

  key addresses the masks of this inner step; the microbatches add up to the
  whole batch's gradient exactly (losses are sums over a fixed norm). If loss
  or gradient is not finite the state is returned unchanged, with
  metrics['finite'] = 0. drift: metrics['elbo_drift'] is the policy's ELBO less
  batch.elbo_old, mean over rows, in nats.
  """
  key = jax.random.fold_in(key, inner)
  if 'policy' in objective.needs(hp):
    params = {**frozen, **state.trainable}
    batch = reweighed(params, batch, key, inner, microbatches, cfg=cfg,
                      objective=objective, hp=hp, group=group)

  def loss_fn(trainable, part):
    logp, masks = batch_logp({**frozen, **trainable}, part, key, cfg,
                             objective, hp, bool(cfg.lora_dropout))
    old_R = part.elbo_old[:, inner]
    value, metrics = objective.loss(logp, masks, part, old_R, hp)
    if drift:
      gap = jnp.sum(logprob.seq_elbo(logp, masks.weight) - old_R)
      metrics = {**metrics, 'elbo_drift': gap / part.total}
    return value, metrics

  return update(state, loss_fn, split_batch(batch, microbatches), optimizer)


def update(state, loss_fn, parts, optimizer):
  """Adds loss_fn's gradients over the leading axis of `parts`, then steps."""
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def add(total, part):
    (loss, metrics), grad = grad_fn(state.trainable, part)
    return jax.tree.map(jnp.add, total, (loss, metrics, grad)), None

  first = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(grad_fn, state.trainable, first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                       (*shapes[0], shapes[1]))
  (loss, metrics, grad), _ = jax.lax.scan(add, zeros, parts)
  norm = optax.tree.norm(grad)
  updates, opt_state = optimizer.update(grad, state.opt_state, state.trainable)
  new = TrainState(state.step + 1,
                   optax.apply_updates(state.trainable, updates), opt_state)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
  return new, {**metrics, 'loss': loss, 'grad_norm': norm,
               'finite': finite.astype(jnp.float32)}


def sft_step(state, tokens_RxS, valid_RxS, row_R, key, *, cfg, length,
             optimizer, microbatches=1):
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

  parts = jax.tree.map(lambda x: split_rows(x, microbatches),
                       (tokens_RxS, valid_RxS, row_R))
  return update(state, loss_fn, parts, optimizer)


def score(trainable, frozen, rollouts, row_R, completion_RxL, key, loss_key, *,
          cfg, objective, hp, how, law, inner, microbatches=1, measure=False):
  """Log-probs of rollouts: dict of 'old', 'ref' (R,) and 'elbo_old' (R, I).

  `how` is a LogprobConfig. p_old is {**frozen, **trainable} as it stands now;
  p_ref is `frozen` alone. Old and ref share their masks or states. With
  hp.common_masks elbo_old is taken under each inner step's own masks (the
  noise of the gap to p_theta cancels); else one estimate serves all. measure:
  all three, needed or not; elbo_old then under the last inner step's masks.
  """
  needs, length = objective.needs(hp), completion_RxL.shape[1]
  pair_needs = {'old', 'ref'} if measure else {'old', 'ref'} & set(needs)
  policy, reference = {**frozen, **trainable}, frozen
  # `forwards` has no row axis; the row ids take its place in the split.
  rows = (rollouts._replace(forwards=row_R), completion_RxL)

  def over_rows(fn):
    return in_microbatches(lambda part: fn(*part), rows, microbatches)

  def elbo(params, tail=True):
    def fn(part, completion):
      masks = logprob.draw(key, part.forwards, length, how)
      return logprob.elbo(cfg, params, part.tokens, part.valid, masks,
                          None if tail else completion)
    return over_rows(fn)

  def pair(part, completion):
    # One pass of twice the rows: adapters that are zero are the reference.
    masks = logprob.draw(key, part.forwards, length, how)
    lora = jax.tree.map(lambda x: jnp.stack([x, jnp.zeros_like(x)]),
                        trainable['lora'])
    return jax.vmap(lambda lora: logprob.elbo(
        cfg, {**frozen, 'lora': lora}, part.tokens, part.valid, masks,
        None if how.tail else completion))(lora).T

  def loss_elbo(i):
    def fn(part, completion):
      masks = objective.draw(jax.random.fold_in(loss_key, i),
                             part.forwards, completion, hp)
      return logprob.elbo(cfg, policy, part.tokens, part.valid, masks)
    return over_rows(fn)

  def along(part, completion):
    return logprob.trajectory_logp(cfg, reference, part, law, how.states, key,
                                   part.forwards)

  out = {}
  if how.estimator == 'trajectory' and 'ref' in pair_needs:
    out['ref'], out['old'] = over_rows(along)
  elif how.fuse and len(pair_needs) == 2:
    out['old'], out['ref'] = over_rows(pair).T
  elif how.estimator == 'elbo':
    for name, params in (('old', policy), ('ref', reference)):
      if name in pair_needs:
        out[name] = elbo(params, how.tail)
  if 'elbo_old' in needs and hp.common_masks:
    out['elbo_old'] = jnp.stack([loss_elbo(i) for i in range(inner)], axis=1)
  elif 'elbo_old' in needs:
    out['elbo_old'] = jnp.repeat(elbo(policy)[:, None], inner, axis=1)
  elif measure:
    out['elbo_old'] = jnp.repeat(loss_elbo(inner - 1)[:, None], inner, axis=1)
  return out
