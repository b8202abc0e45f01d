"""The tasks by name. One file each; pure host functions without jax."""

from dmpo_jax.tasks import countdown, sudoku

TASKS = {'countdown': countdown.TASK, 'sudoku': sudoku.TASK}
