"""Interrupted runs: they resume to the bit, or stop and say why."""

import os
import signal

import jax
import numpy as np
import pytest
from tiny_run import (
  INNER,
  fail_at,
  fail_sft_at,
  health_lines,
  interrupt,
  poison,
  rows,
  run,
  run_sft,
  same,
  same_files,
  same_run,
  saved_steps,
  scored,
  stop_at,
  terminate,
  vary,
  watched,
)

from dmpo_jax import build, checkpoint, data, evaluate, fits, guard, mesh, resume
from dmpo_jax.phases import rl

pytest_plugins = ('tiny_run',)
pytestmark = pytest.mark.usefixtures('plain_saves')


# --- killed


@pytest.mark.parametrize(
  'every, call, kill',
  [
    (1, 5, False),  # in the middle of a buffer, just after a save
    (2, 6, True),  # an update after the checkpoint is done again
    (3, 5, False),  # saved at the end of a buffer
    (4, 3, True),  # nothing saved: from the start
  ],
)
def test_run_resumes_to_the_bit(every, call, kill, built, base_params, whole, tmp_path):
  """Stops before an update; `kill` loses the numbers that are still pending."""
  part = vary(built, checkpoint={'every': every})
  with pytest.raises(KeyboardInterrupt):
    run(fail_at(part, call, interrupt), tmp_path, base_params, kill)
  with checkpoint.Manager(tmp_path / 'rl') as manager:
    assert (manager.latest_step() or 0) == (call - 1) // every * every
  same_run(run(part, tmp_path, base_params), tmp_path, whole)


def test_run_resumes_from_sampling(built, base_params, whole, tmp_path):
  """Stops while it samples, after a validation: both are written once."""
  broken = watched(built, stop_at('sample', 2, interrupt))
  with pytest.raises(KeyboardInterrupt):
    run(broken, tmp_path, base_params)
  assert [r['step'] for r in rows(tmp_path)['eval']] == [0, 1]
  same_run(run(built, tmp_path, base_params), tmp_path, whole)


def test_supervised_training_resumes_to_the_bit(built, base_params, tmp_path):
  """Stops before its last step. A finished one is only read."""
  broken, calls = fail_sft_at(built, 3, interrupt)
  with pytest.raises(KeyboardInterrupt):
    run_sft(broken, tmp_path)
  for _ in range(2):
    calls.clear()
    same(mesh.fetch(run_sft(broken, tmp_path)), mesh.fetch(base_params))
    assert [r['step'] for r in rows(tmp_path)['sft']] == [1, 2, 3]
  assert not calls  # the second time no step was taken


@pytest.mark.parametrize(
  'every, call, kill',
  [
    (1, 2, False),  # one update of the first buffer is done
    (2, 3, True),
    (3, 4, False),  # at the end of a buffer
    (4, 5, True),
    (6, 7, False),
    (8, 9, True),  # before the last update
    (2, 8, True),  # an update after the checkpoint is done again
    (5, 9, False),  # a buffer after it, too
    (100, 5, True),  # nothing saved: from the start
  ],
)
def test_overlap_resumes_to_the_bit(
  every, call, kill, early, base_params, ahead, tmp_path
):
  """The policy that sampled the buffer ahead is gone; the buffer is saved."""
  part = vary(early, checkpoint={'every': every})
  with pytest.raises(KeyboardInterrupt):
    run(fail_at(part, call, interrupt), tmp_path, base_params, kill)
  same_run(run(part, tmp_path, base_params), tmp_path, ahead)


@pytest.mark.parametrize(
  'name, call', [('sample', 3), ('score', 2), ('reward', 8 * 2 + 3), ('pack', 3)]
)
def test_overlap_resumes_from_the_buffer_ahead(
  name, call, early, base_params, ahead, tmp_path
):
  """Stops while the buffer ahead is sampled, scored, graded or packed."""
  part = vary(early, checkpoint={'every': 2})
  with pytest.raises(KeyboardInterrupt):
    run(watched(part, stop_at(name, call, interrupt)), tmp_path, base_params, kill=True)
  same_run(run(part, tmp_path, base_params), tmp_path, ahead)


