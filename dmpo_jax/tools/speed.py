"""Says how fast a run is: tokens and forwards per second, and the share of the peak.

The command line gives a `Meter` to the training loop, which calls it once a buffer.
"""

from collections.abc import Mapping
from typing import Any

from dmpo_jax import build, fits
from dmpo_jax.tools import chips, costs, plan

# Parts of an iteration that are no training: they do not count in rates.
APART = ('evaluate', 'checkpoint', 'profile')
OVERLAID = ('compile',)  # their seconds are in those of other parts


class Meter:
  """Turns the numbers of a buffer, with its clocks, into rates."""

  def __init__(self, built: build.Built):
    self.built = built
    self.chip = chips.chip_of(built.mesh.devices.flat[0])
    frozen, state = build.abstract_states(built)
    self.weights = fits.per_device({**frozen, **state.trainable})
    self.traced: dict[int, dict[str, Any]] = {}  # P -> {program: its jaxpr}

  def __call__(
    self, numbers: Mapping[str, float], prompt: int, updates: int
  ) -> dict[str, float]:
    """Returns the rates since the row before.

    numbers: the row's metrics. prompt: P of the buffer. updates: those that were taken
    since the row before.
    """
    train = self.built.config.train
    clocks = {k[8:]: v for k, v in numbers.items() if k.startswith('seconds/')}
    seconds = sum(v for k, v in clocks.items() if k not in (*APART, *OVERLAID))
    tokens = train.prompts * train.group * numbers['length']
    rates = {
      'tokens_per_second': tokens / seconds,
      'forwards_per_second': numbers['forwards'] / clocks['sample'],
      'gib/weights': self.weights / fits.GIB,
      'gib/cache': plan.cache_bytes(self.built, prompt) / fits.GIB,
    }
    if self.chip and self.built.config.sampler.parallel == 'jit':
      flops = self.flops(prompt, numbers['forwards'], updates)
      rates['mfu'] = flops / seconds / self.chip.flops
    return rates

  def flops(self, prompt: int, forwards: float, updates: int) -> float:
    """Returns a device's FLOPs of a buffer and some updates: those of the matmuls."""
    if prompt not in self.traced:
      jobs = build.programs(self.built, prompt, prompt)[:3]
      self.traced[prompt] = {
        name: program.trace(*args).jaxpr.jaxpr for name, program, args in jobs
      }
    grid, c = self.built.mesh, self.built.config
    hp, rows = c.sampler, c.train.prompts * c.train.group
    steps = costs.steps_of(hp, rows, forwards)
    trips = costs.trips_of(hp, self.built.model.block_causal, rows, steps)
    trips = {'sample': trips, 'score': (steps,)}
    times = {'sample': 1, 'score': 1, 'update': updates}
    return sum(
      times[name]
      * costs.matmuls(
        jaxpr, trips.get(name, (1,)), grid.devices.size, grid.shape['tensor']
      )[0]
      for name, jaxpr in self.traced[prompt].items()
    )
