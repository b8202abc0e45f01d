"""Makes results cards: an accuracy with everything that it depends on.

`run` evaluates parameters at each completion length. It writes the generations
in the JSON format of the d1 and DMPO releases, and a card. `score_file` grades
saved generations again, ours or those of others.
"""

import copy
import dataclasses
import datetime
import glob
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dmpo_jax import (
  build,
  check,
  config,
  data,
  evaluate,
  files,
  grader,
  mesh,
  metrics,
  parts,
)
from dmpo_jax.sampler import SampleConfig, block_problem
from dmpo_jax.tasks import find
from dmpo_jax.tools import provenance, saved
from dmpo_jax.types import Params, Task

SUBSETS = (2, 4, 5, 8, 10, 16, 32, 64, 100, 128, 256)  # k of pass@k
# Numbers of a completion whose mean is on the card, and with drafts some more.
SPENT = ('forwards', 'batch_forwards', 'tokens', 'bound')
DRAFTED = ('draft_forwards', 'draft_batch_forwards', 'offered', 'kept')
PACKAGES = ('jax', 'flax', 'numpy', 'transformers', 'math-verify')


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The parts of an evaluation that all completion lengths share."""

  built: build.Built
  params: Params
  what: str  # name of the parameters: base, adapter, latest or best
  problems: data.Problems
  beat: Callable[[], Any]  # called after each completion
  named: str  # the name in eval.sets; '' = the config's own problems


def run(
  built: build.Built,
  params: Params,
  folder: str,
  what: str,
  beat: Callable[[], Any] = lambda: None,
  named: str = '',
) -> list[dict]:
  """Evaluates at each of eval.lengths; returns one results card per length.

  Writes generations and cards into `folder` as they are made, and resumes from
  them. what: name of the parameters (base, adapter, latest, best); named: that of the
  problems in eval.sets. Raises
  ValueError before it samples, if a length is impossible or the folder has
  generations of another model or config.
  """
  sections, problems = sections_of(built), build.problems(built, 'test')
  claim(folder, source_of(built, params))
  evaluation = Evaluation(built, params, what, problems, beat, named)
  return [run_length(evaluation, section, folder) for section in sections]


def sets_of(built: build.Built) -> dict[str, build.Built]:
  """Returns {name: the same run with other problems} of eval.sets.

  The programs are the same. ValueError names the set that cannot be read.
  """
  found = {}
  for text in built.config.eval.sets:
    name, _, fields = text.partition(':')
    c = built.config.copy_and_resolve_references()
    try:
      config.override(c, [f'--config.{field}' for field in fields.split()])
      if wrong := config.part(c, 'data').problems():
        raise ValueError('; '.join(wrong))
      other = built._replace(config=c, task=grader.task_of(c), encoded={})
      sections_of(other)
    except ValueError as error:
      raise ValueError(f'eval.sets, {name}: {error}') from None
    found[name] = other
  return found


def sections_of(built: build.Built) -> list:
  """Returns eval.sampler at each of eval.lengths; ValueError if one is impossible."""
  c = built.config
  lengths = c.eval.lengths or (c.eval.sampler.length,)
  sections = [section_of(c.eval.sampler, length) for length in lengths]
  for section in sections:
    hp = check.settings(SampleConfig, section)
    if problem := block_problem(built.model, hp):
      raise ValueError(f'eval.lengths = {lengths}: eval.{problem}')
  prompt = build.problems(built, 'test').tokens.shape[1]
  positions, whose = parts.limit_of(built, False)
  room = positions - prompt
  if max(lengths) > room:
    raise ValueError(
      f'eval.lengths = {lengths}: after prompts of {prompt} tokens the {whose} has '
      f'{room} positions, set no length above'
    )
  return sections


def run_length(evaluation: Evaluation, section: Any, folder: str) -> dict:
  """Evaluates with one sampler section; writes its files and returns its card."""
  c = evaluation.built.config
  task = grader.prefilled(evaluation.built.task, evaluation.problems.prefill)
  # FILE.py:NAME has a path and a colon.
  task_said = re.sub(r'[^\w.-]+', '-', os.path.basename(task_name(c)))
  name = f'{task_said}_{evaluation.what}_{section.length}_{section.steps}'
  stem = os.path.join(folder, name)
  begun = time.time()
  rows, before = collect(evaluation, section, f'{stem}.jsonl')
  problems = evaluation.problems
  examples = [problems.examples[row['problem']] for row in rows]
  task = grader.bound(task, problems.show, examples, evaluate.ids_of(rows))
  numbers, failed = numbers_of(task, c.data.protocol, c.reward.weights, rows, examples)
  made = card(evaluation, section, numbers, before + time.time() - begun)
  if jax.process_index() == 0:
    texts = generations(task, rows, examples, made)
    files.replace(f'{stem}_0_generations.json', json.dumps(texts, indent=1))
    files.replace(f'{stem}.card.json', json.dumps(made, indent=1))
    files.replace(f'{stem}.card.md', as_text(made))
    if failed:
      files.replace(f'{stem}.failed_grades.json', json.dumps(failed, indent=1))
  return made


def task_name(c: Any) -> str:
  """Returns the task's name; `python` for prompts that the Python API was given."""
  return 'python' if c.data.path.startswith('python:') else c.data.task


