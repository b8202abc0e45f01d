"""Block-causal models: the packed pass, likelihoods and sampling of block diffusion."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import mostly_slow

from dmpo_jax import layout, logprob, masking, model, routing, sampler
from dmpo_jax.types import GIVEN, Canvas, Masks

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


@pytest.mark.long
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


def test_a_text_sees_no_later_block(case):
  params, tokens, valid, _ = case
  see = lambda tokens: np.asarray(model.full_logits(CFG, params, tokens, valid))
  moved = np.abs(see(tokens.at[:, 13].add(1)) - see(tokens)).max((0, 2))
  assert (moved[:12] == 0).all() and (moved[12:] > 1e-3).all()


def test_padding_and_neighbours_change_no_log_prob(case):
  params, tokens, valid, masked = case
  want = logprob.token_logp(CFG, params, tokens, masked, valid)
  alone = logprob.token_logp(CFG, params, tokens[1:2, 4:], masked[1:2])
  np.testing.assert_allclose(alone[0], want[1], atol=1e-5)


@pytest.mark.parametrize('shift', [False, True])
def test_padding_and_neighbours_change_no_completion(case, shift):
  """Nor does the id of the padding, which is a token like any other."""
  params, tokens, _, _ = case
  cfg, hp = family(shift=shift), settings(cache='block', pick='random_order')
  prompts, valid = tokens[:, :11], jnp.arange(11)[None] >= jnp.asarray([[0], [4], [6]])

  def draw(cfg, rows, left=0):
    keys = jax.random.split(jax.random.key(7), 3)[rows]
    args = prompts[rows, left:], valid[rows, left:], keys, hp
    return sampler.sample(cfg, params, *args)

  out = draw(cfg, slice(None))
  common = int(np.bincount(np.ravel(out.tokens[:, -L:])).argmax())
  turned = draw(dataclasses.replace(cfg, pad_id=common), slice(None, None, -1))
  for again, rows in ((draw(cfg, slice(1, 2), 4), [1]), (turned, [2, 1, 0])):
    for name, cut in (('tokens', slice(-L, None)), ('order', slice(None))):
      mine, theirs = (np.asarray(getattr(x, name))[:, cut] for x in (again, out))
      np.testing.assert_array_equal(mine, theirs[rows])
    np.testing.assert_allclose(again.logp, out.logp[np.array(rows)], atol=2e-5)


ORDER = dict(rank='token', order_logp=True)
QUICK = ('best', 'threshold', 'random', 'SDAR dynamic')
LAWS = {
  'best': dict(pick='confidence', rank='max', steps=L),
  'two a step': dict(pick='confidence', rank='max', steps=L // 2),
  'threshold': dict(pick='threshold', rank='max', threshold=0.3),
  'random': dict(pick='random', block=2),
  # Ranked by the sampled token, with the log-prob of the order.
  'SDAR static': dict(pick='confidence', steps=L // 2, **ORDER),
  'SDAR dynamic': dict(
    pick='dynamic', threshold=0.12, temperature=0.8, rank_law='sampling', **ORDER
  ),
  'leftmost': dict(
    pick='threshold', threshold=0.12, fallback='leftmost', block=2, **ORDER
  ),
  # Every other rule whose recorded log-probs are exact.
  **{
    pick: dict(pick=pick, rank='max')
    for pick, rule in sampler.PICKS.items()
    if rule.records and pick not in ('threshold', 'random', 'plackett_luce')
  },
  'dynamic': dict(pick='dynamic', rank='max', threshold=0.1, steps=L // 2),
  'plackett_luce': dict(pick='plackett_luce', rank='max', rank_temperature=0.5),
  'drawn positions': dict(pick='margin', rank_temperature=0.5),
}


def settings(**fields):
  fields = dict(length=L, block=W, steps=L, temperature=1.0) | fields
  return sampler.SampleConfig(**fields)


@pytest.mark.parametrize('law', mostly_slow(LAWS, QUICK))
@pytest.mark.parametrize('shift', [False, True])
def test_the_trajectory_is_one_packed_pass(case, law, shift):
  """Recorded = packed = step by step, for prompts of every length modulo W."""
  params, tokens, _, _ = case
  cfg, tokens = family(shift=shift), jnp.concatenate([tokens[:, :9]] * 2)
  valid = jnp.arange(9)[None] >= jnp.asarray([0, 1, 2, 3, 5, 6])[:, None]
  assert settings(**LAWS[law]).order_from() in ('state', 'noise')
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
  for row, real in enumerate(np.asarray(valid)):  # the prompt stands as it was
    text = np.asarray(none.tokens[row])[np.asarray(none.valid[row])]
    np.testing.assert_array_equal(text[: real.sum()], tokens[row, real])
    assert (text[real.sum() :] != cfg.mask_id).all()
  hp = settings(**LAWS[law])
  new, old = logprob.trajectory_logp(cfg, params, none, hp)
  placed = np.sum(none.more['order_logp'], 1) if hp.order_logp else 0
  assert not hp.order_logp or (placed < -0.1).any()
  np.testing.assert_allclose(old, np.sum(none.logp, 1) + placed, rtol=1e-6)
  np.testing.assert_allclose(new, old, atol=1e-4)
  steps = range(int(none.order.max()) + 1)
  each = [
    logprob.state_logp(cfg, params, none, jnp.full((6,), step), hp)[0] for step in steps
  ]
  np.testing.assert_allclose(new, sum(each), atol=1e-4)


@pytest.mark.slow
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


@pytest.mark.parametrize('shift', [False, True])
def test_the_first_step_is_a_forward_of_the_text_without_padding(case, shift):
  """For prompts of 1 to 9 tokens with 0 to W + 9 columns of padding before them."""
  params, tokens, _, _ = case
  cfg, counts = family(shift=shift), np.arange(1, 10)
  hp = settings(cache='block', pick='random_order')
  full = jax.jit(lambda text: model.full_logits(cfg, params, text))
  for size in (9, 9 + W + 1):
    valid = np.arange(size)[None] >= size - counts[:, None]
    wide = np.zeros((9, size), np.int32)
    for row, count in enumerate(counts):
      wide[row, size - count :] = tokens[0, :count]
    out = sampler.generate(
      cfg, params, jnp.asarray(wide), jax.random.key(size), hp, jnp.asarray(valid)
    )
    for row, count in enumerate(counts):
      at = int(np.flatnonzero(out.order[row] == 0)[0])
      rest = count % W
      masks = jnp.full((1, W - rest), cfg.mask_id)
      text = jnp.concatenate([tokens[:1, :count], masks], 1)
      logits = full(text)[0, count - rest + at]
      logits = model.without_mask(cfg, logits[None, None])[0, 0]
      want = model.logp_of(logits, out.tokens[row, at - L])
      if shift and at == 0 and count < W:
        continue  # nothing stands before it
      np.testing.assert_allclose(out.logp[row, at], want, atol=3e-5)


def test_a_block_that_shifts_begins_with_the_next_token_of_the_text(case):
  """Drawn from the clean block before it, also where the prompt is one whole block."""
  params, tokens, _, _ = case
  cfg, rows = family(shift=True), 4096
  prompt = jnp.repeat(tokens[:1, :W], rows, 0)
  hp = settings(cache='block', pick='threshold', temperature=0.7, length=W)
  out = sampler.generate(cfg, params, prompt, jax.random.key(5), hp)
  at = jnp.arange(W)[None]
  mask = model.attention_mask(cfg, None, at, at)
  h, _ = model.states(cfg, params, model.Inputs(prompt[:1], at, mask))
  logits = model.without_mask(cfg, model.head(cfg, params, h))[0, -1] / 0.7
  law = np.asarray(jax.nn.softmax(logits))
  seen = np.bincount(out.tokens[:, W], minlength=cfg.vocab)
  often = law * rows > 5
  chi = ((seen - law * rows) ** 2 / np.maximum(law * rows, 1e-9))[often].sum()
  assert (out.order[:, 0] == 0).all() and law.max() < 0.9 and often.sum() > 4
  assert chi < often.sum() + 5 * (2 * often.sum()) ** 0.5
  want = jax.nn.log_softmax(logits)[out.tokens[:, W]]
  np.testing.assert_allclose(out.logp[:, 0], want, atol=3e-5)


def test_guidance_has_a_cache_of_its_own(case):
  params, tokens, _, _ = case
  valid = jnp.arange(9)[None] >= jnp.asarray([0, 1, 2])[:, None]
  none, cached = (
    sampler.generate(CFG, params, tokens[:, :9], jax.random.key(6), hp, valid)
    for hp in (settings(guidance=0.8, pick='random_order', cache=cache)
               for cache in ('none', 'block'))
  )  # fmt: skip
  np.testing.assert_array_equal(cached.tokens, none.tokens)
  np.testing.assert_allclose(cached.logp, none.logp, atol=5e-5)
  law = settings(guidance=0.8, pick='random_order')
  each = [logprob.state_logp(CFG, params, none, jnp.full((3,), step), law)
          for step in range(L)]  # fmt: skip
  np.testing.assert_allclose(*sum(each), atol=1e-4)
  with pytest.raises(ValueError, match='guidance = 0.8.*set 0'):
    logprob.trajectory_logp(CFG, params, none, law)


def test_rounds_are_counted_within_blocks():
  order = jnp.asarray([[3, 1, 1, 2, 5, 4, 4, 4], [0, 1, 2, 3, -1, -1, -1, -1]])
  want = [[2, 0, 0, 1, 1, 0, 0, 0], [0, 1, 2, 3, -1, -1, -1, -1]]
  np.testing.assert_array_equal(routing.rounds_of(order, 4), want)


@pytest.mark.slow
@pytest.mark.long
def test_a_block_of_one_token_is_an_autoregressive_model(case):
  """W = 1: one packed pass with every place masked is the causal model's log p."""
  params, tokens, valid, _ = case
  cfg = family(block_causal=1)
  masked = jnp.ones((3, 1, L), bool)
  got = logprob.token_logp(cfg, params, tokens, masked, valid)[:, 0]
  see = jax.jit(lambda text: model.full_logits(cfg, params, text, valid))
  for at in range(8, 8 + L):  # what stands behind is not seen
    logits = see(tokens.at[:, at].set(cfg.mask_id))[:, at]
    np.testing.assert_allclose(
      got[:, at - 8], model.logp_of(logits, tokens[:, at]), atol=2e-5
    )
  masks = masking.draw_blocks(jax.random.key(0), jnp.arange(3), Canvas(L, 1), 2)
  elbo = logprob.elbo(cfg, params, tokens, valid, masks)
  np.testing.assert_allclose(elbo, jnp.sum(got, 1), rtol=1e-5)
  hp = settings(block=1, cache='block')
  out = sampler.generate(
    cfg, params, tokens[:, :8], jax.random.key(0), hp, valid[:, :8]
  )
  new, old = logprob.trajectory_logp(cfg, params, out, hp)
  np.testing.assert_allclose(new, old, atol=1e-4)


