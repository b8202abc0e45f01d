"""python main.py --config=configs/quickstart.py: trains, or goes on training.

Modes: train (the default: base model, RL, evaluation), sft (only the base
model), eval (a results card for each of eval.lengths), score (saved
generations graded anew), sample (a test problem being unmasked, step by step),
export (the latest checkpoint as a Hugging Face directory or PEFT adapter),
plan (memory, FLOPs and time of a run, before anything is loaded), report
(curves.png and a summary of --workdir; with --runs a comparison of several
runs, with --cards one of results cards).
"""

import contextlib
import copy
import functools
import glob
import hashlib
import importlib.metadata
import json
import os
import sys
import time

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')  # on torch missing

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from dmpo_jax import (
  build,
  check,
  data,
  evaluate,
  export,
  guard,
  mesh,
  metrics,
  resume,
  train,
)
from dmpo_jax.tools import plan, provenance, report, watch

CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
WORKDIR = flags.DEFINE_string('workdir', '', 'default: runs/<name>-<hash>')
NO_CONFIG = '--config=FILE is missing, such as configs/quickstart.py'
MODES = ('train', 'sft', 'eval', 'score', 'sample', 'export', 'plan', 'report')
MODE = flags.DEFINE_enum('mode', 'train', MODES, 'what to do')
SWEEP = flags.DEFINE_string('sweep', '', "NAME:i, point i of the config's sweep(NAME)")
RUNS = flags.DEFINE_string('runs', '', 'report: glob of workdirs to compare')
FORMAT = flags.DEFINE_enum(
  'format',
  'merged',
  ['merged', 'adapter'],
  'export: Hugging Face weights, or a PEFT adapter',
)
OUT = flags.DEFINE_string(
  'out',
  '',
  'export: default WORKDIR/export-FORMAT; '
  'eval: folder of the cards; report --cards: the PNG',
)
TOPOLOGY = flags.DEFINE_string(
  'topology', '', 'plan: such as v5p:4x4x4, in place of the devices here; needs libtpu'
)
OF = flags.DEFINE_enum(
  'of',
  'latest',
  ['latest', 'best', 'base'],
  'eval, sample, export: which parameters of the run',
)
GENERATIONS = flags.DEFINE_string('generations', '', 'score: file to grade')
PROBLEM = flags.DEFINE_integer('problem', 0, 'sample: which of the test split')
PROMPT = flags.DEFINE_string('prompt', '', 'sample: a prompt of your own')
HTML = flags.DEFINE_string('html', '', 'sample: also as a page, into this file')
CARDS = flags.DEFINE_string('cards', '', 'report: glob of *.card.json')
BY = flags.DEFINE_string('by', 'objective.baseline', 'report: field to compare')
# The same command in each of several processes (docs/running.md).
MULTIHOST = flags.DEFINE_enum(
  'multihost', 'off', ['off', 'auto'], 'auto: as Slurm, Open MPI or a TPU pod says'
)
COORDINATOR = flags.DEFINE_string(
  'coordinator', '', 'host:port of process 0, in place of --multihost=auto'
)
PROCESSES = flags.DEFINE_integer('processes', None, 'how many there are')
PROCESS = flags.DEFINE_integer('process', None, 'which this is, from 0')
HEARTBEAT = flags.DEFINE_integer(
  'heartbeat',
  100,
  'seconds of silence after which a process is dead and the others end',
)


def parse(argv):
  """Flags, with the nearest name for a misspelt config field."""
  if not config_path(argv) and any(a.startswith('--config.') for a in argv):
    sys.exit(f'error: {NO_CONFIG}')
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError) as error:
    known = check.flatten(module(config_path(argv)).get_config())
    for arg in argv:
      name = arg.removeprefix('--config.').split('=')[0]
      if arg.startswith('--config.') and name not in known:
        sys.exit(f'error: config.{name} is not a field' + hint(name, known))
    raise error
  except (flags.Error, ValueError) as error:
    # What a config file refuses comes as the text of a traceback.
    refused = str(error).strip().rpartition('\nValueError: ')[2]
    sys.exit(f'error: {refused}')


