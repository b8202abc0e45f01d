"""A whole tiny run: what it does and writes, and what overlap changes."""

import itertools
import pathlib
import re
import time
import types

import jax
import numpy as np
import pytest
from tiny_run import (
  INNER,
  ITERATIONS,
  fail_at,
  interrupt,
  letters,
  rows,
  run,
  run_sft,
  same,
  samples,
  tiny,
  vary,
  watched,
)

from dmpo_jax import (
  build,
  checkpoint,
  curriculum,
  data,
  evaluate,
  mesh,
  metrics,
  rollout,
)
from dmpo_jax.tasks import TASKS
from dmpo_jax.types import Rollouts, Sampled, Scores, TrainBatch

pytest_plugins = ('tiny_run',)
pytestmark = pytest.mark.usefixtures('plain_saves')


# --- a run


def test_supervised_steps_change_every_matrix(built, base_params):
  fresh = mesh.fetch(built.steps.init())
  moved = jax.tree.map(lambda a, b: (a != b).any(), fresh, mesh.fetch(base_params))
  assert all(jax.tree.leaves(moved))


def test_no_supervised_steps_give_the_fresh_model(built, tmp_path):
  """sft.steps = 0 gives the initial weights, and no checkpoint or metric."""
  params = run_sft(vary(built, sft={'steps': 0}), tmp_path)
  same(mesh.fetch(params), mesh.fetch(built.steps.init()))
  assert not (tmp_path / 'sft').exists() and not metrics.read(tmp_path)


def test_metrics_of_a_run(whole, built):
  """Has every iteration and update once, with the numbers that reports show."""
  workdir, params = whole
  found = rows(workdir)
  assert set(found) == {'rl', 'update', 'eval'}
  assert [r['step'] for r in found['rl']] == list(range(ITERATIONS))
  assert [r['step'] for r in found['update']] == list(range(1, ITERATIONS * INNER + 1))
  # eval.every = 1: before every iteration, and at the end.
  assert [r['step'] for r in found['eval']] == [0, 1, 2]
  for row in found['rl']:
    assert {
      'reward',
      'reward_std',
      'accuracy',
      'length',
      'forwards',
      'ess',
      'coef',
      'log_rnd_std',
      'logp_old',
      'logp_ref',
      'reward/letters',
      'tokens_per_step',
    } <= set(row)
    assert row['tokens_per_step'] == 4 and row['forwards'] == 4
    assert row['logp_old'] < 0
    # Of one token; the policy is unsure, so both are far from 0.
    assert -np.log(built.model.vocab) * 2 < row['logp_token'] < -0.1
    assert 0.1 < row['entropy'] <= np.log(built.model.vocab)
  # Each name has a row in the docs, by itself or by its prefix.
  page = pathlib.Path(__file__).parents[1] / 'docs/metrics.md'
  listed = set(re.findall(r'^\| `([^`]+)` \|', page.read_text(), re.M))
  names = {name for phase in found.values() for row in phase for name in row}
  names -= {'phase', 'step'}
  assert len(names) > 40
  assert [x for x in names if not {x, x.split('/')[0] + '/'} & listed] == []
  # Before the first update the policy is the reference.
  assert found['rl'][0]['log_rnd_std'] == 0
  assert found['rl'][1]['log_rnd_std'] > 0
  for row in found['update']:
    assert row['finite'] == 1 and row['grad_norm'] > 0 and 'loss' in row
  for row in found['eval']:
    assert {'accuracy', 'reward', 'cell_accuracy', 'forwards'} <= set(row)
  timed = [r for r in metrics.read(workdir) if r['phase'] == 'rl']
  parts = 'data sample score reward rollout between'.split()
  assert all(r[f'seconds/{part}'] > 0 for r in timed for part in parts)
  # The second row has the first one's updates, validation and checkpoint.
  assert all(timed[1][f'seconds/{x}'] > 0 for x in ('update', 'evaluate', 'checkpoint'))
  assert set(params) == {'params'}


