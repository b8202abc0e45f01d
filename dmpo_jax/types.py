"""The data that flows between the parts, and the names of their dimensions.

Dims, as they appear in array names (`logp_RxKxL`):

  B prompts per buffer  G completions per prompt    R = B*G rows
  P prompt length       L completion length         S = P + L
  W block (window)      K masked copies per row     I inner updates
  M microbatches        V vocabulary                D width
  N layers              H heads                     C head dim
  F mlp width           A adapter rank              E experts

Rows are prompt-major: row r = b*G + g. Tokens are rows (R, S); scalars of a
completion are groups (B, G). `to_rows` and `to_groups` are the only crossings.
"""

import ast
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int, Key

Array = Any  # jax.Array or numpy.ndarray; tasks import this file without jax
Params = dict  # {'params': ..., 'lora': ...}: nested dicts of arrays

# Array types of the public functions: the element type, then the dims. They cost
# nothing at run time; the tests check them by jaxtyping's import hook.
Scalar = Float[Array, '']
IntScalar = Int[Array, '']
IntR = Int[Array, 'R']
FloatR = Float[Array, 'R']
BoolR = Bool[Array, 'R']
KeyR = Key[Array, 'R']
IntB = Int[Array, 'B']
FloatB = Float[Array, 'B']
BoolB = Bool[Array, 'B']
IntBG = Int[Array, 'B G']
FloatBG = Float[Array, 'B G']
IntBP = Int[Array, 'B P']
BoolBP = Bool[Array, 'B P']
IntRP = Int[Array, 'R P']
BoolRP = Bool[Array, 'R P']
IntRS = Int[Array, 'R S']
BoolRS = Bool[Array, 'R S']
IntRL = Int[Array, 'R L']
FloatRL = Float[Array, 'R L']
BoolRL = Bool[Array, 'R L']
IntRW = Int[Array, 'R W']
FloatRW = Float[Array, 'R W']
BoolRW = Bool[Array, 'R W']
IntRKL = Int[Array, 'R K L']
FloatRK = Float[Array, 'R K']
FloatRD = Float[Array, 'R D']
FloatRKL = Float[Array, 'R K L']
BoolRKL = Bool[Array, 'R K L']
BoolRKP = Bool[Array, 'R K P']
FloatRSD = Float[Array, 'R S D']
FloatRSV = Float[Array, 'R S V']
FloatRWV = Float[Array, 'R W V']
FloatBGK = Float[Array, 'B G K']
# Optional axes: a weight for each copy; of each inner update or of one.
WeightRKL = Float[Array, 'R K #L']
WeightR = Float[Array, 'R *K']
InnerR = Float[Array, 'R *I']
InnerRKL = Float[Array, 'R *I K L']
# In the model: T queries, S keys, J key and value heads, X anything.
KeyScalar = Key[Array, '']
KeyRT = Key[Array, 'R T']
IntRT = Int[Array, 'R T']
BoolRT = Bool[Array, 'R T']
FloatRTD = Float[Array, 'R T D']
FloatRHTC = Float[Array, 'R H T C']
FloatRJSC = Float[Array, 'R J S C']
FloatNRJSC = Float[Array, 'N R J S C']
FloatNRE = Float[Array, 'N R E']
IntRTX = Int[Array, 'R T X']
IntNRTX = Int[Array, 'N R T X']
BoolR1TS = Bool[Array, 'R 1 #T S']
FloatR1TX = Float[Array, 'R 1 T X']
IntX = Int[Array, '*X']
BoolX = Bool[Array, '*X']
FloatX = Float[Array, '*X']
FloatXV = Float[Array, '*X V']
FloatXD = Float[Array, '*X D']
FloatDF = Float[Array, 'D F']
FloatXF = Float[Array, '*X F']


def to_rows(x_BxG: Array) -> Array:
  """Returns (B * G, ...) of (B, G, ...), prompt-major."""
  return x_BxG.reshape((-1,) + x_BxG.shape[2:])


def forwards_of(order_RxL: IntRL) -> IntR:
  """Returns the forwards that each row has used: its own steps."""
  return order_RxL.max(axis=1) + 1


