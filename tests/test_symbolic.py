"""Tests symbolic equality: verdicts, and texts that try to hang or kill it."""

import concurrent.futures
import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import sympy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tasks import EXAMPLES, PIECES, example_of, most_of

from dmpo_jax import grader
from dmpo_jax.tasks import TASKS, answers, latex, math, symbolic

HALF = {'problem': '?', 'solution': r'\boxed{\frac{1}{2}}'}
HANGS = (r'9^{9^{9^9}}', r'1000000!', r'\binom{1000000}{500000}')
boxed = r'\boxed{{{}}}'.format


@pytest.fixture(autouse=True)
def short_deadline():
  """One second per comparison, two workers, no failures of earlier tests."""
  symbolic.configure(2, 1.0)
  symbolic.equal('2x', 'x+x')  # starts the pool
  symbolic._ask.cache_clear()
  symbolic.drain()
  yield
  symbolic.configure()


@pytest.mark.smoke
@pytest.mark.parametrize(
  'left, right, same',
  [
    (r'\frac{\sqrt{4}}{4}', r'\frac{1}{2}', True),
    (r'2\sqrt{3}', r'\sqrt{12}', True),
    (r'\{1,2\}', r'\{2,1\}', True),
    (r'\text{(C)}', 'C', True),
    ('x+1', '1+x', True),
    ('x+1', 'x+2', False),
    ('[0,1]', '(0,1)', False),
    (r'\pi', '3.14', False),
    ('1+1', '2', False),
    (r'2\cdot 3', '6', False),
    ('', '2', False),
    ('nonsense \\ {', '2', False),
    (r'\frac{', '2', False),
  ],
)
def test_verdicts(left, right, same):
  assert math.equal(left, right) == same


def test_a_hung_worker_does_not_delay_the_others():
  """A batch takes about one deadline; killed comparisons are wrong and reported."""
  fine = [boxed(rf'\frac{{\sqrt{{{4 * n * n}}}}}{{{4 * n}}}') for n in range(2, 22)]
  texts = [boxed(HANGS[0]), *fine]
  begun = time.time()
  hard = {'problem': '?', 'solution': boxed('x+1')}  # an operation: compared
  graded = grader.judge(TASKS['math'], 'strict', texts, [hard] + [HALF] * len(fine), {})
  assert time.time() - begun < 20  # it would hang for ever
  assert graded.grades == [0.0] + [1.0] * len(fine)
  assert graded.reward[0] == 0.0 and (graded.reward[1:] == 2.0).all()
  (lost,) = graded.failed
  assert lost == {
    'answer': latex.clean(HANGS[0]),
    'truth': 'x+1',
    'reason': 'killed at its deadline',
  }
  again = grader.judge(TASKS['math'], 'strict', fine[:1], [HALF], {})
  assert again.failed == []


@pytest.mark.parametrize('text', HANGS)
def test_hanging_comparisons_are_killed(text):
  begun = time.time()
  assert not math.equal(text, 'x+1')
  assert time.time() - begun < 20


def test_only_verdicts_are_cached():
  """A killed comparison is tried and reported again; a verdict is not."""
  pair = (r'\sqrt{16} + y', r'y + \sqrt{16}')
  symbolic.configure(2, 1e-6)
  for _ in range(2):
    assert not math.equal(*pair)
    assert [lost['answer'] for lost in symbolic.drain()] == [pair[0]]
  symbolic.configure(2, 20.0)
  assert math.equal(*pair) and math.equal(*pair)
  assert symbolic.drain() == [] and symbolic._ask.cache_info().hits == 1


def test_killed_workers_lose_nothing():
  """If a worker is killed from outside, the comparison is tried again."""
  killed = 0
  for _ in range(2):
    for pid in children():
      os.kill(pid, signal.SIGKILL)
      killed += 1
    root = rf'\sqrt{{{4 + killed}}}'
    assert math.equal(f'{root} + x', f'x + {root}')
  assert killed >= 2
  symbolic.close()
  assert math.equal('a+b', 'b+a')
  assert symbolic.drain() == []


def children():
  """Returns the ids of the pool's processes."""
  pool = symbolic._pool()
  return list(pool._pool_manager.worker_manager.workers)


def test_script_without_a_main_guard(tmp_path):
  """Workers do not run the caller's script again."""
  path = tmp_path / 'script.py'
  path.write_text(
    'from dmpo_jax.tasks import TASKS\n'
    'print(TASKS["math"].grade(r"\\boxed{\\frac{\\sqrt{4}}{4}}",'
    ' {"problem": "", "solution": r"\\boxed{\\frac12}"}, "strict"))\n'
  )
  done = subprocess.run(
    [sys.executable, path],
    capture_output=True,
    text=True,
    timeout=60,
    env={**os.environ, 'PYTHONPATH': os.getcwd()},
  )
  assert done.stdout == '1.0\n', done.stderr


