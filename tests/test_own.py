"""Tasks, reward functions and data sets of a user: by path, by column and by name.

The files of the tests are those of docs/own.md, so that its pages run.
"""

import csv
import dataclasses
import functools
import http.server
import json
import os
import pathlib
import re
import shlex
import sys
import threading
import types as python_types

import pyarrow
import pytest
from pyarrow import parquet
from test_processes import free_port, python
from tiny_run import fail_at, interrupt, run, same, tiny, vary

from configs import base
from dmpo_jax import (
  build,
  check,
  cli,
  config,
  data,
  evaluate,
  grader,
  parts,
  resume,
  types,
)
from dmpo_jax.tasks import (
  CHOICES,
  TASKS,
  datasets,
  find,
  gym,
  prompts,
  rewards,
  userfile,
)
from dmpo_jax.tools import cards

pytest_plugins = ['tiny_run']
ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / 'docs/own.md').read_text()
BLOCKS = {
  code.splitlines()[0].removeprefix('# '): code
  for code in re.findall(r'```python\n(.*?)```', PAGE, re.S)
}
COMMANDS = [
  line
  for block in re.findall(r'```bash\n(.*?)```', PAGE, re.S)
  for line in block.splitlines()
  if line.startswith('python main.py')
]
OPTIONS = types.TaskOptions(train_size=20, validation_size=3, test_size=6)
TEXTS = ['one', 'two 2', 'three m', 'x']


@pytest.fixture
def here(tmp_path, monkeypatch):
  """A folder with the files of the page, in which commands run."""
  for name, code in BLOCKS.items():
    (tmp_path / name).write_text(code)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [*sys.path])
  return tmp_path


def functions(text, seconds=60.0, process='trainer'):
  return rewards.Functions(text, seconds, process)


def write(path, code):
  path.write_text(code)
  return path


# --- the page


def test_the_commands_of_the_page_are_right(here, monkeypatch):
  """Each config passes the check; the packages that it needs are stood in for."""
  monkeypatch.setitem(sys.modules, gym.PACKAGE, python_types.ModuleType('gym'))
  monkeypatch.setattr(gym.symbolic._state, 'modules', [gym.PACKAGE])
  factory = python_types.ModuleType('factory')
  factory.DATASETS = {'chain_sum': None}
  monkeypatch.setitem(sys.modules, f'{gym.PACKAGE}.factory', factory)
  seen = set()
  assert len(COMMANDS) > 6
  for line in COMMANDS:
    words = shlex.split(line)[2:]
    fields = [word for word in words if word.startswith('--config.')]
    flags = dict(w[2:].split('=', 1) for w in words if w not in fields)
    assert flags.keys() <= {'config', 'mode', 'task', 'generations'}
    if 'task' in flags:
      assert find(flags['task']).terms == ('letters', 'length')
    if 'config' in flags:
      _, c = config.load(str(ROOT / flags['config']))
      config.override(c, fields)
      c.model.checkpoint = ''
      check.config(c, c.mesh.fsdp * c.mesh.tensor)
      seen |= {word.split('=')[0] for word in fields}
  assert {'--config.data.task', '--config.reward.file', '--config.data.path'} <= seen


