"""Log-probs against the network, and the ELBO against enumeration."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from dmpo_jax import layout, logprob, masking, model, rng, types
from dmpo_jax.logprob import LogprobConfig
from dmpo_jax.types import Masks

KEY = rng.key_for(0, 'score')
PROMPT = (3, 1, 4)
COMPLETION = (1, 5, 0, 2)
LENGTH = len(COMPLETION)


@pytest.fixture(scope='module')
def table(tiny, params):
  """log p(x_i | x_S) of one completion for every mask S: (2^L, L)."""
  return reference.conditionals(tiny, params, PROMPT, COMPLETION)


@pytest.fixture(scope='module')
def batch(tiny):
  """Two rows, the second with two places of padding, and three masks each."""
  draw = np.random.default_rng(0)
  tokens = draw.integers(8, size=(2, 5 + LENGTH)).astype(np.int32)
  valid = np.ones(tokens.shape, bool)
  valid[1, :2] = False
  masked = draw.uniform(size=(2, 3, LENGTH)) < 0.6
  return tuple(map(jnp.asarray, (tokens, masked, valid)))


@pytest.fixture(scope='module')
def token_logp(tiny, params):
  return jax.jit(
    lambda tokens, masked, valid: logprob.token_logp(
      tiny, params, tokens, masked, valid
    )
  )


@pytest.mark.smoke
def test_table_is_what_the_network_says(tiny, token_logp, table):
  """token_logp of all masks at once = the enumeration in NumPy; zero where
  not masked."""
  tokens = jnp.asarray([[0, 0, *PROMPT, *COMPLETION]] * 2, jnp.int32)
  valid = jnp.asarray([[0, 0] + [1] * 7] * 2, bool)
  masks = reference.subsets(LENGTH).reshape(2, 8, LENGTH)
  logp = token_logp(tokens, jnp.asarray(masks), valid)
  assert logp.dtype == jnp.float32
  np.testing.assert_allclose(logp.reshape(-1, LENGTH), table, atol=1e-5)
  assert np.all(np.asarray(logp)[~masks] == 0)


def test_token_logp_is_the_logits_gathered(tiny, params, token_logp, batch):
  tokens, masked, valid = batch
  logp = np.asarray(token_logp(*batch))
  noisy = layout.apply_masks(tokens, masked, tiny.mask_id)
  full = jax.jit(lambda noisy, valid: model.full_logits(tiny, params, noisy, valid))
  for k in range(3):
    logits = np.asarray(full(noisy[:, k], valid), np.float64)
    want = reference.log_softmax(logits)[:, -LENGTH:]
    for r, i in np.ndindex(2, LENGTH):
      value = want[r, i, tokens[r, i - LENGTH]] if masked[r, k, i] else 0.0
      np.testing.assert_allclose(logp[r, k, i], value, atol=1e-5)


def test_shifted_family(tiny, params, batch):
  """In Dream's family a token is read from the output before it, the first
  token of a completion from the prompt's last, and padding moves nothing."""
  cfg = dataclasses.replace(tiny, shift=True)
  found = jax.jit(lambda *x: logprob.token_logp(cfg, params, *x))(*batch)
  tokens, masked, valid = map(np.asarray, batch)
  for r, k in np.ndindex(2, 3):
    noisy = tokens[r].copy()
    noisy[-LENGTH:][masked[r, k]] = cfg.mask_id
    logits = reference.full_logits(cfg, params, noisy[valid[r]])[-LENGTH:]
    logp = reference.log_softmax(logits)[range(LENGTH), tokens[r, -LENGTH:]]
    want = np.where(masked[r, k], logp, 0.0)
    np.testing.assert_allclose(found[r, k], want, atol=1e-5)


def test_padding_and_neighbours(token_logp, batch):
  """More padding on the left, or other rows beside, change no value."""
  tokens, masked, valid = batch
  logp = token_logp(*batch)
  # The same first row, its prompt two shorter and then padded again.
  short = jnp.asarray([tokens[0, 2:]] * 2)
  padded = jnp.pad(short, ((0, 0), (2, 0)), constant_values=7)
  real = jnp.ones_like(valid).at[:, :2].set(False)
  more = token_logp(padded, masked, real)
  short_alone = token_logp(short, masked, jnp.ones(short.shape, bool))
  np.testing.assert_allclose(more, short_alone, atol=1e-5)
  turned = token_logp(*(x[::-1] for x in batch))
  np.testing.assert_allclose(turned[::-1], logp, atol=1e-6)


def test_head_chunk(tiny, params):
  """The head in chunks gives equal values and equal gradients."""
  draw = np.random.default_rng(1)
  hidden = jnp.asarray(draw.normal(size=(3, 6, tiny.width)), jnp.float32)
  targets = jnp.asarray(draw.integers(tiny.vocab, size=(3, 6)))
  weigh = jnp.asarray(draw.normal(size=(3, 6)), jnp.float32)
  found = []
  for chunk in (0, 2):
    cfg = dataclasses.replace(tiny, head_chunk=chunk)

    def loss(hidden, table, cfg=cfg):
      tree = {'params': {**params['params'], 'head': table}}
      logp = logprob.chosen_logp(cfg, tree, hidden, targets)['logp']
      return jnp.sum(weigh * logp), logp

    slopes = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    found.append(slopes(hidden, params['params']['head']))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found
  )
  logits = np.asarray(hidden) @ np.asarray(params['params']['head']).T
  want = np.take_along_axis(
    reference.log_softmax(logits), np.asarray(targets)[..., None], -1
  )[..., 0]
  np.testing.assert_allclose(found[1][1], want, atol=1e-5)


