"""Writes a run's numbers and shows its progress.

`metrics.jsonl` is the truth: one flat JSON object a line, with its phase and
step. The dashboards of boards.py get the same scalars under `phase/name`. METRICS
explains every name.
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
import tqdm
from absl import logging

from dmpo_jax import boards, files

FILE = 'metrics.jsonl'
RESERVED = ('phase', 'step', 'time')
# Numbers on the progress bar and their words there, by where they come from.
SHOWN: tuple[dict[str, str], ...] = (
  {'reward': 'reward', 'accuracy': 'accuracy', 'ess': 'ess'},
  {'validation': 'validation'},
  {'loss': 'loss', 'grad_norm': 'grad'},
  {'tokens_per_second': 'tokens/s', 'mfu': 'mfu'},
)
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
  'resampled': 'further rounds of prompts by curriculum.resample; count',
  'groups_replaced': 'groups of equal rewards replaced by groups of those; per B',
  # --- sampling (rl; eval: forwards, row_forwards, bound)
  'forwards': 'network evaluations to sample one batch; count',
  'row_forwards': 'mean network evaluations that a completion needs itself; count',
  'bound': "mean of the rows' own numbers of the pick rule; sampler.threshold, ..",
  'tokens_per_step': 'mean tokens that a forward reveals in a row; tokens',
  'tokens_per_forward/': 'share of forwards that reveal so many tokens; 0 to 1',
  'confidence': 'mean probability of a token when it is revealed; 0 to 1',
  'confidence_low': '10 % quantile of the probability of revealed tokens; 0 to 1',
  'draft/': 'acceptance: share of drafts that stay, (target_)forwards: of a row, by '
  'the draft and the model; 0 to 1, count',
  'shared_steps': 'first steps that another completion of the group takes too; steps',
  'entropy': "mean entropy of a token's law when it is revealed; nats",
  'logp_token': "mean log-prob of a completion's tokens when they are revealed; nats",
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
  # --- the controller of the sampler (rl; update: mean, sigma, ratio, grad_norm)
  'control/bound': 'mean number that the pick rule sees; sampler.threshold, ..',
  'control/bound_std': 'standard deviation of that number over the rows; the same',
  'control/u': 'mean of the action u that the number is made of; real number',
  'control/u_std': 'standard deviation of u over the rows; real number',
  'control/mean': 'mean over the rows of the mean of u; real number',
  'control/sigma': 'standard deviation of the law of u; real number',
  'control/ratio_log_abs': 'mean absolute log-ratio of the law of u to the old; nats',
  'control/grad_norm': "norm of the controller's gradient; norm",
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
  # --- pairs (pairs, held_out_pairs)
  'elbo_chosen': 'mean lower bound of the log-prob of the chosen completions; nats',
  'elbo_rejected': 'the same of the rejected completions; nats',
  'chosen_gap': 'mean ELBO of the chosen less that of the reference; nats',
  'rejected_gap': 'mean ELBO of the rejected less that of the reference; nats',
  'margin': 'chosen_gap - rejected_gap; nats',
  'pairs_right': 'share of held-out pairs with a margin above 0; 0 to 1, ties 1/2',
  # --- experts (update, sft; routes: rl)
  'expert_top': "tokens of a layer's busiest expert / the mean; 1 = even, 1 to E",
  'expert_entropy': "entropy of the experts' load / that of an even one; 0 to 1",
  'expert_idle': 'share of experts that no token of the batch chose; 0 to 1',
  'routes_differ': "share of the rollout's experts that a pass does not choose; 0 to 1",
  'routes_logp': 'mean |log-prob - record| of tokens that choose experts; nats',
  'routes_replayed': 'the same of tokens that replay the record; nats',
  'routes_most': 'largest of the first in a completion, mean over completions; nats',
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
  """Appends to a run's metrics.jsonl, and gives the same rows to dashboards.

  With `enabled` False, in all processes but the first, it writes nothing. Its
  methods return the same values, so that all processes decide alike. config: fields
  that the dashboards show. wandb: a project of Weights & Biases; '' = none.
  """

  def __init__(
    self,
    workdir: files.Path,
    *,
    enabled: bool = True,
    config: Mapping[str, Any] | None = None,
    wandb: str = '',
  ):
    self._path = pathlib.Path(workdir) / FILE
    self._enabled = enabled
    self._pending = {}  # phase -> (step, values), oldest first
    self._boards: list[Any] = []
    if enabled:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      files.keep(self._path)
      self._boards.append(boards.TensorBoard(self._path.parent, config or {}))
      if wandb:
        self._boards.append(boards.Wandb(self._path.parent, config or {}, wandb))

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *_):
    self.close()

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
      for board in self._boards:
        board.write(phase, int(step), floats)
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
    for board in self._boards:
      board.rewind(phase, step)

  def count(self, phase: str) -> int:
    """Returns how many rows of the phase are in the file."""
    return sum(row['phase'] == phase for row in files.read(self._path))

  def close(self) -> None:
    """Writes everything held back and closes the files; may be called twice."""
    self.flush()
    while self._boards:
      self._boards.pop().close()


class Progress:
  """Shows a bar on a terminal; elsewhere logs a line every few seconds.

  The time left follows from whole buffers of `stride` updates in this session. What
  `waiting` names, such as compiling, does not count. It is unknown before the first
  whole buffer, or before the second one of a single update.

  note: what the shown rewards are of, such as their temperature.
  """

  BAR = '{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}{postfix}'
  LINE = '{desc} {n_fmt}/{total_fmt}{postfix}'
  current: 'Progress | None' = None  # the one on the screen

  def __init__(
    self,
    total: int,
    label: str,
    *,
    start: int = 0,
    every_seconds: float | int = 10,
    stride: int = 1,
    note: str = '',
  ):
    self._total, self._every, self._stride = total, every_seconds, stride
    self._note, self._text = note, ''  # the newest numbers
    self._logged, self._unlogged = -math.inf, ''  # last log time; newest line
    self._idle, self._waits = 0.0, []  # seconds that do not count; what is waited for
    self._first: tuple[int, float] | None = None  # update and time of a whole buffer
    self._left = '? left'
    self._terminal = sys.stderr.isatty()
    # Without a terminal tqdm counts and formats, but never prints.
    quiet: dict[str, Any] = dict(file=io.StringIO(), mininterval=math.inf)
    self._bar = tqdm.tqdm(
      total=total,
      initial=start,
      desc=label,
      dynamic_ncols=True,
      bar_format=self.BAR if self._terminal else self.LINE,
      **({} if self._terminal else quiet),
    )
    self.begin(start)
    Progress.current = self
    if self._terminal:  # a log line begins at the line's start
      logging.get_absl_handler().addFilter(self._clear)

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def begin(self, step: int) -> None:
    """Lets the time left follow from what is done from now on."""
    self._first = None
    if self._stride > 1:  # else the first one may be under way when `update` is called
      self._mark(step)

  def _mark(self, step):
    """Notes the time at a whole buffer's end, and what it says of the time left."""
    if step % self._stride:
      return
    now = time.monotonic() - self._idle
    self._first = self._first or (step, now)
    if done := step - self._first[0]:
      left = (now - self._first[1]) / done * (self._total - step)
      self._left = f'{tqdm.tqdm.format_interval(left)} left'
    elif step >= self._total:  # done in the first buffer
      self._left = ''

  def update(self, step: int, values: Mapping[str, float]) -> None:
    """Shows that `step` steps are done, and those of `values` that are shown."""
    self._mark(step)
    self._text = shown(values, self._note)
    self._bar.set_postfix_str(self._postfix(), refresh=False)
    self._bar.update(step - self._bar.n)
    if not self._terminal:
      self._unlogged, now = str(self._bar), time.monotonic()
      if now - self._logged >= self._every or step >= self._total:
        self._log(now)

  def _postfix(self):
    return ', '.join(filter(None, (self._left, self._text)))

  @contextlib.contextmanager
  def wait(self, what: str, idle: bool) -> Iterator[None]:
    """Shows what the run waits for; see `waiting`."""
    begun, idle = time.monotonic(), idle and not self._waits
    if idle and not self._terminal:
      logging.info('%s: %s ...', self._bar.desc.rstrip(': '), what)
    self._waits.append(what)
    self._show()
    try:
      yield
    finally:
      self._waits.pop()
      self._idle += idle * (time.monotonic() - begun)
      self._show()

  def _show(self):
    if self._terminal:
      now = f'{self._waits[-1]} ...' if self._waits else self._postfix()
      self._bar.set_postfix_str(now)

  def _clear(self, _):
    self._bar.clear()
    return True

  def _log(self, now):
    logging.info('%s', self._unlogged)
    self._logged, self._unlogged = now, ''

  def close(self) -> None:
    """Leaves the bar as it stands, or logs the last line if it was held back."""
    if self._unlogged:
      self._log(time.monotonic())
    self._bar.close()
    logging.get_absl_handler().removeFilter(self._clear)
    Progress.current = None


def shown(values: Mapping[str, float], note: str = '') -> str:
  """Returns the numbers of SHOWN on one line; note: what the first ones are of."""
  groups = []
  for names in SHOWN:
    pairs = [f'{names[name]} {values[name]:.4g}' for name in names if name in values]
    if pairs:
      groups.append(f'{note}: ' * bool(note and 'reward' in names) + ' '.join(pairs))
  return ', '.join(groups)


def waiting(what: str, idle: bool = True) -> contextlib.AbstractContextManager:
  """Names what takes long on the progress bar, or in a log line without a terminal.

  idle: whether the time left does not count this time. If not, only a terminal shows
  it. Nothing within an idle time counts.
  """
  if bar := Progress.current:
    return bar.wait(what, idle)
  logging.info('%s ...', what)
  return contextlib.nullcontext()


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
