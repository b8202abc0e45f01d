"""DMPO on countdown with three numbers from Dream-v0-Instruct-7B.

python main.py --config=configs/dream_countdown.py \
    --config.model.checkpoint=Dream-org/Dream-v0-Instruct-7B

Dream predicts token i at place i - 1; the model here undoes that, so nothing
else differs from llada_countdown but the adapters, on all seven linears.
Planned for 16 TPU v5e (mesh.fsdp=16): 13.1 GiB of a chip's 16, at least 9.2 h.
Published: base 11.2, ESPO 66.8 (mean over 128, 256, 512 tokens).
"""

from configs import llada_countdown


def get_config(recipe='ours'):
  c = llada_countdown.get_config(recipe)
  c.name = 'dream_countdown'
  c.model.preset = 'dream_7b'
  c.lora.targets = 'all'
  return c
