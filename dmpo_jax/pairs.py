"""Preference pairs: made of saved rollouts, written, read, and laid out as arrays.

`curate` is a pure function of completions and a seed. For each problem the chosen
completions are clean ones (verify.py), the rejected ones wrong or unclean. A pair never
crosses problems, and no problem of validation or test is in one.

A line of pairs.jsonl has token ids: prompt, chosen, rejected. -1 stands where the
sampler left a mask (sampler.eos_stop). Lines of others may have texts or messages
there, as preference data sets do.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dmpo_jax import buffers, data, files
from dmpo_jax.types import Array, BoolBP, IntB, IntBP
from dmpo_jax.verify import Verdict, Verifier

FILE = 'pairs.jsonl'
SOLVED = 'solved.jsonl'  # problems that data.drop may leave out
CLASSES = ('wrong', 'unclean')
CHOOSE = ('longest', 'random')


# --- from saved rollouts


class Completion(NamedTuple):
  """A saved completion and what the verifier says of it."""

  problem: str  # digest
  prompt: tuple[int, ...]
  ids: tuple[int, ...]  # on the canvas of L tokens; -1: nothing was sampled there
  text: str
  length: int  # tokens up to and including the first stop
  verdict: Verdict
  place: tuple[int, int, int]  # (number of the run, iteration, row)
  step: int  # updates of the policy that sampled

  def origin(self) -> dict[str, Any]:
    run, iteration, row = self.place
    return dict(run=run, iteration=iteration, row=row, step=self.step)


def completions_of(
  buffer: buffers.Buffer,
  run: int,
  verifier: Verifier,
  tokenizer: Any,
  stops: Collection[int],
) -> list[Completion]:
  """Returns the completions of a saved buffer, judged, in the order of its rows.

  run: the number of its run. stops: tokens that end a text.
  """
  texts = data.decode(tokenizer, buffer.tokens, tuple(stops))
  digests = [data.digest(verifier.task, example) for example in buffer.examples]
  out = []
  for row, text in enumerate(texts):
    b, length = row // buffer.group, int(buffer.length[row])
    ids = np.where(buffer.order[row] < 0, -1, buffer.tokens[row]).tolist()
    said = buffer.tokens[row, :length]
    ended = bool(np.isin(said[-1:], list(stops)).any())
    terms = {name: float(x[row]) for name, x in buffer.terms.items()}
    graded = float(buffer.grade[row]), terms
    whole = ended or fills(verifier, buffer.examples[b], tokenizer, len(ids))
    words = said[: length - ended].tolist()
    verdict = verifier.verdict(buffer.examples[b], text, words, whole, graded)
    prompt = buffer.prompt[b][buffer.valid[b]].tolist()
    place = (run, buffer.iteration, row)
    out.append(
      Completion(
        digests[b], tuple(prompt), tuple(ids), text, length, verdict, place,
        buffer.step,
      )
    )  # fmt: skip
  return out


def fills(verifier: Verifier, example: dict, tokenizer: Any, length: int) -> bool:
  """Returns whether a true answer has no room for EOS in `length` tokens."""
  target = verifier.target(example)
  return target is not None and len(data.encode_answer(tokenizer, target)) >= length


def gather(
  folders: Sequence[files.Path], last: int, judge: Callable[..., list[Completion]]
) -> list[Completion]:
  """Returns the completions of several runs, judged by judge(buffer, run).

  last: newest buffers of each run; 0 = all.
  """
  return [
    one
    for run, folder in enumerate(folders)
    for buffer in buffers.read(folder, last)
    for one in judge(buffer, run)
  ]


def curate(
  completions: Iterable[Completion], how: Any, seed: int, held: Collection[str] = ()
) -> tuple[list[dict], Counter[str]]:
  """Returns the lines of pairs.jsonl, and counts of what they were made from.

  how: each, choose and classes as in config.Pairs. held: digests of problems that no
  pair may have. The order of `completions` does not matter. Of equal texts of a problem
  the earliest counts; the rejected one is drawn by (seed, problem, number of the pair).
  """
  by_problem: dict[str, dict[str, Completion]] = {}
  count: Counter[str] = Counter()
  for one in sorted(completions, key=lambda one: one.place):
    count['completions'] += 1
    if one.problem in held:
      count['held_out'] += 1
      continue
    known = by_problem.setdefault(one.problem, {})
    if one.text in known:
      count['duplicates'] += 1
      continue
    known[one.text] = one
    count[one.verdict.kind] += 1
  lines = []
  for problem in sorted(by_problem):
    lines += pairs_of(list(by_problem[problem].values()), how, [seed, int(problem, 16)])
  count['problems'], count['pairs'] = len(by_problem), len(lines)
  count['problems_with_pairs'] = len({line['problem'] for line in lines})
  return lines, count


def told(count: Counter[str]) -> str:
  """Returns the counts of `curate` as a sentence."""
  text = ', '.join(f'{count[name]} {name}' for name in ('clean', 'unclean', 'wrong'))
  held = f', {count["held_out"]} of held-out problems' if count['held_out'] else ''
  return (
    f'{count["completions"]} completions of {count["problems"]} problems '
    f'({count["duplicates"]} duplicates{held}): {text}; {count["pairs"]} pairs of '
    f'{count["problems_with_pairs"]} problems'
  )


def pairs_of(
  completions: Sequence[Completion], how: Any, address: Sequence[int]
) -> list[dict]:
  """Returns the pairs of one problem."""
  chosen = [one for one in completions if one.verdict.clean]
  pool = [one for one in completions if one.verdict.kind in how.classes]
  if not pool:
    return []
  if how.choose == 'longest':
    chosen.sort(key=lambda one: -one.length)  # stable: the earliest of equals
  else:
    order = np.random.default_rng([*address, how.each]).permutation(len(chosen))
    chosen = [chosen[i] for i in order]
  lines, left = [], list(pool)
  for j, win in enumerate(chosen[: how.each]):
    left = left or list(pool)
    at = np.random.default_rng([*address, j]).integers(len(left))
    lose = left.pop(int(at))
    lines.append({
      'problem': win.problem, 'class': lose.verdict.kind, 'prompt': list(win.prompt),
      'chosen': list(win.ids), 'rejected': list(lose.ids), 'chosen_text': win.text,
      'rejected_text': lose.text, 'from': [win.origin(), lose.origin()],
    })  # fmt: skip
  return lines


def solved(
  completions: Iterable[Completion], share: float, seed: int
) -> list[dict[str, str]]:
  """Returns a share of the problems whose every completion is right, as {problem}.

  Which of them is a function of the problems and the seed.
  """
  right: dict[str, bool] = {}
  for one in completions:
    right[one.problem] = right.get(one.problem, True) and one.verdict.right
  known = sorted(problem for problem, good in right.items() if good)
  order = np.random.default_rng([seed, len(known)]).permutation(len(known))
  taken = sorted(order[: int(share * len(known) + 0.5)])
  return [{'problem': known[i]} for i in taken]


# --- pairs as arrays


class Rows(NamedTuple):
  """Pairs as arrays: n pairs, prompts of P tokens, completions of L."""

  prompt: IntBP  # left-padded
  valid: BoolBP  # False on padding
  answers: Array  # (n, 2, L) int32, chosen and rejected; -1: a mask was left
  owner: IntB  # number of the pair's problem, from 0


class Layout(NamedTuple):
  """How pairs become arrays."""

  tokenizer: Any
  length: int  # L
  room: Callable[[int], int]  # tokens of a prompt -> completion tokens that fit
  vocab: int
  fill: int  # what stands behind an answer: EOS, or -1 where the sampler ends there
  overlong: str = 'error'  # error | drop


def read(paths: Sequence[files.Path]) -> list[dict]:
  """Reads the lines of files of pairs, with 'where': file and line."""
  out = []
  for path in paths:
    lines = files.read(path)
    out += [{**line, 'where': f'{path}:{at}'} for at, line in enumerate(lines, 1)]
  if not out:
    raise ValueError(f'pairs.path = {tuple(paths)} has no pair')
  return out


def rows_of(lines: Sequence[Mapping[str, Any]], how: Layout) -> Rows:
  """Lays pairs out. ValueError names file, line and column of what cannot be used."""
  kept, prompts, answers, long = [], [], [], []
  end = data.turn_end(how.tokenizer)
  for line in lines:
    prompt = prompt_of(line, how)
    room = how.room(len(prompt))
    both = [answer_of(line, name, how, end) for name in ('chosen', 'rejected')]
    both = [trimmed(ids, room) for ids in both]
    size = max(map(len, both))
    if size > room:
      long.append(f'{line["where"]} has {size} tokens')
      continue
    kept.append(str(line.get('problem', prompt)))
    prompts.append(prompt)
    answers.append([ids + [how.fill] * (how.length - len(ids)) for ids in both])
  if long and (how.overlong == 'error' or not kept):
    raise ValueError(
      f'sampler.length = {how.length} is too short for {len(long)} of {len(lines)} '
      f'pairs: {long[0]}; raise it, or set pairs.overlong = drop'
    )
  longest = max(map(len, prompts))
  tokens, valid = data.left_pad(prompts, longest, how.tokenizer.pad_token_id)
  _, owner = np.unique(kept, return_inverse=True)
  return Rows(tokens, valid, np.array(answers, np.int32), owner.astype(np.int32))


def trimmed(ids: list[int], room: int) -> list[int]:
  """Cuts off what was not sampled where only `room` tokens of the canvas are free."""
  return ids[:room] if max(ids[room:], default=-1) < 0 else ids


def prompt_of(line: Mapping[str, Any], how: Layout) -> list[int]:
  """Returns the ids of a line's prompt: ids, a text, or messages."""
  chosen: Any = line.get('chosen')
  said: Any = line.get('prompt', chosen[:-1] if is_messages(chosen) else None)
  if isinstance(said, str) or is_messages(said):
    return data.apply_chat(how.tokenizer, said, True)
  return checked(line, 'prompt', said, how, 0)


