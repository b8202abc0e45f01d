"""Greedy completions of LLaDA2.0 and SDAR-MoE against the releases' own samplers.

official_moe.npz holds completions with the step that wrote each token and the forwards
that were spent, in float32. They were made on 2026-11-26 with yjyddq/DARE 83ae8a3
(LLaDA2.0-mini's and SDAR-30B-A3B-Chat's modelling files, LLaDA2.0's generate) and
JetAstra/SDAR c2041a8 (generate.py), multinomial replaced by argmax; its logits,
experts and gradients also with ZHZisZZ/dllm ca17675 (LLaDA-MoE).
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import moe_models
import numpy as np
import pytest
from marks import mostly_slow
from moe_models import GOLDEN

from dmpo_jax import sampler, weights

# One of each kind and prompt length is run by default, the others as long tests.
QUICK = {
  'llada2/p11_b8_s8_t0.5', 'llada2/p5_eos64_early0', 'sdar_moe/p8_dynamic_b4_s4_t0.3',
}  # fmt: skip
CASES = mostly_slow(
  [name for name in GOLDEN.files if re.match(r'\w+/p\d+_[^/]*$', name)],
  QUICK,
  pytest.mark.long,
)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp('moe')
  return {
    family: moe_models.write(root / family, family) for family in moe_models.FAMILIES
  }


def settings(name, length):
  """The SampleConfig of a case, and the id that ends its texts."""
  number = lambda letter, default: float(
    (re.search(rf'_{letter}([\d.]+)', name) or (0, default))[1]
  )
  block, eos = int(number('b', 8)), int(number('eos', moe_models.EOS))
  steps = int(number('s', 8)) * length // block
  pick = 'confidence' if 'static' in name else 'dynamic'
  hp = sampler.SampleConfig(
    length=length, block=block, steps=steps, pick=pick, threshold=number('t', 0.5),
    cache='block', eos_stop=True,
  )  # fmt: skip
  return hp, eos


@pytest.mark.parametrize('name', CASES)
def test_completions(name, folders):
  """Greedy tokens are those of the release, and so are steps and forwards.

  LLaDA2.0 cuts its text at the first end, which is all that is compared there.
  """
  family, want = name.split('/')[0], GOLDEN[name]
  prompt = GOLDEN[re.sub(r'/p(\d+)_.*', r'/prompt\1', name)].astype(np.int32)
  block = int((re.search(r'_b(\d+)', name) or (0, 8))[1])
  new = len(want) - len(prompt) // block * block  # the prompt's end is on the canvas
  hp, eos = settings(name, new)
  cfg, params = weights.load_hf(folders[family], block_causal=block)
  cfg = dataclasses.replace(cfg, eos_id=eos)
  run = jax.jit(
    lambda params: sampler.generate(
      cfg, params, jnp.asarray(prompt[None]), jax.random.key(0), hp
    )
  )
  out = jax.device_get(run(params))
  tokens, order = out.tokens[0, -new:], np.maximum(out.order[0, -new:], -1)
  want, step = want[-new:], GOLDEN[f'{name}/step'][-new:]
  given, answer = len(prompt) % block, want[len(prompt) % block :]
  ends = np.flatnonzero(answer == eos)
  if ends.size:
    end = given + ends[0] + 1
    tokens, order, want, step = (x[:end] for x in (tokens, order, want, step))
  np.testing.assert_array_equal(tokens, want)
  np.testing.assert_array_equal(order, step)
  if not ends.size:
    spent = int(order.max()) + 1
    if family == 'sdar_moe':  # it also reads the prompt, and stores each block
      spent += new // block + (len(prompt) >= block)
    assert spent == GOLDEN[f'{name}/forwards']
