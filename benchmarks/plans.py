"""The tables of docs/plans.md: LLaDA-8B on TPU slices, planned, not run.

python -m benchmarks.plans

Needs libtpu (pip install libtpu) and no TPU; two to sixteen minutes a plan on
two cores. Run with JAX_PLATFORMS=cpu.
"""

import argparse
from typing import Any

import jax

from configs import llada_countdown
from dmpo_jax import build, model
from dmpo_jax.tools import plan

LORA = {}  # as the config says
FULL = {'lora.rank': 0, 'lora.dropout': 0.0, 'model.param_dtype': 'float32'}
# (slice, topology, chips as `v5p-N` counts cores, prompts, mesh)
SLICES = (
  ('v5e-16', 'v5e:4x4', 8, {'mesh.fsdp': 16}),
  ('v5p-64', 'v5p:2x4x4', 16, {'mesh.fsdp': 8}),
  ('v5p-256', 'v5p:4x4x8', 64, {'mesh.fsdp': 8}),
)


def planned(topology, prompts, settings):
  """Returns the plan of a slice."""
  c = llada_countdown.get_config()
  c.update_from_flattened_dict(
    {**settings, 'train.prompts': prompts, 'eval.batch': 128}
  )
  return plan.make(c, topology)


def row(name, kind, p):
  """Returns a plan as a row of Markdown."""
  gib = lambda x: f'{x / plan.GIB:.2f}'
  by_name = {program.name: program for program in p.programs}
  temporary = max(program.temporaries for program in p.programs)
  sent = {
    k: v
    for program in p.programs
    for k, v in (program.collectives or {}).items()
    if v[1] > 2**20
  }
  fits = 'yes' if p.total < 0.95 * p.memory else 'no'
  compiled = sum(program.compile_seconds for program in p.programs)
  return (
    f'| {name} | {kind} | {p.rows} | {gib(p.parameters)} | '
    f'{gib(p.reference)} | {gib(p.optimizer)} | {gib(temporary)} | '
    f'{gib(p.total)} of {p.memory / plan.GIB:.0f}: {fits} | '
    f'{by_name["update"].flops / 1e12:.0f} | '
    f'{plan.duration(p.seconds["rollout"])} | '
    f'{plan.duration(p.seconds["update"])} | '
    f'{plan.duration(p.seconds["run"])} | '
    f'{", ".join(sorted(sent)) or "none"} | {compiled:.0f} s |'
  )


def quantized():
  """Prints bytes of LLaDA-8B's parameters as stored, from compiled programs."""
  tree = jax.eval_shape(
    lambda: model.init(
      model.ModelConfig(**model.PRESETS['llada_8b'], param_dtype='bfloat16'),
      jax.random.key(0),
    )
  )
  print('\n| frozen base | GiB |\n|---|---|')
  for kind in ('none', *model.QUANT):
    stored = build.quantized_shapes(tree, kind)
    # keep_unused: JAX would drop an argument that is not read.
    program = jax.jit(lambda tree: 0, keep_unused=True).lower(stored).compile()
    memory: Any = program.memory_analysis()
    size = memory.argument_size_in_bytes
    print(
      f'| {kind} (bfloat16) |' if kind == 'none' else f'| {kind} |',
      f'{size / plan.GIB:.2f} |',
    )


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--only', default='', help='such as v5e-16')
  parser.add_argument('--kind', default='', help='LoRA or full')
  args = parser.parse_args()
  print(
    '| slice | trained | rows | parameters | reference | optimizer | '
    'temporaries | worst, GiB | update, TFLOP | rollout | update | run | '
    'collectives | compiled in |\n|' + '---|' * 14
  )
  for name, topology, prompts, settings in SLICES:
    if args.only in ('', name):
      for kind, more in (('LoRA', LORA), ('full', FULL)):
        if args.kind not in ('', kind):
          continue
        made = planned(topology, prompts, {**settings, **more})
        print(row(name, kind, made), flush=True)
  quantized()


if __name__ == '__main__':
  main()
