"""Code: problems whose answer is a Python program, judged by the problem's tests.

Files have the columns of HumanEval, MBPP (full or sanitized), KodCode or AceCode; each
line tells its own format. Programs run in sandbox.py, and a grade is 1 if all tests
pass.

'strict' takes the last fenced block that defines the function (a block that is cut off
counts), or the whole text. HumanEval's prompt stands before it, so a text may go on
where the prompt ends. Tests run apart from the program, where the problem's own
solution passes them so; see sandboxed.py. The reward is the share of tests passed, 1
more for all, and half a point for a program that compiles.
'paper' follows coupled-GRPO and ESPO (rewards.py:22-26, 125-172; weights of
ml-diffucoder's config_coupled_code.yaml): twice the share of tests passed, but 0 unless
the text ends with its one block marked python, which compiles; and half of the format's
1, or 0.5 where the block does not compile. The first block counts; the grade takes a
text without one as it is. Tests run in the program's own process. Where we differ, on
purpose: a program that exits before the end of a test has not passed it. Only the last
MAX_TEXT characters are read.
"""

import ast
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from dmpo_jax.tasks import answers, datasets, sandbox
from dmpo_jax.types import Task

CHAT = """Solve the problem in Python. Write the whole program in one code block that \
begins with ```python, and end your answer with that block:

```python
...
```

{question}"""
TEMPLATES = {
  'bare': '{question}',
  'chat': CHAT,  # as DiffuCoder and ESPO train
  # EvalPlus asks chat models so.
  'script': 'Write a self-contained Python script that solves the following problem, '
  'in a Markdown code block:\n```\n{question}\n```',
  # Austin et al. 2021, section 3.1; without examples.
  'mbpp': 'You are an expert Python programmer, and here is your task: {question}',
}
FIELDS = {  # of an example; those that a saved generation must have
  'name': str, 'kind': str, 'prefix': str, 'solution': str, 'setup': str,
  'tests': list, 'entry': list, 'hint': str,
}  # fmt: skip
FENCE = re.compile(r'^[ \t]*```[ \t]*([\w+.-]*)[ \t]*$', re.MULTILINE)
FIRST = re.compile(r'```python\n(.*?)```', re.DOTALL)
# ESPO rewards.py:130-137: text, one block, and nothing behind it.
FORM = re.compile(r'(?:(?!```)[\s\S])*```python\n(?:(?!```)[\s\S])*```\n?')
# Where a text that goes on after its function is cut (bigcode-evaluation-harness).
BEHIND = re.compile(r'\n(?=class |def |#|@|print|if |<)')
MAX_TESTS = 200  # of a problem


# ---- files


def _text(record: dict, name: str, where: str, default: str | None = None) -> str:
  """Returns a column's text; ValueError if it has none and there is no default."""
  value = record.get(name)
  empty = value is None or (isinstance(value, str) and not value.strip())
  if empty and default is not None:
    return value or default
  return datasets.checked_text(where, name, value, record)


def _texts(record: dict, name: str, where: str) -> list[str]:
  """Returns a column's list of texts, which may be empty or missing."""
  value = record.get(name)
  value = [] if value is None else value
  if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
    raise ValueError(f'{where}: column {name} must hold a list of texts: {value!r}')
  return value


def _humaneval(record: dict, where: str) -> dict[str, Any]:
  prompt, entry = (_text(record, name, where) for name in ('prompt', 'entry_point'))
  body = _text(record, 'canonical_solution', where, '')
  return dict(
    question=prompt,
    prefix=prompt,
    solution=prompt + body if body else '',
    setup=prompt,
    tests=[_text(record, 'test', where) + f'\ncheck({entry})\n'],
    entry=[entry],
  )


def _mbpp(record: dict, where: str) -> dict[str, Any]:
  tests = _texts(record, 'test_list', where)
  lines = [_text(record, 'test_setup_code', where, '')]
  lines += _texts(record, 'test_imports', where)
  return dict(
    question=_text(record, 'text' if 'text' in record else 'prompt', where),
    solution=_text(record, 'code', where, ''),
    setup='\n'.join(filter(str.strip, lines)),
    tests=tests,
    hint='\n'.join(['Your code should pass these tests:', *tests]),
  )


def _kodcode(record: dict, where: str) -> dict[str, Any]:
  info = record.get('test_info') or []
  try:
    info = json.loads(info) if isinstance(info, str) else info
    info = [info] if isinstance(info, dict) else list(info)
    names = [x['function_name'] for x in info]
    declared = [x['function_declaration'] for x in info]
  except (ValueError, KeyError, TypeError):
    raise ValueError(
      f'{where}: column test_info must hold a list of objects with function_name and '
      f'function_declaration: {record["test_info"]!r}'
    ) from None
  question = _text(record, 'question', where)
  shown = [x for x in declared if x not in question]
  hint = '\n'.join(['The program must define:', *shown]) if shown else ''
  return dict(
    question=question,
    solution=_text(record, 'solution', where, ''),
    tests=[_text(record, 'test' if 'test' in record else 'test_code', where)],
    entry=names,
    hint=hint,
  )


