"""The optimizer step and the scores of rollouts, on a tiny model.

Plain SGD with rate one stands in for Adam: the change of a parameter is then
minus its gradient, and gradients are what the claims are about.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from batches import text_of

from dmpo_jax import logprob, masking, mesh, model, sampler, score, step, types
from dmpo_jax.objectives import dmpo
from dmpo_jax.types import Rollouts, Sampled, Scored, TrainBatch, Views, to_groups

B, G, R, P, L, INNER = 2, 2, 4, 3, 8, 2
CFG = model.ModelConfig(
  vocab=9,
  mask_id=8,
  eos_id=7,
  pad_id=6,
  width=16,
  layers=1,
  heads=2,
  kv_heads=2,
  mlp=16,
  dtype='float32',
  remat='none',
)
LORA = dataclasses.replace(CFG, lora_rank=2, lora_alpha=4.0)
SGD = optax.sgd(1.0)
KEY = 5  # of the masks
HPS = {
  'wdce': dmpo.Config(alpha=0.5),
  'model': dmpo.Config(alpha=0.5, baseline='model', common_masks=True),
  'ddo': dmpo.Config(alpha=0.5, loss='ddo', antithetic=False, ddo_beta=0.1),
}


def close(a, b, tol=1e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      np.asarray(x), np.asarray(y), rtol=tol, atol=tol
    ),
    a,
    b,
  )


def same(a, b):
  """Equal to the bit."""
  jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
  return any(
    not np.array_equal(x, y)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


@pytest.fixture(scope='module')
def params():
  return jax.jit(lambda: model.init(CFG, jax.random.key(0)))()


@pytest.fixture(scope='module')
def rollouts():
  """Rollouts of no model: random tokens, some with an EOS inside."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 7, (R, P + L)).astype(np.int32)
  tokens[1, -3:] = tokens[2, -1] = CFG.eos_id
  valid = np.ones((R, P + L), bool)
  valid[0, 0] = False
  order = np.argsort(rng.random((R, L)), 1).astype(np.int32)
  logp = -rng.exponential(size=(R, L)).astype(np.float32)
  return jax.tree.map(
    jnp.asarray, Rollouts(tokens, valid, order, logp, np.int32(L), np.exp(logp))
  )


def completion_of(rollouts):
  return masking.completion_mask(rollouts.tokens[:, -L:] == CFG.eos_id)


@functools.cache
def compiled_logp():
  return jax.jit(functools.partial(logprob.token_logp, CFG))


def logp_of(params, rows, masks):
  """(R, K, L) numpy log-probs of rollouts or a batch under 4 draws."""
  return np.asarray(compiled_logp()(params, rows.tokens, masks.masked, rows.valid))


def elbo_of(params, rows, masks):
  """(R,) the mean over draws of weight times masked sum."""
  total = logp_of(params, rows, masks).sum(-1)
  return (np.asarray(masks.weight)[..., 0] * total).mean(-1)


def weights(baseline):
  """(weight, target) of fixed rewards under a baseline, each (R,)."""
  rng = np.random.default_rng(1)
  reward, rnd = rng.normal(size=(2, B, G)).astype(np.float32)
  scored = Scored(jnp.asarray(reward), None, jnp.zeros((B, G)), jnp.asarray(rnd))
  hp = dmpo.Config(alpha=0.5, baseline=baseline)
  weight, own, _ = dmpo.weigh(scored, hp)
  return weight.ravel(), own['target'].ravel()


def make_batch(rollouts, baseline='individual', elbo_old=None):
  weight, target = weights(baseline)
  if elbo_old is None:
    elbo_old = jnp.linspace(-20, -10, R * INNER).reshape(R, INNER)
  return TrainBatch(
    rollouts.tokens,
    rollouts.valid,
    completion_of(rollouts),
    jnp.arange(R) + 40,
    weight,
    {'target': target},
    jnp.float32(B),
    jnp.float32(R),
    old=Views(elbo=elbo_old),
  )


