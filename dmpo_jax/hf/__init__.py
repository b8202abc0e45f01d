"""Hugging Face directories and PEFT adapters, read and written."""

# ruff: noqa: F401  this file re-exports
from dmpo_jax.hf.config import read_config
from dmpo_jax.hf.families import INDEX, kind_of
from dmpo_jax.hf.read import (
  check_adapter,
  load_hf,
  locate,
  read_adapter,
  read_params,
  warn_of_base,
)
from dmpo_jax.hf.write import export, save_adapter, save_hf
