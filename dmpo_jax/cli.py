"""python main.py --config=FILE [--config.section.field=value ...] [--mode=MODE]

  python main.py --config=configs/quickstart.py

Modes:
  train   the default: supervised base model, RL, evaluation; resumes if interrupted
  sft     only the base model
  eval    results cards of the test problems, one for each of eval.lengths
  sample  one test problem being unmasked, step by step
  score   grades saved generations anew; without --config: --task and --protocol
  export  the latest checkpoint as a Hugging Face directory or a PEFT adapter
  plan    memory, FLOPs and time of a run, before anything is loaded
  report  curves and a summary of a run; --runs compares runs, --cards results cards
  pairs   preference pairs of a run's saved rollouts, and the problems it has solved
  rounds  RL, then --rounds times: pairs of its rollouts, training on them, RL again
  list    the runs in runs/ or of --runs: how far they are, their last accuracy

A run is a folder, the workdir. Without --workdir it is runs/NAME-HASH of the config, so
the same --config finds it again in every mode. --workdir without --config takes the
run's own config. Only train, sft and rounds train. FILE:espo, or
--config.objective.name=espo, trains with another objective at its own defaults.
"""

import contextlib
import functools
import glob
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')  # it warns without torch

import jax
from absl import app, flags, logging

from dmpo_jax import (
  buffers,
  build,
  check,
  config,
  conventions,
  data,
  evaluate,
  files,
  grader,
  guard,
  hf,
  pairs,
  parts,
  resume,
  rounds,
  rules,
  runner,
  runs,
)
from dmpo_jax.phases import pairs as curating
from dmpo_jax.tasks import CHOICES
from dmpo_jax.tools import cards, plan, report, status, watch
from dmpo_jax.types import Params, Task

NAMES = (
  'train', 'sft', 'eval', 'sample', 'score', 'export', 'plan', 'report', 'list',
  'pairs', 'rounds',
)  # fmt: skip
_text, _int, _choice = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_enum
CONFIG = _text('config', '', 'config file: FILE or FILE:ARGUMENT')
MODE = _choice('mode', 'train', NAMES, 'what to do')
WORKDIR = _text('workdir', '', 'folder of the run; default: runs/NAME-HASH')
SWEEP = _text('sweep', '', "NAME:i, point i of the config file's sweep(NAME)")
OF = _choice('of', 'latest', ('latest', 'best', 'base'), 'which parameters of the run')
MIX = flags.DEFINE_float('mix', 1.0, 'base + so much of what training changed')
OUT = _text('out', '', 'export, eval: folder; report --runs, --cards: PNG')
FORMAT = _choice('format', 'merged', ('merged', 'adapter'), 'export: what is written')
GENERATIONS = _text(
  'generations', '', 'score: JSON file of saved generations, or a pattern'
)
TASK = _text('task', '', 'score without --config: the task, as data.task')
PROTOCOL = _choice('protocol', 'strict', ('strict', 'paper'), 'score without --config')
PROBLEM = _int('problem', 0, 'sample: number of the test problem')
PROMPT = _text('prompt', '', 'sample: a prompt of your own')
PRESET = _text(
  'preset',
  '',
  'eval, sample: sampler of a published evaluation, such as llada or dream',
)
HTML = _text('html', '', 'sample: also writes a web page to this file')
PROFILE = _int('profile', 0, 'train: iterations of RL to trace into WORKDIR/profile')
TOPOLOGY = _text('topology', '', 'plan: absent devices, such as v5p:4x4x4 or h100x8')
ROUNDS = _int('rounds', 1, 'rounds: how often pairs and RL follow the first RL')
DROP = flags.DEFINE_float(
  'drop', 0.8, 'pairs, rounds: share of the solved problems that RL then leaves out'
)
RUNS = _text('runs', '', 'report, list: pattern of workdirs; list: runs/*')
CARDS = _text('cards', '', 'report: pattern of the *.card.json to compare')
BY = _text('by', 'objective.baseline', 'report --runs: config field to group by')
# Several processes, each with the same command (docs/running.md).
MULTIHOST = _choice('multihost', 'off', ('off', 'auto'), 'auto: Slurm, MPI, TPU pods')
COORDINATOR = _text('coordinator', '', 'host:port of process 0, without --multihost')
PROCESSES = _int('processes', None, 'number of processes')
PROCESS = _int('process', None, 'number of this process, from 0')
HEARTBEAT = _int('heartbeat', 100, 'seconds of silence after which a process is dead')