def _acecode(record: dict, where: str) -> dict[str, Any]:
  tests = _texts(record, 'test_cases', where)
  question = _text(record, 'question', where)
  right = [
    x['completion']
    for x in record.get('inferences') or ()
    if isinstance(x, dict) and x.get('pass_rate') == 1
  ]
  shown = tests and '\n```\n' not in question  # ESPO data_utils.py:65
  return dict(
    question=question,
    solution=_blocks(right[0])[0] if right else '',
    tests=tests,
    hint=f'Test cases: {tests[0]}' if shown else '',
  )


FORMATS = {  # name -> (columns that tell it, reader)
  'humaneval': (('prompt', 'entry_point', 'test'), _humaneval),
  'mbpp': (('test_list',), _mbpp),
  'acecode': (('question', 'test_cases'), _acecode),
  'kodcode': (('question', 'test'), _kodcode),
}


def _read(path: str) -> Iterator[dict]:
  for line, record in datasets.read_rows(path):
    where = f'{path}:{line}'
    if 'test_code' in record:
      record = {**record, 'test': record['test_code']}
    kinds = [
      k for k, (columns, _) in FORMATS.items() if all(x in record for x in columns)
    ]
    if not kinds:
      wanted = '; '.join(f'{k}: {", ".join(x)}' for k, (x, _) in FORMATS.items())
      raise ValueError(
        f'{where}: no format of code problems has the columns {", ".join(record)} '
        f'({wanted})'
      )
    name = record.get('task_id', record.get('question_id', record.get('id', line)))
    made = dict(name=str(name), kind=kinds[0], prefix='', setup='', entry=[], hint='')
    made |= FORMATS[kinds[0]][1](record, where)
    if not 0 < len(made['tests']) <= MAX_TESTS or not all(
      map(str.strip, made['tests'])
    ):
      raise ValueError(
        f'{where}: a problem must have 1 to {MAX_TESTS} tests, and none may be empty'
      )
    yield made


def _words(example: dict) -> str:
  return ' '.join(example['question'].split())


def split_of(example: dict) -> str:
  """Returns the split that owns a problem of a single file.

  HumanEval is a test; MBPP's splits are by number, as its README says; of the others a
  hash of the question decides. MBPP's ten examples of a prompt are in train.
  """
  name = example['name']
  if example['kind'] == 'humaneval' and name.startswith('HumanEval/'):
    return 'test'
  if example['kind'] == 'mbpp' and name.isdecimal():
    for last, split in ((10, 'train'), (510, 'test'), (600, 'validation')):
      if int(name) <= last:
        return split
    return 'train'
  return datasets.split_by(_words(example))


SOURCE = datasets.Source(
  'code',
  'github.com/openai/human-eval (HumanEval.jsonl.gz, to be unpacked), '
  'github.com/google-research/google-research/tree/master/mbpp (mbpp.jsonl), '
  'huggingface.co/datasets: KodCode/KodCode-V1 and TIGER-Lab/AceCode-89K',
  _read,
  split_of,
  _words,
)


# ---- prompts


def prompt(example: dict, style: str) -> str:
  """Returns the user's message; ValueError for an unknown style."""
  template = answers.choose('style', style, TEMPLATES)
  question = example['question'].strip('\n')
  if example['hint']:
    question += f'\n\n{example["hint"]}'
  return template.replace('{question}', question)


def target(example: dict, style: str) -> str:
  """Returns the solution as the prompt asks for it.

  ValueError for an unknown style, and for a problem without a solution.
  """
  answers.choose('style', style, TEMPLATES)
  solution = example['solution']
  if not solution:
    raise ValueError(
      f'the code problem {example["name"]} has no solution to learn from: set '
      'sft.steps = 0, or use a data set with solutions'
    )
  if style == 'bare':
    return solution.removeprefix(example['prefix'])
  return f'```python\n{solution.strip()}\n```'


# ---- programs