def config_path(argv):
  """The file that --config=FILE or --config FILE names; '' without."""
  for i, arg in enumerate(argv):
    name, equals, value = arg.partition('=')
    if name in ('--config', '-config'):
      return value if equals else ''.join(argv[i + 1 : i + 2])
  return ''


def hint(name, known):
  """The field that was perhaps meant, as the end of a sentence; or ''."""
  found = check.nearest('', name, known)[0].partition(';')[2]
  return ';' + found if found else ''


def module(path):
  """The config file as a module: for its sweep(name)."""
  spec = importlib.util.spec_from_file_location('config_file', path.split(':')[0])
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded


def points_of(path, name):
  """The points of a config file's sweep(name); ValueError if it has none."""
  loaded = module(path)
  names = getattr(loaded, 'SWEEPS', (name,)) if hasattr(loaded, 'sweep') else ()
  if name not in names:
    raise ValueError(
      f'--sweep={name}: {path} has '
      + (f'only {", ".join(names)}' if names else 'no sweep(name)')
    )
  return loaded.sweep(name)


def apply_sweep(c, flag, sweep):
  """Point i of the config file's sweep; refuses a field that is set twice."""
  name, _, index = sweep.partition(':')
  points = points_of(config_flags.get_config_filename(flag), name)
  known = check.flatten(c)
  for field in {field for point in points for field in point} - set(known):
    raise ValueError(
      f'sweep({name!r}) sets {field!r}, which is not a field' + hint(field, known)
    )
  if not index.isdigit() or int(index) >= len(points):
    raise ValueError(
      f'--sweep={sweep!r} must be {name}:i with i from 0 to {len(points) - 1}'
    )
  point = points[int(index)]
  twice = set(point) & set(config_flags.get_override_values(flag))
  if twice:
    raise ValueError(f'{sorted(twice)} set both by --sweep and by a flag')
  c.update_from_flattened_dict(point)


def as_json(c):
  """A config as its workdir keeps it, and as its name is made from."""
  return c.to_json(sort_keys=True, indent=2)


def default_workdir(c, free):
  """runs/NAME-HASH of the config; that of a run which differs from it only in
  the evaluation (what the file has of it, not the flags) if there is one."""
  folder = lambda c: os.path.join(
    'runs', f'{c.name}-' + hashlib.sha256(as_json(c).encode()).hexdigest()[:8]
  )
  if free != check.JUDGING or os.path.isdir(folder(c)):
    return folder(c)
  path = config_flags.get_config_filename(flags.FLAGS['config'])
  file = check.flatten(module(path).get_config())
  judging = tuple(name for name in check.JUDGING if name not in check.FREE)
  # A run may have got its data.path by a flag: that is kept if it finds one.
  for names in (('eval.', 'reward.'), judging):
    plain = copy.deepcopy(c)
    plain.update_from_flattened_dict(
      {k: v for k, v in file.items() if k.startswith(names)}
    )
    if os.path.isdir(folder(plain)):
      return folder(plain)
  return folder(c)


def settle(c, workdir, free=check.FREE):
  """Makes the workdir and config.json; refuses another config's workdir.

  free: beginnings of the fields that may differ from the workdir's.
  """
  workdir = workdir or default_workdir(c, free)
  path = os.path.join(workdir, 'config.json')
  if os.path.exists(path):
    with open(path) as f:
      try:
        old = check.flatten(json.load(f))
      except ValueError as error:
        raise ValueError(
          f'{path} is damaged ({error}): remove it if this is the config of that run'
        ) from None
    changed = check.changes(old, check.plain(c), free)
    if changed:
      raise ValueError(
        f'--workdir={workdir} was written by another config ({changed}): '
        f'name another workdir (only {", ".join(free)} may change)'
      )
  elif jax.process_index() == 0:
    os.makedirs(workdir, exist_ok=True)
    metrics.replace(path, as_json(c))
  return workdir


