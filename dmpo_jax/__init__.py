"""Reinforcement learning of masked diffusion language models in JAX.

`import dmpo_jax as dj` gives the Python API of api.py: dj.load, dj.run, dj.rl,
dj.sft and dj.Model. It is loaded when it is first used.
"""

import importlib
from typing import Any

API = ('Model', 'load', 'rl', 'run', 'sft')


def __getattr__(name: str) -> Any:
  if name not in API:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(f'{__name__}.api'), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *API})