def test_one_block_is_a_row_whose_prompt_does_not_see_it(case):
  params, tokens, _, masked = case
  cfg, text = (
    family(block_causal=L),
    jnp.concatenate([tokens[:, :L], tokens[:, -L:]], 1),
  )
  got = logprob.token_logp(cfg, params, text, masked)
  for k in range(K):
    noisy = jnp.where(masked[:, k], cfg.mask_id, text[:, L:])
    row = jnp.concatenate([text[:, :L], noisy], 1)
    logits = model.full_logits(cfg, params, row)[:, L:]
    want = jnp.where(masked[:, k], model.logp_of(logits, text[:, L:]), 0)
    np.testing.assert_allclose(got[:, k], want, atol=2e-5)


def test_copies_of_a_block_model_share_its_prompt(case):
  params, tokens, valid, masked = case
  masks = Masks(masked, jnp.ones((3, K, 1)), prompt=jnp.ones((3, K, 8), bool))
  with pytest.raises(ValueError, match='prompt'):
    logprob.view_logp(CFG, params, tokens, masks, valid)
  with pytest.raises(ValueError, match='10 tokens.*multiple.*4'):
    logprob.token_logp(CFG, params, tokens, masked[..., :10], valid)


# --- masks and estimators


def table(block, past, at, state):
  """q(. | past, state) of the table model: 2 blocks of 2 tokens, symbols 0, 1, 2.

  Mask: 3. past: the tokens of block 0, for block 1.
  """
  before = 0 if block == 0 else 1 + 3 * past[0] + past[1]
  logits = [
    1.5 * np.sin(1 + 2 * v + 3 * block + 0.7 * before + 1.3 * at
                 + 0.9 * state[0] + 0.4 * state[1])
    for v in range(3)
  ]  # fmt: skip
  return np.exp(logits) / np.exp(logits).sum()


