"""Counts the cost of programs: FLOPs and bytes of matmuls, and collectives.

Matmuls are counted in a traced program, recomputation included. Collectives are read
from the text of a compiled one.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dmpo_jax.model import exchange, grouped
from dmpo_jax.sampler import at_once

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
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
Call = tuple[str, int | None]
Instruction = tuple[str, int, str, list[Call]]


def shares(trips: Sequence[float]) -> tuple[float, float]:
  """Returns how often a condition is false and true, where trips[0] says it."""
  true = min(1.0, trips[0])
  return 1.0 - true, true


def steps_of(hp: Any, rows: int, forwards: float) -> float:
  """Returns the forwards of a rollout; with slots, those of so many rows."""
  return forwards * at_once(hp, rows) / rows


def trips_of(hp: Any, attention_block: int, rows: int, steps: float) -> tuple:
  """Returns how often the sampler's open loops run, for `matmuls`.

  hp: its settings. steps: as `steps_of`.
  """
  if hp.cache in ('prefix', 'dual'):  # laps of a block, cached steps of a lap
    a_block = steps / (hp.length // hp.block)
    a_lap = min(a_block, hp.refresh or a_block)
    return a_block / a_lap, a_lap - 1
  laps = rows / at_once(hp, rows)  # each ends with a new row in a slot
  loop = (laps, steps) if laps > 1 else (steps,)
  if hp.cache == 'block':  # how often a step computes the block before, too
    loop += (hp.length / attention_block / steps,)
  return loop


def matmuls(
  jaxpr: Any, trips: Sequence[float], devices: int, tensor: int = 1, scope: str = ''
) -> tuple[float, float]:
  """Returns (FLOPs, bytes) that a device spends on the matmuls of a program.

  jaxpr: of the traced program. A loop with a fixed number of steps counts as
  often as it runs. A loop without one (unmasking steps) counts trips[0] times,
  such a loop inside it trips[1] times. The condition of a branch (lax.cond) is true
  so often as the next of trips says, at most once. Operands of two dimensions are
  weights, which only the tensor axis splits; all devices share the others. Of experts
  the active ones count, as if their load were even. scope: names around the program.
  """
  flops = moved = 0.0
  for eqn in jaxpr.eqns:
    name, here = eqn.primitive.name, f'{scope}/{eqn.source_info.name_stack}'
    if name == 'dot_general' or (name == 'cond' and grouped.SCOPE in here):
      f, m = dense_cost(eqn, devices, tensor) if name != 'cond' else grouped_cost(eqn)
      flops, moved = flops + f, moved + m
      continue
    is_open, parts = name == 'while', list(inner_jaxprs(eqn.params))
    times = [trips[0] if is_open else eqn.params.get('length', 1)] * len(parts)
    if name == 'cond' and len(parts) == 2:
      times = shares(trips)
    inside = trips[1:] or trips if is_open else trips
    if exchange.PIECES in here and name in ('scan', 'cond'):
      times = [1 / exchange.PIECE] if name == 'scan' else [0, 1]
    spread = devices, tensor
    if name == 'shard_map':  # shapes are those of a device, along these axes
      own = eqn.params['newly_manual_axes']
      within = math.prod(eqn.params['mesh'].shape[axis] for axis in own)
      spread = devices // within, 1 if 'tensor' in own else tensor
    for often, part in zip(times, parts, strict=True):
      f, m = matmuls(part, inside, *spread, here)
      flops, moved = flops + often * f, moved + often * m
  return flops, moved


def dense_cost(eqn: Any, devices: int, tensor: int) -> tuple[float, float]:
  """Returns a device's FLOPs and bytes of a matrix product."""
  (left, _), _ = eqn.params['dimension_numbers']
  shapes = [v.aval for v in (*eqn.invars, *eqn.outvars)]
  inner = math.prod(shapes[0].shape[i] for i in left)
  flops = 2 * math.prod(shapes[2].shape) * inner / devices
  return flops, sum(
    x.size * x.dtype.itemsize / (tensor if x.ndim <= 2 else devices) for x in shapes
  )


def grouped_cost(eqn: Any) -> tuple[float, float]:
  """Returns FLOPs and bytes of a product of sorted rows with their experts' kernels.

  Each row counts for its own expert. The result has rows, or is the kernels' gradient.
  No more experts are read than there are rows. A part that JAX has moved out of the
  loop over layers has no kernels, and counts nothing.
  """
  *inputs, out = (v.aval for v in (*eqn.invars, *eqn.outvars))
  kernels = next((x for x in (out, *inputs) if x.ndim in (3, 4)), None)
  if kernels is None:
    return 0.0, 0.0
  rows = [x for x in (*inputs, out) if x.ndim == 2][-1].shape[0]
  experts, *sizes = kernels.shape[-3:]  # where there are four axes, of one layer
  read = min(experts, rows) * math.prod(sizes) + rows * sum(sizes)
  return 2.0 * rows * math.prod(sizes), read * kernels.dtype.itemsize


def inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
  """Yields the programs inside an equation: bodies of loops, calls, branches."""
  for value in params.values():
    for x in value if isinstance(value, (tuple, list)) else (value,):
      x = getattr(x, 'jaxpr', x)
      if hasattr(x, 'eqns'):
        yield x