# Flags -> the modes that read them. The others say which run is meant, in any mode.
READ_BY = {
  'of mix': ('eval', 'sample', 'export'),
  'out': ('export', 'eval', 'report', 'pairs'),
  'format': ('export',),
  'generations task protocol': ('score',),
  'problem prompt html': ('sample',),
  'preset': ('eval', 'sample'),
  'topology': ('plan',),
  'profile': ('train',),
  'rounds': ('rounds',),
  'drop': ('pairs', 'rounds'),
  'runs': ('report', 'list'),
  'cards by': ('report',),
}


READS_DATA = {'train', 'sft', 'eval', 'sample', 'score', 'plan', 'pairs', 'rounds'}


class Command(NamedTuple):
  """What a mode works on."""

  config: Any  # the ConfigDict; None without --config
  overrides: dict[str, Any]  # {field: value} that the command line sets


# --- from the command line to a mode


def parse(argv: Sequence[str]) -> list[str]:
  """Parses all flags but --config.FIELD=VALUE; returns those, and what is left."""
  if {'-h', '-help', '--help'} & set(argv):
    print(f'{__doc__}\n{flags.FLAGS.module_help(__name__)}')
    sys.exit(0)
  fields, rest, open_field = [], [], False
  for arg in argv:
    if open_field and not arg.startswith('--'):  # --config.FIELD VALUE
      fields[-1] += f'={arg}'
      open_field = False
    elif re.match(r'--?config\.', arg):
      fields.append(f'--{arg.lstrip("-")}')
      open_field = '=' not in arg
    else:
      rest.append(arg)
      open_field = False
  try:
    program, *stray = flags.FLAGS(rest)
  except flags.Error as error:
    sys.exit(f'error: {error} (-h lists the flags)')
  return [program, *fields, *stray]


def refuse_flags() -> None:
  """Raises ValueError for flags that the mode, or another flag, makes useless."""
  many, several = RUNS.value or CARDS.value, MULTIHOST.value == 'auto'
  useless = rules.without_effect(
    ('problem', not PROMPT.value, 'no --prompt'),
    ('runs', not CARDS.value, 'no --cards'),
    ('by', RUNS.value, '--runs'),
    ('out', MODE.value != 'report' or many, '--runs or --cards'),
    ('workdir', not many, 'neither --runs nor --cards'),
    ('config workdir sweep', MODE.value != 'list', 'another mode'),
    ('heartbeat', COORDINATOR.value or several, '--coordinator or --multihost=auto'),
    *(
      (names, MODE.value in modes, f'--mode={" or ".join(modes)}')
      for names, modes in READ_BY.items()
    ),
  )
  if MODE.value == 'rounds' and not WORKDIR.value:
    raise ValueError(
      '--mode=rounds needs --workdir=DIR, which holds a run of each round'
    )
  if MIX.value != 1 and OF.value == 'base':
    raise ValueError('--mix needs trained parameters: --of=latest or --of=best')
  if not -10 <= MIX.value <= 10:
    raise ValueError(f'--mix={MIX.value} must be in -10 to 10: 0 = the base, 1 = all')
  if not 0 <= DROP.value <= 1:
    raise ValueError(f'--drop={DROP.value} must be in [0, 1]: a share of the problems')
  if ROUNDS.value < 1:
    raise ValueError(f'--rounds={ROUNDS.value} must be >= 1')
  if PROFILE.value < 0:
    raise ValueError(f'--profile={PROFILE.value} must be >= 0 iterations')
  given = {name: need for name, need in useless.items() if flags.FLAGS[name].present}
  if given:
    text = '; '.join(f'--{name} needs {need}' for name, need in given.items())
    raise ValueError(f'without effect in --mode={MODE.value}: {text}')


def read_config(fields: Sequence[str]) -> Command:
  """Returns the config of --config with --sweep and --config.FIELD=VALUE applied."""
  if not CONFIG.value:
    alone = MODE.value in ('report', 'score', 'list')
    if SWEEP.value or (fields and alone) or not (alone or WORKDIR.value):
      raise ValueError(
        '--config=FILE is missing, such as configs/quickstart.py (-h lists the flags)'
      )
    if alone:
      return Command(None, {})
    c = runs.config_of(runs.path_of('--workdir', WORKDIR.value))
    return Command(c, config.override(c, fields, mode_fields(fields)))
  module, c = config.load(CONFIG.value)
  file, point = CONFIG.value.partition(':')[0], {}
  if SWEEP.value:
    point = config.sweep_point(module, file, SWEEP.value)
  overrides = config.override(c, fields, point | mode_fields(fields))
  return Command(c, overrides | ({'sweep': SWEEP.value} if SWEEP.value else {}))


