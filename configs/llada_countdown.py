"""DMPO on countdown with three numbers from LLaDA-8B-Instruct.

python main.py --config=configs/llada_countdown.py \
    --config.model.checkpoint=GSAI-ML/LLaDA-8B-Instruct

The checkpoint is a directory or a hub name. Problems are generated, each with a
solution. --config.data.path=FILE reads a file instead (fields `nums`, `target` or
`input`, `output`); --config.data.numbers=3 keeps its problems with three numbers, which
published models train on. Plan a run before you pay for it: --mode=plan needs no
checkpoint, and --topology=h100 or v5e:4x4 plans for devices that are not here.

The settings are those of DMPO's release: adapters on q, k, v, up; 16 completions per
prompt, 8 updates per buffer, alpha 0.04, baseline `individual`, 256 tokens at two
tokens a step, 16-bit weights. Two fields differ, because at laptop size they learn
faster and forgive a larger learning rate (docs/comparison.md): the baseline has a third
of its strength, and groups without a right answer count less (where the task's reward
says what is right: Task.best).

Keys and values outside a block are as old as the block (sampler.cache = dual): an
eighth of the FLOPs of a rollout, but an approximation. The quickstart's model loses one
point of accuracy by it (benchmarks/README.md). To sample and to evaluate exactly:
--config.sampler.cache=none --config.eval.sampler.cache=none.

After the file name may stand
  :paper        the release's own settings, without a cache
  :espo, ...    another objective, at its own defaults and with its paper's sampler;
                --config.objective.name=espo does the same
  :diffu_grpo   d1's recipe: also its learning rate, group and updates per buffer
                (RECIPES in dmpo_jax/config.py)
  :h100, ...    settings that fit on this hardware (configs/slices.py): h100, h100x8,
                a100, l40s, v5e16, v5p64; :espo,h100 is both

Planned for one H100 (:h100): 57.9 GiB of the 72.8 that JAX takes, at least 23 s a
rollout, 8.4 s an update, 12.6 h in all. For 16 TPU v5e (:v5e16): 13.3 GiB of a chip's
15.75, at least 7.4 s, 3.5 s, 5.0 h. docs/plans.md has more. Without such a name after
the colon the settings are for a slice of 16 chips, split by --config.mesh.fsdp=16.
Published, 256 test problems at 128 / 256 / 512 tokens: base 20.7 / 19.5 / 16.0, d1
34.8 / 32.0 / 42.2, SPG 68.8 / 70.7 / 70.3, DMPO best 83.2 (one token a step). The
standard error of one number is 2.4 to 3.1. To measure as they did, add --mode=eval
--config.eval.style=eval --config.eval.sampler.cache=none, and
--config.eval.sampler.steps=128 where they take two tokens a step. The default here is
one token a step and the prompts of training.
"""

from configs import base, slices
from dmpo_jax import config
from dmpo_jax.tasks import TASKS


def llada():
  """What every run from LLaDA-8B-Instruct shares, at the release's settings."""
  c = base.get_config()
  c.model.preset = 'llada_8b'
  c.model.dtype = 'bfloat16'
  c.model.param_dtype = 'bfloat16'
  c.model.remat = 'full'
  c.model.head_chunk = 32
  c.lora.rank = 128
  c.lora.alpha = 64.0
  c.lora.targets = 'paper'
  c.lora.dropout = 0.05
  c.data.style = 'chat'
  c.data.protocol = 'paper'
  c.data.prompt_length = 256
  c.data.overlong = 'drop'
  c.data.bucket = 64
  for s, temperature, steps in ((c.sampler, 0.2, 128), (c.eval.sampler, 0.0, 256)):
    s.length = 256
    s.block = 32
    s.steps = steps
    s.temperature = temperature
    s.rank = 'token'
  c.train.iterations = 500
  c.train.prompts = 8
  c.train.group = 16
  c.train.inner = 8
  c.train.microbatches = 1
  c.optim.lr = 1e-6
  c.optim.weight_decay = 0.1
  c.optim.clip = 0.2
  c.eval.every = 50
  c.checkpoint.every = 80
  return c


def choose(c, recipe):
  """Applies what stands after the colon: a recipe, a slice, or both with a comma.

  A recipe is ours, paper or the name of an objective; ours where none is named.
  """
  places = [name for name in recipe.split(',') if name in slices.SLICES]
  recipes = [name for name in recipe.split(',') if name not in places] or ['ours']
  if len(recipes) > 1 or len(places) > 1:
    raise ValueError(f'{recipe} after the colon: name one recipe and one slice at most')
  if recipes == ['ours']:
    c.objective.strength = 0.3
    c.objective.best = TASKS[c.data.task].best
  elif recipes != ['paper']:
    names = ('ours', 'paper', *config.OBJECTIVES, *slices.SLICES)
    if wrong := config.nearest('the recipe after the colon', recipes[0], names):
      raise ValueError(wrong[0])
    config.choose_objective(c, recipes[0])
  if places or recipes != ['paper']:
    slices.add_cache(c)
  return slices.place(c, places[0]) if places else c


def get_config(recipe='ours'):
  c = llada()
  c.name = 'llada_countdown'
  c.data.task = 'countdown'
  c.data.train_size = 20000
  return choose(c, recipe)