def test_the_parts_add_up_to_the_time_of_a_row(
  built, base_params, tmp_path, monkeypatch
):
  """By a clock that counts how often it is read; and one iteration is traced."""
  ticks, seen = itertools.count(), []
  clock = types.SimpleNamespace(**{**vars(time), 'perf_counter': lambda: next(ticks)})
  monkeypatch.setattr(metrics, 'time', clock)

  def rates(numbers, prompt, updates):
    clocks = {k: v for k, v in numbers.items() if k.startswith('seconds/')}
    del clocks['seconds/compile']  # it is in the others
    seen.append((next(ticks), prompt, updates))
    return {'tokens_per_second': sum(clocks.values())}

  run(built, tmp_path, base_params, rates=rates, profile=1)
  row = [r for r in metrics.read(tmp_path) if r['phase'] == 'rl'][1]
  prompt = build.problems(built, 'train').tokens.shape[1]
  (first, *_), (second, *given) = seen
  assert row['tokens_per_second'] == second - first and given == [prompt, INNER]
  assert 'seconds/profile' in row
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_samples_of_a_run(whole, built):
  """Has log.samples lines a buffer: the text, its reward and its order."""
  found = samples(whole[0])
  assert [s['iteration'] for s in found] == [0, 0, 1, 1]
  assert [s['row'] for s in found] == [0, 1, 8, 9]
  for sample in found:
    assert sorted(set(sample['order'])) == [0, 1, 2, 3]
    assert len(sample['order']) == 16
    terms = built.task.reward(sample['completion'], sample['example'], 'strict')
    assert terms == sample['reward']
    assert sample['prompt'] == sample['example']['puzzle']


def test_training_changes_every_weight_of_the_policy(whole, base_params):
  moved = jax.tree.map(lambda a, b: (a != b).any(), mesh.fetch(base_params), whole[1])
  assert all(jax.tree.leaves(moved))


def test_a_run_is_reproducible(built, base_params, whole, tmp_path):
  """The seed decides everything. A finished run takes no update any more."""
  params = run(built, tmp_path, base_params)
  same(params, whole[1])
  assert rows(tmp_path) == rows(whole[0])
  never = fail_at(built, 1, interrupt)
  same(run(never, tmp_path, base_params), params)
  assert rows(tmp_path) == rows(whole[0])
  assert samples(tmp_path) == samples(whole[0])


# --- overlap: the next buffer is sampled before the updates


def test_compilations_are_counted(whole, ahead):
  """The first buffer compiles; the last one compiles nothing."""
  counts = [
    [r['compilations'] for r in metrics.read(run[0]) if r['phase'] == 'rl']
    for run in (whole, ahead)
  ]
  assert counts[0][0] > 0 and counts[1][-1] == 0, counts


def test_policy_age(whole, ahead):
  """Counts updates since sampling: none without overlap, else those of a buffer."""
  age = lambda run: [r['policy_age'] for r in rows(run[0])['rl']]
  assert age(whole) == [0, 0]
  assert age(ahead) == [0, INNER, INNER]
  # Until a buffer sampled ahead is used, the two runs are the same.
  for phase, count in (('rl', 1), ('eval', 2), ('update', INNER)):
    assert rows(ahead[0])[phase][:count] == rows(whole[0])[phase][:count]
  assert rows(ahead[0])['update'][INNER] != rows(whole[0])['update'][INNER]
  assert [s['iteration'] for s in samples(ahead[0])] == [0, 0, 1, 1, 2, 2]


def test_buffer_ahead_is_sampled_before_the_updates(
  built, early, base_params, ahead, tmp_path
):
  """Its completions and log-probs are equal to a replay from the base on."""
  packed, batches = [], []

  def watch(name, args):
    if name == 'pack':
      packed.append(args)
    if name == 'update':
      batches.append(args[2])

  params = run(watched(early, watch), tmp_path, base_params)
  same(params, ahead[1])
  problems = build.problems(built, 'train')
  state, scores = built.steps.start(base_params), []
  for it, (sampled, _, got) in enumerate(packed):
    index = data.indices_at(it, 2, len(problems.examples), 0)
    prompts = data.prompts_of(problems, index)
    again = built.steps.sample(
      state.trainable,
      np.repeat(prompts.tokens, 4, 0),
      np.repeat(prompts.valid, 4, 0),
      mesh.fetch(sampled.row),
    )
    scores.append(
      mesh.fetch(built.steps.score(state.trainable, base_params, (), again))
    )
    same(mesh.fetch(again), mesh.fetch(sampled))
    same(scores[it], mesh.fetch(got))
    for inner in range(INNER) if it else ():  # buffer 1 was before any update
      state, _ = built.steps.update(
        state, base_params, batches[(it - 1) * INNER], inner
      )
  # The control: a buffer later its log-probs are others.
  now = mesh.fetch(built.steps.score(state.trainable, base_params, (), again))
  assert not np.array_equal(now.logp_old, scores[-1].logp_old)
  for inner in range(INNER):
    state, _ = built.steps.update(state, base_params, batches[-1], inner)
  same(mesh.fetch(state.trainable), params)


