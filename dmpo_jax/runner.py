"""What the command line and the Python API share: a process, a run, its parameters.

The settings of the process come first, before JAX looks for devices. `train` runs
supervised training, RL and the final evaluation. `params_of` reads what a run made.
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags, logging

from dmpo_jax import (
  boards,
  build,
  check,
  config,
  evaluate,
  files,
  fits,
  grader,
  guard,
  lessons,
  mesh,
  metrics,
  parts,
  resume,
  runs,
)
from dmpo_jax import train as loop
from dmpo_jax.phases import pairs as preferences
from dmpo_jax.phases import texts
from dmpo_jax.tools import provenance, speed
from dmpo_jax.types import Params

# Settings of JAX by which a run would have other numbers, and could not be resumed.
FIXED = {
  'jax_enable_x64': False, 'jax_default_prng_impl': 'threefry2x32',
  'jax_threefry_partitionable': True, 'jax_random_seed_offset': 0,
  'jax_numpy_dtype_promotion': 'standard', 'jax_disable_jit': False,
}  # fmt: skip
PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy')  # in results.json

# --- the process


@functools.cache  # a filter is added
def quiet() -> None:
  """Logs our own lines and everybody's warnings, but not each step of Orbax."""
  if not flags.FLAGS.is_parsed():  # in a script or a notebook, where absl warns of it
    flags.FLAGS.mark_as_parsed()
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  ours = os.path.dirname(os.path.abspath(__file__))
  logging.get_absl_handler().addFilter(
    lambda r: r.levelno >= 30 or r.pathname.startswith(ours + os.sep)
  )


def fix_numbers() -> None:
  """Undoes what the environment or a flag says of JAX, where numbers depend on it."""
  for name, value in FIXED.items():
    if (found := getattr(jax.config, name)) != value:
      logging.warning('%s = %s has no effect here', name.upper(), found)
      jax.config.update(name, value)


def share_gpu() -> None:
  """Lets JAX take fits.FRACTION of a GPU where the user has not said how much.

  Its own default is three quarters. The variables have no effect on other devices.
  """
  if not any(os.environ.get(name) for name in fits.FRACTIONS):
    os.environ[fits.FRACTIONS[1]] = str(fits.FRACTION)


def split_cpu(count: int) -> None:
  """Makes the CPU `count` devices, before JAX looks for any.

  Small matrix products leave most of a second core idle; one device per core does not.
  """
  forced = 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
  if count > 1 and not forced:
    jax.config.update('jax_num_cpu_devices', count)


def cache_programs(c: Any) -> None:
  """Keeps compiled programs in the user's own cache directory, except for CPUs.

  Never in a directory that others can write to: they could put code there that runs
  here. JAX_COMPILATION_CACHE_DIR names another. ValueError if the directory belongs to
  another user.
  """
  if not c.cache:
    return jax.config.update('jax_enable_compilation_cache', False)
  known = jax.config.jax_compilation_cache_dir  # pyright: ignore
  if known or jax.default_backend() == 'cpu':
    return
  root = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  folder = os.path.join(root, 'dmpo_jax', 'programs')
  os.makedirs(folder, mode=0o700, exist_ok=True)
  if os.stat(folder).st_uid != os.getuid():
    raise ValueError(
      f'{folder} belongs to another user: set XDG_CACHE_HOME or '
      'JAX_COMPILATION_CACHE_DIR, or --config.cache=False'
    )
  jax.config.update('jax_compilation_cache_dir', folder)


def say(text: str) -> None:
  """Prints, in the first process alone."""
  if jax.process_index() == 0:
    print(text)


# --- a run


def ready(c: Any) -> build.Built:
  """Returns build.build(c). ValueError if the model's weights are not here."""
  built = build.build(c)
  if built.tokenizer is None:
    raise ValueError(
      f'model.preset = {c.model.preset!r} is a published model: set model.checkpoint '
      'to its directory or hub name (without it only --mode=plan works)'
    )
  return built


@contextlib.contextmanager
def watched(c: Any) -> Iterator[tuple[guard.Preemption, guard.Watchdog]]:
  """SIGTERM ends the process, and log.stuck_minutes without progress do."""
  with (
    guard.Preemption(at_once=True) as asked,
    guard.Watchdog(60 * c.log.stuck_minutes) as dog,
  ):
    yield asked, dog


def params_of(
  built: build.Built, workdir: str, of: str = ''
) -> tuple[Params, Params, str]:
  """Returns the parameters `of` a run, the base, and their name; trains nothing.

  workdir: '' = no run. of: latest | best | base; '' = the latest if there are some.
  ValueError if `of` names a checkpoint that is missing.
  """
  c = built.config
  alone = config.part(c, 'sft').trains and not check.tunes(c)
  if workdir and alone:  # a checkpoint of supervised training
    best = {'': False, 'latest': False, 'best': True, 'base': None}[of]
    base = built.steps.quantize(resume.base_of(built, workdir, best))
    return base, base, of or 'latest'
  count = lambda: any(resume.saved_updates(workdir, x) for x in ('pairs', 'rl'))
  saved = workdir and mesh.agree(count())
  if workdir and not saved and of != 'base':
    if of:
      raise ValueError(
        f'--of={of}: there is no checkpoint in {os.path.join(workdir, "rl")}: is '
        'that the workdir? Otherwise leave --of out or set --of=base'
      )
    say(f'no checkpoint in {os.path.join(workdir, "rl")}: this is the base model')
  base = built.steps.quantize(resume.base_of(built, workdir))
  if of == 'base':
    return base, base, 'base'
  name = 'adapter' if c.lora.path else 'base'
  start = resume.after_pairs(built, workdir, base)
  best = of == 'best' and bool(c.train.iterations)
  params = resume.latest(built, workdir, start, best)
  return params, base, (of or 'latest') if saved else name