def source_of(built: build.Built, params: Params) -> dict[str, Any]:
  """Returns what generations depend on: config fields, and a digest of `params`."""
  free = (*check.FREE, 'eval.lengths', 'eval.every', 'reward.')
  fields = check.plain(built.config)
  built.steps.read_draft()  # it notes its digest
  return {
    'parameters': int(built.steps.digest(params)),
    **{f'weights of {x}': built.read[x] for x in ('draft.of',) if x in built.read},
    **{name: value for name, value in fields.items() if not name.startswith(free)},
  }


def default_folder(built: build.Built, params: Params, workdir: str) -> str:
  """Returns a folder in the workdir for these parameters and this evaluation."""
  source = json.dumps(source_of(built, params), sort_keys=True)
  digest = hashlib.sha256(source.encode()).hexdigest()
  return os.path.join(workdir, f'eval-{digest[:8]}')


def claim(folder: str, source: dict[str, Any]) -> None:
  """Makes a folder, and records in source.json whose generations it holds.

  Raises ValueError if it holds those of another source, or of an unknown one.
  """
  path = os.path.join(folder, 'source.json')
  if not os.path.exists(path):
    if glob.glob(os.path.join(glob.escape(folder), '*.jsonl')):
      raise ValueError(
        f'{folder} has generations, but no source.json that names their model '
        'and config: name another --out'
      )
    if jax.process_index() == 0:
      os.makedirs(folder, exist_ok=True)
      files.replace(path, json.dumps(source, indent=1))
    return
  changed = check.changes(files.read_json(path), source, ())
  if changed:
    raise ValueError(
      f'{folder} has generations of another model or config '
      f'({changed}): name another --out'
    )


def section_of(section: Any, length: int) -> Any:
  """Returns eval.sampler at another length, with the same tokens per step.

  Raises ValueError for a length that the block or the steps do not divide.
  """
  section = copy.deepcopy(section)
  if section.length % section.steps:
    raise ValueError(
      f'eval.sampler.steps = {section.steps} must divide its '
      f'length = {section.length} for other eval.lengths'
    )
  per_step = section.length // section.steps
  if length < 1 or length % section.block or length % per_step:
    raise ValueError(
      f'eval.lengths has {length}, which must be a multiple of '
      f'eval.sampler.block = {section.block} and of the {per_step} tokens per step'
    )
  with section.unlocked():
    section.steps, section.length = length // per_step, length
  return section


def collect(
  evaluation: Evaluation, section: Any, path: str
) -> tuple[list[dict], float]:
  """Samples the completions that `path` lacks; returns all, and seconds before.

  Appends to the JSON-lines file `path` a batch at a time.
  """
  built, problems = evaluation.built, evaluation.problems
  c = built.config
  batch, total = c.eval.batch, len(problems.examples) * c.eval.samples
  # The first process decides: a shared disk may show the others less.
  found = mesh.gather(None if jax.process_index() else resume(path, batch, total))
  rows, seconds = next(filter(None, found))
  if len(rows) == total:
    return rows, seconds
  sample = built.steps.sample_eval
  if section != c.eval.sampler:
    sample = built.steps.sampler_of(section)
  progress = metrics.Progress(
    total,
    f'evaluate {section.length}',
    start=len(rows),
    every_seconds=c.log.every_seconds,
  )
  begun, saved = time.time(), len(rows)
  for row in evaluate.generate(
    built, evaluation.params, problems, sample, total, len(rows)
  ):
    del row['confidence']  # it would be half of the file
    rows.append({**row, 'seconds': seconds + time.time() - begun})
    evaluation.beat()
    if len(rows) % batch == 0 or len(rows) == total:
      if jax.process_index() == 0:
        files.append(path, rows[saved:])
      saved = len(rows)
      progress.update(saved, {})
  progress.close()
  return rows, seconds


