"""The sampler's settings, and what each value of `sampler.pick` stands for."""

import dataclasses
from collections.abc import Callable
from typing import Any

from dmpo_jax import rules

CACHES = ('none', 'prefix', 'dual', 'block')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
  """One value of `sampler.pick`: its loop, and the facts that checks need."""

  # (Setting, Loop) -> Loop, see unmask.py. None: the loops there, with the rule
  # of a picks.Pick.
  unmask: Callable[..., Any] | None = None
  scheduled: bool = False  # a step reveals the number that sampler.steps plans
  scored: bool = False  # ranks by a score; rank_temperature > 0 draws by it
  judged: bool = False  # ranks by the confidence that sampler.rank selects
  drawn: bool = False  # chooses positions by noise
  reads: tuple[str, ...] = ()  # settings that few samplers read, and this one does
  bound: str = ''  # the setting of which each row may have its own; '' = none
  records: bool = True  # Rollouts.order tells the state of every step
  plain: bool = True  # its forward can have a cache, guidance, splash attention
  # SampleConfig -> one sentence for each setting that does not fit this sampler.
  problems: Callable[..., list[str]] = lambda hp: []


# All samplers by name. The package's __init__ fills it: the samplers import
# this module.
SAMPLERS: dict[str, Sampler] = {}


def at_once(hp: Any, rows: int) -> int:
  """Returns how many of a batch's rows are sampled at a time, by its settings."""
  return hp.slots if 0 < hp.slots < rows else rows