def train(
  built: build.Built,
  workdir: str,
  overrides: dict[str, Any],
  only_sft: bool = False,
  profile: int = 0,
) -> None:
  """Trains, or resumes, in a workdir; a finished run is left as it is.

  overrides: fields that provenance.json names. only_sft: the base alone. profile:
  iterations of RL to trace.
  """
  c = built.config
  boards.check(c.log.wandb)
  check.training(c)
  grader.ready(built.task)
  with watched(c) as (asked, dog):
    compiling = lambda: dog.beat('compile', 0)
    for split in ('train', 'validation', 'test'):  # a bad file is refused now
      dog.beat(f'data, {split}', 0)
      build.problems(built, split)
    if taught := config.part(c, 'sft').trains:
      dog.beat('data, supervised', 0)
      learned = texts.lessons_of(built)
    if mesh.agree(runs.is_done(workdir)):
      return say('this run is done; --config.seed=N starts another')
    kind = jax.devices()[0].device_kind
    logging.info('%s on %d %s, in %s', c.name, jax.device_count(), kind, workdir)
    with files.naming(workdir), guard.alone(workdir):
      # Refuse a run that does not fit before weights are loaded.
      if taught and mesh.agree(unfinished(c, learned, workdir)):
        fits.check_phase(built, 'sft', learned.largest(), compiling)
      if not only_sft:
        fits.check(built, compiling)
      runs.claim(c, workdir)
      if config.part(c, 'pairs').trains:  # and a bad pair, too
        dog.beat('data, pairs', 0)
        prompt = preferences.rows_at(built, workdir).prompt.shape[1]
        if not only_sft and mesh.agree(not resume.saved_updates(workdir, 'rl')):
          fits.check_phase(built, 'pairs', prompt, compiling)
      dog.path = os.path.join(workdir, f'stuck_{jax.process_index()}.txt')
      run_phases(built, workdir, overrides, only_sft, (asked, dog), profile)


def unfinished(c: Any, learned: lessons.Lessons, workdir: str) -> bool:
  """Returns whether a workdir lacks the last checkpoint of supervised training."""
  done = max(resume.saved_updates(workdir, 'sft'), default=0)
  return done < learned.updates(c.sft.steps, c.sft.epochs)


def run_phases(
  built: build.Built,
  workdir: str,
  overrides: dict[str, Any],
  only_sft: bool,
  watch: tuple[guard.Preemption, guard.Watchdog],
  profile: int = 0,
) -> None:
  """Supervised training, RL and the final evaluation, from the last checkpoint on."""
  asked, dog = watch
  begun, first = time.time(), jax.process_index() == 0
  c = built.config
  if first:
    seeds = {'seed': c.seed, 'data.seed': c.data.seed}
    start = provenance.record(overrides, seeds, parts.revisions(c))
    provenance.append(workdir, start)
    built.tokenizer.save_pretrained(os.path.join(workdir, 'tokenizer'))
  fields = check.plain(c)
  with metrics.Writer(
    workdir, enabled=first, config=fields, wandb=c.log.wandb
  ) as writer:
    meter = speed.Meter(built)
    session = loop.Session(built, workdir, writer, dog.beat, meter, profile)
    base, sft_seconds = loop.run('sft', session)
    if only_sft:
      return say(f'base model in {os.path.join(workdir, "sft")}')
    base = built.steps.quantize(base)
    start, pairs_seconds = base, 0.0
    if config.part(c, 'pairs').trains:
      start, pairs_seconds = loop.run('pairs', session, base)
    tuned, rl_seconds = loop.run('rl', session, start)
  spent = {'sft': sft_seconds, 'pairs': pairs_seconds, 'rl': rl_seconds}
  test, results = build.problems(built, 'test'), {}

  def beat() -> None:
    dog.beat('final evaluation', c.train.iterations * c.train.inner)
    asked.check()

  for name, params in (('base', base), ('final', tuned)):
    with metrics.waiting(
      f'evaluating the {name} model on {len(test.examples)} problems'
    ):
      results[name], samples = evaluate.accuracy(built, params, test, beat)
    if first:
      path = os.path.join(workdir, f'test_{name}.jsonl')
      files.replace(path, files.to_lines(samples))
  if not first:
    return
  more = {'total': sum(spent.values()), 'session': time.time() - begun}
  results['seconds'] = spent | more
  results |= {
    'seed': c.seed,
    'config': c.name,
    'device': jax.devices()[0].device_kind,
    'versions': provenance.versions(PACKAGES),
  }
  # Its presence says that the run is done, so it is written last.
  files.replace(os.path.join(workdir, 'results.json'), json.dumps(results, indent=2))
