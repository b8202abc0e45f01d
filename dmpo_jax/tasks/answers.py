"""Finds answers in completions, and names the choices that all tasks share.

Every search is one pass over at most MAX_TEXT characters, so no completion can
make a reward slow.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MAX_TEXT = 20000  # characters; of a longer text only the end is read
PROTOCOLS = ('paper', 'strict')
STYLES = ('bare', 'chat')  # every task has these; Task.styles lists all it has
PREFILL = {'eval': '<reasoning>'}  # style -> how the assistant's answer begins
# Tokens that end a text: those of LLaDA, Dream, SDAR and our character tokenizer.
ENDS = re.compile(r'<\|(?:eot_id|endoftext|im_end|eos)\|>')
SPECIAL = re.compile(r'(?:<\|\w{1,40}\|>|<(?:pad|eos|mask|/?s)>|\[(?:PAD|MASK)\])\s*\Z')
TAGS = ('<reasoning>', '</reasoning>', '<answer>', '</answer>')


def choose(what: str, value: Any, allowed: Iterable) -> Any:
  """Returns `value`, or `allowed[value]` of a dict; ValueError lists the choices."""
  if value not in allowed:
    raise ValueError(f'{what} {value!r} is not one of {", ".join(allowed)}')
  return allowed[value] if isinstance(allowed, Mapping) else value


def clip(text: str) -> str:
  """Returns the last MAX_TEXT characters, because answers stand at the end."""
  return text[-MAX_TEXT:]


def first_answer(text: str) -> str | None:
  """Returns the content of the first <answer>...</answer>, or None."""
  return next(_answers(clip(text)), None)


def last_answer(text: str) -> str | None:
  """Returns the content of the last <answer>...</answer>, or None."""
  return [None, *_answers(clip(text))][-1]


def _answers(text: str) -> Iterator[str]:
  """Yields what re.findall(r'<answer>(.*?)</answer>', DOTALL) finds, in one pass."""
  end = 0
  while True:
    start = text.find('<answer>', end)
    stop = text.find('</answer>', start)
    if start < 0 or stop < 0:
      return
    yield text[start + len('<answer>') : stop]
    end = stop + len('</answer>')


def tags_so_far(text: str) -> float:
  """Returns 1.0 if an unfinished text has TAGS in their order, each once, else 0.0."""
  found = re.findall('|'.join(map(re.escape, TAGS)), clip(text))
  # With the prompt's prefill an answer may begin inside of the first tag.
  start = 0 if found[:1] != [TAGS[1]] else 1
  return float(tuple(found) == TAGS[start : start + len(found)])


def tagged(steps: str, answer: str, style: str) -> str:
  """Returns reasoning and answer between their tags, without the style's PREFILL."""
  text = f'<reasoning>\n{steps}\n</reasoning>\n<answer>\n{answer}\n</answer>\n'
  return text.removeprefix(PREFILL.get(style, ''))


def closing(style: str) -> str:
  """Returns the end of the reasoning that the style's PREFILL begins, or ''."""
  return '\n</reasoning>\n' if style in PREFILL else ''


def without_specials(text: str) -> str:
  """Returns a saved text up to its first end token, less special tokens at its end."""
  text = ENDS.split(text, maxsplit=1)[0]
  while found := SPECIAL.search(text[-64:]):
    text = text[: -len(found[0])]
  return text


def answer_or_text(text: str) -> str:
  """Returns the last <answer>, else the whole text, without white space around it."""
  answer = last_answer(text)
  return (clip(text) if answer is None else answer).strip()


def last_boxed(text: str, strict: bool = False) -> str | None:
  r"""Returns the content of the last \boxed{...} with balanced braces, or None.

  As in the field's helper (DMPO eval/parser_helper.py:14-41), '\boxed ' with a
  space takes precedence wherever it stands and reaches to the next '$'. With
  `strict` it does so only if it is the last one.
  """
  text = clip(text)
  start = text.rfind('\\boxed ' if not strict and '\\boxed ' in text else '\\boxed')
  if start < 0:
    return None
  at = start + len('\\boxed')
  if strict and text[at:].lstrip().startswith('{'):
    return braced(text, text.index('{', at))
  if text.startswith(' ', at):
    return text[at + 1 :].partition('$')[0]
  return braced(text, at)


def braced(text: str, at: int) -> str | None:
  """Returns the text from the brace at `at` to its closing brace, or None."""
  if text[at : at + 1] != '{':
    return None
  depth = 0
  for end in range(at, len(text)):
    depth += (text[end] == '{') - (text[end] == '}')
    if depth == 0:
      return text[at + 1 : end]
  return None


def formatted(text: str, end: str = '') -> bool:
  r"""Returns whether `text` is <reasoning>..</reasoning> <answer>..</answer>.

  Each tag must stand exactly once, and with end='\n' on a line of its own.
  """
  if any(text.count(tag) != 1 for tag in TAGS):
    return False
  opening, reasoned, answer, closing = TAGS
  _, _, rest = text.partition(opening + end)
  rest, _, after = rest.partition(end + reasoned)
  between, _, content = after.partition(answer + end)
  _, closed, behind = content.partition(end + closing)
  return (
    text.startswith(opening + end)
    and bool(closed)
    and behind == end
    and not between.strip()
    and between[: len(end)] == end
  )