def run_train(built, workdir, only_sft, dog, asked):
  """SFT, RL and the final evaluation; goes on where it was interrupted."""
  begun = time.time()
  if jax.process_index() == 0:
    note_start(built.config, workdir)
    built.tokenizer.save_pretrained(os.path.join(workdir, 'tokenizer'))
  with metrics.Writer(workdir, enabled=jax.process_index() == 0) as writer:
    session = train.Session(built, workdir, writer, dog.beat)
    base, sft_seconds = train.run('sft', session)
    if only_sft:
      say(f'base model in {os.path.join(workdir, "sft")}')
      return
    base = built.steps.quantize(base)
    tuned, rl_seconds = train.run('rl', session, base)
  test = build.problems(built, 'test')
  results = {}
  updates = built.config.train.iterations * built.config.train.inner

  def beat():
    dog.beat('final evaluation', updates)
    asked.check()

  for name, params in (('base', base), ('final', tuned)):
    results[name], samples = evaluate.accuracy(built, params, test, beat)
    if jax.process_index() == 0:
      write_lines(os.path.join(workdir, f'test_{name}.jsonl'), samples)
  if jax.process_index():
    return
  packages = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
  results |= {
    'seconds': {
      'sft': sft_seconds,
      'rl': rl_seconds,
      'total': sft_seconds + rl_seconds,
      'session': time.time() - begun,
    },
    'seed': built.config.seed,
    'config': built.config.name,
    'device': jax.devices()[0].device_kind,
    'versions': {p: importlib.metadata.version(p) for p in packages},
  }
  # That it is there says that all is done.
  metrics.replace(os.path.join(workdir, 'results.json'), json.dumps(results, indent=2))
  report.curves(workdir)


def note_start(c, workdir):
  """Adds this start to workdir/provenance.json."""
  flag = flags.FLAGS['config']
  fields = config_flags.get_override_values(flag)
  if SWEEP.value:
    fields = {**fields, 'sweep': SWEEP.value}
  provenance.append(
    workdir, provenance.record(fields, {'seed': c.seed, 'data.seed': c.data.seed})
  )


def write_lines(path, rows):
  """A file with an object a line."""
  with open(path, 'w') as f:
    f.writelines(json.dumps(row) + '\n' for row in rows)


def quiet():
  """Our own log lines and everybody's warnings; not Orbax's every step."""
  logging.set_verbosity(logging.INFO)
  ours = os.path.dirname(os.path.abspath(__file__))
  logging.get_absl_handler().addFilter(
    lambda r: (
      r.levelno >= 30
      or (r.pathname.startswith(ours) and 'site-packages' not in r.pathname)
    )
  )


def cache_programs(c):
  """Compiled programs are kept in the user's cache directory, but for CPUs.

  Not in a place that others may write to: who writes there runs code here.
  JAX_COMPILATION_CACHE_DIR names another. ValueError if the directory is
  another user's.
  """
  if not c.cache:
    return jax.config.update('jax_enable_compilation_cache', False)
  if jax.config.jax_compilation_cache_dir or jax.default_backend() == 'cpu':
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


def split_cpu(count):
  """Makes the CPU so many devices; before jax looks for any.

  Small matmuls leave most of a second core idle; a device each does not.
  """
  forced = 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
  if count > 1 and not forced:
    jax.config.update('jax_num_cpu_devices', count)


def cluster():
  """Arguments of guard.join, or None for one process; ValueError if wrong."""
  where, count, which = COORDINATOR.value, PROCESSES.value, PROCESS.value
  auto, explicit = MULTIHOST.value == 'auto', (where, count, which)
  if not auto and explicit == ('', None, None):
    return None
  if auto and explicit != ('', None, None):
    raise ValueError(
      '--multihost=auto finds --coordinator, --processes and '
      '--process itself: give the one or the others'
    )
  if HEARTBEAT.value < 1:
    raise ValueError(f'--heartbeat={HEARTBEAT.value} must be >= 1 second')
  if MODE.value in ('plan', 'report'):
    raise ValueError(
      f'--mode={MODE.value} is for one process: without --multihost and --coordinator'
    )
  if auto:
    return dict(heartbeat=HEARTBEAT.value)
  lacks = [
    name
    for name, value in zip(
      ('--coordinator', '--processes', '--process'), explicit, strict=True
    )
    if value in ('', None)
  ]
  if lacks:
    raise ValueError(
      f'{", ".join(lacks)} missing: --coordinator=host:port, '
      '--processes=N and --process=i belong together'
    )
  host, _, port = where.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise ValueError(
      f'--coordinator={where} must be host:port, with a port from 1 to 65535'
    )
  if not 0 <= which < count:
    raise ValueError(
      f'--process={which} must be in 0 to {count - 1}, for --processes={count}'
    )
  return dict(
    coordinator=where, processes=count, process=which, heartbeat=HEARTBEAT.value
  )


