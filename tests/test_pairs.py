"""Saved rollouts, the verifier, pairs of them, DPO on pairs, and rounds of both."""

import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import fail_at, interrupt, letters, rows, run, same, tiny, vary

from dmpo_jax import (
  buffers,
  build,
  check,
  config,
  data,
  files,
  hf,
  mesh,
  model,
  pairs,
  parts,
  resume,
  rng,
  rounds,
  runner,
  step,
  types,
  weights,
)
from dmpo_jax.objectives import vrpo
from dmpo_jax.phases import pairs as phase
from dmpo_jax.tasks import TASKS
from dmpo_jax.verify import Verdict, Verifier, concluded, repeated

pytestmark = pytest.mark.usefixtures('plain_saves')
pytest_plugins = ('tiny_run',)

# --- the loss


def batch_of(reward, elbo_ref):
  """A TrainBatch of pairs with what the loss reads."""
  views = types.Views(elbo=jnp.asarray(elbo_ref, jnp.float32))
  count, none = jnp.float32(len(elbo_ref)), None
  completion = jnp.ones((len(elbo_ref), 7), bool)
  own = {'reward': jnp.asarray(reward, jnp.float32).ravel()}
  return types.TrainBatch(
    none, none, completion, none, none, own, count / 2, count, ref=views
  )


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_pairs_as_groups_of_two_are_dpo(smoothing):
  """Closed form: minus the gradient of the (smoothed) loss by each row's ELBO."""
  rng = np.random.default_rng(0)
  elbo, ref = rng.normal(size=(2, 10)) * 4
  hp = vrpo.Config(beta=0.1, sft_coef=0.05, smoothing=smoothing)
  batch = batch_of(np.tile([1, 0], (5, 1)), ref)

  def dpo(elbo):
    gap = (elbo - ref).reshape(5, 2)
    m = 0.1 * (gap[:, 0] - gap[:, 1])
    loss = (1 - smoothing) * jax.nn.log_sigmoid(m) + smoothing * jax.nn.log_sigmoid(-m)
    return -jnp.sum(loss) - 0.05 / 7 * jnp.sum(elbo[::2])

  got = vrpo.reweigh(jnp.asarray(elbo, jnp.float32), batch, 2, hp)
  want = -jax.grad(dpo)(jnp.asarray(elbo, jnp.float32))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_label_noise_bounds_the_margin():
  """Two outcomes part by log((1 - e) / e) / beta nats, and without noise for ever."""
  beta, ends = 0.5, {}
  for e in (0.1, 0.0):
    hp = vrpo.Config(beta=beta, sft_coef=0.0, smoothing=e)
    batch = batch_of([[1, 0]], np.zeros(2))
    step = lambda _, z: z + 2 * vrpo.reweigh(z, batch, 2, hp)  # noqa: B023
    ends[e] = [
      float(jnp.diff(-jax.lax.fori_loop(0, n, step, jnp.zeros(2)))[0])
      for n in (2000, 8000)
    ]
  assert ends[0.1] == pytest.approx([np.log(9) / beta] * 2, rel=1e-4)
  assert ends[0.0][1] > ends[0.0][0] + 1 > ends[0.1][0] + 1


def test_pairs_after_a_policy_gradient_raise_the_chance_of_clean_answers():
  """Three outcomes: clean, right alone, wrong. RL pays the first two alike, so that it
  keeps their odds; pairs of its own samples tell them apart."""
  logits = jnp.log(jnp.array([0.2, 0.4, 0.4]))
  paid = jnp.array([1.0, 1.0, 0.0])
  value = lambda z: jnp.sum(jax.nn.softmax(z) * paid)
  rl = jax.lax.fori_loop(0, 100, lambda _, z: z + jax.grad(value)(z), logits)
  start = jax.nn.log_softmax(rl)
  assert float(value(rl)) > 0.95 and start[1] > start[0]
  hp = vrpo.Config(beta=0.5, sft_coef=0.0, smoothing=0.1)
  chosen, rejected = np.array([0, 0]), np.array([1, 2])  # a pair of each class
  rows = np.stack([chosen, rejected], 1).ravel()
  batch = batch_of([[1, 0], [1, 0]], start[rows])

  def step(_, z):
    push = vrpo.reweigh(jax.nn.log_softmax(z)[rows], batch, 2, hp)
    return z + jax.grad(lambda z: jnp.sum(push * jax.nn.log_softmax(z)[rows]))(z)

  end = jax.nn.softmax(jax.lax.fori_loop(0, 500, step, start))
  assert end[0] > 2 * jnp.exp(start[0]) and float(value(jnp.log(end))) > float(
    value(rl)
  )