def collectives(text: str, trips: Sequence[float]) -> dict[str, tuple[int, int]]:
  """Returns {kind: (count, bytes)} of a device's collectives, from compiled HLO.

  Bytes of a collective are those of the larger of its operand and result. The parts of
  an asynchronous collective have one channel. One part may lie in a loop that the
  collective spans, so the part that runs least often counts. trips: as in `matmuls`.
  """
  computations, entry = parse(text)
  times, sizes = {}, {}  # channel and kind -> {its part: how often}, bytes

  def visit(name, often, trips):
    for at, (kind, size, channel, calls) in enumerate(computations.get(name, ())):
      if kind:
        parts = times.setdefault((channel, kind), {})
        parts[name, at] = parts.get((name, at), 0) + often
        sizes[channel, kind] = max(sizes.get((channel, kind), 0), size)
      for child, own in calls:
        if own is None:
          visit(child, often * trips[0], trips[1:] or trips)
        elif isinstance(own, bool):
          visit(child, often * shares(trips)[own], trips)
        else:
          visit(child, often * own, trips)

  visit(entry, 1, trips)
  out = {}
  for (channel, kind), parts in times.items():
    often = min(parts.values())
    count, total = out.get(kind, (0, 0))
    out[kind] = count + often, total + often * sizes[channel, kind]
  return {kind: (round(count), round(total)) for kind, (count, total) in out.items()}


class Computation(NamedTuple):
  """What a computation of an HLO text says, as far as loops and collectives need it."""

  lines: dict[str, tuple[str, str]]  # result -> (operation, the rest of its line)
  root: list[str]  # [result]; the line that the computation returns
  found: list[Instruction]

  def constant(self, name: str) -> int | None:
    """Returns the value of an integer constant; None if `name` is none."""
    op, rest = self.lines.get(name, ('', ''))
    value = rest.split(')')[0]
    return int(value) if op == 'constant' and value.isdigit() else None

  def operands(self, name: str) -> list[str]:
    """Returns the names of an operation's operands."""
    rest = self.lines.get(name, ('', ''))[1].split(')')[0]
    return re.findall(r'%?([\w.\-]+)(?=,|$)', rest)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Returns ({computation: its collectives and calls}, name of the entry)."""
  computations, entry, loops = {}, '', []
  here, name, sizes = Computation({}, [], []), '', {}
  for line in text.splitlines():
    if head := HEAD.match(line):
      here, name, sizes = Computation({}, [], []), head[2], {}
      computations[name] = here
      entry = name if head[1] else entry
      continue
    match = LINE.match(line)
    if not match:
      continue
    result, kind, op, rest = match.groups()
    sizes[result], here.lines[result] = largest(kind), (op, rest)
    if line.lstrip().startswith('ROOT'):
      here.root.append(result)
    calls: list[Call] = [(callee, 1) for callee in CALL.findall(rest)]
    calls += branches(rest)
    if op == 'while':
      loops.append((calls, here, result))
    base = op.removesuffix('-start')
    if base in KINDS or calls:
      operand = re.match(r'%?([\w.\-]+)', rest)
      size = max(sizes[result], sizes.get(operand[1], 0) if operand else 0)
      channel = channel_of(rest, size) or f'{name}/{result}'
      here.found.append((base if base in KINDS else '', size, channel, calls))
  for calls, around, result in loops:
    times = laps(computations, around, result)
    calls[:] = [(callee, times) for callee, _ in calls]
  return {name: c.found for name, c in computations.items()}, entry


def channel_of(rest: str, size: int) -> str:
  """Returns what the parts of one collective share; '' if it stands alone.

  JAX gives all collectives of shard_map the channel 1: their places and sizes differ.
  """
  channel = re.search(r'channel_id=(\d+)', rest)
  place = re.search(r'op_name="([^"]*)"', rest)
  if channel and channel[1] == '1' and place:
    return f'1 {place[1]} {size}'
  return channel[1] if channel else ''


def laps(
  computations: dict[str, Computation], around: Computation, loop: str
) -> int | None:
  """Returns how often a loop runs; None if that is not known.

  XLA says it, or the condition compares a counter with a constant. The compiler may
  unroll such a loop: then its counter begins at another number or takes larger steps.
  """
  rest = around.lines[loop][1]
  if told := re.search(r'known_trip_count\D+(\d+)', rest):
    return int(told[1])
  name = {
    key: re.findall(rf'{key}=%?([\w.\-]+)', rest) for key in ('condition', 'body')
  }
  condition = computations.get(''.join(name['condition']))
  body = computations.get(''.join(name['body']))
  if not condition or not condition.root:
    return None
  op, test = condition.lines[condition.root[0]]
  if op != 'compare' or 'direction=LT' not in test:
    return None
  counter, limit = condition.operands(condition.root[0])[:2]
  end = condition.constant(limit)
  at = re.search(r'index=(\d+)', condition.lines.get(counter, ('', ''))[1])
  if end is None or not at:
    return end
  begun, step = 0, 1
  if start := around.operands(around.operands(loop)[0])[int(at[1]) :][:1]:
    begun = around.constant(start[0]) or 0
  if body and body.root:
    step = step_of(computations, body, int(at[1])) or 1
  return max(0, -(-(end - begun) // step))


def step_of(
  computations: dict[str, Computation], body: Computation, at: int
) -> int | None:
  """Returns what a loop's body adds to the counter at place `at` of its tuple."""
  name = (body.operands(body.root[0])[at:] or [''])[0]
  op, rest = body.lines.get(name, ('', ''))
  inside = computations.get(''.join(CALL.findall(rest)[:1])) if op == 'fusion' else body
  names = inside.lines if inside and inside is not body else body.operands(name)
  found = [inside.constant(x) for x in names] if inside else []
  return next((x for x in found if x), None)


def branches(rest: str) -> list[Call]:
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
