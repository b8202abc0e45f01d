"""VerIPO's verifier: is a graded completion formed, consistent, looped or cut?

Pure host code that works with any task. What is a right answer is the grade's business;
here is what else makes a completion worth learning from. `consistent` reads answers as
the reward does, so it is no independent judge of the reasoning.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dmpo_jax.tasks.answers import TAGS, clip
from dmpo_jax.types import Task

GRAM = 8  # tokens of a piece that may come again
LOOPED = 0.5  # share of pieces that came before, above which a text is looped
NUMBER = re.compile(r'-?\d[\d,]*(?:\.\d+)?')


class Verdict(NamedTuple):
  """What is right and wrong with a completion."""

  right: bool  # the full grade
  formed: bool  # as the prompt asks
  consistent: bool  # the reasoning ends with the answer
  looped: bool  # it repeats itself
  cut: bool  # no token ends it, although there is room for one

  @property
  def clean(self) -> bool:
    """Whether it is right, and nothing else is wrong with it."""
    good = self.right and self.formed and self.consistent
    return good and not (self.looped or self.cut)

  @property
  def kind(self) -> str:
    """Returns clean, unclean (right, but not clean) or wrong."""
    return 'clean' if self.clean else 'unclean' if self.right else 'wrong'


class Verifier:
  """Judges the completions of a task.

  protocol, style: of the run's data; prefill: how answers begin in its prompts.
  """

  def __init__(self, task: Task, protocol: str, style: str = 'bare', prefill: str = ''):
    self.task, self.protocol = task, protocol
    self.style, self.prefill = style, prefill
    self.asked = functools.lru_cache(maxsize=1)(self._asked)  # rows come by problem

  def verdict(
    self,
    example: dict,
    text: str,
    ids: Sequence[int],
    ended: bool,
    graded: tuple[float, Mapping[str, float]],
  ) -> Verdict:
    """Judges a completion: its text, its tokens before the end, and whether it ends.

    ended: True, too, where a true answer would leave no room for an end. graded: its
    grade and its reward terms.
    """
    grade, terms = graded
    right = grade >= 1
    return Verdict(
      right,
      right and self.formed(example, text, terms),
      right and self.consistent(example, text),
      repeated(ids) > LOOPED,
      not ended,
    )

  def answer(self, text: str, example: dict) -> str | None:
    return self.task.answer(text, example, self.protocol)

  def formed(self, example: dict, text: str, terms: Mapping[str, float]) -> bool:
    """Returns whether an answer is found, and the format is paid as a true answer's.

    Task.forms names the terms of the format. Where the task writes no true answer in
    this style, they must be paid at all.
    """
    if self.answer(text, example) is None:
      return False
    asked = self.asked(_Key(example)) if self.task.forms else {}
    return all(
      terms[name] >= asked[name] if name in asked else terms[name] > 0
      for name in self.task.forms
      if name in terms
    )

  def _asked(self, key: '_Key') -> dict[str, float]:
    """Returns the reward terms of a true answer in this style; {} if there is none."""
    target = self.target(key.example)
    if target is None:
      return {}
    return self.task.reward(self.prefill + target, key.example, self.protocol)

  def target(self, example: dict) -> str | None:
    """Returns a true answer in this style; None where the task writes none."""
    with contextlib.suppress(ValueError):
      return self.task.target(example, self.style)
    return None

  def consistent(self, example: dict, text: str) -> bool:
    """Returns whether the last result of the reasoning is the answer.

    True where the task has no reasoning (Task.reasons), or the text has none.
    """
    if not self.task.reasons:
      return True
    final = self.answer(text, example)
    found = concluded(text, lambda piece: self.answer(piece, example))
    return found is None or found == final


class _Key:
  """Compares an example by identity, for the cache."""

  def __init__(self, example: dict):
    self.example = example

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, _Key) and self.example is other.example

  def __hash__(self) -> int:
    return id(self.example)


def repeated(ids: Sequence[int]) -> float:
  """Returns the share of pieces of GRAM tokens that stand earlier in the text, too."""
  count = len(ids) - GRAM + 1
  if count < 1:
    return 0.0
  return 1 - len({tuple(ids[i : i + GRAM]) for i in range(count)}) / count


def reasoning(text: str) -> str:
  """Returns what stands before the answer, without tags; '' if nothing does."""
  text = clip(text)
  for mark in ('<answer>', '\\boxed'):
    before, found, _ = text.rpartition(mark)
    if found:
      break
  else:
    return ''
  for tag in TAGS:
    before = before.replace(tag, ' ')
  return before.strip()


def concluded(text: str, answer: Callable[[str], str | None]) -> str | None:
  """Returns the last result of a reasoning, as `answer` reads it; None without one."""
  for line in reversed(reasoning(text).splitlines()):
    for piece in pieces(line):
      found = answer(piece)
      found = answer(f'\\boxed{{{piece}}}') if found is None else found
      if found is not None:
        return found
  return None


def pieces(line: str) -> Iterator[str]:
  """Yields what may be a line's result, the likeliest first."""
  line = line.strip().rstrip('.;,')
  if not line:
    return
  before, equals, after = line.rpartition('=')
  yield line
  if equals:
    yield after.strip().strip('$ ')
    yield before.rpartition('=')[2].rpartition(':')[2].strip().strip('$ ')
  yield line.rpartition(':')[2].strip().strip('$ ')
  yield from NUMBER.findall(line)[-1:]
