"""A learned sampler: the number of the pick rule is drawn for each row.

The second half of DiFFPO (arXiv 2510.02212), whose code is not public: the form of
this law is ours. The action is a real u ~ N(mu(q), sigma^2); the rule sees

  threshold  sigmoid(u)        entropy_bound, factor  exp(u)

u is drawn before anything else of a row. So the score of its law is exact for any
sampler: caches, ranks by tokens, an early end. Ratios are of u, because the squash has
no parameters. What it learns from (n = forwards of the row, N = sampler.length):

* gradient  policy gradient with R = r (1 - cost n / N), less the mean of the other rows
            of the group. A wrong answer earns nothing by being fast.
* matching  cross-entropy with the target weights whose exponent has - cost n / N.
            Repeated, the law moves to the one u that is best for p_ref.
* joint     the same, with log pi_0(u) - log pi_old(u) in the exponent, for u and the
            tokens: one fixed target on both. pi_0 is the law at the start.

mu = offset + slope . h / D, of the mean h of the prompt's last hidden states before
anything is revealed, standardised over its D numbers. h is data: it is recorded, and
has no gradient. By D, not by its root: Adam moves every number of the slope by the same
size, so mu moves at most as fast by the slope as by the offset.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dmpo_jax import mesh, model, optim, rules, sampler
from dmpo_jax.sampler import SampleConfig
from dmpo_jax.types import (
  Array,
  BoolRP,
  Control,
  FloatR,
  FloatRD,
  IntRL,
  IntRP,
  KeyR,
  Params,
  forwards_of,
)

LEARN = ('gradient', 'matching', 'joint')


@dataclasses.dataclass(frozen=True)
class Config(rules.Section):
  """The controller of the sampler: a learned number of the pick rule."""

  NAME = 'control'
  OWN = {
    'learn': rules.one_of(*LEARN),
    'features': rules.one_of('prompt', 'none'),
    'sigma': rules.above(0),
    'pull': rules.above(0),
    'clip': rules.chance,
  }

  # Draw sampler.threshold, entropy_bound or factor (which the pick reads) for each row.
  on: bool = False
  # gradient (policy gradient) | matching (DMPO's weights, for u alone) | joint (for u
  # and the tokens).
  learn: str = 'gradient'
  features: str = 'prompt'  # what the mean of u depends on: prompt | none
  sigma: float = 0.5  # standard deviation of u
  learn_sigma: bool = False  # gradient: learn sigma, too
  pull: float = 0.01  # learn_sigma: factor of the KL from the law at the start
  cost: float = 0.2  # of as many forwards as tokens; nats of the chance to be right
  tokens: bool = False  # True: the tokens' weights have the cost, too
  lr: float = 0.05  # learning rate of its own Adam
  clip: float = 0.2  # gradient: ratios are clipped at 1 - clip and 1 + clip

  def idle(self) -> dict[str, str]:
    others = ' '.join(name for name in vars(self) if name != 'on')
    gradient = self.learn == 'gradient'
    return rules.without_effect(
      ('pull', self.learn_sigma, 'control.learn_sigma = True'),
      ('learn_sigma clip', gradient, 'control.learn = gradient'),
      (others, self.on, 'control.on = True'),
    )

  def problems(self) -> list[str]:
    found = super().problems()
    if self.learn_sigma and self.learn != 'gradient':
      found.append(
        f'control.learn_sigma = True: control.learn = {self.learn} needs a fixed one, '
        'so set False, or control.learn = gradient'
      )
    if self.on and self.learn == 'joint' and not self.tokens:
      found.append(
        'control.learn = joint has one target for numbers and tokens: set '
        'control.tokens = True, or control.learn = matching'
      )
    return found


def start_of(law: SampleConfig) -> float:
  """Returns the u of the sampler's own number; ValueError if it has none."""
  field = sampler.SAMPLERS[law.pick].bound
  x = getattr(law, field) if field else math.nan
  if field == 'threshold' and 0 < x < 1:
    return math.log(x / (1 - x))
  if field and field != 'threshold' and x > 0:
    return math.log(x)
  limits = 'in (0, 1)' if field == 'threshold' else '> 0'
  raise ValueError(
    f'sampler.{field} = {x} is where control.on = True begins, so it must be {limits}'
    if field
    else sampler.unbound(law)[0]
  )


