"""Writes a run's numbers and shows its progress.

`metrics.jsonl` is the truth: one flat JSON object a line, with its phase and
step. TensorBoard gets the same scalars under `phase/name`. METRICS explains
every name.
"""

import contextlib
import io
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorboardX
import tqdm
from absl import logging

from dmpo_jax import files

FILE = 'metrics.jsonl'
RESERVED = ('phase', 'step', 'time')
SHOWN = ('reward', 'accuracy', 'ess', 'loss', 'grad_norm', 'tokens_per_second', 'mfu')
NOT_FINITE = {'nan': math.nan, 'inf': math.inf, '-inf': -math.inf}

# Meaning of each metric, then its unit. A name that ends with '/' is a prefix.
# Phase rl: one row a buffer; update, sft: one row an optimizer step; eval: one
# row a validation; held_out: one row each time the held-out loss is taken.
METRICS = {
  # --- rewards and grades (rl, eval)
  'reward': 'mean reward of the completions; weighted sum of the reward terms',
  'reward/': 'mean of one reward term, before its weight; term',
  'reward_std': 'standard deviation of the reward over all completions; reward',
  'accuracy': 'mean grade of the completions; 0 to 1, 1 = all are right',
  'cell_accuracy': 'sudoku: share of the empty cells filled correctly; 0 to 1',
  'well_formed': 'share of completions whose answer can be parsed; 0 to 1',
  'grades_failed': 'answers that the grader could not compare; count',
  # --- completions (rl)
  'length': 'mean completion up to and including its first EOS; tokens',
  'cut': 'share of completions without an EOS; 0 to 1',
  'empty': 'share of completions that begin with EOS; 0 to 1',
  'repeated': 'share of tokens equal to the token before; 0 to 1, before the EOS',
  'distinct': 'different completions of a group / G, mean over groups; 1/G to 1',
  'distinct_right': 'different right completions of a group, mean over groups; count',
  'equal_reward_groups': 'share of groups whose rewards are all equal; 0 to 1',
  'equal_wrong_groups': 'share of groups with equal rewards and all wrong; 0 to 1',
  'groups_skipped': 'share of groups left out by objective.skip_equal; 0 to 1',
  # --- sampling (rl; eval: forwards)
  'forwards': 'network evaluations to sample one batch; count',
  'tokens_per_step': 'mean tokens that a forward reveals in a row; tokens',
  'tokens_per_forward/': 'share of forwards that reveal so many tokens; 0 to 1',
  'confidence': 'mean probability of a token when it is revealed; 0 to 1',
  'confidence_low': '10 % quantile of the probability of revealed tokens; 0 to 1',
  'policy_age': 'updates between the policy that sampled and the buffer; updates',
  'prompts_changed': 'training prompts that were dropped or cut for length; count',
  # --- weights and log-probs (rl)
  'ess': 'effective sample size of the group weights / G; 1/G to 1, 1 = all equal',
  'log_rnd_std': 'log p_ref - log p_old, std over the group; nats',
  'coef': 'mean factor c in the exponent of the target weights; objective.coef or .ess',
  'coverage': 'mean factor of a group by objective.best; 0 to 1, 1 = off',
  'weight_abs': 'sum of absolute weights of a group, mean over groups; 0 = no signal',
  'advantage_abs': 'mean absolute advantage of the completions; reward',
  'guess_reward': 'egspo: mean reward of states completed in one step; reward',
  'groups_with_pairs': 'vrpo: share of groups with a preference pair; 0 to 1',
  'logp_old': 'mean log p_old of a completion; nats',
  'logp_ref': 'mean log p_ref of a completion; nats',
  'kl_ref': 'mean of log p_old - log p_ref, an estimate of the KL; nats',
  # --- updates (update, sft)
  'loss': 'training loss; its scale depends on the objective',
  'grad_norm': 'norm of the gradient before clipping; norm',
  'finite': 'whether loss, gradient and update are finite; 1 or 0',
  'nll': "negative log-prob of a copy's masked tokens, summed; mean over copies, nats",
  'elbo': 'mean lower bound of the log-prob of a completion; nats',
  'eubo': 'spg: mean upper bound of the log-prob of a completion; nats',
  'elbo_drift': 'mean ELBO of the policy less that of p_old; nats',
  'ratio_log_abs': 'mean absolute log-ratio of the policy to p_old; nats',
  'place_log_abs': 'mapg: the same for the choice of positions; nats',
  # --- held-out texts (held_out)
  'held_out_nll': 'negative ELBO of the held-out texts; nats a learned token',
  # --- the program (rl)
  'ill': 'health rules that are broken; count',
  'compilations': 'programs compiled since the row before; count',
  'seconds/': 'time that the host worked in or waited for a part; seconds',
  'tokens_per_second': 'tokens of the completions by training time; tokens / second',
  'forwards_per_second': 'forwards by seconds/sample; forwards / second',
  'mfu': 'share of the peak FLOP rate that matmuls reach; 0 to 1, none = no data sheet',
  'gib/': 'memory of a device: weights, or keys and values of a rollout; GiB',
}


