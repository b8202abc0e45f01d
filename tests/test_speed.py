"""The rates of a run: from clocks that are made up, and the FLOPs of closed forms."""

import pytest
from tiny_run import tiny

from dmpo_jax import build
from dmpo_jax.tools import chips, speed

P = 18
CLOCKS = {
  'sample': 4.0,
  'update': 5.0,
  'between': 1.0,
  'evaluate': 50.0,
  'compile': 3.0,
}
NUMBERS = {'forwards': 4, 'length': 12.5, 'seconds/checkpoint': 30.0}
NUMBERS |= {f'seconds/{name}': spent for name, spent in CLOCKS.items()}


def meter(**fields):
  c = tiny()
  c.update_from_flattened_dict(fields)
  return speed.Meter(build.build(c))


def test_rates_leave_out_what_is_no_training():
  found = meter()(NUMBERS, P, 3)
  assert found['tokens_per_second'] == 8 * 12.5 / 10.0
  assert found['forwards_per_second'] == 1.0
  assert found['gib/cache'] == 0 < found['gib/weights']
  assert 'mfu' not in found  # a CPU has no data sheet


def of_tokens(cfg, tokens, seen):
  """Returns FLOPs of the layers for so many tokens that see `seen` others each."""
  weights = 4 * cfg.width**2 + 3 * cfg.width * cfg.mlp
  return 2 * cfg.layers * tokens * (weights + 2 * seen * cfg.width)


@pytest.mark.parametrize('cache', ['none', 'dual', 'prefix'])
def test_flops_of_a_forward(cache):
  """One forward more, of all tokens, or of those beside a cache, which they see too."""
  one = meter(**{'sampler.cache': cache, 'sampler.block': 4, 'sampler.steps': 16})
  cfg, devices = one.built.model, one.built.mesh.devices.size
  whole, text = one.flops(P, 4, 0), P + 16
  more = one.flops(P, 8, 0) - whole
  spans = {'none': [text] * 4, 'dual': [4] * 4, 'prefix': [16, 12, 8, 4]}[cache]
  assert more == pytest.approx(
    sum(
      8
      * (
        of_tokens(cfg, x, text + (cache != 'none') * x) + 2 * 4 * cfg.width * cfg.vocab
      )
      / devices
      for x in spans
    )
  )


def test_mfu_is_the_share_of_the_peak(monkeypatch):
  monkeypatch.setitem(chips.CHIPS, 'cpu', chips.Chip(1, 1e9, 1e9, 1e9))
  one = meter()
  none, three = (one(NUMBERS, P, updates)['mfu'] for updates in (0, 3))
  assert none == pytest.approx(one.flops(P, 4, 0) / 10.0 / 1e9)
  step = one.flops(P, 4, 1) - one.flops(P, 4, 0)
  assert three - none == pytest.approx(3 * step / 10.0 / 1e9)
  # A pass over 2 copies of 8 rows, and twice as much for the gradient.
  cfg, text = one.built.model, P + 16
  forward = 2 * 8 * (of_tokens(cfg, text, text) + 2 * 16 * cfg.width * cfg.vocab)
  assert step * one.built.mesh.devices.size == pytest.approx(3 * forward, rel=0.4)