def say(text):
  """Prints, in one process."""
  if jax.process_index() == 0:
    print(text)


def main(argv):
  if len(argv) > 1:
    raise ValueError(f'unexpected arguments {argv[1:]}: flags are --name=value')
  quiet()
  many = cluster()
  if MODE.value == 'report':
    return show_report()
  c = CONFIG.value
  if c is None:
    raise ValueError(NO_CONFIG)
  split_cpu(c.mesh.cpu)
  if many:
    guard.join(**many)
    if jax.process_index():
      logging.set_verbosity(logging.WARNING)
  cache_programs(c)
  if SWEEP.value:
    apply_sweep(c, flags.FLAGS['config'], SWEEP.value)
  if MODE.value == 'plan':
    return print(plan.run(c, TOPOLOGY.value))
  built = build.build(c)
  if MODE.value == 'score':
    return score(built)
  if built.tokenizer is None:
    raise ValueError(
      f'model.preset = {c.model.preset!r} is a published model: '
      'set model.checkpoint to its directory or hub name '
      '(without it there is only --mode=plan)'
    )
  if MODE.value in ('eval', 'sample'):
    build.problems(built, 'test')
    workdir = settle(c, WORKDIR.value, check.JUDGING)
    if MODE.value == 'sample':
      return run_sample(built, workdir)
    with guard.Preemption(at_once=True) as asked:
      return run_eval(built, workdir, asked)
  with (
    guard.Preemption(at_once=True) as asked,
    guard.Watchdog(60 * c.log.stuck_minutes) as dog,
  ):
    run_main(c, built, dog, asked)


def run_main(c, built, dog, asked):
  """The modes that make parameters, or write them."""
  if MODE.value in ('train', 'sft'):
    check.training(c)
  for split in ('train', 'validation', 'test'):  # a bad file: refuse it now
    dog.beat(f'data, {split}', 0)
    build.problems(built, split)
  workdir = settle(c, WORKDIR.value)
  dog.path = os.path.join(workdir, f'stuck_{jax.process_index()}.txt')
  done = mesh.agree(os.path.exists(os.path.join(workdir, 'results.json')))
  if MODE.value == 'export':
    return run_export(built, workdir)
  if done:
    say('this run is done; another seed: --config.seed=N')
  else:
    logging.info(
      '%s on %d %s, into %s',
      c.name,
      jax.device_count(),
      jax.devices()[0].device_kind,
      workdir,
    )
    with guard.alone(workdir):
      run_train(built, workdir, MODE.value == 'sft', dog, asked)
  if MODE.value == 'train' and jax.process_index() == 0:
    print(report.summary(workdir))


def is_trained(workdir):
  """Whether RL has saved anything there.

  ValueError if not and --of was given: what it names would be judged as that.
  """
  there = mesh.agree(resume.is_saved(workdir))
  if not there and OF.present and OF.value != 'base':
    raise ValueError(
      f'--of={OF.value}: there is no checkpoint in '
      f'{os.path.join(workdir, "rl")}: is that the workdir? '
      'Without a run, leave --of out or use --of=base'
    )
  return there


def params_of(built, workdir):
  """(parameters, what they are) for --of."""
  there = is_trained(workdir)
  base = built.steps.quantize(base_of(built, workdir))
  if OF.value == 'base':
    return base, 'base'
  what = 'adapter' if built.config.lora.path else 'base'
  if there:
    what = OF.value
  return resume.latest(built, workdir, base, OF.value == 'best'), what