def to_groups(x_R: Array, group: int) -> Array:
  """Returns (R / G, G, ...) of (R, ...); inverts `to_rows`."""
  return x_R.reshape((-1, group) + x_R.shape[1:])


# Default of a field that is there only if it was asked for. Text, Views and Scored
# raise when it is read.
NOT_ASKED: Any = None


def _asked_for(self: tuple, name: str) -> Any:
  """Reads a field; AttributeError where it was not asked for (None)."""
  value = tuple.__getattribute__(self, name)
  if value is None and not name.startswith('_'):
    raise AttributeError(
      f'{type(self).__name__}.{name} was not computed: the objective must name it '
      'in its Wants'
    )
  return value


GIVEN = -2  # in Rollouts.order
STOP_TOKENS = ('<|eot_id|>', '<|im_end|>', '<|role_end|>')  # end a turn of a chat


class Prompts(NamedTuple):
  """The prompts of one rollout buffer."""

  tokens: IntBP  # left-padded
  valid: BoolBP  # False on padding
  index: IntB  # row of the data set, by which rewards find the answer


class Control(NamedTuple):
  """The rows' own numbers of the pick rule, as control.Controller has drawn them."""

  bound: FloatR  # what the rule sees
  u: FloatR  # the action that it is made of
  logp: FloatR  # log-density of u under the law that drew it
  features: FloatRD | None  # what the mean of u depends on; None: nothing
  weight: FloatR | None = None  # in a TrainBatch: factor of log pi(u)
  # In a TrainBatch, with target weights: their mean over the group, the factor of the
  # control variate.
  level: FloatR | None = None


class Drafts(NamedTuple):
  """What drafts have cost, and how many stay; a number for each row.

  They are blocks. With draft.gate = exact offered and kept are tokens.
  """

  offered: IntR  # that a draft wrote
  kept: IntR  # of them
  draft: IntR  # the draft's forwards of the row alone
  target: IntR  # the model's, with those of the gate
  batch: IntR  # the draft's forwards of the whole batch, the same in all rows


class Routes(NamedTuple):
  """The experts that a rollout's passes chose, int16; -1 where no pass did.

  N counts the layers with experts, X the experts of a token. The pass of a step is of
  all S columns of a model that sees the whole text. That of a block-causal one is of a
  block: the passes of the j-th rounds of all blocks stand side by side on the canvas.
  """

  order: IntRL  # Rollouts.order: which state a pass was of
  steps: Array  # (R, J, S or L, N, X): at each step, or at each round
  # (R, S, N, X), block-causal: at the pass whose keys and values the others saw.
  text: Array | None = None


class Rollouts(NamedTuple):
  """Completions and how the sampler unmasked them."""

  tokens: IntRS  # prompt and completion; no mask token is left
  valid: BoolRS  # False on prompt padding
  # The row's own unmasking step of each token; -1: the token was never unmasked,
  # it is an EOS after the row ended (sampler.eos_stop). GIVEN: it is a token of the
  # prompt that shares an attention block with the completion.
  order: IntRL
  logp: FloatRL  # log-prob under the sampling law at that step
  forwards: IntScalar | None  # network evaluations spent on the batch
  confidence: FloatRL  # probability at temperature 1 at that step
  # (R, L) each, by name in sampler.RECORDS; drafted: a draft wrote the token, which has
  # no log-prob here.
  more: dict[str, Array] | None = None
  control: Control | None = None  # None: all rows have the sampler's own number
  drafts: Drafts | None = None  # None: sampled without drafts
  routes: Routes | None = None  # None: not recorded


class Given(NamedTuple):
  """Texts whose log-probs are asked for, on a canvas of L tokens."""

  tokens: IntRS  # prompts, the canvas with the completions, padding on the right
  valid: BoolRS  # False on padding
  own: BoolRL  # True on the completions' tokens


class Sampled(NamedTuple):
  """A rollout buffer before it is graded."""

  rollouts: Rollouts
  completion: BoolRL  # True up to and including the first EOS
  row: IntR  # address of the row's random numbers, unique over the run
  entropy: FloatRL | None = None  # of each token's law when it was revealed, nats


class Record(NamedTuple):
  """What an objective may read of the sampler's steps."""

  order: IntRL
  logp: FloatRL
  confidence: FloatRL
  more: dict[str, Array]  # (R, L) each, by name in sampler.RECORDS


