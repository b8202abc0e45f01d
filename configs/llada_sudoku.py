"""DMPO on 4x4 sudoku from LLaDA-8B-Instruct.

python main.py --config=configs/llada_sudoku.py \
    --config.model.checkpoint=GSAI-ML/LLaDA-8B-Instruct

Puzzles are generated; no solution grid of the test is ever trained on. In the split of
the published papers all 288 grids are in both; --config.data.path=FILE reads their CSV.
Protocol `paper` grades cells, not whole puzzles. llada_countdown.py explains the
settings and the recipes after the colon.
Planned: at least 12.6 h on one H100 (:h100), 5.0 h on 16 TPU v5e (:v5e16).
Published cell accuracy, zero-shot at 128 / 256 / 512 tokens: base 11.7 / 6.7 / 5.5, d1
22.1 / 16.7 / 9.5, DMPO best 32.8 (one token a step).
"""

from configs.llada_countdown import choose, llada


def get_config(recipe='ours'):
  c = llada()
  c.name = 'llada_sudoku'
  c.data.task = 'sudoku'
  c.data.train_size = 20000
  return choose(c, recipe)
