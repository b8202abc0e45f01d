"""Tests the code task: its files, programs and rewards, and a run through the sandbox.

The rows are in the formats of the published files: HumanEval/0 and 2 (shortened) of
github.com/openai/human-eval, task 2 of MBPP, and made-up rows with the columns of
KodCode-V1 and AceCode-89K.
"""

import json

import pyarrow
import pytest
from pyarrow import parquet

from configs import base
from dmpo_jax import build, check, evaluate, grader, types
from dmpo_jax.tasks import TASKS, code, sandbox
from dmpo_jax.tools import cards

HUMANEVAL = {
  'task_id': 'HumanEval/2',
  'prompt': 'import math\n\n\ndef helper(x):\n    return math.floor(x)\n\n\n'
  'def truncate_number(number: float) -> float:\n'
  '    """ Return the decimal part of the number.\n'
  '    >>> truncate_number(3.5)\n    0.5\n    """\n',
  'entry_point': 'truncate_number',
  'canonical_solution': '    return number % 1.0\n',
  'test': "\n\nMETADATA = {'author': 'jt', 'dataset': 'test'}\n\n\n"
  'def check(candidate):\n    assert candidate(3.5) == 0.5\n'
  '    assert abs(candidate(1.33) - 0.33) < 1e-6\n'
  '    assert abs(candidate(-0.5) - (-0.5 - helper(-0.5))) < 1e-6\n',
}
MBPP = {
  'task_id': 2,
  'text': 'Write a function to find the shared elements from the given two lists.',
  'code': 'def similar_elements(a, b):\n  return tuple(set(a) & set(b))',
  'test_list': [
    'assert set(similar_elements((3, 4, 5, 6),(5, 7, 4, 10))) == set((4, 5))',
    'assert set(similar_elements((1, 2, 3, 4),(5, 4, 3, 7))) == set((3, 4))',
  ],
  'test_setup_code': '',
  'challenge_test_list': [],
}
SANITIZED = {
  'source_file': 'x.ipynb',
  'task_id': 600,
  'prompt': 'Write a python function to check whether the given number is even.',
  'code': 'def is_Even(n) : \n    if (n^1 == n+1) :\n        return True; \n'
  '    else :\n        return False; ',
  'test_imports': ['import math'],
  'test_list': [
    'assert is_Even(1) == False',
    'assert is_Even(int(math.sqrt(4))) == True',
  ],
}
KODCODE = {
  'question_id': 'Prefill_1_I',
  'question': 'Sort the list in place, and raise ValueError if it is empty.',
  'solution': 'def tidy(xs):\n  if not xs:\n    raise ValueError("empty list")\n'
  '  xs.sort()\n',
  'test': 'import pytest\nfrom solution import tidy\n\n'
  'def test_sorts():\n  xs = [3, 1, 2]\n  tidy(xs)\n  assert xs == [1, 2, 3]\n\n'
  '@pytest.mark.parametrize("xs, want", [([2], [2]), ([2.0, 1], [1, 2])])\n'
  'def test_short(xs, want):\n  tidy(xs)\n  assert xs == pytest.approx(want)\n\n'
  'class TestErrors:\n  def test_empty(self):\n'
  '    with pytest.raises(ValueError, match="empty"):\n      tidy([])\n',
  'test_info': [
    {
      'function_name': 'tidy', 'function_declaration': 'def tidy(xs):',
      'parameter_list': '(xs)', 'docstring': '',
    }
  ],
}  # fmt: skip
# Its tests need a class, so they run in the program's process.
CLASSES = {
  **KODCODE,
  'question': 'Write a stack.',
  'solution': 'class Stack:\n  def __init__(self): self.x = []\n'
  '  def push(self, x): self.x.append(x)\n  def pop(self): return self.x.pop()\n',
  'test': 'from solution import Stack\n\ndef test_last():\n  s = Stack()\n  s.push(1)\n'
  '  s.push(2)\n  assert s.pop() == 2\n\ndef test_first():\n  s = Stack()\n'
  '  s.push(1)\n  assert s.pop() == 1\n',
  'test_info': json.dumps(
    [{'function_name': 'Stack', 'function_declaration': 'class S'}]
  ),
}
# As task 367 of MBPP: its setup needs a class of the solution.
SETUP = {
  **MBPP,
  'task_id': 367,
  'text': 'Write a function that gives the value of a node.',
  'code': 'class Node:\n  def __init__(self, x): self.x = x\n'
  'def value(n): return n.x\n',
  'test_setup_code': 'root = Node(1)',
  'test_list': ['assert value(root) == 1'],
}
ACECODE = {
  'id': 'oss_1',
  'question': 'Write double(x).',
  'test_cases': ['assert double(1) == 2', 'assert double("a") == "aa"'],
  'inferences': [
    {'completion': '```python\ndef double(x): return x * 2\n```', 'pass_rate': 1.0},
    {'completion': '```python\npass\n```', 'pass_rate': 0.0},
  ],
}
ROWS = {
  'humaneval': HUMANEVAL, 'mbpp': MBPP, 'sanitized': SANITIZED, 'kodcode': KODCODE,
  'classes': CLASSES, 'setup': SETUP, 'acecode': ACECODE,
}  # fmt: skip
OPTIONS = types.TaskOptions(train_size=0, validation_size=0, test_size=0)
TASK = TASKS['code']


