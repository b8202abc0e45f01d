"""Compares the sampler with a plain loop, and checks what draws depend on."""

import dataclasses
import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from marks import mostly_slow

from dmpo_jax import logprob, mesh, model, rng, sampler
from dmpo_jax.sampler import SampleConfig, picks, unmask, wino
from dmpo_jax.types import Rollouts

ROWS, PROMPT = 8, 4
KEY = rng.key_for(0, 'sample', 5)
# 2 blocks of 4; 3 steps a block, so the schedule reveals 2, 1 and 1.
BASE = SampleConfig(
  length=8,
  block=4,
  steps=6,
  temperature=0.8,
  threshold=0.6,
  factor=0.9,
  entropy_bound=1.2,
)
QUOTA = [2, 1, 1]
RANKED = ('confidence', 'threshold', 'factor')  # they read hp.rank
# Picks that reveal a fixed number of tokens in each step.
QUOTAS = [
  n
  for n, pick in picks.PICKS.items()
  if pick.scheduled and n not in ('origin', 'dynamic')
]
# Fields that the rule of a pick reads, and the loop around it does not.
RULE = ('pick', 'threshold', 'factor', 'entropy_bound', 'fallback', 'rank_temperature')
DREAM = dict(
  block=8,
  schedule='dream',
  rank_law='sampling',
  top_p=0.9,
  temperature=0.7,
  rank='token',
)


def case(shift=False, **fields):
  return shift, dataclasses.replace(BASE, **fields)


CASES = {pick: case(pick=pick) for pick in sampler.NAMES}
CASES['plackett_luce'] = case(pick='plackett_luce', rank_temperature=0.5)
CASES |= {f'{p} max': case(pick=p, rank='max') for p in RANKED}
# At temperature 0 both ranks are one: the proposal is the best token.
CASES |= {
  'greedy confidence': case(temperature=0.0),
  'greedy threshold': case(temperature=0.0, pick='threshold', rank='max'),
  'greedy margin': case(temperature=0.0, pick='margin'),
  'greedy entropy': case(temperature=0.0, pick='entropy', entropy_bound=2.0),
  'greedy wino': case(temperature=0.0, pick='wino', threshold=0.3, block=8),
  'wino, shift': case(True, pick='wino', threshold=0.3, verify=0.4, block=8),
  'guidance': case(pick='random', guidance=0.7),
  'shift, guidance': case(True, pick='threshold', guidance=0.7),
  'leftmost': case(pick='threshold', fallback='leftmost'),
  'one step a block': case(steps=2),
  'top_p': case(top_p=0.7),
  'top_k': case(pick='threshold', top_k=2, rank_law='sampling'),
  'drawn positions': case(rank_temperature=0.3),
  'dream entropy': case(True, pick='lowest_entropy', **DREAM),
  'dream margin': case(True, pick='margin', rank_temperature=0.2, **DREAM),
  'dream maskgit_plus': case(True, pick='confidence', **DREAM),
  'dream origin': case(True, pick='origin', **DREAM),
  'eos': case(eos_stop=True, temperature=3.0),
  'eos, threshold': case(eos_stop=True, pick='threshold', block=2, temperature=2.0),
}
# Every cache with every pick but wino; every third also shifts and guides.
CACHED = {}
for i, (cache, pick) in enumerate(itertools.product(('prefix', 'dual'), picks.PICKS)):
  odd = dict(guidance=0.7) if i % 3 == 0 else {}
  odd |= dict(rank_temperature=0.5) if pick == 'plackett_luce' else {}
  CACHED[f'{cache}, {pick}'] = case(i % 3 == 0, cache=cache, pick=pick, **odd)
CACHED |= {
  'dual, refresh': case(cache='dual', refresh=2, temperature=0.0),
  'prefix, refresh': case(cache='prefix', refresh=2, pick='random_order'),
  'dual, eos': case(
    cache='dual', eos_stop=True, pick='threshold', block=2, temperature=2.0
  ),
  'prefix, eos': case(cache='prefix', eos_stop=True, steps=4, temperature=3.0),
}
EXACT = [
  name
  for name in CASES
  if 'wino' not in name and 'top_' not in name and 'dream' not in name
]
CASES |= CACHED


@pytest.fixture(scope='module')
def sharp(params):
  """Returns weights whose confidences are spread over (0, 1)."""
  tree = params['params']
  return {'params': {**tree, 'head': 1.5 * tree['head']}}


@pytest.fixture(scope='module')
def prompts():
  """Returns (prompts, valid, row ids): left padding of 0 to 3, ids in no order."""
  draw = np.random.default_rng(0)
  tokens = draw.integers(8, size=(ROWS, PROMPT)).astype(np.int32)
  valid = np.arange(PROMPT) >= np.arange(ROWS)[:, None] % 4
  return tokens, valid, np.array([5, 3, 900, 4, 0, 1, 77, 2])


def config(tiny, shift):
  return dataclasses.replace(tiny, shift=shift)


def sampling(cfg, hp, records=()):
  """Returns the sampler as a function of arrays."""

  def run(params, prompts, valid, row):
    keys = rng.row_keys(KEY, row)
    return sampler.sample(cfg, params, prompts, valid, keys, hp, records)

  return run


def loop_of(name):
  """Returns the case without the settings of its rule: one loop serves them all."""
  shift, hp = CASES[name]
  usual = {field: getattr(SampleConfig, field) for field in RULE}
  return shift, hp if hp.pick == 'wino' else dataclasses.replace(hp, **usual)


