"""DMPO on grade-school word problems from SDAR-1.7B-Chat, a block-causal model.

python main.py --config=configs/sdar_gsm8k.py \
    --config.model.checkpoint=JetLM/SDAR-1.7B-Chat --config.data.path=DIR

The data is that of llada_gsm8k.py; sdar_math.py explains the settings, which differ in
the length alone.
Planned for 16 TPU v5e (:v5e16): 6.2 GiB of a chip's 15.75, at least 3.8 s a rollout (at
one token a step), 7.7 s an update, 9.1 h in all. For one H100 (:h100): 17.6 GiB, 4.7 s,
4.7 s, 5.8 h.
Published, 1319 test problems: SDAR-1.7B 80.1, SDAR-4B 89.9 (90.2 / 88.9 static /
dynamic in TraDo's table), SDAR-8B 91.3 (91.1 / 90.4); TraDo-4B 91.2 / 90.3, TraDo-8B
92.3 / 91.2, DiRL-8B 93.0. The standard error of one number is 1.1. From 4B on the task
is nearly solved.
"""

from configs.llada_countdown import choose
from configs.llada_gsm8k import get_config as llada_gsm8k
from configs.sdar_math import blocks


def get_config(recipe='ours'):
  c = blocks(llada_gsm8k('paper'), 'sdar_1_7b', length=512)
  c.name = 'sdar_gsm8k'
  c.model.head_chunk = 32
  return choose(c, recipe)
