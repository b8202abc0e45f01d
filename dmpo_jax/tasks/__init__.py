"""The tasks by name. One file each; pure host functions without jax."""

from dmpo_jax.tasks import countdown, gsm8k, math, sudoku

TASKS = {
  'countdown': countdown.TASK,
  'gsm8k': gsm8k.TASK,
  'math': math.TASK,
  'sudoku': sudoku.TASK,
}
