"""A plan beside what this device needs: the programs of a run on random weights.

python -m benchmarks.planned --config=configs/llada2_math.py:h100x8 \
    --config.train.prompts=1 --config.train.microbatches=16

Samples, scores, packs and updates one buffer with the functions of the run itself, from
random weights and random prompts. Prints a line of Markdown for each program: seconds
that the plan counts, seconds here, temporaries, and the largest use of memory so far.
The config needs data.prompt_length, or a tokenizer of its own.
"""

import argparse
import os
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax import build, config, fits
from dmpo_jax.tools import chips, plan

HEAD = (
  'program', 'planned, s', 'here, s', 'first, s', 'compiled, s', 'temporaries, GiB',
  'largest use, GiB', 'more',
)  # fmt: skip


def weight(path: tuple, leaf: Any, key: Any) -> Any:
  """Returns a random array; what has no two axes of features is 1 (norms, scales)."""
  shape, kind = leaf.shape, leaf.dtype
  if not jnp.issubdtype(kind, jnp.floating):
    return jnp.zeros(shape, kind)
  if len(shape) < 2 or 'norm' in jax.tree_util.keystr(path):
    return jnp.ones(shape, kind)

  # One tile for all layers and experts, each with its own factors of the columns: a
  # draw of 10^10 numbers would take more memory than the weights.
  def draw(key):
    tile, phase, speed = jax.random.split(key, 3)
    lead = (*shape[:-2], 1, 1)
    angle = jax.random.uniform(phase, lead) * 6.28 + jax.random.uniform(
      speed, lead
    ) * jnp.arange(shape[-1], dtype=jnp.float32)
    wide = 0.028 * jax.random.normal(tile, shape[-2:]) * jnp.cos(angle)
    return wide.astype(kind)

  return jax.jit(draw, out_shardings=leaf.sharding)(key)


def filled(tree: Any, key: Any) -> Any:
  """Returns random arrays in the place of shapes."""
  leaves, form = jax.tree_util.tree_flatten_with_path(tree)
  keys = jax.random.split(key, len(leaves))
  made = [weight(path, x, k) for (path, x), k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(form, made)


class Device:
  """Runs programs and prints their lines."""

  def __init__(self, built: build.Built, prompt: int, repeats: int):
    self.built, self.repeats = built, repeats
    self.one = built.mesh.devices.flat[0]
    self.chip = chips.chip_of(self.one)
    self.target = chips.target_of(self.one, '')
    self.jobs = {job[0]: job for job in plan.jobs(built, prompt)}

  def time(self, name: str, *args: Any, again: Any = None) -> Any:
    """Runs a function of the run, prints its line and returns what it gave.

    again: from its last output and arguments, the arguments of the next call.
    """
    run = getattr(self.built.steps, name)
    use, program = plan.compiled(self.built, self.chip, self.target, self.jobs[name])
    if use.program is None:
      raise SystemExit(f'{name} does not fit: it needs {fits.size(use.temporaries)}')
    spent, out = [], None
    for _ in range(1 + self.repeats):
      begun = time.perf_counter()
      out = jax.block_until_ready(run(*args))
      spent.append(time.perf_counter() - begun)
      args = again(out, args) if again else args
    peak = (self.one.memory_stats() or {}).get('peak_bytes_in_use', 0)
    forwards = getattr(getattr(out, 'rollouts', None), 'forwards', None)
    line = (
      name, f'{program.seconds:.3g}', f'{np.median(spent[1:]):.3g}', f'{spent[0]:.3g}',
      f'{use.seconds:.0f}', f'{use.temporaries / fits.GIB:.1f}',
      f'{peak / fits.GIB:.1f}', '' if forwards is None else f'{forwards} forwards',
    )  # fmt: skip
    print('| ' + ' | '.join(line) + ' |', flush=True)
    return out


def buffer(device: Device, prompt: int) -> None:
  """Samples, scores and updates one buffer."""
  built, (keys, *more) = device.built, jax.random.split(jax.random.key(0), 5)
  c, steps, shapes = built.config, built.steps, build.abstract_buffer(built, prompt)
  state = steps.start(filled(shapes.state.trainable, keys))
  frozen = filled(shapes.frozen, more[0])
  references = filled(shapes.references, more[1])
  rows = c.train.prompts * c.train.group
  prompts = jax.random.randint(more[2], (rows, prompt), 0, built.model.vocab // 2)
  inputs = prompts, jnp.ones((rows, prompt), bool), jnp.arange(rows, dtype=jnp.int32)
  sampled = device.time('sample', {**frozen, **state.trainable}, *inputs)
  scores = device.time('score', state.trainable, frozen, references, sampled)
  draw = np.random.default_rng(0).uniform(size=(c.train.prompts, c.train.group))
  batch, _ = steps.pack(sampled, draw.astype(np.float32), scores)
  inner = jnp.zeros((), jnp.int32)
  after = lambda out, args: (out[0], *args[1:])
  _, metrics = device.time('update', state, frozen, batch, inner, again=after)
  print('loss', float(metrics['loss']), 'finite', float(metrics['finite']))


def main():
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  parser.add_argument('--config', required=True, help='FILE or FILE:SLICE')
  parser.add_argument('--repeats', type=int, default=1)
  args, overrides = parser.parse_known_args()
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):  # the run has the same programs
    jax.config.update('jax_compilation_cache_dir', tempfile.mkdtemp())
  _, c = config.load(args.config)
  config.override(c, overrides)
  built = build.build(c)
  prompt = plan.prompt_length(built)
  where = built.mesh.devices.flat[0].device_kind
  rows = c.train.prompts * c.train.group
  print(f'{c.name}: {rows} rows of {prompt} + {c.sampler.length} tokens, {where}')
  line = lambda cells: print('| ' + ' | '.join(cells) + ' |', flush=True)
  line(HEAD)
  line(['---'] * len(HEAD))
  buffer(Device(built, prompt, args.repeats), prompt)


if __name__ == '__main__':
  main()
