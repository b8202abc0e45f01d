"""How well parameters solve a split: sampled, decoded, graded, averaged.

`accuracy` is the number of a training run. `run` is the evaluation that others
can compare with: for each completion length it writes all generations in the
field's JSON, and a results card that says how the number was made.
"""

import copy
import datetime
import glob
import importlib.metadata
import itertools
import json
import math
import os
import time

import jax
import numpy as np

from dmpo_jax import check, data, grader, mesh, metrics
from dmpo_jax.build import problems as load_problems

PACKAGES = ('jax', 'flax', 'numpy', 'transformers', 'math-verify')


def accuracy(built, params, problems, beat=lambda: None):
  """Mean grade, reward and the task's extra numbers over all problems.

  Samples with eval.sampler in batches of eval.batch; the last one is padded
  with repeats that do not count; beat() is called now and then. Returns (dict
  of floats, list of samples).
  """
  rows = []
  for row in generate(
    built, params, problems, built.steps.sample_eval, len(problems.examples), 0
  ):
    rows.append(row)
    beat()
  examples = [problems.examples[row['problem']] for row in rows]
  graded = judged(built, rows, examples)
  numbers = [
    {
      'reward': float(reward),
      'forwards': row['batch_forwards'],
      **built.task.extra(row['text'], example),
    }
    for reward, row, example in zip(graded.reward, rows, examples, strict=True)
  ]
  mean = {
    'accuracy': averaged(built, examples, graded.grades),
    **{name: float(np.mean([row[name] for row in numbers])) for name in numbers[0]},
  }
  samples = [
    dict(
      prompt=built.task.prompt(example, 'bare'),
      example=example,
      completion=row['text'],
      reward=terms,
      order=row['order'],
    )
    for row, example, terms in zip(rows, examples, graded.terms, strict=True)
  ]
  return mean, samples


def judged(built, rows, examples):
  """grader.Graded of generations that every process holds."""
  c = built.config
  mine = range(jax.process_index(), len(rows), jax.process_count())
  return grader.judge(
    built.task,
    c.data.protocol,
    [rows[i]['text'] for i in mine],
    [examples[i] for i in mine],
    c.reward.weights,
    mine,
  )


def averaged(built, examples, grades):
  """The mean of grades, each as much as its problem counts (Task.counts)."""
  counts = [
    built.task.counts(example, built.config.data.protocol) for example in examples
  ]
  return float(np.average(grades, weights=counts)) if any(counts) else 0.0


def generate(built, params, problems, sample, total, first):
  """Yields dicts of the completions first..total-1, a batch at a time.

  Completion r is one of problem r mod n; its random numbers are those of r,
  whatever the batch.
  """
  batch, count = built.config.eval.batch, len(problems.examples)
  prompt = problems.tokens.shape[1]
  stop = data.stop_ids(built.tokenizer)
  for start in range(first, total, batch):
    row = np.arange(start, start + batch, dtype=np.int32)
    at = np.minimum(row, total - 1) % count
    rollouts, completion, _ = sample(
      params, problems.tokens[at], problems.valid[at], row
    )
    tokens, order, forwards, completion = mesh.fetch(
      (rollouts.tokens, rollouts.order, rollouts.forwards, completion)
    )
    mine = mesh.my_rows(rollouts.tokens)
    read = zip(
      mine.tolist(),
      data.decode(built.tokenizer, tokens[mine, prompt:], stop),
      strict=True,
    )
    texts = dict(itertools.chain(*mesh.gather(list(read))))
    for i in range(min(batch, total - start)):
      yield dict(
        row=start + i,
        problem=int(at[i]),
        text=texts[i],
        ids=tokens[i, prompt:].tolist(),
        order=order[i].tolist(),
        forwards=int(order[i].max()) + 1,
        tokens=int(completion[i].sum()),
        batch_forwards=int(forwards),
      )


# ---- the evaluation that others compare with


def run(built, params, source, folder, what, split='test', beat=lambda: None):
  """One results card per length of eval.lengths, as dicts; see `card`.

  source: what `source_of` says of params; what: their name (base, adapter,
  latest, best). Generations and cards are written into `folder` as they come;
  called again it goes on. beat() is called after each generation. ValueError
  before anything is sampled if a length is impossible, or the folder has
  others' generations.
  """
  c = built.config
  lengths = c.eval.lengths or (c.eval.sampler.length,)
  sections = [section_of(c, length) for length in lengths]
  held = load_problems(built, split)
  room = built.model.positions - held.tokens.shape[1]
  if max(lengths) > room:
    raise ValueError(
      f'eval.lengths = {lengths}: with prompts of '
      f'{held.tokens.shape[1]} tokens there is room for {room}'
    )
  claim(folder, source)
  cards = []
  for section in sections:
    stem = os.path.join(
      folder, f'{c.data.task}_{what}_{section.length}_{section.steps}'
    )
    begun = time.time()
    rows, before = collected(built, params, held, section, f'{stem}.jsonl', beat)
    examples = [held.examples[row['problem']] for row in rows]
    numbers, failed = numbers_of(built, rows, examples)
    seconds = before + time.time() - begun
    made = card(built, section, what, split, numbers, seconds, held.changed)
    if jax.process_index() == 0:
      write(
        f'{stem}_0_generations.json', generations(built, section, rows, examples, made)
      )
      write(f'{stem}.card.json', made)
      if failed:
        write(f'{stem}.failed_grades.json', failed)
      with open(f'{stem}.card.md', 'w') as f:
        f.write(as_text(made))
    cards.append(made)
  return cards


