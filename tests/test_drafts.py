"""Drafts: their laws by enumeration, what they record, and what they depend on."""

import dataclasses
import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampler import chi_square

from dmpo_jax import logprob, model, rng, sampler
from dmpo_jax.sampler import Draft, Drafter, SampleConfig, speculate

ROWS, PROMPT, LENGTH, BLOCK = 14000, (1, 2), 4, 2
CFG = model.ModelConfig(
  vocab=4, width=16, layers=2, heads=2, kv_heads=2, mlp=24, mask_id=3, eos_id=2,
  pad_id=1, dtype='float32', remat='none', qk_norm=True,
)  # fmt: skip
HP = SampleConfig(
  length=LENGTH, block=BLOCK, steps=4, temperature=0.8, pick='threshold',
  threshold=0.6, rank='max',
)  # fmt: skip
ONE_LAYER = dataclasses.replace(CFG, layers=1)
HOW = Draft(of='other', temperature=1.3, threshold=0.4, ahead=3)
KEY = rng.key_for(0, 'sample', 5)


def exact(**fields):
  return dataclasses.replace(HOW, gate='exact', **fields)


@pytest.fixture(scope='module')
def policies(weights):
  """(the model, the draft, a reference): three sets of weights."""
  tree = weights(CFG)

  def moved(seed, size):
    draw = np.random.default_rng(seed)
    noise = lambda x: x + jnp.asarray(size * draw.normal(size=x.shape), x.dtype)
    return jax.tree.map(noise, tree)

  return tree, moved(1, 0.2), moved(2, 0.02)


def sampling(how, cfg=CFG, hp=HP, gate=None, records=()):
  """Returns the sampler with drafts as a function of arrays.

  gate: (completions so far (R, L), tokens of them) -> rows that are kept.
  """

  def judge(own, how, start, state):
    text = state.mine.tokens[:, own.prompt :]
    return state, gate(text, start - own.prompt + hp.block)

  def run(params, theirs, prompts, valid, row):
    keys = rng.row_keys(KEY, row)
    own = sampler.opened(cfg, params, prompts, valid, keys, hp, records)
    gates = {} if gate is None else {how.gate: judge}
    with mock.patch.dict(speculate.GATES, gates):
      return sampler.with_drafts(own, Drafter(cfg, how), theirs)

  return run


def slow_but(names, few):
  return [
    name if name in few else pytest.param(name, marks=pytest.mark.slow)
    for name in names
  ]


def alike(rows=ROWS):
  """Returns (prompts, valid, row ids) of rows with the same prompt."""
  prompts = np.tile(np.array(PROMPT, np.int32), (rows, 1))
  return prompts, np.ones(prompts.shape, bool), np.arange(rows, dtype=np.int32)


def odd(text, upto):
  """A verdict on a block: whether the tokens so far have an odd sum."""
  seen = jnp.arange(text.shape[1])[None] < upto
  return jnp.sum(jnp.where(seen, text, 0), axis=1) % 2 == 1


# --- laws by enumeration


class Table:
  """A network as a table: probabilities of every state of the completion."""

  def __init__(self, cfg, params, temperature):
    states = list(itertools.product(range(4), repeat=LENGTH))
    text = jnp.asarray([PROMPT + state for state in states], jnp.int32)
    logits = jax.jit(functools.partial(model.full_logits, cfg))(params, text)
    logits = np.array(logits, np.float64)[:, len(PROMPT) :, :3]
    self.plain = dict(zip(states, softmax(logits), strict=True))
    self.drawn = dict(zip(states, softmax(logits / temperature), strict=True))

  def pick(self, state, start, least):
    """The positions that pick threshold reveals."""
    places = [i for i in range(start, start + BLOCK) if state[i] == 3]
    best = {i: self.plain[state][i].max() for i in places}
    over = [i for i in places if best[i] >= least]
    return over or [max(places, key=lambda i: (best[i], -i))]


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def block_law(table, order, least, prefix):
  """{block: chance} of a block after a prefix; order: the Table that decides it."""
  start, found = len(prefix), {}

  def go(state, p):
    if 3 not in state[start : start + BLOCK]:
      found[state[start : start + BLOCK]] = p + found.get(
        state[start : start + BLOCK], 0
      )
      return
    places = order.pick(state, start, least)
    for tokens in itertools.product(range(3), repeat=len(places)):
      new, q = list(state), p
      for i, token in zip(places, tokens, strict=True):
        new[i] = token
        q *= table.drawn[state][i][token]
      go(tuple(new), q)

  go(prefix + (3,) * (LENGTH - start), 1.0)
  return found


