"""Named presets of evaluation: how published numbers were sampled and scored.

Each is a set of config fields, so that a number can be compared with a table. They are
reached as `preset` in Python and of the lm-eval class, and by --preset in the modes
eval and sample. Fields that are not named stay as the config has them.
"""

from typing import Any, NamedTuple

from dmpo_jax.rules import nearest


class Preset(NamedTuple):
  """One way to evaluate."""

  source: str  # where the numbers stand
  sampler: dict[str, Any]  # fields of SampleConfig
  draws: int = 0  # masked copies of a log-likelihood; 0 = none are published


def _confidence(length: int, block: int, steps: int) -> dict[str, Any]:
  """Returns LLaDA's rule, greedy: the most confident of a fixed number each step."""
  return {
    'length': length,
    'block': block,
    'steps': steps,
    'temperature': 0.0,
    'pick': 'confidence',
    'rank': 'token',
    'guidance': 0.0,
    'cache': 'none',
  }


def _dream(length: int) -> dict[str, Any]:
  """Returns Dream's rule: one block, in as many steps as it has tokens.

  The order follows the entropy of the law after temperature, top-p and top-k.
  """
  return {
    'length': length,
    'block': length,
    'steps': length,
    'temperature': 0.1,
    'top_p': 0.9,
    # diffusion_generate takes top_k from the model's config: transformers puts 50.
    'top_k': 50,
    'pick': 'lowest_entropy',
    'schedule': 'dream',
    'rank_law': 'sampling',
    'rank_temperature': 0.0,
    'guidance': 0.0,
    'cache': 'none',
  }


PRESETS: dict[str, Preset] = {
  'llada_base': Preset(
    'LLaDA-8B-Base: ML-GSAI/LLaDA eval_llada.py (gen_length = steps = block_length = '
    '1024, mc_num = 128) and eval_llada.sh',
    _confidence(1024, 1024, 1024),
    draws=128,
  ),
  'llada_base_mmlu': Preset(
    'the same for mmlu, cmmlu and ceval: eval_llada.sh sets mc_num = 1',
    _confidence(1024, 1024, 1024),
    draws=1,
  ),
  'llada_base_cfg': Preset(
    'the same for arc_challenge, hellaswag, piqa, gpqa: eval_llada.sh sets cfg = 0.5',
    {**_confidence(1024, 1024, 1024), 'guidance': 0.5},
    draws=128,
  ),
  'llada': Preset(
    'LLaDA-8B-Instruct, gsm8k 78.6: ML-GSAI/LLaDA EVAL.md, blocks of 8 in 256 tokens',
    _confidence(256, 8, 256),
    draws=128,
  ),
  'llada_math': Preset(
    'LLaDA-8B-Instruct, math 42.2: ML-GSAI/LLaDA EVAL.md, blocks of 64 in 512 tokens',
    _confidence(512, 64, 512),
  ),
  'llada_1_5': Preset(
    'LLaDA-1.5, gsm8k: blocks of 16 in 256 tokens', _confidence(256, 16, 256)
  ),
  'd1': Preset(
    'd1, wd1, SPG, ESPO: eval.py takes length / 2 steps, blocks of 32',
    _confidence(256, 32, 128),
  ),
  'dmpo': Preset(
    'DMPO: eval/run_eval.sh sets --full_steps, one token a step',
    _confidence(256, 32, 256),
  ),
  'dream': Preset(
    'Dream-v0-Instruct-7B, gsm8k: DreamLM/Dream eval_instruct (alg = entropy, '
    'temperature 0.1, top_p 0.9, max_new_tokens = steps = 256)',
    _dream(256),
    draws=128,
  ),
  'dream_math': Preset(
    'Dream-v0-Instruct-7B, math: the same with 512 tokens and steps', _dream(512)
  ),
  'fast_dllm': Preset(
    'Fast-dLLM on LLaDA: threshold 0.9, dual cache, blocks of 32 in 256 tokens',
    {
      'length': 256,
      'block': 32,
      'temperature': 0.0,
      'pick': 'threshold',
      'threshold': 0.9,
      'rank': 'token',
      'cache': 'dual',
      'refresh': 0,
      'guidance': 0.0,
    },
  ),
  'trado': Preset(
    'SDAR and TraDo, static: one token a step from left to right, blocks of 4 (the '
    'releases keep one token before they rank, so that all positions tie)',
    {
      'length': 2000,
      'block': 4,
      'steps': 2000,
      'temperature': 0.0,
      'pick': 'sequential',
      'rank': 'max',
      'cache': 'block',
      'eos_stop': True,
      'guidance': 0.0,
    },
  ),
  'a2d_bd3lm': Preset(
    'dllm bd3lm: 128 steps in all, blocks of 32 in 128 tokens',
    {**_confidence(128, 32, 128), 'rank': 'max', 'cache': 'block', 'eos_stop': True},
  ),
}


def preset_of(name: str) -> Preset:
  """Returns a preset; ValueError with the nearest names if there is none."""
  if wrong := nearest('preset', name, PRESETS):
    raise ValueError(wrong[0])
  return PRESETS[name]


def sampler_of(name: str) -> dict[str, Any]:
  """Returns the fields of eval.sampler that a preset sets."""
  return dict(preset_of(name).sampler)


def fields_of(name: str) -> dict[str, Any]:
  """Returns {'section.field': value} of a preset, for a config."""
  return {f'eval.sampler.{field}': x for field, x in sampler_of(name).items()}
