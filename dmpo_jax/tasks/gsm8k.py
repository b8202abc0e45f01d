r"""GSM8K: grade-school word problems whose answer is one number.

Files have the field's columns, question and answer. The number stands after
'####'.

'paper' follows DMPO reward_func.py:6-88 for the reward (five terms, at most 4.0 in
sum) and eval/parse_and_get_acc.py:20-96 for the grade, quirks included. Answers are
compared as strings. A format counts only if reasoning and answer are one line each.
A completion that ends with </answer> and no line break loses 0.001 per character
of its whole text. Only the last MAX_TEXT characters are read.
'strict' has the same five terms. It compares numbers as numbers, accepts formats of
many lines, and penalises only text after the answer. Without <answer> and \boxed the
whole text is the answer, as style 'bare' asks. `number` is the grammar of an answer:
one number and its unit, and nothing that denies, bounds or changes it. A number that
is given as approximate, and an hour such as 2:00 pm, count as that number.
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
MAX_ANSWER = 300  # characters of an answer that is read
_SPELLINGS = (  # (pattern, replacement), in this order; none changes the value
  (r'\\(?=[$%])|\\[!()\[\]]|\^\{?\\circ\}?|\*\*|[\u200b-\u200d\u2060\ufeff]', ''),
  (r'\A\s*([*_])([^*_]+)\1\s*\Z', r'\2'),
  (r'\b(?:USD|US(?=\$)|EUR|GBP|Rs\.?)(?=\s*[$0-9])', ''),
  (r'\\(?:left|right|displaystyle)(?![a-z])|\s*</answer\Z', ''),
  (r'\\?(?:text\w*|math\w+|mbox|emph|underline|boxed)\{([^{}\\]*)\}', r' \1'),
  (r'\\approx(?![a-z])', '\u2248'),
  (r"(?<=[0-9])(?:\{,\}|\\[ ,;:]|[ ~'\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))", ','),
  (r'\\[ ,;:]|~(?=[^\W\d_])|\\q?quad(?![a-z])', ' '),
  (r'(?<=[a-zA-Z])(?:\^?\{?[23]\}?(?![0-9])|[\u00b2\u00b3])', ''),  # of a unit: cm^2
  (r'(?<![0-9:])([1-9]|1[0-9]|2[0-4]):00(?![0-9:])', r'\1'),
  ('\u2212', '-'),
  (r'\u2013(?=[.0-9])', '-'),
  (r'-\s*([$\u00a3\u20ac])', r'\1-'),
  ('[{}]', ''),
)
SPELLINGS = [(re.compile(old), new) for old, new in _SPELLINGS]
# What may stand before the number: a currency, or words that end in one of these.
LEAD = re.compile(
  r"(?:(?:[^\W\d][\w\s,.'()]*)?(?:[:=\u2248~]|\s\u2013|\b(?:is|are|was|were|be|equals?|"
  r'has|have|had|gets?|needs?|makes?|costs?|earns?|earned|spent|paid|total|answer|'
  r'takes?|took|gives?|gave|saves?|saved|spends?|pays?|made|buys?|bought|'
  r'sold|sells?|eats?|ate|uses?|used|reads?|runs?|ran|drove|weighs?|owes?|received?|'
  r'exactly|only|just|so|thus|hence|therefore|about|around|approximately|roughly)))?'
  r"""[\s,([#"'`$\u00a3\u00a5\u20a0-\u20bf+]*""",
  re.IGNORECASE,
)
# What may stand behind it: words and signs of units. Letters that touch the number
# must be a unit, since 2x and 3pi are products.
UNIT = re.compile(
  r'(?!\s*[-/]?\s*(?:[kKMBxyznie\u03c0]|[bm]n|pi|mil|grand|gross|score|couple|lakhs?|'
  r'crores?)(?![^\W\d_]))(?!\s*[-\u2212]+\s*\Z)'
  r'(?:(?:[mghslL]|[ckm]m|[km]?g|m[lL]|lbs?|oz|ft|in|yd|mi|hrs?|min|sec|mph|gal|[ap]m|'
  r'[AP]M|st|nd|rd|th|[^\W\d_]{4,})(?![^\W\d_]))?(?![^\W\d_])[^\d\\+*=<>^!?_#]*'
)
# Words that deny an answer, leave it open, bound it or change its value.
SPOILS = re.compile(
  r"n['\u2019]t\b|\b(?:not?|never|none|neither|nor|or|but|except|maybe|perhaps|probably|"
  r'possibly|might|could|may be|cannot|unsure|uncertain|unlikely|unknown|wrong|false|'
  r'incorrect|impossible|invalid|think|guess\w*|doubt\w*|hardly|barely|nearly|almost|'
  r'at (?:least|most)|hundreds?|thousands?|(?:m|b|tr)illions?|dozens?|half|halves|'
  r'(?:third|fourth|fifth|sixth|eighth|tenth|hundredth|thousandth)s|'
  r'(?:and|less) (?:an?|one)|too (?:few|many|much|little)|'
  r'two|three|four|five|six|seven|eight|nine|ten|twenty|thirty|forty|fifty|sixty|seventy|'
  r'eighty|ninety|plus|minus|negative|divided|squared|cubed|doubled|tripled|halved|'
  r'twice|powers?|root|sqrt|log|factorial)\b',
  re.IGNORECASE,
)
DENIED = re.compile(rf'(?:{SPOILS.pattern})[\s$(\[\\]*\Z', re.IGNORECASE)


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
  """Returns the solution as the prompt asks for it; ValueError: unknown style."""
  answers.choose('style', style, TEMPLATES)
  if style == 'bare':
    return gold(example)
  steps = NOTE.sub('', example['answer'].partition('####')[0]).strip()
  boxed = f'\\boxed{{{gold(example)}}}'
  if style == 'boxed':
    return f'{steps}\n{boxed}'
  return answers.tagged(steps, boxed if style == 'eval' else gold(example), style)


def number(text: str) -> fractions.Fraction | None:
  """Returns the exact value of a text that holds one number, else None.

  Units, currencies, a closing point and LaTeX spaces may stand around the number,
  commas or spaces between thousands, and a name or a verb before it. What denies,
  bounds or changes it (not, at least, a root, a power, 'million') may not.
  """
  if len(text) > MAX_ANSWER:
    return None
  for old, new in SPELLINGS:
    text = old.sub(new, text)
  found = list(EXACT.finditer(text))
  if len(found) != 1 or len(found[0][0]) > MAX_DIGITS:
    return None
  before, behind = text[: found[0].start()], text[found[0].end() :]
  if not (LEAD.fullmatch(before) and UNIT.fullmatch(behind)):
    return None
  around = f'{before} {behind}'
  if SPOILS.search(around) or any(map(str.isnumeric, around)):
    return None
  return fractions.Fraction(found[0][0].replace(',', ''))


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
  r"""Returns the \boxed in the last <answer>, else that answer; without an <answer>
  the last \boxed, else the whole text. '' for a \boxed that a word before it denies."""
  answer = answers.last_answer(text)
  text = (text if answer is None else answer.rpartition('<answer>')[2]).strip()
  boxed = answers.last_boxed(text, strict=True)
  if boxed is None:
    return text
  at = text.rfind('\\boxed')
  return '' if DENIED.search(text[max(0, at - 40) : at]) else boxed.strip()


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
  if isinstance(value, str) and (exact := number(value)) is not None:
    value = float(exact)
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
  unpaid=('bare', 'eval', 'boxed'), forms=('soft_format',), reasons=True,
)  # fmt: skip
