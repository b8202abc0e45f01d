"""Reads data files and shares their problems among train, validation and test.

Readers name the file and the line of what they cannot read. They are written
with the standard library where pyarrow guesses types (dates, leading zeros) or
names no line.
"""

import csv
import dataclasses
import importlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from dmpo_jax.files import stand_in
from dmpo_jax.tasks import answers
from dmpo_jax.types import TaskOptions

SPLITS = ('train', 'validation', 'test')
HALF = re.compile('[\ud800-\udfff]')  # a surrogate without the other one
SHARD = re.compile(r'^(.*)-([0-9]+)-of-([0-9]+)(\..*)$')
HUB = re.compile(r'[\w.-]+/[\w.-]+(:[\w.-]+)?')  # OWNER/NAME or OWNER/NAME:SUBSET


def read_rows(path: str) -> Iterator[tuple[int, dict]]:
  """Yields (line or row number, record) of a CSV, parquet or JSONL file.

  The name's ending tells the format; any other name is read as JSONL. A .json file may
  hold one list. NAME@SPLIT is a split of a data set of TFDS or of the hub. Raises
  ValueError on a line that cannot be read and on a file without rows.
  """
  ending = os.path.splitext(path)[1]
  rows = {'.csv': _csv, '.parquet': _parquet, '.json': _json}.get(ending, _jsonl)
  if '@' in path and not os.path.isfile(path):
    rows = _split_rows
  elif what := stand_in(path):
    raise ValueError(f'{path}: {what}')
  empty = True
  for line, record in rows(path):
    empty = False
    yield line, record
  if empty:
    raise ValueError(f'{path}: the data set is empty')


def read_texts(path: str, columns: Iterable[str]) -> Iterator[tuple[int, dict]]:
  """Yields (line, {column: text}); ValueError where a column holds no text."""
  for line, record in read_rows(path):
    where = f'{path}:{line}'
    yield (
      line,
      {name: checked_text(where, name, record.get(name), record) for name in columns},
    )


def checked_text(where: str, name: str, value: Any, columns: Iterable[str]) -> str:
  """Returns the text in a column; ValueError if it holds none. where: file and line."""
  if not isinstance(value, str) or not value.strip():
    raise ValueError(
      f'{where}: column {name} must hold text, it has {value!r} (the columns are '
      f'{", ".join(columns)})'
    )
  return whole(where, f'column {name}', value)


def whole(where: str, what: str, text: str) -> str:
  """Returns a text; ValueError if it has half of a character, which UTF-8 has not."""
  if half := HALF.search(text):
    raise ValueError(
      f'{where}: {what} has {half[0]!r}, which is half of a character '
      '(of an emoji that was cut): write the whole character, or remove it'
    )
  return text


def _lines(path: str) -> Iterator[tuple[int, str]]:
  with open(path, 'rb') as file:
    for line, raw in enumerate(file, 1):
      try:
        yield line, raw.decode('utf-8-sig' if line == 1 else 'utf-8')
      except UnicodeDecodeError as error:
        raise ValueError(f'{path}:{line}: not UTF-8 text') from error


def _csv(path: str) -> Iterator[tuple[int, dict]]:
  rows = csv.reader((text for _, text in _lines(path)), strict=True)
  header = None
  try:
    for row in filter(None, rows):  # blank lines are skipped
      if header is None:
        header = row
      elif len(row) != len(header):
        raise ValueError(
          f'{path}:{rows.line_num}: {len(row)} cells instead of {len(header)}'
        )
      else:
        yield rows.line_num, dict(zip(header, row, strict=True))
  except csv.Error as error:
    raise ValueError(f'{path}:{rows.line_num}: {error}') from error


def _jsonl(path: str) -> Iterator[tuple[int, dict]]:
  for line, text in _lines(path):
    if text.strip():
      try:
        record = json.loads(text)
      except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}:{line}: not JSON: {error}') from error
      if not isinstance(record, dict):
        raise ValueError(f'{path}:{line}: not a JSON object')
      yield line, record


def _json(path: str) -> Iterator[tuple[int, dict]]:
  """Yields the objects of one list, by number; of any other file, its lines."""
  text = ''.join(text for _, text in _lines(path))
  if not text.lstrip().startswith('['):
    yield from _jsonl(path)
    return
  try:
    records = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path}: not JSON: {error}') from error
  for number, record in enumerate(records, 1):
    if not isinstance(record, dict):
      raise ValueError(f'{path}: item {number} of the list is not a JSON object')
    yield number, record