def table_logp(tokens, masked):
  """log q of the masked tokens of four, 0 elsewhere."""
  out = np.zeros(4)
  for i in np.flatnonzero(masked):
    block = i // 2
    part = slice(2 * block, 2 * block + 2)
    state = np.where(masked[part], 3, tokens[part])
    out[i] = np.log(table(block, tokens[:2], i % 2, state)[tokens[i]])
  return out


TEXT = np.array([2, 0, 1, 1])
STATES = {m: table_logp(TEXT, np.array(m)) for m in itertools.product([0, 1], repeat=4)}
ELBO = -4.389369  # the mean over the orders of each block: -2.828760 - 1.560609
DRAWS = {
  'independent': lambda key, row: masking.draw_blocks(key, row, CANVAS, 4),
  'spread': lambda key, row: masking.draw_blocks(key, row, CANVAS, 4, spread=True),
  'order': lambda key, row: masking.draw_order(key, row, CANVAS),
}
CANVAS = Canvas(4, 2)


def test_the_table_is_as_worked_out_by_hand():
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=5e-7)
  close(table(0, None, 0, (3, 3)), [0.048425, 0.503383, 0.448192])
  close(table(1, (2, 0), 1, (1, 3)), [0.122497, 0.798786, 0.078717])
  total = 0
  for block in (0, 1):
    for first in (0, 1):
      both, one = np.zeros(4, int), np.zeros(4, int)
      both[2 * block : 2 * block + 2] = 1
      one[2 * block + 1 - first] = 1
      total += STATES[tuple(both)][2 * block + first] + STATES[tuple(one)].sum()
  close(total / 2, ELBO)