@dataclasses.dataclass(frozen=True)
class SampleConfig(rules.Section):
  """How completions are sampled: the config sections sampler and eval.sampler."""

  NAME = 'sampler'
  OWN = {
    'steps': rules.least(1),
    'rank': rules.one_of('token', 'max'),
    'threshold': rules.share,
    'cache': rules.one_of(*CACHES),
    'fallback': rules.one_of('best', 'leftmost'),
    'schedule': rules.one_of('even', 'nearest', 'dream'),
    'rank_law': rules.one_of('model', 'sampling'),
    'top_p': rules.positive_share,
    'verify': rules.share,
  }

  length: int  # L, tokens of a completion
  block: int  # W, tokens of a block; blocks are unmasked from left to right
  steps: int  # unmasking steps of a completion; scheduled picks only
  temperature: float = 0.0  # of the law that tokens are drawn from; 0 = greedy
  pick: str = 'confidence'  # which proposals a step keeps; a name in SAMPLERS
  # Whose probability is a position's confidence: token (the sampled token, as
  # in LLaDA) | max (the most probable token).
  rank: str = 'token'
  threshold: float = 0.9  # picks threshold, dynamic, wino: least confidence, in [0, 1]
  factor: float = 1.0  # pick factor: larger reveals more tokens a step
  entropy_bound: float = 0.1  # pick entropy: nats of a step, less the largest
  guidance: float = 0.0  # scale of classifier-free guidance; 0 = off
  # rank = token: record the log-prob of each step's positions, so that a trajectory has
  # an exact one. Confidences above 0.999 then count as equal.
  order_logp: bool = False
  # Keys and values that the steps of a block reuse: none | prefix (of what is
  # before the block) | dual (of all but the block) | block (block-causal models: of
  # the finished blocks, exact).
  cache: str = 'none'
  refresh: int = 0  # steps between full forwards with a cache; 0 = once a block
  # Rows that are sampled at a time; 0 = all. A row that has ended hands its slot to the
  # next one; with the caches prefix and dual, pieces of so many rows follow each other.
  slots: int = 0
  # End a row when all before its first EOS is revealed. What it leaves masked has no
  # part in any log-prob or loss.
  eos_stop: bool = False
  # pick threshold, where no confidence reaches it: best (the most confident
  # position) | leftmost (the first masked position).
  fallback: str = 'best'
  schedule: str = 'even'  # tokens a step of scheduled picks: even | nearest | dream
  # Law that picks judge by: model (temperature 1) | sampling (as in Dream).
  rank_law: str = 'model'
  rank_temperature: float = 0.0  # scored picks: draws positions; 0 = takes the best
  top_p: float = 1.0  # nucleus that tokens are drawn from, in (0, 1]; 1 = all
  top_k: int = 0  # most probable tokens that are drawn from; 0 = all
  verify: float = 0.9  # pick wino: masks less probable tokens again, in [0, 1]

  def rules(self) -> dict:
    return super().rules() | {'pick': rules.one_of(*SAMPLERS)}

  def order_from(self) -> str:
    """Returns what decides which positions a step reveals, besides the state.

    state: nothing else. A completion has one trajectory, and the sum of its
      recorded logp is its exact log-prob.
    noise: a separate draw. The recorded logp is exact given the order. Along a
      trajectory the ratio of two policies is one of normalised laws. With order_logp
      the tokens draw the order, and it has a log-prob that is recorded.
    tokens: the proposed tokens. The recorded logp lacks their term (LLaDA's
      rule).
    hindsight: the sampler takes tokens back, and does not record their states.

    With a cache, guidance or eos_stop this describes the law that was sampled,
    which is the recorded one.
    """
    sampler = self._sampler
    if not sampler.records:
      return 'hindsight'
    one_step = sampler.scheduled and self.steps * self.block == self.length
    if self.block == 1 or one_step:  # a step keeps every proposal
      return 'state'
    if sampler.judged and self.rank == 'token' and self.temperature:
      return 'noise' if self.order_logp else 'tokens'
    return 'noise' if sampler.drawn or self.rank_temperature else 'state'

  def problems(self) -> list[str]:
    """Returns one sentence for each setting that is impossible or has no effect."""
    return (
      self._problems_of_steps()
      + super().problems()
      + self._problems_of_pick()
      + self._sampler.problems(self)
    )

  @property
  def _sampler(self) -> Sampler:
    return SAMPLERS.get(self.pick, Sampler())  # `problems` refuses other names

  def _problems_of_steps(self) -> list[str]:
    length, block, steps = self.length, self.block, self.steps
    if length < 1 or block < 1 or length % block:
      return [f'sampler.block = {block} must divide sampler.length = {length}']
    blocks = length // block
    fits = blocks <= steps <= length and steps % blocks == 0
    if fits or steps < 1 or not self._sampler.scheduled:
      return []
    return [
      f'sampler.steps = {steps} must be a multiple of the {blocks} blocks and at '
      f'most sampler.length = {length}'
    ]

  def default(self, name: str) -> Any:
    """One token a step is the default of steps."""
    return self.length if name == 'steps' else super().default(name)

  def idle(self) -> dict[str, str]:
    def row(names: str, has: Callable[[Sampler], Any]) -> tuple[str, Any, str]:
      picks = ' or '.join(name for name, other in SAMPLERS.items() if has(other))
      return names, has(self._sampler), f'sampler.pick = {picks}'

    own = {name for other in SAMPLERS.values() for name in other.reads}
    return rules.without_effect(
      row('cache guidance slots', lambda x: x.plain),
      ('refresh', self.cache in ('prefix', 'dual'), 'sampler.cache = prefix or dual'),
      row('steps schedule', lambda x: x.scheduled),
      row('rank_temperature', lambda x: x.scored),
      row('rank', lambda x: x.judged),
      row('rank_law', lambda x: x.judged or x.scored or 'rank_law' in x.reads),
      ('top_p top_k order_logp', self.temperature, 'sampler.temperature > 0'),
      *(row(name, lambda x, name=name: name in x.reads) for name in own - {'rank_law'}),
    )

  def _problems_of_pick(self) -> list[str]:
    """Refuses those settings without effect of which more was expected."""
    strict = 'cache', 'guidance', 'refresh', 'slots', 'fallback', 'schedule'
    strict += ('rank_temperature',)
    found = [
      f'sampler.{field} = {value!r} needs {need}'
      for field, need in self.idle().items()
      if field in (*strict, 'order_logp')
      and (value := getattr(self, field)) != self.default(field)
    ]
    if self.slots and self.guidance and self.cache == 'block':
      found.append(
        f'sampler.slots = {self.slots}: with the cache block and guidance all rows are '
        'sampled at once; set 0'
      )
    if self.order_logp and not found:
      for field, bad, need in (
        ('rank', self.rank != 'token', 'token, whose proposals decide the order'),
        ('rank_temperature', self.rank_temperature, '0: its draw has another log-prob'),
        ('cache', self.cache in ('prefix', 'dual'), 'none or block, which are exact'),
        ('schedule', self.schedule == 'dream', 'one by which each step keeps a token'),
      ):
        if bad:
          value = getattr(self, field)
          found.append(
            f'sampler.{field} = {value!r}: sampler.order_logp = True needs {need}'
          )
    return found
