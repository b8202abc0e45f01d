"""What the tasks share: finding answers in completions, reading data files.

Every search is one pass over at most MAX_TEXT characters, so no completion,
however odd, makes a reward slow. Readers name the file and the line of what
they cannot read.
"""

import csv
import json

MAX_TEXT = 20000  # characters; a longer text is cut to its last ones
PROTOCOLS = ('paper', 'strict')
STYLES = ('bare', 'chat')
SPLITS = ('train', 'validation', 'test')


def choose(what, value, allowed):
  """`value`, or a ValueError which names the allowed ones."""
  if value not in allowed:
    raise ValueError(f'{what} {value!r} is not one of {", ".join(allowed)}')
  return value


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


def last_boxed(text):
  r"""Content of the last \boxed{...}, braces balanced, or None.

  As in the field's helper (DMPO eval/parser_helper.py:14-41), '\boxed ' with a
  space anywhere wins and reaches to the next '$'.
  """
  text = clip(text)
  if '\\boxed ' in text:
    return text.rpartition('\\boxed ')[2].partition('$')[0]
  start = text.rfind('\\boxed')
  if start < 0 or not text.startswith('\\boxed{', start):
    return None
  start, depth = start + len('\\boxed{'), 1
  for at in range(start, len(text)):
    depth += (text[at] == '{') - (text[at] == '}')
    if depth == 0:
      return text[start:at]
  return None


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
              f'{path}:{rows.line_num}: no column {", ".join(missing)}')
        places, width = {name: row.index(name) for name in columns}, len(row)
      elif len(row) != width:
        raise ValueError(
            f'{path}:{rows.line_num}: {len(row)} cells instead of {width}')
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


def take(examples, split, options):
  """The split's examples of a file, at most `{split}_size` if that is > 0.

  `examples` yields (split, example), and is read to its end so that every line
  is checked. Raises ValueError if the split gets none.
  """
  chosen = [example for place, example in examples if place == split]
  if not chosen:
    raise ValueError(f'{options.path}: no example falls in the {split} split')
  size = size_of(split, options)
  return chosen[:size] if size > 0 else chosen


def size_of(split, options):
  """The split's size; ValueError if there is no such split."""
  return getattr(options, choose('split', split, SPLITS) + '_size')
