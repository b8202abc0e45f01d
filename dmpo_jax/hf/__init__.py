"""Hugging Face directories and PEFT adapters, read and written."""

# ruff: noqa: F401  this file re-exports
from dmpo_jax.hf.config import read_config
from dmpo_jax.hf.families import INDEX, kind_of
from dmpo_jax.hf.peft import check_adapter, read_adapter, warn_of_base
from dmpo_jax.hf.read import load_hf, locate, read_params
from dmpo_jax.hf.write import export, save_adapter, save_hf
