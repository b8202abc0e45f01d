"""DMPO on 4x4 sudoku from LLaDA-8B-Instruct.

python main.py --config=configs/llada_sudoku.py \
    --config.model.checkpoint=GSAI-ML/LLaDA-8B-Instruct

Puzzles are generated; no solution grid of the test is ever trained on, which
is not so in the field's split (all 288 grids are in both): set
--config.data.path=FILE for its CSV. Protocol paper grades cells, not puzzles.
Planned as llada_countdown: 16 TPU v5e, 11.3 GiB a chip, at least 9.8 h.
Published cell accuracy, zero-shot at 128 / 256 / 512 tokens: base 11.7 / 6.7 /
5.5, d1 22.1 / 16.7 / 9.5, DMPO best 32.8 (one token a step).
"""

from configs import llada_countdown


def get_config(recipe='ours'):
  c = llada_countdown.get_config(recipe)
  c.name = 'llada_sudoku'
  c.data.task = 'sudoku'
  c.data.train_size = 20000
  return c