def _parquet(path: str) -> Iterator[tuple[int, dict]]:
  from pyarrow import parquet

  line = 0
  try:
    for batch in parquet.ParquetFile(path).iter_batches():
      for row in batch.to_pylist():
        line += 1
        yield line, row
  except Exception as error:  # pyarrow raises several kinds
    raise ValueError(
      f'{path}: not a parquet file, or damaged after row {line}: {error}'
    ) from error


def plain(row: dict) -> dict:
  """Returns a record whose values JSON can hold: dates, bytes and such become texts."""
  return json.loads(json.dumps(row, default=str))


# --- data sets that are no files


def is_folder_of_tfds(path: str) -> bool:
  return os.path.isfile(os.path.join(path, 'dataset_info.json')) and os.path.isfile(
    os.path.join(path, 'features.json')
  )


def is_on_hub(path: str) -> bool:
  """Returns whether a path is the name of a data set of the hub, and no file."""
  return bool(HUB.fullmatch(path)) and not os.path.exists(path)


def splits_of(path: str) -> list[str]:
  """Returns the splits of a folder of TFDS, or of a data set of the hub."""
  if is_folder_of_tfds(path):
    from dmpo_jax.tasks import prepared  # slow to import

    return prepared.splits_of(path)
  hub, (name, _, subset) = _hub(path), path.partition(':')
  try:
    return list(hub.get_dataset_split_names(name, subset or None))
  except Exception as error:  # of the network, of the hub, of its files
    raise ValueError(_unread(path, error)) from error


def _split_rows(path: str) -> Iterator[tuple[int, dict]]:
  """Yields (row, record) of NAME@SPLIT."""
  path, _, split = path.rpartition('@')
  if is_folder_of_tfds(path):
    from dmpo_jax.tasks import prepared

    yield from enumerate(prepared.folder_rows(path, split), 1)
    return
  hub, (name, _, subset) = _hub(path), path.partition(':')
  try:
    yield from enumerate(hub.load_dataset(name, subset or None, split=split), 1)
  except Exception as error:
    raise ValueError(_unread(path, error)) from error


def _hub(path: str) -> Any:
  """Returns the package `datasets`; ValueError if it is missing."""
  try:
    return importlib.import_module('datasets')
  except ImportError:
    raise ValueError(
      f'{path}: no such file or directory. If it is a data set of the '
      "Hugging Face hub: pip install 'dmpo_jax[hub]'"
    ) from None


def _unread(path: str, error: Exception) -> str:
  text = ' '.join(str(error).split())[:300]
  return (
    f'{path}: no such file or directory, and the hub does not give it: '
    f'{type(error).__name__}: {text}'
  )


def files_of(folder: str, name: str, also: str = '') -> list[str]:
  """Returns the data file of a folder whose name begins with `name`, or its shards.

  Shards are named as on the hub: train-00000-of-00002.parquet. also: a file of another
  name, which stands for it where there is none. ValueError unless there is one file, or
  all shards of one.
  """
  if is_folder_of_tfds(folder) or is_on_hub(folder):
    if name not in (known := splits_of(folder)):
      raise ValueError(f'{folder} has no {name} split, it has {", ".join(known)}')
    return [f'{folder}@{name}']
  files = [
    file
    for file in sorted(os.listdir(folder) if os.path.isdir(folder) else ())
    if re.match(rf'{name}\b.*\.(jsonl|json|parquet|csv)$', file)
  ]
  if not files and also and os.path.isfile(os.path.join(folder, also)):
    return [os.path.join(folder, also)]
  parts = [SHARD.findall(file) for file in files]  # [(name, number, count, ending)]
  if all(parts) and files:
    _, _, count, _ = parts[0][0]
    kinds = {(name, of, ending) for ((name, _, of, ending),) in parts}
    numbers = [int(number) for ((_, number, _, _),) in parts]
    if len(kinds) == 1 and numbers == list(range(int(count))):
      return [os.path.join(folder, file) for file in files]
  if len(files) != 1 or parts[0]:
    known = f'{name}.jsonl, .parquet or .csv{f", or {also}" if also else ""}'
    raise ValueError(
      f'{folder} must hold one {name} file ({known}), or all '
      f'shards of one ({name}-00000-of-00002.parquet and so on), it holds: '
      f'{", ".join(files) or "none"}'
    )
  return [os.path.join(folder, files[0])]