def test_python_in_answers_is_not_run(tmp_path):
  """It stays text. The control is sympy's own parser, which runs it."""
  path = tmp_path / 'made'
  code = f'open("{path}","w")'
  for text in (
    code,
    f'__import__("os").system("touch {path}")',
    f'x={code}',
    f'\\text{{{code}}}',
    f'\\operatorname{{{code}}}',
    f'\\{{{code},1\\}}',
    f'\\frac{{{code}}}{{2}}',
    f'[{code},2)',
  ):
    for pair in ((text, '2'), ('2', text), (text, text)):
      with contextlib.suppress(Exception):  # as in the worker: no verdict
        symbolic.verify(*pair)
  assert not path.exists()
  sympy.parse_expr(code).close()
  assert path.exists()


# ---- attacks on all tasks

LONG = 10_000_000
ATTACKS = [
  '9**9**9',
  '99**98**97',
  '(' * 10**5,
  '(' * 10**5 + ')' * 10**5,
  '1' * 10**6,
  '\u0661\u0662',
  '\N{MINUS SIGN}3',
  '7/0',
  '1/(3-3)',
  '0/0',
  '7+3*5' * 1000,
  '\\boxed{' * 20000 + '1' + '}' * 20000,
  '\\boxed{}',
  '\\boxed',
  '\\frac' * 5000,
  '\\sqrt',
  '\\frac{1}{0}',
  '\\text{ a}\\text{ b}',
  '{' * 10**5,
  '}' * 10**5,
  '<answer>' * 10**5,
  '</answer>' * 10**5,
  '<answer></answer>' * 10**5,
  '<reasoning>' * 10**5,
  '\0' * 1000,
  '\ud800',
  '<|mdm_mask|>' * 100,
  ' ' * 10**6,
  '\n' * 10**6,
  'a' * LONG,
  '1,' * 10**5,
  '-' * 10**5,
  '```' * 10**5,
  '$' * 10**5,
  '=' * 10**5,
  'nan',
  'inf',
  '-inf',
  '1e999',
  '1_000',
  '0x10',
  '²',
  '½',
  'x' * 299,
  '__import__("os").system("true")',
  '\x1b[31m',
  '<answer>' + '9' * 10**5,
  '\\,' * 450 + '!',
  '\\text{cm} ' * 99 + '!',
  '(' + 'ab' * 450 + '=5',
  '0.' + '12' * 490,
]


@pytest.mark.parametrize('name', TASKS)
def test_attacks_are_wrong_and_quick(name):
  """Bare, in tags, in a box, in a box in tags: nothing raises or takes long."""
  task, example, most = TASKS[name], example_of(name), most_of(name)
  for body in ATTACKS:
    for text in (
      body,
      f'<answer>{body}</answer>',
      boxed(body),
      f'<reasoning>{body}</reasoning><answer>{boxed(body)}</answer>',
    ):
      for protocol in answers.PROTOCOLS:
        begun = time.perf_counter()
        terms = task.reward(text, example, protocol)
        assert np.isfinite(list(terms.values())).all()
        assert sum(terms.values()) <= most
        if name in EXAMPLES and name != 'sudoku':  # it pays the share of cells
          assert task.grade(text, example, protocol) == 0.0
        task.extra(text, example)
        task.answer(text, example, protocol)
        assert time.perf_counter() - begun < 10, (name, protocol, body[:40])


@pytest.mark.parametrize('name', TASKS)
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(
  text=st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=12
  ).map(''.join)
)
def test_random_texts(name, text):
  check_text(name, text)


@pytest.mark.parametrize('name', TASKS)
def test_mutated_solutions(name):
  """Cuts, doubles and inserts pieces in right completions, 2000 per task."""
  task, example, rng = TASKS[name], example_of(name), random.Random(0)
  base = task.target(example, 'chat')
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(
      pool.map(
        lambda text: check_text(name, text), [mutated(base, rng) for _ in range(2000)]
      )
    )


def mutated(text, rng):
  for _ in range(rng.randint(1, 4)):
    i, j = sorted(rng.randint(0, len(text)) for _ in range(2))
    text = rng.choice(
      (
        text[:i] + text[j:],
        text[:j] + text[i:],
        text[:i] + rng.choice(PIECES) + text[i:],
      )
    )
  return text[-5000:]


def check_text(name, text):
  task, example, most = TASKS[name], example_of(name), most_of(name)
  for protocol in answers.PROTOCOLS:
    terms = task.reward(text, example, protocol)
    assert -6 <= sum(terms.values()) <= most
    assert 0 <= task.grade(text, example, protocol) <= 1
    answer = task.answer(text, example, protocol)
    assert answer is None or isinstance(answer, str)
  assert all(0 <= value <= 1 for value in task.extra(text, example).values())


def test_weights_of_terms():
  """The reward is the weighted sum; a sum that is not finite is refused."""
  texts = ['<reasoning>\nx\n</reasoning>\n<answer>\n2\n</answer>\n', '']
  task, example = TASKS['gsm8k'], EXAMPLES['gsm8k']
  graded = grader.judge(task, 'strict', texts, [example] * 2, {})
  assert graded.reward.tolist() == [4.0, 0.0]
  weights = {'correctness': 3.0, 'int': 0.0, 'soft_format': -1.0}
  graded = grader.judge(task, 'strict', texts, [example] * 2, weights)
  assert graded.reward.tolist() == [6.0 + 0.5 - 0.5 + 0.5, 0.0]
  with pytest.raises(ValueError, match='not finite'):
    grader.judge(task, 'strict', texts, [example] * 2, {'int': float('nan')})
