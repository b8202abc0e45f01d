"""The tables of docs/plans.md: real models on GPUs and TPU slices, planned, not run.

JAX_PLATFORMS=cpu python -m benchmarks.plans --slices=h100,v5e16 [--config.FIELD=VALUE]

Needs no such device, but the plugin that compiles for it: pip install libtpu, or
pip install -e '.[cuda]'. A plan takes a minute for GPUs and some minutes for TPUs.
"""

import argparse
from typing import Any

import jax

from configs import slices
from dmpo_jax import build, config, fits, model
from dmpo_jax.tools import plan

# One config of each model; the others of a model have the same programs.
CONFIGS = (
  'llada_countdown',
  'dream_countdown',
  'fast_dllm_math',
  'sdar_math',
  'sdar_gsm8k',
  'tiny_a2d_gsm8k',
  'llada2_math',
  'sdar_moe_math',
  'llada2_flash_math',
)
# All parameters in float32 with Adam's moments, and a second copy as the reference.
FULL = {'lora.rank': 0, 'lora.dropout': 0.0, 'model.param_dtype': 'float32'}


def row(name, stem, c, made):
  """Returns a plan as a row of Markdown."""
  gib = lambda x: f'{x / fits.GIB:.1f}'
  largest = max(made.programs, key=lambda p: p.temporaries + p.output)
  update = next(p for p in made.programs if p.name == 'update')
  settings = [
    f'{field.split(".")[-1]}={value}'
    for field, value in (
      ('sampler.slots', c.sampler.slots),
      ('train.microbatches', c.train.microbatches),
      ('model.remat', c.model.remat),
      ('model.quantize', c.model.quantize),
      ('mesh.fsdp', c.mesh.fsdp),
      ('mesh.expert', c.mesh.expert),
      ('mesh.gather', c.mesh.gather.replace('forward', 'none')),
    )
    if value not in ('none', 0, 1)
  ]
  if not c.lora.rank:
    settings.append('all parameters')
  times = [plan.duration(made.seconds[x]) for x in ('rollout', 'update', 'run')]
  verdict = 'no' if made.misfit else 'yes'
  compiling = ' + '.join(f'{p.compile_seconds:.0f}' for p in made.programs)
  return (
    f'| {name} | {stem} | {", ".join(settings)} | {gib(sum(made.held))} | '
    f'{largest.name} {gib(largest.temporaries + largest.output)} | '
    f'{gib(made.total)} of {gib(made.memory)}: {verdict} | {" | ".join(times)} | '
    f'{plan.sent(update)} | {compiling} |'
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
    stored = build.quantized_shapes({'params': tree['params']}, kind)
    # keep_unused: JAX would drop an argument that is not read.
    program = jax.jit(lambda tree: 0, keep_unused=True).lower(stored).compile()
    memory: Any = program.memory_analysis()
    size = memory.argument_size_in_bytes
    print(
      f'| {kind} (bfloat16) |' if kind == 'none' else f'| {kind} |',
      f'{size / fits.GIB:.2f} |',
    )


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--slices', default=','.join(slices.SLICES))
  parser.add_argument('--configs', default=','.join(CONFIGS))
  parser.add_argument('--full', action='store_true', help='train all parameters')
  args, overrides = parser.parse_known_args()
  print(
    '| slice | config | settings | held | largest program | peak, GiB | rollout | '
    'update | run | collectives of an update | compile, s |\n|' + '---|' * 11
  )
  for name in args.slices.split(','):
    for stem in args.configs.split(','):
      where = slices.SLICES[name]
      preset = config.load(f'configs/{stem}.py')[1].model.preset
      if preset not in where.models:
        continue
      _, c = config.load(f'configs/{stem}.py:{name}')
      c.update_from_flattened_dict(FULL if args.full else {})
      config.override(c, overrides)
      made = plan.make(c, where.topology)
      print(row(name, stem, c, made), flush=True)
      if made.misfit or made.faster:
        print(f'\n{made.misfit or made.faster}\n', flush=True)
  quantized()


if __name__ == '__main__':
  main()