def _blocks(text: str, entry: str = '') -> list[str]:
  """Returns what may be the program of a text, the likeliest first."""
  pieces = FENCE.split(text)  # text, mark, text, ..
  fences = len(pieces) // 2
  if fences == 0:
    return [text]
  if fences == 1:  # a block that is cut off, or one that the prompt has opened
    both = [pieces[2], pieces[0]]
    return both if pieces[1] else both[::-1]
  closed = [pieces[2 + 4 * i] for i in range(fences // 2)][::-1]
  named = [x for x in closed if entry and re.search(rf'\b{re.escape(entry)}\b', x)]
  return [*named[:1], *closed]


def versions(text: str, example: dict, protocol: str) -> tuple[str, ...]:
  """Returns the programs that a text may mean; the first that compiles counts.

  () if it has none.
  """
  text = answers.clip(text)
  prefix, entry = example['prefix'], (example['entry'] or [''])[0]
  if protocol == 'paper':
    blocks = FIRST.findall(text)[:1] or [text]
  else:
    blocks = _blocks(text, entry)
  found = []
  for block in filter(str.strip, blocks):
    block = block.replace('\r\n', '\n')
    if not prefix:
      found += [block, textwrap.dedent(block)]
    elif re.search(
      rf'^\s*(?:async\s+)?def\s+{re.escape(entry)}\b', block, re.MULTILINE
    ):
      found += [f'{prefix}\n{textwrap.dedent(block)}']
    else:
      cut = BEHIND.split(block)[0]
      bodies = [
        x for part in (block, cut) for x in (part, textwrap.indent(part, '    '))
      ]
      found += [prefix + body for body in bodies]
  return tuple(dict.fromkeys(found))


def suite(example: dict) -> sandbox.Suite:
  """Returns the problem's tests."""
  defined = _defined(example['solution'])[0] if example['kind'] != 'humaneval' else []
  entry = tuple(example['entry'] or defined)
  if example['kind'] != 'kodcode':
    tests = tuple((test, '') for test in example['tests'])
    return sandbox.Suite(tests, example['setup'], entry)
  tests = tuple(
    (file, call) for file in example['tests'] for call in _defined(file)[1] or ['']
  )
  return sandbox.Suite(tests[:MAX_TESTS], example['setup'], entry)


def _defined(text: str) -> tuple[list[str], list[str]]:
  """Returns the functions of a file, and the functions and methods that are tests."""
  try:
    body = ast.parse(text).body
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return [], []
  of = lambda body: [x.name for x in body if isinstance(x, ast.FunctionDef)]
  tests = [name for name in of(body) if name.startswith('test')]
  for node in body:
    if isinstance(node, ast.ClassDef) and node.name.startswith('Test'):
      tests += [f'{node.name}.{x}' for x in of(node.body) if x.startswith('test')]
  return of(body), tests


def judge(text: str, example: dict, protocol: str) -> sandbox.Verdict | None:
  """Runs a text's program; None if it has none."""
  programs = versions(text, example, answers.choose('protocol', protocol, BOTH))
  if not programs:
    return None
  tests = suite(example)
  return sandbox.run(programs, tests, protocol == 'paper' or joined(example, tests))


BOTH = answers.PROTOCOLS


def joined(example: dict, tests: sandbox.Suite) -> bool:
  """Returns whether a problem's tests need to be in the program's process.

  They do if the problem's own solution does not pass them apart. A solution that does
  not pass them at all is reported by sandbox.drain.
  """
  if not (own := example['solution']) or sandbox.run((own,), tests).all():
    return False
  if not sandbox.run((own,), tests, joined=True).all():
    sandbox.report(
      own, f'the solution of {example["name"]} does not pass its own tests'
    )
  return True


# ---- rewards and grades


def reward(text: str, example: dict, protocol: str) -> dict[str, float]:
  """Returns {'tests', 'solved', 'format'}, at most 2.5 in sum; ValueError: protocol."""
  found = judge(text, example, protocol)
  share = sum(found.passed) / len(found.passed) if found and found.passed else 0.0
  compiles = found is not None and found.index >= 0
  if protocol == 'paper':
    form = (1.0 if compiles else 0.5) * bool(FORM.fullmatch(answers.clip(text)))
    share = 2.0 * share * (form == 1)
    return {'tests': share, 'solved': 0.0, 'format': 0.5 * form}
  return {'tests': share, 'solved': float(share == 1), 'format': 0.5 * compiles}


def grade(text: str, example: dict, protocol: str) -> float:
  """Returns 1.0 if all tests pass, else 0.0; ValueError as for `reward`."""
  found = judge(text, example, protocol)
  return float(found is not None and found.all())


def extra(text: str, example: dict) -> dict[str, float]:
  """Returns no further numbers: the term 'format' says which programs compile."""
  del text, example
  return {}


def answer(text: str, example: dict, protocol: str) -> str | None:
  """Returns the program, for a majority vote; None without one."""
  programs = versions(text, example, protocol)
  return programs[0].strip() if programs else None


def record(example: dict) -> tuple[str, dict]:
  """Returns (question, the other fields), as generations are saved."""
  return example['question'], {name: example[name] for name in FIELDS}


def recall(question: str, truth: object) -> dict:
  """Returns the example of a saved generation; ValueError if truth has no tests."""
  if isinstance(truth, dict):
    wrong = [x for x, kind in FIELDS.items() if not isinstance(truth.get(x), kind)]
    lists = [*truth.get('tests', ()), *truth.get('entry', ())] if not wrong else []
    if not wrong and truth['tests'] and all(isinstance(x, str) for x in lists):
      return {'question': question, **{name: truth[name] for name in FIELDS}}
  raise ValueError(
    f'ground_truth {str(truth)[:200]!r} is no code problem: it must be an object with '
    f'{", ".join(FIELDS)}'
  )


TASK = Task(
  SOURCE.load, prompt, target, reward, grade, extra, answer, record, recall,
  styles=tuple(TEMPLATES), threads=True, options={'generated': (), 'file': ()},
  terms=('tests', 'solved', 'format'), forms=('format',), unpaid=('bare',),
  ready=sandbox.ready,
)  # fmt: skip
