"""Log-likelihoods of given texts, against enumerations and loops over forwards."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax import data, likelihood, model, sampler
from dmpo_jax.likelihood import Likelihood, Program
from dmpo_jax.sampler import SampleConfig

L, P, PAD = 4, 6, 8
LAW = SampleConfig(length=L, block=2, steps=L, rank='max')
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 1, 2]]
ANSWERS = [[3, 1, 4], [1, 5]]


@pytest.fixture(params=['whole', 'blocks'])
def cfg(request, tiny):
  """A model that sees the whole text, and one that attends in blocks of four."""
  size = {'whole': 0, 'blocks': 4}[request.param]
  return dataclasses.replace(tiny, block_causal=size, positions=32)


def inputs(cfg, prompts, answers, length):
  tokens, valid = data.left_pad(prompts, P, PAD)
  padded = np.full((len(answers), length), -1, np.int32)
  for row, ids in enumerate(answers):
    padded[row, : len(ids)] = ids
  return tokens, valid, padded


def logp_of(cfg, params, prompts, answers, program):
  """Log-likelihoods, and which are greedy; the row id is the place in the list."""

  @jax.jit
  def run(params, tokens, valid, padded):
    text = likelihood.place(cfg, tokens, valid, padded)
    rows = jax.random.key(1), jnp.arange(len(prompts))
    return likelihood.text_logp(cfg, params, text, rows, program)

  found = run(params, *inputs(cfg, prompts, answers, program.length))
  return [np.asarray(x) for x in found]


def length_of(cfg):
  """Of the canvas that holds the answers, and the prompts' ends with them."""
  return 8 if cfg.block_causal else L


def full_logits(cfg, params, ids):
  call = jax.jit(model.full_logits, static_argnums=0)
  return call(cfg, params, jnp.array([ids], jnp.int32))[0]


def masked_logp(cfg, params, prompt, answer, hidden, guidance=0.0):
  """Log-probs of an answer whose tokens in `hidden` are masked: no padding anywhere.

  A block-causal model does not see the blocks behind.
  """
  noisy = [cfg.mask_id if i in hidden else x for i, x in enumerate(answer)]
  logits = lambda ids: full_logits(cfg, params, ids)
  found = logits(prompt + noisy)
  if guidance:
    blind = logits([cfg.mask_id] * len(prompt) + noisy)
    found = blind + (guidance + 1) * (found - blind)
  logp = jax.nn.log_softmax(found)[len(prompt) :]
  return np.array([logp[i, x] for i, x in enumerate(answer)])


@pytest.mark.parametrize('guidance', [0.0, 0.5])
def test_elbo_is_the_mean_over_counts_and_places(cfg, params, guidance):
  """Of the whole answer, or where there are blocks of the one that it lies in."""
  if guidance and cfg.block_causal:
    return test_guidance_has_no_elbo_in_blocks(cfg, params)
  # In blocks the first answer fills the block that its prompt begins.
  answers = [ANSWERS[0][: 1 if cfg.block_causal else 3], ANSWERS[1]]
  law = dataclasses.replace(LAW, guidance=guidance)
  program = Program(Likelihood(draws=240), law, length_of(cfg), 80)
  found, greedy = logp_of(cfg, params, PROMPTS, answers, program)
  assert not greedy.any()
  for prompt, answer, estimate in zip(PROMPTS, answers, found, strict=True):
    count, copies = len(answer), []  # equally likely sums of copies, by their count
    for m in range(1, count + 1):
      sums = [
        count / m * masked_logp(cfg, params, prompt, answer, s, guidance)[list(s)].sum()
        for s in itertools.combinations(range(count), m)
      ]
      copies.append(sums)
    exact = np.mean([np.mean(sums) for sums in copies])
    spread = np.sqrt(np.mean([np.var(sums) for sums in copies]) / 240)
    assert abs(estimate - exact) < 5 * spread + 1e-4