def test_buffer_ahead_with_longer_prompts_resumes(early, base_params, tmp_path):
  """data.bucket: each buffer is read in its own shape; the longest compiles first."""
  problems = build.problems(early, 'train')
  count, width = problems.tokens.shape
  valid = np.pad(problems.valid, ((0, 0), (4, 0)))
  valid[data.indices_at(1, 2, count, 0), 0] = True  # those of iteration 1
  longer = problems._replace(
    tokens=np.pad(problems.tokens, ((0, 0), (4, 0)), constant_values=9), valid=valid
  )
  part = vary(
    early, data={'bucket': 1}, checkpoint={'every': 2}, train={'iterations': 2}
  )
  part = part._replace(encoded={**part.encoded, 'train': longer})
  widths = []

  def watch(name, args):
    if name == 'update':
      widths.append(args[2].tokens.shape[1])

  once = run(watched(part, watch), tmp_path / 'once', base_params)
  assert fits.prompts_of(part)[0] == width + 4
  assert widths == [width + 16] * INNER + [width + 4 + 16] * INNER
  with pytest.raises(KeyboardInterrupt):
    run(fail_at(part, 3, interrupt), tmp_path / 'twice', base_params)
  same(run(part, tmp_path / 'twice', base_params), once)
  same_files(tmp_path / 'twice', tmp_path / 'once')


# --- asked to stop


@pytest.mark.parametrize(
  'name, call, saved',
  [
    ('update', 2, 2),  # within a buffer
    ('update', 3, 3),  # at the end of one: the next start validates
    ('reward', 30 + 3, 4),  # while a buffer is graded: after its first update
    ('update', 6, 6),  # the last one
    ('reward', 38 + 3, 6),  # in the last validation: nothing is left to save
  ],
)
def test_sigterm_saves_and_resumes_to_the_bit(
  name, call, saved, built, base_params, whole, tmp_path
):
  """Exits with 75, restores the signal handler; the next start resumes."""
  before, watch = signal.getsignal(signal.SIGTERM), stop_at(name, call, terminate)
  part = vary(built, checkpoint={'every': 100})
  with pytest.raises(SystemExit) as info:
    run(watched(part, watch), tmp_path, base_params)
  assert info.value.code == guard.PREEMPTED == 75
  assert signal.getsignal(signal.SIGTERM) is before
  assert saved_steps(tmp_path) == [saved]
  assert watch.calls.count('update') == saved
  same_run(run(part, tmp_path, base_params), tmp_path, whole)


def test_sigterm_before_the_best_validation(built, base_params, tmp_path, monkeypatch):
  """The next start validates the checkpoint, and knows that it is the best."""
  monkeypatch.setattr(evaluate, 'accuracy', scored(0.1, 0.2))
  with pytest.raises(SystemExit, match='75'):
    run(fail_at(built, 6, terminate), tmp_path, base_params)
  assert resume.best_validation(tmp_path, INNER, 6) == (3, 0.2)
  monkeypatch.setattr(evaluate, 'accuracy', scored(0.9))
  final = run(built, tmp_path, base_params)
  assert resume.best_validation(tmp_path, INNER, 6) == (6, 0.9)
  same(mesh.fetch(resume.latest(built, tmp_path, base_params, best=True)), final)


def test_sigterm_with_overlap(early, base_params, ahead, tmp_path):
  """The buffer that is sampled ahead is graded and saved, too."""
  with pytest.raises(SystemExit, match='75'):
    run(fail_at(early, 4, terminate), tmp_path, base_params)
  assert saved_steps(tmp_path) == [4]
  same_run(run(early, tmp_path, base_params), tmp_path, ahead)


def test_sigterm_in_supervised_training(built, base_params, tmp_path):
  """It saves and resumes; what is judged meanwhile is refused, and never trained."""
  broken, calls = fail_sft_at(vary(built, checkpoint={'every': 100}), 2, terminate)
  with pytest.raises(SystemExit, match='75'):
    run_sft(broken, tmp_path)
  with pytest.raises(ValueError, match='2 of sft.steps = 3 updates'):
    resume.base_of(broken, tmp_path)
  params = run_sft(broken, tmp_path)
  assert len(calls) == 3
  same(mesh.fetch(params), mesh.fetch(base_params))
  same(mesh.fetch(resume.base_of(broken, tmp_path)), mesh.fetch(base_params))
  assert len(calls) == 3
  fresh = resume.base_of(broken, '')  # no run: the model as it is read
  same(mesh.fetch(fresh), mesh.fetch(built.steps.init()))


def ctrl_c(batch=None):
  os.kill(os.getpid(), signal.SIGINT)
  return batch


