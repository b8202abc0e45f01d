"""Rounds of RL and training on pairs, as VerIPO alternates them (arXiv 2505.19000).

Round 0 is RL. Each later round is a run of its own in the next folder: it starts from
the merged policy of the round before, trains on pairs of that round's rollouts, then
does RL without most of the problems that were always answered right. A round that is
done is not done again, and each resumes by itself: killed anywhere, the same command
goes on.
"""

import os
from typing import Any

import jax
from absl import logging

from dmpo_jax import buffers, check, config, files, hf, mesh, pairs, runner, runs
from dmpo_jax.phases import pairs as curating

MODEL = 'export-merged'  # the folder of a round's model
SOLVED = os.path.join(buffers.FOLDER, pairs.SOLVED)


def first(folder: str) -> str:
  """Returns the workdir of round 0, which a config of rounds has for pairs.path."""
  return os.path.join(folder, '0')


def config_of(c: Any, folder: str, number: int) -> Any:
  """Returns the config of a round; folder: of all rounds."""
  c = c.copy_and_resolve_references()
  with c.unlocked():
    c.log.rollouts, c.pairs.path = True, ()
    if number:
      before = os.path.join(folder, str(number - 1))
      c.model.update(dict.fromkeys(config.SIZES, 0))
      c.model.update(checkpoint=os.path.join(before, MODEL), convert='', mask_token='')
      c.sft.update(steps=0, epochs=0)
      c.lora.path = ''
      c.pairs.path = (before,)
      c.data.drop = os.path.join(before, SOLVED)
  return c


def run(c: Any, folder: str, count: int, share: float, overrides: dict) -> None:
  """Does round 0 and `count` more.

  share: of the problems that a round always answered right, to be left out from then
  on. ValueError if the config has no RL, or names pairs itself.
  """
  if not c.train.iterations:
    raise ValueError(
      '--mode=rounds needs train.iterations > 0: each round ends with RL'
    )
  if tuple(c.pairs.path) != (first(folder),):
    raise ValueError(
      f'--mode=rounds makes the pairs itself: leave out pairs.path = {c.pairs.path}'
    )
  for number in range(count + 1):
    workdir, own = os.path.join(folder, str(number)), config_of(c, folder, number)
    runs.refuse_other(own, workdir, check.FREE)
    if number < count and mesh.agree(is_whole(workdir)):
      continue
    runner.say(f'round {number} of {count}, in {workdir}')
    built = runner.ready(own)
    runner.train(built, workdir, overrides)
    if number < count:
      hand_over(built, workdir, share)


def is_whole(workdir: str) -> bool:
  """Returns whether a round is done, with all that the next one needs."""
  made = [os.path.join(workdir, name) for name in (MODEL, SOLVED)]
  return runs.is_done(workdir) and all(map(os.path.exists, made))


def hand_over(built: Any, workdir: str, share: float) -> None:
  """Writes what the next round starts from: the model, and the problems to drop."""
  c, out = built.config, os.path.join(workdir, MODEL)
  if not mesh.agree(os.path.exists(out)):
    with runner.watched(c):
      params, base, _ = runner.params_of(built, workdir)
      hf.export(built, params, base, out, 'merged')
  if jax.process_index() == 0:
    earlier = files.read(c.data.drop) if c.data.drop else []
    found = curating.solved_of(built, [workdir], share)
    logging.info('%d problems are left out from now on', len(earlier + found))
    files.replace(os.path.join(workdir, SOLVED), files.to_lines(earlier + found))
  mesh.agree(False)  # all wait for the file