def test_guidance_has_no_elbo_in_blocks(cfg, params):
  if not cfg.block_causal:
    return
  law = dataclasses.replace(LAW, guidance=0.5)
  with pytest.raises(ValueError, match='sampler.guidance'):
    program = Program(Likelihood(draws=2), law, 8, 2)
    logp_of(cfg, params, PROMPTS, ANSWERS, program)


def test_trajectory_is_that_of_greedy_decoding(cfg, params):
  """What the greedy sampler writes has the log-prob that it records, and is greedy."""
  length = length_of(cfg)
  hp = dataclasses.replace(LAW, length=length, steps=length)
  tokens, valid = data.left_pad(PROMPTS, P, PAD)
  sampled = sampler.generate(cfg, params, tokens, jax.random.key(0), hp, valid)
  written = data.after_given(sampled.order, sampled.tokens[:, -length:], -1)
  logp = np.where(sampled.order >= 0, sampled.logp, 0).sum(1)
  program = Program(Likelihood(by='trajectory'), LAW, length, 1)
  answers = [[int(x) for x in row if x >= 0] for row in written]
  found, greedy = logp_of(cfg, params, PROMPTS, answers, program)
  np.testing.assert_allclose(found, logp, rtol=1e-5)
  assert greedy.all()
  answers[0][1] = (answers[0][1] + 1) % 7
  changed, greedy = logp_of(cfg, params, PROMPTS, answers, program)
  assert list(greedy) == [False, True] and changed[1] == found[1]
  # And of any other text, the one of a loop over whole forwards.
  found, _ = logp_of(cfg, params, PROMPTS, ANSWERS, program)
  for prompt, answer, value in zip(PROMPTS, ANSWERS, found, strict=True):
    assert abs(follow(cfg, params, prompt, answer) - value) < 1e-4


def follow(cfg, params, prompt, answer):
  """The surest position of the first block with a mask, one after the other."""
  hidden, total, block = set(range(len(answer))), 0.0, LAW.block
  start = len(prompt) % cfg.block_causal if cfg.block_causal else 0
  while hidden:
    first = (start + min(hidden)) // block
    here = [i for i in sorted(hidden) if (start + i) // block == first]
    visible = answer[: (first + 1) * block - start] if cfg.block_causal else answer
    noisy = [cfg.mask_id if i in hidden else x for i, x in enumerate(visible)]
    logits = full_logits(cfg, params, prompt + noisy)[len(prompt) :]
    logp = jax.nn.log_softmax(logits.at[:, cfg.mask_id].set(-jnp.inf))
    best = max(here, key=lambda i: (float(logp[i].max()), -i))
    total += float(logp[best, answer[best]])
    hidden.discard(best)
  return total


@pytest.mark.parametrize('cfg', ['blocks'], indirect=True)
def test_a_text_has_its_number_whatever_is_beside_it(cfg, params):
  """And wherever its prompt is padded to: a number depends on text and row id."""
  length = length_of(cfg)
  for how in (Likelihood(draws=4), Likelihood(by='trajectory')):
    program = Program(how, LAW, length, 2)
    both, _ = logp_of(cfg, params, PROMPTS, ANSWERS, program)
    alone, _ = logp_of(cfg, params, PROMPTS[:1], ANSWERS[:1], program)
    np.testing.assert_allclose(both[0], alone[0], rtol=1e-5)


@pytest.mark.parametrize(
  'fields', [{'pick': 'random'}, {'pick': 'wino'}, {'rank_temperature': 0.5}]
)
def test_no_trajectory_without_an_order_of_the_state(fields):
  with pytest.raises(ValueError, match='sampler.pick'):
    sampler.following(dataclasses.replace(LAW, **fields), L)


@pytest.mark.parametrize(
  'block, count, length', [(8, 3, 16), (8, 20, 32), (24, 30, 48)]
)
def test_canvases_are_whole_blocks(tiny, block, count, length):
  law = SampleConfig(length=2 * block, block=block, steps=block)
  assert likelihood.canvas_length(tiny, law, 5, count) == length
  greedy = sampler.following(law, length)
  assert (greedy.length, greedy.block) == (length, min(block, length))
  assert greedy.steps == length // 2  # two tokens a step, as law has