def test_head_chunk_must_divide(tiny, params, batch):
  cfg = dataclasses.replace(tiny, head_chunk=3)
  tokens, masked, valid = batch
  with pytest.raises(ValueError, match='head_chunk = 3 must divide'):
    jax.eval_shape(
      lambda params: logprob.token_logp(cfg, params, tokens, masked, valid), params
    )


def test_the_two_forms_of_the_elbo_agree(table):
  """Fixed counts = random orders, summed over every mask and order."""
  exact = reference.exact_elbo(table)
  np.testing.assert_allclose(reference.random_order_elbo(table), exact)
  assert exact < -2  # so that the tolerances below mean something


ROWS = 6000
ESTIMATORS = {
  'stratified': LogprobConfig(elbo='stratified', draws=4),
  'stratified, one pair': LogprobConfig(elbo='stratified', draws=2),
  'whole range': LogprobConfig(draws=3, low=0, high=1, antithetic=False),
  'whole range, antithetic': LogprobConfig(draws=2, low=0.0, high=1.0),
  'paper': LogprobConfig(),
  'paper, not antithetic': LogprobConfig(draws=2, antithetic=False),
}


@pytest.mark.parametrize('name', ESTIMATORS)
def test_expectations(name, table):
  """The mean over many draws is the enumerated expectation: the ELBO itself
  for stratified counts, L / (L + 1) of it for rates on (0, 1), and for the
  clamped rates what the integral over the rate says."""
  hp = ESTIMATORS[name]
  draw = jax.jit(lambda rows: logprob.draw(KEY, rows, types.Canvas(LENGTH), hp))
  masks = jax.device_get(draw(jnp.arange(ROWS)))
  assert masks.masked.shape == (ROWS, hp.draws, LENGTH)
  logp = table[reference.index_of(masks.masked)].astype(np.float32)
  values = np.asarray(logprob.seq_elbo(logp, masks.weight))
  exact = reference.exact_elbo(table)
  if name.startswith('stratified'):
    want = exact
  elif name.startswith('whole range'):
    want = exact * LENGTH / (LENGTH + 1)
  else:
    want = reference.bernoulli_elbo(
      table, hp.low, hp.high, hp.antithetic, lambda m, _: LENGTH / max(m, 1)
    )
  error = values.std() / ROWS**0.5
  assert error < 0.03 * abs(exact)  # fine enough to tell the cases apart
  assert abs(values.mean() - want) < 4 * error


@pytest.mark.parametrize('name', ['stratified', 'whole range', 'paper'])
def test_what_was_not_sampled_has_no_part(name, tiny, params, table):
  """With the last token left masked, the expectation is that of the other tokens
  alone, by enumeration, whatever stands in the last place."""
  hp, short = ESTIMATORS[name], LENGTH - 1
  sampled = jnp.arange(LENGTH)[None] < short
  every = Masks(jnp.asarray(reference.subsets(LENGTH))[None], jnp.ones((1, 16, 1)))
  view = jax.jit(
    lambda tokens: logprob.view_logp(
      tiny, params, tokens, every._replace(sampled=sampled)
    )
  )
  row = np.array([[*PROMPT, *COMPLETION]], np.int32)
  logp = np.asarray(view(row).logp[0])
  row[0, -1] = tiny.eos_id
  np.testing.assert_array_equal(view(row).logp[0], logp)
  alone = table[2**short :, :short]  # the last token masked
  np.testing.assert_allclose(logp[: 2**short, :short], alone, atol=1e-5)
  draw = jax.jit(lambda rows: logprob.draw(KEY, rows, types.Canvas(LENGTH), hp))
  masks = jax.device_get(draw(jnp.arange(ROWS)))
  values = logprob.seq_elbo(logp[reference.index_of(masks.masked)], masks.weight)
  if name == 'paper':  # the factor L / m is of all L positions
    want = reference.bernoulli_elbo(
      np.pad(np.concatenate([alone, alone]), ((0, 0), (0, 1))),
      *(hp.low, hp.high, hp.antithetic),
      lambda m, _: LENGTH / max(m, 1),
    )
  else:
    factor = 1 if name == 'stratified' else LENGTH / (LENGTH + 1)
    want = reference.exact_elbo(alone) * factor
  error = np.std(values) / ROWS**0.5
  assert error < 0.03 * abs(want)
  assert abs(np.mean(values) - want) < 4 * error


def test_sft_draw_is_an_elbo(table):
  """Weight 1/p makes the masked sum of SFT an ELBO, but for the floor."""
  draw = jax.jit(lambda rows: masking.draw_sft(KEY, rows, types.Canvas(LENGTH)))
  masks = jax.device_get(draw(jnp.arange(40_000)))
  values = np.asarray(
    logprob.seq_elbo(table[reference.index_of(masks.masked)], masks.weight)
  )
  want = reference.bernoulli_elbo(table, 1e-3, 1.0, False, lambda m, rate: 1 / rate)
  np.testing.assert_allclose(want, reference.exact_elbo(table), rtol=0.02)
  assert abs(values.mean() - want) < 4 * values.std() / len(values) ** 0.5


def test_elbo_counts_what_it_is_told(tiny, params, batch, token_logp):
  """elbo is the mean over draws of weight times the sum of token_logp, over
  the counted positions alone."""
  tokens, masked, valid = batch
  weight = jnp.asarray([[1.0, 2.0, 4.0], [3.0, 0.0, 1.0]])
  masks = Masks(masked, weight[..., None])
  counted = jnp.asarray([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
  found = jax.jit(
    lambda counted: logprob.elbo(tiny, params, tokens, valid, masks, counted)
  )(counted)
  logp = np.asarray(token_logp(*batch)) * np.asarray(counted)[:, None]
  want = np.mean(np.asarray(weight) * logp.sum(-1), axis=-1)
  np.testing.assert_allclose(found, want, rtol=1e-5)