def mode_fields(fields: Sequence[str]) -> dict[str, Any]:
  """Returns the fields of --preset and of the mode, but for those that a flag sets."""
  given = {text.removeprefix('--config.').partition('=')[0] for text in fields}
  found = conventions.fields_of(PRESET.value) if PRESET.value else {}
  if MODE.value == 'pairs' and WORKDIR.value:  # of this run's rollouts
    found['pairs.path'] = (WORKDIR.value,)
  if MODE.value == 'rounds':  # of the rounds', and the fields of pairs have an effect
    found['pairs.path'] = (rounds.first(WORKDIR.value),)
  return {name: x for name, x in found.items() if name not in given}


def main(argv: Sequence[str]) -> None:
  """Reads the config, joins the other processes, and runs the mode."""
  fields = [arg for arg in argv[1:] if arg.startswith('--config.')]
  if stray := argv[1 + len(fields) :]:
    raise ValueError(f'unexpected arguments {stray}: flags are --name=value')
  runner.quiet()
  runner.fix_numbers()
  runner.share_gpu()
  refuse_flags()
  command, many = read_config(fields), cluster()
  if command.config is not None:
    if READS_DATA & {MODE.value} and command.config.data.path.startswith('python:'):
      raise ValueError(
        'the prompts and rewards of this run were given in Python: call dj.rl again '
        'with them (--mode=export and report work)'
      )
    if line := check.effects(command.config, command.overrides):
      logging.warning(line)
  if command.config is not None and MODE.value != 'report':
    runner.split_cpu(command.config.mesh.cpu)
    if many:
      guard.join(**many)
    see_devices()
    if jax.process_index():
      logging.set_verbosity(logging.WARNING)
    runner.cache_programs(command.config)
  elif MODE.value == 'score':
    see_devices()
  MODES[MODE.value](command)


def start(argv: Sequence[str]) -> None:
  """Runs `main`; bad input and Ctrl-C end it with one sentence, not a traceback."""
  try:
    main(argv)
  except (ValueError, FloatingPointError, OSError) as error:
    text = str(error)
    if isinstance(error, OSError) and error.filename:
      text = f'{error.filename}: {error.strerror}'
    if os.environ.get('DMPO_TRACEBACK'):
      raise
    sys.exit(f'error: {text}')
  except KeyboardInterrupt:
    print(
      '\ninterrupted: the same command resumes from the last checkpoint',
      file=sys.stderr,
    )
    sys.exit(130)


def run() -> None:
  """Runs the command line: the entry point."""
  sys.path.append(os.getcwd())  # config files import `configs`
  jax.config.config_with_absl()
  app.run(start, flags_parser=parse)