def setup_of(kind, microbatches=1, cfg=CFG, **fields):
  """The Setup of a kind of objective, or of a dmpo.Config."""
  hp = HPS[kind] if isinstance(kind, str) else kind
  same = dict(group=G, inner=INNER, microbatches=microbatches, optimizer=SGD)
  return step.Setup(cfg, dmpo.OBJECTIVE, hp, **same | fields)


@functools.cache
def stepper(*args, **fields):
  """The compiled train_step of a Setup; arguments as `setup_of`."""
  return jax.jit(functools.partial(step.train_step, setup=setup_of(*args, **fields)))


def run(kind, params, batch, inner=0, microbatches=1):
  """(new parameters, metrics) of one step from `params`."""
  state = step.init_state(params, SGD)
  update = stepper(kind, microbatches)
  state, metrics = update(state, {}, batch, jax.random.key(KEY), inner)
  return state.trainable, metrics


@functools.cache
def scorer(hp, **fields):
  return jax.jit(functools.partial(score.score, setup=setup_of(hp, **fields)))


def scores(params, rollouts, hp, how, law=None, frozen=None, **options):
  """The Scores of a buffer whose policy is `params` laid over `frozen`."""
  run = scorer(hp, logprob=how, law=law, **options)
  who = score.policies(params, params if frozen is None else frozen)
  sampled = Sampled(rollouts, completion_of(rollouts), jnp.arange(R) + 40)
  return run(who, sampled, jax.random.key(9), jax.random.key(KEY))


def draw(key, row, completion, hp):
  """The loss's masks."""
  return dmpo.draw(key, row, text_of(completion), hp)


# --- cutting rows into pieces