def of_machine(name: str) -> bool:
  """Returns whether a metric tells of the machine, and not of what was computed."""
  clocks = 'time', 'compilations', 'tokens_per_second', 'forwards_per_second', 'mfu'
  return name in clocks or name.startswith(('seconds/', 'gib/'))


def meaning(name: str) -> str:
  """Returns the line of METRICS for a metric; '' if it has none."""
  return METRICS.get(name) or METRICS.get(name.partition('/')[0] + '/', '')


def to_float(name: str, value: Any) -> float:
  """Returns a Python, numpy or device scalar as a float; waits for the device."""
  array = np.asarray(value)
  if array.size != 1:
    raise ValueError(f'metric {name!r} has shape {array.shape}, not a scalar')
  return float(array.item())


def read(workdir: files.Path) -> list[dict]:
  """Returns the rows of a run's metrics, in the order they were written."""
  return [
    {name: NOT_FINITE.get(value, value) for name, value in row.items()}
    for row in files.read(os.path.join(workdir, FILE))
  ]


class Writer:
  """Appends to a run's metrics.jsonl and TensorBoard files.

  With `enabled` False, in all processes but the first, it writes nothing. Its
  methods return the same values, so that all processes decide alike.
  """

  def __init__(self, workdir: files.Path, *, enabled: bool = True):
    self._path = pathlib.Path(workdir) / FILE
    self._enabled = enabled
    self._pending = {}  # phase -> (step, values), oldest first
    self._boards = {}  # phase -> SummaryWriter
    if enabled:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      files.keep(self._path)

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *_):
    self.close()

  def _board(self, phase, purge_step=None):
    """Returns the phase's event file; a new one forgets steps from `purge_step`.

    TensorBoard forgets per folder, whatever the tag, so each phase has a folder.
    The suffix separates two files opened within a second: tensorboardX would
    overwrite the first.
    """
    if phase not in self._boards:
      self._boards[phase] = tensorboardX.SummaryWriter(
        str(self._path.parent / 'tensorboard' / phase),
        purge_step=purge_step,
        filename_suffix=f'.{time.time_ns()}',
        flush_secs=10,
      )
    return self._boards[phase]

  def write(self, phase: str, step: int, values: Mapping[str, Any]) -> dict[str, float]:
    """Writes one row of scalars and returns them as floats."""
    clash = sorted(set(values) & set(RESERVED))
    if clash:
      raise ValueError(f'metric names {clash} are taken: {RESERVED}')
    floats = {name: to_float(name, value) for name, value in values.items()}
    if self._enabled:
      now = time.time()
      row = {name: files.number(value) for name, value in floats.items()}
      head = {'phase': phase, 'step': int(step), 'time': round(now, 2)}
      files.append(self._path, [head | row])
      board = self._board(phase)
      for name, value in floats.items():
        board.add_scalar(f'{phase}/{name}', value, int(step), walltime=now)
    return floats

  def late(
    self, phase: str, step: int, device_values: Mapping[str, Any]
  ) -> dict[str, Any] | None:
    """Holds these values back; writes the phase's previous ones and returns them.

    The device then never waits for the host: its values are fetched one step
    late. Returns None at the first call.
    """
    for value in device_values.values():
      if hasattr(value, 'copy_to_host_async'):
        value.copy_to_host_async()
    written = self._write_pending(phase)
    self._pending[phase] = (step, dict(device_values))
    return written

  def _write_pending(self, phase):
    if phase not in self._pending:
      return None
    step, values = self._pending.pop(phase)
    return {'step': int(step), **self.write(phase, step, values)}

  def flush(self) -> dict[str, Any] | None:
    """Writes everything held back; returns the newest row, or None."""
    written = None
    for phase in list(self._pending):
      written = self._write_pending(phase)
    return written

  def rewind(self, phase: str, step: int) -> None:
    """Forgets the rows of a phase after `step`: a resumed run makes them again."""
    if phase in self._pending and self._pending[phase][0] > step:
      del self._pending[phase]
    if not self._enabled:
      return
    files.keep(self._path, lambda row: row['phase'] != phase or row['step'] <= step)
    if phase in self._boards:
      self._boards.pop(phase).close()
    if (self._path.parent / 'tensorboard' / phase).exists():
      self._board(phase, purge_step=step + 1)

  def count(self, phase: str) -> int:
    """Returns how many rows of the phase are in the file."""
    return sum(row['phase'] == phase for row in files.read(self._path))

  def close(self) -> None:
    """Writes everything held back and closes the files; may be called twice."""
    self.flush()
    for board in self._boards.values():
      board.close()
    self._boards.clear()