class Canvas(NamedTuple):
  """Where masks may be drawn in the L tokens of a completion.

  A model that sees the whole text has one block and every position is free. In the
  blocks of a block-causal one only `free` positions are: neither the prompt's end nor
  what was not sampled.
  """

  length: int  # L
  block: int = 0  # tokens of an attention block; 0 = the model sees the whole text
  free: BoolRL | None = None  # None: all


class Text(NamedTuple):
  """What `Objective.draw` may read of the rows it masks."""

  completion: BoolRL  # True up to and including the first EOS
  words: BoolRL  # True where the token is not EOS
  prompt: BoolRP  # True on real prompt tokens
  block: int  # the sampler's block length
  canvas: Canvas  # where masks may stand
  record: Record = NOT_ASKED  # only if Wants.records is set

  __getattribute__ = _asked_for


class Future(NamedTuple):
  """Which later tokens a token sees while attention is annealed: a random share."""

  keys: KeyR  # of the rows
  share: Scalar  # chance to see a later token; 0 = causal attention, 1 = all


class Masks(NamedTuple):
  """K masked copies of each completion: a function of (key, row), never stored."""

  masked: BoolRKL  # True where the mask token stands
  weight: WeightRKL  # factor of a copy; for an ELBO's draws it makes the sum an ELBO
  counted: BoolRKL = NOT_ASKED  # tokens in the loss, for losses over tokens
  prompt: BoolRKP | None = None  # prompt tokens that are masked; None: none
  # False where the sampler left a mask (sampler.eos_stop): it stands in every copy,
  # and no log-prob is read there. `masked` and `weight` are as if it did not, so that
  # an ELBO is that of the sampled tokens. None: all are sampled.
  sampled: BoolRL | None = None
  open: BoolRKL = NOT_ASKED  # positions eligible for unmasking at that step
  future: Future | None = None  # which later tokens are seen; None: all
  # False on tokens that a draft wrote: no log-prob is read there. None: it wrote none.
  made: BoolRL | None = None
  # What the copies at recorded states replay; None: tokens choose their experts.
  routes: Routes | None = None


class Lesson(NamedTuple):
  """Texts of which some tokens are learned, for supervised training.

  The last L of the S columns may be learned. Each column that is learned belongs to one
  of K masked copies. A model that sees the whole text has K = 1.
  """

  tokens: IntRS
  valid: BoolRS  # False on padding
  learn: BoolRKL
  row: IntR  # addresses the masks


class ViewLogp(NamedTuple):
  """What a policy says of the masked copies of one draw."""

  logp: FloatRKL  # log-prob of the true token; 0 where not masked or not sampled
  reads: dict[str, Array] = {}  # (R, K, L) each, by name in logprob.READS
  routed: Any = None  # model.Routed of the pass, with model.keep_routes


class Views(NamedTuple):
  """What a policy says under the loss's own masks, for each inner update.

  `step.at_inner` takes the axis I away. Reading a field that was not asked for
  raises AttributeError.
  """

  elbo: InnerR = NOT_ASKED
  logp: InnerRKL = NOT_ASKED
  reads: dict[str, Array] = NOT_ASKED

  __getattribute__ = _asked_for

  def has(self, name: str) -> bool:
    """Returns whether a field was computed."""
    return self._asdict()[name] is not None


class Scores(NamedTuple):
  """Log-probs of a rollout buffer before its updates; None: not asked for."""

  logp_old: FloatR | None = None  # log p_old of the completion, nats
  logp_ref: FloatR | None = None  # log p_ref of the completion, nats
  old: Views = Views()
  ref: Views = Views()
  guess: IntRKL | None = None  # the loss's copies, completed in one step
  guess_reward: FloatRK | None = None  # their rewards, from the host; nan: no copy
  routes: dict[str, FloatR] | None = None  # agreement.agreement, by name