def sampling_by_any(cfg, hp, others):
  """Returns `sampling` with the rule of others[which], an argument."""

  def run(params, prompts, valid, row, which):
    rules = [functools.partial(picks.PICKS[x.pick].rule, hp=x) for x in others]
    any_rule = picks.Pick(
      lambda look, hp: jax.lax.switch(which, rules, look),
      scheduled=any(picks.PICKS[x.pick].scheduled for x in others),
    )
    with (
      mock.patch.dict(picks.PICKS, any=any_rule),
      mock.patch.dict(sampler.SAMPLERS, any=any_rule),
    ):
      whole = sampling(cfg, dataclasses.replace(hp, pick='any'))
      return whole(params, prompts, valid, row)

  return run


@pytest.fixture(scope='module')
def run(tiny, sharp, prompts):
  """run(name, weights, batch) -> Rollouts on the host.

  Cases that differ in the rule alone share a compiled program.
  """

  @functools.cache
  def compiled(loop):
    shift, hp = loop
    cfg, names = config(tiny, shift), [n for n in CASES if loop_of(n) == loop]
    if hp.pick == 'wino':
      return jax.jit(sampling(cfg, hp)), names
    others = [CASES[name][1] for name in names]
    return jax.jit(sampling_by_any(cfg, hp, others)), names

  def run(name, weights=None, batch=None):
    go, names = compiled(loop_of(name))
    which = () if CASES[name][1].pick == 'wino' else (names.index(name),)
    return jax.device_get(go(weights or sharp, *(batch or prompts), *which))

  return run


@pytest.fixture(scope='module')
def noise(tiny, prompts):
  """noise(row, width)(step): what the row's key gives at that step."""

  @functools.cache
  def table(width):
    def one(key, step):
      gumbel, uniform = jax.random.split(jax.random.fold_in(key, step))
      return (
        jax.random.gumbel(gumbel, (width, tiny.vocab), mode='high'),
        jax.random.uniform(uniform, (width,)),
      )

    keys = rng.row_keys(KEY, prompts[2])
    steps = jnp.arange(2 * BASE.length)
    each = jax.vmap(lambda k: jax.vmap(lambda s: one(k, s))(steps))
    return jax.device_get(jax.jit(each)(keys))

  return lambda row, width: lambda step: [x[row, step] for x in table(width)]


@pytest.mark.parametrize('name', CASES)
def test_equals_the_plain_loop(name, tiny, sharp, prompts, run, noise):
  """Tokens, order and log-probs of a row are those of a loop over one
  sequence without padding, and so is the number of forwards of a batch."""
  shift, hp = CASES[name]
  out = run(name)
  plain = reference.wino if hp.pick == 'wino' else reference.sample
  for row in range(4):  # one of each amount of padding
    prompt = prompts[0][row][prompts[1][row]]
    tokens, order, logp, sure, steps = plain(
      config(tiny, shift), sharp, prompt, hp, noise(row, hp.block)
    )
    np.testing.assert_array_equal(out.tokens[row, PROMPT:], tokens)
    np.testing.assert_array_equal(out.order[row], order)
    # Dream's plan may reveal nothing in a step, wino may take a token back.
    assert out.order[row].max() + 1 <= steps <= out.forwards
    if hp.pick not in ('origin', 'wino') and hp.schedule == 'even':
      assert out.order[row].max() + 1 == steps
    np.testing.assert_allclose(out.logp[row], logp, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out.confidence[row], sure, atol=1e-4)


@pytest.mark.parametrize('name', CASES)
def test_invariants(name, tiny, prompts, run):
  """Each position is revealed once, blocks from left to right, a step
  reveals what its rule says, and the prompt stays."""
  _, hp = CASES[name]
  out = run(name)
  assert out.more is None
  assert [x.dtype.name for x in out[:6]] == [
    'int32', 'bool', 'int32', 'float32', 'int32', 'float32'
  ]  # fmt: skip
  np.testing.assert_array_equal(out.tokens[:, :PROMPT], prompts[0])
  np.testing.assert_array_equal(out.valid[:, :PROMPT], prompts[1])
  assert out.valid[:, PROMPT:].all()
  completion = out.tokens[:, PROMPT:]
  assert (completion != tiny.mask_id).all()
  skipped = out.order < 0
  assert skipped.any() == hp.eos_stop
  assert (completion[skipped] == tiny.eos_id).all()
  assert (out.logp[~skipped] < 0).all() or hp.top_k or hp.top_p < 1
  sure = out.confidence[~skipped]
  assert ((sure > 0) & (sure <= 1)).all()
  blocks = out.order.reshape(ROWS, -1, hp.block)
  last = np.maximum.accumulate(blocks.max(2), axis=1)
  for at in range(1, blocks.shape[1]):
    real = blocks[:, at] >= 0
    assert (np.where(real, blocks[:, at], 99).min(1) > last[:, at - 1]).all()
  least, most = forwards(hp, blocks)
  assert least <= out.forwards <= most
  for order in out.order:
    if hp.pick in QUOTAS and hp.schedule == 'even' and not hp.eos_stop:
      assert list(np.bincount(order)) == (QUOTA if hp.steps == 6 else [hp.block]) * 2
    elif hp.pick == 'random_order':
      assert list(np.bincount(order)) == [1] * hp.length
    elif hp.pick not in ('origin', 'wino') and hp.schedule == 'even':
      counts = np.bincount(order[order >= 0])
      assert counts.min() > 0  # the row's own steps, without gaps
  if hp.pick in ('threshold', 'factor', 'entropy') and hp.block > 2:
    # The settings matter: neither one token a step nor the whole block.
    spent = blocks.max(2) - blocks.min(2) + 1
    assert ((spent > 1) & (spent < hp.block)).any()


