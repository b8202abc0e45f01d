"""DMPO on grade-school word problems from LLaDA-8B-Instruct.

python main.py --config=configs/llada_gsm8k.py \
    --config.model.checkpoint=GSAI-ML/LLaDA-8B-Instruct --config.data.path=DIR

DIR holds train.jsonl and test.jsonl (or parquet) with the columns question and answer:
github.com/openai/grade-school-math, or openai/gsm8k on the hub. llada_countdown.py
explains the settings and the recipes after the colon.
Planned: at least 12.6 h on one H100 (:h100), 5.0 h on 16 TPU v5e (:v5e16). The reward
is d1's five terms, with their quirks; --config.data.protocol=strict repairs them.
Published, 1319 test problems at 128 / 256 / 512 tokens, two tokens a step: base 68.7 /
76.7 / 78.2, d1 73.2 / 81.1 / 82.1, SPG 78.5 / 86.1 / 84.5. The standard error of one
number is 1.1. llada_countdown.py says how to measure as they did.
"""

from configs.llada_countdown import choose, llada


def get_config(recipe='ours'):
  c = llada()
  c.name = 'llada_gsm8k'
  c.data.task = 'gsm8k'
  c.data.train_size = 0  # all of the file
  c.data.test_size = 0
  return choose(c, recipe)