class Scored(NamedTuple):
  """All that an objective may use to weigh completions.

  Reading a field that was not asked for raises AttributeError; `live` is read by
  `live_of`.
  """

  reward: FloatBG
  length: IntBG  # tokens up to and including the first EOS
  logp_old: FloatBG = NOT_ASKED  # nats
  logp_ref: FloatBG = NOT_ASKED  # nats
  guess: FloatBGK = NOT_ASKED  # rewards of guesses; nan: no copy
  live: BoolB = NOT_ASKED  # groups that count (skip_equal)
  # Only if Wants.records is set: the rows' record, the tokens of an attention block
  # (0 = the model sees the whole text), and the rows' tokens.
  record: Record = NOT_ASKED
  block: int = NOT_ASKED
  tokens: IntRL = NOT_ASKED  # the rows' completions
  cost: FloatBG | None = NOT_ASKED  # nats that each one's forwards cost; see `cost_of`

  __getattribute__ = _asked_for

  def live_of(self) -> 'BoolB | None':
    """Returns the groups that count; None where all do."""
    return self._asdict()['live']

  def cost_of(self) -> 'FloatBG | float':
    """Returns what the exponent of target weights loses by forwards, nats."""
    cost = self._asdict()['cost']
    return 0.0 if cost is None else cost


class TrainBatch(NamedTuple):
  """What an update sees. Every leaf has a leading axis R but `norm` and `total`."""

  tokens: IntRS
  valid: BoolRS
  completion: BoolRL  # True up to and including the first EOS
  row: IntR  # address of the row's masks, unique over the run
  weight: WeightR  # SIGNED: target weight minus baseline; or per copy
  own: dict[str, Array]  # (R, ..) each: what else the objective's `weigh` returned
  norm: Scalar  # groups in the whole batch: divides every loss
  total: Scalar  # rows in the whole batch
  sampled: BoolRL | None = None  # see Masks.sampled
  record: Record = NOT_ASKED  # only if Wants.records is set
  made: BoolRL | None = None  # see Masks.made
  old: Views = Views()
  ref: Views = Views()
  control: Control | None = None  # see Rollouts.control
  routes: Routes | None = None  # what updates replay; None: nothing


class TrainState(NamedTuple):
  step: IntScalar  # optimizer updates so far
  trainable: (
    Params  # {'params': ...} or {'lora': ...}, and {'control': ...} if it is on
  )
  opt_state: Any  # optax state of `trainable`


POLICIES = ('old', 'ref')


@dataclasses.dataclass(frozen=True)
class Wants:
  """What an objective asks for. Quantities that are not named are not computed.

  ValueError at once if a policy is unknown. When `objectives` is imported it checks the
  names of reads and records that a default Config wants.
  """

  sequence: tuple[str, ...] = ()  # of POLICIES: Scored.logp_*, by config.logprob
  elbo: tuple[str, ...] = ()  # of POLICIES: batch.old.elbo, batch.ref.elbo
  # Whether batch.old.elbo is under the loss's own masks of each inner update;
  # False: one estimate by config.logprob serves all.
  common_masks: bool = True
  views: tuple[str, ...] = ()  # of POLICIES: batch.old.logp and .reads
  reads: tuple[str, ...] = ()  # names in logprob.READS, of each view and in the loss
  # Names in sampler.RECORDS; () gives order, logp and confidence alone; None: no
  # record of the sampler's steps.
  records: tuple[str, ...] | None = None
  recorded: bool = True  # the loss compares with the record's log-probs, if wanted
  law: bool = False  # log-probs are the sampling law's, not those at temperature 1
  reweigh: bool = False  # `reweigh` is called before every update
  fresh: bool = False  # `reweigh` gets ELBOs under other masks than the loss's
  guess: bool = False  # Scored.guess

  def __post_init__(self) -> None:
    for field in ('sequence', 'elbo', 'views'):
      if unknown := set(getattr(self, field)) - set(POLICIES):
        raise ValueError(f'Wants.{field} = {sorted(unknown)} must be of {POLICIES}')