def resume(path: str, batch: int, total: int) -> tuple[list[dict], float]:
  """Returns the saved rows of whole batches and their seconds; drops the rest."""
  rows = files.read(path)
  rows = rows[: total if len(rows) >= total else len(rows) // batch * batch]
  if os.path.exists(path):
    files.replace(path, files.to_lines(rows))
  return rows, rows[-1]['seconds'] if rows else 0.0


def mean_of(rows: Sequence[dict]) -> dict[str, float]:
  """Returns the mean of each field over rows with the same fields."""
  return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def numbers_of(
  task: Task,
  protocol: str,
  weights: Any,
  rows: Sequence[dict],
  examples: Sequence[dict],
) -> tuple[dict[str, Any], list[dict]]:
  """Grades generations; returns a card's numbers and the failed comparisons.

  Several samples of a problem give pass@1 (the accuracy), pass@k for some k, and the
  accuracy of the majority.
  """
  texts = [row['text'] for row in rows]
  graded = grader.judge(task, protocol, texts, examples, weights)
  spent = [
    {name: row[name] for name in SPENT + DRAFTED * ('offered' in row) if name in row}
    for row in rows
    if 'forwards' in row
  ]
  out = {
    'problems': len({row['problem'] for row in rows}),
    'accuracy': evaluate.averaged(task, protocol, examples, graded.grades),
    'reward': float(np.mean(graded.reward)),
    'terms': grader.means(graded.terms),
    **mean_of([task.extra(*pair) for pair in zip(texts, examples, strict=True)]),
    'grades_failed': len(graded.failed),
    **mean_of(spent or [{}]),
  }
  if 'bound' in out:  # each problem's own number of the pick rule
    out['bound_std'] = float(np.std([row['bound'] for row in spent]))
  if out.get('offered'):
    out['acceptance'] = out['kept'] / out['offered']
  out['interval'] = wilson(out['accuracy'], out['problems'])
  groups, problems = {}, {}
  for row, example, grade in zip(rows, examples, graded.grades, strict=True):
    problems.setdefault(row['problem'], example)
    answer = task.answer(row['text'], example, protocol)
    groups.setdefault(row['problem'], []).append((answer, grade))
  samples = max(map(len, groups.values()))
  if samples > 1:
    majority = [vote(group) for group in groups.values()]
    average = lambda grades: evaluate.averaged(
      task, protocol, problems.values(), grades
    )
    out |= {
      'samples': samples,
      **{
        f'pass@{k}': average([pass_at(k, [g for _, g in x]) for x in groups.values()])
        for k in sorted({*SUBSETS, samples})
        if k <= min(map(len, groups.values())) or k == samples
      },
      'majority': average(majority),
    }
  return out, graded.failed


def pass_at(k: int, grades: Sequence[float | int]) -> float:
  """Returns the mean best grade of k of these samples, over all choices of k.

  Of grades 0 and 1 it is the unbiased estimator of Chen et al. 2021, equation 1. All
  samples count where there are fewer.
  """
  k = min(k, len(grades))
  best = [math.comb(i, k - 1) * grade for i, grade in enumerate(sorted(grades))]
  return sum(best) / math.comb(len(grades), k)


def vote(group: Sequence[tuple[str | None, float | int]]) -> float:
  """Returns the grade of the most frequent answer; of the first in a tie."""
  answers = [answer for answer, _ in group if answer is not None]
  if not answers:
    return 0.0
  winner = max(answers, key=answers.count)
  return next(grade for answer, grade in group if answer == winner)


def wilson(rate: float, count: int, z: float = 1.96) -> list[float]:
  """Returns the 95 % score interval of a rate seen in `count` problems.

  Wilson 1927: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
  """
  middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
  half = (
    z
    / (1 + z * z / count)
    * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
  )
  return [max(0.0, middle - half), min(1.0, middle + half)]


def card(
  evaluation: Evaluation, section: Any, numbers: dict[str, Any], seconds: float
) -> dict[str, Any]:
  """Returns a results card: the numbers, and all that they depend on."""
  c = evaluation.built.config
  return {
    'task': task_name(c),
    'protocol': c.data.protocol,
    'split': 'test',
    'set': evaluation.named,
    'style': c.eval.template or c.eval.style or c.data.template or c.data.style,
    'model': c.model.checkpoint or c.model.preset,
    'parameters': evaluation.what,
    'adapter': c.lora.path,
    **numbers,
    **section.to_dict(),
    **drafts_of(c),
    'samples': c.eval.samples,
    'batch': c.eval.batch,
    'seed': c.seed,
    'prompts_changed': evaluation.problems.changed,
    'dtype': c.model.dtype,
    'quantize': c.model.quantize,
    'device': f'{jax.device_count()} {jax.devices()[0].device_kind}',
    'seconds': round(seconds, 1),
    'date': datetime.date.today().isoformat(),
    'versions': provenance.versions(PACKAGES),
  }


def drafts_of(c: Any) -> dict[str, Any]:
  """Returns the settings of drafts that have an effect; {} without drafts."""
  idle = config.part(c, 'draft').idle()
  fields = {name: x for name, x in c.draft.items() if name not in idle}
  fields.pop('rollouts', None)
  return {f'draft.{name}': x for name, x in fields.items()} if c.draft.of else {}


def generations(
  task: Task, rows: Sequence[dict], examples: Sequence[dict], made: dict[str, Any]
) -> dict[str, Any]:
  """Returns generations in the format that the parsers of d1 and DMPO read."""
  items = []
  for row, example in zip(rows, examples, strict=True):
    question, truth = task.record(example)
    items.append(
      {
        'question': question,
        'generations': row['text'],
        'ground_truth': truth,
        'problem': row['problem'],
      }
    )
  return {
    'generations': items,
    'metrics': {'wall_time': made['seconds'], 'total_processed': len(items)},
    'model_path': made['model'],
    'checkpoint_path': made['parameters'],
    'gen_length': made['length'],
    'diffusion_steps': made['steps'],
    'block_length': made['block'],
    'card': made,
  }


def score_file(
  task_name: str,
  protocol: str,
  pattern: str,
  weights: Any = None,
  paid: Task | None = None,
) -> dict[str, Any]:
  """Grades saved generations, ours or those of others; returns a results card.

  pattern: a file, or a pattern of the files of one evaluation. weights: factors of the
  reward terms, as reward.weights. paid: the task with reward.file. Raises ValueError
  that names what a file lacks.
  """
  task = paid or find(task_name, '--task')
  header, rows, examples, files, skipped = saved.read(task, pattern)
  made = header.get('card')
  made = dict(made) if isinstance(made, dict) else {}
  show = lambda example: task.record(example)[0]
  judge = grader.bound(saved.judge_of(task, made), show, examples)
  return made | {
    'task': task_name,
    'protocol': protocol,
    'file': pattern,
    'files': files,
    'skipped': skipped,
    'model': made.get('model', header.get('model_path', 'unknown')),
    'length': header.get('gen_length'),
    'steps': header.get('diffusion_steps'),
    'block': header.get('block_length'),
    **numbers_of(judge, protocol, weights or {}, rows, examples)[0],
  }


def headline(made: dict[str, Any]) -> str:
  """Returns a card's accuracy and interval as one line."""
  low, high = made['interval']
  return (
    f'{made["task"]}, {made["protocol"]}: {100 * made["accuracy"]:.1f} % '
    f'(95 % interval {100 * low:.1f} to {100 * high:.1f}, {made["problems"]} problems)'
  )


def as_text(made: dict[str, Any]) -> str:
  """Returns a card as Markdown: its headline, then a table of its fields."""
  number = lambda x: f'{x:.4g}' if isinstance(x, float) else f'{x}'
  lines = [f'**{headline(made)}**', '', '| | |', '|---|---|']
  for name, value in made.items():
    if isinstance(value, dict):
      value = ', '.join(f'{k} {number(v)}' for k, v in value.items())
    lines.append(f'| {name} | {number(value)} |')
  return '\n'.join(lines) + '\n'