class Progress:
  """Shows a bar on a terminal; elsewhere logs a line every few seconds.

  The first update contains the compilation, so the time left is unknown until
  the second.
  """

  LINE = '{desc} {n_fmt}/{total_fmt}{postfix}, {remaining} left'

  def __init__(
    self, total: int, label: str, *, start: int = 0, every_seconds: float | int = 10
  ):
    self._total, self._every = total, every_seconds
    self._logged, self._unlogged = -math.inf, ''  # last log time; newest line
    self._compiled = False
    self._terminal = sys.stderr.isatty()
    # Without a terminal tqdm counts and formats, but never prints.
    quiet: dict[str, Any] = dict(
      file=io.StringIO(), mininterval=math.inf, bar_format=self.LINE
    )
    self._bar = tqdm.tqdm(
      total=total,
      initial=start,
      desc=label,
      smoothing=0,  # the rate is the mean over all updates
      dynamic_ncols=True,
      **({} if self._terminal else quiet),
    )
    self._bar.set_postfix_str('compiling')

  def update(self, step: int, values: Mapping[str, float]) -> None:
    """Shows that `step` steps are done, and those of `values` that are shown."""
    text = ' '.join(f'{k} {values[k]:.4g}' for k in SHOWN if k in values)
    self._bar.set_postfix_str(text, refresh=False)
    if not self._compiled:
      self._bar.unpause()  # the time until now does not count
      self._bar.initial, self._compiled = step, True
    self._bar.update(step - self._bar.n)
    if not self._terminal:
      self._unlogged, now = str(self._bar), time.monotonic()
      if now - self._logged >= self._every or step >= self._total:
        self._log(now)

  def _log(self, now):
    logging.info('%s', self._unlogged)
    self._logged, self._unlogged = now, ''

  def close(self) -> None:
    """Leaves the bar as it stands, or logs the last line if it was held back."""
    if self._unlogged:
      self._log(time.monotonic())
    self._bar.close()


class Clock:
  """Sums seconds per name: `with clock('sample'): ...`.

  It measures host time: device work counts where the host waits for it. A part inside
  another one stops the outer one's clock, and what is in no part is `between`: so the
  sums add up to the time that has passed. Each begin and end calls beat(name, step) of
  a watchdog. The caller sets `step`.
  """

  def __init__(self, beat: Callable[[str, int], Any] = lambda phase, step: None):
    self.step, self._seconds, self._open, self._beat = 0, {}, ['between'], beat
    self._since = time.perf_counter()

  def _charge(self):
    """Gives the time since the last call to the innermost open part."""
    now, name = time.perf_counter(), self._open[-1]
    self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
    self._since = now

  @contextlib.contextmanager
  def __call__(self, name: str) -> Iterator[None]:
    self._charge()
    self._open.append(name)
    self.beat()
    try:
      yield
    finally:
      self._charge()
      self._open.pop()
      self.beat()

  def beat(self) -> None:
    """Tells the watchdog that the innermost open part makes progress."""
    self._beat(self._open[-1], self.step)

  def take(self) -> dict[str, float]:
    """Returns the sums as metrics `seconds/<name>`, and starts from zero."""
    self._charge()
    taken = {f'seconds/{name}': spent for name, spent in self._seconds.items()}
    self._seconds = {}
    return taken
