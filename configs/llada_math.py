"""DMPO on competition problems (MATH) from LLaDA-8B-Instruct.

python main.py --config=configs/llada_math.py \
    --config.model.checkpoint=GSAI-ML/LLaDA-8B-Instruct --config.data.path=DIR

DIR holds a train and a test file (jsonl or parquet) with columns problem and
solution: the paper trains on ankner/math-500 and tests on the 500 problems of
HuggingFaceH4/MATH-500, both on the hub. Prompts of more than 256 tokens are
left out, of the test too (the card's prompts_changed); the log says how many.
Planned as llada_countdown: 16 TPU v5e, 11.3 GiB a chip, at least 9.8 h.
Published, MATH-500 at 128 / 256 / 512 tokens: base 26.0 / 32.4 / 36.2, d1 33.8
/ 38.6 / 40.2, SPG 33.4 / 40.0 / 41.8, DMPO best 42.8 (one token a step).
Standard error of one number: 2.2.
"""

from configs import llada_gsm8k


def get_config(recipe='ours'):
  c = llada_gsm8k.get_config(recipe)
  c.name = 'llada_math'
  c.data.task = 'math'
  return c
