"""DMPO on competition problems (MATH) from LLaDA2.0-flash, a mixture of experts.

python main.py --config=configs/llada2_flash_math.py:v5p256 \
    --config.model.checkpoint=inclusionAI/LLaDA2.0-flash --config.data.path=DIR

The settings are those of llada2_math.py. 100B weights, of which a token meets 6.1B.
Planned for a v5p-256 (:v5p256), which splits the experts over 8 of its 128 chips: 86.5
GiB of a chip's 95.7, at least 23 s a rollout, 1.1 s an update, 4.5 h in all.
"""

from configs.llada2_math import get_config as llada2_math


def get_config(recipe='ours'):
  return llada2_math(recipe, 'llada2_flash', 'llada2_flash_math')
