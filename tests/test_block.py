"""Block-causal models: the packed pass, likelihoods and sampling of block diffusion."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax import layout, logprob, model, sampler
from dmpo_jax.types import Masks

W, L, K = 4, 12, 3
CFG = model.ModelConfig(
  vocab=24, width=32, layers=2, heads=2, kv_heads=1, mlp=48, mask_id=23, eos_id=22,
  pad_id=21, positions=64, rope_theta=100.0, qk_norm=True, block_causal=W,
)  # fmt: skip


def family(**fields):
  return dataclasses.replace(CFG, **fields)


@pytest.fixture(scope='module')
def case(weights):
  """Parameters, texts whose completions begin a block, padding, and masks."""
  draw = np.random.default_rng(0)
  tokens = jnp.asarray(draw.integers(0, 20, (3, 8 + L)), jnp.int32)
  valid = jnp.ones(tokens.shape, bool).at[1, :4].set(False)
  masked = jnp.asarray(draw.random((3, K, L)) < 0.5)
  return weights(CFG), tokens, valid, masked


def block_by_block(cfg, params, tokens, valid, masked):
  """log p of the masked tokens, by a forward of [past | noisy block] each."""
  start = tokens.shape[1] - L
  rows = []
  for k in range(K):
    parts = []
    for at in range(start, tokens.shape[1], W):
      hidden = masked[:, k, at - start : at - start + W]
      block = jnp.where(hidden, cfg.mask_id, tokens[:, at : at + W])
      text = jnp.concatenate([tokens[:, :at], block], 1)
      logits = model.full_logits(cfg, params, text, valid[:, : at + W])[:, at:]
      logp = model.logp_of(logits, tokens[:, at : at + W])
      parts.append(jnp.where(hidden, logp, 0.0))
    rows.append(jnp.concatenate(parts, 1))
  return jnp.stack(rows, 1)


@pytest.mark.parametrize('shift', [False, True])
def test_one_packed_pass_is_the_forward_of_every_block(case, shift):
  params, tokens, valid, masked = case
  cfg = family(shift=shift)

  def both(params):
    packed = logprob.token_logp(cfg, params, tokens, masked, valid)
    return packed, block_by_block(cfg, params, tokens, valid, masked)

  got, want = both(params)
  np.testing.assert_allclose(got, want, atol=2e-5)
  one, other = (
    jax.grad(lambda params, which=which: jnp.sum(jnp.sin(both(params)[which])))(params)
    for which in (0, 1)
  )
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.max(jnp.abs(b))) + 1e-7)


def test_nothing_leaks_between_copies_or_from_later_blocks(case):
  params, tokens, valid, masked = case
  at = 8 + 5  # a token of the second block, masked in every copy
  masked = masked.at[:, :, 5].set(True)
  see = lambda tokens, masked: np.asarray(
    layout.block_causal(
      CFG, params, tokens, Masks(masked, jnp.ones((3, K, 1))), valid, None
    ).hidden
  ).reshape(3, K, L // W, W, -1)
  base = see(tokens, masked)
  other = see(tokens.at[:, at].add(1), masked)
  moved = np.abs(other - base).max((0, 1, 3, 4))
  assert (moved[:2] == 0).all() and moved[2] > 1e-3
  other = see(tokens, masked.at[:, 1, 1].set(~masked[:, 1, 1]))
  moved = np.abs(other - base).max((0, 3, 4))
  assert moved[1, 0] > 1e-3
  moved[1, 0] = 0
  assert (moved == 0).all()


def test_padding_and_neighbours_change_no_log_prob(case):
  params, tokens, valid, masked = case
  want = logprob.token_logp(CFG, params, tokens, masked, valid)
  alone = logprob.token_logp(CFG, params, tokens[1:2, 4:], masked[1:2])
  np.testing.assert_allclose(alone[0], want[1], atol=1e-5)


LAWS = {
  'best': dict(pick='confidence', rank='max', steps=L),
  'two a step': dict(pick='confidence', rank='max', steps=L // 2),
  'threshold': dict(pick='threshold', rank='max', threshold=0.3),
  'random': dict(pick='random', block=2),
}


def settings(**fields):
  fields = dict(length=L, block=W, steps=L, temperature=1.0) | fields
  return sampler.SampleConfig(**fields)


@pytest.mark.parametrize('law', LAWS)
@pytest.mark.parametrize('shift', [False, True])
def test_the_trajectory_is_one_packed_pass(case, law, shift):
  """Recorded = packed = step by step, for prompts of every length modulo W."""
  params, tokens, _, _ = case
  cfg, tokens = family(shift=shift), jnp.concatenate([tokens[:, :9]] * 2)[:5]
  valid = jnp.arange(9)[None] >= jnp.asarray([0, 1, 2, 3, 6])[:, None]
  out = {
    cache: sampler.generate(
      cfg, params, tokens, jax.random.key(1), settings(cache=cache, **LAWS[law]), valid
    )
    for cache in ('none', 'block')
  }
  none, cached = out['none'], out['block']
  for name in ('tokens', 'order', 'valid'):
    np.testing.assert_array_equal(getattr(cached, name), getattr(none, name), name)
  np.testing.assert_allclose(cached.logp, none.logp, atol=3e-5)
  hp = settings(**LAWS[law])
  new, old = logprob.trajectory_logp(cfg, params, none, hp.law())
  np.testing.assert_allclose(old, np.sum(none.logp, 1), rtol=1e-6)
  np.testing.assert_allclose(new, old, atol=1e-4)
  steps = range(int(none.order.max()) + 1)
  each = [
    logprob.state_logp(cfg, params, none, jnp.full((5,), step), hp.law())[0]
    for step in steps
  ]
  np.testing.assert_allclose(new, sum(each), atol=1e-4)


def test_a_prompt_shares_its_last_block_with_the_completion(case):
  """The first step's log-probs are those of the text without padding."""
  params, tokens, _, _ = case
  for count in range(1, 10):
    prompt = tokens[:1, :count]
    wide = jnp.pad(prompt, ((0, 0), (3, 0)), constant_values=5)
    valid = jnp.arange(count + 3)[None] >= 3
    one, other = (
      model.align(CFG, *args, 0, L)
      for args in ((prompt, jnp.ones((1, count), bool)), (wide, valid))
    )
    np.testing.assert_array_equal(one.tokens[:, -L:], other.tokens[:, -L:])
    head, rest = count // W * W, count % W
    assert int(jnp.sum(one.valid)) == head + L
    assert one.given[0].tolist() == [i < rest for i in range(L)]
    np.testing.assert_array_equal(one.tokens[0, -L : -L + rest or None][:rest],
                                  prompt[0, head:])  # fmt: skip
    text = jnp.concatenate([prompt, jnp.full((1, L - rest), CFG.mask_id)], 1)
    plain = model.full_logits(CFG, params, text)[:, -L + rest :]
    for canvas in (one, other):
      got = model.full_logits(CFG, params, canvas.tokens, canvas.valid)[:, -L + rest :]
      np.testing.assert_allclose(got, plain, atol=2e-5)