def forwards(hp, blocks):
  """Returns the fewest and the most forwards that the batch may cost.

  Without a cache it costs the slowest row's steps. With one it costs the sum over
  blocks of the slowest row's. Steps that reveal nothing leave only bounds.
  """
  count = hp.length // hp.block
  if hp.pick == 'wino':
    return blocks.max() + 1, 2 * hp.length
  if hp.schedule == 'dream' or hp.pick == 'origin':
    return blocks.max() + 1, hp.steps
  if hp.cache == 'none':
    return [blocks.max() + 1] * 2
  real = blocks >= 0
  first = np.where(real, blocks, 99).min(2, keepdims=True)
  spent = np.where(real, blocks - first + 1, 0).max(2)  # (R, blocks)
  assert spent.shape == (ROWS, count)
  return [spent.max(0).sum()] * 2


@pytest.mark.parametrize('name', ['confidence', 'threshold', 'factor'])
def test_rank_matters(name, run):
  """Confidence of the sampled token is not that of the best one."""
  assert not np.array_equal(run(name).order, run(f'{name} max').order)


@pytest.mark.parametrize('name', [
  'guidance', 'random_order', 'dual, random', 'prefix, margin', 'wino'
])  # fmt: skip
def test_mask_token_is_never_emitted(name, tiny, sharp, prompts, run):
  """Even where the head prefers it: the loop ends with real tokens, and the
  recorded law is that of the other tokens."""
  tree = sharp['params']
  blank = [*prompts[0][0], *[tiny.mask_id] * BASE.length]
  best = lambda params: reference.full_logits(tiny, params, blank).argmax(1)
  usual = tree['head'][best(sharp)[-1]]
  head = tree['head'].at[tiny.mask_id].set(5 * usual)
  keen = {'params': {**tree, 'head': head}}
  assert best(keen)[-1] == tiny.mask_id
  out = run(name, keen)
  assert (out.tokens[:, PROMPT:] != tiny.mask_id).all()
  np.testing.assert_array_equal(out.tokens, run(name).tokens)
  np.testing.assert_allclose(out.logp, run(name).logp, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['greedy confidence', 'greedy margin'])
def test_ties_go_to_the_lower_position(name, sharp, run):
  """A head of zeros gives the first id everywhere, from left to right."""
  tree = sharp['params']
  level = {'params': {**tree, 'head': 0 * tree['head']}}
  out = run(name, level)
  assert (out.tokens[:, PROMPT:] == 0).all()
  np.testing.assert_array_equal(out.order, [[0, 0, 1, 2, 3, 3, 4, 5]] * ROWS)


@pytest.mark.parametrize('name', [
  'threshold', 'random', 'dual, random', 'prefix, margin', 'wino',
  'eos, threshold', 'dual, eos'
])  # fmt: skip
def test_rows_ignore_their_neighbours(name, prompts, run):
  """Reordering the rows, or replacing half of them, changes no other completion:
  draws belong to row ids."""
  same = run(name)
  turned = run(name, batch=tuple(x[::-1].copy() for x in prompts))
  tokens, valid, row = (x.copy() for x in prompts)
  tokens[4:], valid[4:], row[4:] = 1, True, np.arange(50, 54)
  other = run(name, batch=(tokens, valid, row))
  for field in ('tokens', 'order'):
    whole = getattr(same, field)
    np.testing.assert_array_equal(getattr(turned, field)[::-1], whole)
    np.testing.assert_array_equal(getattr(other, field)[:4], whole[:4])
  assert not np.array_equal(other.tokens[4:], same.tokens[4:])


@pytest.mark.parametrize('name', [
  'threshold', 'dual, threshold', 'prefix, margin', 'wino'])  # fmt: skip
def test_contents_of_padding_change_nothing(name, prompts, run):
  """Other tokens on the padding, or masks, change nothing."""
  tokens, valid, row = prompts
  for filler in (6, 10):
    out = run(name, batch=(np.where(valid, tokens, filler), valid, row))
    same = run(name)
    np.testing.assert_array_equal(out.tokens[:, PROMPT:], same.tokens[:, PROMPT:])
    np.testing.assert_array_equal(out.order, same.order)
    np.testing.assert_array_equal(out.logp, same.logp)


@pytest.mark.parametrize('name', ['threshold', 'dual, threshold', 'wino'])
def test_more_padding_changes_nothing(name, tiny, sharp, prompts, run):
  """Two more positions of padding change no completion."""
  tokens, valid, row = prompts
  wide = np.pad(tokens, ((0, 0), (2, 0)), constant_values=6)
  more = np.pad(valid, ((0, 0), (2, 0)))
  shift, hp = CASES[name]
  cfg = dataclasses.replace(tiny, shift=shift)
  same, go = run(name), jax.jit(sampling(cfg, hp))
  out = jax.device_get(go(sharp, wide, more, row))
  np.testing.assert_array_equal(out.tokens[:, 2:], same.tokens)
  np.testing.assert_array_equal(out.order, same.order)
  np.testing.assert_allclose(out.logp, same.logp, atol=1e-4)


