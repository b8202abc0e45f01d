"""How long tests are left to the whole suite."""

import pytest


def mostly_slow(values, quick, left=pytest.mark.slow):
  """Returns parameters, of which all but those in `quick` have the marker slow.

  left: another marker. A value that is a tuple has the parameters of one test.
  """
  return [
    pytest.param(
      *(x if isinstance(x, tuple) else (x,)), marks=() if x in quick else left
    )
    for x in values
  ]