# Rule -> log-prob of TEXT, and log p_ref - log p_old of it along the same steps.
TABLE_LAWS = {
  'left to right': (dict(pick='sequential'), -4.314856, None),
  'one a step': (dict(pick='confidence', rank='max'), -4.463882, 0.161475),
  'two a step': (dict(pick='confidence', rank='max', steps=2), -5.276045, -0.563481),
  'threshold': (
    dict(pick='threshold', rank='max', threshold=0.6), -4.657519, -0.117105
  ),
}  # fmt: skip


def table_logits(cfg, params, tokens, valid, start, width, *_, **__):
  """The table model in the place of model.window_logits; its parameter is a phase."""
  text = tokens[:, -4:]
  block = (start - (tokens.shape[1] - 4)) // 2
  before = jnp.where(block == 0, 0, 1 + 3 * text[:, 0] + text[:, 1])
  state = jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (2 * at,), (2,)))(
    text, block
  )
  base = (
    1
    + 3 * block
    + 0.7 * before
    + 0.9 * state[:, 0]
    + 0.4 * state[:, 1]
    + params['phase']
  )
  at, symbol = jnp.arange(2)[None, :, None], jnp.arange(4)[None, None]
  logits = 1.5 * jnp.sin(base[:, None, None] + 1.3 * at + 2 * symbol)
  return model.without_mask(cfg, logits), None


@pytest.mark.parametrize('rule', TABLE_LAWS)
def test_the_sampler_has_the_law_of_the_table(rule, monkeypatch):
  """Each rule's law of a text, and the ratio to a reference along recorded states."""
  fields, want, ratio = TABLE_LAWS[rule]
  monkeypatch.setattr(model, 'window_logits', table_logits)
  cfg = family(vocab=4, mask_id=3, eos_id=-1, pad_id=0, block_causal=2)
  hp = sampler.SampleConfig(
    **dict(length=4, block=2, steps=4, temperature=1.0) | fields
  )
  prompt = jnp.zeros((8192, 2), jnp.int32)
  out = sampler.generate(cfg, {'phase': 0.0}, prompt, jax.random.key(0), hp)
  both = [
    logprob.state_logp(cfg, {'phase': 0.3}, out, jnp.full((8192,), step), hp)
    for step in range(int(out.order.max()) + 1)
  ]
  new, old = (np.asarray(x, np.float64) for x in sum(both))
  texts = np.asarray(out.tokens[:, 2:])
  row = np.flatnonzero((texts == TEXT).all(1))[0]
  np.testing.assert_allclose(old[row], want, atol=2e-5)
  _, first = np.unique(texts, axis=0, return_index=True)
  assert 0.99 < np.exp(old[first]).sum() < 1 + 1e-5
  if ratio is not None:
    np.testing.assert_allclose((new - old)[row], ratio, atol=2e-5)
    tilt = 2.0 * (texts[:, 1:] == texts[:, :-1]).sum(1)
    total = np.exp(new + tilt)[first].sum()
    if rule == 'one a step':
      np.testing.assert_allclose(total, 21.229196, rtol=0.01)


