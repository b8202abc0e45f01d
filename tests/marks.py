"""How long tests are left to the whole suite."""

import pytest


def mostly_slow(values, quick):
  """Returns parameters, of which all but those in `quick` have the marker slow.

  A value that is a tuple has the parameters of one test.
  """
  return [
    pytest.param(
      *(x if isinstance(x, tuple) else (x,)),
      marks=() if x in quick else pytest.mark.slow,
    )
    for x in values
  ]