def test_updates_are_queued_before_grading(early, base_params, tmp_path, monkeypatch):
  """All updates of a buffer are under way before the next one is graded."""
  events, late = [], metrics.Writer.late
  note = lambda name, _=None: events.append(name)

  def noted(*args):  # the numbers of an update are fetched
    events.append('late')
    return late(*args)

  monkeypatch.setattr(metrics.Writer, 'late', noted)
  quiet = vary(early, eval={'every': 0}, train={'iterations': 2})
  run(watched(quiet, note), tmp_path, base_params)
  graded = ['reward'] * 8
  expected = (
    ['sample', 'score', *graded, 'pack', 'sample', 'score']
    + ['update'] * INNER
    + [*graded, 'pack']
    + ['late'] * INNER
    + ['update', 'late'] * INNER
  )
  assert events[: len(expected)] == expected  # then the last validation


def test_watchdog_hears_of_every_part(early, base_params, tmp_path, monkeypatch):
  """The last beat before a part that may hang names the part and the update."""
  beats, seen = [], []
  beat = lambda phase, step: beats.append((phase, step))

  def note(name, _=None):
    seen.append((name, *beats[-1]))

  def noted(name, call):
    def noting(*args, **options):
      note(name)
      return call(*args, **options)

    return noting

  for module, name in (
    (data, 'prompts_of'),
    (checkpoint, 'save'),
    (checkpoint, 'restore'),
  ):
    monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
  part = watched(vary(early, train={'iterations': 2}, checkpoint={'every': 2}), note)
  run(part, tmp_path, base_params, beat=beat)
  found = {name: {phase for n, phase, _ in seen if n == name} for name, *_ in seen}
  assert found == {
    'restore': {'checkpoint'},
    'save': {'checkpoint'},
    'prompts_of': {'data'},
    'sample': {'sample'},
    'score': {'score'},
    'pack': {'score'},
    'reward': {'reward', 'evaluate'},
    'update': {'update'},
  }
  assert [step for n, _, step in seen if n == 'update'] == list(range(1, 7))
  assert [step for n, _, step in seen if n == 'save'] == [2, 4, 6]


# --- parts


@pytest.mark.smoke
def test_unmasking_metrics():
  """Counts forwards by the tokens they reveal; a token that EOS replaced (-1) is not
  revealed."""
  order = np.array([[0, 0, 0, 1, 2, 2], [0, 1, 3, 3, -1, -1]])
  sure = np.where(order < 0, 9.0, 0.5)
  found = rollout.unmasking_metrics(order, sure)
  shares = {name: found[f'tokens_per_forward/{name}'] for name in rollout.BINS}
  # Row 0: 3, 1, 2 tokens; row 1: 1, 1, 0, 2.
  want = {'0': 1, '1': 3, '2': 2, '3-4': 1, '5-8': 0, '9+': 0}
  assert {k: round(7 * x) for k, x in shares.items()} == want
  assert abs(found['tokens_per_step'] - 10 / 7) < 1e-12
  assert found['confidence'] == found['confidence_low'] == 0.5


def test_token_metrics_count_words_alone():
  """Neither what follows the first EOS nor what no step has revealed."""
  words = np.array([[1, 1, 0], [1, 1, 1]], bool)
  host = rollout.Fetched(*[None] * 7)._replace(
    completion=words,
    order=np.array([[0, 1, 2], [0, 0, -1]]),
    confidence=np.array([[1.0, np.exp(-2), 0.1], [np.exp(-4), 0.0, 9.0]], np.float32),
    entropy=np.array([[0.0, 1.0, 9.0], [2.0, 5.0, 9.0]]),
  )
  found = rollout.token_metrics(host)
  assert found['entropy'] == 2.0
  assert found['logp_token'] == pytest.approx((0 - 2 - 4 + np.log(1e-38)) / 4)
  assert set(rollout.token_metrics(host._replace(entropy=None))) == {'logp_token'}
  assert rollout.token_metrics(host._replace(completion=np.zeros((2, 3), bool))) == {}


