"""What a layer of experts costs beside a dense MLP of the same active width.

python -m benchmarks.moe [--width=256] [--tokens=256,1024,4096] [--experts=8,32,128]

Prints a Markdown table: the time of the MLP, forward and with the gradient of its
parameters and input, and as factors of it those of the experts with their router. `all`
is every expert on every token, and `ragged_dot` XLA's own product of sorted rows. In
brackets: how far values and gradients are from those of `sorted`, relative.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp

from benchmarks import common
from dmpo_jax import model
from dmpo_jax.model import moe

FORMS = {'sorted': None, 'all': 'dense', 'ragged_dot': jax.lax.ragged_dot}


def config(args, experts):
  """Returns the config of a layer; the dense MLP is as wide as a token's experts."""
  size = args.inner // args.chosen
  return model.ModelConfig(
    vocab=8, width=args.width, layers=1, heads=1, kv_heads=1, mlp=args.inner,
    mask_id=7, eos_id=6, pad_id=6, experts=experts, experts_per_token=args.chosen,
    expert_mlp=size, router_norm=True, dtype=args.dtype, param_dtype=args.dtype,
  )  # fmt: skip


def mlp(params, x):
  """Is the dense layer."""
  gate, up, down = params
  return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def routed(cfg, form, params, x):
  """Is the layer of experts, with its router."""
  router, stacks = params
  chosen, weights, _ = moe.choose(cfg, jnp.matmul(x, router), None, None)
  if callable(form):
    run = functools.partial(moe.chain, cfg)
    rows = lambda x, sizes, stacks, keys: run(
      lambda z, kernel: form(z, kernel, sizes), stacks, x, keys
    )
    flat = (z.reshape(-1, z.shape[-1]) for z in (x, chosen, weights))
    x, *choice = flat
    return moe.exchange.compute_sorted(rows, x, choice, stacks, None)
  return moe.experts(cfg, stacks, x, chosen, weights)


def times(args, fn, params, x):
  """Returns the least seconds of a forward and of its gradient, and both results."""
  slope = jax.grad(lambda params, x: jnp.sum(jnp.sin(fn(params, x))), (0, 1))
  found = [common.measure(jax.jit(f), args.repeats, params, x) for f in (fn, slope)]
  return [seconds['min'] for seconds, _ in found], [out for _, out in found]


def far(ours, others):
  """Returns the largest relative difference of two trees' leaves, by their norms."""
  length = lambda x: jnp.linalg.norm(x.astype(jnp.float32).ravel())
  apart = lambda a, b: length(a.astype(jnp.float32) - b) / length(b)
  return max(map(float, jax.tree.leaves(jax.tree.map(apart, ours, others))))


def numbers(args):
  """Yields (tokens, experts, times of the MLP, {form: times})."""
  for tokens in args.tokens:
    key = jax.random.key(0)
    draw = lambda *shape, key=key: (
      jax.random.normal(key, shape, args.dtype) * (shape[-2] ** -0.5)
    )
    x = jax.random.normal(jax.random.key(1), (1, tokens, args.width), args.dtype)
    shapes = [(args.width, args.inner)] * 2 + [(args.inner, args.width)]
    plain, _ = times(args, mlp, [draw(*shape) for shape in shapes], x)
    for experts in args.experts:
      cfg, found, first = config(args, experts), {}, None
      size = (args.width, cfg.expert_mlp)
      stacks = {
        name: moe.Stack(draw(experts, *(size[::-1] if 'down' in name else size)))
        for name in model.EXPERTS
      }
      for name, form in FORMS.items():
        if name != 'sorted' and tokens * experts > args.most:
          continue
        kernel = 'dense' if form == 'dense' else 'ragged'
        own = dataclasses.replace(cfg, expert_kernel=kernel)
        fn = functools.partial(routed, own, form)
        router = draw(args.width, experts).astype(jnp.float32)
        spent, out = times(args, fn, (router, stacks), x)
        first = first or out
        found[name] = spent, far(out, first)
      yield tokens, experts, plain, found


def main():
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  many = lambda text: [int(x) for x in text.split(',')]
  parser.add_argument('--width', type=int, default=256)
  parser.add_argument('--inner', type=int, default=512, help='of a token: all experts')
  parser.add_argument('--chosen', type=int, default=4, help='experts of a token')
  parser.add_argument('--tokens', type=many, default=[256, 1024, 4096])
  parser.add_argument('--experts', type=many, default=[8, 32, 128])
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument(
    '--most', type=int, default=40000, help='tokens times experts of the slow forms'
  )
  args = parser.parse_args()
  print('| tokens | experts | MLP, ms | ' + ' | '.join(FORMS) + ' |')
  print('|---|---|---|' + '---|' * len(FORMS))
  for tokens, experts, plain, found in numbers(args):
    cells = [
      ' / '.join(f'{a / b:.1f}' for a, b in zip(found[name][0], plain, strict=True))
      + ('' if name == 'sorted' else f' ({found[name][1]:.0e})')
      if name in found
      else '–'
      for name in FORMS
    ]
    dense = ' / '.join(f'{1000 * x:.1f}' for x in plain)
    print('|', ' | '.join([str(tokens), str(experts), dense, *cells]), '|', flush=True)


if __name__ == '__main__':
  main()