def test_ctrl_c_saves_and_resumes_to_the_bit(
  built, base_params, whole, tmp_path, capfd
):
  """As SIGTERM does, with the exit code of Ctrl-C."""
  part = vary(built, checkpoint={'every': 100})
  with pytest.raises(SystemExit, match='130'):
    run(fail_at(part, 4, ctrl_c), tmp_path, base_params)
  assert saved_steps(tmp_path)[-1] == 4
  same_run(run(part, tmp_path, base_params), tmp_path, whole)


def test_signal_during_a_validation_saves_at_once(
  built, base_params, whole, tmp_path, monkeypatch
):
  """It does not wait for the other problems; the next start validates."""
  real, calls = evaluate.accuracy, []

  def accuracy(part, params, problems, beat):
    calls.append(0)

    def stopped():
      if len(calls) == 2:
        terminate()
      beat()
      assert len(calls) != 2, 'went on to the next problem'

    return real(part, params, problems, stopped)

  monkeypatch.setattr(evaluate, 'accuracy', accuracy)
  part = vary(built, checkpoint={'every': 100})
  with pytest.raises(SystemExit, match='75'):
    run(part, tmp_path, base_params)
  assert saved_steps(tmp_path)[-1] == INNER
  same_run(run(part, tmp_path, base_params), tmp_path, whole)


def test_weights_that_were_swapped_are_refused(built, base_params, tmp_path):
  """Those that a field names are digested; a resumed run and an evaluation look."""
  part = built._replace(read={'model.checkpoint': 1, 'reference.of': 2})
  with pytest.raises(KeyboardInterrupt):
    run(fail_at(part, 3, interrupt), tmp_path, base_params)
  run_sft(part, tmp_path / 'base')
  for name in part.read:
    other = built._replace(read=part.read | {name: 3})
    for call in (
      lambda other=other: run(other, tmp_path, base_params),
      lambda other=other: resume.latest(other, tmp_path, base_params),
      lambda other=other: run_sft(other, tmp_path / 'base'),
      lambda other=other: resume.base_of(other, tmp_path / 'base'),
    ):
      with pytest.raises(ValueError, match=f'{name} = .*not those.*--workdir'):
        call()
  run(part, tmp_path, base_params)


# --- numbers that are not finite


@pytest.mark.parametrize('name, every', [('built', 1), ('early', 1), ('early', 100)])
def test_poisoned_update_stops_the_run(
  name, every, base_params, tmp_path, request, whole, ahead
):
  """The error names the update and the field; its batch is kept, and the last
  checkpoint is intact: without the poison the run ends as the whole one."""
  part = vary(request.getfixturevalue(name), checkpoint={'every': every})
  with pytest.raises(FloatingPointError, match='update 5:.*optim.lr') as info:
    run(fail_at(part, 5, poison), tmp_path, base_params)
  path = tmp_path / 'failed' / 'update_5.npz'
  assert str(path) in str(info.value)
  with np.load(path) as failed:
    assert failed['row'].tolist() == list(range(8, 16))
    assert set(failed) >= {'tokens', 'row', 'weight', 'own/target', 'norm', 'total'}
  assert saved_steps(tmp_path)[-1:] == ([4] if every == 1 else [])
  same_run(
    run(part, tmp_path, base_params), tmp_path, whole if name == 'built' else ahead
  )


def test_poisoned_update_with_health_stop(built, base_params, tmp_path, capsys):
  """Exits with 77 and a line in health.jsonl."""
  part = vary(built, health={'action': 'stop'})
  with pytest.raises(SystemExit, match='77'):
    run(fail_at(part, 5, poison), tmp_path, base_params)
  assert 'update 5: loss nan' in capsys.readouterr().err
  assert health_lines(tmp_path) == [
    {'iteration': 1, 'rule': 'finite', 'values': ['nan', 'nan'], 'action': 'stop'}
  ]


def test_poisoned_supervised_step_stops_the_run(built, tmp_path):
  """Supervised training stops in the same way, a step later, not at a save."""
  calls = []

  def step(state, *args):
    calls.append(0)
    state, numbers = built.steps.sft(state, *args)
    return state, {**numbers, 'finite': float(len(calls) > 1)}

  broken = vary(built, checkpoint={'every': 100})
  broken = broken._replace(steps=built.steps._replace(sft=step))
  with pytest.raises(FloatingPointError, match='sft update 1: .*sft.lr'):
    run_sft(broken, tmp_path)
  assert len(calls) == 2


