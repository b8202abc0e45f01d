"""Reads dialogues for supervised training, from files or from the hub.

A row of a file has one of the shapes in SHAPES. Errors name the file, the line and the
column.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from dmpo_jax.tasks import datasets

ROLES = ('system', 'user', 'assistant', 'tool')
SHAREGPT = {'human': 'user', 'gpt': 'assistant'}  # its names of roles
# d1's prompt for s1K, before the question (dllm-reasoning/d1, SFT).
S1K = """
Respond in the following format:
<reasoning>
Your reasoning here
</reasoning>
<answer>
...
</answer>


"""


class Dialogue(NamedTuple):
  """Messages with at least one of the assistant."""

  where: str  # file and line
  messages: list[dict[str, str]]  # with role and content


class Row(NamedTuple):
  """A row of a file, for sentences about it."""

  where: str
  columns: dict[str, Any]

  def text(self, name: str, value: Any) -> str:
    """Returns a text; ValueError names the column if it is none."""
    return datasets.checked_text(self.where, name, value, self.columns)

  def wrong(self, name: str, what: str) -> ValueError:
    return ValueError(f'{self.where}: column {name} {what}')


# --- the shapes of a row


def said(role: str, content: str) -> dict[str, str]:
  return {'role': role, 'content': content}


def turns(row: Row, name: str, keys: tuple[str, str] = ('role', 'content')) -> list:
  """Returns the messages in a column; ValueError says which one is wrong."""
  value = row.columns[name]
  if not isinstance(value, list) or not value:
    raise row.wrong(name, f'must be a list of messages, it is {value!r:.80}')
  found = []
  for at, message in enumerate(value):
    here = f'{name}[{at}]'
    if not isinstance(message, dict) or not set(keys) <= message.keys():
      raise row.wrong(here, f'must have {keys[0]} and {keys[1]}: {message!r:.80}')
    role, content = (message[key] for key in keys)
    role = SHAREGPT.get(role, role)
    if role not in ROLES:
      raise row.wrong(f'{here}.{keys[0]}', f'= {role!r} must be {", ".join(ROLES)}')
    if content != '' or role == 'assistant':
      row.text(f'{here}.{keys[1]}', content)
    found.append(said(role, content))
  return found


def pair(row: Row, question: str, answer: str) -> list:
  """Returns a question and its answer; each a text, or a list of messages (trl)."""
  found = []
  for name, role in ((question, 'user'), (answer, 'assistant')):
    listed = isinstance(row.columns[name], list)
    text = lambda name=name, role=role: said(role, row.text(name, row.columns[name]))
    found += turns(row, name) if listed else [text()]
  return found


def s1k(row: Row, question: str, trajectories: str, attempt: str) -> list:
  """Returns s1K's question and answer as d1 trains on them."""
  listed = row.columns[trajectories]
  first = listed[0] if isinstance(listed, list) and listed else None
  reasoning = row.text(f'{trajectories}[0]', first)
  answer = row.text(attempt, row.columns[attempt])
  text = f'<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>'
  asked = row.text(question, row.columns[question])
  return [said('user', S1K + asked), said('assistant', text)]


# Columns that a row has -> what makes messages of them; the first that fits.
SHAPES: dict[tuple[str, ...], Callable[..., list]] = {
  ('messages',): turns,
  ('conversations',): lambda row, name: turns(row, name, ('from', 'value')),
  ('prompt', 'completion'): pair,
  ('prompt', 'response'): pair,
  ('question', 'thinking_trajectories', 'attempt'): s1k,
  ('question', 'answer'): pair,
}


def dialogue(row: Row) -> Dialogue:
  """Returns the dialogue of a row; ValueError if it has no shape of SHAPES."""
  there = {name for name, value in row.columns.items() if value is not None}
  for columns, make in SHAPES.items():
    if there.issuperset(columns):
      messages = make(row, *columns)
      if not any(message['role'] == 'assistant' for message in messages):
        raise row.wrong(columns[0], 'has no message of the assistant to learn')
      return Dialogue(row.where, messages)
  shapes = '; '.join(', '.join(columns) for columns in SHAPES)
  raise ValueError(
    f'{row.where}: the columns are {", ".join(map(str, row.columns))}, they must be '
    f'those of one of these: {shapes}'
  )


# --- files and the hub


def read(name: str) -> Iterator[Dialogue]:
  """Yields the dialogues of a file, of a folder's train files, or of a hub name."""
  for where, columns in rows_of(os.path.expanduser(name)):
    yield dialogue(Row(where, columns))


def rows_of(name: str) -> Iterable[tuple[str, dict]]:
  """Yields (file and line, columns); ValueError if there is no such file."""
  if os.path.isfile(name):
    return ((f'{name}:{line}', row) for line, row in datasets.read_rows(name))
  if os.path.isdir(name):
    return itertools.chain.from_iterable(map(rows_of, datasets.files_of(name, 'train')))
  if not datasets.is_on_hub(name.partition('@')[0]):
    raise ValueError(f'sft.path: {name!r}: no such file or directory')
  name = name if '@' in name else f'{name}@train'
  return ((f'{name}:{row}', columns) for row, columns in datasets.read_rows(name))
