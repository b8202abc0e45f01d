r"""GSM8K: grade-school word problems whose answer is one number.

Files are the field's, with columns question and answer; the number stands
behind '####'. data.path is a directory with a train and a test file, or one
file that a hash of the question shares among the splits.

'paper' is DMPO reward_func.py:6-88, five terms of at most 4.0 together, and
eval/parse_and_get_acc.py:20-96 for the grade, quirks included: answers are
compared as strings, a format is only seen where reasoning and answer are one
line each, and a completion that ends with </answer> and no line break pays
0.001 a character of all its text. Only the last MAX_TEXT characters are read.
'strict' has the same five terms with numbers compared as numbers, formats that
may have many lines, and no penalty but for text behind the answer.
"""

import decimal
import fractions
import math
import re

from dmpo_jax.tasks import answers
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
NOTE = re.compile(r'<<[^<>]*>>')  # the calculator's, in the field's solutions
MAX_DIGITS = 100  # of a number that is compared exactly
WHOLE = r'[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+'
EXACT = re.compile(rf'-?(?:(?:{WHOLE})(?:\.[0-9]+)?|\.[0-9]+)')
# LaTeX and Markdown that change no number, and what is read in its place.
PLAIN = (
  ('\N{MINUS SIGN}', '-'),
  ('{,}', ','),
  (',\\!', ','),
  ('\\!', ''),
  ('\\$', '$'),
  ('\\%', '%'),
  ('^{\\circ}', ''),
  ('^\\circ', ''),
  *((mark, '') for mark in ('\\(', '\\)', '\\[', '\\]', '**')),
)
THIN = re.compile(r'(?<=[0-9])\\[, ](?=[0-9]{3})')  # a space between thousands
WORDS = re.compile(r'\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}\\]*)\}')
# Behind a number these make another of it.
FACTOR = re.compile(
  r'[!^]|\s*(?:(?i:hundred|thousand|(?:m|b|tr)illion)s?|'
  r'[kKMB]|bn|mn)(?![a-zA-Z])'
)


def load(split, options):
  """Examples {'question', 'answer'}; ValueError without readable files."""
  if not options.path:
    raise ValueError(
      'data.task = gsm8k needs data.path: a directory with train.jsonl and '
      'test.jsonl, or one such file (github.com/openai/grade-school-math, '
      'grade_school_math/data), or its parquet files from the hub; or tfds, '
      'which downloads them'
    )
  return answers.take(
    'gsm8k',
    _read,
    lambda e: answers.split_by(e['question']),
    lambda e: answers.words(e['question']),
    split,
    options,
  )


def _read(path):
  for line, record in answers.read_texts(path, ('question', 'answer')):
    if number(gold(record)) is None:
      raise ValueError(
        f'{path}:{line}: the answer must end with "#### '
        f'number", there is {record["answer"][-60:]!r}'
      )
    yield record


def gold(example):
  """The text behind '####', as it stands; '' if there is none."""
  return example['answer'].partition('####')[2].strip()


def prompt(example, style):
  """The user's message; ValueError for an unknown style."""
  return answers.choose('style', style, TEMPLATES).format(question=example['question'])


def target(example, style):
  """The solution in the wanted format; ValueError for an unknown style."""
  answers.choose('style', style, TEMPLATES)
  if style == 'bare':
    return gold(example)
  steps = NOTE.sub('', example['answer'].partition('####')[0]).strip()
  return f'<reasoning>\n{steps}\n</reasoning>\n<answer>\n{gold(example)}\n</answer>\n'


def number(text):
  """The exact value of a text that holds one number, else None.

  Units, currencies, a closing point and LaTeX's spaces may stand around it;
  thousands may have commas. What computes with it (a root, a power, 'million')
  may not. Fraction or None.
  """
  for latex, plain in PLAIN:
    text = text.replace(latex, plain)
  text = WORDS.sub(r' \1', THIN.sub(',', text)).replace('\\,', ' ')
  text = re.sub('\N{EN DASH}(?=[.0-9])', '-', text)
  found = list(EXACT.finditer(text))
  if len(found) != 1 or len(found[0][0]) > MAX_DIGITS:
    return None
  behind = text[found[0].end() :]
  if '\\' in text or '\N{SQUARE ROOT}' in text or FACTOR.match(behind):
    return None
  # Digits of other kinds, but for those of a unit, square metres.
  if any(
    c.isnumeric() and c not in '0123456789'
    for c in re.sub('(?<=[a-zA-Z])[\u00b2\u00b3]', '', text)
  ):
    return None
  return fractions.Fraction(found[0][0].replace(',', ''))