def run_eval(built, workdir, asked):
  """Results cards of the test split, one for each length."""
  params, what = params_of(built, workdir)
  # A folder of its own for each checkpoint and each way to judge it.
  source = evaluate.source_of(built, params)
  digest = hashlib.sha256(json.dumps(source, sort_keys=True).encode())
  folder = OUT.value or os.path.join(workdir, f'eval-{digest.hexdigest()[:8]}')
  for card in evaluate.run(built, params, source, folder, what, beat=asked.check):
    told = evaluate.as_text(card).split('\n\n')[0].replace('**', '')
    say(f'{told} at {card["length"]} tokens, {card["steps"]} steps')
  say(f'generations and cards in {folder}')


def score(built):
  """The card of saved generations, graded as this config says."""
  if not GENERATIONS.value:
    raise ValueError('--mode=score needs --generations=FILE.json')
  say(evaluate.as_text(evaluate.rescore(built, GENERATIONS.value)))


def run_sample(built, workdir):
  """A prompt being unmasked, on the terminal and as a page."""
  one, prompt = shown_prompt(built)
  params, what = params_of(built, workdir)
  (row,) = evaluate.generate(built, params, one, built.steps.sample_eval, 1, 0)
  told = f'{row["forwards"]} steps, {row["tokens"]} tokens'
  if one.examples[0]:
    example, protocol = one.examples[0], built.config.data.protocol
    told += (
      f', grade {built.task.grade(row["text"], example, protocol):g}; '
      f'the answer: {built.task.record(example)[1]}'
    )
  steps = watch.pieces(row['ids'], row['order'], built.tokenizer.decode)
  say(f'{prompt}\n{watch.terminal(steps, sys.stdout.isatty())}\n{told}')
  if HTML.value and jax.process_index() == 0:
    with open(HTML.value, 'w', encoding='utf-8') as f:
      f.write(watch.page(steps, f'{built.config.name}, {what}', prompt, told))


def shown_prompt(built):
  """(data.Problems of one, its text): --prompt, else --problem of the test."""
  if PROMPT.value:
    return data.encode_problems([{}], [PROMPT.value], built.tokenizer), PROMPT.value
  problems, at = build.problems(built, 'test'), PROBLEM.value
  if not 0 <= at < len(problems.examples):
    raise ValueError(f'--problem={at} must be in 0 to {len(problems.examples) - 1}')
  example = problems.examples[at]
  return data.Problems(
    [example], problems.tokens[at : at + 1], problems.valid[at : at + 1]
  ), built.task.prompt(example, 'bare')


def base_of(built, workdir):
  """The base model of a run: trained, or read from workdir/sft.

  ValueError if it is to be trained and another process is at it.
  """
  with metrics.Writer(workdir, enabled=False) as writer:
    lock = functools.partial(guard.alone, workdir)
    return train.run('sft', train.Session(built, workdir, writer, lock=lock))[0]


def run_export(built, workdir):
  """A checkpoint in a format that others read, as JSON what it is."""
  is_trained(workdir)
  base = base_of(built, workdir)
  folder = OUT.value or os.path.join(workdir, f'export-{FORMAT.value}')
  params = (
    base
    if OF.value == 'base'
    else resume.latest(built, workdir, base, OF.value == 'best')
  )
  say(json.dumps(export.run(built, params, base, folder, FORMAT.value)))


def show_report():
  """Curves and summary of one run, or a comparison of several."""
  if CARDS.value:
    table, picture = report.compare_cards(
      sorted(glob.glob(CARDS.value)), OUT.value or 'cards.png'
    )
    print(f'{table}\n{picture}')
  elif RUNS.value:
    table, picture = report.compare(
      sorted(glob.glob(RUNS.value)), BY.value, 'comparison.png'
    )
    print(f'{table}\n{picture}')
  else:
    with contextlib.suppress(report.NoData):  # it has hardly begun
      print(report.curves(WORKDIR.value))
    done = os.path.exists(os.path.join(WORKDIR.value, 'results.json'))
    print((report.summary if done else report.under_way)(WORKDIR.value))


def start(argv):
  """Bad input is one sentence, not a traceback."""
  try:
    main(argv)
  except (ValueError, FloatingPointError, FileNotFoundError) as error:
    if os.environ.get('DMPO_TRACEBACK'):
      raise
    sys.exit(f'error: {error}')


def run():
  """The command line's entry point."""
  jax.config.config_with_absl()
  app.run(start, flags_parser=parse)