class Objective(NamedTuple):
  """Pure functions that never see the model; `hp` is a `Config`."""

  Config: type  # frozen dataclass of its settings, with `problems() -> list[str]`
  wants: Callable[[Any], Wants]  # hp -> Wants
  draw: Callable[..., Masks]  # (key, row_R, Text, hp) -> the loss's Masks
  # (Scored, hp) -> (weight (B, G) or (B, G, K), own {name: (B, G, ..)}, metrics)
  weigh: Callable[..., tuple]
  # (ViewLogp, Masks, TrainBatch, hp) -> (sum over rows / norm, metrics)
  loss: Callable[..., tuple]
  # (elbo_R, TrainBatch, group, hp) -> weight_R; needed where Wants.reweigh
  reweigh: Callable[..., Array] | None = None
  sampler: dict[str, Any] = {}  # fields of SampleConfig that its paper sets
  # Why its draws mean nothing in the blocks of a block-causal model; '' = they do.
  whole_text: str = ''
  # hp -> how much of the turned reward's weights is subtracted from target weights,
  # which sum to one over a group; None: rewards less their mean. See curriculum.py.
  strength: Callable[[Any], float | None] = lambda hp: None
  # SampleConfig -> complaints about a sampler that it cannot use
  sampler_problems: Callable[[Any], list[str]] = lambda hp: []


@dataclasses.dataclass(frozen=True)
class TaskOptions:
  """What a task needs to make or read its problems."""

  path: str = ''  # file or directory in the field's format; '' generates
  train_size: int = 2000  # problems per split; 0 = all of a file
  validation_size: int = 128  # problems; 0 = all of a file
  test_size: int = 256  # problems; 0 = all of a file
  seed: int = 0  # of generation and of the split; not the run's seed
  min_blanks: int = 4  # sudoku: fewest empty cells
  max_blanks: int = 10  # sudoku: most empty cells
  largest: int = 99  # countdown: largest of the generated numbers
  held: str = 'problem'  # countdown: what the splits share none of; problem | numbers
  numbers: int = 0  # countdown files: of so many numbers alone; 0 = 2 to 6
  prompt_column: str = ''  # prompts: column of the prompt; '' = by its usual names
  answer_column: str = ''  # prompts: column of the answer; '' = by its usual names
  options: str = ''  # gym, own tasks: their options, such as 'min_terms=2, max_terms=3'

  def own(self) -> dict[str, Any]:
    """Returns data.options as {name: value}; ValueError if it cannot be read."""
    try:
      call: Any = ast.parse(f'f({self.options})', mode='eval').body
      if (
        not isinstance(call, ast.Call)
        or call.args
        or None in (word.arg for word in call.keywords)
      ):
        raise SyntaxError
      return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError):
      raise ValueError(
        f'data.options = {self.options!r} must be name=value, name=value; a value is a '
        "number, 'a text', a list, True or False"
      ) from None


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
  # (text, example) -> dict of further evaluation numbers
  extra: Callable = lambda text, example: {}
  # (text, example, protocol) -> str or None: what a majority vote counts
  answer: Callable = lambda text, example, protocol: text.strip() or None
  # example -> (question, truth), as generations are saved; and back, or
  # ValueError
  record: Callable = lambda example: ('', example)
  recall: Callable = lambda question, truth: truth
  # (example, protocol) -> how much a problem counts in an accuracy
  counts: Callable = lambda example, protocol: 1
  styles: tuple = ('bare', 'chat')  # names that `prompt` knows
  # styles whose right answers 'paper' does not pay in full, or does not grade as right
  unpaid: tuple = ()
  # what a right answer is paid, if others are paid next to nothing; 0: if they are
  best: float = 0.0
  # The fields of TaskOptions that `load` reads beside path and sizes, of problems that
  # are 'generated' and that are read from a 'file'; {} = not stated.
  options: dict = {}
  terms: tuple = ()  # names of the reward terms that users may scale
  forms: tuple = ()  # those of them that pay the format alone
  # True: reasoning ends with the result that `answer` reads of it. verify.py compares.
  reasons: bool = False
  # Raises ValueError where this machine cannot judge; None: every one can.
  ready: Callable | None = None
  threads: bool = False  # judging waits for other processes: do many at once
  graded: bool = True  # False: it has no verifier, so reward.file gives the grade
  # texts of all completions of a batch -> terms of each; grader.attach and .bound set
  # it, from reward.file
  batch: Callable | None = None
  # (text so far, example) -> score in [0, 1] of an answer that is not finished: 1 where
  # nothing is wrong yet; None: the task has no such check (draft.judge)
  partial: Callable | None = None
  # (example, text) -> the problem and the answer in `text`, drawn with characters, for
  # --mode=sample; '' = they are read as they stand
  show: Callable = lambda example, text: ''
