"""Samples with drafts whose gate is a function of texts: the host judges each block.

A round is a compiled step that drafts a block, the scores of the texts so far, and a
compiled step in which the model writes the blocks that are refused. build.py compiles
the steps.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dmpo_jax import data, mesh, model, rng, sampler
from dmpo_jax.sampler import Draft, Drafter, SampleConfig, speculate, unmask
from dmpo_jax.tasks import answers, rewards
from dmpo_jax.types import BoolR, BoolRP, BoolRS, IntR, IntRP, Params, Rollouts, Task

# --- the compiled steps


class Carry(NamedTuple):
  """A rollout between two steps."""

  state: speculate.State
  valid: BoolRS
  row: IntR


@dataclasses.dataclass(frozen=True)
class Program:
  """The steps of a rollout as functions of arrays; params: (the model's, the draft's).

  A step takes the run's seed last.
  """

  drafter: Drafter
  cfg: model.ModelConfig
  hp: SampleConfig
  stream: str
  records: tuple[str, ...]
  grid: Any  # the mesh

  def keys(self, row: IntR, seed: Any) -> Any:
    return rng.row_keys(rng.key_for(seed, self.stream), row)

  def opened(
    self, params: Params, tokens: IntRP, valid: BoolRP, row: IntR, seed: Any
  ) -> tuple[unmask.Setting, unmask.Loop]:
    keys_R = self.keys(row, seed)
    args = self.cfg, params, tokens, valid, keys_R, self.hp, self.records
    return sampler.opened(*args)

  def whole(
    self, params: tuple, tokens: IntRP, valid: BoolRP, row: IntR, seed: Any
  ) -> Rollouts:
    """Samples with a gate that is a function of arrays."""
    own = self.opened(params[0], tokens, valid, row, seed)
    return sampler.with_drafts(own, self.drafter, params[1])

  def begin(
    self, params: tuple, tokens: IntRP, valid: BoolRP, row: IntR, seed: Any
  ) -> Carry:
    own, loop = self.opened(params[0], tokens, valid, row, seed)
    theirs = self.drafter.setting(own, params[1])
    return self.by_row(Carry(speculate.begin(theirs, loop), own.valid, row))

  def setting(self, params: Params, carry: Carry, seed: Any) -> unmask.Setting:
    prompt = carry.valid.shape[1] - self.hp.length
    known = {name: sampler.RECORDS[name] for name in carry.state.loop.more}
    keys_R = self.keys(carry.row, seed)
    args = self.cfg, params, self.hp, carry.valid, prompt, keys_R, known
    return unmask.Setting(*args)

  def propose(
    self, span: int, params: tuple, carry: Carry, start: Any, seed: Any
  ) -> tuple[Carry, IntR]:
    own = self.setting(params[0], carry, seed)
    theirs = self.drafter.setting(own, params[1])
    state, before_R = speculate.propose(theirs, start, span, carry.state)
    return self.by_row((carry._replace(state=state), before_R))

  def settle(
    self, span: int, params: tuple, carry: Carry, start: Any, *verdict: Any
  ) -> Carry:
    """verdict: `before` of propose, the rows that are kept, the run's seed."""
    before, keep, seed = verdict
    own = self.setting(params[0], carry, seed)
    state = speculate.settle(own, (start, span), before, keep, carry.state)
    return self.by_row(carry._replace(state=state))

  def end(self, params: tuple, carry: Carry, seed: Any) -> Rollouts:
    own = self.setting(params[0], carry, seed)
    return sampler.finished(own, carry.state, self.drafter)

  def by_row(self, tree: Any) -> Any:
    """Splits arrays by rows, which the host reads between the steps."""
    rows = mesh.rows(self.grid)
    put = lambda x: jax.lax.with_sharding_constraint(x, rows) if x.ndim else x
    return jax.tree.map(put, tree)


# --- the host


@dataclasses.dataclass(frozen=True)
class Gate:
  """Scores texts so far; the rows of a batch are bound to their problems first."""

  how: Draft
  task: Task
  tokenizer: Any
  stops: tuple[int, ...]
  functions: rewards.Functions | None  # of draft.judge = FILE.py:NAME
  examples: Sequence[Any] | None = None
  prompts: Sequence[str] | None = None

  def keep(self, prompts: tuple, carry: Carry, end: int) -> BoolR:
    """Returns the rows whose score reaches the bound; all processes have the same.

    prompts: (tokens, valid) of the rows; end: tokens of the completion so far.
    """
    mine, mask = carry.state.mine, self.tokenizer.mask_token_id
    length = mine.order.shape[1]
    own = mesh.my_rows(mine.tokens)
    tokens, order = mesh.fetch((mine.tokens, mine.order))
    tokens = tokens[:, -length:]
    fill = self.tokenizer.eos_token_id
    seen = (np.arange(length)[None] < end) & (tokens != mask)
    tokens = data.after_given(order, np.where(seen, tokens, fill), fill)
    texts = data.decode(self.tokenizer, tokens[own], self.stops)
    pairs = mesh.gather(list(zip(own.tolist(), texts, strict=True)))
    found = dict(pair for part in pairs for pair in part)
    said: Any = None
    if jax.process_index() == 0:  # and it tells the others
      try:
        said = self.scores([found[i] for i in range(len(tokens))], prompts)
      except ValueError as error:
        said = str(error)
    said = mesh.gather(said)[0]
    if isinstance(said, str):
      raise ValueError(said)
    return np.array([x is not None and x >= self.how.bound for x in said])

  def scores(self, texts: Sequence[str], prompts: tuple) -> list[float | None]:
    """Returns a number for each text; None: the function has none, so it is refused."""
    if self.how.judge == 'format':
      return [answers.tags_so_far(text) for text in texts]
    examples = self.examples or [{}] * len(texts)
    if self.functions:
      shown = self.prompts or [
        self.tokenizer.decode(row[real])
        for row, real in zip(*map(np.asarray, prompts), strict=True)
      ]
      said = self.functions(shown, texts, rewards.columns_of(examples))
      return [next(iter(row.values())) for row in said]
    if not all(examples) or self.task.partial is None:
      raise ValueError(
        'draft.judge = task checks answers of a problem, and a prompt of your own has '
        'none: set draft.judge = format or FILE.py:NAME'
      )
    pairs = zip(texts, examples, strict=True)
    return [self.task.partial(text, example) for text, example in pairs]


def gate_of(how: Draft, task: Task, tokenizer: Any, stops: tuple, reward: Any) -> Gate:
  """Returns the gate of draft.gate = reward; reward: the config's section."""
  functions = None
  if how.judge.rpartition(':')[0].endswith('.py'):
    functions = rewards.Functions(how.judge, reward.seconds, reward.process)
  return Gate(how, task, tokenizer, stops, functions)


def bound(sample: Any, show: Callable[[Any], str], examples: Sequence[Any]) -> Any:
  """Returns a sampler whose gate, if it has one on the host, knows the rows' problems.

  show: example -> the text of its prompt.
  """
  gate = getattr(sample, 'gate', None)
  if gate is None:
    return sample
  known = all(examples)
  prompts = list(map(show, examples)) if known else None
  return sample.judged(dataclasses.replace(gate, examples=examples, prompts=prompts))