def test_the_files_of_the_page_run(here, monkeypatch):
  """The task, the functions, the network, and a service that fails once."""
  asked = []

  class Service(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
      asked.append(body)
      self.send_response(200 if len(asked) > 1 else 503)
      self.end_headers()
      scores = [len(text) for text in body['completions']]
      self.wfile.write(json.dumps({'scores': scores}).encode())

    def log_message(self, *_):
      pass

  with http.server.HTTPServer(('localhost', 0), Service) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://localhost:{server.server_port}/score'
    monkeypatch.setenv('JUDGE_URL', url)
    text = 'my_reward.py:has_unit,short,my_verifier.py:Verifier,my_service.py:judge'
    assert [*rewards.specs(text)] == ['has_unit', 'short', 'Verifier', 'judge']
    ids = [[1] * n for n in range(4)]
    said = functions(text)(['p'] * 4, TEXTS, {'word': ['w'] * 4}, ids)
    server.shutdown()
  assert [row['has_unit'] for row in said] == [1, 0, 1, 1]
  assert [row['short'] for row in said] == [0, -0.01, -0.02, -0.03]
  assert [row['judge'] for row in said] == [3, 5, 7, 1] and len(asked) == 2
  assert asked[1] == {'prompts': ['p'] * 4, 'completions': TEXTS}
  assert all(0 < row['Verifier'] < 1 for row in said)
  task = find('my_task.py:REVERSE')
  assert task is find('my_task.py:REVERSE')  # imported once
  loaded = {split: task.load(split, OPTIONS) for split in datasets.SPLITS}
  words = [e['word'] for examples in loaded.values() for e in examples]
  assert len(set(words)) == len(words) == 29
  short = dataclasses.replace(OPTIONS, options='longest=3', train_size=9)
  assert max(len(e['word']) for e in task.load('train', short)) == 3
  example = {'word': 'abc'}
  assert task.target(example, 'bare') == 'cba'
  assert task.reward('cba', example, 'strict') == {'letters': 1, 'length': 0.1}
  assert task.grade('cba', example, 'paper') == 1 and not task.extra('', example)
  assert task.recall(*task.record(example)) == example


# --- config


@pytest.fixture
def choose(here):
  """Returns a function: fields of the command line -> the checked config."""

  def make(*fields):
    c = base.get_config()
    given = config.override(c, [f'--config.{field}' for field in fields])
    check.effects(c, given)
    check.config(c, 1)
    return c

  return make


def test_terms_and_functions_have_weights(choose):
  c = choose(
    'reward.weights.short=0.5',
    'reward.weights.letters=0',
    'reward.file=my_reward.py:short',
    'data.task=my_task.py:REVERSE',
  )
  weights = dict(c.reward.weights)
  assert (weights['short'], weights['letters'], weights['length']) == (0.5, 0, 1)
  assert not config.misfits(c)
  again = base.get_config()  # by a sweep or a config file, and back
  config.update(
    again, {'reward.file': 'my_reward.py:short', 'reward.weights.short': 2.0}
  )
  config.update(again, {'reward.file': ''})
  with pytest.raises(ValueError, match='reward.weights.short is not a field'):
    check.config(again, 1)
  config.update(
    again, {'reward.file': 'my_reward.py:short', 'reward.weights.short': 1.0}
  )
  config.update(again, {'reward.file': ''})
  assert again.reward.weights == base.get_config().reward.weights


WRONG = {  # fields -> what the sentence names
  'data.task=my_taks.py:REVERSE': 'data.task.*no such file my_taks.py',
  'data.task=my_task.py': 'FILE.py:NAME',
  'data.task=my_task.py:REVERS': "does not define REVERS.*'REVERSE'",
  'data.task=my_task.py:STYLES': 'must be a dmpo_jax.types.Task',
  'data.task=fails.py:T reward.weights.x=1': 'fails.py:3: KeyError',
  'data.task=sudoko': "did you mean 'sudoku'",
  'data.task=prompts:numbr': "did you mean 'prompts:number'",
  'data.task=prompts': 'no verifier: set reward.file',
  'data.options=a': 'data.options',
  'data.options=a=1': 'without effect.*data.task',
  'data.prompt_column=x': 'data.prompt_column.*prompts',
  'reward.grade=short': 'reward.grade.*needs reward.file',
  'reward.file=my_reward.py:shrt': "does not define shrt.*'short'",
  'reward.file=short': 'FILE.py:NAME',
  'reward.file=my_reward.py:short,my_reward.py:short': 'two functions short',
  'reward.file=my_reward.py:short reward.grade=shrt': "reward.grade.*'short'",
  'reward.file=my_reward.py:short reward.weights.shrt=1': 'reward.weights.shrt.*short',
  'reward.file=my_reward.py:short reward.task=False reward.weights.sudoku=2': (
    'reward.weights.sudoku.*reward.task'
  ),
  'reward.file=my_reward.py:short reward.seconds=0': 'reward.seconds',
  'reward.file=own_sudoku.py:sudoku': 'sudoku is a term.*rename',
  'reward.file=broken.py:f': 'broken.py:2',
  'data.task=fails.py:T': 'fails.py:3: KeyError',
  'data.task=my_task.py:REVERSE data.style=eval': 'data.style',
}


@pytest.mark.parametrize('fields', WRONG)
def test_wrong_fields_are_named(fields, choose, here):
  write(here / 'own_sudoku.py', 'def sudoku(completions): return []\n')
  write(here / 'broken.py', 'x = 1\ndef f(:\n')
  write(here / 'fails.py', 'T = 0\n\n{}[0]\n')
  with pytest.raises(ValueError, match=f'(?s){WRONG[fields]}'):
    choose(*fields.split())


def test_a_changed_file_is_imported_again_and_seen_at_resume(here, built):
  """Comments do not count; training is refused, an evaluation only warned."""
  spec = 'my_reward.py:short'
  before, value = userfile.digest('', spec), userfile.load('', spec)
  text = (here / 'my_reward.py').read_text()
  write(here / 'my_reward.py', f'# a comment\n{text}\n\n')
  assert userfile.digest('', spec) == before
  c = base.get_config()
  config.update(c, {'reward.file': spec, 'data.task': 'my_task.py:REVERSE'})
  read = parts.file_digests(c)
  assert set(read) == {'reward.file short', 'data.task'}
  assert set(parts.revisions(c)) == {f'{field} (digest)' for field in read}
  write(here / 'my_reward.py', text.replace('100', '10'))
  assert userfile.load('', spec) is not value
  changed = built._replace(read=parts.file_digests(c), config=c)
  with pytest.raises(ValueError, match='reward.file short.*changed.*--workdir'):
    resume.refuse_swapped(changed, {'read': read})
  resume.refuse_swapped(changed, {'read': read}, judging=True)


# --- what a function may return

LIST = 'def f(completions):\n  return '
ANSWERS = {  # the body -> rewards of four rows, or what the sentence names
  '[1, 2.5, True, None]': [1, 2.5, 1, None],
  "__import__('numpy').arange(4)": [0, 1, 2, 3],
  "list(__import__('numpy').arange(4.0))": [0, 1, 2, 3],
  'tuple(map(len, completions))': [3, 5, 7, 1],
  '1.0': 'list of 4 numbers.*float',
  'None': 'list of 4 numbers.*NoneType',
  '{}': 'list of 4 numbers.*dict',
  '[1]': '1 rewards of 4',
  "[0, 0, 'a', 0]": "row 2.*'a' must be a number",
  '[0, 0, 0, [1]]': 'row 3.*must be a number',
  "[0, float('nan'), 0, 0]": 'row 1.*nan is not finite',
  '[1 / (len(x) - 7) for x in completions]': r'row 2: \S*f.py:2: ZeroDivisionError',
  '[0] * 4 if len(completions) == 1 else {}[0]': r'f.py:2: KeyError.*4 rows at once',
  '{}[0] if len(completions) == 1 else 1 / 0': r'ZeroDivisionError.*4 rows at once',
}


@pytest.mark.parametrize('body', ANSWERS)
def test_answers_of_a_function(body, here):
  path, expected = write(here / 'f.py', LIST + body + '\n'), ANSWERS[body]
  call = functools.partial(functions(f'{path}:f'), ['p'] * 4, TEXTS, {})
  rewards._made.clear()
  if isinstance(expected, str):
    with pytest.raises(ValueError, match=f'(?s)reward.file = \\S*f.py:f.*{expected}'):
      call()
  else:
    assert [row['f'] for row in call()] == expected


def test_arguments_of_a_function(here):
  """Those that it names; a column that is not there is named with those that are."""
  write(here / 'g.py', 'async def f(completions, word, completion_ids=0):\n'
    '  return [w == c and completion_ids is None for w, c in zip(word, completions)]\n'
    'def missing(completions, answer): return []\n')  # fmt: skip
  columns = rewards.columns_of([{'word': 'x'}, {'word': 'y', 'prompts': 1}, {}])
  assert columns == {'word': ['x', 'y', None]}
  said = functions('g.py:f')(['p'] * 3, ['x', 'x', ''], columns)
  assert [row['f'] for row in said] == [1, 0, 0]
  with pytest.raises(ValueError, match='takes answer; there are word, prompts'):
    functions('g.py:missing')(['p'] * 3, ['x'] * 3, columns)


def test_a_worker_keeps_its_state_and_is_killed_at_its_limit(here):
  """State is made once; a call without end ends, and the next one is answered."""
  write(here / 'w.py', 'import os, time\nclass Rate:\n'
    '  def __init__(self): self.calls = 0\n'
    '  def __call__(self, completions):\n'
    "    while 'forever' in completions: time.sleep(0.1)\n"
    "    if 'die' in completions: os._exit(3)\n"
    '    self.calls += 1\n'
    "    assert os.environ['JAX_PLATFORMS'] == 'cpu'\n"
    '    return [self.calls, os.getpid()]\n')  # fmt: skip
  rate = functions('w.py:Rate', process='worker')
  first, second = (rate(['p'] * 2, ['a', 'b'], {}) for _ in range(2))
  assert [x['Rate'] for x in (first[0], second[0])] == [1, 2]
  assert first[1] == second[1] != {'Rate': float(os.getpid())}
  rate.seconds = 0.5
  with pytest.raises(ValueError, match='w.py:Rate.*0.5 seconds.*reward.seconds'):
    rate(['p'] * 2, ['a', 'forever'], {})
  rate.seconds = 60.0
  assert rate(['p'] * 2, ['a', 'b'], {})[0] == {'Rate': 1}  # another process
  with pytest.raises(ValueError, match='w.py:Rate.*its process has ended'):
    rate(['p'] * 2, ['a', 'die'], {})
  with pytest.raises(ValueError, match='0.5 seconds'):  # a thread cannot be killed
    functions('w.py:Rate', 0.5)(['p'] * 2, ['a', 'forever'], {})
  write(here / 'bad.py', 'import nothing_here\ndef f(completions): return []\n')
  for process in ('worker', 'trainer'):
    with pytest.raises(ValueError, match='bad.py:1: ModuleNotFoundError'):
      functions('bad.py:f', process=process).ready()


# --- grading


def test_terms_of_task_and_functions_are_summed(here):
  """A row that a function does not judge gets nothing from it; grades may be its."""
  write(here / 'h.py',
    'def some(completions): return [None, 2, 4][:len(completions)]\n')  # fmt: skip
  c = base.get_config()
  grid = '1234341221434321'
  examples = [{'puzzle': '0' + grid[1:], 'solution': grid}] * 3
  texts = [grid, '2' + grid[1:], grid]
  judge = lambda: grader.judge(
    grader.bound(grader.task_of(c), str, examples), 'strict', texts, examples,
    c.reward.weights,
  )  # fmt: skip
  config.update(c, {'reward.file': 'h.py:some', 'reward.weights.some': 0.25})
  graded = judge()
  assert graded.reward.tolist() == [1, 0.5, 2] and graded.grades == [1, 0, 1]
  assert grader.means(graded.terms) == {'sudoku': pytest.approx(2 / 3), 'some': 3}
  config.update(c, {'reward.task': False, 'reward.grade': 'some'})
  graded = judge()
  assert graded.reward.tolist() == [0, 0.5, 1] and graded.grades == [0, 1, 1]
  path = here / 'saved.json'
  saved = [
    dict(question='0' + grid[1:], generations=t, ground_truth=grid) for t in texts
  ]
  path.write_text(json.dumps({'generations': saved}))
  made = cards.score_file(
    'sudoku', 'strict', str(path), c.reward.weights, grader.task_of(c)
  )
  assert made['accuracy'] == pytest.approx(2 / 3) and made['terms'] == {'some': 3}


BAD_TASKS = {
  'reward=lambda *_: {}[0]': r'row 0: data.task: \S*bad_task.py:5: KeyError',
  'reward=lambda *_: 1.0': 'row 0: .*dict',
  "reward=lambda *_: {'a': 'b'}": "row 0: a = 'b'",
  "reward=lambda *_: {'a': float('inf')}": 'not finite',
  'grade=lambda *_: 2': 'row 0: the grade 2',
  'grade=lambda *_: None': 'row 0: grade = None',
  'load=lambda *_: [1]': 'problem 0 of train',
  'load=lambda *_: [{1, 2}]': 'problem 0 of train',
  'load=lambda *_: []': 'data set is empty',
  "load=lambda *_: open('/nothing')": 'bad_task.py:5: FileNotFoundError',
  'prompt=lambda *_: 3': 'the prompt of problem 0 of train',
}


@pytest.mark.parametrize('change', BAD_TASKS)
def test_what_a_task_returns_is_checked(change, here):
  write(here / 'bad_task.py', 'from dmpo_jax import types\nimport my_task\n'
    'load, prompt, target = my_task.load, my_task.prompt, my_task.target\n'
    'T = my_task.REVERSE\n'
    f'T = T._replace({change})\n')  # fmt: skip
  with pytest.raises(ValueError, match=BAD_TASKS[change]):
    task = find('bad_task.py:T')
    how = data.PromptOptions()
    loaded = data.load_problems(task, 'train', data.char_tokenizer(), OPTIONS, how)
    grader.judge(task, 'strict', ['a'], loaded.examples[:1], {})


# --- a run

COUNTING = """
import json


def count(prompts, completions, completion_ids, puzzle):
  assert len(completions) == len(puzzle) == len(completion_ids)
  assert all(p.strip() for p in prompts)
  with open({log!r}, 'a') as file:
    file.write(json.dumps([len(completions), prompts[0] == puzzle[0]]) + '\\n')
  return [sum(map(str.isalpha, text)) / 16 for text in completions]
"""


def test_a_resumed_run_grades_no_buffer_twice(
  built, base_params, here, tmp_path_factory, plain_saves
):
  """Killed inside a buffer, it comes to the same bits and calls the function as often
  as a run without a stop, but for nothing that a checkpoint holds."""
  log = here / 'calls.jsonl'
  write(here / 'counting.py', COUNTING.format(log=str(log)))
  c = vary(built).config
  config.update(c, {'reward.file': 'counting.py:count', 'reward.task': False})
  mine = built._replace(
    config=c, task=grader.task_of(c), read={**built.read, **parts.file_digests(c)}
  )
  folders = [tmp_path_factory.mktemp(name) for name in ('whole', 'stopped')]
  whole = run(mine, folders[0], base_params)
  calls = log.read_text()
  assert {n for n, _ in map(json.loads, calls.splitlines())} == {8, 11}
  assert all(right for _, right in map(json.loads, calls.splitlines()))
  log.write_text('')
  with pytest.raises(KeyboardInterrupt):
    run(fail_at(mine, 2, interrupt), folders[1], base_params)
  begun = log.read_text().count('\n')
  same(run(mine, folders[1], base_params), whole)
  assert begun == 2 and log.read_text() == calls  # the buffer, validation before it
  metrics_ = [json.loads(x) for x in (folders[1] / 'metrics.jsonl').open()]
  assert [r['reward'] for r in metrics_ if r['phase'] == 'rl'] == [
    r['reward/count'] for r in metrics_ if r['phase'] == 'rl'
  ]
  accuracy, _ = evaluate.accuracy(mine, base_params, build.problems(mine, 'validation'))
  assert accuracy['reward'] > 0
  write(here / 'counting.py', COUNTING.format(log=str(log)).replace('16', '8'))
  changed = mine._replace(read={**built.read, **parts.file_digests(c)})
  with pytest.raises(ValueError, match='reward.file count.*changed'):
    run(changed, folders[1], base_params)


PROCESSES = """
import sys
import jax
from configs import base
from dmpo_jax import config, grader, guard

guard.join(sys.argv[1], 2, int(sys.argv[2]))
me = jax.process_index()
c = base.get_config()
config.update(c, {'data.task': 'my_task.py:REVERSE', 'reward.file': 'log.py:f'})
words = [{'word': w} for w in ('ab', 'ba', 'aa', 'bb', 'ab')]
mine = [1, 3] if me else [0, 2, 4]
task = grader.bound(grader.task_of(c), lambda e: e['word'], words, [[1]] * 5)
texts, own = ['ba'] * len(mine), [words[i] for i in mine]
graded = grader.judge(task, 'strict', texts, own, {}, mine)
assert [t['f'] for t in graded.terms] == [0, 1, 2, 3, 4], graded
assert graded.grades == [1, 0, 0, 0, 1]
bad = task._replace(grade=lambda *_: 2 if me else 1)
for wrong, named in ((bad, 'row 1: the grade 2'), (task, 'called twice')):
  try:
    grader.judge(wrong, 'strict', texts, own, {}, mine)
    raise AssertionError
  except ValueError as error:  # on both, so that neither waits for the other
    assert named in str(error), error
print('both', flush=True)
"""
LOGGED = """
calls = []


def f(prompts, completions, completion_ids, word):
  assert prompts == word == ['ab', 'ba', 'aa', 'bb', 'ab']
  assert not calls, 'called twice'
  calls.append(len(completions))
  return list(range(len(completions)))
"""


@pytest.mark.slow
def test_two_processes_call_a_function_once(here):
  """It sees all rows, in order; an error on one process ends both."""
  write(here / 'log.py', LOGGED)
  path, port = write(here / 'two.py', PROCESSES), free_port()
  logs = [here / f'{i}.txt' for i in (0, 1)]
  started = [
    python(path, [f'localhost:{port}', str(i)], 1, log) for i, log in enumerate(logs)
  ]
  for process, log in zip(started, logs, strict=True):
    process.wait(timeout=120)
    assert 'both' in log.read_text(), log.read_text()[-2000:]


@pytest.mark.slow
def test_a_task_by_path_works_in_every_mode(here, monkeypatch, capsys):
  """Train with a sweep's point, evaluate, sample, score: the commands of the page."""
  c = tiny()
  c.sft.steps, c.train.iterations = 0, 1
  fields = {k: v for k, v in check.flatten(c).items() if not k.startswith('reward.')}
  write(here / 'mine.py', 'from configs import base\nfrom dmpo_jax import config\n'
    'SWEEPS = ("seeds",)\n'
    'def sweep(name): return [{"seed": s} for s in (0, 1)]\n'
    'def get_config():\n  c = base.get_config()\n'
    f'  config.update(c, {fields})\n'
    '  config.update(c, {"data.task": "my_task.py:REVERSE"})\n'
    '  config.update(c, {"reward.weights.length": 0.5})\n'
    '  return c\n')  # fmt: skip
  command = functools.partial(run_cli, monkeypatch, '--config=mine.py', '--workdir=w')
  more = ['--sweep=seeds:1', '--config.reward.file=my_reward.py:short']
  command(*more)
  command(*more, '--mode=eval')
  command(*more, '--mode=sample')
  assert 'grade' in capsys.readouterr().out
  saved = next(here.glob('w/eval-*/*_generations.json'))
  assert saved.name.startswith('my_task.py-REVERSE_latest_')
  made = json.loads(next(here.glob('w/eval-*/*.card.json')).read_text())
  run_cli(
    monkeypatch, '--mode=score', '--task=my_task.py:REVERSE', f'--generations={saved}'
  )
  scored = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert scored['accuracy'] == made['accuracy'] and 'short' in made['terms']
  assert scored['terms'] == {x: made['terms'][x] for x in ('letters', 'length')}
  start = json.loads((here / 'w/provenance.json').read_text())[0]
  assert len(start['revisions']) == 2


def run_cli(monkeypatch, *args):
  """Runs a command in this process."""
  from absl import flags
  from absl.testing import flagsaver

  argv = ['main.py', *args]
  monkeypatch.setattr(sys, 'argv', argv)
  with flagsaver.flagsaver():
    flags.FLAGS.unparse_flags()
    cli.main(cli.parse(argv))


# --- any data set as prompts

VERL = [
  {
    'prompt': [{'role': 'system', 'content': 'Add.'}, {'role': 'user', 'content': q}],
    'reward_model': {'style': 'rule', 'ground_truth': a},
    'n': i,
  }
  for i, (q, a) in enumerate([(f'{n} and {n}?', str(2 * n)) for n in range(60)])
]


def test_formats_give_the_same_problems(tmp_path, monkeypatch):
  """JSONL with messages, parquet, CSV, a folder of TFDS, and the hub."""
  flat = [
    {
      'q': f'Add.\n\n{r["prompt"][1]["content"]}',
      'a': r['reward_model']['ground_truth'],
    }
    for r in VERL
  ]
  write(tmp_path / 'x.jsonl', ''.join(json.dumps(row) + '\n' for row in VERL))
  parquet.write_table(pyarrow.Table.from_pylist(flat), tmp_path / 'x.parquet')
  with open(tmp_path / 'x.csv', 'w', newline='') as file:
    rows = csv.DictWriter(file, ['q', 'a'])
    rows.writeheader()
    rows.writerows(flat)
  asked = []
  hub = python_types.ModuleType('datasets')
  hub.get_dataset_split_names = lambda name, subset: ['train']
  hub.load_dataset = lambda name, subset, split: asked.append((name, subset)) or flat
  monkeypatch.setitem(sys.modules, 'datasets', hub)
  task, found = find('prompts:number'), {}
  named = dict(prompt_column='q', answer_column='a')
  cases = {'x.jsonl': {}, 'x.parquet': named, 'x.csv': named, 'acme/sums:main': named}
  for name, columns in cases.items():
    path = str(tmp_path / name) if name[0] == 'x' else name
    o = types.TaskOptions(path, 0, 0, 0, **columns)
    loaded = {split: task.load(split, o) for split in datasets.SPLITS}
    found[name] = [[(e['prompt'], e['answer']) for e in loaded[s]] for s in loaded]
  assert all(x == found['x.jsonl'] for x in found.values())
  assert sum(map(len, found['x.csv'])) == 60 and asked[0] == ('acme/sums', 'main')
  hub.get_dataset_split_names = lambda name, subset: ['train', 'test']
  o = types.TaskOptions('acme/sums', 0, 0, 0, **named)
  with pytest.raises(ValueError, match='training would see the test'):
    task.load('train', o)
  assert len(task.load('test', o)) == 60
  hub.load_dataset = lambda *_, **__: 1 / 0
  with pytest.raises(ValueError, match='acme/sums.*hub.*ZeroDivisionError'):
    task.load('test', o)
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(ValueError, match="pip install 'dmpo_jax\\[hub\\]'"):
    task.load('test', o)


BAD_ROWS = {  # record -> what the sentence names
  '{"q": "x", "answer": 1}': ':1: none of the columns prompt.*data.prompt_column',
  '{"prompt": "x", "a": 1}': ':1: none of the columns answer.*data.answer_column',
  '{"prompt": 3, "answer": 1}': ':1: the prompt must be a text',
  '{"prompt": "", "answer": 1}': ':1: the prompt must be a text',
  '{"prompt": [{"role": "user"}, {"role": "assistant"}], "answer": 1}': 'messages',
  '{"prompt": "x", "answer": [1]}': ':1: the answer must be a text or a number',
  '{"prompt": "x", "answer": "many"}': ":1: the answer 'many' is not one number",
  '{"prompt": "\\ud800", "answer": "1"}': 'half of a character',
}


@pytest.mark.parametrize('row', BAD_ROWS)
def test_bad_rows_name_file_line_and_column(row, tmp_path):
  path = write(tmp_path / 'x.jsonl', row + '\n')
  with pytest.raises(ValueError, match=re.escape(str(path)) + f'.*{BAD_ROWS[row]}'):
    find('prompts:number').load('test', types.TaskOptions(str(path)))


TRUTHS = {
  'number': ['72', 'She has 72.\n#### 72', 7.0, r'It is \boxed{8}.'],
  'math': [r'\frac{1}{2}', r'So it is $\boxed{x+1}$.'],
  'exact': ['The Nile', 'a  b'],
}


@pytest.mark.parametrize('verifier', TRUTHS)
def test_targets_are_right_unless_a_style_is_not_paid(verifier, tmp_path):
  lines = [{'prompt': f'{i}?', 'answer': a} for i, a in enumerate(TRUTHS[verifier])]
  path = write(tmp_path / 'x.jsonl', ''.join(json.dumps(x) + '\n' for x in lines))
  task = find(f'prompts:{verifier}')
  for e in task_read(verifier, path):
    said = task.target(e, 'chat')
    assert '<reasoning>' in said or prompts.gold(verifier, e['answer']) == e['answer']
    assert task.recall(*task.record(e)) == e
    for style in task.styles:
      text, others = task.target(e, style), ('', 'no', '<answer>9</answer>')
      assert task.grade(text, e, 'strict') == 1, (text, e)
      assert task.grade(text, e, 'paper') == (style not in task.unpaid), (text, style)
      assert task.reward(text, e, 'strict') == {'correct': 1}
      assert not any(task.grade(other, e, 'strict') for other in others)


def task_read(verifier, path):
  return list(prompts._read(verifier, types.TaskOptions(), str(path)))


def test_patterns_match_whole_answers(tmp_path):
  task, e = find('prompts:regex'), {'prompt': '?', 'answer': '(?i)par[is]+'}
  assert task.grade('<answer>Paris</answer>', e, 'strict') == 1
  assert task.grade('in Paris', e, 'strict') == 0
  with pytest.raises(ValueError, match='no targets.*pattern'):
    task.target(e, 'bare')
  path = write(tmp_path / 'x.jsonl', '{"prompt": "x", "answer": "(a"}\n')
  with pytest.raises(ValueError, match='x.jsonl:1.*no regular expression'):
    task.load('test', types.TaskOptions(str(path)))


def test_names_of_tasks_are_listed_in_errors():
  with pytest.raises(ValueError, match='--task.*prompts:math.*FILE.py:NAME'):
    find('chess', '--task')
  assert set(TASKS) < set(CHOICES)


# --- published files, and a folder of TFDS

# The first lines of github.com/dllm-reasoning/d1, dataset/.
D1 = {
  'countdown_cd3_test.jsonl': '{"input": "30,100,93", "output": "23"}\n'
  '{"input": "83,18,75", "output": "10"}\n',
  '4x4_test_sudoku.csv': 'Puzzle,Solution\n3102200002100320,3142243142131324\n'
  '0140432014020000,2143432114323214\n',
}


def test_files_of_d1_are_read_as_they_lie(tmp_path):
  for name, text in D1.items():
    write(tmp_path / name, text)
  o = types.TaskOptions(str(tmp_path), 0, 0, 0)
  first = TASKS['countdown'].load('test', o)[0]
  assert (first['numbers'], first['target']) == ([30, 100, 93], 23)
  assert TASKS['sudoku'].load('test', o)[1]['puzzle'] == '0140432014020000'
  with pytest.raises(ValueError, match='one train file.*4x4_sudoku_unique_puzzles.csv'):
    TASKS['sudoku'].load('train', o)
  with pytest.raises(ValueError, match='one train file'):
    TASKS['countdown'].load('train', o)
  grid = '1234341221434321'
  write(
    tmp_path / '4x4_sudoku_unique_puzzles.csv', f'Puzzle,Solution\n0{grid[1:]},{grid}\n'
  )
  own = datasets.files_of(str(tmp_path), 'train', '4x4_sudoku_unique_puzzles.csv')
  assert own == [str(tmp_path / '4x4_sudoku_unique_puzzles.csv')]
  assert len(TASKS['sudoku'].load('train', o)) == 1
  # A file that is named for its split comes first.
  write(tmp_path / 'train.jsonl', '{"nums": [1, 2, 3], "target": 6}\n')
  assert datasets.files_of(str(tmp_path), 'train', own[0])[0].endswith('train.jsonl')
  assert TASKS['countdown'].load('train', o)[0]['target'] == 6


@pytest.mark.slow
def test_a_folder_of_tfds_is_a_data_set(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  from dmpo_jax.tasks import prepared

  rows = {'train': [f'{n}?' for n in range(200)], 'test': ['a?', 'b?']}
  for split, texts in rows.items():
    lines = [json.dumps({'question': q, 'answer': f'#### {len(q)}'}) for q in texts]
    folder = tmp_path / 'downloads/manual/sums'
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f'{split}.jsonl', ''.join(line + '\n' for line in lines))
  source = dataclasses.replace(TASKS['gsm8k'].load.__self__, task='sums')
  builder = prepared.DmpoProblems(
    config=tfds.core.BuilderConfig(name='sums'),
    file_format='array_record',
    data_dir=str(tmp_path),
  )
  builder.source = source
  how = tfds.download.DownloadConfig(manual_dir=str(tmp_path / 'downloads/manual'))
  builder.download_and_prepare(download_config=how)
  o = types.TaskOptions(str(builder.data_dir), 0, 0, 0, prompt_column='example')
  loaded = {split: find('prompts').load(split, o) for split in datasets.SPLITS}
  assert [len(loaded['test']), sum(map(len, loaded.values()))] == [2, 202]
  found = [json.loads(e['prompt']) for e in loaded['test']]
  assert sorted(e['question'] for e in found) == ['a?', 'b?']
  assert {e['answer'] for e in found} == {'#### 2'}
  with pytest.raises(ValueError, match='not a data set of TFDS'):
    write(tmp_path / 'features.json', '{')
    write(tmp_path / 'dataset_info.json', '{')
    find('prompts').load('test', dataclasses.replace(o, path=str(tmp_path)))


# --- reasoning-gym

FAKE = """
import dataclasses, random, sys, types


@dataclasses.dataclass
class Config:
  largest: int = 30
  seed: int = 0
  size: int = 500

  def __post_init__(self):
    assert self.largest > 1, 'largest must be positive'


class Data:
  def __init__(self, config):
    self.config = config

  def __getitem__(self, i):
    draw = random.Random(self.config.seed + i)
    a, b = draw.randint(0, self.config.largest), draw.randint(0, self.config.largest)
    return {'question': f'{a}+{b}?', 'answer': str(a + b), 'metadata': {'sum': a + b}}

  def score_answer(self, text, entry):
    while text == 'forever':
      pass
    return 7.0 if text == str(entry['metadata']['sum']) else 0.01


factory = types.ModuleType('reasoning_gym.factory')
factory.DATASETS = {'sums': (Data, Config)}
factory.create_dataset = lambda name, **kw: Data(Config(**kw))
sys.modules['reasoning_gym.factory'] = factory
"""


@pytest.fixture
def fake_gym(here, monkeypatch):
  write(here / 'reasoning_gym.py', FAKE)
  monkeypatch.syspath_prepend(str(here))
  for name in (gym.PACKAGE, f'{gym.PACKAGE}.factory'):
    monkeypatch.delitem(sys.modules, name, raising=False)
  gym._task.cache_clear()
  gym.dataset.cache_clear()
  gym.symbolic.close()
  yield
  gym.symbolic._state.modules.clear()
  gym.symbolic.configure()
  gym.symbolic.close()
  for name in (gym.PACKAGE, f'{gym.PACKAGE}.factory'):
    sys.modules.pop(name, None)


def test_gym_splits_share_no_question_and_the_scorer_pays(fake_gym, choose):
  gym.symbolic.configure(1, 5.0)
  task = find('gym:sums')
  o = types.TaskOptions(train_size=200, validation_size=20, test_size=40)
  loaded = {split: task.load(split, o) for split in datasets.SPLITS}
  questions = [e['question'] for examples in loaded.values() for e in examples]
  assert len(set(questions)) == len(questions) == 260
  assert loaded['test'] == task.load('test', dataclasses.replace(o, train_size=1))
  other = dataclasses.replace(o, seed=1)
  assert task.load('test', other) != loaded['test']
  split_of = {e['question']: s for s, examples in loaded.items() for e in examples}
  for split in datasets.SPLITS:  # of another seed, too
    for e in task.load(split, other):
      assert split_of.get(e['question'], split) == split
  e = loaded['test'][0]
  for style in task.styles:
    text = task.target(e, style)
    assert task.reward(text, e, 'strict') == {'sums': 1.0}
    assert task.grade(text, e, 'paper') == 1.0
  assert task.grade('none', e, 'strict') == 0.01
  assert task.recall(*task.record(e)) == e
  with pytest.raises(ValueError, match='with this question'):
    task.recall('another?', task.record(e)[1])
  few = dataclasses.replace(o, options='largest=2', test_size=9)
  with pytest.raises(ValueError, match='data.test_size = 9.*gym:sums.*largest=2'):
    task.load('test', few)
  for options, named in (('larges=3', "'largest'"), ('largest=0', 'must be positive')):
    with pytest.raises(ValueError, match=f'data.options.*{named}'):
      task.load('test', dataclasses.replace(o, options=options))
  c = choose('data.task=gym:sums', 'data.options=largest=9', 'reward.weights.sums=2')
  assert c.reward.weights.sums == 2
  with pytest.raises(ValueError, match='gym:summs.*sums'):
    find('gym:summs')
  gym.symbolic.configure(1, 0.5)
  assert task.grade('forever', e, 'strict') == 0
  (lost,) = gym.symbolic.drain()
  assert lost['answer'] == 'forever' and 'sums' in lost['truth']


def test_a_missing_gym_names_the_command(monkeypatch):
  monkeypatch.setitem(sys.modules, gym.PACKAGE, None)
  with pytest.raises(
    ValueError, match="gym:chain_sum.*pip install 'dmpo_jax\\[gym\\]'"
  ):
    find('gym:chain_sum')


def test_tasks_of_the_real_gym():
  pytest.importorskip('reasoning_gym')
  for name in ('chain_sum', 'spell_backward', 'number_sorting'):
    task = find(f'gym:{name}')
    for e in task.load('test', OPTIONS):
      assert task.grade(task.target(e, 'chat'), e, 'strict') == 1