@pytest.mark.parametrize('special', ['mask', 'eos', 'pad'])
@pytest.mark.parametrize('name', [
  'threshold', 'dual, threshold', 'prefix, eos', 'guidance', 'eos', 'wino',
  'greedy confidence', 'dream entropy'
])  # fmt: skip
def test_special_tokens_of_a_prompt_stay(
  name, special, tiny, sharp, prompts, run, noise, trajectory
):
  """A prompt may hold the mask token, or others. They are data: the completion is
  what the plain loop says, the rollout keeps them, so that scoring sees the prompt
  that was sampled from, and gives back the recorded log-probs."""
  shift, hp = CASES[name]
  tokens, valid, row = (x.copy() for x in prompts)
  tokens[:, -2:] = getattr(tiny, f'{special}_id')
  out = run(name, batch=(tokens, valid, row))
  np.testing.assert_array_equal(out.tokens[:, :PROMPT], tokens)
  assert (out.tokens[:, PROMPT:] != tiny.mask_id).all()
  plain = reference.wino if hp.pick == 'wino' else reference.sample
  text, order, *_ = plain(
    config(tiny, shift), sharp, tokens[0][valid[0]], hp, noise(0, hp.block)
  )
  np.testing.assert_array_equal(out.tokens[0, PROMPT:], text)
  np.testing.assert_array_equal(out.order[0], order)
  if hp.cache == 'none' and hp.temperature and hp.pick != 'wino' and hp.top_p == 1:
    now, then = trajectory(name, sharp, out)  # else what is scored is another law
    np.testing.assert_allclose(now, then, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('name', [
  'threshold', 'dual, threshold', 'prefix, factor'])  # fmt: skip
def test_devices(name, tiny, sharp, prompts, run):
  """One device, a mesh of eight (weights split two ways) and pmap over
  eight give the same completions."""
  shift, hp = CASES[name]
  one, go = run(name), sampling(config(tiny, shift), hp)
  grid = mesh.make_mesh(data=2, fsdp=2, tensor=2)
  weights = jax.tree.map(mesh.put, sharp, mesh.shardings(sharp, grid))
  rows = [mesh.put(x, mesh.rows(grid)) for x in prompts]
  with jax.set_mesh(grid):
    split = mesh.fetch(jax.jit(go)(weights, *rows))
  each = [x[:, None] for x in prompts]
  mapped = jax.device_get(jax.pmap(go, in_axes=(None, 0, 0, 0))(sharp, *each))
  for other in (split, mapped):
    for field in ('tokens', 'order'):
      found = getattr(other, field).reshape(ROWS, -1)
      np.testing.assert_array_equal(found, getattr(one, field))
    found = other.logp.reshape(ROWS, -1)
    np.testing.assert_allclose(found, one.logp, atol=1e-4)
  assert split.forwards == mapped.forwards.max() == one.forwards


# Less work, the same completions.


@pytest.mark.parametrize('fields', [
  dict(cache='prefix', steps=2), dict(cache='dual', steps=2),
  dict(cache='dual', refresh=1), dict(cache='prefix', refresh=1)])  # fmt: skip
def test_caches_that_are_exact(fields, tiny, sharp, prompts, run):
  """A cache changes nothing where every step is a full forward: in blocks of one
  step, and with a refresh at each."""
  hp = dataclasses.replace(BASE, **fields)
  cached = jax.device_get(jax.jit(sampling(tiny, hp))(sharp, *prompts))
  plain = run('confidence' if hp.steps == BASE.steps else 'one step a block')
  np.testing.assert_array_equal(cached.tokens, plain.tokens)
  np.testing.assert_array_equal(cached.order, plain.order)
  np.testing.assert_allclose(cached.logp, plain.logp, atol=1e-5)


def block_by_block(setting, loop):
  """Unmasks with the cache prefix and one program a block."""
  hp, first = setting.hp, setting.prompt
  for start in range(first, first + hp.length, hp.block):
    span = first + hp.length - start
    loop = unmask.unmask_block(setting, start, span, loop)
  return loop


@pytest.mark.parametrize(
  'shift, refresh',
  mostly_slow(
    [(True, 2), (False, 2), (True, 0), (False, 0)], [(True, 2)], pytest.mark.long
  ),
)
def test_prefix_of_many_blocks(shift, refresh, tiny, sharp, prompts, monkeypatch):
  """Blocks that share a program have the tokens of a program each, to the bit."""
  cfg = config(tiny, shift)
  hp = dataclasses.replace(
    BASE, length=21, block=3, steps=21, cache='prefix', refresh=refresh
  )
  assert hp.length // hp.block > unmask.SPANS
  shared = jax.device_get(jax.jit(sampling(cfg, hp))(sharp, *prompts))
  monkeypatch.setattr(unmask, 'by_rule', block_by_block)
  each = jax.device_get(jax.jit(sampling(cfg, hp))(sharp, *prompts))
  np.testing.assert_array_equal(shared.tokens, each.tokens)
  np.testing.assert_array_equal(shared.order, each.order)
  np.testing.assert_array_equal(shared.forwards, each.forwards)
  np.testing.assert_allclose(shared.logp, each.logp, atol=1e-5)


def test_prefix_does_not_grow_with_the_blocks(tiny, sharp, prompts):
  def size(length):
    hp = dataclasses.replace(BASE, length=length, steps=length, cache='prefix')
    return str(jax.make_jaxpr(sampling(tiny, hp))(sharp, *prompts)).count(' = ')

  assert size(24 * BASE.block) == size(6 * BASE.block)


@pytest.mark.parametrize('name', [
  'top_k', 'shift, guidance', 'dual, confidence', 'prefix, eos'])  # fmt: skip
@pytest.mark.parametrize('chunk', [1, 3])
def test_rows_in_pieces_have_the_same_tokens(name, chunk, tiny, sharp, prompts, run):
  """Where the head has no logits of more than so many positions of each row."""
  shift, hp = CASES[name]
  cfg = dataclasses.replace(config(tiny, shift), head_chunk=chunk)
  go = sampling(cfg, hp)
  pieces = jax.device_get(jax.jit(go)(sharp, *prompts))
  jax.tree.map(np.testing.assert_array_equal, pieces, run(name))
  program = str(jax.make_jaxpr(go)(sharp, *prompts))
  all_rows = ROWS * (2 if hp.guidance else 1)
  few = all_rows // {1: hp.block, 3: 2}[chunk]
  assert f'f32[{few},{hp.block},{cfg.vocab}]' in program
  assert f'f32[{all_rows},{hp.block},{cfg.vocab}]' not in program


def test_rows_of_a_block_model_in_pieces(tiny, sharp, prompts):
  """With the cache block, whose steps apply the head themselves."""
  cfg = dataclasses.replace(tiny, block_causal=4)
  hp = dataclasses.replace(BASE, block=2, cache='block', guidance=0.7, steps=8)
  found = []
  for chunk in (0, 1):
    go = sampling(dataclasses.replace(cfg, head_chunk=chunk), hp)
    found.append(jax.device_get(jax.jit(go)(sharp, *prompts)))
    few = 2 * ROWS // (1 + chunk)
    assert f'f32[{few},2,{cfg.vocab}]' in str(jax.make_jaxpr(go)(sharp, *prompts))
  jax.tree.map(np.testing.assert_array_equal, *found)


def test_each_device_keeps_its_rows_in_pieces(tiny, sharp, prompts, run):
  """Of four devices with two rows each, two pieces have a row of each device."""
  cfg = dataclasses.replace(tiny, head_chunk=1)
  go, grid = sampling(cfg, CASES['top_k'][1]), mesh.make_mesh(data=2, fsdp=2, tensor=2)
  weights = jax.tree.map(mesh.put, sharp, mesh.shardings(sharp, grid))
  rows = [mesh.put(x, mesh.rows(grid)) for x in prompts]
  with jax.set_mesh(grid):
    assert f'f32[4,4,{cfg.vocab}]' in str(jax.make_jaxpr(go)(weights, *rows))
    found = mesh.fetch(jax.jit(go)(weights, *rows))
  np.testing.assert_array_equal(found.tokens, run('top_k').tokens)


@pytest.mark.parametrize('name', ['eos', 'eos, threshold'])
def test_eos_stop_changes_no_text(name, tiny, sharp, prompts, run):
  """A row that stops early has the same tokens, steps and log-probs up to its
  first EOS, and the batch takes no more forwards."""
  _, hp = CASES[name]
  hp = dataclasses.replace(hp, eos_stop=False)
  whole = jax.device_get(jax.jit(sampling(tiny, hp))(sharp, *prompts))
  out = run(name)
  ends = 0
  for row in range(ROWS):
    text = whole.tokens[row, PROMPT:].tolist()
    end = text.index(tiny.eos_id) + 1 if tiny.eos_id in text else hp.length
    ends += end < hp.length
    for field in ('order', 'logp', 'confidence'):
      found, want = getattr(out, field)[row], getattr(whole, field)[row]
      np.testing.assert_allclose(found[:end], want[:end], atol=1e-5)
    assert text[:end] == out.tokens[row, PROMPT : PROMPT + end].tolist()
  # So has what it sampled behind the EOS, in the same block.
  drawn = out.order >= 0
  for found, want in ((out.order, whole.order), (out.logp, whole.logp)):
    np.testing.assert_allclose(found[drawn], want[drawn], atol=1e-5)
  np.testing.assert_array_equal(
    out.tokens[:, PROMPT:][drawn], whole.tokens[:, PROMPT:][drawn]
  )
  assert ends and out.forwards <= whole.forwards


def test_rows_do_not_wait_for_each_other(prompts, run):
  """Without a cache a batch takes the slowest row's steps, fewer than the sum
  over blocks of the slowest (rows 1 and 5: 3 + 4 and 4 + 3)."""
  out = run('threshold', batch=tuple(x[[1, 5] * 4] for x in prompts))
  blocks = out.order.reshape(ROWS, -1, BASE.block)
  spent = blocks.max(2) - blocks.min(2) + 1
  assert out.forwards == spent.sum(1).max() < spent.max(0).sum()


def test_wino_takes_tokens_back_but_ends(tiny, sharp, prompts):
  """A block takes at most 2 W steps, however much it takes back; and taking back
  costs forwards."""
  hp = dataclasses.replace(BASE, pick='wino', threshold=0.0, verify=1.0, block=8)
  bold = dataclasses.replace(hp, verify=0.0)
  run = lambda hp: jax.device_get(jax.jit(sampling(tiny, hp))(sharp, *prompts))
  doubted, sure = run(hp), run(bold)
  # 5 of 8, then the other 3 in one step.
  assert sure.forwards == 2 < doubted.forwards <= 2 * hp.length
  assert (doubted.tokens[:, PROMPT:] != tiny.mask_id).all()


def test_nucleus_and_top_k():
  """top_p keeps the token that crosses it, top_k keeps the k best. Both act after
  the temperature, and the rest is renormalised."""
  prob = np.array([0.5, 0.05, 0.25, 0.2])
  logits = jnp.log(jnp.asarray(prob))

  def law(**fields):
    return jax.nn.softmax(model.sampling_logits(logits, **fields))

  near = functools.partial(np.testing.assert_allclose, atol=1e-6)
  near(law(temperature=0.0), prob)
  near(law(temperature=1.0, top_p=0.5), [1, 0, 0, 0])
  near(law(temperature=1.0, top_p=0.51), [2 / 3, 0, 1 / 3, 0])
  near(law(temperature=1.0, top_k=3), np.array([10, 0, 5, 4]) / 19)
  near(law(temperature=0.5, top_p=0.95, top_k=2), [0.8, 0, 0.2, 0])
  near(law(temperature=1.0, top_k=9), prob)


def rows_of_logits():
  """Returns logits (rows, V) with ties, -inf, one best, all equal, and extremes."""
  noise = np.random.default_rng(3)
  wide, flat = noise.normal(size=(2, 40, 300)) * np.array([[[5.0]], [[0.05]]])
  rows = [*wide, *flat, *np.round(wide[:20]), *np.round(flat[:5], 2)]
  rows += [np.zeros(300), np.full(300, -7.25), 1e30 * wide[0], 1e-30 * wide[1]]
  rows += [np.where(np.arange(300) == 4, 0.0, -np.inf), -np.abs(wide[2]) - 1e6]
  rows += list(np.where(noise.random((20, 300)) < 0.9, -np.inf, np.round(wide[:20])))
  return np.asarray(rows, np.float32)


def kept_by_sorting(logits, top_p, top_k):
  """Returns what top_p and then top_k keep, by a sort in float64; ties stay."""
  x = logits.astype(np.float64)
  ordered = -np.sort(-x, axis=-1)
  mass = np.exp(ordered - ordered[:, :1])
  before = np.cumsum(mass, axis=-1) - mass
  inside = (before < top_p * np.sum(mass, axis=-1, keepdims=True)) | (top_p == 1)
  least = np.min(np.where(inside, ordered, np.inf), axis=-1, keepdims=True)
  x = np.where(x < least, -np.inf, x)
  if top_k:
    x = np.where(x < -np.sort(-x, axis=-1)[:, top_k - 1 : top_k], -np.inf, x)
  return np.isfinite(x)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
  'top_p, top_k', [(0.9, 0), (0.3, 0), (1e-6, 0), (1.0, 3), (1.0, 40), (0.95, 20)]
)
def test_nucleus_and_top_k_keep_what_a_sort_keeps(top_p, top_k, dtype):
  """Also of equal logits, of -inf, and of bfloat16."""
  logits = jnp.asarray(rows_of_logits()).astype(dtype)
  law = jax.jit(lambda x: model.sampling_logits(x, 1.0, top_p, top_k))(logits)
  kept = np.isfinite(np.asarray(law, np.float32))
  np.testing.assert_array_equal(
    kept, kept_by_sorting(np.asarray(logits, np.float32), top_p, top_k)
  )
  assert (np.asarray(law)[kept] == np.asarray(logits)[kept]).all()


