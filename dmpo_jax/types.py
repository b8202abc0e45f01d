"""The data that flows between the parts, and the names of their dimensions.

Dims, as they appear in array names (`logp_RxKxL`):

  B prompts per step    G completions per prompt    R = B*G rows
  P prompt length       L completion length         S = P + L
  W block (window)      K mask draws per row        I inner steps
  M microbatches        V vocabulary                D width
  N layers              H heads                     C head dim
  F mlp width           A adapter rank

Rows are prompt-major: row r = b*G + g. Tokens are rows (R, S); scalars of a
completion are groups (B, G). `to_rows` and `to_groups` are the only crossings.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int, Key

Array = Any  # jax.Array or numpy.ndarray; tasks import this file without jax
Params = dict  # {'params': ..., 'lora': ...}: nested dicts of arrays

# Shapes at the seams: the element type, then the dims. They cost nothing at run
# time; the tests check them (tests/conftest.py installs jaxtyping's import hook).
Scalar = Float[Array, '']
IntScalar = Int[Array, '']
IntR, FloatR, BoolR = Int[Array, 'R'], Float[Array, 'R'], Bool[Array, 'R']
KeyR = Key[Array, 'R']
IntB, FloatB, BoolB = Int[Array, 'B'], Float[Array, 'B'], Bool[Array, 'B']
IntBG, FloatBG, BoolBG = Int[Array, 'B G'], Float[Array, 'B G'], Bool[Array, 'B G']
IntBP, BoolBP = Int[Array, 'B P'], Bool[Array, 'B P']
IntRP, BoolRP = Int[Array, 'R P'], Bool[Array, 'R P']
IntRS, BoolRS = Int[Array, 'R S'], Bool[Array, 'R S']
IntRL, FloatRL, BoolRL = Int[Array, 'R L'], Float[Array, 'R L'], Bool[Array, 'R L']
IntRW, FloatRW, BoolRW = Int[Array, 'R W'], Float[Array, 'R W'], Bool[Array, 'R W']
IntRK, FloatRK, BoolRK = Int[Array, 'R K'], Float[Array, 'R K'], Bool[Array, 'R K']
IntRKL, FloatRKL = Int[Array, 'R K L'], Float[Array, 'R K L']
BoolRKL, BoolRKP = Bool[Array, 'R K L'], Bool[Array, 'R K P']
FloatRSD, FloatRLD = Float[Array, 'R S D'], Float[Array, 'R L D']
FloatRSV, FloatRWV = Float[Array, 'R S V'], Float[Array, 'R W V']
# In the model: T queries, S keys, J key and value heads, X anything.
KeyScalar = Key[Array, '']
IntRT = Int[Array, 'R T']
FloatRTD = Float[Array, 'R T D']
FloatRHTC = Float[Array, 'R H T C']
FloatRJSC = Float[Array, 'R J S C']
FloatNRJSC = Float[Array, 'N R J S C']
FloatNDF = Float[Array, 'N D F']
BoolR1TS = Bool[Array, 'R 1 #T S']
FloatR1TX = Float[Array, 'R 1 T X']
IntX = Int[Array, '*X']
FloatX = Float[Array, '*X']
FloatXV = Float[Array, '*X V']
FloatXD = Float[Array, '*X D']
FloatDF = Float[Array, 'D F']
FloatXF = Float[Array, '*X F']


def to_rows(x_BxG):
  """(B, G, ...) -> (B*G, ...), prompt-major."""
  return x_BxG.reshape((-1,) + x_BxG.shape[2:])


def to_groups(x_R, group):
  """(R, ...) -> (R/G, G, ...); the inverse of `to_rows`."""
  return x_R.reshape((-1, group) + x_R.shape[1:])


class Prompts(NamedTuple):
  tokens: Array  # (B, P) int32, left-padded
  valid: Array  # (B, P) bool, False on padding
  index: Array  # (B,) int32, row of the data set: how rewards find the answer


class Rollouts(NamedTuple):
  tokens: Array  # (R, S) int32, no mask token left
  valid: Array  # (R, S) bool, False on prompt padding
  # (R, L) int32, the row's own step at which each was unmasked; -1: never, an
  # EOS that stands for what was left when the row ended (sampler.eos_stop)
  order: Array
  logp: Array  # (R, L) float32, log-prob under the sampling law when unmasked
  forwards: Array  # () int32, network evaluations spent on the batch
  confidence: Array  # (R, L) float32, its probability at temperature 1 then
  more: dict | None = None  # what else was asked for: sampler.RECORDS


class Scored(NamedTuple):
  """All that an objective may use to weigh completions."""

  reward: Array  # (B, G) float32
  length: Array  # (B, G) int32, tokens up to and including the first EOS
  logp_old: Array  # (B, G) float32, log p_old; zeros where not needed
  logp_ref: Array  # (B, G) float32, log p_ref; zeros where not needed
  guess: Array | None = None  # (B, G, K) rewards of 'guess'; nan: no draw
  live: Array | None = None  # (B,) bool, groups that count; None: all


class Masks(NamedTuple):
  """A draw of the forward process: a function of (key, row), never stored."""

  masked: Array  # (R, K, L) bool, True where the mask token stands
  weight: Array  # (R, K) float32, factor that makes a masked sum an ELBO
  counted: Array | None = None  # (R, K, L) bool, tokens in the loss; None: all
  prompt: Array | None = None  # (R, K, P) bool, masked in the prompt
  open: Array | None = None  # (R, K, L) bool, what the pick rule chose among


class TrainBatch(NamedTuple):
  """What `step.train_step` sees. Leading axis R but for `norm` and `total`."""

  tokens: Array  # (R, S) int32
  valid: Array  # (R, S) bool
  completion: Array  # (R, L) bool, True up to and including the first EOS
  row: Array  # (R,) int32, the address of its masks, unique over the run
  # (R,) float32, SIGNED: target weight minus baseline; or (R, K) of each draw
  weight: Array
  positive: Array  # (R,) float32, the target weight alone; or a row's scale
  elbo_old: Array  # (R, I) float32, ELBO of p_old, for each inner step
  norm: Array  # () float32, groups in the whole batch: divides every loss
  total: Array  # () float32, rows in the whole batch
  extra: dict | None = None  # what else `needs` names: rollout.extras


class TrainState(NamedTuple):
  step: Array  # () int32, optimizer updates so far
  trainable: dict  # {'params': ...} or {'lora': ...}
  opt_state: Any  # optax state of `trainable`


# What an objective may ask for. What is not asked for costs nothing.
NEEDS = {
  'old': 'Scored.logp_old',
  'ref': 'Scored.logp_ref',
  'elbo_old': "batch.elbo_old, under the loss's masks",
  'elbo_ref': "extra['elbo_ref'] (R,), the same of the reference",
  'tokens_old': "extra['tokens_old'] (R, K, L), log-probs under the loss's masks",
  'tokens_ref': "extra['tokens_ref'], the same of the reference",
  'policy': '`reweigh` is called in every update',
  'fresh': "`reweigh` gets ELBOs under other masks than the loss's; elbo_ref "
  'is under the same',
  'prompt': "draw's record: 'prompt' (R, P) bool, which tokens are real",
  'block': "draw's record: 'block' int, the sampler's",
  'record': "draw's record, and extra['record']: order, logp, confidence",
  'entropy': "the record: 'entropy' (R, L), of a token's law when revealed",
  'fallback': "the record: 'fallback' (R, L) bool, no token was sure enough",
  'place': "the record: 'place' (R, L), log-prob of a step's positions",
  'law': 'log-probs are those of the sampling law, not of temperature 1',
  'centred': "extra['centred'] (R, K, L), logits less their mean; and "
  "'centred_old' with tokens_old",
  'score': "extra['score'] (R, K, L), by which plackett_luce ranks",
  'guess': "Scored.guess: the loss's states, completed in one step, graded",
  'left_to_right': 'completions are sampled from left to right',
}


class Objective(NamedTuple):
  """Pure functions that never see the model; `hp` is a frozen dataclass."""

  hp: type  # the dataclass of its settings
  needs: Callable  # hp -> subset of NEEDS
  check: Callable  # hp -> list of complaints
  # (key, row_R, completion_RxL, hp[, record]) -> Masks, for the loss; `record`
  # is a dict, where `needs` has something of it
  draw: Callable
  weigh: Callable  # (Scored, hp) -> (weight_BxG, positive_BxG, metrics)
  reweigh: Callable  # (elbo_R, elbo_old_R, batch, group, hp) -> weight_R
  loss: Callable  # (logp_RxKxL, Masks, batch, elbo_old_R, hp) -> (sum, metrics)


@dataclasses.dataclass(frozen=True)
class TaskOptions:
  """What a task needs to make or read its problems."""

  path: str = ''  # file or directory in the field's format; '' generates
  train_size: int = 2000  # problems per split; 0 = all of a file
  validation_size: int = 128
  test_size: int = 128
  seed: int = 0  # of generation and of the split; not the run's seed
  min_blanks: int = 4  # sudoku: fewest empty cells
  max_blanks: int = 10  # sudoku: most empty cells
  largest: int = 99  # countdown: largest of the generated numbers
  numbers: int = 0  # countdown files: of so many numbers alone; 0 = 2 to 6


class Task(NamedTuple):
  """A source of verifiable problems. Pure host functions, no jax.

  `protocol` is 'paper' (the reference rules, bugs included, so that published
  numbers compare) or 'strict' (correct rules). `style` is how a problem is put:
  'bare' (just the problem and just the answer, for tiny models), 'chat'
  (instructions and <answer> tags, as the papers train), 'eval' (as the d1 and
  DMPO evaluations ask, `answers.PREFILL` in the assistant's mouth), 'boxed'
  (as LLaDA's and ESPO's do), sudoku's 'one_shot' (ESPO) and 'three_shot' (SPG).
  The papers' structure in our words: `data.template` takes others' to the
  letter.
  """

  load: Callable  # (split, TaskOptions) -> list[dict]
  prompt: Callable  # (example, style) -> str, the user's message
  target: Callable  # (example, style) -> str, a correct completion, for SFT
  reward: Callable  # (text, example, protocol) -> dict of terms
  grade: Callable  # (text, example, protocol) -> float in [0, 1]
  extra: Callable  # (text, example) -> dict of further evaluation numbers
  # (text, example, protocol) -> str or None: what a majority vote counts
  answer: Callable = lambda text, example, protocol: text.strip() or None
  # example -> (question, truth), as generations are saved; and back, or
  # ValueError
  record: Callable = lambda example: ('', example)
  recall: Callable = lambda question, truth: truth
  # (example, protocol) -> how much a problem counts in an accuracy
  counts: Callable = lambda example, protocol: 1
  styles: tuple = ('bare', 'chat')  # names that `prompt` knows
  threads: bool = False  # judging waits for other processes: do many at once
