r"""Any data set as prompts: data.task = prompts, or prompts:VERIFIER.

data.path is a file (JSONL, parquet, CSV), a directory with a train and a test file, a
folder that TFDS has prepared, or a name on the Hugging Face hub (OWNER/NAME or
OWNER/NAME:SUBSET). The prompt is a text, or messages of one user's turn. Columns have
names; reward_model.ground_truth is a field of a column. All other columns stay in the
problem, for templates and reward functions.

The verifiers, each of the answer in the last <answer>, else of the whole text, and of
its last \boxed if it has one:

number  one number, as task gsm8k reads it; the column may end in '#### number'
math    a LaTeX expression, as task math compares it; the column may hold a \boxed
exact   the same text but for white space
regex   the column is a pattern that the whole answer must match
(none)  no verifier: reward.file pays and grades

Protocol 'paper' differs where the rules of gsm8k and math differ. `exact` and `regex`
have the same rules in both.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dmpo_jax.rules import nearest
from dmpo_jax.tasks import answers, datasets, gsm8k, math, symbolic
from dmpo_jax.types import Task, TaskOptions

OPTIONS = {'generated': (), 'file': ('prompt_column', 'answer_column')}
VERIFIERS = ('number', 'math', 'exact', 'regex')
CHOICES = ('prompts', *(f'prompts:{name}' for name in VERIFIERS))
PROMPTS = ('prompt', 'question', 'problem', 'instruction', 'query', 'input')
ANSWERS = (
  'answer', 'solution', 'ground_truth', 'reward_model.ground_truth', 'response',
  'completion', 'target', 'output', 'label',
)  # fmt: skip
ROLES = ('system', 'user')
CHAT = """{prompt}

First think between <reasoning> and </reasoning>. Then write just the final answer \
between <answer> and </answer>."""
TEMPLATES = {
  'bare': '{prompt}',
  'chat': CHAT,
  'boxed': gsm8k.TEMPLATES['boxed'].replace('{question}', '{prompt}'),
}
TERM = 'correct'
ORIGIN = 'any data set with a column of prompts, such as openai/gsm8k:main'


def task_of(verifier: str, field: str) -> Task:
  """Returns the task prompts:VERIFIER; ValueError if there is no such verifier."""
  if verifier and (wrong := nearest(field, f'prompts:{verifier}', CHOICES)):
    raise ValueError(wrong[0])
  return _task(verifier)


@functools.cache
def _task(verifier: str) -> Task:
  verdict = functools.partial(grade, verifier)
  return Task(
    functools.partial(load, verifier), prompt, functools.partial(target, verifier),
    functools.partial(reward, verifier), verdict,
    record=record, recall=functools.partial(recall, verifier),
    styles=tuple(TEMPLATES), terms=(TERM,) if verifier else (),
    options=OPTIONS, best=1.0 if verifier else 0.0,
    threads=verifier in ('math', 'regex'), graded=bool(verifier),
    unpaid=('bare',) if verifier == 'number' else (),
  )  # fmt: skip


# --- problems


def load(verifier: str, split: str, options: TaskOptions) -> list[dict]:
  """Returns examples: the data's columns, with 'prompt' and 'answer' as texts.

  ValueError names the file, the line and the column of what cannot be used.
  """
  read = functools.partial(_read, verifier, options)
  name = f'prompts:{verifier}' if verifier else 'prompts'
  source = datasets.word_problems(name, ORIGIN, read, 'prompt')
  return source.load(split, options)


def _read(verifier: str, options: TaskOptions, path: str) -> Iterator[dict]:
  for line, row in datasets.read_rows(path):
    where = f'{path}:{line}'
    text = _text(_pick(row, 'prompt', options.prompt_column, PROMPTS, where), where)
    if verifier or options.answer_column:
      answer = _pick(row, 'answer', options.answer_column, ANSWERS, where)
    else:
      answer = next((x for x in map(_at(row), ANSWERS) if x is not None), '')
    said = _truth(verifier, answer, where)
    yield {**datasets.plain(row), 'prompt': text, 'answer': said}


def _at(row: Mapping[str, Any]) -> Any:
  """Returns a function: column, or column.field -> its value; None if it is absent."""

  def value(name: str) -> Any:
    if name in row:
      return row[name]
    found: Any = row
    for part in name.split('.'):
      found = found.get(part) if isinstance(found, Mapping) else None
    return found

  return value


def _pick(
  row: Mapping[str, Any], kind: str, column: str, usual: tuple[str, ...], where: str
) -> Any:
  """Returns the value of a column; without a name, of the first usual one."""
  names = (column,) if column else usual
  for value in map(_at(row), names):
    if value is not None:
      return value
  wanted = f'column {column}' if column else f'none of the columns {", ".join(names)}'
  lacks = 'is not there or is empty' if column else 'is there'
  raise ValueError(
    f'{where}: {wanted} {lacks}; the columns are {", ".join(row)}: set '
    f'data.{kind}_column'
  )


def _text(value: Any, where: str) -> str:
  """Returns a prompt: a text, or the messages of one turn; ValueError otherwise."""
  if isinstance(value, list):
    turns = [m for m in value if isinstance(m, Mapping) and m.get('role') in ROLES]
    users = [m for m in turns if m['role'] == 'user']
    if len(turns) != len(value) or len(users) != 1:
      raise ValueError(
        f'{where}: the messages of a prompt must be one of user, after one of system '
        'or none: the answer to a longer chat cannot be sampled'
      )
    value = '\n\n'.join(str(m.get('content', '')) for m in turns)
  if not isinstance(value, str) or not value.strip():
    raise ValueError(
      f'{where}: the prompt must be a text, or messages; it is {value!r}: set '
      'data.prompt_column'
    )
  return datasets.whole(where, 'the prompt', value)


def _truth(verifier: str, value: Any, where: str) -> str:
  """Returns an answer as text; ValueError if the verifier cannot compare with it."""
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  if isinstance(value, bool) or not isinstance(value, str | int | float):
    raise ValueError(
      f'{where}: the answer must be a text or a number, it is {value!r}: set '
      'data.answer_column'
    )
  text = str(value).strip()
  if not verifier:
    return text
  what = ''
  if verifier == 'number' and gsm8k.number(gold(verifier, text)) is None:
    what = 'is not one number'
  elif verifier == 'math' and '\\boxed' in text and answers.last_boxed(text) is None:
    what = 'has a \\boxed that does not close'
  elif not gold(verifier, text):
    what = 'is empty'
  elif verifier == 'regex':
    try:
      re.compile(text)
    except re.error as error:
      what = f'is no regular expression ({error})'
  if what:
    raise ValueError(f'{where}: the answer {text[-60:]!r} {what}')
  return text


def gold(verifier: str, text: str) -> str:
  r"""Returns what is compared: the text behind '####', or in the last \boxed."""
  if verifier == 'number' and '####' in text:
    return text.rpartition('####')[2].strip()
  boxed = answers.last_boxed(text) if verifier in ('number', 'math') else None
  return text if boxed is None else boxed


def prompt(example: dict, style: str) -> str:
  """Returns the user's message; ValueError for an unknown style."""
  template = answers.choose('style', style, TEMPLATES)
  return template.replace('{prompt}', example['prompt'])