def test_nucleus_and_top_k_do_not_sort():
  """A sort of a vocabulary takes as long as a step of the network on a GPU."""
  law = lambda x: model.sampling_logits(x, 1.0, 0.9, 50)
  program = str(jax.make_jaxpr(law)(jnp.zeros((2, 3, 100))))
  assert 'sort' not in program and 'top_k' not in program


# Termination.


def masks_only(cfg):
  """Logits under which every proposal is the mask token: nothing is revealed."""
  return jnp.where(jnp.arange(cfg.vocab) == cfg.mask_id, 0.0, -jnp.inf)


@pytest.mark.parametrize('pick', sampler.NAMES)
@pytest.mark.parametrize('cache, refresh', [('none', 0), ('prefix', 0), ('dual', 3)])
@pytest.mark.parametrize(
  'logits, reveals', [(masks_only, 0), (lambda cfg: jnp.full(cfg.vocab, jnp.nan), 8)]
)
def test_no_loop_is_endless_whatever_the_logits(
  tiny, monkeypatch, pick, cache, refresh, logits, reveals
):
  """All loops end after 2 L steps, and a rule reveals a token a step at nan too."""
  if cache != 'none' and not sampler.SAMPLERS[pick].plain:
    pytest.skip(f'{pick} has no cache')

  def seen(tokens):
    return jnp.broadcast_to(logits(tiny), (len(tokens), 4, tiny.vocab))

  monkeypatch.setattr(
    model, 'window_logits', lambda c, p, tokens, *_, **__: (seen(tokens), None)
  )
  monkeypatch.setattr(
    model, 'shadow_logits', lambda c, p, tokens, *_: (seen(tokens), seen(tokens))
  )
  hot = 0.5 if pick == 'plackett_luce' else 0.0
  hp = dataclasses.replace(
    BASE, pick=pick, cache=cache, refresh=refresh, rank_temperature=hot
  )
  run = jax.jit(lambda prompts: sampler.generate(tiny, {}, prompts, KEY, hp))
  out = run(jnp.ones((2, PROMPT), jnp.int32))
  assert int(out.forwards) <= 2 * hp.length
  assert (np.sum(out.order >= 0, axis=1) == reveals).all()


