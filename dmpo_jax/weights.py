"""Published checkpoints, under the name that scripts rely on."""

from dmpo_jax.hf import load_hf as load_hf
