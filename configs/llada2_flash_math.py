"""DMPO on competition problems (MATH) from LLaDA2.0-flash, a mixture of experts.

python main.py --config=configs/llada2_flash_math.py:v5p256 \
    --config.model.checkpoint=inclusionAI/LLaDA2.0-flash --config.data.path=DIR

The settings are those of llada2_math.py. 100B weights, of which a token meets 6.1B.
:v5p256 splits the experts over 8 of 128 chips; it is not planned yet (docs/plans.md).
"""

from configs.llada2_math import get_config as llada2_math


def get_config(recipe='ours'):
  return llada2_math(recipe, 'llada2_flash', 'llada2_flash_math')