def examples(folder, *rows):
  """Returns the rows as the task reads them from a file."""
  path = folder / 'rows.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return list(code._read(str(path)))


@pytest.fixture(scope='module')
def isolated():
  """Skips a test where this machine isolates no program."""
  sandbox.configure(workers=2, deadline=2.0)
  try:
    sandbox.ready()
  except ValueError as error:
    pytest.skip(str(error))
  sandbox.drain()
  yield
  sandbox.configure()


# ---- files


def test_files_of_each_format_are_read(tmp_path):
  """JSONL, a list, and parquet; the splits of a file are the field's."""
  plain = tmp_path / 'HumanEval.jsonl'
  plain.write_text(json.dumps(HUMANEVAL) + '\n')
  listed = tmp_path / 'sanitized-mbpp.json'
  listed.write_text(json.dumps([SANITIZED, MBPP, {**MBPP, 'task_id': 700}], indent=2))
  table = tmp_path / 'kodcode.parquet'
  parquet.write_table(pyarrow.Table.from_pylist([KODCODE]), table)
  read = lambda path: list(code._read(str(path)))
  assert read(plain)[0]['kind'] == 'humaneval'
  assert [code.split_of(x) for x in read(plain)] == ['test']
  assert [code.split_of(x) for x in read(listed)] == ['validation', 'train', 'train']
  assert code.split_of({**read(listed)[1], 'name': '11'}) == 'test'
  assert read(table) == examples(tmp_path, KODCODE)
  assert TASK.load('test', types.TaskOptions(path=str(plain), test_size=0))


@pytest.mark.parametrize(
  'row, said',
  [
    ({'question': 'x', 'answer': 'y'}, 'question, answer'),
    ({**MBPP, 'test_list': 'assert True'}, 'test_list'),
    ({**MBPP, 'test_list': []}, 'tests'),
    ({**MBPP, 'text': 5}, 'text'),
    ({**HUMANEVAL, 'prompt': ''}, 'prompt'),
    ({**HUMANEVAL, 'entry_point': None}, 'entry_point'),
    ({**KODCODE, 'test_info': 'x'}, 'test_info'),
    ({**ACECODE, 'test_cases': ['assert x', ' ']}, 'tests'),
    ({**ACECODE, 'question': '\ud800'}, 'question'),
  ],
)
def test_a_wrong_row_names_file_line_and_column(row, said, tmp_path):
  with pytest.raises(ValueError, match=rf'rows.jsonl:2: .*{said}'):
    examples(tmp_path, MBPP, row)


