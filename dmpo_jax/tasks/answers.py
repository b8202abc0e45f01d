"""What the tasks share: finding answers in completions, reading data files.

Every search is one pass over at most MAX_TEXT characters, so no completion,
however odd, makes a reward slow. Readers name the file and the line of what
they cannot read.
"""

import csv
import json
import os
import re
import zlib

MAX_TEXT = 20000  # characters; a longer text is cut to its last ones
PROTOCOLS = ('paper', 'strict')
STYLES = ('bare', 'chat')  # every task has these; Task.styles has all it has
PREFILL = {'eval': '<reasoning>'}  # put into the assistant's mouth
TAGS = ('<reasoning>', '</reasoning>', '<answer>', '</answer>')
SPLITS = ('train', 'validation', 'test')


def choose(what, value, allowed):
  """`value`, or what a dict has for it; ValueError names the allowed ones."""
  if value not in allowed:
    raise ValueError(f'{what} {value!r} is not one of {", ".join(allowed)}')
  return allowed[value] if isinstance(allowed, dict) else value


def clip(text):
  """The last MAX_TEXT characters: answers stand at the end."""
  return text[-MAX_TEXT:]


def first_answer(text):
  """Content of the first <answer>...</answer>, or None."""
  return next(_answers(clip(text)), None)


def last_answer(text):
  """Content of the last <answer>...</answer>, or None."""
  return [None, *_answers(clip(text))][-1]


def _answers(text):
  """What re.findall(r'<answer>(.*?)</answer>', DOTALL) finds, in one pass."""
  end = 0
  while True:
    start = text.find('<answer>', end)
    stop = text.find('</answer>', start)
    if start < 0 or stop < 0:
      return
    yield text[start + len('<answer>') : stop]
    end = stop + len('</answer>')