def sequence_law(of_block):
  """{completion: chance}; of_block: prefix -> {block: chance}."""
  found = {(): 1.0}
  for _ in range(LENGTH // BLOCK):
    found = {
      prefix + block: p * q
      for prefix, p in found.items()
      for block, q in of_block(prefix).items()
    }
  return found


def gated(mine, theirs, keep):
  """Law (A) of a block: w P_d + (1 - E_d w) P_t."""
  refused = 1 - sum(p for y, p in theirs.items() if keep(y))
  return {y: keep(y) * theirs.get(y, 0) + refused * p for y, p in mine.items()}


FAMILIES = {'whole text': CFG, 'blocks': dataclasses.replace(CFG, block_causal=2)}


@pytest.mark.parametrize('family', slow_but(FAMILIES, ['blocks']))
def test_law_of_a_gate(family, policies):
  """Completions come as often as law (A) says. What is recorded is the log-prob of the
  refused blocks alone, and scoring gives it back; the ratio to another model is one of
  normalised laws."""
  cfg, (old, theirs, _) = FAMILIES[family], policies
  run = sampling(HOW, cfg, gate=odd)

  @jax.jit
  def call(old, theirs, ref):
    out = run(old, theirs, *alike())
    along = lambda params: logprob.trajectory_logp(cfg, params, out, HP)
    return out, along(old), along(ref)

  out, (again, recorded), (other, _) = jax.device_get(call(*policies))
  text = list(map(tuple, out.tokens[:, len(PROMPT) :].tolist()))
  mine, draft = Table(cfg, old, HP.temperature), Table(cfg, theirs, HOW.temperature)
  laws = functools.cache(
    lambda prefix: (
      block_law(mine, mine, HP.threshold, prefix),
      block_law(draft, draft, HOW.threshold, prefix),
    )
  )
  keep = lambda prefix: lambda y: sum(prefix + y) % 2 == 1
  law = sequence_law(lambda prefix: gated(*laws(prefix), keep(prefix)))
  assert abs(sum(law.values()) - 1) < 1e-9
  chi_square([text.count(x) for x in law], list(law.values()))
  # Records.
  drafted = out.more['drafted']
  blocks = drafted.reshape(ROWS, -1, BLOCK)
  assert (blocks == blocks[..., :1]).all() and 0.1 < drafted.mean() < 0.9
  want = [
    sum(
      np.log(laws(x[:at])[0][x[at : at + BLOCK]])
      for at in range(0, LENGTH, BLOCK)
      if not skip[at]
    )
    for x, skip in zip(text, drafted, strict=True)
  ]
  np.testing.assert_allclose(recorded, want, atol=2e-4)
  np.testing.assert_allclose(again, recorded, atol=2e-4)
  np.testing.assert_array_equal(out.logp[drafted], 0)
  ratio = np.exp(other - recorded)
  assert abs(ratio.mean() - 1) < 4 * ratio.std() / ROWS**0.5 < 0.1
  for order in out.order:  # a row's own steps, without gaps
    assert (np.bincount(order) > 0).all()
  drafts = out.drafts
  assert (drafts.offered == 2).all()
  np.testing.assert_array_equal(drafts.kept, blocks[..., 0].sum(1))
  steps = out.order.max(1) + 1
  assert (drafts.target <= steps).all() and (drafts.target[drafts.kept == 2] == 0).all()


EXACT = {
  'whole text': (CFG, exact(), HP),
  'blocks': (FAMILIES['blocks'], exact(ahead=1), HP),
  'greedy draft': (CFG, exact(temperature=0.0, pick='confidence', tokens=2), HP),
  'guidance': (CFG, exact(), dataclasses.replace(HP, guidance=0.5)),
  'blocks, shift': (
    dataclasses.replace(CFG, block_causal=2, shift=True), exact(pick='entropy'), HP
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', slow_but(EXACT, ['whole text']))
def test_law_of_the_exact_gate(name, policies):
  """It is the model's, in the order of the draft's rule, and the recorded log-prob is
  its own: as the enumeration and as scoring say."""
  cfg, how, hp = EXACT[name]
  old, theirs, ref = policies
  run = sampling(how, cfg, hp)

  @jax.jit
  def call(old, theirs, ref):
    out = run(old, theirs, *alike())
    along = lambda params: logprob.trajectory_logp(cfg, params, out, hp)
    return out, along(old), along(ref)

  out, (again, recorded), (other, _) = jax.device_get(call(*policies))
  np.testing.assert_allclose(again, recorded, atol=3e-4)
  text = list(map(tuple, out.tokens[:, len(PROMPT) :].tolist()))
  paths = dict(zip(zip(text, map(tuple, out.order.tolist()), strict=True),
                   recorded, strict=True))  # fmt: skip
  seen = dict(zip(text, recorded, strict=True))
  assert len(paths) == len(seen)  # a completion has one order
  names, law = list(seen), np.exp(list(seen.values()))
  assert abs(law.sum() - 1) < 0.01
  chi_square([text.count(x) for x in names], law / law.sum())
  ratio = np.exp(other - recorded)
  assert abs(ratio.mean() - 1) < 4 * ratio.std() / ROWS**0.5 < 0.2
  assert not out.more  # each token has the model's law
  rate = out.drafts.kept.sum() / out.drafts.offered.sum()
  assert 0.2 < rate < 0.98
  if name in FAMILIES:
    mine, draft = Table(cfg, old, hp.temperature), Table(cfg, theirs, 1.0)
    want = sequence_law(lambda x: block_law(mine, draft, how.threshold, x))
    assert abs(sum(want.values()) - 1) < 1e-9
    np.testing.assert_allclose(law, [want[x] for x in names], atol=1e-4)


def test_rewards_and_the_best_gate():
  """E_A r - E_t r = a (E_d[r | kept] - E_t r); of all gates the one that keeps rewards
  above E_t r - price is worth most where each call of the model has a price."""
  draw = np.random.default_rng(3)
  theirs, mine = draw.dirichlet(np.ones(9)), draw.dirichlet(np.ones(9))
  r, price, worth = draw.random(9), 0.07, {}
  for keep in itertools.product([0, 1], repeat=9):
    law = gated(
      dict(enumerate(mine)), dict(enumerate(theirs)), lambda y, keep=keep: keep[y]
    )
    law, kept = np.array(list(law.values())), np.array(keep) @ theirs
    assert abs(law.sum() - 1) < 1e-12
    if kept:
      gain = kept * ((np.array(keep) * theirs) @ r / kept - mine @ r)
      assert abs(law @ r - mine @ r - gain) < 1e-12
    worth[keep] = law @ r - price * (1 - kept)
  assert max(worth, key=worth.get) == tuple((r >= mine @ r - price).astype(int))


# --- drafts that are all kept, or all refused


CASES = {
  'plain': (CFG, HP),
  'confidence, eos': (
    CFG,
    dataclasses.replace(HP, pick='confidence', eos_stop=True, temperature=1.5),
  ),
  'dual': (CFG, dataclasses.replace(HP, cache='dual')),
  'prefix, tokens': (CFG, dataclasses.replace(HP, cache='prefix', rank='token')),
  'blocks, eos': (
    dataclasses.replace(CFG, block_causal=2, shift=True),
    dataclasses.replace(HP, eos_stop=True, temperature=1.5),
  ),
}


def prompts(rows=16):
  """Prompts of different lengths, with row ids in no order."""
  draw = np.random.default_rng(0)
  tokens = draw.integers(0, 3, (rows, 3)).astype(np.int32)
  valid = np.arange(3) >= np.arange(rows)[:, None] % 3
  return tokens, valid, draw.permutation(1000)[:rows].astype(np.int32)


def equal(one, two, fields=('tokens', 'order', 'confidence')):
  for name in fields:
    np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


@pytest.mark.parametrize('name', slow_but(CASES, ['confidence, eos']))
def test_no_draft_stays_or_all_do(name, policies):
  """Then a rollout has the bits of the model's own sampler, or of the draft's."""
  (cfg, hp), (old, theirs, _), rows = CASES[name], policies, prompts()
  how = dataclasses.replace(HOW, pick='entropy', entropy_bound=0.8)

  @jax.jit
  def plain(old, theirs, prompts, valid, row):
    keys = rng.row_keys(KEY, row)
    given = cfg, old, prompts, valid, keys, hp
    other = cfg, theirs, prompts, valid, speculate.keys_of(keys, 'draft'), how.law(hp)
    return sampler.sample(*given), sampler.sample(*other)

  @jax.jit
  def drafted(old, theirs, prompts, valid, row, verdict):
    gate = lambda text, upto: jnp.broadcast_to(verdict, len(text))
    return sampling(how, cfg, hp, gate)(old, theirs, prompts, valid, row)

  own, other = jax.device_get(plain(old, theirs, *rows))
  none, whole = (
    jax.device_get(drafted(old, theirs, *rows, verdict)) for verdict in (False, True)
  )
  equal(none, own, ('tokens', 'order', 'confidence', 'logp', 'valid'))
  assert not none.more['drafted'].any() and not none.drafts.kept.any()
  np.testing.assert_array_equal(none.drafts.target, own.order.max(1) + 1)
  equal(whole, other)
  np.testing.assert_array_equal(whole.more['drafted'], whole.order >= 0)
  assert not whole.logp.any() and not whole.drafts.target.any()
  np.testing.assert_array_equal(whole.drafts.draft, whole.order.max(1) + 1)
  assert not np.array_equal(whole.tokens, none.tokens)


@pytest.mark.parametrize('name', slow_but(['plain', 'blocks, eos'], ['blocks, eos']))
def test_a_draft_that_is_the_model_is_not_refused(name, policies):
  """Its tokens are those of the sampler with the draft's random numbers."""
  (cfg, hp), (old, *_), rows = CASES[name], policies, prompts()
  how = exact(temperature=-1.0)

  def both(params, prompts, valid, row):
    keys = speculate.keys_of(rng.row_keys(KEY, row), 'draft')
    plain = sampler.sample(cfg, params, prompts, valid, keys, how.law(hp))
    return sampling(how, cfg, hp)(params, params, prompts, valid, row), plain

  out, plain = jax.device_get(jax.jit(both)(old, *rows))
  equal(out, plain, ('tokens', 'order'))
  np.testing.assert_allclose(out.logp, plain.logp, atol=1e-5)
  np.testing.assert_array_equal(out.drafts.kept, out.drafts.offered)
  assert out.forwards <= plain.forwards


@pytest.mark.parametrize('gate', ['confidence', 'exact'])
def test_rows_ignore_neighbours_and_padding(gate, policies):
  """Another order of the rows, other neighbours or more padding change no row."""
  old, theirs, _ = policies
  hp = dataclasses.replace(HP, eos_stop=True)
  how = dataclasses.replace(HOW, gate=gate, bound=0.4)
  run = jax.jit(sampling(how, hp=hp, records=('entropy',)))
  tokens, valid, row = prompts()
  same = jax.device_get(run(old, theirs, tokens, valid, row))
  turned = jax.device_get(run(old, theirs, *(x[::-1] for x in (tokens, valid, row))))
  wide = np.pad(tokens, ((0, 0), (2, 0))), np.pad(valid, ((0, 0), (2, 0)))
  half = [np.concatenate([x[:8], x[:8]]) for x in (tokens, valid)]
  other = jax.device_get(run(old, theirs, *half, np.r_[row[:8], row[:8] + 7]))
  padded = jax.device_get(run(old, theirs, *wide, row))
  text = lambda out: out.tokens[:, -LENGTH:]
  of = {'tokens': text, 'order': lambda x: x.order, 'kept': lambda x: x.drafts.kept}
  if gate == 'confidence':
    of['drafted'] = lambda x: x.more['drafted']
    assert 0 < same.drafts.kept.sum() < same.drafts.offered.sum()
  for name, get in of.items():
    np.testing.assert_array_equal(get(turned)[::-1], get(same), err_msg=name)
    np.testing.assert_array_equal(get(other)[:8], get(same)[:8], err_msg=name)
    np.testing.assert_array_equal(get(padded), get(same), err_msg=name)
  np.testing.assert_allclose(padded.more['entropy'], same.more['entropy'], atol=1e-4)


def test_confidence_of_a_block(policies):
  """It is the mean log-prob of its tokens, each given all others of the text. In blocks
  of one token and a network of one layer a plain forward says the same: there is no
  other shadow, and no token has passed on what it saw."""
  cfg, (old, theirs, _), (tokens, valid, row) = ONE_LAYER, policies, prompts(64)
  first = lambda tree: jax.tree.map(lambda x: x[:1], tree['params']['layers'])
  old, theirs = (
    {'params': {**tree['params'], 'layers': first(tree)}} for tree in (old, theirs)
  )
  hp = dataclasses.replace(HP, length=2, block=1, steps=2, temperature=1.5)
  how = dataclasses.replace(HOW, bound=0.3)

  @jax.jit
  def call(old, theirs):
    own, loop = sampler.opened(cfg, old, tokens, valid, rng.row_keys(KEY, row), hp)
    given = Drafter(cfg, how).setting(own, theirs)
    state, _ = speculate.propose(given, own.prompt, 0, speculate.begin(own, loop))
    done, keep = speculate.by_confidence(own, how, own.prompt, state)
    law = model.without_mask(cfg, model.full_logits(cfg, old, loop.tokens, own.valid))
    token = state.mine.tokens[:, own.prompt]
    return keep, model.logp_of(law[:, own.prompt], token), done.drafts.target

  keep, logp, forwards = jax.device_get(call(old, theirs))
  np.testing.assert_array_equal(keep, logp >= np.log(0.3))
  assert 8 < keep.sum() < 56 and (forwards == 1).all()
