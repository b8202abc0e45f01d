"""DMPO on countdown with three numbers from Dream-v0-Instruct-7B.

python main.py --config=configs/dream_countdown.py \
    --config.model.checkpoint=Dream-org/Dream-v0-Instruct-7B

Dream's output at position i - 1 predicts token i; the model code undoes that shift.
Only the adapters differ from llada_countdown.py: they are on all seven linears. That
file explains the recipes after the colon.
Planned for one H100 (:h100): 52.9 GiB of the 72.8 that JAX takes, at least 12.2 h. For
16 TPU v5e (mesh.fsdp=16): 13.1 GiB of a chip's 15.75.
Published: base 11.2, ESPO 66.8 (mean over 128, 256, 512 tokens).
"""

from configs import llada_countdown


def dream(c):
  """Gives a LLaDA config Dream's network and adapters."""
  c.model.preset = 'dream_7b'
  c.lora.targets = 'all'
  return c


def get_config(recipe='ours'):
  c = dream(llada_countdown.get_config('paper'))
  c.name = 'dream_countdown'
  return llada_countdown.choose(c, recipe)
