"""DMPO on Python programs from LLaDA-8B-Instruct, judged by their tests.

python main.py --config=configs/llada_code.py \
    --config.model.checkpoint=GSAI-ML/LLaDA-8B-Instruct --config.data.path=DIR

DIR holds a train and a test file: for example acecode_hard.jsonl of ml-diffucoder's
recipes/process_data.py as train.jsonl, or KodCode's parquet as train.parquet, and
HumanEval.jsonl (unpacked) as test.jsonl. docs/code.md has the formats, and says how the
programs are kept from the machine: install bubblewrap. llada_countdown.py explains the
settings and the recipes after the colon.

Prompts (to 400 tokens) and rewards are those of coupled-GRPO and ESPO: twice the share
of tests passed, and half a point for a program that compiles. One thing differs: the
tests do not run in the program's process, where RL may find how to pass them without
being right (data.protocol = strict). --config.data.protocol=paper, with
--config.reward.weights.tests=1, is the published reward to the letter.
Published at 128 / 256 / 512 tokens, HumanEval: LLaDA-1.5 29.3 / 39.6 / 51.9, ESPO 28.1
/ 42.1 / 50.0, GDPO 26.2 / 39.6 / 39.0, JustGRPO 37.8 / 49.4 / 48.7; MBPP: LLaDA-1.5
39.6 / 39.9 / 38.8, ESPO 47.4 / 44.6 / 44.2, GDPO 43.6 / 50.6 / 47.1, JustGRPO 50.6 /
52.4 / 49.0. The standard error of one number is 3.9 on HumanEval's 164 problems and 2.2
on MBPP's 500. To measure a file by itself, name it and add --mode=eval:

    --config.data.path=HumanEval.jsonl --config.eval.style=script
    --config.data.path=mbpp.jsonl --config.eval.style=mbpp

and --config.eval.sampler.cache=none "--config.eval.lengths=(128, 256, 512)". For pass@k
add --config.eval.samples=10 --config.eval.sampler.temperature=0.2.
"""

from configs.llada_countdown import choose, llada


def get_config(recipe='ours'):
  c = llada()
  c.name = 'llada_code'
  c.data.task = 'code'
  c.data.train_size = 0  # all of the file
  c.data.test_size = 0
  c.data.prompt_length = 400
  c.data.protocol = 'strict'
  c.reward.weights.tests = 2.0
  c.reward.weights.solved = 0.0
  return choose(c, recipe)