def test_prompts_show_what_the_data_set_shows(tmp_path):
  found = dict(zip(ROWS, examples(tmp_path, *ROWS.values()), strict=True))
  for style in TASK.styles:
    shown = {name: TASK.prompt(x, style) for name, x in found.items()}
    assert all(found[name]['question'].strip('\n') in x for name, x in shown.items())
    assert all(test in shown['mbpp'] for test in MBPP['test_list'])
    assert 'def tidy(xs):' in shown['kodcode']
    assert ACECODE['test_cases'][0] in shown['acecode']
    assert ACECODE['test_cases'][1] not in shown['acecode']
    assert 'check(' not in shown['humaneval']
  with pytest.raises(ValueError, match='no solution'):
    TASK.target({**found['acecode'], 'solution': ''}, 'chat')


# ---- programs

BODY = HUMANEVAL['canonical_solution']
WHOLE = 'def truncate_number(number):\n  return number - helper(number)\n'


@pytest.mark.parametrize(
  'text, right',
  [
    (BODY, 1),  # goes on where the prompt ends
    ('return number % 1.0', 1),  # without its indent
    (BODY + '\n\ndef other():\n  """', 1),  # and then runs on
    (f'```python\n{WHOLE}```', 1),
    (f'Think.\n```python\nx = 1\n```\nSo:\n```py\n{WHOLE}```\nDone.', 1),
    (f'```python\n{WHOLE}```\nUse it so:\n```\nprint(3)\n```', 1),
    (f'```python\n{WHOLE}', 1),  # cut off
    (f'{WHOLE}```\nThat is all.', 1),  # the prompt has opened the block
    (f'```python\n{BODY}```', 1),
    (HUMANEVAL['prompt'] + BODY, 1),
    ('```python\ndef truncate_number(number):\n  return 0.5\n```', 0),
    ('I do not know.', 0),
    ('', 0),
    ('```python\n```', 0),
  ],
)
def test_programs_are_found_in_texts(text, right, isolated, tmp_path):
  (example,) = examples(tmp_path, HUMANEVAL)
  assert TASK.grade(text, example, 'strict') == right


@pytest.mark.parametrize('name', ROWS)
def test_solutions_pass_and_wrong_programs_do_not(name, isolated, tmp_path):
  """The targets of all styles are right, in both ways to run the tests.

  Tests run apart unless they need a class. An object that equals everything passes
  only tests in its own process.
  """
  (example,) = examples(tmp_path, ROWS[name])
  tests = code.suite(example)
  assert code.joined(example, tests) == (name in ('classes', 'setup'))
  for style in TASK.styles:
    text = TASK.target(example, style)
    assert TASK.grade(text, example, 'strict') == 1
  full = {'tests': 1.0, 'solved': 1.0, 'format': 0.5}
  assert TASK.reward(text, example, 'strict') == full
  chat = TASK.target(example, 'chat')
  paper = {'tests': 2.0, 'solved': 0.0, 'format': 0.5}
  assert TASK.reward(chat, example, 'paper') == paper
  assert TASK.grade(chat, example, 'paper') == 1
  for wrong in ('pass', 'import sys; sys.exit(0)', 'import os; os._exit(0)'):
    text = f'```python\n{wrong}\n```'
    for protocol in ('strict', 'paper'):
      assert TASK.grade(text, example, protocol) == 0
      assert TASK.reward(text, example, protocol)['tests'] == 0
  assert sandbox.drain() == []