@pytest.mark.smoke
def test_cut_counts_completions_without_eos():
  """An EOS anywhere in the completion ends it; one in the prompt does not."""
  tokenizer = data.char_tokenizer()
  tokens = np.full((4, 3 + 5), tokenizer.convert_tokens_to_ids('1'), np.int32)
  eos = tokenizer.eos_token_id
  tokens[0, 2] = tokens[1, 7] = tokens[2, 5] = tokens[3, 3] = eos
  mask = np.ones((4, 5), bool)
  task = TASKS['sudoku']._replace(reward=letters, grade=lambda *_: 0.0)
  batch = TrainBatch._make([None] * len(TrainBatch._fields))
  steps = types.SimpleNamespace(pack=lambda *_: (batch, {}))
  order = np.zeros((4, 5), np.int32)
  out = Rollouts(tokens, None, order, None, np.int32(5), np.ones((4, 5)))
  rows = np.arange(4)
  host = rollout.fetched(Sampled(out, mask, rows), eos)
  chosen = curriculum.Chosen(np.zeros(2, np.int32))
  drawn = rollout.Drawn(chosen, None, host, rows)
  started = rollout.Started(0, 0, drawn, Scores())
  collector = rollout.Collector(
    steps,
    task,
    tokenizer,
    data.Problems([{'puzzle': '1'}], tokens[:1, :3], None),
    {},
    None,
    prompts=2,
    group=2,
    seed=0,
    bucket=0,
    protocol='strict',
    weights={},
    stops=(eos,),
    samples=1,
  )
  _, numbers, _ = collector.finish(started)
  assert numbers['cut'] == 0.25


def test_evaluation_counts_every_problem_once(built, whole):
  """11 problems in batches of 8: the padding of the last batch does not count."""
  problems = build.problems(built, 'validation')
  params = jax.device_put(whole[1], mesh.replicated(built.mesh))
  numbers, found = evaluate.accuracy(built, params, problems)
  assert len(found) == len(problems.examples) == 11
  assert [s['example'] for s in found] == problems.examples
  grades = [built.task.grade(s['completion'], s['example'], 'strict') for s in found]
  rewards = [sum(s['reward'].values()) for s in found]
  assert numbers['accuracy'] == pytest.approx(np.mean(grades))
  assert numbers['reward'] == pytest.approx(np.mean(rewards))
  again, _ = evaluate.accuracy(built, params, problems)
  assert again == numbers
  # The last row of the run's own validation is of the same parameters.
  last = rows(whole[0])['eval'][-1]
  assert {k: last[k] for k in numbers} == numbers


def test_pmap_and_jit_sample_the_same(built, base_params):
  """sampler.parallel does not change the completions."""
  c = tiny()
  c.sampler.parallel = 'pmap'
  other = build.build(c)
  problems = build.problems(built, 'train')
  prompts = data.prompts_of(problems, data.indices_at(0, 8, len(problems.examples), 0))
  args = (base_params, prompts.tokens, prompts.valid, np.arange(8, dtype=np.int32))
  one, two = (mesh.fetch(b.steps.sample(*args)) for b in (built, other))
  for name in ('tokens', 'valid', 'order', 'forwards'):
    same(getattr(one[0], name), getattr(two[0], name))
  same(one[1], two[1])
  np.testing.assert_allclose(one[0].logp, two[0].logp, rtol=1e-5, atol=1e-5)


def test_sequences_beyond_the_positions_are_refused(built):
  small = built._replace(
    model=built.model.__class__(**{**vars(built.model), 'positions': 20})
  )
  with pytest.raises(ValueError, match='sampler.length = 16 exceed .* 20'):
    build.problems(small, 'train')


def test_golden(whole):
  """The loss of the last update is the one of the past."""
  assert rows(whole[0])['update'][-1]['loss'] == pytest.approx(0.0185439, rel=1e-3)
