"""What a run writes down and shows: numbers, progress and timings.

The truth is `metrics.jsonl`, one flat JSON object per line with its phase and
step; TensorBoard gets the same scalars under `phase/name`. Values that live on
a device are fetched one step late, so that the device never waits for the host.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import time

import numpy as np
import tensorboardX
import tqdm
from absl import logging

FILE = 'metrics.jsonl'
RESERVED = ('phase', 'step', 'time')
SHOWN = ('reward', 'accuracy', 'ess', 'loss', 'grad_norm')
NOT_FINITE = {'nan': math.nan, 'inf': math.inf, '-inf': -math.inf}


def to_float(name, value):
  """A float from a Python, numpy or device scalar; waits for the device."""
  array = np.asarray(value)
  if array.size != 1:
    raise ValueError(f'metric {name!r} has shape {array.shape}, not a scalar')
  return float(array.item())


def _encode(phase, step, now, values):
  """One line of the file. JSON has no nan or inf, so they become strings."""
  row = {'phase': phase, 'step': int(step), 'time': round(now, 2)}
  for name, value in values.items():
    row[name] = value if math.isfinite(value) else str(value)
  return json.dumps(row, allow_nan=False)


def _decode(line):
  row = json.loads(line)
  for name, value in row.items():
    if name != 'phase' and isinstance(value, str):
      row[name] = NOT_FINITE.get(value, value)
  return row


def _load(path):
  """(line, row) of every whole line. A torn last line is left out."""
  if not path.exists():
    return []
  lines = path.read_text(encoding='utf-8', errors='replace').splitlines()
  pairs = []
  for number, line in enumerate(lines, 1):
    try:
      pairs.append((line, _decode(line)))
    except ValueError as error:
      if number == len(lines):
        break  # a killed run, or one that is writing just now
      raise ValueError(f'{path}, line {number}: {error}') from error
  return pairs


def replace(path, text):
  """Puts `text` in place of the file in one step, or not at all."""
  temporary = f'{path}.new'
  with open(temporary, 'w', encoding='utf-8') as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)


def read(workdir, name=FILE):
  """The rows of a run's metrics, in the order they were written.

  name: of another file with an object a line.
  """
  return [row for _, row in _load(pathlib.Path(workdir) / name)]


class Writer:
  """Appends to a run's metrics.jsonl and TensorBoard files.

  Where `enabled` is False (all processes but the first) nothing is written, but
  `late` and `flush` still return values, so that all processes take the same
  decisions.
  """

  def __init__(self, workdir, *, enabled=True):
    self._path = pathlib.Path(workdir) / FILE
    self._enabled = enabled
    self._pending = {}  # phase -> (step, values), oldest first
    self._boards = {}  # phase -> SummaryWriter
    self._file = None
    if enabled:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._mend(lambda row: True)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def _mend(self, keep):
    """Rewrites the file if a line is torn or not kept; opens it to append."""
    if self._file:
      self._file.close()
    lines = [line for line, row in _load(self._path) if keep(row)]
    text = ''.join(line + '\n' for line in lines)
    if self._path.exists() and self._path.read_bytes() != text.encode():
      replace(self._path, text)
    self._file = open(self._path, 'a', encoding='utf-8')

  def _board(self, phase, purge_step=None):
    """The phase's event file; a new one forgets steps from `purge_step` on.

    TensorBoard forgets per folder, whatever the tag; steps of different phases
    do not compare, so each has a folder. The suffix keeps two files opened
    within one second apart: tensorboardX would overwrite the first.
    """
    if phase not in self._boards:
      self._boards[phase] = tensorboardX.SummaryWriter(
        str(self._path.parent / 'tensorboard' / phase),
        purge_step=purge_step,
        filename_suffix=f'.{time.time_ns()}',
        flush_secs=10,
      )
    return self._boards[phase]

  def write(self, phase, step, values):
    """Writes one row of scalars and returns them as floats."""
    clash = sorted(set(values) & set(RESERVED))
    if clash:
      raise ValueError(f'metric names {clash} are taken: {RESERVED}')
    floats = {name: to_float(name, value) for name, value in values.items()}
    if self._enabled:
      now = time.time()
      self._file.write(_encode(phase, step, now, floats) + '\n')
      self._file.flush()
      board = self._board(phase)
      for name, value in floats.items():
        board.add_scalar(f'{phase}/{name}', value, int(step), walltime=now)
    return floats

  def late(self, phase, step, device_values):
    """Keeps these values; writes the phase's previous ones and returns them."""
    for value in device_values.values():
      if hasattr(value, 'copy_to_host_async'):
        value.copy_to_host_async()  # the copy follows the step; nobody waits
    written = self._write_pending(phase)
    self._pending[phase] = (step, dict(device_values))
    return written

  def _write_pending(self, phase):
    if phase not in self._pending:
      return None
    step, values = self._pending.pop(phase)
    return {'step': int(step), **self.write(phase, step, values)}

  def flush(self):
    """Writes all that is pending; returns the newest of it, or None."""
    written = None
    for phase in list(self._pending):
      written = self._write_pending(phase)
    return written

  def rewind(self, phase, step):
    """Forgets what the phase wrote after `step`: a resumed run redoes it."""
    if phase in self._pending and self._pending[phase][0] > step:
      del self._pending[phase]
    if not self._enabled:
      return
    self._mend(lambda row: row['phase'] != phase or row['step'] <= step)
    if phase in self._boards:
      self._boards.pop(phase).close()
    if (self._path.parent / 'tensorboard' / phase).exists():
      self._board(phase, purge_step=step + 1)

  def count(self, phase):
    """Rows of the phase that are in the file."""
    return sum(row['phase'] == phase for _, row in _load(self._path))

  def close(self):
    """Writes what is pending and closes the files; twice does no harm."""
    self.flush()
    for board in self._boards.values():
      board.close()
    self._boards.clear()
    if self._file:
      self._file.close()