def test_the_share_of_tests_is_paid(isolated, tmp_path):
  """By both protocols; 'paper' pays for nothing without its form."""
  example, kod, _ = examples(tmp_path, MBPP, KODCODE, ACECODE)
  half = 'def similar_elements(a, b): return {3, 4}'
  block = f'Text.\n```python\n{half}\n```\n'
  assert TASK.reward(block, example, 'strict') == {
    'tests': 0.5, 'solved': 0.0, 'format': 0.5,
  }  # fmt: skip
  assert TASK.reward(block, example, 'paper')['tests'] == 1.0
  for text in (half, block + 'More.', block.replace('python', ''), block + block):
    assert sum(TASK.reward(text, example, 'paper').values()) == 0, text
    assert TASK.reward(text, example, 'strict')['tests'] == 0.5
  broken = '```python\ndef f(:\n```'
  assert TASK.reward(broken, example, 'paper') == {
    'tests': 0.0, 'solved': 0.0, 'format': 0.25,
  }  # fmt: skip
  assert sum(TASK.reward(broken, example, 'strict').values()) == 0
  lazy = 'def tidy(xs):\n  xs.sort()\n'  # raises nothing
  assert TASK.reward(lazy, kod, 'strict')['tests'] == pytest.approx(2 / 3)


def test_what_equals_everything_passes_in_its_own_process_alone(isolated, tmp_path):
  """This is why 'strict' runs tests apart; sandboxed.py says what is not excluded."""
  (example,) = examples(tmp_path, SANITIZED)
  text = '```python\nclass Yes:\n  def __eq__(self, x): return True\n'
  text += 'def is_Even(n): return Yes()\n```'
  assert TASK.grade(text, example, 'paper') == 1
  assert TASK.grade(text, example, 'strict') == 0


def test_a_solution_that_fails_its_own_tests_is_reported(isolated, tmp_path):
  (example,) = examples(tmp_path, {**MBPP, 'code': 'def similar_elements(a, b): 1/0'})
  right = TASK.target(examples(tmp_path, MBPP)[0], 'chat')
  graded = grader.judge(TASK, 'strict', [right] * 3, [example] * 3, {})
  assert graded.grades == [1, 1, 1]
  (lost,) = graded.failed
  assert 'own tests' in lost['reason'] and lost['answer'] == example['solution']


# ---- the sandbox is asked for


def test_a_machine_that_isolates_nothing_is_refused_with_the_remedy(monkeypatch):
  """At the start, before problems are read; limits alone must be asked for."""
  monkeypatch.setattr(sandbox, '_problem', lambda level: f'no {level}')
  c = base.get_config()
  with c.unlocked():
    c.data.task, c.data.path = 'code', 'nowhere'
  built = build.build(c)
  for call in (lambda: build.problems(built, 'train'), sandbox.ready):
    with pytest.raises(ValueError) as caught:
      call()
    said = str(caught.value)
    assert 'no bwrap' in said and 'no namespaces' in said and 'no rlimits' not in said
    assert 'bubblewrap' in said and 'reward.sandbox = rlimits' in said
  sandbox.configure()


@pytest.mark.parametrize(
  'field, value', [('sandbox', 'none'), ('memory', 1), ('python', '/no/python')]
)
def test_a_wrong_field_of_the_sandbox_is_refused(field, value):
  c = base.get_config()
  c.reward[field] = value
  with pytest.raises(ValueError, match=f'reward.{field}'):
    check.config(c, 1)


# ---- pass@k and saved generations


def test_pass_at_k_is_the_mean_over_all_choices():
  """Chen et al. 2021, equation 1: 1 - C(n - c, k) / C(n, k)."""
  import itertools
  import math

  for n, c in ((5, 0), (5, 2), (7, 3), (4, 4)):
    grades = [1.0] * c + [0.0] * (n - c)
    for k in range(1, n + 1):
      exact = 1 - math.comb(n - c, k) / math.comb(n, k)
      assert cards.pass_at(k, grades) == pytest.approx(exact)
  grades = [0.25, 1.0, 0.5, 0.0]
  for k in range(1, 5):
    best = [max(chosen) for chosen in itertools.combinations(grades, k)]
    assert cards.pass_at(k, grades) == pytest.approx(sum(best) / len(best))