@dataclasses.dataclass(frozen=True)
class Controller:
  """The law of u; its parameters are a dict."""

  hp: Config
  law: SampleConfig  # the sampler of training

  @property
  def start(self) -> tuple[float, float]:
    """Mean and standard deviation of u before training."""
    return start_of(self.law), self.hp.sigma

  def init(self, width: int) -> Params:
    """Returns the parameters at the start; width: D."""
    params = {'offset': jnp.float32(self.start[0])}
    if self.hp.features == 'prompt':
      params['slope'] = jnp.zeros(width, jnp.float32)
    if self.hp.learn_sigma:
      params['log_sigma'] = jnp.float32(math.log(self.hp.sigma))
    return params

  def mean(self, params: Params, features_RxD: FloatRD | None, rows: int) -> FloatR:
    """Returns mu of each row; features: as `features` returns them, or None."""
    mean = jnp.broadcast_to(params['offset'], (rows,))
    if self.hp.features == 'none':
      return mean
    assert features_RxD is not None
    return mean + features_RxD @ params['slope'] / features_RxD.shape[1]

  def sigma(self, params: Params) -> Array:
    """Returns the standard deviation of u."""
    if self.hp.learn_sigma:
      return jnp.exp(params['log_sigma'])
    return jnp.float32(self.hp.sigma)

  def logp(self, u_R: FloatR, mean_R: Any, sigma: Any) -> FloatR:
    """Returns the log-density of u."""
    return -(((u_R - mean_R) / sigma) ** 2) / 2 - jnp.log(
      sigma * math.sqrt(2 * math.pi)
    )

  def kl(self, mean_R: FloatR, sigma: Any) -> FloatR:
    """Returns KL(N(mean, sigma^2) || law at the start)."""
    mean0, sigma0 = self.start
    far = (sigma**2 + (mean_R - mean0) ** 2) / (2 * sigma0**2)
    return jnp.log(sigma0 / sigma) + far - 0.5

  def bound(self, u_R: FloatR) -> FloatR:
    """Returns the number that the pick rule sees."""
    field = sampler.SAMPLERS[self.law.pick].bound
    return jax.nn.sigmoid(u_R) if field == 'threshold' else jnp.exp(u_R)

  def draw(
    self, params: Params, features_RxD: FloatRD | None, keys_R: KeyR | None, rows: int
  ) -> Control:
    """Draws u of each row; without keys u is its mean, as in evaluation."""
    mean, sigma = self.mean(params, features_RxD, rows), self.sigma(params)
    u = mean
    if keys_R is not None:
      u = mean + sigma * jax.vmap(jax.random.normal)(keys_R)
    return Control(self.bound(u), u, self.logp(u, mean, sigma), features_RxD)

  def rows(
    self,
    cfg: model.ModelConfig,
    params: Params,
    prompts: tuple[IntRP, BoolRP],
    hp: SampleConfig,
    keys_R: KeyR | None,
  ) -> Control:
    """Draws for prompts, which are tokens and validity; params: of the whole policy.

    hp: the sampler that runs. keys_R: as `draw` takes them.
    """
    seen = None
    if self.hp.features == 'prompt':
      seen = features(cfg, params, *prompts, hp)
    return self.draw(params[optim.CONTROL], seen, keys_R, len(prompts[0]))

  def first_logp(self, u_R: FloatR) -> FloatR:
    """Returns the log-density of u under the law at the start."""
    return self.logp(u_R, *self.start)

  def nats(self, order_RxL: IntRL) -> FloatR:
    """Returns cost n / N of each row; order: Rollouts.order."""
    return self.hp.cost * forwards_of(order_RxL) / self.law.length

  def moves(self, section: Any, own: Any) -> bool:
    """Returns whether it moves the number of another sampler section.

    It does where that has the same pick, and the number that its config file says:
    own. A number that somebody asks for is taken as it is.
    """
    field = sampler.SAMPLERS[self.law.pick].bound
    return section.pick == self.law.pick and section[field] == own[field]


def features(
  cfg: model.ModelConfig,
  params: Params,
  prompts_RxP: IntRP,
  valid_RxP: BoolRP,
  law: SampleConfig,
) -> FloatRD:
  """Returns the prompts' mean last hidden states before the first step, standardised.

  The completion is masked; of a block-causal model the prompt sees its own attention
  blocks alone. Rows go through the network in pieces where sampler.slots says so.
  """
  size = cfg.block_causal or law.length
  canvas = sampler.lay_out(cfg, prompts_RxP, valid_RxP, size)
  prompt = jnp.ones((len(canvas.given), canvas.tokens.shape[1] - size), bool)
  own_RxS = canvas.valid & jnp.concatenate([prompt, canvas.given], axis=1)

  def of_rows(part: tuple) -> Array:
    tokens, valid, own = part
    h, _ = model.hidden(cfg, params, tokens, valid)
    own = own[..., None].astype(jnp.float32)
    return jnp.sum(h * own, axis=1) / jnp.maximum(jnp.sum(own, axis=1), 1)

  rows = len(own_RxS) // mesh.row_shards()
  few = max(1, sampler.at_once(law, len(own_RxS)) // mesh.row_shards())
  count = next(n for n in range(-(-rows // few), rows + 1) if rows % n == 0)
  parts = canvas.tokens, canvas.valid, own_RxS
  h = mesh.in_microbatches(of_rows, parts, count)
  h -= jnp.mean(h, axis=1, keepdims=True)
  return h / jnp.sqrt(jnp.mean(h**2, axis=1, keepdims=True) + 1e-6)