@pytest.mark.smoke
def test_split_and_join():
  """Stripes of rows, and back; a device's block of rows stays its own."""
  x = jnp.arange(24).reshape(12, 2)
  for pieces in (1, 2, 3, 4):
    split = mesh.split_rows(x, pieces)
    assert split.shape == (pieces, 12 // pieces, 2)
    same(mesh.join_rows(split), x)
  same(mesh.split_rows(x, 3)[0, :, 0], x[::3, 0])
  # The first 4 of 12 rows, one of 3 devices, are the head of every piece.
  heads = mesh.split_rows(jnp.arange(12), 2)[:, :2]
  same(np.sort(np.ravel(heads)), np.arange(4))
  same(mesh.in_microbatches(lambda y: y * 2, x, 3), x * 2)


@pytest.mark.parametrize(
  'kind, pieces', [('wdce', 2), ('wdce', 4), ('model', 2), ('ddo', 4)]
)
def test_microbatches_add_up(kind, pieces, params, rollouts):
  """The same parameters and metrics however the rows are cut."""
  for baseline in ('none', 'group', 'individual'):
    batch = make_batch(rollouts, baseline)
    for inner in range(INNER):
      whole = run(kind, params, batch, inner)
      parts = run(kind, params, batch, inner, pieces)
      close(whole, parts, 1e-5)
      assert float(whole[1]['finite']) == 1
      assert float(whole[1]['grad_norm']) > 1e-3


def test_metrics_are_of_the_loss(params, rollouts):
  """loss and nll are those of the draws of (key, inner, row)."""
  batch = make_batch(rollouts)
  seen = []
  for inner in range(INNER):
    _, metrics = run('wdce', params, batch, inner)
    key = jax.random.fold_in(jax.random.key(KEY), inner)
    masks = draw(key, batch.row, batch.completion, HPS['wdce'])
    logp = logp_of(params, batch, masks)
    close(metrics['nll'], -logp.sum() / masks.weight.size)
    close(metrics['loss'], dmpo.wdce(logp, masks, batch.weight) / B)
    seen.append(np.asarray(masks.masked))
  # No two inner steps and no two rows share their masks.
  assert (seen[0] != seen[1]).any(axis=(1, 2)).all()
  rows = {row.tobytes() for masks in seen for row in masks}
  assert len(rows) == R * INNER


def test_gradient_norm_is_of_the_update(params, rollouts):
  """With SGD the change of the parameters is minus the gradient."""
  new, metrics = run('wdce', params, make_batch(rollouts))
  change = jax.tree.map(jnp.subtract, new, params)
  close(optax.tree.norm(change), metrics['grad_norm'])


# --- independence


def test_groups_add_up(params, rollouts):
  """A group's part of loss and gradient is its own, whatever stands beside."""
  batch = make_batch(rollouts)
  in_first = jnp.arange(R) < G
  total, sums = run('wdce', params, batch), []
  for mine in (in_first, ~in_first):
    alone = batch._replace(weight=jnp.where(mine, batch.weight, 0.0))
    other = jnp.where(mine[:, None], batch.tokens, 0)
    got = run('wdce', params, alone)
    # A neighbour that weighs nothing may hold anything.
    changed = run('wdce', params, alone._replace(tokens=other))
    close(got[0], changed[0], 1e-6)
    close(got[1]['loss'], changed[1]['loss'], 1e-6)
    sums.append(got)
  close(sums[0][1]['loss'] + sums[1][1]['loss'], total[1]['loss'])
  change = [jax.tree.map(jnp.subtract, new, params) for new, _ in sums]
  close(
    jax.tree.map(jnp.add, *change), jax.tree.map(jnp.subtract, total[0], params), 2e-5
  )


def test_more_padding_changes_nothing(params, rollouts):
  """Two more columns of padding on the left: the same loss and gradient."""
  batch = make_batch(rollouts)
  pad = jnp.full((R, 2), CFG.pad_id, jnp.int32)
  wide = batch._replace(
    tokens=jnp.concatenate([pad, batch.tokens], 1),
    valid=jnp.concatenate([jnp.zeros((R, 2), bool), batch.valid], 1),
  )
  close(run('wdce', params, batch), run('wdce', params, wide), 1e-5)


def test_what_padding_holds_changes_nothing(params, rollouts):
  """The tokens under padding are never seen."""
  batch = make_batch(rollouts)
  assert not batch.valid.all()
  other = jnp.where(batch.valid, batch.tokens, 3)
  close(
    run('wdce', params, batch), run('wdce', params, batch._replace(tokens=other)), 1e-6
  )


# --- the guard


def test_a_bad_batch_changes_nothing(params, rollouts):
  """nan or inf in the weights: state returned as it was, finite = 0."""
  for bad in (jnp.nan, jnp.inf):
    batch = make_batch(rollouts)
    batch = batch._replace(weight=batch.weight.at[1].set(bad))
    state = step.init_state(params, SGD)
    new, metrics = stepper('wdce')(state, {}, batch, jax.random.key(KEY), 0)
    assert float(metrics['finite']) == 0
    assert not np.isfinite(metrics['loss'])
    same(new, state)
  new, metrics = stepper('wdce')(
    state, {}, make_batch(rollouts), jax.random.key(KEY), 0
  )
  assert float(metrics['finite']) == 1 and int(new.step) == 1
  assert differ(new.trainable, state.trainable)


# --- adapters


@pytest.fixture(scope='module')
def lora():
  return jax.jit(lambda: model.init(LORA, jax.random.key(0)))()


def test_adapters_are_all_that_trains(lora, rollouts):
  """Only 'lora' is in the state; base weights stay out of the gradient."""
  trainable, frozen = {'lora': lora['lora']}, {'params': lora['params']}
  state = step.init_state(trainable, SGD)
  batch = make_batch(rollouts)
  new, metrics = stepper('wdce', 1, LORA)(state, frozen, batch, jax.random.key(KEY), 0)
  assert set(new.trainable) == {'lora'} and float(metrics['finite']) == 1
  moved = jax.tree_util.tree_map_with_path(
    lambda path, a, b: (path[-1].key, bool((a != b).any())), trainable, new.trainable
  )
  # b starts at zero, so at first it alone has a gradient.
  for name, changed in jax.tree.leaves(moved, is_leaf=lambda x: isinstance(x, tuple)):
    assert changed == (name == 'b')


def test_dropout_follows_the_row(lora, rollouts):
  """It changes the step, but not with the microbatches; the key moves it."""
  cfg = dataclasses.replace(LORA, lora_dropout=0.5)
  batch, key = make_batch(rollouts), jax.random.key(KEY)
  state = step.init_state({'lora': lora['lora']}, SGD)
  frozen = {'params': lora['params']}
  new = lambda cfg, pieces, inner: (
    stepper('wdce', pieces, cfg)(state, frozen, batch, key, inner)[0].trainable
  )
  whole = new(cfg, 1, 0)
  close(whole, new(cfg, 4, 0), 1e-5)
  for other in (new(LORA, 1, 0), new(cfg, 1, 1)):
    assert not all(
      np.allclose(x, y, atol=1e-4)
      for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True)
    )