def last_boxed(text, strict=False):
  r"""Content of the last \boxed{...}, braces balanced, or None.

  As in the field's helper (DMPO eval/parser_helper.py:14-41), '\boxed ' with a
  space anywhere wins and reaches to the next '$'. strict: only if it is last.
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


def braced(text, at):
  """What the brace at `at` holds up to the one that closes it, or None."""
  if text[at : at + 1] != '{':
    return None
  depth = 0
  for end in range(at, len(text)):
    depth += (text[end] == '{') - (text[end] == '}')
    if depth == 0:
      return text[at + 1 : end]
  return None


def formatted(text, end=''):
  """Whether text is <reasoning>..</reasoning>, <answer>..</answer>, each once.

  With end = '\\n' every tag stands on a line of its own.
  """
  if any(text.count(tag) != 1 for tag in TAGS):
    return False
  opened, thought, answer, closed = TAGS
  _, _, rest = text.partition(opened + end)
  rest, _, after = rest.partition(end + thought)
  between, _, found = after.partition(answer + end)
  _, shut, behind = found.partition(end + closed)
  return (
    text.startswith(opened + end)
    and bool(shut)
    and behind == end
    and not between.strip()
    and between[: len(end)] == end
  )


def read_lines(path):
  """Yields (line number, text); ValueError where a line is not UTF-8."""
  with open(path, 'rb') as file:
    for line, raw in enumerate(file, 1):
      try:
        yield line, raw.decode('utf-8-sig' if line == 1 else 'utf-8')
      except UnicodeDecodeError as error:
        raise ValueError(f'{path}:{line}: not UTF-8 text') from error


def read_csv(path, columns):
  """Yields (line number, dict of `columns`).

  Raises ValueError on a missing column, a bad row and a file with no rows.
  """
  rows = csv.reader((text for _, text in read_lines(path)), strict=True)
  places, empty = None, True
  try:
    for row in filter(None, rows):  # blank lines are skipped
      if places is None:
        missing = [name for name in columns if name not in row]
        if missing:
          raise ValueError(
            f'{path}:{rows.line_num}: no column {", ".join(missing)}; there '
            f'are {", ".join(row)}'
          )
        places, width = {name: row.index(name) for name in columns}, len(row)
      elif len(row) != width:
        raise ValueError(f'{path}:{rows.line_num}: {len(row)} cells instead of {width}')
      else:
        empty = False
        yield rows.line_num, {name: row[at] for name, at in places.items()}
  except csv.Error as error:
    raise ValueError(f'{path}:{rows.line_num}: {error}') from error
  if empty:
    raise ValueError(f'{path}: the data set is empty')


def read_jsonl(path):
  """Yields (line number, dict); blank lines are skipped.

  Raises ValueError on a line that is no JSON object and on an empty file.
  """
  empty = True
  for line, text in read_lines(path):
    if not text.strip():
      continue
    try:
      record = json.loads(text)
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{path}:{line}: not JSON: {error}') from error
    if not isinstance(record, dict):
      raise ValueError(f'{path}:{line}: not a JSON object')
    empty = False
    yield line, record
  if empty:
    raise ValueError(f'{path}: the data set is empty')


def read_parquet(path, columns):
  """Yields (row number, dict of `columns`); ValueError if one is missing."""
  from pyarrow import parquet

  try:
    file = parquet.ParquetFile(path)
  except Exception as error:  # pyarrow's kinds
    raise ValueError(f'{path}: not a parquet file: {error}') from error
  there = file.schema_arrow.names
  missing = [name for name in columns if name not in there]
  if missing:
    raise ValueError(
      f'{path}: no column {", ".join(missing)}; there are {", ".join(there)}'
    )
  row = 0
  for batch in file.iter_batches(columns=list(columns)):
    for record in batch.to_pylist():
      row += 1
      yield row, record
  if not row:
    raise ValueError(f'{path}: the data set is empty')


def read_texts(path, columns):
  """Yields dicts of text `columns` of a JSONL, parquet or CSV file.

  ValueError names the file and the line of what is missing or is no text.
  """
  if path.endswith('.parquet'):
    rows = read_parquet(path, columns)
  elif path.endswith('.csv'):
    rows = read_csv(path, columns)
  else:
    rows = read_jsonl(path)
  for line, record in rows:
    for name in columns:
      if not isinstance(record.get(name), str) or not record[name].strip():
        raise ValueError(
          f'{path}:{line}: {name} must be a text, there is '
          f'{record.get(name)!r} (columns: {", ".join(record)})'
        )
    yield line, {name: record[name] for name in columns}


def file_of(folder, name):
  """The one data file of a folder that begins with `name`; ValueError."""
  found = sorted(
    f
    for f in (os.listdir(folder) if os.path.isdir(folder) else ())
    if re.match(rf'{name}\b', f) and f.endswith(('.jsonl', '.json', '.parquet', '.csv'))
  )
  if len(found) != 1:
    raise ValueError(
      f'{folder} must hold one {name} file ({name}.jsonl, .parquet or .csv),'
      f' there are: {", ".join(found) or "none"}'
    )
  return os.path.join(folder, found[0])


def take(task, read, place, key, split, options, keep=lambda example: True):
  """The split's examples of data.path, at most `{split}_size` if that is > 0.

  data.path: a file, which place(example) shares among the splits; a directory
  with a train and a test file, or 'tfds': the test file is the test split,
  whole, and place says what of the train file is validation. `read(file)`
  yields examples, and is read to its end so that every line is checked;
  key(example) is equal for the same problem, however it is told. Examples that
  keep(example) does not want are in no split.
  ValueError if the split gets none, or if the train file has the test's.
  """
  size, path = size_of(split, options), options.path
  whole = path == 'tfds' or os.path.isdir(path)
  if not whole and not os.path.isfile(path):
    raise ValueError(f'data.path = {path!r}: no such file or directory')

  def examples(name):
    if path == 'tfds':
      from dmpo_jax.tasks import prepared  # slow to import

      return filter(keep, prepared.records(task, name, read, file_of))
    return filter(keep, read(file_of(path, name) if whole else path))

  if not whole:
    chosen = [e for e in examples('') if place(e) == split]
  elif split == 'test':
    chosen = list(examples('test'))
  else:
    held = split == 'validation'
    chosen = [e for e in examples('train') if (place(e) == 'validation') == held]
    chosen = without(chosen, list(examples('test')), key, path)
  if not chosen:
    raise ValueError(f'{path}: no example falls in the {split} split')
  return chosen[:size] if size > 0 else chosen


def without(examples, test, key, path):
  """Examples whose problem is not in the test; ValueError if most of the
  test's are there."""
  seen = set(map(key, test))
  kept = [example for example in examples if key(example) not in seen]
  found = len(seen.intersection(map(key, examples)))
  if 2 * found > len(seen):
    raise ValueError(
      f'{path}: {found} of the {len(seen)} test problems are in '
      'the train file: training would see the test'
    )
  return kept


def words(text):
  """`text` with single spaces: the key of a problem told in words."""
  return ' '.join(text.split())


def split_by(text):
  """The split that owns a problem, by a hash of its text which never changes.

  85 % train, 5 % validation, 10 % test.
  """
  bucket = zlib.crc32(text.encode()) % 20
  return SPLITS[0 if bucket < 17 else 1 if bucket < 18 else 2]


def size_of(split, options):
  """The split's size; ValueError if there is no such split."""
  return getattr(options, choose('split', split, SPLITS) + '_size')
