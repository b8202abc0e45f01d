"""Log-probabilities of completions: per token, by ELBO, or along a trajectory.

`token_logp` is the one differentiable path from parameters to losses. It never
builds a (R, K, L, V) array when cfg.head_chunk is set: the head is applied to
chunks of the completion under rematerialisation.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmpo_jax import masking, model, rng


@dataclasses.dataclass(frozen=True)
class LogprobConfig:
  """How log p_ref and log p_old of a completion are estimated."""

  estimator: str = 'elbo'  # elbo | trajectory
  elbo: str = 'paper'  # paper (Bernoulli, L/m) | stratified (exact counts)
  draws: int = 4  # masked copies per completion
  low: float = 0.1  # paper: range of the mask rate
  high: float = 1.0
  antithetic: bool = True  # paper: second half of the draws = complement
  tail: bool = True  # count the tokens after the first EOS
  states: int = 0  # trajectory: recorded states to visit; 0 = all
  fuse: bool = False  # elbo with adapters: log p_old and log p_ref in one pass


def token_logp(
  cfg,
  params,
  tokens_RxS,
  masked_RxKxL,
  valid_RxS=None,
  dropout_R=None,
  prompt_RxKxP=None,
  read=model.logp_of,
):
  """Log p(token | the rest, masked), (R, K, L) float32, 0 where not masked.

  tokens_RxS int32 hold the true completion in their last L places;
  masked_RxKxL bool says where the network sees the mask token instead.
  dropout_R are the rows' keys for the adapters' dropout; None: no dropout.
  prompt_RxKxP: what of the prompts is masked too. read: (logits, tokens) ->
  numbers in the log-probs' place, see `reader`; of a dict each is (R, K, L).
  """
  rows, draws, length = masked_RxKxL.shape
  noisy = masking.apply_masks(tokens_RxS, masked_RxKxL, cfg.mask_id, prompt_RxKxP)
  noisy = noisy.reshape(rows * draws, -1)
  valid = None if valid_RxS is None else jnp.repeat(valid_RxS, draws, axis=0)
  keys = dropout_R
  if keys is not None:  # every draw of a row its own
    keys = jax.vmap(lambda key: jax.random.split(key, draws))(keys).ravel()
  h, _ = model.hidden(cfg, params, noisy, valid, dropout_R=keys)
  targets = jnp.repeat(tokens_RxS[:, -length:], draws, axis=0)
  found = chosen_logp(cfg, params, h[:, -length:], targets, read)
  return jax.tree.map(
    lambda x: jnp.where(masked_RxKxL, x.reshape(masked_RxKxL.shape), 0.0), found
  )


def reader(cfg, law=None, more=()):
  """(logits, tokens) -> log-probs (R, L), or {'logp': them, **more}.

  law: the sampler's Law: log-probs of its law, and not of
  the model's. more: 'centred' (the token's logit less the mean of all),
  'score' (the largest log-prob over law.rank_temperature, as the pick
  plackett_luce ranks), 'guess' (the most probable token).
  """

  def read(logits, tokens):
    if law is None:
      out = {'logp': model.logp_of(logits, tokens)}
    else:
      out = {
        'logp': model.logp_of(
          model.sampling_logits(model.without_mask(cfg, logits), law.temperature),
          tokens,
        )
      }
    if 'centred' in more:
      own = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
      out['centred'] = own - jnp.mean(logits, axis=-1)
    if 'score' in more:
      allowed = model.without_mask(cfg, logits)
      best = jnp.max(allowed, -1) - jax.nn.logsumexp(allowed, axis=-1)
      out['score'] = best / law.rank_temperature
    if 'guess' in more:
      out['guess'] = jnp.argmax(model.without_mask(cfg, logits), axis=-1)
    return out if more else out['logp']

  return read


def chosen_logp(cfg, params, hidden_RxLxD, targets_RxL, read=model.logp_of):
  """(R, L) log-softmax at the targets, the head in chunks under remat."""

  @jax.checkpoint
  def one(hidden, targets):
    return read(model.head(cfg, params, hidden), targets)

  length, chunk = targets_RxL.shape[1], cfg.head_chunk
  if not chunk or chunk >= length:
    return one(hidden_RxLxD, targets_RxL)
  if length % chunk:
    raise ValueError(
      f'model.head_chunk = {chunk} must divide the completion length {length}'
    )
  pieces = [
    jnp.stack(jnp.split(x, length // chunk, axis=1))
    for x in (hidden_RxLxD, targets_RxL)
  ]
  found = jax.lax.map(lambda piece: one(*piece), tuple(pieces))
  return jax.tree.map(lambda x: jnp.concatenate(x, axis=1), found)


def draw(key, row_R, length, hp):
  """Masks for the ELBO, by hp.elbo (a LogprobConfig)."""
  if hp.elbo == 'stratified':
    return masking.draw_stratified(key, row_R, length, hp.draws)
  return masking.draw_bernoulli(
    key, row_R, length, hp.draws, hp.low, hp.high, hp.antithetic
  )


def seq_elbo(logp_RxKxL, weight_RxK):
  """(R,) mean over draws of weight times the masked sum, in nats."""
  return jnp.mean(weight_RxK * jnp.sum(logp_RxKxL, axis=-1), axis=-1)


def elbo(cfg, params, tokens_RxS, valid_RxS, masks, counted_RxL=None):
  """(R,) ELBO under `masks`; only counted_RxL positions enter the sum."""
  logp = token_logp(cfg, params, tokens_RxS, masks.masked, valid_RxS)
  if counted_RxL is not None:
    logp = logp * counted_RxL[:, None, :]
  return seq_elbo(logp, masks.weight)


def state_logp(cfg, params, rollouts, step_R, law):
  """Log-probs of the tokens revealed at each row's step `step_R`.

  Returns (2, R): under `params`, and as recorded by the sampler. The state is
  the completion with everything revealed at that step or later masked. law:
  the sampler's Law; only the block of the
  revealed tokens goes through the head.
  """
  length = rollouts.order.shape[1]
  prompt = rollouts.tokens.shape[1] - length
  hidden_yet = rollouts.order >= step_R[:, None]
  hidden_yet |= rollouts.order < 0  # the tail that eos_stop has left masked
  shown = rollouts.order == step_R[:, None]
  state = masking.apply_masks(rollouts.tokens, hidden_yet[:, None], cfg.mask_id)[:, 0]
  start_R = jnp.argmax(shown, axis=1) // law.block * law.block
  logits, _ = model.window_logits(
    cfg,
    params,
    state,
    rollouts.valid,
    prompt + start_R,
    law.block,
    prompt,
    law.guidance,
  )

  def window(x_RxL):
    take = lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, law.block)
    return jax.vmap(take)(x_RxL, start_R)

  logp = model.logp_of(
    model.sampling_logits(logits, law.temperature), window(rollouts.tokens[:, prompt:])
  )
  now = jnp.sum(jnp.where(window(shown), logp, 0.0), axis=1)
  return jnp.stack([now, jnp.sum(rollouts.logp * shown, axis=1)])


def trajectory_logp(cfg, params, rollouts, law, states=0, key=None, row_R=None):
  """Log-prob of each row along its recorded states, under `params` and as
  recorded: a pair of (R,) float32, in nats.

  Where SampleConfig.order_from is 'state' or 'noise' their difference is the
  exact log-ratio of two normalised laws: the policy's own, and that of
  `params` with positions revealed as the policy does (the
  frozen-scheduler ratio). states = n > 0 visits n of a row's S steps, one
  from each of n even strata, weighted S/n: unbiased for both log-probs, and
  for their difference.
  """
  count_R = jnp.max(rollouts.order, axis=1) + 1
  if not states:

    def add(step, total):
      step_R = jnp.full_like(count_R, step)
      return total + state_logp(cfg, params, rollouts, step_R, law)

    zero = jnp.zeros((2,) + count_R.shape, jnp.float32)
    return tuple(jax.lax.fori_loop(0, jnp.max(count_R), add, zero))
  u_R = rng.per_row(key, row_R, jax.random.uniform)

  def visit(j):
    step_R = jnp.floor((j + u_R) / states * count_R).astype(jnp.int32)
    step_R = jnp.minimum(step_R, count_R - 1)
    return state_logp(cfg, params, rollouts, step_R, law)

  pair = jax.lax.map(visit, jnp.arange(states, dtype=jnp.float32))
  return tuple(jnp.sum(pair, axis=0) * count_R[None] / states)