def test_rounds_are_counted_within_blocks():
  order = jnp.asarray([[3, 1, 1, 2, 5, 4, 4, 4], [0, 1, 2, 3, -1, -1, -1, -1]])
  want = [[2, 0, 0, 1, 1, 0, 0, 0], [0, 1, 2, 3, -1, -1, -1, -1]]
  np.testing.assert_array_equal(logprob.rounds_of(order, 4), want)


def test_a_block_of_one_token_is_an_autoregressive_model(case):
  """W = 1: one packed pass with every place masked is the causal model's log p."""
  params, tokens, valid, _ = case
  cfg = family(block_causal=1)
  masked = jnp.ones((3, 1, L), bool)
  got = logprob.token_logp(cfg, params, tokens, masked, valid)[:, 0]
  for at in range(L):
    text = tokens[:, : 8 + at + 1].at[:, -1].set(cfg.mask_id)
    logits = model.full_logits(cfg, params, text, valid[:, : 8 + at + 1])[:, -1]
    np.testing.assert_allclose(
      got[:, at], model.logp_of(logits, tokens[:, 8 + at]), atol=2e-5
    )


def test_copies_of_a_block_model_share_its_prompt(case):
  params, tokens, valid, masked = case
  masks = Masks(masked, jnp.ones((3, K, 1)), prompt=jnp.ones((3, K, 8), bool))
  with pytest.raises(ValueError, match='prompt'):
    logprob.view_logp(CFG, params, tokens, masks, valid)
  with pytest.raises(ValueError, match='10 tokens.*multiple.*4'):
    logprob.token_logp(CFG, params, tokens, masked[..., :10], valid)
