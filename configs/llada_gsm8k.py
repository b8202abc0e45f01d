"""DMPO on grade-school word problems from LLaDA-8B-Instruct.

python main.py --config=configs/llada_gsm8k.py \
    --config.model.checkpoint=GSAI-ML/LLaDA-8B-Instruct --config.data.path=DIR

DIR holds train.jsonl and test.jsonl (or parquet) with columns question and
answer: github.com/openai/grade-school-math, or openai/gsm8k on the hub.
Planned as llada_countdown: 16 TPU v5e, 11.3 GiB a chip, at least 9.8 h. The
reward is the lineage's five terms, quirks included (strict repairs them).
Published, 1319 test problems at 128 / 256 / 512 tokens, two tokens a step:
base 68.7 / 76.7 / 78.2, d1 73.2 / 81.1 / 82.1, SPG 78.5 / 86.1 / 84.5.
Standard error of one number: 1.1. To measure so: see llada_countdown.
"""

from configs import llada_countdown


def get_config(recipe='ours'):
  c = llada_countdown.get_config(recipe)
  c.name = 'llada_gsm8k'
  c.data.task = 'gsm8k'
  c.data.train_size = 0  # all there are
  c.objective.best = 0.0  # its reward is a sum of terms: no value means right
  c.data.test_size = 0
  return c