def test_saved_generations_are_graded_again(isolated, tmp_path):
  """A record is recalled to the same problem; several samples give pass@k."""
  for example in examples(tmp_path, *ROWS.values()):
    question, truth = TASK.record(example)
    assert TASK.recall(question, json.loads(json.dumps(truth))) == example
  for wrong in (None, {}, {**truth, 'tests': []}, {**truth, 'tests': [1]}):
    with pytest.raises(ValueError, match='ground_truth'):
      TASK.recall('x', wrong)
  (example,) = examples(tmp_path, SANITIZED)
  question, truth = TASK.record(example)
  right, wrong = TASK.target(example, 'chat'), 'def is_Even(n): return None'
  item = dict(question=question, ground_truth=truth, generations=[right] + [wrong] * 3)
  path = tmp_path / 'saved.json'
  path.write_text(json.dumps({'generations': [item]}))
  card = cards.score_file('code', 'strict', str(path))
  assert [card[x] for x in ('accuracy', 'pass@2', 'pass@4')] == [0.25, 0.5, 1.0]


# ---- a run


def toy(tmp_path):
  """A config of a tiny model on three toy problems."""
  rows = [
    {**ACECODE, 'id': str(i), 'question': f'Add {i}.', 'inferences': [],
     'test_cases': [f'assert f(1) == {1 + i}', f'assert f(2) == {2 + i}'],
     'solution': ''}
    for i in range(3)
  ]  # fmt: skip
  for i, row in enumerate(rows):
    row['inferences'] = [{'completion': f'f=lambda x:x+{i}', 'pass_rate': 1.0}]
  folder = tmp_path / 'data'
  folder.mkdir()
  lines = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'test.jsonl').write_text(lines.replace('Add', 'Please add'))
  # Of each split of the train file one problem at least.
  more = [{**rows[i % 3], 'question': f'Add {i % 3}{" " * (i > 2)}'} for i in range(3)]
  names = [f'{row["question"]} ({n})' for row in more for n in range(40)]
  text = [{**rows[int(q[4])], 'question': q} for q in names]
  (folder / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in text))
  c = base.get_config()
  c.update_from_flattened_dict(
    {
      'model.width': 16, 'model.layers': 1, 'model.heads': 2, 'model.kv_heads': 2,
      'model.mlp': 16, 'data.task': 'code', 'data.path': str(folder),
      'data.train_size': 8, 'data.validation_size': 2, 'data.test_size': 3,
      'data.style': 'bare', 'sampler.steps': 4, 'eval.sampler.steps': 4,
      'eval.batch': 8, 'eval.every': 1, 'sft.steps': 2, 'sft.batch': 8,
      'objective.draws': 2, 'logprob.draws': 2, 'train.iterations': 2,
      'train.prompts': 2, 'train.group': 4, 'train.inner': 1,
      'train.microbatches': 1, 'reward.workers': 2, 'reward.deadline': 2.0,
    }
  )  # fmt: skip
  return c


@pytest.mark.slow
def test_sft_and_dmpo_run_through_the_sandbox(isolated, tmp_path, monkeypatch):
  """Two supervised steps, two buffers, and an evaluation with the real judge.

  An untrained model writes no program, so every other text is replaced by a right one:
  the judge must tell them apart.
  """
  import tiny_run

  from dmpo_jax import data

  c = toy(tmp_path)
  built = build.build(c)
  params = tiny_run.run_sft(built, tmp_path / 'sft')
  decode = data.decode
  texts = ['f=lambda x:x+0', 'f=lambda x:x+1', 'f=lambda x:x+2', 'while 1:x']

  def replaced(*args):
    return [texts[i % 4] for i, _ in enumerate(decode(*args))]

  monkeypatch.setattr(data, 'decode', replaced)
  tiny_run.run(built, tmp_path / 'rl', params)
  rows = tiny_run.rows(tmp_path / 'rl')
  # Of each prompt's four completions exactly one is right.
  assert [row['accuracy'] for row in rows['rl']] == [0.25, 0.25]
  assert [row['reward/solved'] for row in rows['rl']] == [0.25, 0.25]
  assert rows['update']
  mean, samples = evaluate.accuracy(built, params, build.problems(built, 'test'))
  assert mean['accuracy'] == 1.0 and len(samples) == 3