# Distributions.


def test_one_token_has_the_law_of_the_temperature(tiny, sharp):
  """Frequencies of a completion of one token = softmax(logits / T) without
  the mask token (chi square over 10 tokens); `generate` makes its own keys."""
  count, prompt = 4000, [3, 1, 4]
  hp = SampleConfig(length=1, block=1, steps=1, temperature=0.7)
  out = jax.jit(lambda prompts: sampler.generate(tiny, sharp, prompts, KEY, hp))(
    jnp.asarray([prompt] * count)
  )
  logits = reference.full_logits(tiny, sharp, [*prompt, tiny.mask_id])[-1]
  logits[tiny.mask_id] = -np.inf
  law = reference.log_softmax(logits / 0.7)
  drawn = np.asarray(out.tokens[:, -1])
  np.testing.assert_allclose(out.logp[:, 0], law[drawn], atol=1e-4)
  chi_square(np.bincount(drawn, minlength=tiny.vocab), np.exp(law))


def test_random_order_has_the_enumerated_law(tiny, params):
  """All 27 completions of 3 tokens come as often as the sum over the 6
  orders says."""
  cfg = dataclasses.replace(tiny, vocab=4, mask_id=3, eos_id=2, pad_id=1)
  tree = params['params']
  small = {'params': {
    **tree, 'embedding': tree['embedding'][:4], 'head': 2 * tree['head'][:4]
  }}  # fmt: skip
  hp = SampleConfig(3, 3, 1, temperature=0.9, pick='random_order')
  law = reference.random_order_law(cfg, small, (1, 2), 3, 0.9)
  assert len(law) == 27 and abs(sum(law.values()) - 1) < 1e-9
  out = jax.jit(lambda prompts: sampler.generate(cfg, small, prompts, KEY, hp))(
    jnp.asarray([[1, 2]] * 6000)
  )
  names, seen = np.unique(out.tokens[:, 2:], axis=0, return_counts=True)
  seen = dict(zip(map(tuple, names.tolist()), seen, strict=True))
  chi_square([seen.get(x, 0) for x in law], list(law.values()))