# --- the verifier

GSM = dict(question='3 + 4?', answer='3 + 4 is 7\n#### 7')
CHAT = '<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>'


def verdict(task, example, text, style='chat', ids=range(40), ended=True):
  task = TASKS[task] if isinstance(task, str) else task
  graded = task.grade(text, example, 'strict'), task.reward(text, example, 'strict')
  judge = Verifier(task, 'strict', style)
  return judge.verdict(example, text, list(ids), ended, graded)


def test_verdicts():
  own = TASKS['sudoku']._replace(
    reward=lambda *_: {}, grade=lambda text, *_: float(text == 'yes'),
    answer=types.Task._field_defaults['answer'], target=lambda *_: 1 / 0,
    forms=(), reasons=False,
  )  # fmt: skip
  good = CHAT.format('So 3 + 4 = 7.', 7)
  loop = list(range(8)) * 5
  assert repeated(loop) > 0.5 > repeated(range(40)) == 0 == repeated([1, 1, 1])
  clean = Verdict(True, True, True, False, False)
  cases = [
    ('gsm8k', GSM, good, {}, clean),
    ('gsm8k', GSM, good, {'ended': False}, clean._replace(cut=True)),
    ('gsm8k', GSM, good, {'ids': loop}, clean._replace(looped=True)),
    ('gsm8k', GSM, CHAT.format('It is 8.', 7), {}, clean._replace(consistent=False)),
    ('gsm8k', GSM, CHAT.format('I know.', 7), {}, clean),
    ('gsm8k', GSM, '<answer>7</answer>', {}, clean._replace(formed=False)),
    ('gsm8k', GSM, '7', {'style': 'bare'}, clean),
    ('gsm8k', GSM, CHAT.format('So it is 8', 8), {}, Verdict(*[False] * 5)),
    (own, {}, 'yes', {}, clean),
    (own, {}, 'no', {}, Verdict(*[False] * 5)),
  ]
  for task, example, text, how, want in cases:
    assert verdict(task, example, text, **how) == want, text
  kinds = [clean.kind, clean._replace(cut=True).kind, Verdict(*[False] * 5).kind]
  assert kinds == ['clean', 'unclean', 'wrong']
  # The result of a reasoning, as the task reads it: a value, whatever stands around it.
  math, count = TASKS['math'], TASKS['countdown']
  found = concluded(
    'so $x = \\frac{1}{2}$\nThus \\boxed{2}', lambda x: math.answer(x, {}, 'strict')
  )
  assert '1/2' in found and '2' not in found
  example = dict(numbers=[2, 3, 4], target=14)
  text = CHAT.format('2 + 3 * 4 = 14', '2 + 4 * 3')
  assert verdict(count, example, text, 'chat').clean
  assert not verdict(
    count, example, CHAT.format('2 * 3 + 4 = 10', '2+3*4'), 'chat'
  ).consistent


# --- pairs of completions


def completion(problem, text, kind='wrong', place=(0, 0, 0), length=None):
  bits = dict(wrong=(0, 0, 0, 0, 0), unclean=(1, 0, 1, 0, 0), clean=(1, 1, 1, 0, 0))
  return pairs.Completion(
    f'{problem:016x}', (7,), tuple(map(ord, text)), text, length or len(text),
    Verdict(*map(bool, bits[kind])), place, 3 * place[1],
  )  # fmt: skip