# ---- rewards


def reward(text, example, protocol):
  """The five terms, 4.0 at most; ValueError for an unknown protocol."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  text = answers.clip(text)
  if protocol == 'paper':
    return _paper(text, example)
  answer = _strict_answer(text)
  return {
    'correctness': 2.0 * _equal(answer, example),
    'int': 0.5 * bool(EXACT.fullmatch(answer)),
    'strict_format': 0.5 * answers.formatted(text, '\n'),
    'soft_format': 0.5 * answers.formatted(text.strip()),
    'xmlcount': sum(0.125 * (text.count(tag) == 1) for tag in answers.TAGS)
    - 0.001 * _behind(text),
  }


def _paper(text, example):
  answer = text.split('<answer>')[-1].split('</answer>')[0].strip()
  return {
    'correctness': 2.0 * (answer == gold(example)),
    'int': 0.5 * answer.isdigit(),
    'strict_format': 0.5 * bool(STRICT.match(text)),
    'soft_format': 0.5 * bool(SOFT.match(text)),
    'xmlcount': _xmlcount(text),
  }


def _xmlcount(text):
  """The reference's count, whose penalty takes the whole text (METHODS: the
  last '</answer>' of most completions has no line break behind it)."""
  score = 0.125 * (text.count('<reasoning>\n') == 1)
  score += 0.125 * (text.count('\n</reasoning>\n') == 1)
  if text.count('\n<answer>\n') == 1:
    score += 0.125 - 0.001 * len(text.split('\n</answer>\n')[-1])
  if text.count('\n</answer>') == 1:
    score += 0.125 - 0.001 * (len(text.split('\n</answer>')[-1]) - 1)
  return score


def _behind(text):
  """Characters behind the last </answer>, white space at the end aside."""
  _, closed, rest = text.rpartition('</answer>')
  return len(rest.strip()) if closed else 0


def _strict_answer(text):
  r"""The last <answer> (what is \boxed in it), else the last \boxed, or ""."""
  answer = answers.last_answer(text)
  if answer is None:
    return (answers.last_boxed(text, strict=True) or '').strip()
  boxed = answers.last_boxed(answer, strict=True)
  return (answer if boxed is None else boxed).strip()


def _equal(answer, example):
  value = number(answer)
  return value is not None and value == number(gold(example))


# ---- grades


def grade(text, example, protocol):
  """1.0 if the answer is right, else 0.0; ValueError as for `reward`."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  text = answers.clip(text)
  if protocol == 'strict':
    return float(_equal(_strict_answer(text), example))
  return float(_graded(text) == float(number(gold(example))))


def _graded(text):
  r"""The evaluation's number: the first \boxed that has one, else that of the
  first <answer>; None without."""
  for content in map(str.strip, BOXED.findall(text)):
    if content.strip('.'):
      value = _float(content, 0)
      if value is not None:
        return value
  return _float((answers.first_answer(text) or '').strip(), -1)


def _float(text, place):
  """`text` as Python reads it, else the number at `place` in it, or None."""
  try:
    return float(text)
  except ValueError:
    found = NUMBER.findall(text)
    return float(found[place]) if found else None


def extra(text, example):
  """{'well_formed'}: 1.0 if the strict answer is one number."""
  del example
  value = number(_strict_answer(answers.clip(text)))
  return {'well_formed': float(value is not None)}


def answer(text, example, protocol):
  """What a majority vote counts: the number as a string; None without one."""
  del example
  text = answers.clip(text)
  value = number(_strict_answer(text)) if protocol == 'strict' else _graded(text)
  return None if value is None else str(value)


def record(example):
  """(question, the number as a float)."""
  return example['question'], float(number(gold(example)))


def recall(question, truth):
  """The example of a saved generation; ValueError if truth is no number."""
  if (
    isinstance(truth, (int, float))
    and not isinstance(truth, bool)
    and (math.isfinite(truth))
  ):
    exact = (
      int(truth) if truth == int(truth) else f'{decimal.Decimal(repr(truth)):f}'
    )  # 1e-07 is 0.0000001
    example = {'question': question, 'answer': f'#### {exact}'}
    if number(gold(example)) is not None:
      return example
  raise ValueError(f'ground_truth {truth!r} is not a number')


TASK = Task(
  load=load,
  prompt=prompt,
  target=target,
  reward=reward,
  grade=grade,
  extra=extra,
  answer=answer,
  record=record,
  recall=recall,
  styles=tuple(TEMPLATES),
)
