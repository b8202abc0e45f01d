"""Rules of the values that a setting may have, and the base of every section.

A rule takes a value and returns '' if it is allowed, else what it must be.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

Rule = Callable[[Any], str]


def one_of(*values: str) -> Rule:
  """Returns the rule of a name in `values`; its sentence has the nearest one."""

  def rule(x):
    if x in values:
      return ''
    close = difflib.get_close_matches(str(x), values, 1, 0.4)
    hint = f'; did you mean {close[0]!r}?' if close else ''
    return f'must be one of {", ".join(values)}{hint}'

  return rule


def finite(x: float) -> str:
  """The rule of every number: float32 holds it, and what is divided by it."""
  good = x == 0 or 1e-30 <= abs(x) <= 1e30
  return '' if good else 'must be finite: 0, or 1e-30 to 1e30 in size'


def least(low: float) -> Rule:
  return lambda x: finite(x) or ('' if x >= low else f'must be >= {low}')


def above(low: float) -> Rule:
  return lambda x: finite(x) or ('' if x > low else f'must be > {low}')


def chance(x: float) -> str:
  return '' if 0 <= x < 1 else 'must be in [0, 1)'


def share(x: float) -> str:
  return '' if 0 <= x <= 1 else 'must be in [0, 1]'


def positive_share(x: float) -> str:
  return '' if 0 < x <= 1 else 'must be in (0, 1]'


def pairs(x: int) -> str:
  good = x >= 2 and x % 2 == 0
  return '' if good else 'must be even and >= 2: masks come with their complements'


def or_off(rule: Rule) -> Rule:
  """Returns a rule whose sentence says that 0 switches the setting off."""
  return lambda x: f'{wrong}; 0 = off' if (wrong := rule(x)) else ''


def nearest(field: str, value: Any, allowed: Iterable[str]) -> list[str]:
  """Returns the complaint about a value that is not allowed, with the nearest one."""
  wrong = one_of(*allowed)(value)
  return [f'{field} = {value!r} {wrong}'] if wrong else []


def rates(section: Any, right: bool, law: str) -> list[str]:
  """Returns the complaint about a section's low and high, unless they keep a law."""
  low, high = (f'{section.NAME}.{x} = {getattr(section, x)}' for x in ('low', 'high'))
  return [] if right else [f'{low} and {high} must satisfy {law}']


def without_effect(*rows: tuple[str, Any, str]) -> dict[str, str]:
  """Returns {field: need} of rows ('field field ..', has an effect, what it needs)."""
  return {name: need for names, has, need in rows if not has for name in names.split()}


class Section:
  """A section of a config; its frozen dataclass checks its values by rules."""

  NAME: ClassVar[str] = ''  # in sentences; '' = the class's, in small letters
  OWN: ClassVar[Mapping[str, Rule]] = {}  # field -> rule
  # Fields that attention blocks do not read, with the values that ask for nothing.
  WHOLE_TEXT: ClassVar[Mapping[str, Any]] = {}

  def number(self, x: float) -> str:
    """The rule of numbers that have none of their own."""
    return least(0)(x)

  def rules(self) -> dict[str, Rule]:
    """Returns the rule of each field that has one."""
    numbers = [name for name, x in vars(self).items() if type(x) in (int, float)]
    return {**dict.fromkeys(numbers, self.number), **self.OWN}

  def idle(self) -> dict[str, str]:
    """Returns {field: what it needs} of fields without effect beside the others."""
    return {}

  def default(self, name: str) -> Any:
    """Returns the value of a field that nobody has set."""
    return getattr(type(self), name, None)

  def problems(self) -> list[str]:
    """Returns a sentence for each impossible setting, led by 'section.field'."""
    rules, section = self.rules(), self.NAME or type(self).__name__.lower()
    return [
      f'{section}.{name} = {value!r} {wrong}'
      for name, value in vars(self).items()
      if name in rules and (wrong := rules[name](value))
    ]