def many(rng, count=200):
  kinds = ('wrong', 'unclean', 'clean', 'wrong')
  return [
    completion(
      rng.randrange(9), 'ab'[rng.randrange(2)] * rng.randrange(1, 9),
      kinds[i % 4], (i % 2, i // 16, i % 16),
    )
    for i in range(count)
  ]  # fmt: skip


def test_pairs_are_a_function_of_the_completions_and_the_seed():
  rng, hp = random.Random(0), config.Pairs(path=('x',))
  given = many(rng)
  lines, count = pairs.curate(given, hp, 5, {f'{8:016x}'})
  for seed in range(3):  # in any order
    assert (
      pairs.curate(random.Random(seed).sample(given, 200), hp, 5, {f'{8:016x}'})[0]
      == lines
    )
  assert pairs.curate(given, hp, 6, {f'{8:016x}'})[0] != lines
  by_text = {}
  for one in sorted(given, key=lambda one: one.place):  # the earliest of equals counts
    by_text.setdefault((one.problem, one.text), one)
  assert count['completions'] == 200 and count['pairs'] == len(lines) > 8
  assert 200 - count['duplicates'] - count['held_out'] == sum(
    problem != f'{8:016x}' for problem, _ in by_text
  )
  seen = set()
  for line in lines:
    win = by_text[line['problem'], line['chosen_text']]
    lose = by_text[line['problem'], line['rejected_text']]  # of the same problem
    assert win.verdict.clean and lose.verdict.kind == line['class']
    assert [x['row'] for x in line['from']] == [win.place[2], lose.place[2]]
    assert line['from'][0]['step'] == win.step
    seen.add((line['problem'], line['chosen_text']))
  assert len(seen) == len(lines)  # nobody is chosen twice
  assert f'{8:016x}' not in {problem for problem, _ in seen}


def test_choice_of_pairs():
  lengths = [3, 9, 5]
  given = [
    completion(1, 'c' * n, 'clean', (0, 0, i)) for i, n in enumerate(lengths)
  ] + [completion(1, 'w', 'wrong', (0, 1, 0)), completion(1, 'u', 'unclean', (0, 1, 1))]
  made = lambda seed=0, **how: pairs.curate(
    given, config.Pairs(path=('x',), **how), seed
  )[0]
  chosen = lambda lines: [len(line['chosen_text']) for line in lines]
  assert chosen(made(each=2)) == [9, 5]
  assert chosen(made(each=9)) == [9, 5, 3]
  assert {tuple(chosen(made(s, choose='random'))) for s in range(20)} > {(9, 5), (3, 9)}
  assert {x['class'] for x in made(each=2)} == {'wrong', 'unclean'}  # each once
  assert {x['class'] for x in made(classes=('unclean',))} == {'unclean'}
  first = {made(s, each=1)[0]['class'] for s in range(20)}
  assert first == {'wrong', 'unclean'}
  assert (
    pairs.curate(given[:3], config.Pairs(path=('x',)), 0)[0] == []
  )  # no one to reject


def test_solved_problems():
  given = [completion(p, str(i), 'clean') for p in range(10) for i in range(3)]
  given += [completion(3, 'x', 'wrong'), completion(4, 'x', 'unclean')]
  names = lambda share, seed=0: [
    int(x['problem'], 16) for x in pairs.solved(given, share, seed)
  ]
  assert names(1.0) == [0, 1, 2, 4, 5, 6, 7, 8, 9] and names(0.0) == []
  assert len(names(0.8)) == 7 and names(0.8) != names(0.8, 1)
  assert names(0.8) == names(0.8)


# --- files of pairs


def layout(length=12, overlong='error', room=None):
  tok = data.char_tokenizer()
  room = room or (lambda prompt: length)
  return pairs.Layout(tok, length, room, len(tok), tok.eos_token_id, overlong)


def test_pairs_of_texts_messages_and_ids():
  how = layout()
  tok, eos = how.tokenizer, how.fill
  ids = lambda text: tok(text, add_special_tokens=False)['input_ids']
  say = lambda role, text: {'role': role, 'content': text}
  both = [[say('user', 'hi'), say('assistant', text)] for text in ('yes', 'no')]
  prompt = data.encode_chat(tok, 'hi')
  lines = [
    {'prompt': 'hi', 'chosen': 'yes', 'rejected': 'no'},
    {'chosen': both[0], 'rejected': both[1]},
    {'prompt': prompt, 'chosen': [*ids('yes'), eos], 'rejected': [*ids('no'), eos]},
  ]
  found = pairs.rows_of([{**x, 'where': 'f:1'} for x in lines], how)
  assert (found.prompt == np.array(prompt)).all() and found.valid.all()
  want = [[*ids(text)] + [eos] * (12 - len(text)) for text in ('yes', 'no')]
  assert (found.answers == np.array(want)).all()
  # -1 beyond the room of a canvas is nothing; elsewhere it stays.
  left = {'prompt': [5], 'chosen': [5] * 3 + [-1] * 9, 'rejected': [6] * 12}
  tight = layout(room=lambda prompt: 10)
  with pytest.raises(ValueError, match=r'sampler.length = 12 .*f:2 has 12 .*overlong'):
    pairs.rows_of([{**left, 'where': 'f:2'}], tight)
  ok = {**left, 'rejected': [6] * 10 + [-1] * 2, 'where': 'f:2'}
  assert pairs.rows_of([ok], tight).answers[0, 0].tolist()[:10] == [5] * 3 + [-1] * 7
  drop = tight._replace(overlong='drop')
  assert len(pairs.rows_of([{**left, 'where': 'f'}, ok], drop).answers) == 1
  for name, bad in (('chosen', []), ('prompt', None), ('rejected', [10**6])):
    with pytest.raises(ValueError, match=f'f:3: {name} must be'):
      pairs.rows_of([{**left, name: bad, 'where': 'f:3'}], how)


def test_given_completions_stand_as_the_sampler_leaves_them():
  """On attention blocks of the text's own grid: the same rows, canvas and end."""
  c = tiny()
  blocks = ('model.attention_block', 'sampler.block', 'eval.sampler.block')
  config.update(c, dict.fromkeys(blocks, 4))
  made = build.build(c)
  params, tok = made.steps.init(), made.tokenizer
  prompt, valid = data.left_pad([[7] * 5, [8] * 6, [9] * 3, [6]] * 2, 6, 0)
  row = np.arange(8, dtype=np.int32)
  sampled = mesh.fetch(made.steps.sample(params, prompt, valid, row))
  order = sampled.rollouts.order
  tokens = sampled.rollouts.tokens[:, -order.shape[1] :]
  answers = data.after_given(order, tokens, tok.eos_token_id).astype(np.int32)
  again = mesh.fetch(made.steps.place_pairs(prompt, valid, answers, row))
  for name in ('tokens', 'valid'):
    one, two = (getattr(x.rollouts, name) for x in (sampled, again))
    np.testing.assert_array_equal(one, two)
  np.testing.assert_array_equal(sampled.completion, again.completion)
  given = order == types.GIVEN
  assert given.any() and (given == (again.rollouts.order == types.GIVEN)).all()
  # A mask that the sampler left stands there again.
  answers[:, 5:] = -1
  left = mesh.fetch(made.steps.place_pairs(prompt, valid, answers, row)).rollouts
  count = np.sum(left.order == 0, axis=1)
  np.testing.assert_array_equal(count, 5)
  assert (left.tokens[:, -16:][left.order == -1] == tok.eos_token_id).all()


# --- rules


def test_rules_of_pairs(tmp_path):
  file = tmp_path / 'p.jsonl'
  file.write_text('{}\n')
  refused = [
    ({'pairs.path': (str(file), str(tmp_path))}, 'pairs.path'),
    ({'pairs.path': ('x',), 'pairs.classes': ('good',)}, 'pairs.classes'),
    ({'pairs.path': ('x',), 'pairs.smoothing': 0.5}, 'pairs.smoothing'),
    ({'pairs.path': ('x',), 'pairs.batch': 3}, 'pairs.batch = 6'),
    ({'pairs.path': ('x',), 'pairs.lr': -1.0}, 'pairs.lr'),
    ({'pairs.path': ('x',), 'pairs.choose': 'longst'}, "'longest'"),
    ({'data.drop': 'nowhere'}, 'data.drop'),
    ({'pairs.path': ('x',), 'lora.rank': 2, 'logprob.fuse': True}, 'and no pairs.path'),
  ]
  for fields, named in refused:
    c = tiny()
    config.update(c, fields)
    with pytest.raises(ValueError, match='cannot run') as info:
      check.config(c, 4)
    assert named in str(info.value)
  for fields, named in (
    ({'pairs.lr': 0.1}, 'pairs.path'),
    ({'pairs.path': (str(file),), 'pairs.each': 3}, 'a workdir'),
    ({'train.iterations': 0, 'reference.every': 2}, 'pairs.path'),
    ({'log.rollouts': True, 'train.iterations': 0}, 'train.iterations'),
  ):
    c = tiny()
    config.update(c, fields)
    with pytest.raises(ValueError, match=f'without effect.*{named}'):
      check.effects(c, fields)
  file.write_text('{"other": 1}\n')
  with pytest.raises(ValueError, match='data.drop.*line 1'):
    data.without(TASKS['sudoku'], [], str(file))


# --- runs


def half(text, example, protocol):
  """A grade that half of an untrained model's texts earn."""
  return float(letters(text, example, protocol)['letters'] >= 0.5)


def graded(made):
  return made._replace(task=made.task._replace(reward=letters, grade=half))


@pytest.fixture(scope='module')
def source(early, base_params, tmp_path_factory):
  """(parts, workdir, base) of a run with overlap and saved rollouts."""
  made = vary(early, log={'rollouts': True}, train={'iterations': 6})
  made, workdir = graded(made), tmp_path_factory.mktemp('source')
  run(made, workdir, base_params)
  return made, workdir, base_params


def files_of(workdir):
  return {p.name: p.read_bytes() for p in buffers.paths(workdir)}


def test_rollouts_are_saved_and_rewound(source, tmp_path):
  made, workdir, base = source
  found = buffers.read(workdir)
  steps = [0, *range(0, 5 * 3, 3)]  # by the policy of three updates before: overlap
  assert [(x.iteration, x.step) for x in found] == list(enumerate(steps))
  assert [x.iteration for x in buffers.read(workdir, last=2)] == [4, 5]
  rl = rows(workdir)['rl']
  for buffer, row in zip(found, rl, strict=True):
    assert buffer.group == 4 and buffer.tokens.shape == (8, 16)
    assert buffer.drafted is None  # nobody drafts
    assert buffer.reward.mean() == pytest.approx(row['reward'], rel=1e-6)
    assert buffer.terms['letters'].mean() == pytest.approx(row['reward/letters'])
    assert buffer.grade.mean() == pytest.approx(row['accuracy'], rel=1e-6)
    assert buffer.length.mean() == pytest.approx(row['length'], rel=1e-6)
    texts = data.decode(made.tokenizer, buffer.tokens, made.tokenizer.eos_token_id)
    paid = [letters(x, None, '')['letters'] for x in texts]
    np.testing.assert_allclose(paid, buffer.reward, rtol=1e-6)
    problems = build.problems(made, 'train')
    assert buffer.examples == [problems.examples[i] for i in buffer.index]
    np.testing.assert_array_equal(buffer.prompt, problems.tokens[buffer.index])
  # Killed after the buffer ahead is written, and resumed: the same files to the bit.
  part = vary(made, checkpoint={'every': 4})
  with pytest.raises(KeyboardInterrupt):
    run(fail_at(part, 11, interrupt), tmp_path, base, kill=True)
  buffers.write(tmp_path, found[2]._replace(iteration=7))
  assert set(files_of(tmp_path)) - set(files_of(workdir)) == {'000007.npz'}
  run(part, tmp_path, base)
  assert files_of(tmp_path) == files_of(workdir)
  (tmp_path / 'rollouts' / '000000.npz').write_bytes(b'torn')
  with pytest.raises(ValueError, match=r'000000.npz is no saved rollout'):
    buffers.read(tmp_path)
  with pytest.raises(ValueError, match='log.rollouts = True'):
    buffers.read(tmp_path / 'none')


def pairs_of(workdir, **fields):
  """The parts of a run that trains on pairs of another's rollouts."""
  c = tiny()
  own = {
    'sft.steps': 0, 'train.iterations': 0, 'pairs.path': (str(workdir),),
    'pairs.batch': 4, 'pairs.lr': 0.01, 'pairs.warmup': 0, 'pairs.draws': 4,
    'pairs.held_out': 0.3, 'pairs.every': 2, 'pairs.each': 4, 'pairs.epochs': 3,
  }  # fmt: skip
  config.update(c, {**own, **fields})
  return graded(build.build(c))


def learn(made, workdir, base, kill=False):
  """Trains on pairs; returns what it ends with, on the host."""
  return run(made, workdir, base, kill, 'pairs')


def test_no_pair_has_a_problem_of_the_test(source, tmp_path, monkeypatch):
  """Even if the test has problems of the training."""
  made, workdir, _ = source
  lines, count = phase.curated(made, [str(workdir)])
  assert count['pairs'] == len(lines) > 4 and not count['held_out']
  asked = {line['problem'] for line in lines}
  test = build.problems(made, 'test')
  shared = buffers.read(workdir)[0].examples[:1]
  encoded = {**made.encoded, 'test': test._replace(examples=shared)}
  left, count = phase.curated(made._replace(encoded=encoded), [str(workdir)])
  taken = data.digest(made.task, shared[0])
  assert count['held_out'] == sum(
    4 * [data.digest(made.task, x) for x in b.examples].count(taken)
    for b in buffers.read(workdir)
  )
  assert left == [line for line in lines if line['problem'] != taken]
  assert taken in asked
  # Dropped problems are gone from the training set.
  drop = tmp_path / 'solved.jsonl'
  drop.write_text(files.to_lines([{'problem': taken}]))
  c = tiny()
  c.data.drop = str(drop)
  kept = build.problems(build.build(c), 'train').examples
  whole = build.problems(made, 'train').examples
  assert kept == [x for x in whole if data.digest(made.task, x) != taken] != whole


def test_training_on_pairs(source, tmp_path):
  """It raises the margin of held-out pairs; killed anywhere, it ends in the same bits.
  The source is not needed once its pairs are written."""
  _, workdir, base = source
  copy = tmp_path / 'source'
  shutil.copytree(workdir / 'rollouts', copy / 'rollouts')
  made = pairs_of(copy)
  want = learn(made, tmp_path / 'one', base)
  found = rows(tmp_path / 'one')
  first, *_, last = found['held_out_pairs']
  assert first['pairs_right'] == 0.5 and first['margin'] == 0
  assert last['margin'] > 0.5 and last['pairs_right'] > 0.5
  updates = found['pairs']
  assert [x['step'] for x in updates] == list(range(1, len(updates) + 1))
  for row in updates:
    assert row['margin'] == pytest.approx(
      row['chosen_gap'] - row['rejected_gap'], abs=1e-4
    )
  assert updates[0]['margin'] == pytest.approx(0, abs=1e-5)
  assert updates[-1]['margin'] > 0.1
  lines = files.read(tmp_path / 'one' / pairs.FILE)
  assert lines == phase.curated(made, [str(copy)])[0]

  for every, call, kill in ((1, 3, False), (2, 4, True), (9, 2, True)):
    at, calls = tmp_path / f'{every}', []
    shutil.copytree(workdir / 'rollouts', copy / 'rollouts', dirs_exist_ok=True)

    def update(*args):
      calls.append(args)  # noqa: B023
      if len(calls) == call:  # noqa: B023
        interrupt()
      return made.steps.update_pairs(*args)

    part = vary(made, checkpoint={'every': every})
    part.encoded.pop('pairs', None)
    broken = part._replace(steps=part.steps._replace(update_pairs=update))
    with pytest.raises(KeyboardInterrupt):
      learn(broken, at, base, kill)
    shutil.rmtree(copy)  # no more needed
    part.encoded.pop('pairs', None)
    same(learn(part, at, base), want)
    assert rows(at) == found
  shard = lambda x: (x.dtype, x.shape, x.sharding.shard_shape(x.shape))
  shape = lambda tree: jax.tree.map(shard, tree)
  phase_ = build.pairs_phase(made, made.encoded['pairs'].prompt.shape[1])
  assert phase_.rows == 8
  _, (name, _, planned) = phase_.programs
  assert name == 'update_pairs'
  for mine, theirs in zip(planned[:2], calls[0][:2], strict=True):
    assert shape(mine) == shape(theirs)  # state and frozen parameters
  size = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert size(planned[2]) == size(calls[0][2])  # the batch
  other = files.read(at / pairs.FILE)[1:]
  files.replace(at / pairs.FILE, files.to_lines(other))
  made.encoded.pop('pairs', None)
  with pytest.raises(ValueError, match='pairs.path: the file has changed'):
    learn(made, at, base)
  files.replace(tmp_path / pairs.FILE, files.to_lines(other))
  with pytest.raises(ValueError, match='no such file'):  # of no run that has begun
    phase.lines_of(made, str(tmp_path))


def dpo_of(made, batch, masks):
  """Returns (loss, ELBOs) as a function of parameters and the reference's ELBOs.

  Each attention block of each masked copy is read by a plain forward of its own, after
  the clean blocks before it.
  """
  cfg, length, size = made.model, 16, 4
  tokens, block = batch.tokens, jnp.arange(length)[None] // size

  def elbo(params):
    total = 0.0
    for k in range(masks.masked.shape[1]):
      for b in range(length // size):
        hidden = masks.masked[:, k] & (block == b)
        canvas = jnp.where(hidden, cfg.mask_id, tokens[:, -length:])
        text = jnp.concatenate([tokens[:, :-length], canvas], axis=1)
        logits = model.full_logits(cfg, params, text, batch.valid)[:, -length:]
        logp = model.logp_of(logits, tokens[:, -length:])
        total += jnp.sum(jnp.where(hidden, logp, 0) * masks.weight[:, k], axis=1)
    return total / masks.masked.shape[1]

  def loss(params, ref):
    own, c = elbo(params), made.config.pairs
    gap = (own - ref).reshape(-1, 2)
    margin = c.beta * (gap[:, 0] - gap[:, 1])
    value = -jax.nn.log_sigmoid(margin) - c.sft_coef / length * own[::2]
    return jnp.mean(value), own

  return loss


@pytest.mark.slow
def test_an_update_on_pairs_of_a_block_model(base_params, tmp_path):
  """Its numbers and its gradient are those of DPO on ELBOs by plain forwards."""
  draw, file = np.random.default_rng(0), tmp_path / 'pairs.jsonl'
  ids = lambda low, high: draw.integers(5, 30, draw.integers(low, high)).tolist()
  lines = [
    {'prompt': ids(3, 9), 'chosen': ids(2, 12), 'rejected': ids(2, 12)}
    for _ in range(4)
  ]
  file.write_text(files.to_lines(lines))
  blocks = ('model.attention_block', 'sampler.block', 'eval.sampler.block')
  own = {'pairs.epochs': 2, 'pairs.held_out': 0.0, 'pairs.draws': 2}
  made = pairs_of(file, **dict.fromkeys(blocks, 4), **own)
  seen = []

  def update(state, frozen, batch, inner):
    seen.append((mesh.fetch(state.trainable), batch))
    return made.steps.update_pairs(state, frozen, batch, inner)

  part = made._replace(steps=made.steps._replace(update_pairs=update))
  learn(part, tmp_path / 'run', base_params)
  first, last = rows(tmp_path / 'run')['pairs']
  assert first['margin'] == pytest.approx(0, abs=1e-5) and len(seen) == 2
  policy, batch = seen[1]
  setup = parts.pairs_setup_of(made.config, made.setup)
  key = jax.random.fold_in(rng.key_for(made.config.seed, 'pairs'), 0)
  batch = mesh.fetch(batch)
  masks = step.draw(setup, key, batch)
  assert (batch.sampled.sum(1) < 16).any()  # prompts that end inside a block
  loss = jax.jit(jax.value_and_grad(dpo_of(made, batch, masks), has_aux=True))
  (_, ref), _ = loss(mesh.fetch(base_params), jnp.zeros(8))
  np.testing.assert_allclose(ref, batch.ref.elbo[:, 0], rtol=1e-4)
  (_, elbo), grad = loss(policy, ref)
  gap = np.asarray(elbo - ref).reshape(-1, 2)
  assert np.abs(gap).min() > 0.01
  want = {
    'elbo_chosen': elbo[::2].mean(), 'elbo_rejected': elbo[1::2].mean(),
    'chosen_gap': gap[:, 0].mean(), 'rejected_gap': gap[:, 1].mean(),
    'margin': (gap[:, 0] - gap[:, 1]).mean(), 'grad_norm': optax.tree.norm(grad),
  }  # fmt: skip
  for name, value in want.items():
    assert last[name] == pytest.approx(float(value), rel=1e-3), name


# --- rounds


def rounds_config(folder):
  c = tiny()
  own = {
    'sft.steps': 2, 'train.iterations': 2, 'train.inner': 1, 'eval.every': 0,
    'data.train_size': 8, 'pairs.path': (rounds.first(str(folder)),),
    'pairs.batch': 4, 'pairs.lr': 0.01, 'pairs.draws': 2, 'data.test_size': 3,
  }  # fmt: skip
  config.update(c, own)
  return c


@pytest.fixture
def acted(monkeypatch):
  """Rounds whose runs and exports are stand-ins; `left` of them until a kill."""
  log, left = [], [10**9]

  def act(what, workdir, path):
    if not left[0]:
      raise KeyboardInterrupt
    left[0] -= 1
    log.append((what, os.path.basename(workdir)))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    files.replace(path, '{}')

  class Parts:
    def __init__(self, c):
      self.config = c

  monkeypatch.setattr(runner, 'ready', Parts)
  monkeypatch.setattr(
    runner, 'train', lambda built, workdir, _: runs_done(workdir) or act(
      'train', workdir, os.path.join(workdir, 'results.json')
    )
  )  # fmt: skip
  monkeypatch.setattr(runner, 'params_of', lambda *_: ({}, {}, ''))
  monkeypatch.setattr(
    hf, 'export', lambda built, p, b, out, kind: act(
      'export', os.path.dirname(out), os.path.join(out, 'config.json')
    )
  )  # fmt: skip

  def solved_of(built, folders, share):
    act('solved', folders[0], os.path.join(folders[0], 'rollouts', 'x'))
    return [{'problem': os.path.basename(folders[0])}]

  monkeypatch.setattr(phase, 'solved_of', solved_of)
  return log, left


def runs_done(workdir):
  return os.path.exists(os.path.join(workdir, 'results.json'))


def test_rounds_go_on_wherever_they_are_killed(acted, tmp_path):
  log, left = acted
  want = [(x, str(n)) for n in range(3) for x in ('train', 'export', 'solved')][:-2]
  go = lambda folder, count=2: rounds.run(
    rounds_config(folder), str(folder), count, 1, {}
  )
  go(tmp_path / 'whole')
  assert log == want
  for kill in range(len(want)):
    log.clear()
    left[0] = kill
    with pytest.raises(KeyboardInterrupt):
      go(tmp_path / str(kill))
    assert log == want[:kill]
    left[0] = 100
    go(tmp_path / str(kill))
    assert log == want
    go(tmp_path / str(kill))  # all is done
    assert log == want
  go(tmp_path / 'whole', 3)  # more rounds go on from there
  path = tmp_path / 'whole' / '2' / rounds.SOLVED
  assert [x['problem'] for x in files.read(path)] == ['0', '1', '2']
  c = rounds.config_of(rounds_config(tmp_path), str(tmp_path), 1)
  assert c.pairs.path == (f'{tmp_path}/0',) and c.sft.steps == 0 == c.model.width
  assert c.model.checkpoint == f'{tmp_path}/0/export-merged' and c.log.rollouts
  assert c.data.drop == f'{tmp_path}/0/rollouts/solved.jsonl'
  first = rounds.config_of(rounds_config(tmp_path), str(tmp_path), 0)
  assert first.pairs.path == () and first.sft.steps == 2


def test_rounds_refuse(tmp_path):
  for fields in ({'train.iterations': 0}, {'pairs.path': ('x',)}):
    (named,) = fields
    c = rounds_config(tmp_path)
    config.update(c, fields)
    with pytest.raises(ValueError, match=named):
      rounds.run(c, str(tmp_path), 1, 0.8, {})


@pytest.mark.long
@pytest.mark.parametrize('rank', [0, 2])
def test_a_round_of_runs(rank, tmp_path, monkeypatch):
  """RL, export, pairs, RL: killed in the pairs and in the last RL, the same bits.
  Adapters that were trained on pairs go on, over the merged model before."""

  real = runner.ready
  monkeypatch.setattr(runner, 'ready', lambda c: graded(real(c)))

  def end(folder, kill=''):
    c = rounds_config(folder)
    c.lora.rank = rank
    if kill:
      stop = lambda built: built._replace(
        steps=built.steps._replace(**{kill: lambda *_: interrupt()})
      )
      ready = lambda c: (stop if c.pairs.path and kill != 'none' else (lambda x: x))(
        graded(real(c))
      )
      with monkeypatch.context() as patch:
        patch.setattr(runner, 'ready', ready)
        with pytest.raises(KeyboardInterrupt):
          rounds.run(c, str(folder), 1, 1.0, {})
    rounds.run(c, str(folder), 1, 1.0, {})
    built = graded(real(rounds.config_of(c, str(folder), 1)))
    params, base, name = runner.params_of(built, str(folder / '1'))
    assert name == 'latest'
    return mesh.fetch(params), mesh.fetch(base), built

  want, base, built = end(tmp_path / 'a')
  assert set(rows(tmp_path / 'a' / '1')) >= {'pairs', 'rl', 'update'}
  pair = files.read(tmp_path / 'a' / '1' / pairs.FILE)
  assert pair
  after = mesh.fetch(resume.after_pairs(built, str(tmp_path / 'a' / '1'), base))
  if rank:
    same(after['params'], base['params'])
    same(want['params'], base['params'])
    _, merged = weights.load_hf(str(tmp_path / 'a' / '0' / rounds.MODEL))
    same(mesh.fetch(merged)['params'], base['params'])
    base, after, want_ = built.steps.init_lora(), after['lora'], want['lora']
    base = mesh.fetch(base)['lora']
  else:
    want_ = want
  leaves = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
  start = leaves(after)
  assert (start != leaves(base)).any() and (leaves(want_) != start).any()
  for kill in ('update_pairs', 'update'):
    # The paths of the folders are in the configs, so each way has its own.
    got, _, _ = end(tmp_path / kill, kill)
    same(got, want)
