"""DMPO on competition problems (MATH) from SDAR-4B-Chat, a block-causal model.

python main.py --config=configs/sdar_math.py \
    --config.model.checkpoint=JetLM/SDAR-4B-Chat --config.data.path=DIR

The data is that of llada_math.py. TraDo-4B-Instruct and other checkpoints of type
`sdar` run as they are. One whose config.json names no block_size also needs
--config.model.attention_block=4 (or what its name ends with, b8 to b64).
llada_countdown.py explains the adapters, the optimizer and the recipes after the colon;
objectives that need the whole text say so.

Rollouts are the releases' (TraceRL, DiPO): temperature 1, all tokens above 0.9 at once,
else the best one, blocks of 4, up to 2048 tokens, an end at the block with a stop. One
field differs: they rank a position by the token that they drew, and we by the largest
probability (sampler.rank = max). So the order depends on the state alone, and
logprob.estimator = trajectory gives exact weights in one packed pass. At 0.9 the two
differ only where a confident position drew another token. The answer stands in a box,
and is paid for being right alone.
The evaluation is greedy, one token a step from left to right in each block, as
published: the releases keep one token (top_k = 1) before they rank, so that all
positions tie. Their dynamic numbers: --config.eval.sampler.pick=dynamic
--config.eval.sampler.temperature=1.0 --config.eval.sampler.rank=token.
Planned for one H100 (:h100): 53.9 GiB of the 72.8 that JAX takes, at least 57 s a
rollout (at one token a step; 0.9 needs fewer), 51 s an update, 65 h in all; for eight
(:h100x8) 12 s, 6.4 s, 8.8 h. On 16 TPU v5e (:v5e16) it needs 13.1 GiB of a chip's
15.75, and a rollout waits three minutes for the network: 40 h.
Published, MATH-500, static / dynamic: SDAR-1.7B 63.2, SDAR-4B 72.8 (70.2 / 67.4 in
TraDo's table), SDAR-8B 78.6 (74.3 / 70.7); TraDo-4B 75.6 / 71.8, TraDo-8B 78.5 / 75.5,
DiRL-8B 83.1. The standard error of one number is 2.2.
"""

from configs.llada_countdown import choose
from configs.llada_math import get_config as llada_math
from dmpo_jax.tasks import TASKS


def blocks(c, preset, length, block=4):
  """Gives a LLaDA config a block-causal network, and how such models are sampled."""
  c.model.preset = preset
  c.model.head_chunk = 256
  c.lora.targets = 'all'
  c.data.style = 'boxed'
  c.data.protocol = 'strict'
  for term in TASKS[c.data.task].terms:
    c.reward.weights[term] = float(term == 'correctness')
  for s, pick in ((c.sampler, 'dynamic'), (c.eval.sampler, 'sequential')):
    s.length = s.steps = length
    s.block = block
    s.pick = pick
    s.rank = 'max'
    s.cache = 'block'
    s.eos_stop = True
  c.sampler.temperature = 1.0
  c.logprob.estimator = 'trajectory'
  c.train.microbatches = 8
  return c


def get_config(recipe='ours'):
  c = blocks(llada_math('paper'), 'sdar_4b', length=2048)
  c.name = 'sdar_math'
  return choose(c, recipe)
