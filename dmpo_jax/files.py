"""Reads and writes a run's small files so that a kill leaves no half of one.

A JSON-lines file holds one JSON object a line. A process that is killed while it
appends leaves a torn last line, which the functions here leave out.
"""

import contextlib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Path = str | os.PathLike
DISK = r'os error \d+|os_error_code|No space left|Read-only file|quota'  # others' words
STAND_INS = {
  b'version https://git-lfs': 'it is a git-lfs pointer, not the data: run git lfs pull',
  b'<!DOCTYPE': 'it is a web page, not the data: download the raw file',
  b'\x1f\x8b': 'it is compressed by gzip: unpack it',
  b'PK\x03\x04': 'it is a zip file: unpack it',
}


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
  """Makes an OSError with this path of an error of the disk that names no file."""
  try:
    yield
  except Exception as error:
    named = isinstance(error, OSError) and error.filename
    if named or not (isinstance(error, OSError) or re.search(DISK, str(error))):
      raise
    text = ' '.join(str(error).split())[:300]
    raise OSError(f'{path}: {text}') from error


def replace(path: Path, content: str | bytes) -> None:
  """Replaces a file by new content in one step, or not at all."""
  data = content.encode() if isinstance(content, str) else content
  temporary = f'{path}.new'
  with open(temporary, 'wb') as f:
    f.write(data)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)


def read_json(path: Path) -> Any:
  """Returns what a JSON file holds. ValueError names a damaged one."""
  try:
    return json.loads(pathlib.Path(path).read_text(encoding='utf-8-sig'))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is no valid JSON: {stand_in(path) or error}') from None


def read_object(path: Path) -> dict[str, Any]:
  """Returns the object of a JSON file; {} if there is no file.

  Raises ValueError, which names the file, if it holds anything else.
  """
  value = read_json(path) if os.path.exists(path) else {}
  if not isinstance(value, dict):
    raise ValueError(f'{path} must hold a JSON object, not {type(value).__name__}')
  return value


def stand_in(path: Path) -> str:
  """Returns what stands in a file for its content, by its first bytes; '': nothing."""
  with open(path, 'rb') as f:
    start = f.read(64)
  return next((what for sign, what in STAND_INS.items() if start.startswith(sign)), '')


def number(value: float | int) -> float | int | str:
  """Returns a number as JSON can hold it: nan and inf become strings."""
  return value if math.isfinite(value) else str(value)


def to_lines(rows: Iterable[dict]) -> str:
  """Returns the text of a JSON-lines file with these rows."""
  return ''.join(json.dumps(row) + '\n' for row in rows)


def append(path: Path, rows: Iterable[dict]) -> None:
  """Appends rows to a JSON-lines file; makes the file if there is none."""
  with open(path, 'a', encoding='utf-8') as f:
    f.write(to_lines(rows))


def read(path: Path) -> list[dict]:
  """Returns the rows of a JSON-lines file; none if there is no file.

  Raises ValueError for a line that is not JSON, unless it is the last.
  """
  return [row for _, row in _read_pairs(path)]


def keep(path: Path, wanted: Callable[[dict], bool] = lambda row: True) -> None:
  """Drops the rows of a JSON-lines file that are not wanted, and a torn line."""
  text = ''.join(line + '\n' for line, row in _read_pairs(path) if wanted(row))
  if os.path.exists(path) and pathlib.Path(path).read_bytes() != text.encode():
    replace(path, text)


def _read_pairs(path: Path) -> list[tuple[str, dict]]:
  """Returns (line, row) of every whole line."""
  if not os.path.exists(path):
    return []
  text = pathlib.Path(path).read_text(encoding='utf-8', errors='replace')
  lines = text.removesuffix('\n').split('\n') if text else []
  pairs = []
  for at, line in enumerate(lines, 1):
    try:
      pairs.append((line, json.loads(line)))
    except ValueError as error:
      if at < len(lines):
        raise ValueError(f'{path}, line {at}: {error}') from error
  return pairs
