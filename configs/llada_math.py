"""DMPO on competition problems (MATH) from LLaDA-8B-Instruct.

python main.py --config=configs/llada_math.py \
    --config.model.checkpoint=GSAI-ML/LLaDA-8B-Instruct --config.data.path=DIR

DIR holds a train and a test file (jsonl or parquet) with the columns problem and
solution. The paper trains on ankner/math-500 and tests on the 500 problems of
HuggingFaceH4/MATH-500, both on the hub. Prompts of more than 256 tokens are dropped,
from the test too; the log and the results card (prompts_changed) say how many.
llada_countdown.py explains the settings and the recipes after the colon.
Planned: at least 12.6 h on one H100 (:h100), 5.0 h on 16 TPU v5e (:v5e16).
Published, MATH-500 at 128 / 256 / 512 tokens: base 26.0 / 32.4 / 36.2, d1 33.8 / 38.6 /
40.2, SPG 33.4 / 40.0 / 41.8, DMPO best 42.8 (one token a step). The standard error of
one number is 2.2.
"""

from configs.llada_countdown import choose, llada


def get_config(recipe='ours'):
  c = llada()
  c.name = 'llada_math'
  c.data.task = 'math'
  c.data.train_size = 0  # all of the file
  c.data.test_size = 0
  return choose(c, recipe)
