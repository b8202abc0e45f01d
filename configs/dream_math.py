"""DMPO on competition problems (MATH) from Dream-v0-Instruct-7B.

python main.py --config=configs/dream_math.py \
    --config.model.checkpoint=Dream-org/Dream-v0-Instruct-7B \
    --config.data.path=DIR

The data is that of llada_math.py, the model's settings are those of dream_countdown.py.
Planned for one H100 (:h100): 52.9 GiB of the 72.8 that JAX takes, at least 12.2 h. For
16 TPU v5e (mesh.fsdp=16): 13.1 GiB of a chip's 15.75.
Published (mean over 128, 256, 512 tokens): base 44.0, ESPO 46.0.
"""

from configs import dream_countdown, llada_math
from configs.llada_countdown import choose


def get_config(recipe='ours'):
  c = dream_countdown.dream(llada_math.get_config('paper'))
  c.name = 'dream_math'
  return choose(c, recipe)
