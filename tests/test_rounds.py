"""Losses over recorded rounds against forwards of each recorded state.

Models of both families sample completions, some of which end early. Every state is then
laid out by hand and read by one plain forward.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_block

from dmpo_jax import logprob, masking, model, sampler
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.types import (
  Canvas,
  Record,
  Rollouts,
  Scored,
  Text,
  TrainBatch,
  Views,
  to_rows,
)

W, L, P, ROWS, GROUP = 4, 12, 9, 4, 2
SEES = {'blocks': W, 'whole text': 0}
STOP = 3
REWARD = jnp.array([[0.0, 1.0], [2.0, 0.5]])


@dataclasses.dataclass(frozen=True)
class Case:
  """Rollouts of a model, and their law."""

  cfg: model.ModelConfig
  params: dict
  out: Rollouts
  hp: sampler.SampleConfig

  @property
  def completion(self):
    own = self.out.order != -2
    stop = model.is_stop(self.cfg, self.out.tokens[:, -L:]) & own
    return masking.completion_mask(stop) & own

  def logp_of(self, params, counted):
    """Returns (R,): the sum over steps of forwards of their states, in nats."""
    out, order = self.out, np.asarray(self.out.order)

    def of_step(step):
      hidden = (order >= step) | (order == -1)
      text = jnp.where(hidden, self.cfg.mask_id, out.tokens[:, -L:])
      text = jnp.concatenate([out.tokens[:, :-L], text], axis=1)
      logits = model.full_logits(self.cfg, params, text, out.valid)[:, -L:]
      logits = logits.at[..., self.cfg.mask_id].set(-1e9) / self.hp.temperature
      logp = model.logp_of(logits, out.tokens[:, -L:])
      return jnp.sum(jnp.where((order == step) & counted, logp, 0.0), axis=1)

    return jnp.sum(jax.lax.map(of_step, jnp.arange(order.max() + 1)), axis=0)

  def text(self):
    out = self.out
    free = out.order >= 0
    canvas = Canvas(L, self.cfg.block_causal, free if self.cfg.block_causal else None)
    record = Record(out.order, out.logp, out.confidence, {})
    return Text(self.completion, self.completion, out.valid[:, :-L], W, canvas, record)

  def gradient(self, name, hp, key=0):
    """Returns (gradient of the loss by the parameters, metrics, the weights)."""
    objective, out = OBJECTIVES[name], self.out
    text, row = self.text(), jnp.arange(ROWS)
    read = logprob.reader(self.cfg, self.hp)

    def view(params):
      masks = objective.draw(jax.random.key(key), row, text, hp)
      masks = masks._replace(sampled=out.order >= 0)
      args = self.cfg, params, out.tokens, masks, out.valid
      return logprob.view_logp(*args, read=read), masks

    length = jnp.sum(self.completion, axis=1).reshape(-1, GROUP)
    zeros = jnp.zeros_like(REWARD)
    scored = Scored(
      REWARD, length, zeros, zeros, record=text.record, block=self.cfg.block_causal
    )
    weight, own, _ = objective.weigh(scored, hp)
    old = view(self.params)[0].logp
    batch = TrainBatch(
      tokens=out.tokens,
      valid=out.valid,
      completion=text.completion,
      row=row,
      weight=to_rows(weight),
      own={name: to_rows(x) for name, x in own.items()},
      norm=jnp.float32(ROWS // GROUP),
      total=jnp.float32(ROWS),
      record=text.record,
      old=Views(logp=old, reads={}),
      ref=Views(logp=old, reads={}),
    )

    def loss(params):
      now, masks = view(params)
      return objective.loss(now, masks, batch, hp)

    grad, metrics = jax.jit(jax.grad(loss, has_aux=True))(self.params)
    return grad, metrics, batch.weight


@pytest.fixture(scope='module')
def case_of(weights):
  @functools.cache
  def make(sees):
    cfg = model.ModelConfig(
      vocab=24, width=32, layers=2, heads=2, kv_heads=1, mlp=48, mask_id=23, eos_id=22,
      pad_id=21, positions=64, rope_theta=100.0, block_causal=SEES[sees],
      stop_ids=(STOP,),
    )  # fmt: skip
    params = weights(cfg)
    prompts = np.random.default_rng(0).integers(6, 20, (ROWS, P))
    valid = jnp.arange(P)[None] >= jnp.asarray([0, 1, 2, 3])[:, None]
    hp = sampler.SampleConfig(
      L, W, L // 2, 0.7, pick='threshold', rank='max', threshold=0.2, eos_stop=True
    )
    out = sampler.generate(
      cfg, params, jnp.asarray(prompts), jax.random.key(4), hp, valid
    )
    return Case(cfg, params, out, hp)

  return make


def close(a, b, tol=2e-5):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    size = float(jnp.max(jnp.abs(y))) + 1e-6
    np.testing.assert_allclose(x, y, atol=tol * size)


@pytest.mark.parametrize('sees', SEES)
def test_the_case_has_short_rows_and_steps_of_several_tokens(case_of, sees):
  """Without them the tests below would show less."""
  case = case_of(sees)
  order = np.asarray(case.out.order)
  assert (order == -1).any(1).any() and not (order == -1).any(1).all()
  assert any(np.bincount(row[row >= 0]).max() > 1 for row in order)
  assert (np.asarray(case.completion) != (order >= 0)).any()  # a tail behind a stop
  assert (order == -2).any() == bool(SEES[sees])


@pytest.mark.parametrize('sees', SEES)
@pytest.mark.parametrize('name, tail', [('tracerl', False), ('dipo', True)])
def test_gradient_is_that_of_the_recorded_states(case_of, sees, name, tail):
  """With one update it is minus the sum of A grad log p, over N L."""
  case = case_of(sees)
  hp = OBJECTIVES[name].Config()
  got, metrics, weight = case.gradient(name, hp)
  counted = (case.out.order >= 0) & (case.completion | tail)
  advantage = np.array([[-1.0, 1.0], [1.0, -1.0]]).ravel()
  np.testing.assert_allclose(weight, advantage / L / GROUP, rtol=1e-5)

  def value(params):
    return -jnp.sum(advantage * case.logp_of(params, counted)) / ROWS / L

  close(got, jax.jit(jax.grad(value))(case.params))
  assert metrics['ratio_log_abs'] < 2e-6  # the record is the trainer's log p_old


@pytest.mark.parametrize('sees', SEES)
def test_released_norms_count_the_tokens_and_rounds_that_are_trained(case_of, sees):
  """Neither given tokens nor what was not sampled; TraceRL's tail is not trained."""
  case, block = case_of(sees), SEES[sees]
  order, size = np.asarray(case.out.order), block or L
  length = jnp.sum(case.completion, axis=1).reshape(-1, GROUP)
  record = case.text().record
  scored = Scored(REWARD, length, record=record, block=block)
  for name, tail in (('tracerl', False), ('dipo', True), ('dipo', False)):
    objective, count, last = OBJECTIVES[name], np.zeros(ROWS), np.zeros(ROWS)
    for r, i in zip(*np.nonzero(order >= 0), strict=True):
      if case.completion[r, i] or tail:
        part = order[r, i // size * size : i // size * size + size]
        count[r] += 1
        rank = len(set(part[(part >= 0) & (part < order[r, i])]))
        last[r] = max(last[r], rank + 1)
    _, own, _ = objective.weigh(
      scored, objective.Config(norm='released', loss_tail=tail)
    )
    tracerl = np.full((2, GROUP), ROWS / GROUP / last.sum() / L)
    units = (count * last).reshape(2, GROUP).sum(1, keepdims=True) / size
    dipo = np.broadcast_to(1 / units, (2, GROUP))
    want = tracerl if name == 'tracerl' else dipo
    np.testing.assert_allclose(own['scale'], want, rtol=1e-5)


@pytest.mark.parametrize('sees', SEES)
def test_merged_rounds_begin_at_ratio_one(case_of, sees):
  """The record is of other states; log p_old is computed again."""
  case, hp = case_of(sees), OBJECTIVES['tracerl'].Config(shrink=3)
  _, metrics, _ = case.gradient('tracerl', hp)
  assert metrics['ratio_log_abs'] == 0
  assert OBJECTIVES['tracerl'].wants(hp).views == ('old',)


@pytest.mark.parametrize('sees, tail', [*zip(SEES, [False, True], strict=True)])
def test_dmpo_on_recorded_rounds_fits_the_law_of_the_sampler(case_of, sees, tail):
  """Its gradient is that of -sum of weight times log p along the record, over L."""
  case = case_of(sees)
  hp = OBJECTIVES['dmpo'].Config(masks='rounds', draws=L, loss_tail=tail)
  got, _, weight = case.gradient('dmpo', hp)
  counted = (case.out.order >= 0) & (case.completion | tail)

  def value(params):
    logp = case.logp_of(params, counted)
    return -jnp.sum(weight * logp) / L / (ROWS // GROUP)

  close(got, jax.jit(jax.grad(value))(case.params))


@pytest.mark.parametrize('sees', SEES)
def test_one_random_order_reads_each_token_once(case_of, sees):
  """Of the tokens that count, after those before it; draws of them stand for all."""
  case, draw = case_of(sees), OBJECTIVES['dmpo'].draw
  Config, text = OBJECTIVES['dmpo'].Config, case.text()
  row, key = jnp.arange(ROWS), jax.random.key(1)
  masks = draw(key, row, text, Config(masks='order', draws=L, loss_tail=False))
  counted = np.asarray(text.completion)
  if SEES[sees]:
    counted = counted & np.asarray(case.out.order >= 0)
  weight, masked = np.asarray(masks.weight), np.asarray(masks.masked)
  np.testing.assert_allclose(weight.mean(1), counted, rtol=1e-5)
  assert ((weight > 0).sum(1) == counted).all()
  assert (masked.any(1) == counted).all()  # what does not count is seen
  size = SEES[sees] or L
  for r in range(ROWS):
    for at in range(0, L, size):
      own = slice(at, at + size)
      left = masked[r, :, own].sum(1)
      total = counted[r, own].sum()
      seen = [n for n in left if n]  # one fewer in each copy
      assert seen == list(range(total, 0, -1))
  few = draw(key, row, text, Config(masks='order', draws=2, loss_tail=False))
  assert few.masked.shape == (ROWS, 2, L)


@pytest.mark.parametrize('draws', [1, 2])
def test_gdpo_is_exact_in_short_blocks(draws):
  """N nodes give the ELBO of blocks of 2N tokens: the table of test_block.py."""
  rows = 40_000
  text = Text(*[jnp.ones((rows, 4), bool)] * 3, 4, Canvas(4, 2))
  hp = OBJECTIVES['gdpo'].Config(draws=draws)
  masks = jax.device_get(
    OBJECTIVES['gdpo'].draw(jax.random.key(0), jnp.arange(rows), text, hp)
  )
  table = np.stack([test_block.STATES[m] for m in np.ndindex(2, 2, 2, 2)])
  logp = table[masks.masked @ np.array([8, 4, 2, 1])]
  value = (logp * masks.weight).sum(-1).mean(-1)
  assert abs(value.mean() - test_block.ELBO) < 4 * value.std() / rows**0.5