def answer_of(
  line: Mapping[str, Any], name: str, how: Layout, end: list[int]
) -> list[int]:
  """Returns the ids of a completion: ids, a text, or messages that end with it."""
  said: Any = line.get(name)
  if is_messages(said):
    said = said[-1]['content']
  if isinstance(said, str):
    ids = data.encode_end(how.tokenizer, said, end)
    eos = how.tokenizer.eos_token_id
    return ids if ids[-1:] == [eos] else [*ids, eos]
  return checked(line, name, said, how, -1)


def is_messages(said: Any) -> bool:
  """Returns whether a value is a dialogue: a list of {role, content}."""
  return (
    isinstance(said, list)
    and bool(said)
    and all(isinstance(x, dict) and isinstance(x.get('content'), str) for x in said)
  )


def checked(
  line: Mapping[str, Any], name: str, ids: Any, how: Layout, least: int
) -> list[int]:
  """Returns token ids; ValueError if they are none of this model's."""
  good = isinstance(ids, list) and all(type(x) is int for x in ids) and ids
  if not good or not all(least <= x < how.vocab for x in ids):
    raise ValueError(
      f'{line["where"]}: {name} must be a text, messages, or token ids below '
      f'{how.vocab}; it is {str(ids)[:80]!r}'
    )
  return ids
