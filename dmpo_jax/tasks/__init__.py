"""Tasks by name: one file each, pure host functions without jax.

To add a task: write `dmpo_jax/tasks/NAME.py` with a `TASK` and add its name here. A
task outside the package is FILE.py:NAME. `prompts` and `gym` are families, whose
members are named after a colon.
"""

import importlib

from dmpo_jax.rules import nearest
from dmpo_jax.tasks import gym, prompts, userfile
from dmpo_jax.types import Task

NAMES = ('code', 'countdown', 'gsm8k', 'math', 'sudoku')
TASKS: dict[str, Task] = {
  name: importlib.import_module(f'dmpo_jax.tasks.{name}').TASK for name in NAMES
}
FAMILIES = {'prompts': prompts, 'gym': gym}
CHOICES = (*NAMES, *prompts.CHOICES, 'gym:NAME', 'FILE.py:NAME')


def find(name: str, field: str = 'data.task') -> Task:
  """Returns the task of a name: NAME, prompts:VERIFIER, gym:NAME or FILE.py:NAME.

  ValueError says what is wrong with the name, the file or a missing package.
  """
  if name in TASKS:
    return TASKS[name]
  family, _, member = name.partition(':')
  if family in FAMILIES:
    return FAMILIES[family].task_of(member, field)
  if not userfile.is_spec(name):
    raise ValueError(nearest(field, name, CHOICES)[0])
  task = userfile.load(field, name)
  if not isinstance(task, Task):
    raise ValueError(
      f'{field} = {name!r} must be a dmpo_jax.types.Task, it is a {type(task).__name__}'
    )
  if 'bare' not in task.styles:
    raise ValueError(f"{field} = {name!r}: its styles {task.styles} must have 'bare'")
  return task


def readers() -> dict[str, dict[str, tuple[str, ...]]]:
  """Returns name -> the options that the task or the family reads: Task.options."""
  known = {name: task.options for name, task in TASKS.items()}
  return known | {name: family.OPTIONS for name, family in FAMILIES.items()}