@pytest.mark.parametrize('kind', DRAWS)
def test_block_draws_estimate_the_elbo(kind):
  """Unbiased, and each count of each block is as likely."""
  rows = 20_000
  masks = jax.device_get(DRAWS[kind](jax.random.key(0), jnp.arange(rows)))
  logp = np.array([[STATES[tuple(m)] for m in row] for row in masks.masked.astype(int)])
  value = (logp * masks.weight).sum(-1).mean(-1)
  error = value.std() / rows**0.5
  assert abs(value.mean() - ELBO) < 4 * error
  if kind != 'order':
    count = masks.masked.reshape(rows, 4, 2, 2).sum(-1)
    share = [(count == n).mean((0, 1)) for n in range(3)]
    np.testing.assert_allclose(share, [[0, 0], [0.5, 0.5], [0.5, 0.5]], atol=0.01)


def test_given_tokens_are_never_masked_and_weigh_nothing():
  """A block with n free tokens has counts 1..n and weights n / count."""
  free = jnp.asarray([[0, 1, 1, 1, 1, 1, 0, 0]], bool).repeat(4000, 0)
  canvas, row = Canvas(8, 4, free), jnp.arange(4000)
  for masks in (
    masking.draw_blocks(jax.random.key(1), row, canvas, 2),
    masking.draw_order(jax.random.key(1), row, canvas),
  ):
    masked, weight = np.asarray(masks.masked), np.asarray(masks.weight)
    assert not masked[..., [0, 6, 7]].any()
    # A sum of ones instead of log-probs: the number of free tokens.
    ones = (masked * weight).sum(-1).mean(-1)
    np.testing.assert_allclose(ones.mean(), 5, atol=0.1)
  rank = np.asarray(masks.masked).sum(1)  # order: each token in one more copy
  assert (np.sort(rank[:, 1:4], axis=1) == [1, 2, 3]).all()


def test_masks_do_not_depend_on_the_batch():
  for draw in DRAWS.values():
    many, one = (
      draw(jax.random.key(2), jnp.arange(5)),
      draw(jax.random.key(2), jnp.arange(3, 4)),
    )
    np.testing.assert_array_equal(many.masked[3:4], one.masked)


@pytest.mark.parametrize(
  'fields',
  [
    pytest.param(dict(pick='confidence', rank='max'), marks=pytest.mark.long),
    dict(pick='confidence', **ORDER),
    dict(pick='dynamic', threshold=0.45, temperature=0.8, **ORDER),
  ],
  ids=['max', 'static', 'dynamic'],
)
def test_a_sampled_law_sums_to_one(fields, weights):
  """Over all strings and orders; so does the reference's, and its weights give p*."""
  cfg = family(
    vocab=4, mask_id=3, eos_id=-1, pad_id=0, block_causal=2, width=8, heads=1, mlp=8
  )
  hp = sampler.SampleConfig(
    **dict(length=4, block=2, steps=4, temperature=1.0, cache='block') | fields
  )
  params, rows = weights(cfg), 16384
  ref = jax.tree.map(lambda x: x + 0.03 * jnp.cos(jnp.arange(x.size).reshape(x.shape)),
                     params)  # fmt: skip
  prompt = jnp.zeros((rows, 2), jnp.int32)
  out = sampler.generate(cfg, params, prompt, jax.random.key(0), hp)
  new, old = (
    np.asarray(x, np.float64)
    for x in logprob.trajectory_logp(cfg, ref, out, hp, logprob.Along(policy=params))
  )
  paths = np.concatenate([out.tokens[:, 2:], out.order], 1)
  _, first = np.unique(paths, axis=0, return_index=True)
  assert len(first) > 40 and np.std(new - old) > 0.05
  for logp in (old, new):
    assert 0.98 < np.exp(logp[first]).sum() < 1 + 1e-4
  # Self-normalised weights against p_ref exp(r / alpha) / Z over the strings.
  ids = paths[:, :4] @ 3 ** np.arange(4)
  tilt = 2.0 * (paths[:, 0] == paths[:, 3])
  count = lambda weight, at: np.bincount(ids[at], weight[at], 81) / weight[at].sum()
  goal = count(np.exp(new + tilt), first)
  distance = lambda logw: 0.5 * np.abs(count(np.exp(logw), slice(None)) - goal).sum()
  assert distance(new - old + tilt) < 0.05