def chi_square(seen, law):
  """Compares counts with their law; fails for 1 in 10,000 true laws."""
  seen, law = np.asarray(seen), np.asarray(law)
  assert (seen[law == 0] == 0).all()
  want = seen.sum() * law[law > 0]
  free = len(want) - 1
  statistic = np.sum((seen[law > 0] - want) ** 2 / want)
  # Wilson and Hilferty's normal approximation, at 3.72 deviations.
  limit = free * (1 - 2 / (9 * free) + 3.72 * (2 / (9 * free)) ** 0.5) ** 3
  assert statistic < limit


# Trajectories.


@pytest.fixture(scope='module')
def trajectory(tiny):
  """trajectory(name, weights, rollouts): compiled once for each law."""

  @functools.cache
  def compiled(shift, law):
    cfg = config(tiny, shift)
    return jax.jit(
      lambda params, rollouts: logprob.trajectory_logp(cfg, params, rollouts, law)
    )

  def run(name, weights, rollouts):
    shift, hp = CASES[name]
    law = dataclasses.replace(hp, rank_temperature=0.0)  # which it does not read
    return jax.device_get(compiled(shift, law)(weights, rollouts))

  return run


@pytest.mark.parametrize('name', EXACT)
def test_trajectory_equals_the_record(name, sharp, run, trajectory):
  """Scoring the recorded states under the same weights gives back the
  recorded log-probs, whatever picked the positions."""
  out = run(name)
  now, then = trajectory(name, sharp, out)
  np.testing.assert_allclose(then, out.logp.sum(1), rtol=1e-5)
  np.testing.assert_allclose(now, then, rtol=1e-4, atol=1e-3)


def test_trajectory_under_other_weights(tiny, sharp, params, prompts, run, trajectory):
  """Another policy gives its own log-probs on the recorded states."""
  out = run('threshold')
  now, then = trajectory('threshold', params, out)
  np.testing.assert_allclose(then, out.logp.sum(1), rtol=1e-5)
  assert np.max(np.abs(now - then)) > 0.5
  for row in range(3):
    want = reference.trajectory_logp(
      tiny, params, prompts[0][row][prompts[1][row]],
      out.tokens[row, PROMPT:], out.order[row], BASE,
    )  # fmt: skip
    np.testing.assert_allclose(now[row], want, rtol=1e-4)


@pytest.mark.parametrize('states', [4, 3])
def test_some_states_stand_for_all(states, tiny, sharp, run):
  """With n of S = 8 states the mean over keys is the whole sum, under the
  weights and as recorded. If n divides S an even stratum is a residue: the
  estimate then takes S/n values, each as often, whose mean is exact."""
  copies = 400
  out = run('random_order')
  rows = Rollouts(*(np.repeat(x[:1], copies, 0) for x in out[:4]), np.int32(0), None)
  found = jax.jit(
    lambda rows: logprob.trajectory_logp(
      tiny,
      sharp,
      rows,
      BASE,
      logprob.Along(states, rng.per_row(KEY, jnp.arange(copies), jax.random.uniform)),
    )
  )(rows)
  by_step = out.logp[0][np.argsort(out.order[0])]
  for values in map(np.asarray, found):
    error = values.std() / copies**0.5
    assert abs(values.mean() - by_step.sum()) < 4 * error
    if states == 4:
      options = np.array([2 * by_step[::2].sum(), 2 * by_step[1::2].sum()])
      off = np.abs(values[:, None] - options)
      assert off.min(1).max() < 1e-3 < abs(options[0] - options[1])
      assert 140 < off.argmin(1).sum() < 260
  np.testing.assert_allclose(found[0], found[1], atol=1e-3)


# Settings.


# Settings that are refused: (fields, the field that is named, the remedy).
REFUSED = [
  (dict(block=3), 'block = 3', 'sampler.length = 8'),
  (dict(block=0), 'block = 0', 'sampler.length = 8'),
  (dict(length=0), 'block = 4', 'sampler.length = 0'),
  (dict(steps=5), 'steps = 5', 'multiple of the 2 blocks'),
  (dict(steps=1), 'steps = 1', 'multiple of the 2 blocks'),
  (dict(steps=10), 'steps = 10', 'sampler.length = 8'),
  (dict(pick='best'), "pick = 'best'", 'confidence, random'),
  (dict(rank='top'), "rank = 'top'", 'token, max'),
  (dict(cache='full'), "cache = 'full'", 'none, prefix, dual'),
  (dict(rank_law='raw'), "rank_law = 'raw'", 'model, sampling'),
  (dict(verify=-0.1), 'verify = -0.1', '[0, 1]'),
  (dict(top_p=0.0), 'top_p = 0.0', '(0, 1]'),
  (dict(top_k=-1), 'top_k = -1', '>= 0'),
  (dict(refresh=2), 'refresh = 2', 'sampler.cache = prefix or dual'),
  (dict(fallback='leftmost'), "fallback = 'leftmost'", 'sampler.pick = threshold'),
  (dict(pick='entropy', schedule='dream'), "schedule = 'dream'", 'pick = confidence'),
  (dict(pick='random', rank_temperature=0.1), 'rank_temperature = 0.1', 'plackett'),
  (dict(pick='plackett_luce'), 'pick = plackett_luce', 'sampler.rank_temperature > 0'),
  (dict(pick='wino', cache='dual'), "cache = 'dual'", 'sampler.pick = confidence'),
  (dict(pick='wino', guidance=1.0), 'guidance = 1.0', 'sampler.pick = confidence'),
  (dict(threshold=1.5), 'threshold = 1.5', '[0, 1]'),
  (dict(temperature=-1.0), 'temperature = -1.0', '>= 0'),
  (dict(temperature=float('nan')), 'temperature = nan', 'finite'),
  (dict(temperature=1e400), 'temperature = inf', 'finite'),
  (dict(temperature=1e39), 'temperature = 1e+39', 'finite'),
  (dict(temperature=1e-45), 'temperature = 1e-45', 'finite'),
  (dict(pick='entropy', steps=0), 'steps = 0', '>= 1'),
  (dict(factor=-0.1), 'factor = -0.1', '>= 0'),
  (dict(entropy_bound=-0.1), 'entropy_bound = -0.1', '>= 0'),
  (dict(guidance=-2.0), 'guidance = -2.0', '>= 0'),
]


