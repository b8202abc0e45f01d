"""Tasks by name: one file each, pure host functions without jax.

To add a task: write `dmpo_jax/tasks/NAME.py` with a `TASK` and add its name here.
"""

import importlib

from dmpo_jax.types import Task

NAMES = ('code', 'countdown', 'gsm8k', 'math', 'sudoku')
TASKS: dict[str, Task] = {
  name: importlib.import_module(f'dmpo_jax.tasks.{name}').TASK for name in NAMES
}
