r"""GSM8K: grade-school word problems whose answer is one number.

Files have the field's columns, question and answer. The number stands after
'####'.

'paper' follows DMPO reward_func.py:6-88 for the reward (five terms, at most 4.0 in
sum) and eval/parse_and_get_acc.py:20-96 for the grade, quirks included. Answers are
compared as strings. A format counts only if reasoning and answer are one line each.
A completion that ends with </answer> and no line break loses 0.001 per character
of its whole text. Only the last MAX_TEXT characters are read.
'strict' has the same five terms. It compares numbers as numbers, accepts formats of
many lines, and penalises only text after the answer.
"""

import decimal
import fractions
import math
import re
from collections.abc import Iterator

from dmpo_jax.tasks import answers, datasets
from dmpo_jax.types import Task

CHAT = """Solve the problem step by step. Think between <reasoning> and \
</reasoning>, then write just the number that is asked for between <answer> \
and </answer>:

<reasoning>
...
</reasoning>
<answer>
...
</answer>

{question}"""

EVAL = """You are an expert in mathematics. Solve the problem step by step, \
and put the final answer in \\boxed{{}}. Answer in this form:

<reasoning>
your reasoning
</reasoning>
<answer>
\\boxed{{...}}
</answer>

{question}"""
TEMPLATES = {
  'bare': '{question}',
  'chat': CHAT,
  'eval': EVAL,
  'boxed': '{question}\nPlease reason step by step, and put your '
  'final answer within \\boxed{{}}.',
}

STRICT = re.compile(
  r'^<reasoning>\n.*?\n</reasoning>\n'
  r'<answer>\n.*?\n</answer>\n$'
)
SOFT = re.compile(r'<reasoning>.*?</reasoning>\s*<answer>.*?</answer>')
BOXED = re.compile(r'\\boxed{([^}\n]*+)}')  # possessive: no backtracking
NUMBER = re.compile(r'-?\d+\.?\d*')
NOTE = re.compile(r'<<[^<>]*>>')  # calculator notes in the field's solutions
MAX_DIGITS = 100  # of a number that is compared exactly
WHOLE = r'[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+'
EXACT = re.compile(rf'-?(?:(?:{WHOLE})(?:\.[0-9]+)?|\.[0-9]+)')
REMOVED = ('\\!', '^{\\circ}', '^\\circ', '\\(', '\\)', '\\[', '\\]', '**')  # no value
THIN = re.compile(r'(?<=[0-9])\\[, ](?=[0-9]{3})')  # a thin space between thousands
WORDS = re.compile(r'\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}\\]*)\}')
# Any of these behind a number changes its value.
FACTOR = re.compile(
  r'[!^]|\s*(?:(?i:hundred|thousand|(?:m|b|tr)illion)s?|'
  r'[kKMB]|bn|mn)(?![a-zA-Z])'
)


def _read(path: str) -> Iterator[dict]:
  for line, record in datasets.read_texts(path, ('question', 'answer')):
    if number(gold(record)) is None:
      raise ValueError(
        f'{path}:{line}: the answer must end with "#### number", '
        f'it ends with {record["answer"][-60:]!r}'
      )
    yield record


SOURCE = datasets.word_problems(
  'gsm8k',
  'github.com/openai/grade-school-math, grade_school_math/data (train.jsonl and '
  'test.jsonl; tfds downloads them)',
  _read,
  'question',
)


def gold(example: dict) -> str:
  """Returns the text after '####' as it stands, or ''."""
  return example['answer'].partition('####')[2].strip()


def truth(example: dict) -> fractions.Fraction:
  """Returns the number after '####', which the readers have checked."""
  value = number(gold(example))
  assert value is not None, example
  return value


def prompt(example: dict, style: str) -> str:
  """Returns the user's message; ValueError for an unknown style."""
  return answers.choose('style', style, TEMPLATES).format(question=example['question'])


def target(example: dict, style: str) -> str:
  """Returns the solution in the wanted format; ValueError for an unknown style."""
  answers.choose('style', style, TEMPLATES)
  if style == 'bare':
    return gold(example)
  steps = NOTE.sub('', example['answer'].partition('####')[0]).strip()
  return f'<reasoning>\n{steps}\n</reasoning>\n<answer>\n{gold(example)}\n</answer>\n'


def number(text: str) -> fractions.Fraction | None:
  """Returns the exact value of a text that holds one number, else None.

  Units, currencies, a closing point and LaTeX spaces may stand around the number,
  and commas between thousands. Anything that computes with it (a root, a power,
  'million') may not.
  """
  text = text.replace('\N{MINUS SIGN}', '-').replace('{,}', ',').replace(',\\!', ',')
  text = text.replace('\\$', '$').replace('\\%', '%')
  for removed in REMOVED:
    text = text.replace(removed, '')
  text = WORDS.sub(r' \1', THIN.sub(',', text)).replace('\\,', ' ')
  text = re.sub('\N{EN DASH}(?=[.0-9])', '-', text)
  matches = list(EXACT.finditer(text))
  if len(matches) != 1 or len(matches[0][0]) > MAX_DIGITS:
    return None
  behind = text[matches[0].end() :]
  if '\\' in text or '\N{SQUARE ROOT}' in text or FACTOR.match(behind):
    return None
  # Other numerals change the value, but not the square of a unit such as m².
  without_units = re.sub('(?<=[a-zA-Z])[\u00b2\u00b3]', '', text)
  if any(c.isnumeric() and c not in '0123456789' for c in without_units):
    return None
  return fractions.Fraction(matches[0][0].replace(',', ''))