def eta(seconds):
  """A duration in two units at most: 45s, 3m05s, 2h07m, 1d03h."""
  if not math.isfinite(seconds):
    return '?'
  minutes, s = divmod(max(0, round(seconds)), 60)
  hours, m = divmod(minutes, 60)
  days, h = divmod(hours, 24)
  if days:
    return f'{days}d{h:02d}h'
  if hours:
    return f'{h}h{m:02d}m'
  return f'{m}m{s:02d}s' if minutes else f'{s}s'


class Progress:
  """A bar on a terminal; elsewhere a log line now and then, and a last one."""

  def __init__(self, total, label, *, start=0, every_seconds=10, shown=SHOWN):
    self._total, self._label, self._shown = total, label, shown
    self._every = every_seconds
    self._anchor = (start, time.monotonic())
    self._steps = 0  # updates seen
    self._logged = -math.inf  # when the last line was logged
    self._unlogged = None  # the newest line, where it was held back
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=total, initial=start, desc=label, dynamic_ncols=True)

  def _left(self, step, now):
    """Seconds left. The first update compiles: later ones do not count it."""
    step_0, time_0 = self._anchor
    if self._steps == 1:
      self._anchor = (step, now)
    done = step - step_0
    return (now - time_0) / done * (self._total - step) if done else math.inf

  def update(self, step, values):
    """Shows that `step` steps are done, and those of `values` worth showing."""
    text = ' '.join(f'{k} {values[k]:.4g}' for k in self._shown if k in values)
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    now = time.monotonic()
    self._steps += 1
    left = eta(self._left(step, now))
    line = f'{self._label} {step}/{self._total} | {text} | {left} left'
    self._unlogged = line.replace('|  |', '|')
    if now - self._logged >= self._every or step >= self._total:
      self._log(now)

  def _log(self, now):
    logging.info('%s', self._unlogged)
    self._logged, self._unlogged = now, None

  def close(self):
    """Leaves the bar as it stands, or logs the last line if held back."""
    if self._bar is not None:
      self._bar.close()
    elif self._unlogged:
      self._log(time.monotonic())


class Clock:
  """Sums seconds per name: `with clock('sample'): ...`.

  Host time: device work counts where the host waits for it. Each begin and end
  is told to beat(name, step), a watchdog's; `step` is the caller's to set.
  """

  def __init__(self, beat=lambda phase, step: None):
    self.step, self._seconds, self._open, self._beat = 0, {}, ['between'], beat

  @contextlib.contextmanager
  def __call__(self, name):
    begin = time.perf_counter()
    self._open.append(name)
    self.beat()
    try:
      yield
    finally:
      self._open.pop()
      self.beat()
      spent = time.perf_counter() - begin
      self._seconds[name] = self._seconds.get(name, 0.0) + spent

  def beat(self):
    """Says that the innermost of what is open makes progress."""
    self._beat(self._open[-1], self.step)

  def take(self):
    """The sums so far as metrics, `seconds/<name>`; starts again from zero."""
    taken = {f'seconds/{k}': v for k, v in self._seconds.items()}
    self._seconds = {}
    return taken


def table(rows, header):
  """A text table. Numbers stand right, at four digits; the rest stands left."""
  rows = [list(row) for row in rows]
  for row in rows:
    if len(row) != len(header):
      raise ValueError(f'row {row} does not fit the header {list(header)}')

  def cell(x):
    return f'{x:.4g}' if isinstance(x, float | np.floating) else str(x)

  def is_number(x):
    return isinstance(x, int | float | np.number) and not isinstance(x, bool)

  text = [[cell(x) for x in row] for row in [list(header), *rows]]
  lines = [''] * len(text)
  for j in range(len(header)):
    right = bool(rows) and all(is_number(row[j]) for row in rows)
    width = max(len(line[j]) for line in text)
    for i, line in enumerate(text):
      padded = line[j].rjust(width) if right else line[j].ljust(width)
      lines[i] += '  ' * (j > 0) + padded
  rule = '-' * max(len(line) for line in lines)
  lines = [line.rstrip() for line in lines]
  return '\n'.join([lines[0], rule, *lines[1:]])