# --- where a text ends


@pytest.mark.long
def test_the_block_of_a_stop_is_sampled_to_its_end(case):
  """With eos_stop a row ends at the block with a stop; the rest is EOS of no step."""
  params, tokens, _, _ = case
  cfg = family(stop_ids=(3, 4, 5, 6, 7))
  prompt = tokens[:, :9].at[:, 8].set(3)  # a stop of the prompt ends nothing
  draw = lambda **fields: sampler.generate(
    cfg, params, prompt, jax.random.key(3), settings(**dict(cache='block') | fields)
  )
  whole, short = draw(pick='random_order'), draw(pick='random_order', eos_stop=True)
  stop = np.asarray(model.is_stop(cfg, whole.tokens[:, -L:])) & (
    np.asarray(whole.order) >= 0
  )
  assert stop.any()
  for row in range(3):
    blocks = np.flatnonzero(stop[row]) // W
    end = (blocks[0] + 1) * W if len(blocks) else L
    for name in ('order', 'logp'):
      one, other = (np.asarray(getattr(x, name))[row, :end] for x in (short, whole))
      np.testing.assert_allclose(one, other, atol=1e-6)
    np.testing.assert_array_equal(short.tokens[row, 8 : 8 + end],
                                  whole.tokens[row, 8 : 8 + end])  # fmt: skip
    assert (short.order[row, end:] == -1).all()
    assert (short.tokens[row, 8 + end :] == cfg.eos_id).all()
  new, old = logprob.trajectory_logp(cfg, params, short, settings())
  np.testing.assert_allclose(new, old, atol=1e-4)
  plain = draw(pick='random_order', eos_stop=True, cache='none')
  np.testing.assert_array_equal(plain.tokens, short.tokens)
  np.testing.assert_allclose(plain.logp, short.logp, atol=3e-5)


def test_a_mask_token_at_the_end_of_a_prompt_is_text(case):
  params, tokens, _, _ = case
  prompt = tokens[:, :9].at[:, 8].set(CFG.mask_id)
  hp = settings(cache='block', pick='random_order')
  out = sampler.generate(CFG, params, prompt, jax.random.key(4), hp)
  assert (out.tokens[:, 8] == CFG.mask_id).all() and (out.order[:, 0] == GIVEN).all()
  assert (out.order[:, 1:] >= 0).all()
  new, old = logprob.trajectory_logp(CFG, params, out, hp)
  np.testing.assert_allclose(new, old, atol=1e-4)


@pytest.mark.parametrize(
  'cfg, fields, message',
  [
    (CFG, dict(cache='dual'), 'sampler.cache = dual.*blocks of 4.*set block'),
    (CFG, dict(block=6), 'sampler.block = 6.*blocks of 4'),
    (CFG, dict(length=10, block=2), 'sampler.length = 10.*blocks of 4'),
    (family(block_causal=0), dict(cache='block'), 'cache = block.*whole text'),
  ],
)  # fmt: skip
def test_blocks_and_caches_that_do_not_fit_are_refused(cfg, fields, message):
  hp = settings(**{'pick': 'random_order', **fields})
  with pytest.raises(ValueError, match=message):
    sampler.generate(cfg, {}, jnp.zeros((1, 4), jnp.int32), jax.random.key(0), hp)
