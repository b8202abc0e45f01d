"""Counts the cost of programs: FLOPs and bytes of matmuls, and collectives.

Matmuls are counted in a traced program, recomputation included. Collectives are
read from the text of a compiled one.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
LINE = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z\-]+)\((.*)$')
TYPE = re.compile(r'(pred|[a-z]+\d+)\w*\[([\d,]*)\]')
CALL = re.compile(r'(?:calls|to_apply|body|condition)=%?([\w.\-]+)')
BRANCH = re.compile(r'(true|false)_computation=%?([\w.\-]+)')
INDEXED = re.compile(r'branch_computations=\{%?([\w.\-]+), %?([\w.\-]+)\}')

# One instruction of a computation: (kind or '', bytes, channel, [(callee, times)]).
# times is None for a loop without a known number of steps, and False or True for the
# branches of a condition.
Instruction = tuple[str, int, str, list[tuple[str, int | None]]]


def shares(trips: Sequence[float]) -> tuple[float, float]:
  """Returns how often a condition is false and true, where trips[0] says it."""
  true = min(1.0, trips[0])
  return 1.0 - true, true


def matmuls(
  jaxpr: Any, trips: Sequence[float], devices: int, tensor: int = 1
) -> tuple[float, float]:
  """Returns (FLOPs, bytes) that a device spends on the matmuls of a program.

  jaxpr: of the traced program. A loop with a fixed number of steps counts as
  often as it runs. A loop without one (unmasking steps) counts trips[0] times,
  such a loop inside it trips[1] times. The condition of a branch (lax.cond) is true
  so often as the next of trips says, at most once. Operands of two dimensions are
  weights, which only the tensor axis splits; all devices share the others.
  """
  flops = moved = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (left, _), _ = eqn.params['dimension_numbers']
      shapes = [v.aval for v in (*eqn.invars, *eqn.outvars)]
      inner = math.prod(shapes[0].shape[i] for i in left)
      flops += 2 * math.prod(shapes[2].shape) * inner / devices
      moved += sum(
        x.size * x.dtype.itemsize / (tensor if x.ndim <= 2 else devices) for x in shapes
      )
      continue
    is_open, parts = eqn.primitive.name == 'while', list(inner_jaxprs(eqn.params))
    times = [trips[0] if is_open else eqn.params.get('length', 1)] * len(parts)
    if eqn.primitive.name == 'cond' and len(parts) == 2:
      times = shares(trips)
    inside = trips[1:] or trips if is_open else trips
    for often, part in zip(times, parts, strict=True):
      f, m = matmuls(part, inside, devices, tensor)
      flops, moved = flops + often * f, moved + often * m
  return flops, moved


def inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
  """Yields the programs inside an equation: bodies of loops, calls, branches."""
  for value in params.values():
    for x in value if isinstance(value, (tuple, list)) else (value,):
      x = getattr(x, 'jaxpr', x)
      if hasattr(x, 'eqns'):
        yield x


def collectives(text: str, trips: Sequence[float]) -> dict[str, tuple[int, int]]:
  """Returns {kind: (count, bytes)} of a device's collectives, from compiled HLO.

  Bytes of a collective are those of the larger of its operand and result. A
  collective that is split over several computations has one channel and counts
  once. trips: as in `matmuls`.
  """
  computations, entry = parse(text)
  seen = {}

  def visit(name, times, trips):
    for kind, size, channel, calls in computations.get(name, ()):
      if kind:
        key = (channel, kind)
        seen[key] = max(seen.get(key, (0, 0)), (times, size))
      for child, own in calls:
        if own is None:
          visit(child, times * trips[0], trips[1:] or trips)
        elif isinstance(own, bool):
          visit(child, times * shares(trips)[own], trips)
        else:
          visit(child, times * own, trips)

  visit(entry, 1, trips)
  out = {}
  for (_, kind), (times, size) in seen.items():
    count, total = out.get(kind, (0, 0))
    out[kind] = round(count + times), round(total + times * size)
  return out


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Returns ({computation: its collectives and calls}, name of the entry)."""
  computations, bounds, entry, name = {}, {}, '', ''
  sizes, constants, loops = {}, {}, []
  for line in text.splitlines():
    if head := HEAD.match(line):
      name, sizes, constants = head[2], {}, {}
      computations[name] = []
      entry = name if head[1] else entry
      continue
    match = LINE.match(line)
    if not match:
      continue
    result, kind, op, rest = match.groups()
    sizes[result] = largest(kind)
    if op == 'constant':
      constants[result] = rest.split(')')[0]
    if op == 'compare' and 'direction=LT' in rest and 'ROOT' in line:
      limit = re.findall(r'%?([\w.\-]+)[,)]', rest)[1]
      bounds[name] = constants.get(limit)
    calls = [(callee, 1) for callee in CALL.findall(rest)] + branches(rest)
    if op == 'while':
      count = re.search(r'known_trip_count\D+(\d+)', rest)
      condition = re.findall(r'condition=%?([\w.\-]+)', rest)[0]
      loops.append((calls, int(count[1]) if count else None, condition))
    base = op.removesuffix('-start')
    if base in KINDS or calls:
      operand = re.match(r'%?([\w.\-]+)', rest)
      size = max(sizes[result], sizes.get(operand[1], 0) if operand else 0)
      channel = re.search(r'channel_id=(\d+)', rest)
      channel = channel[1] if channel else f'{name}/{result}'
      computations[name].append((base if base in KINDS else '', size, channel, calls))
  for calls, count, condition in loops:
    limit = bounds.get(condition)
    times = count or (int(limit) if limit and limit.isdigit() else None)
    calls[:] = [(callee, times) for callee, _ in calls]
  return computations, entry


def branches(rest: str) -> list[tuple[str, bool]]:
  """Returns the two computations of a condition, each with the condition's value."""
  if match := INDEXED.search(rest):
    return [(match[1], False), (match[2], True)]
  return [(name, value == 'true') for value, name in BRANCH.findall(rest)]


def largest(kind: str) -> int:
  """Returns the bytes of the largest array in an HLO type."""

  def size(dtype, dims):
    bits = 8 if dtype == 'pred' else int(re.findall(r'\d+', dtype)[0])
    return math.prod(int(d) for d in dims.split(',') if d) * bits // 8

  return max((size(*found) for found in TYPE.findall(kind)), default=0)