@pytest.mark.parametrize('fields, names, remedy', REFUSED)
@pytest.mark.smoke
def test_impossible_settings_are_refused(fields, names, remedy, tiny, prompts):
  """Each gives one sentence that names the field and the remedy, and sampling
  refuses it."""
  hp = dataclasses.replace(BASE, **fields)
  (problem,) = hp.problems()
  assert f'sampler.{names}' in problem and remedy in problem
  with pytest.raises(ValueError, match='sampler'):
    sampler.generate(tiny, {}, prompts[0], KEY, hp)


@pytest.mark.smoke
def test_good_settings_have_no_problems():
  """The rule for `steps` binds the scheduled picks alone; all problems are listed."""
  assert BASE.problems() == []
  for name, entry in sampler.SAMPLERS.items():
    hp = dataclasses.replace(BASE, pick=name, steps=5)
    assert entry.scheduled or hp.problems() == []
  both = dataclasses.replace(BASE, block=3, rank='top')
  assert len(both.problems()) == 2


def test_a_sampler_may_have_its_own_loop_and_record(tiny, prompts):
  """It is an entry of SAMPLERS, and its record an entry of RECORDS."""
  hp = SampleConfig(4, 2, 3, pick='constant')

  def loop_of_threes(setting, loop):
    assert setting.hp is hp
    more = {name: loop.more[name] + 2 for name in setting.records}
    tokens = jnp.where(loop.tokens == tiny.mask_id, 3, loop.tokens)
    return loop._replace(tokens=tokens, more=more)

  entry = sampler.Sampler(unmask=loop_of_threes, records=False)
  twos = sampler.Recorder(jnp.int32, None)
  assert len(hp.problems()) == 1
  with (
    mock.patch.dict(sampler.SAMPLERS, constant=entry),
    mock.patch.dict(sampler.RECORDS, twos=twos),
  ):
    assert hp.problems() == [] and hp.order_from() == 'hindsight'
    keys = rng.row_keys(KEY, prompts[2])
    out = sampler.sample(tiny, {}, *prompts[:2], keys, hp, ['twos'])
  np.testing.assert_array_equal(out.tokens[:, PROMPT:], 3)
  np.testing.assert_array_equal(out.more['twos'], np.full((ROWS, 4), 2))


@pytest.mark.parametrize('fields', [
  {}, dict(cache='prefix'), dict(cache='dual', refresh=2), dict(pick='wino')
])  # fmt: skip
def test_no_loop_is_endless(fields, tiny, sharp, prompts):
  """Even a rule that never takes a token ends, and the rest is EOS of no step."""
  hp = dataclasses.replace(BASE, **fields)
  nothing = lambda look, hp: look.masked & False
  with (
    mock.patch.dict(picks.PICKS, confidence=picks.Pick(nothing)),
    mock.patch.object(wino, 'draft', nothing),
  ):
    out = jax.device_get(jax.jit(sampling(tiny, hp))(sharp, *prompts))
  assert out.forwards <= 2 * hp.length
  assert (out.order == -1).all()
  assert (out.tokens[:, PROMPT:] == tiny.eos_id).all()


def test_noise_reaches_the_tail():
  """x is exceeded with chance 1 - exp(-exp(-x)), by values of fine resolution. JAX's
  default noise can take 51 values above 12, the largest 15.9."""
  keys = jax.random.split(jax.random.key(0), 2**3)
  noise = np.asarray(jax.jit(lambda keys: unmask.gumbel(keys, (2**20,)))(keys)).ravel()
  for level in (0, 4, 8, 12):
    want = len(noise) * -np.expm1(-np.exp(-level))
    assert abs(np.sum(noise > level) - want) < 4 * want**0.5
  tail = noise[noise > 12]
  assert len(np.unique(tail)) == len(tail) > 30


@pytest.mark.parametrize('bad', [np.nan, -np.inf])
def test_a_score_that_is_no_number_is_revealed(bad):
  """A step takes something even of scores that are no numbers."""
  nan = np.full((2, 4), bad, np.float32)
  masked = np.array([[False, True, True, True], [True, True, False, False]])
  for name, pick in picks.PICKS.items():
    look = picks.Look(
      np.full((2, 4, 5), np.nan, np.float32),
      nan,
      masked,
      np.ones(2, int),
      np.full(2, 0.5, np.float32),
      np.full((2, 4), 0.5, np.float32),
    )
    hp = dataclasses.replace(BASE, pick=name, rank_temperature=0.5)
    if name != 'origin':  # it decides by chance alone
      assert np.asarray(pick.rule(look, hp)).any(1).all(), name


@pytest.mark.parametrize(
  'name', mostly_slow(['confidence', 'wino', 'dual, refresh'], ['confidence'])
)
def test_record_of_the_entropy_changes_nothing(name, tiny, sharp, prompts):
  """Each bit of a rollout is the same; the entropies are those of some law."""
  shift, hp = CASES[name]
  plain, noted = (
    jax.device_get(jax.jit(sampling(config(tiny, shift), hp, x))(sharp, *prompts))
    for x in ((), ('entropy',))
  )
  entropy = noted.more['entropy']
  jax.tree.map(np.testing.assert_array_equal, plain, noted._replace(more=None))
  assert np.all((entropy >= 0) & (entropy <= np.log(tiny.vocab) + 1e-5))
  assert entropy.min() < entropy.max()