def cluster() -> dict[str, Any] | None:
  """Returns the arguments of guard.join, or None for one process."""
  where, count, which = COORDINATOR.value, PROCESSES.value, PROCESS.value
  auto, explicit = MULTIHOST.value == 'auto', (where, count, which)
  if not auto and explicit == ('', None, None):
    return None
  if auto and explicit != ('', None, None):
    raise ValueError(
      '--multihost=auto finds --coordinator, --processes and --process itself: give '
      'the one or the others'
    )
  if HEARTBEAT.value < 1:
    raise ValueError(f'--heartbeat={HEARTBEAT.value} must be >= 1 second')
  if MODE.value in ('plan', 'report', 'list'):
    raise ValueError(
      f'--mode={MODE.value} is for one process: leave out --multihost and --coordinator'
    )
  if auto:
    return dict(heartbeat=HEARTBEAT.value)
  if not where or count is None or which is None:
    given = {'--coordinator': where or None, '--processes': count, '--process': which}
    missing = ', '.join(name for name, value in given.items() if value is None)
    raise ValueError(
      f'{missing} missing: --coordinator=host:port, --processes=N and --process=i '
      'belong together'
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


def see_devices() -> None:
  """Raises ValueError if the devices that JAX_PLATFORMS asks for are not here."""
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # of an absent plugin
    asked: Any = jax.config
    why = str(error) or 'no plugin is installed'
    raise ValueError(
      f'JAX_PLATFORMS = {asked.jax_platforms}: no such devices are here ({why}): unset '
      'it, or set cpu'
    ) from None


# --- the workdir


def asked_of() -> str:
  """Returns which parameters the command names; '' = the latest if there are some."""
  return OF.value if OF.present else ''


def chosen(built: build.Built, workdir: str) -> tuple[Params, Params, str]:
  """Returns the parameters of --of and --mix, the base, and their name."""
  params, base, name = runner.params_of(built, workdir, asked_of())
  if MIX.value == 1:
    return params, base, name
  return resume.mixed(params, base, MIX.value), base, f'{name}-mix{MIX.value:g}'


def run_of(c: Any) -> str:
  """Returns the workdir of the run that a mode reads; '' for model.checkpoint alone.

  ValueError if there is neither, or if another run may be meant.
  """
  workdir, near = runs.find(c, runs.workdir_of(WORKDIR.value))
  if workdir:
    return workdir
  where = WORKDIR.value or runs.default(c)
  missing = f'no run in {where}'
  if near and OF.value != 'base':
    listed = '\n'.join(f'  {path}: {changed}' for path, changed in near.items())
    raise ValueError(
      f'{missing}. Others of this name:\n{listed}\nName one by --workdir alone, '
      'without --config'
      + ', or set --of=base to judge model.checkpoint'
      * bool(c.model.checkpoint)
    )
  if not c.model.checkpoint:
    raise ValueError(
      f'{missing}: --mode={MODE.value} trains nothing, so run --mode=train first, name '
      'the run by --workdir, or set model.checkpoint'
    )
  if OF.present and OF.value != 'base':
    raise ValueError(f'--of={OF.value}: {missing}: is that the workdir?')
  runner.say(f'{missing}: this is model.checkpoint = {c.model.checkpoint}, as it is')
  return ''


# --- modes


def train_mode(command: Command, only_sft: bool = False) -> None:
  """Trains, or resumes; a finished run is only reported. only_sft: the base alone."""
  c = command.config
  workdir = runs.workdir_of(WORKDIR.value or runs.default(c), written=True)
  runs.refuse_other(c, workdir, check.FREE)
  built = runner.ready(c)
  runner.train(built, workdir, command.overrides, only_sft, PROFILE.value)
  if not only_sft and jax.process_index() == 0:
    with contextlib.suppress(report.NoData):
      report.curves_of_end(workdir)
    print(report.summary(workdir))
    print(what_next(workdir))


def what_next(workdir: str) -> str:
  """Returns the paths of a finished run, and the commands that use it."""
  program, newest = sys.argv[0], max(resume.saved_updates(workdir), default='')
  python = (
    '' if os.access(program, os.X_OK) and not program.endswith('.py') else 'python '
  )
  command = f'{python}{shlex.quote(program)} --workdir={shlex.quote(workdir)}'
  paths = {'workdir': '', 'curves': 'curves.png', 'answers': 'test_final.jsonl'}
  paths |= {'checkpoint': f'rl/{newest}'} if newest else {}
  uses = {
    'watch one answer': 'sample --html=sample.html',
    'evaluate': 'eval',
    'export to Hugging Face': 'export',
    'curves and numbers': 'report',
  }
  return '\n'.join(
    [
      *(f'{name + ":":12}{os.path.join(workdir, x)}' for name, x in paths.items()),
      'next:',
      *(f'  {command} --mode={mode}  # {what}' for what, mode in uses.items()),
    ]
  )


def eval_mode(command: Command) -> None:
  """Writes results cards of the test problems and of eval.sets, for each length."""
  c = command.config
  out, workdir = runs.path_of('--out', OUT.value, written=True), run_of(c)
  built = runner.ready(c)
  cards.sections_of(built)
  others = cards.sets_of(built)
  grader.ready(built.task)
  with runner.watched(c) as (asked, _):
    params, _, name = chosen(built, workdir)
    above = workdir or WORKDIR.value or os.path.join(runs.EVALS, c.name)
    folder = out or cards.default_folder(built, params, above)
    with files.naming(folder):
      made = cards.run(built, params, folder, name, beat=asked.check)
    for named, other in others.items():
      inner = os.path.join(folder, named)
      with files.naming(inner):
        made += cards.run(other, params, inner, name, beat=asked.check, named=named)
    for card in made:
      at = f'{card["length"]} tokens, {card["steps"]} steps'
      where = f'{name} on {card["set"]}' if card['set'] else name
      runner.say(f'{where}: {cards.headline(card)} at {at}')
    runner.say(f'generations and cards in {folder}')


def sample_mode(command: Command) -> None:
  """Shows a prompt being unmasked, on the terminal and as a page."""
  html = runs.path_of('--html', HTML.value, written=True, file=True)
  workdir = run_of(command.config)
  built = runner.ready(command.config)
  build.problems(built, 'test')
  problem, prompt = shown_prompt(built)
  with runner.watched(command.config):
    params, _, name = chosen(built, workdir)
    sampler = built.steps.sample_eval
    (row,) = evaluate.generate(built, params, problem, sampler, 1, 0)
  line = f'{row["forwards"]} steps, {row["tokens"]} tokens'
  if example := problem.examples[0]:
    task = grader.bound(built.task, problem.show, [example], evaluate.ids_of([row]))
    protocol, weights = built.config.data.protocol, built.config.reward.weights
    (grade,) = grader.judge(task, protocol, [row['text']], [example], weights).grades
    line += f', grade {grade:g}; the answer: {answer_of(built.task, example)}'
  drawing = built.task.show(example, row['text']) if example else ''
  texts = watch.texts_of(row['ids'], built.tokenizer.decode)
  steps = watch.terminal(watch.pieces(texts, row['order']), sys.stdout.isatty())
  runner.say('\n'.join(filter(None, (prompt, steps, drawing, line))))
  if html and jax.process_index() == 0:
    tokens = list(zip(texts, row['order'], row['confidence'], strict=True))
    title = f'{built.config.name}, {name}'
    files.replace(html, watch.page(tokens, title, prompt, line, drawing))
    print(f'page with a slider over the steps: {html}')


def answer_of(task: Task, example: dict) -> Any:
  """Returns the true answer of a problem; the problem where the task says none."""
  truth = task.record(example)[1]
  if truth is example:
    with contextlib.suppress(ValueError):
      return task.target(example, 'bare')
  return truth


def shown_prompt(built: build.Built) -> tuple[data.Problems, str]:
  """Returns one problem and its text: --prompt, else --problem of the test."""
  if PROMPT.value:
    problem = data.encode_problems([{}], [PROMPT.value], built.tokenizer)
    length = {'eval.sampler.length': built.config.eval.sampler.length}
    data.check_positions(problem, length, *parts.limit_of(built, False))
    return problem, PROMPT.value
  test, at = build.problems(built, 'test'), PROBLEM.value
  if not 0 <= at < len(test.examples):
    raise ValueError(f'--problem={at} must be in 0 to {len(test.examples) - 1}')
  rows = slice(at, at + 1)
  problem = data.Problems(
    test.examples[rows], test.tokens[rows], test.valid[rows], show=test.show
  )
  return problem, built.task.prompt(test.examples[at], 'bare')


def pairs_mode(command: Command) -> None:
  """Writes the pairs of saved rollouts, and the problems that data.drop may name."""
  c = command.config
  if not c.pairs.path:
    raise ValueError('--mode=pairs needs --workdir=DIR of a run with saved rollouts')
  folders = [runs.path_of('pairs.path', path) for path in c.pairs.path]
  out = runs.path_of('--out', OUT.value, written=True)
  out = out or os.path.join(folders[0], buffers.FOLDER)
  built = runner.ready(c)
  completions = curating.judged(built, folders)
  lines, count = curating.pairs_among(built, completions)
  solved = pairs.solved(completions, DROP.value, c.seed)
  if jax.process_index() == 0:
    os.makedirs(out, exist_ok=True)
    for name, rows in ((pairs.FILE, lines), (pairs.SOLVED, solved)):
      files.replace(os.path.join(out, name), files.to_lines(rows))
  runner.say(
    f'{pairs.told(count)}\n{os.path.join(out, pairs.FILE)}: for pairs.path\n'
    f'{os.path.join(out, pairs.SOLVED)}: {len(solved)} problems, for data.drop'
  )


def rounds_mode(command: Command) -> None:
  """Alternates RL and training on pairs."""
  folder = runs.workdir_of(WORKDIR.value, written=True)
  how = ROUNDS.value, DROP.value
  rounds.run(command.config, folder, *how, command.overrides)
  if jax.process_index() == 0:
    print(report.summary(os.path.join(folder, str(ROUNDS.value))))


def score_mode(command: Command) -> None:
  """Grades saved generations as --config or --task say; the last line is JSON."""
  if not GENERATIONS.value:
    raise ValueError('--mode=score needs --generations=FILE.json')
  if (c := command.config) is not None:
    if TASK.present or PROTOCOL.present:
      raise ValueError(
        '--task and --protocol are for --mode=score without --config: set '
        '--config.data.task and --config.data.protocol'
      )
    wrong = [x for s in ('data', 'reward') for x in config.part(c, s).problems()]
    if wrong := wrong or check.rewarded(c):
      raise ValueError('; '.join(wrong))
    grader.configure(c.reward)
    card = cards.score_file(
      c.data.task,
      c.data.protocol,
      GENERATIONS.value,
      c.reward.weights,
      grader.task_of(c),
    )
    return runner.say(f'{cards.as_text(card)}\n{json.dumps(card)}')
  if not TASK.value:
    raise ValueError(f'--mode=score needs --config=FILE or --task={"|".join(CHOICES)}')
  card = cards.score_file(TASK.value, PROTOCOL.value, GENERATIONS.value)
  runner.say(json.dumps(card))


def export_mode(command: Command) -> None:
  """Writes a checkpoint in a format that other programs read."""
  c = command.config
  out, workdir = runs.path_of('--out', OUT.value, written=True), run_of(c)
  if not workdir:
    raise ValueError('--mode=export: a model without a run is written already')
  built = runner.ready(c)
  with runner.watched(c) as (_, dog):
    dog.path = os.path.join(workdir, f'stuck_{jax.process_index()}.txt')
    params, base, _ = chosen(built, workdir)
    folder = out or os.path.join(workdir, f'export-{FORMAT.value}')
    with files.naming(folder):
      report_ = hf.export(built, params, base, folder, FORMAT.value)
    runner.say(json.dumps(report_))


def plan_mode(command: Command) -> None:
  """Prints the plan of a run."""
  print(plan.run(command.config, TOPOLOGY.value))


def report_mode(command: Command) -> None:
  """Draws and summarizes one run, or compares several runs or cards."""
  out = runs.path_of('--out', OUT.value, written=True, file=True)
  if CARDS.value:
    paths = sorted(glob.glob(os.path.expanduser(CARDS.value)))
    return print(*report.compare_cards(paths, out), sep='\n')
  if RUNS.value:
    paths = sorted(glob.glob(os.path.expanduser(RUNS.value)))
    is_run = lambda path: os.path.exists(os.path.join(path, 'config.json'))
    paths = [path for path in paths if is_run(path) or not os.path.isdir(path)]
    return print(*report.compare(paths, BY.value, out), sep='\n')
  if not WORKDIR.value and command.config is None:
    raise ValueError('--mode=report needs --workdir=DIR, --config, --runs or --cards')
  workdir = runs.path_of('--workdir', WORKDIR.value)
  if not workdir:
    workdir = runs.find(command.config)[0] or runs.default(command.config)
  if not os.path.exists(os.path.join(workdir, 'config.json')):
    raise ValueError(f'no run in {workdir}: there is no config.json')
  with contextlib.suppress(report.NoData):  # the run has hardly begun
    print(report.curves(workdir))
  print((report.summary if runs.is_done(workdir) else status.under_way)(workdir))
  if runs.is_done(workdir):
    print(what_next(workdir))


def list_mode(command: Command) -> None:
  """Prints a table of the runs."""
  pattern = os.path.expanduser(RUNS.value or os.path.join(runs.FOLDER, '*'))
  folders = sorted(filter(os.path.isdir, glob.glob(pattern)))
  print(status.listing(folders) or f'no run in {pattern}: --runs names other folders')


MODES: dict[str, Callable[[Command], None]] = {
  'train': train_mode, 'sft': functools.partial(train_mode, only_sft=True),
  'eval': eval_mode, 'sample': sample_mode, 'score': score_mode,
  'export': export_mode, 'plan': plan_mode, 'report': report_mode,
  'list': list_mode, 'pairs': pairs_mode, 'rounds': rounds_mode,
}  # fmt: skip