def test_reference_is_the_policy_without_its_adapter(lora, rollouts):
  """At init they agree to the bit; with b moved only the policy changes."""
  trainable, frozen = {'lora': lora['lora']}, {'params': lora['params']}
  how, hp = logprob.LogprobConfig(), HPS['wdce']
  first = scores(trainable, rollouts, hp, how, frozen=frozen, cfg=LORA)
  same(first.logp_old, first.logp_ref)
  moved = jax.tree.map(lambda x: x + 0.1, trainable)
  then = scores(moved, rollouts, hp, how, frozen=frozen, cfg=LORA)
  same(then.logp_ref, first.logp_ref)
  assert (np.abs(then.logp_old - first.logp_old) > 1e-3).all()


@pytest.mark.parametrize('pieces', [1, 2])
def test_fused_scores_are_the_same(lora, rollouts, pieces):
  """One pass of both policies says what two passes say."""
  trainable = jax.tree.map(lambda x: x + 0.1, {'lora': lora['lora']})
  frozen, hp = {'params': lora['params']}, HPS['wdce']
  how = logprob.LogprobConfig(tail=False)
  two, one = (
    scores(trainable, rollouts, hp, x, frozen=frozen, cfg=LORA, microbatches=pieces)
    for x in (how, dataclasses.replace(how, fuse=True))
  )
  close(one, two)
  assert (np.abs(one.logp_old - one.logp_ref) > 1e-3).all()


# --- log-probs of rollouts


def test_old_is_ref_at_the_start(params, rollouts):
  """log_rnd = 0 to the bit: both are taken under the same masks."""
  hp, how = HPS['wdce'], logprob.LogprobConfig()
  out = scores(params, rollouts, hp, how)
  assert not out.old.has('elbo') and out.guess is None
  same(out.logp_old, out.logp_ref)
  masks = masking.draw_bernoulli(
    jax.random.key(9), jnp.arange(R) + 40, types.Canvas(L), 4
  )
  close(out.logp_old, elbo_of(params, rollouts, masks))
  # However the rows are cut.
  close(scores(params, rollouts, hp, how, microbatches=2), out)


def test_elbo_settings(params, rollouts):
  """stratified draws its own masks; tail=False counts up to the EOS."""
  row, completion = jnp.arange(R) + 40, completion_of(rollouts)
  how = logprob.LogprobConfig(elbo='stratified', tail=False)
  out = scores(params, rollouts, HPS['wdce'], how)
  masks = masking.draw_stratified(jax.random.key(9), row, types.Canvas(L), 4)
  logp = logp_of(params, rollouts, masks) * np.asarray(completion)[:, None]
  want = (np.asarray(masks.weight)[..., 0] * logp.sum(-1)).mean(-1)
  close(out.logp_old, want)
  close(out.logp_ref, out.logp_old)


