"""The phases of training, by name. A new one is a file and a line here."""

from collections.abc import Callable

from dmpo_jax.phases.pairs import Pairs
from dmpo_jax.phases.phase import Phase, Session
from dmpo_jax.phases.rl import RL
from dmpo_jax.phases.sft import SFT

PHASES: dict[str, Callable[..., Phase]] = {'sft': SFT, 'pairs': Pairs, 'rl': RL}

__all__ = ['PHASES', 'Phase', 'Session']