@dataclasses.dataclass(frozen=True)
class Source:
  """How a task reads its problems from `data.path`."""

  task: str  # its name
  origin: str  # where the files can be downloaded
  read: Callable[[str], Iterable[dict]]  # file -> examples; checks every line
  split_of: Callable[[dict], str]  # example -> the split that owns it
  # example -> a value that is equal for the same problem, however it is written
  key: Callable[[dict], Any]
  keep: Callable[[dict], bool] = lambda example: True  # False: in no split
  # 'train' or 'test' -> the name that the file has where it is published
  published: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def load(self, split: str, options: TaskOptions) -> list[dict]:
    """Returns the split's examples, at most `{split}_size` of them if that is > 0.

    `data.path` is a file, which `split_of` shares among the splits. Or it is a
    directory with a train and a test file, 'tfds', a folder of TFDS or a data set of
    the hub. Then the test file is the test split, and `split_of` tells which part of
    the train file is validation. A data set with one split is like one file.
    Raises ValueError if the split is empty or the train file has most of the test's
    problems; fewer are left out.
    """
    size, path = size_of(split, options), options.path
    if not path:
      raise ValueError(
        f'data.task = {self.task} needs data.path: a directory with a train and '
        f'a test file, one file, or tfds. The files are at: {self.origin}'
      )
    named = is_folder_of_tfds(path) or is_on_hub(path)
    if named and len(known := splits_of(path)) == 1:
      chosen = self._of_one_file(split, f'{path}@{known[0]}')
    elif named or path == 'tfds' or os.path.isdir(path):
      chosen = self._of_two_files(split, path)
    elif os.path.isfile(path):
      chosen = self._of_one_file(split, path)
    else:
      raise ValueError(f'data.path = {path!r}: no such file or directory')
    if not chosen:
      raise ValueError(f'{path}: no example falls in the {split} split')
    return chosen[:size] if size > 0 else chosen

  def _of_one_file(self, split: str, path: str) -> list[dict]:
    examples = filter(self.keep, self.read(path))
    return [e for e in examples if self.split_of(e) == split]

  def _of_two_files(self, split: str, path: str) -> list[dict]:
    if split == 'test':
      return self._examples('test', path)
    wanted = split == 'validation'
    chosen = [
      e
      for e in self._examples('train', path)
      if (self.split_of(e) == 'validation') == wanted
    ]
    test_keys = set(map(self.key, self._examples('test', path)))
    shared = len(test_keys.intersection(map(self.key, chosen)))
    if 2 * shared > len(test_keys):
      raise ValueError(
        f'{path}: {shared} of the {len(test_keys)} test problems are in the train '
        'file, so training would see the test: remove them from one of the files'
      )
    return [e for e in chosen if self.key(e) not in test_keys]

  def read_split(self, folder: str, name: str) -> Iterable[dict]:
    """Reads the files of a folder whose names begin with `name`: train or test."""
    files = files_of(folder, name, self.published.get(name, ''))
    return itertools.chain.from_iterable(map(self.read, files))

  def _examples(self, name: str, path: str) -> list[dict]:
    if path == 'tfds':
      from dmpo_jax.tasks import prepared  # slow to import

      return list(filter(self.keep, prepared.records(self, name)))
    return list(filter(self.keep, self.read_split(path, name)))


def word_problems(
  task: str, origin: str, read: Callable[[str], Iterable[dict]], field: str
) -> Source:
  """Returns a Source of problems that are the text in `field`.

  Texts that differ only in white space are the same problem, in the same split.
  """
  words = lambda example: ' '.join(example[field].split())
  return Source(task, origin, read, lambda example: split_by(words(example)), words)


def split_by(text: str) -> str:
  """Returns the split that owns a problem, by a fixed hash of its text.

  85 % train, 5 % validation, 10 % test.
  """
  bucket = zlib.crc32(text.encode()) % 20
  return SPLITS[0 if bucket < 17 else 1 if bucket < 18 else 2]


def size_of(split: str, options: TaskOptions) -> int:
  """Returns the split's size; ValueError if there is no such split."""
  return getattr(options, answers.choose('split', split, SPLITS) + '_size')
