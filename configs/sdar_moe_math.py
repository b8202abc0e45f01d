"""DMPO on competition problems (MATH) from SDAR-30B-A3B-Chat, a mixture of experts.

python main.py --config=configs/sdar_moe_math.py \
    --config.model.checkpoint=JetLM/SDAR-30B-A3B-Chat --config.data.path=DIR

The data is that of llada_math.py; sdar_math.py explains the settings, which are the
same. 30B weights, of which a token meets 3B: 8 of 128 experts in each layer. The
release's config.json has no block_size: 4 is taken, with a warning. A release with
other blocks needs model.attention_block, as its name ends.
Adapters lie on attention alone, for no layer has a dense MLP or a shared expert;
lora.targets = experts adds the experts.
Published, MATH-500 77.8 and GSM8K 91.4 (SDAR's table).
"""

from configs.llada_countdown import choose
from configs.llada_math import get_config as llada_math
from configs.sdar_math import blocks


def get_config(recipe='ours'):
  c = blocks(llada_math('paper'), 'sdar_30b', length=2048)
  c.name = 'sdar_moe_math'
  return choose(c, recipe)