def target(verifier: str, example: dict, style: str) -> str:
  """Returns a correct completion for supervised training.

  ValueError if the data has none: without an answer, and for a pattern.
  """
  answers.choose('style', style, TEMPLATES)
  text = example['answer']
  if verifier == 'regex' or not text:
    raise ValueError(
      'data.task = prompts has no targets for sft.steps: '
      + ('an answer is a pattern' if text else 'the data has no column of answers')
    )
  if not verifier:
    return text
  truth = gold(verifier, text)
  boxed = f'\\boxed{{{truth}}}'
  said = boxed if verifier == 'math' else truth
  steps = '' if truth == text else gsm8k.NOTE.sub('', text.partition('####')[0]).strip()
  if style == 'bare':
    return said
  if style == 'boxed':
    return steps if '\\boxed' in steps else f'{steps}\n{boxed}'.lstrip()
  return answers.tagged(steps, said, style) if steps else f'<answer>\n{said}\n</answer>'


# --- grades


def grade(verifier: str, text: str, example: dict, protocol: str) -> float:
  """Returns 1.0 if the answer is right, else 0.0; ValueError: unknown protocol."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  truth = gold(verifier, example.get('answer', ''))
  if verifier == 'number':
    return gsm8k.grade(text, {'answer': f'#### {truth}'}, protocol)
  if verifier == 'math':
    return math.grade(text, {'solution': f'\\boxed{{{truth}}}'}, protocol)
  said = answers.answer_or_text(text)
  boxed = None if '\\boxed' in truth else answers.last_boxed(said, strict=True)
  said = said if boxed is None else boxed.strip()
  if verifier == 'exact':
    return float(said.split() == truth.split())
  if verifier == 'regex':
    return symbolic.decide(matches, said, truth)
  return 0.0  # replaced by the grade of reward.file


def matches(text: str, pattern: str) -> float:
  """Returns whether a pattern fits a text; runs in a worker, for some never end."""
  return float(re.fullmatch(pattern, text) is not None)


def reward(verifier: str, text: str, example: dict, protocol: str) -> dict[str, float]:
  """Returns {'correct': the grade}; {} without a verifier."""
  return {TERM: grade(verifier, text, example, protocol)} if verifier else {}


def record(example: dict) -> tuple[str, str]:
  """Returns (prompt, answer), as generations are saved."""
  return example['prompt'], example.get('answer', '')


def recall(verifier: str, question: str, truth: object) -> dict:
  """Returns the example of a saved generation; ValueError if the truth is none."""
  return {'prompt': question, 'answer': _truth(verifier, truth, 'ground_truth')}
