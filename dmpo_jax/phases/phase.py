"""The seam between the loop (train.py) and the phases: a Session and a Phase."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from dmpo_jax import build, metrics, resume
from dmpo_jax.types import Params, TrainState


class Tracer:
  """Traces `count` iterations into a folder, for TensorBoard or Perfetto.

  It begins with a session's second iteration, because the first one compiles. Of
  several processes the first traces its own devices.
  """

  def __init__(self, folder: str, count: int, clock: metrics.Clock):
    self.folder, self.count = folder, count * (jax.process_index() == 0)
    self.clock = clock
    self.first: int | None = None  # iteration of the session
    self.on = False

  def at(self, iteration: int) -> None:
    """Begins or ends the trace where it is time; called before each update."""
    if not self.count:
      return
    self.first = iteration if self.first is None else self.first
    if not self.on and iteration == self.first + 1:
      with self.clock('profile'):
        jax.profiler.start_trace(self.folder)
      self.on = True
    if self.on and iteration == self.first + 1 + self.count:
      self.stop()

  def stop(self) -> None:
    with self.clock('profile'):
      jax.profiler.stop_trace()
    self.count, self.on = 0, False
    logging.info('trace in %s: tensorboard --logdir shows it', self.folder)

  def __enter__(self) -> 'Tracer':
    return self

  def __exit__(self, *_: Any) -> None:
    if self.on:
      self.stop()


@dataclasses.dataclass(frozen=True)
class Session:
  """What the phases of one run share."""

  built: build.Built
  workdir: str
  writer: metrics.Writer
  beat: Callable[[str, int], None] = lambda phase, step: None  # guard.Watchdog.beat
  rates: Callable[..., dict[str, float]] = lambda *_: {}  # tools.speed.Meter
  profile: int = 0  # iterations of RL that are traced; 0 = none


class Phase(abc.ABC):
  """A way to train: `iterations` buffers with `inner` updates on each.

  A subclass sets the fields and overrides what differs; SFT is the smallest.
  """

  name: str  # its folder of checkpoints, its label in logs
  rows: str  # the phase of its update rows in metrics.jsonl
  lr_field: str  # the config field of its learning rate
  overlap: bool = False  # whether the next buffer is sampled before the updates
  validates: bool = False  # whether `validate` has something to do after the last one
  iterations: int
  inner: int

  def __init__(self, session: Session):
    self.session, self.built = session, session.built
    self.config, self.writer = session.built.config, session.writer
    self.clock = metrics.Clock(session.beat)
    self.tracer = Tracer('', 0, self.clock)
    self.frozen: Params = {}  # parameters that do not train
    self.shown: dict[str, float] = {}  # the newest numbers, for the progress line
    self.refuse = resume.refuse(self.config)  # meta -> why it is not this run's

  @property
  def updates(self) -> int:
    """Optimizer updates of the whole phase."""
    return self.iterations * self.inner

  @abc.abstractmethod
  def start(self) -> TrainState:
    """Returns the training state of a fresh run."""

  def buffers(self, update: int) -> dict[str, int]:
    """Returns the buffers of a checkpoint: 'batch' or 'ahead' -> their iteration."""
    return {}

  def shapes(self, update: int) -> dict[str, Any]:
    """Returns the same buffers as trees of ShapeDtypeStructs."""
    return {}

  def prepare(self, update: int) -> int | None:
    """Cuts the workdir's files back to `update`; returns the best update before."""
    self.writer.rewind(self.rows, update)

  def begin(self, state: TrainState, iteration: int, age: int) -> Any:
    """Begins a buffer with a policy that is `age` updates old when it is used."""
    return None

  @abc.abstractmethod
  def finish(self, begun: Any, place: resume.Place) -> tuple[Any, resume.Place]:
    """Returns what `begin` has begun as a batch, and the place with its numbers."""

  @abc.abstractmethod
  def update(self, state: TrainState, batch: Any, inner: int) -> tuple[TrainState, Any]:
    """Takes one optimizer update; returns (state, numbers on the device)."""

  def judge(self, place: resume.Place, numbers: Any) -> tuple[resume.Place, bool]:
    """Notes the numbers of a buffer's last update; returns whether training ends."""
    return place, False

  def stop_if_unhealthy(self, place: resume.Place) -> None:
    """Ends the process if `judge` has said so at this place."""
    return None

  def validates_after(self, update: int) -> bool:
    """Returns whether `validate` is called after an update; where a buffer ends."""
    return update % self.inner == 0

  def outcome(self, state: TrainState) -> Params:
    """Returns the parameters that the phase ends with."""
    return {**self.frozen, **state.trainable}

  def validate(self, state: TrainState, update: int, beat: Callable[[], None]) -> bool:
    """Validates if it is due after `update`; returns whether it is the best so far.

    beat: is called after each completion; what it raises ends the validation.
    """
    return False