def source_of(built, params):
  """What generations depend on: {field: value}, and a digest of `params`."""
  free = (*check.FREE, 'eval.lengths', 'eval.every', 'reward.')
  return {
    'parameters': int(built.steps.digest(params)),
    **{
      name: value
      for name, value in check.plain(built.config).items()
      if not name.startswith(free)
    },
  }


def claim(folder, source):
  """Makes `folder`, and notes whose generations are in it.

  ValueError if it has those of another source, or nobody knows of which.
  """
  path = os.path.join(folder, 'source.json')
  if not os.path.exists(path):
    if glob.glob(os.path.join(glob.escape(folder), '*.jsonl')):
      raise ValueError(
        f'{folder} has generations, but no source.json that says'
        ' whose: name another --out'
      )
    if jax.process_index() == 0:
      os.makedirs(folder, exist_ok=True)
      metrics.replace(path, json.dumps(source, indent=1))
    return
  with open(path) as f:
    changed = check.changes(json.load(f), source, ())
  if changed:
    raise ValueError(
      f'{folder} has generations of another model or config '
      f'({changed}): name another --out'
    )


def section_of(c, length):
  """eval.sampler at another length, at the same number of tokens a step."""
  section = copy.deepcopy(c.eval.sampler)
  if section.length % section.steps:
    raise ValueError(
      f'eval.sampler.steps = {section.steps} must divide its '
      f'length = {section.length} for other eval.lengths'
    )
  a_step = section.length // section.steps
  if length < 1 or length % section.block or length % a_step:
    raise ValueError(
      f'eval.lengths has {length}, which must be a multiple of '
      f'eval.sampler.block = {section.block} and of the {a_step}'
      ' tokens a step'
    )
  with section.unlocked():
    section.steps, section.length = length // a_step, length
  return section


def collected(built, params, held, section, path, beat):
  """(rows, seconds spent before): generations, saved batch by batch."""
  c = built.config
  total = len(held.examples) * c.eval.samples
  # What one process finds there counts: a shared disk may show others less.
  found = mesh.gather(
    None if jax.process_index() else resumed(path, c.eval.batch, total)
  )
  rows, seconds = next(filter(None, found))
  if len(rows) == total:
    return rows, seconds
  sample = (
    built.steps.sample_eval
    if section == c.eval.sampler
    else built.steps.sampler_of(section)
  )
  progress = metrics.Progress(
    total,
    f'evaluate {section.length}',
    start=len(rows),
    every_seconds=c.log.every_seconds,
  )
  with open(path if jax.process_index() == 0 else os.devnull, 'a') as f:
    begun = time.time()
    for row in generate(built, params, held, sample, total, len(rows)):
      row['seconds'] = seconds + time.time() - begun
      rows.append(row)
      f.write(json.dumps(row) + '\n')
      beat()
      if len(rows) % c.eval.batch == 0:
        f.flush()
        progress.update(len(rows), {})
  progress.close()
  return rows, seconds


