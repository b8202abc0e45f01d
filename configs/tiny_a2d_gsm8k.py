"""DMPO on grade-school word problems from dllm's Qwen3-0.6B-bd3lm, on one GPU.

python main.py --config=configs/tiny_a2d_gsm8k.py \
    --config.model.checkpoint=dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1 \
    --config.data.path=DIR

The cheapest published block-causal model. Its files do not say that it attends in
blocks of 32 tokens, so model.attention_block does. The data is that of llada_gsm8k.py;
sdar_math.py explains the settings. The evaluation is greedy, one
token a step, the most confident first, as published. dllm counts the blocks of its
training from the text's first token, as here, but those of its evaluation from the
prompt's end: --config.model.attention_grid=prompt does the same.
Blocks of 32 tokens have up to 32 rounds. The exact weights read them in 32 masked
copies; --config.logprob.states=8 reads 8 of them, without bias.
Planned for one H100 (:h100): 14.1 GiB at the peak, of the 72.8 that JAX takes. At least
4.4 s a rollout (at one token a step), 1.5 s an update, 2.3 h.
Published, 1319 test problems, 256 tokens: 46.3, and the sibling mdlm 29.3. The standard
error of one number is 1.4.
"""

from configs.llada_countdown import choose
from configs.llada_gsm8k import get_config as llada_gsm8k
from configs.sdar_math import blocks


def get_config(recipe='ours'):
  c = blocks(llada_gsm8k('paper'), 'a2d_0_6b', length=256, block=32)
  c.name = 'tiny_a2d_gsm8k'
  c.model.attention_block = 32
  c.eval.sampler.pick = 'confidence'
  c.train.microbatches = 16
  return choose(c, recipe)
