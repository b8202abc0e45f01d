"""The settings of drafts: who proposes blocks, and what decides that they stay."""

import dataclasses

from dmpo_jax import rules
from dmpo_jax.model import ModelConfig
from dmpo_jax.sampler.config import SAMPLERS, SampleConfig

GATES = ('confidence', 'reward', 'exact')
OWN_WEIGHTS = ('', 'same', 'base')  # values of draft.of that name no directory
JUDGES = ('task', 'format')


@dataclasses.dataclass(frozen=True)
class Draft(rules.Section):
  """A draft that proposes blocks of a completion; the model writes what is refused."""

  OWN = {
    'gate': rules.one_of(*GATES),
    'ahead': rules.least(1),
    'tokens': rules.least(1),
    'temperature': lambda x: (
      '' if x == -1 else rules.least(0)(x) and "must be >= 0, or -1: the sampler's"
    ),
    'threshold': rules.share,
  }

  # Who drafts: '' = nobody | same (the model itself, with the settings below) | base
  # (the model without its adapters) | a Hugging Face directory or hub name.
  of: str = ''
  rollouts: bool = False  # True: also in rollouts; False: only in evaluation
  # What keeps a draft: confidence (of the model in its tokens) | reward (a score of the
  # text so far) | exact (token by token, so that the model's law is kept).
  gate: str = 'confidence'
  # Least score of a block that stays: of confidence the geometric mean of the tokens'
  # probabilities; of reward what draft.judge returns.
  bound: float = 0.7
  # reward: the score of the text so far; task (its check of partial answers) | format
  # (tags in their order) | FILE.py:NAME, a function as in reward.file.
  judge: str = 'task'
  ahead: int = 4  # exact: steps that the draft takes before the model checks them
  pick: str = 'threshold'  # the draft's pick rule, by the most probable token
  tokens: int = 1  # of a step of the draft; scheduled picks only
  temperature: float = -1.0  # of the draft's tokens; -1 = the sampler's
  threshold: float = 0.5  # picks threshold, dynamic: least confidence, in [0, 1]
  factor: float = 1.0  # pick factor: larger reveals more tokens a step
  entropy_bound: float = 0.1  # pick entropy: nats of a step, less the largest

  def rules(self) -> dict:
    # A rule that draws by scores needs a temperature of its own.
    plain = [
      name
      for name, one in SAMPLERS.items()
      if one.unmask is None and not (one.scored and one.drawn)
    ]
    return super().rules() | {'pick': rules.one_of(*plain)}

  def idle(self) -> dict[str, str]:
    known, gate = SAMPLERS.get(self.pick), self.gate
    reads = known.reads if known else ()
    scheduled = not known or known.scheduled
    fields = [name for name in vars(self) if name != 'of']
    return rules.without_effect(
      ('bound', gate != 'exact', 'draft.gate = confidence or reward'),
      ('judge', gate == 'reward', 'draft.gate = reward'),
      ('ahead', gate == 'exact', 'draft.gate = exact'),
      ('tokens', scheduled, 'a draft.pick that plans its steps, as confidence'),
      *(
        (name, name in reads, f'a draft.pick that reads it, not {self.pick}')
        for name in ('threshold', 'factor', 'entropy_bound')
      ),
      (' '.join(fields), self.of, 'draft.of'),
    )

  def problems(self) -> list[str]:
    found = super().problems()
    if self.gate == 'confidence' and self.bound > 1:
      found.append(f'draft.bound = {self.bound} is a probability: set at most 1')
    if self.judge not in JUDGES and '.py' not in self.judge:
      found.append(
        f'draft.judge = {self.judge!r} must be {", ".join(JUDGES)} or FILE.py:NAME'
      )
    if not found and self.of and self.gate == 'exact' and SAMPLERS[self.pick].drawn:
      found.append(
        f'draft.pick = {self.pick} draws positions: draft.gate = exact needs a rule of '
        'the state alone, such as threshold'
      )
    return found

  def law(self, hp: SampleConfig) -> SampleConfig:
    """Returns the draft's sampler beside the model's."""
    blocks = hp.length // hp.block
    return dataclasses.replace(
      hp,
      steps=blocks * -(-hp.block // self.tokens),
      temperature=hp.temperature if self.temperature < 0 else self.temperature,
      pick=self.pick,
      rank='max',
      threshold=self.threshold,
      factor=self.factor,
      entropy_bound=self.entropy_bound,
      guidance=0.0,
      order_logp=False,
      fallback='best',
      schedule='even',
      rank_temperature=0.0,
    )

  def followed(self, hp: SampleConfig) -> SampleConfig:
    """Returns a sampler's settings with the order that its completions have."""
    if self.gate != 'exact':
      return hp
    own = self.law(hp)
    names = 'pick', 'rank', 'threshold', 'factor', 'entropy_bound', 'steps', 'fallback'
    order = {name: getattr(own, name) for name in names}
    return dataclasses.replace(hp, **order, rank_temperature=0.0)

  def misfits(self, hp: SampleConfig, cfg: ModelConfig | None = None) -> list[str]:
    """Returns why a sampler cannot have these drafts; fields begin with sampler."""
    found = []
    if SAMPLERS[hp.pick].unmask is not None:
      found.append(
        f'sampler.pick = {hp.pick} takes tokens back: with draft.of set another pick'
      )
    if hp.slots:
      found.append(
        f'sampler.slots = {hp.slots}: with draft.of all rows work on the same block, '
        'set 0'
      )
    if hp.cache == 'block':
      found.append(
        'sampler.cache = block keeps every block that the model has computed, and it '
        'computes none that a draft wrote: with draft.of set none'
      )
    if self.gate == 'exact' and hp.cache != 'none':
      found.append(
        f'sampler.cache = {hp.cache} changes the law that draft.gate = exact keeps: '
        'set none'
      )
    if self.gate == 'exact' and hp.order_logp:
      found.append(
        'sampler.order_logp = True: with draft.gate = exact the draft decides the '
        'order; set False'
      )
    if cfg and cfg.attention == 'splash' and self.gate == 'confidence':
      found.append(
        'draft.gate = confidence needs model.attention = xla: splash shows the same '
        'keys to every query'
      )
    return found