def test_along_the_trajectory(params):
  """p_old is what the sampler recorded; p_ref recomputes the same number."""
  hp = sampler.SampleConfig(L, L // 2, L, 0.7, 'random_order')
  prompts = jnp.asarray([[1, 2, 3], [3, 2, 1], [0, 0, 4], [5, 1, 1]])
  out = jax.jit(lambda: sampler.generate(CFG, params, prompts, jax.random.key(3), hp))()
  how = logprob.LogprobConfig(estimator='trajectory')
  got = scores(params, out, HPS['wdce'], how, hp)
  close(got.logp_old, out.logp.sum(1), 1e-6)
  close(got.logp_ref, got.logp_old, 1e-4)


def test_the_policy_ranks_what_the_reference_proposes(params):
  """With the order's log-prob p_ref depends on the confidences of the policy."""
  hp = sampler.SampleConfig(L, L // 2, L, 0.7, rank='token', order_logp=True)
  prompts = jnp.asarray([[1, 2, 3], [3, 2, 1], [0, 0, 4], [5, 1, 1]])
  out = jax.jit(lambda: sampler.generate(CFG, params, prompts, jax.random.key(3), hp))()
  how, law = logprob.LogprobConfig(estimator='trajectory'), hp
  ref = jax.tree.map(lambda x: 0.8 * x, params)
  got = scores(params, out, HPS['wdce'], how, law, frozen=ref)
  along = lambda policy=None: logprob.trajectory_logp(
    CFG, ref, out, law, logprob.Along(policy=policy)
  )[0]
  close(got.logp_ref, along(policy=params), 1e-4)
  assert float(jnp.max(jnp.abs(got.logp_ref - along()))) > 1e-2
  close(got.logp_old, jnp.sum(out.logp + out.more['order_logp'], 1), 1e-5)


def test_nothing_is_computed_for_alpha_zero(params, rollouts):
  """No log-probs are computed where the weights use none."""
  hp = dataclasses.replace(HPS['wdce'], alpha=0.0)
  assert jax.tree.leaves(scores(params, rollouts, hp, logprob.LogprobConfig())) == []


def test_elbo_of_the_old_policy(params, rollouts):
  """One per inner step under its own masks, or one estimate for all."""
  row, completion = jnp.arange(R) + 40, completion_of(rollouts)
  hp, how = HPS['model'], logprob.LogprobConfig()
  common = scores(params, rollouts, hp, how).old.elbo
  assert common.shape == (R, INNER)
  for i in range(INNER):
    key = jax.random.fold_in(jax.random.key(KEY), i)
    masks = draw(key, row, completion, hp)
    close(common[:, i], elbo_of(params, rollouts, masks))
  hp = dataclasses.replace(hp, common_masks=False)
  shared = scores(params, rollouts, hp, how)
  assert shared.old.elbo.shape == (R, INNER)
  same(shared.old.elbo[:, 0], shared.old.elbo[:, 1])
  same(shared.old.elbo[:, 0], shared.logp_old)


def test_measured_for_any_objective(params, rollouts):
  """Log-probs that it does not need; the drift at the last inner step is none
  for the policy that sampled, and that of the ELBOs by hand for another. The
  update is the same."""
  hp, last = dataclasses.replace(HPS['wdce'], alpha=0.0), INNER - 1
  row, completion = jnp.arange(R) + 40, completion_of(rollouts)
  got = scores(params, rollouts, hp, logprob.LogprobConfig(), measure=True)
  same(got.logp_old, got.logp_ref)
  batch = make_batch(rollouts, elbo_old=got.old.elbo)
  drifting = stepper('wdce', 2, measure=True)
  state = step.init_state(params, SGD)
  new, metrics = drifting(state, {}, batch, jax.random.key(KEY), last)
  assert abs(float(metrics['elbo_drift'])) < 1e-4
  close(new.trainable, run('wdce', params, batch, last, 2)[0], 1e-6)
  masks = draw(
    jax.random.fold_in(jax.random.key(KEY), last), row, completion, HPS['wdce']
  )
  want = np.mean(
    elbo_of(new.trainable, rollouts, masks) - elbo_of(params, rollouts, masks)
  )
  _, metrics = drifting(
    step.init_state(new.trainable, SGD), {}, batch, jax.random.key(KEY), last
  )
  assert abs(want) > 0.01
  assert float(metrics['elbo_drift']) == pytest.approx(want, rel=1e-3)


def close_updates(got, want):
  """Equal parameters and metrics; only objectives with an old ELBO report its drift."""
  got[1].pop('elbo_drift')
  close(got, want, 1e-5)


def test_model_baseline_is_group_at_the_start(params, rollouts):
  """Policy = old policy and common masks: no gap, so 1/G is subtracted."""
  old = scores(params, rollouts, HPS['model'], logprob.LogprobConfig()).old.elbo
  for inner in range(INNER):
    got = run('model', params, make_batch(rollouts, 'model', old), inner)
    want = run('wdce', params, make_batch(rollouts, 'group'), inner)
    close_updates(got, want)


def test_model_baseline_follows_the_gap(params, rollouts):
  """Its update is that of weights reweighed by hand, group by group."""
  batch = make_batch(rollouts, 'model')
  key = jax.random.fold_in(jax.random.key(KEY), 1)
  masks = draw(key, batch.row, batch.completion, HPS['model'])
  elbo = elbo_of(params, batch, masks)
  gap = np.asarray(to_groups(elbo - batch.old.elbo[:, 1], G))
  share = np.exp(gap - gap.max(1, keepdims=True))
  share /= share.sum(1, keepdims=True)
  by_hand = batch._replace(weight=batch.own['target'] - share.ravel())
  close_updates(run('model', params, batch, 1), run('wdce', params, by_hand, 1))


# --- supervised


def test_sft_step(params):
  """LLaDA's loss by its formula; microbatches add up; the key moves it."""
  tokens = np.random.default_rng(3).integers(0, 8, (R, P + L)).astype(np.int32)
  valid, row = np.ones((R, P + L), bool), jnp.arange(R)
  lesson = types.Lesson(tokens, valid, np.ones((R, 1, L), bool), row)
  got = {}
  for pieces, seeds in ((1, (0, 1)), (2, (0,))):
    setup = step.SftSetup(CFG, L, SGD, pieces)
    fn = jax.jit(functools.partial(step.sft_step, setup=setup))
    for seed in seeds:
      got[pieces, seed] = fn(
        step.init_state(params, SGD), {}, lesson, jax.random.key(seed)
      )
  close(got[1, 0], got[2, 0])
  assert float(got[1, 0][1]['loss']) != float(got[1, 1][1]['loss'])
  masks = masking.draw_sft(jax.random.key(0), row, types.Canvas(L))
  # The compiled helper takes four draws: this one, four times.
  four = masks._replace(masked=jnp.repeat(masks.masked, 4, axis=1))
  logp = logp_of(params, Rollouts(tokens, valid, *[None] * 4), four)
  want = -np.mean(np.asarray(masks.weight)[:, 0, 0] * logp[:, 0].sum(-1) / L)
  close(got[1, 0][1]['loss'], want)


@pytest.mark.parametrize('rank, tied', [(0, False), (0, True), (2, False), (2, True)])
def test_sft_trains_every_parameter(rank, tied, weights_of):
  """The head and every kernel too, also where adapters will come on top."""
  plain = dataclasses.replace(CFG, tied=tied, qkv_bias=True, qk_norm=True)
  cfg, params = dataclasses.replace(plain, lora_rank=rank), weights_of(plain)
  tokens = np.random.default_rng(3).integers(0, 6, (R, P + L)).astype(np.int32)
  fn = jax.jit(functools.partial(step.sft_step, setup=step.SftSetup(cfg, L, SGD)))
  learn, valid = np.ones((R, 1, L), bool), np.ones(tokens.shape, bool)
  lesson, key = types.Lesson(tokens, valid, learn, jnp.arange(R)), jax.random.key(0)
  new, numbers = fn(step.init_state(params, SGD), {}, lesson, key)
  change = jax.tree.map(jnp.subtract, params, new.trainable)
  assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(change)) > 1e-6
  # Two ids are in no text: their rows of the head learn from the output alone.
  head = change['params']['embedding' if tied else 'head']
  assert (np.abs(head).max(1) > 1e-6).all()
  close(optax.tree.norm(change), numbers['grad_norm'])


def test_golden(params, rollouts):
  """The loss of a fixed batch."""
  _, metrics = run('wdce', params, make_batch(rollouts))
  assert float(metrics['loss']) == pytest.approx(0.684336, rel=1e-4)
