"""DMPO on competition problems (MATH) from LLaDA2.0-mini, a mixture of experts.

python main.py --config=configs/llada2_math.py \
    --config.model.checkpoint=inclusionAI/LLaDA2.0-mini --config.data.path=DIR

The data is that of llada_math.py; sdar_math.py explains the settings. 16B weights, of
which a token meets 1.4B: a sigmoid router sends it to 8 of 256 experts, in 4 of 8
groups, beside one that every token meets. The model attends in blocks of 32, which no
file of the release says; LLaDA2.1-mini loads in the same way. LLaDA2.0-flash (100B) has
llada2_flash_math.py. The checkpoint that dFactory's tool merges loads as it is.

Adapters lie on attention, dense MLP and shared experts; lora.targets = experts adds the
others: 768 linears a layer, and 87 times as many weights of adapters.
Rollouts are those of the release at temperature 1: all tokens above 0.95 at once, else
the best one. The evaluation is the release's: greedy, the same rule, blocks of 32. Its
generate draws at temperature 1 where it is asked for 0; ours takes the best token.
Published: MATH 93.2 and GSM8K 94.2 (mini), 95.4 and 96.1 (flash), technical report of
LLaDA2.0; MATH 81.5 and GSM8K 88.5 (mini) in DARE's table.
"""

from configs.llada_countdown import choose
from configs.llada_math import get_config as llada_math
from configs.sdar_math import blocks


def get_config(recipe='ours', preset='llada2_mini', name='llada2_math'):
  c = blocks(llada_math('paper'), preset, length=2048, block=32)
  c.name = name
  for s in (c.sampler, c.eval.sampler):
    s.pick = 'dynamic'
    s.threshold = 0.95
  return choose(c, recipe)
