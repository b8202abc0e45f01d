"""Dashboards that show a run's metrics: TensorBoard, and Weights & Biases if wanted.

metrics.Writer gives them every row that it writes, so all have the same names.
"""

import importlib
import importlib.util
import json
import pathlib
import time
import uuid
from collections.abc import Mapping
from typing import Any

import tensorboardX


class TensorBoard:
  """Event files in WORKDIR/tensorboard: a folder for each phase, one for the config.

  TensorBoard forgets per folder, whatever the tag, so each phase has a folder.
  """

  def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any]):
    self._folder, self._open = workdir / 'tensorboard', {}  # phase -> SummaryWriter
    if config:
      rows = [f'| {name} | `{value}` |' for name, value in config.items()]
      text = '\n'.join(['| field | value |', '|---|---|', *rows])
      self._of('config').add_text('config', text)

  def _of(self, phase, purge_step=None):
    """Returns the phase's event file; a new one forgets steps from `purge_step`.

    The suffix separates two files opened within a second: tensorboardX would
    overwrite the first.
    """
    if phase not in self._open:
      self._open[phase] = tensorboardX.SummaryWriter(
        str(self._folder / phase),
        purge_step=purge_step,
        filename_suffix=f'.{time.time_ns()}',
        flush_secs=10,
      )
    return self._open[phase]

  def write(self, phase: str, step: int, values: Mapping[str, float]) -> None:
    now = time.time()
    for name, value in values.items():
      self._of(phase).add_scalar(f'{phase}/{name}', value, step, walltime=now)

  def rewind(self, phase: str, step: int) -> None:
    """Forgets what follows `step`."""
    if phase in self._open:
      self._open.pop(phase).close()
    if (self._folder / phase).exists():
      self._of(phase, purge_step=step + 1)

  def close(self) -> None:
    for writer in self._open.values():
      writer.close()
    self._open.clear()


class Wandb:
  """A run of Weights & Biases; a resumed workdir goes on with the same one.

  Each phase has its own step, `PHASE/step`. W&B cannot forget: rows that a resumed run
  makes again are there twice, with equal numbers.
  """

  FILE = 'wandb.json'  # in the workdir: the id of its run

  def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], project: str):
    path, wandb = workdir / self.FILE, importlib.import_module('wandb')
    if not path.exists():
      path.write_text(json.dumps({'id': uuid.uuid4().hex[:16]}))
    try:
      self._run = wandb.init(
        project=project,
        id=json.loads(path.read_text())['id'],
        name=workdir.resolve().name,
        dir=str(workdir),
        config=dict(config),
        resume='allow',
      )
    except wandb.Error as error:
      why = ' '.join(str(error).split())
      raise ValueError(
        f'log.wandb = {project}: {why}. Run `wandb login`, or set WANDB_MODE=offline, '
        'or leave log.wandb empty'
      ) from None
    self._phases: set[str] = set()

  def write(self, phase: str, step: int, values: Mapping[str, float]) -> None:
    at = f'{phase}/step'
    if phase not in self._phases:
      self._phases.add(phase)
      self._run.define_metric(at, hidden=True)
      self._run.define_metric(f'{phase}/*', step_metric=at)
    self._run.log({at: step, **{f'{phase}/{name}': x for name, x in values.items()}})

  def rewind(self, phase: str, step: int) -> None:
    """Does nothing, see above."""

  def close(self) -> None:
    self._run.finish()


def check(project: str) -> None:
  """Raises ValueError if log.wandb is set and the package is not installed."""
  if project and importlib.util.find_spec('wandb') is None:
    raise ValueError(
      f"log.wandb = {project} needs the package wandb: pip install 'wandb', or leave "
      'log.wandb empty'
    )