def resumed(path, batch, total):
  """(rows of whole batches that are saved, their seconds)."""
  if not os.path.exists(path):
    return [], 0.0
  with open(path) as f:
    rows = [json.loads(line) for line in f if line.endswith('\n')]
  rows = rows[: total if len(rows) >= total else len(rows) // batch * batch]
  metrics.replace(path, ''.join(json.dumps(row) + '\n' for row in rows))
  return rows, rows[-1]['seconds'] if rows else 0.0


def numbers_of(built, rows, examples):
  """(what a card tells of generations, the comparisons that failed).

  Several of a problem give pass@1 (the accuracy), pass@k (any is right) and
  the accuracy of the majority.
  """
  graded = judged(built, rows, examples)
  protocol, task = built.config.data.protocol, built.task
  extras = [task.extra(row['text'], e) for row, e in zip(rows, examples, strict=True)]
  mean = lambda dicts: {
    name: float(np.mean([d[name] for d in dicts])) for name in dicts[0]
  }
  out = {
    'problems': len({row['problem'] for row in rows}),
    'accuracy': averaged(built, examples, graded.grades),
    'reward': float(np.mean(graded.reward)),
    'terms': mean(graded.terms),
    **mean(extras),
    'grades_failed': len(graded.failed),
    **mean(
      [
        {name: row[name] for name in ('forwards', 'tokens')}
        for row in rows
        if 'forwards' in row
      ]
      or [{}]
    ),
  }
  out['interval'] = wilson(out['accuracy'], out['problems'])
  by_problem, told = {}, {}
  for row, example, grade in zip(rows, examples, graded.grades, strict=True):
    told.setdefault(row['problem'], example)
    by_problem.setdefault(row['problem'], []).append(
      (task.answer(row['text'], example, protocol), grade)
    )
  samples = max(map(len, by_problem.values()))
  if samples > 1:
    best = [max(grade for _, grade in group) for group in by_problem.values()]
    out |= {
      'samples': samples,
      f'pass@{samples}': averaged(built, told.values(), best),
      'majority': averaged(built, told.values(), list(map(vote, by_problem.values()))),
    }
  return out, graded.failed


def vote(group):
  """The grade of the most frequent answer; the first of equally frequent."""
  said = [answer for answer, _ in group if answer is not None]
  if not said:
    return 0.0
  winner = max(said, key=said.count)
  return next(grade for answer, grade in group if answer == winner)


def wilson(rate, count, z=1.96):
  """The 95 % confidence interval of a rate seen in `count` problems."""
  middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
  half = (
    z
    / (1 + z * z / count)
    * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
  )
  return [max(0.0, middle - half), min(1.0, middle + half)]


def card(built, section, what, split, numbers, seconds, changed):
  """A results card: the numbers, and all that they depend on."""
  c = built.config
  return {
    'task': c.data.task,
    'protocol': c.data.protocol,
    'split': split,
    'style': c.eval.template or c.eval.style or c.data.template or c.data.style,
    'model': c.model.checkpoint or c.model.preset,
    'parameters': what,
    'adapter': c.lora.path,
    **numbers,
    **section.to_dict(),
    'samples': c.eval.samples,
    'batch': c.eval.batch,
    'seed': c.seed,
    'prompts_changed': changed,
    'dtype': c.model.dtype,
    'quantize': c.model.quantize,
    'device': f'{jax.device_count()} {jax.devices()[0].device_kind}',
    'seconds': round(seconds, 1),
    'date': datetime.date.today().isoformat(),
    'versions': {p: importlib.metadata.version(p) for p in PACKAGES},
  }


def generations(built, section, rows, examples, made):
  """The field's JSON: its parsers read `generations` and `ground_truth`."""
  record = built.task.record
  items = []
  for row, example in zip(rows, examples, strict=True):
    question, truth = record(example)
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
    'gen_length': section.length,
    'diffusion_steps': section.steps,
    'block_length': section.block,
    'card': made,
  }


def rescore(built, path):
  """A results card of saved generations, ours or others', graded anew.

  ValueError names what the file lacks.
  """
  with open(path, encoding='utf-8') as f:
    try:
      saved = json.load(f)
    except ValueError as error:
      raise ValueError(f'{path}: not JSON: {error}') from None
  items = saved.get('generations') if isinstance(saved, dict) else None
  if not items or not isinstance(items, list):
    raise ValueError(f'{path}: no list of generations, or an empty one')
  rows, examples = [], []
  for i, item in enumerate(items):
    if not isinstance(item, dict):
      raise ValueError(f'{path}: generation {i} is no object with fields')
    lacks = [
      name
      for name in ('question', 'generations', 'ground_truth')
      if item.get(name) is None
    ]
    if lacks:
      raise ValueError(f'{path}: generation {i} has no {", ".join(lacks)}')
    try:
      examples.append(built.task.recall(item['question'], item['ground_truth']))
    except ValueError as error:
      raise ValueError(f'{path}: generation {i}: {error}') from None
    rows.append({'text': item['generations'], 'problem': item.get('problem', i)})
  made = dict(saved.get('card', {}))
  c = built.config
  return made | {
    'task': c.data.task,
    'protocol': c.data.protocol,
    'file': path,
    'model': made.get('model', saved.get('model_path', 'unknown')),
    'length': saved.get('gen_length'),
    'steps': saved.get('diffusion_steps'),
    'block': saved.get('block_length'),
    **numbers_of(built, rows, examples)[0],
  }


def write(path, value):
  with open(path, 'w') as f:
    json.dump(value, f, indent=1)


def as_text(made):
  """A card as Markdown: the number in a line, then all the rest."""
  low, high = made['interval']
  lines = [
    f'**{made["task"]}, {made["protocol"]}: '
    f'{100 * made["accuracy"]:.1f} %** (95 % interval {100 * low:.1f} '
    f'to {100 * high:.1f}, {made["problems"]} problems)',
    '',
    '| | |',
    '|---|---|',
  ]
  for name, value in made.items():
    if isinstance(value, dict):
      value = ', '.join(
        f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in value.items()
      )
    elif isinstance(value, float):
      value = f'{value:.4g}'
    lines.append(f'| {name} | {value} |')
  return '\n'.join(lines) + '\n'
