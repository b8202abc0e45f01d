"""DMPO on competition problems (MATH) from Fast-dLLM v2 7B, a block-causal model.

python main.py --config=configs/fast_dllm_math.py \
    --config.model.checkpoint=Efficient-Large-Model/Fast_dLLM_v2_7B \
    --config.data.path=DIR

The data is that of llada_math.py; sdar_math.py explains the settings. The model attends
in blocks of 32 tokens and unmasks sub-blocks of 8 from left to right (sampler.block).
Its output at position i - 1 predicts token i; the first token of a block is read off
the block before. The release samples that token greedily at any temperature; here it
is drawn as the others are. The evaluation is greedy, one token a step, the most
confident first: the release's with its threshold off.
Blocks of 32 tokens have up to 32 rounds. The exact weights read them in 32 masked
copies; --config.logprob.states=8 reads 8 of them, without bias.
Planned for 16 TPU v5e (mesh.fsdp=16): 7.7 GiB of a chip's 16, at least 48 s a rollout
(at one token a step), 4.8 s an update, 12 h in all.
Published: MATH 61.6 (1.5B: 38.1), GSM8K 83.7 (62.0).
"""

from configs.llada_countdown import choose
from configs.llada_math import get_config as llada_math
from configs.sdar_math import blocks


def get_config(recipe='ours'):
  c = blocks(llada_math('paper'), 'fast_dllm_7b', length=512, block=8)
  c.name = 'fast_dllm_math'
  c.eval.sampler.pick = 'confidence'
  return choose(c, recipe)
