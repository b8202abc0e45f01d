"""Published checkpoints and adapters, under the names that scripts rely on."""

# ruff: noqa: F401  this file re-exports
from dmpo_jax.hf import (
  INDEX,
  check_adapter,
  load_hf,
  locate,
  read_adapter,
  read_config,
  read_params,
  warn_of_base,
)