def test_reward_that_is_not_finite_is_an_error(built, base_params, tmp_path):
  task = built.task._replace(reward=lambda *_: {'broken': float('nan')})
  with pytest.raises(ValueError, match="'broken': nan.*not finite"):
    run(vary(built, eval={'every': 0})._replace(task=task), tmp_path, base_params)


# --- an unhealthy policy


def collapsing(built, after=2 * INNER, **health):
  """Returns six iterations whose policy leaves the reference in the third.

  From an update on, parameters move a hundred times as far.
  """

  def update(state, frozen, batch, inner):
    far = int(state.step) >= after
    before = jax.tree.map(np.array, mesh.fetch(state.trainable)) if far else None
    state, numbers = built.steps.update(state, frozen, batch, inner)
    if far:
      put = lambda old, new: mesh.put(old + 100 * (np.asarray(new) - old), new.sharding)
      state = state._replace(trainable=jax.tree.map(put, before, state.trainable))
    return state, numbers

  part = built._replace(steps=built.steps._replace(update=update))
  return vary(part, train={'iterations': 6}, health=dict(patience=2, kl=5.0, **health))


def test_unhealthy_run_stops(built, base_params, tmp_path, monkeypatch, capsys):
  """It is saved, and exits with 77, a sentence and a line; so does the next start.
  The best is that of before. With another action the run goes on."""
  accuracies = scored(0.1, 0.2, 0.3, 0.2, 0.1)  # none for the unhealthy buffer
  monkeypatch.setattr(evaluate, 'accuracy', accuracies)
  part = vary(collapsing(built, action='stop'), checkpoint={'every': 100})
  watch = stop_at('', 0, None)
  for _ in range(2):
    with pytest.raises(SystemExit) as info:
      run(watched(part, watch), tmp_path, base_params)
    assert info.value.code == guard.COLLAPSED == 77
    assert 'error: iteration 4: kl_ref is above health.kl' in capsys.readouterr().err
    assert watch.calls.count('update') == 15  # none at the second start
    (line,) = health_lines(tmp_path)
    assert (line['action'], line['rule'], line['iteration']) == ('stop', 'kl', 4)
    assert len(line['values']) == 2 and min(line['values']) > 5
    assert saved_steps(tmp_path) == [6, 15]  # the best, and all until now
  monkeypatch.setattr(evaluate, 'accuracy', scored(0.1, 0.1))
  run(vary(part, health={'action': 'none'}), tmp_path, base_params)
  assert rows(tmp_path)['rl'][-1]['step'] == 5


def test_unhealthy_run_warns_once(built, base_params, tmp_path, monkeypatch):
  """A resumed run does not repeat it; the metric counts the broken rules."""
  warnings = []
  monkeypatch.setattr(
    rl.logging, 'warning', lambda text, *args: warnings.append(text % args)
  )
  part = vary(collapsing(built, action='warn'), eval={'every': 0})
  once = run(part, tmp_path / 'once', base_params)
  (line,) = health_lines(tmp_path / 'once')
  assert (line['iteration'], line['action']) == (4, 'warn')
  (text,) = [text for text in warnings if 'health' in text]  # Orbax has its own
  assert text.startswith('iteration 4: kl_ref is above health.kl')
  assert [r['ill'] for r in rows(tmp_path / 'once')['rl']] == [0] * 4 + [1] * 2
  with pytest.raises(KeyboardInterrupt):
    run(fail_at(part, 17, interrupt), tmp_path / 'twice', base_params, kill=True)
  same(run(part, tmp_path / 'twice', base_params), once)
  same_files(tmp_path / 'twice', tmp_path / 'once')
  assert health_lines(tmp_path / 'twice') == [line]


def test_health_names_the_buffer_of_its_numbers(built, base_params, tmp_path):
  """With overlap that buffer is graded before the updates of the one before end."""
  part = collapsing(built, action='warn')
  run(vary(part, eval={'every': 0}, train={'overlap': True}), tmp_path, base_params)
  (line,) = health_lines(tmp_path)
  ill = [row for row in rows(tmp_path)['rl'] if row['ill']]
  assert line['iteration'] == ill[0]['step']
  assert line['values'][-1] == pytest.approx(ill[0]['kl_ref'])