# ---- rewards


def reward(text: str, example: dict, protocol: str) -> dict[str, float]:
  """Returns the five terms, at most 4.0 in sum; ValueError: unknown protocol."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  text = answers.clip(text)
  if protocol == 'paper':
    answer = text.split('<answer>')[-1].split('</answer>')[0].strip()
    right, whole = answer == gold(example), answer.isdigit()
    lines, loose = STRICT.match(text), SOFT.match(text)
    tags = _xmlcount(text)
  else:
    answer = _strict_answer(text)
    right, whole = _equal(answer, example), EXACT.fullmatch(answer)
    lines, loose = answers.formatted(text, '\n'), answers.formatted(text.strip())
    tags = sum(0.125 * (text.count(tag) == 1) for tag in answers.TAGS)
    _, closed, behind = text.rpartition('</answer>')
    tags -= 0.001 * len(behind.strip()) * bool(closed)
  return {
    'correctness': 2.0 * right,
    'int': 0.5 * bool(whole),
    'strict_format': 0.5 * bool(lines),
    'soft_format': 0.5 * bool(loose),
    'xmlcount': tags,
  }


def _xmlcount(text: str) -> float:
  """Returns the reference's count of tags, whose penalty takes the whole text.

  The last '</answer>' of most completions has no line break after it (METHODS).
  """
  score = 0.125 * (text.count('<reasoning>\n') == 1)
  score += 0.125 * (text.count('\n</reasoning>\n') == 1)
  if text.count('\n<answer>\n') == 1:
    score += 0.125 - 0.001 * len(text.split('\n</answer>\n')[-1])
  if text.count('\n</answer>') == 1:
    score += 0.125 - 0.001 * (len(text.split('\n</answer>')[-1]) - 1)
  return score


def _strict_answer(text: str) -> str:
  r"""Returns the last <answer> (the \boxed in it), else the last \boxed, or ''."""
  answer = answers.last_answer(text)
  boxed = answers.last_boxed(text if answer is None else answer, strict=True)
  return (boxed if boxed is not None else answer or '').strip()


def _equal(answer: str, example: dict) -> bool:
  value = number(answer)
  return value is not None and value == number(gold(example))


# ---- grades


def grade(text: str, example: dict, protocol: str) -> float:
  """Returns 1.0 if the answer is right, else 0.0; ValueError as for `reward`."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  text = answers.clip(text)
  if protocol == 'strict':
    return float(_equal(_strict_answer(text), example))
  return float(_graded(text) == float(truth(example)))


def _graded(text: str) -> float | None:
  r"""Returns the evaluation's number: the first \boxed that has one, else that of the
  first <answer>, or None."""
  for content in map(str.strip, BOXED.findall(text)):
    if content.strip('.'):
      value = _float(content, 0)
      if value is not None:
        return value
  return _float((answers.first_answer(text) or '').strip(), -1)


def _float(text: str, index: int) -> float | None:
  """Returns `text` as Python reads it, else the number at `index` in it, or None."""
  try:
    return float(text)
  except ValueError:
    matches = NUMBER.findall(text)
    return float(matches[index]) if matches else None


def extra(text: str, example: dict) -> dict[str, float]:
  """Returns {'well_formed'}: 1.0 if the strict answer is one number."""
  del example
  value = number(_strict_answer(answers.clip(text)))
  return {'well_formed': float(value is not None)}


def answer(text: str, example: dict, protocol: str) -> str | None:
  """Returns the number as a string, for a majority vote; None without a number."""
  del example
  text = answers.clip(text)
  value = number(_strict_answer(text)) if protocol == 'strict' else _graded(text)
  return None if value is None else str(value)


def record(example: dict) -> tuple[str, float]:
  """Returns (question, the number as a float), as generations are saved."""
  return example['question'], float(truth(example))


def recall(question: str, value: object) -> dict:
  """Returns the example of a saved generation; ValueError if value is no number."""
  if isinstance(value, int | float) and type(value) is not bool:
    if math.isfinite(value):
      value = int(value) if value == int(value) else value
      exact = f'{decimal.Decimal(repr(value)):f}'  # 1e-07 is 0.0000001
      example = {'question': question, 'answer': f'#### {exact}'}
      if number(gold(example)) is not None:
        return example
  raise ValueError(f'ground_truth {value!r} is not a number')


TASK = Task(
  SOURCE.load, prompt, target, reward, grade, extra, answer, record, recall,
  styles=tuple(TEMPLATES), options={'generated': (), 'file': ()},
  terms=('correctness', 'int', 'strict_format', 'soft_format', 'xmlcount'),
)  # fmt: skip
