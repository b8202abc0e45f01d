"""log p_ref - log p_old and DMPO's gradient: bias, noise, ESS and forwards.

python -m benchmarks.estimators                    enumerable, random weights
python -m benchmarks.estimators --block=2          the same, in attention blocks
python main.py --config=configs/quickstart.py --workdir=runs/q \
    --config.train.iterations=30
python -m benchmarks.estimators --workdir=runs/q   a policy and its base

Markdown. Without --workdir four tokens of three symbols are enumerated: laws
of both policies under each sampler, the target, and the gradient over all
masks. With it the truth is each policy's own law, led through the completions
(rank = max), and the gradient's that of --masks draws. benchmarks/README.md
says what the columns are.
"""

import argparse
import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax import data, layout, logprob, masking, model, rng, sampler, types
from dmpo_jax.logprob import LogprobConfig
from dmpo_jax.objectives import dmpo, gdpo
from dmpo_jax.sampler import picks, unmask
from dmpo_jax.types import Text

FROZEN = {
  'frozen scheduler, all': 0,
  'frozen scheduler, n = 4': 4,
  'frozen scheduler, n = 2': 2,
  'frozen scheduler, n = 1': 1,
}
ELBOS = {
  'released ELBO, 4 draws': LogprobConfig(),
  'stratified ELBO, 4 draws': LogprobConfig(elbo='stratified'),
}
BLOCK_ELBOS = {
  'ELBO, counts 1..W, 4 draws': LogprobConfig(),
  'ELBO, spread counts, 4 draws': LogprobConfig(elbo='stratified'),
  'ELBO, one random order': LogprobConfig(elbo='order'),
}


class Case(NamedTuple):
  """A policy, its reference, and completions of some prompts."""

  cfg: Any
  old: dict
  ref: dict
  prompts: Any  # (R, P) int32
  valid: Any  # (R, P) bool
  reward: Any  # Rollouts -> (R,)
  alpha: float
  group: int


class Found(NamedTuple):
  """An estimator on a sampler's rollouts."""

  log_rnd: Any  # (M, R) float64, M repeats
  forwards: float  # of a completion: tokens through the network / its text's


# ---- log-probs


def elbo_gap(case, out, masks):
  return logprob.elbo(case.cfg, case.ref, out.tokens, out.valid, masks) - (
    logprob.elbo(case.cfg, case.old, out.tokens, out.valid, masks)
  )


def canvas_of(case, out):
  """Returns where masks may stand; not on tokens of the prompt."""
  block = case.cfg.block_causal
  return types.Canvas(out.order.shape[1], block, out.order >= 0 if block else None)


def text_of(case, out):
  """Returns the Text of whole completions, of which nothing else is known."""
  canvas = canvas_of(case, out)
  whole = jnp.ones(out.order.shape, bool)
  return Text(whole, whole, whole[:, :0], canvas.length, canvas)


def gauss(key, row_R, text):
  """Draws GDPO's masks: a mask ratio at each of three Gauss-Legendre nodes."""
  return gdpo.draw(key, row_R, text, gdpo.Config(draws=3))


def random_path(case, out, hp, key, row_R):
  """Along a random order that the sampler did not take: an ELBO."""
  length = out.order.shape[1]
  order = rng.per_row(key, row_R, lambda k: jax.random.permutation(k, length))
  out = out._replace(order=order.astype(jnp.int32))
  law = dataclasses.replace(hp, block=length)
  ref, old = (
    logprob.trajectory_logp(case.cfg, params, out, law)[0]
    for params in (case.ref, case.old)
  )
  return ref - old


def looked(cfg, params, out, hp, hidden_RxL):
  """(start_R, logits of the block that has the first mask) of a state."""
  prompt = out.tokens.shape[1] - hp.length
  state = layout.apply_masks(out.tokens, hidden_RxL[:, None], cfg.mask_id)
  start_R = jnp.argmax(hidden_RxL, axis=1) // hp.block * hp.block
  logits, _ = model.window_logits(
    cfg, params, state[:, 0], out.valid, prompt + start_R, hp.block, prompt
  )
  return start_R, logits


def own_order(cfg, params, out, hp):
  """(R,) log-prob of the completions when `params` picks the positions, too.

  rank = max: a rule of the state alone, hence exact (DUEL, arXiv 2603.01367).
  """
  prompt = out.tokens.shape[1] - hp.length

  def step(carry):
    hidden, since_R, total_R = carry
    start_R, logits = looked(cfg, params, out, hp, hidden)
    window = lambda x: model.windows(x, start_R, hp.block)
    prob, masked = jax.nn.softmax(logits), window(hidden)
    look = picks.Look(
      prob,
      jnp.max(prob, -1),
      masked,
      *picks.schedule(hp, masked, since_R),
      masked * 0.0,
    )
    take = picks.PICKS[hp.pick].rule(look, hp)
    law = jax.nn.log_softmax(model.sampling_logits(logits, hp.temperature))
    logp = jnp.take_along_axis(law, window(out.tokens[:, prompt:])[..., None], -1)[
      ..., 0
    ]
    hidden = unmask.write(hidden, start_R, take, jnp.zeros_like(take))
    done_R = ~jnp.any(masked & ~take, axis=1)
    return (
      hidden,
      jnp.where(done_R, 0, since_R + 1),
      total_R + jnp.sum(jnp.where(take, logp, 0.0), axis=1),
    )

  rows = len(out.tokens)
  first = (out.order >= 0, jnp.zeros((rows,), jnp.int32), jnp.zeros((rows,)))
  return jax.lax.while_loop(lambda c: jnp.any(c[0]), step, first)[2]


def position_term(cfg, params, out, hp):
  """(R,) what LLaDA's rule adds to the log-prob of a trajectory.

  At every masked place that is not revealed the proposal was less probable
  than all that were: log of the chance of that. rank_law = model.
  """
  prompt = out.tokens.shape[1] - hp.length

  def add(at, total_R):
    start_R, logits = looked(cfg, params, out, hp, out.order >= at)
    window = lambda x: model.windows(x, start_R, hp.block)
    prob = jax.nn.softmax(logits)
    own = jnp.take_along_axis(prob, window(out.tokens[:, prompt:])[..., None], -1)[
      ..., 0
    ]
    order = window(out.order)
    least_R = jnp.min(jnp.where(order == at, own, jnp.inf), axis=1)
    below = prob < least_R[:, None, None]
    law = jnp.exp(jax.nn.log_softmax(model.sampling_logits(logits, hp.temperature)))
    chance = jnp.maximum(jnp.sum(law * below, axis=-1), 1e-30)
    return total_R + jnp.sum(jnp.where(order > at, jnp.log(chance), 0.0), axis=1)

  return jax.lax.fori_loop(0, jnp.max(out.order) + 1, add, jnp.zeros(len(out.tokens)))


def estimators(case, hp):
  """{name: ((out, key, row_R) -> (R,), repeats it, row-forwards)}."""
  length, steps, block = hp.length, hp.steps, case.cfg.block_causal
  found = {}

  def cost(copies):  # in forwards of the text
    text = case.prompts.shape[1] + length
    return round(1 + copies * length / text, 1) if block else copies

  rounds = min(block, max(1, steps * block // length)) if block else steps
  for name, states in FROZEN.items():
    if block and states >= block:
      continue  # as all

    def along(out, key, row_R, states=states):
      u_R = rng.per_row(key, row_R, jax.random.uniform)
      how = logprob.Along(states, u_R)
      ref, old = logprob.trajectory_logp(case.cfg, case.ref, out, hp, how)
      return ref - old

    found[name] = along, bool(states), cost(states or rounds)
  if hp.pick == 'random_order':
    all_of = found['frozen scheduler, all'][0]
    return {'its own trajectory': (all_of, False, cost(block or length))}
  if hp.rank == 'token' and not block:

    def whole(out, key, row_R):
      terms = [
        position_term(case.cfg, params, out, hp) for params in (case.ref, case.old)
      ]
      return along_all(out, key, row_R) + terms[0] - terms[1]

    along_all = found['frozen scheduler, all'][0]
    return {
      'token term alone': (along_all, False, steps),
      'with the position term': (whole, False, steps),
    }
  for name, how in (BLOCK_ELBOS if block else ELBOS).items():

    def elbo(out, key, row_R, how=how):
      return elbo_gap(case, out, logprob.draw(key, row_R, canvas_of(case, out), how))

    found[name] = elbo, True, 2 * cost(block if how.elbo == 'order' else how.draws)
  if block:
    return found
  found['Gauss nodes, 3 draws'] = (
    lambda out, key, row_R: elbo_gap(case, out, gauss(key, row_R, text_of(case, out))),
    True,
    6,
  )
  found['random order'] = (
    lambda out, key, row_R: random_path(case, out, hp, key, row_R),
    True,
    2 * length,
  )
  return found


# ---- the numbers


def spread(log_rnd, name_R, truth_R, group_R):
  """(bias, noise, signal) in nats: rms over completions.

  log_rnd (M, R). `name_R` says which rows are one completion. All is centred
  in groups, for weights ignore what a group shares; of the bias what noise
  would give is taken off.
  """
  values, names = log_rnd.ravel(), np.tile(name_R, len(log_rnd))
  count = np.bincount(names)
  mean = np.bincount(names, values) / np.maximum(count, 1)
  var = np.bincount(names, values**2) / np.maximum(count, 1) - mean**2
  var = np.maximum(var, 0) * count / np.maximum(count - 1, 1)
  centre = lambda x: x - (np.bincount(group_R, x) / np.bincount(group_R))[group_R]
  off = centre(mean[name_R] - truth_R)
  own = np.mean((var / count.clip(1))[name_R])
  return (
    np.sqrt(max(np.mean(off**2) - own, 0)),
    np.sqrt(np.mean(var[name_R])),
    np.std(centre(truth_R)),
  )


def weights_of(reward_R, log_rnd_R, case):
  """(R,) DMPO's weights, baseline 1/G; and the groups' ESS without reward."""
  reward, log_rnd = (
    np.asarray(x, np.float64).reshape(-1, case.group) for x in (reward_R, log_rnd_R)
  )
  soft = lambda x: np.exp(x - x.max(1, keepdims=True))
  weight = soft(log_rnd + reward / case.alpha)
  weight /= weight.sum(1, keepdims=True)
  plain = soft(log_rnd)
  plain /= plain.sum(1, keepdims=True)
  ess = 1 / (case.group * (plain**2).sum(1))
  return weight.ravel(), ess.mean()


def gradient(weight_R, case, slopes_RxN, batches):
  """(batches, N) mean over groups of sum (w - 1/G) d loss."""
  rows = len(weight_R) // batches
  parts = (weight_R - 1 / case.group).reshape(batches, rows)
  slopes = slopes_RxN.reshape(batches, rows, -1)
  return np.einsum('br,brn->bn', parts, slopes) * case.group / rows


def apart(found_BxN, exact_N):
  """(bias, s.d.) of gradients over the length of the exact one."""
  mean, size = found_BxN.mean(0), np.linalg.norm(exact_N)
  var = ((found_BxN - mean) ** 2).sum() / max(len(found_BxN) - 1, 1)
  bias = max(((mean - exact_N) ** 2).sum() - var / len(found_BxN), 0)
  return np.sqrt(bias) / size, np.sqrt(var) / size


def row(sampler_name, name, found, reward_R, truth, case, names, groups, slope):
  """A line of the table; truth None: not known for this sampler."""
  values = [weights_of(reward_R, x, case) for x in found.log_rnd]
  ess = np.mean([ess for _, ess in values])
  cells = [sampler_name, name, f'{found.forwards:g}']
  if truth is None:
    cells += ['', '', f'{ess:.2f}', '', '', '']
  else:
    want, _ = weights_of(reward_R, truth, case)
    tv = (
      np.mean([np.abs(w - want).sum() for w, _ in values])
      * 0.5
      * case.group
      / len(want)
    )
    bias, noise, _ = spread(found.log_rnd, names, truth, groups)
    cells += [f'{bias:.2f}', f'{noise:.2f}', f'{ess:.2f}', f'{tv:.2f}']
    cells += [f'{x:.2f}' for x in slope([w for w, _ in values])]
  print('| ' + ' | '.join(cells) + ' |', flush=True)


HEADER = (
  '| sampler | estimator | forwards | bias | noise | ESS | weights | '
  'gradient bias | gradient s.d. |\n' + '|---' * 9 + '|'
)


def measure(case, samplers, args, truth_of, slopes, exact, batches):
  """The table: every sampler of {name: SampleConfig}, every estimator."""
  rows = len(case.prompts)
  ids = jnp.arange(rows)
  groups = np.repeat(np.arange(rows // case.group), case.group)
  print(HEADER)
  for title, hp in samplers.items():
    keys = rng.row_keys(rng.key_for(0, 'sample'), ids)
    out = jax.jit(
      lambda keys, hp=hp: sampler.sample(
        case.cfg, case.old, case.prompts, case.valid, keys, hp
      )
    )(keys)
    reward_R = case.reward(out)
    truth, names, groups_ = truth_of(hp, out)
    groups_ = groups if groups_ is None else groups_
    slopes_RxN, goal = slopes(out), exact(hp, out, truth)

    def slope(weights, slopes_RxN=slopes_RxN, goal=goal):
      return apart(
        np.concatenate([gradient(w, case, slopes_RxN, batches) for w in weights]), goal
      )

    line = functools.partial(
      row,
      title,
      reward_R=reward_R,
      truth=truth,
      case=case,
      names=names,
      groups=groups_,
      slope=slope,
    )
    if truth is not None:
      _, _, signal = spread(truth[None], names, truth, groups_)
      line(name=f'exact (s.d. {signal:.2f})', found=Found(truth[None], 0))
    for name, (fn, repeated, forwards) in estimators(case, hp).items():
      run = jax.jit(lambda key, fn=fn, out=out: fn(out, key, ids))
      times = args.repeats if repeated else 1
      log_rnd = np.stack(
        [np.asarray(run(rng.key_for(0, 'score', i))) for i in range(times)]
      ).astype(np.float64)
      line(name=name, found=Found(log_rnd, forwards))


# ---- the masks of the loss

LOSSES = {
  'released: Bernoulli on (0.1, 1), K = 4, complements': dict(low=0.1),
  'Bernoulli, K = 2, complements': dict(draws=2),
  'Bernoulli, K = 2': dict(draws=2, antithetic=False),
  'stratified, K = 2': dict(draws=2, antithetic=False, spread=True),
  'Bernoulli, K = 4, complements': dict(),
  'Bernoulli, K = 4': dict(antithetic=False),
  'stratified, K = 4, complements': dict(spread=True),
  'stratified, K = 4': dict(antithetic=False, spread=True),
}
BLOCK_LOSSES = {
  f'counts 1..W of each block, K = {k}{", spread" * spread}': dmpo.Config(
    draws=k, spread=spread, antithetic=False
  )
  for k in (2, 4)
  for spread in (False, True)
}
SUBSETS = (1, 2, 4)  # of the masked tokens in the loss, with Bernoulli K = 4


def some_of(key, row_R, masked_RxKxL, count):
  """At most `count` of each draw's masks, all alike."""

  def one(key, masked):
    score = jnp.where(masked, jax.random.uniform(key, masked.shape), -1.0)
    rank = jnp.argsort(jnp.argsort(-score, axis=-1), axis=-1)
    return masked & (rank < count)

  return jax.vmap(one)(rng.row_keys(key, row_R), masked_RxKxL)


def loss_table(case, out, weight_R, goal, args):
  """Noise of an update's gradient over mask draws, the weights fixed."""
  ids = jnp.arange(len(weight_R))
  signed = jnp.asarray(weight_R - 1 / case.group, jnp.float32)
  text = text_of(case, out)
  groups = len(weight_R) // case.group

  def run(hp, count):
    @jax.jit
    def call(key):
      masks = dmpo.draw(key, ids, text, hp)
      kept = masks.masked
      if count:
        kept = some_of(jax.random.fold_in(key, 1), ids, kept, count)

      def loss(params):
        args = out.tokens, masks.masked, out.valid
        logp = logprob.token_logp(case.cfg, params, *args)
        masked = masks._replace(masked=kept)
        return dmpo.wdce(jnp.where(kept, logp, 0.0), masked, signed) / groups

      return flat(jax.grad(loss)(case.old))

    return np.stack(
      [np.asarray(call(rng.key_for(0, 'mask', i))) for i in range(args.repeats)]
    ).astype(np.float64)

  print('\n| masks of the loss | gradient bias | gradient s.d. |\n|---|---|---|')
  base = dmpo.Config(low=0.0)
  lines = [
    (name, dataclasses.replace(base, **changes), 0) for name, changes in LOSSES.items()
  ]
  if case.cfg.block_causal:
    lines = [(name, hp, 0) for name, hp in BLOCK_LOSSES.items()]
  else:
    lines += [
      (f'Bernoulli, K = 4, complements, {n} of the masked tokens', base, n)
      for n in SUBSETS
    ]
  for name, hp, count in lines:
    bias, sd = apart(run(hp, count), goal)
    print(f'| {name} | {bias:.2f} | {sd:.2f} |', flush=True)


def flat(tree):
  return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def slopes_of(case, tokens, valid, masks):
  """(R, N) gradient of each row's loss: minus the sum of weight times log-prob."""

  def one(row):
    tokens, valid, masked, weight = row

    def loss(params):
      args = tokens[None], masked[None], valid[None]
      return -jnp.sum(weight * logprob.token_logp(case.cfg, params, *args)[0])

    return flat(jax.grad(loss)(case.old))

  run = jax.jit(lambda *rows: jax.lax.map(one, rows))
  return np.asarray(run(tokens, valid, masks.masked, masks.weight))


def every_mask(block):
  """Returns Masks of all subsets of the four tokens, weighed as the loss's mean.

  A block has counts 1..W alike, the whole text 0..L.
  """
  subsets = np.array(list(itertools.product([False, True], repeat=LENGTH)))
  size = block or LENGTH
  ways_of = np.array([math.comb(size, m) for m in range(size + 1)])
  if not block:
    count = subsets.sum(1)
    weight = 1 / ((LENGTH + 1) * ways_of[count] * np.maximum(count, 1))[:, None]
  else:
    count = subsets.reshape(len(subsets), -1, size).sum(-1)
    chance = np.where(count > 0, 1 / (size * ways_of[count]), 0)
    # A block is read where the others are masked as may be: each of their ways alike.
    others = 2 ** (LENGTH - size)
    weight = chance * size / np.maximum(count, 1) / LENGTH / others
    weight = np.repeat(weight, size, axis=1)
  rows = len(OUTPUTS)
  tile = lambda x, dtype: np.broadcast_to(x.astype(dtype), (rows, *x.shape))
  return types.Masks(tile(subsets, bool), tile(weight, np.float32))


# ---- four tokens of three symbols

LENGTH, SYMBOLS = 4, 3
OUTPUTS = np.array(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))
STATES = np.array(list(itertools.product(range(SYMBOLS + 1), repeat=LENGTH)))
PLACES = (SYMBOLS + 1) ** np.arange(LENGTH)[::-1]  # state -> its index


def tiny_case(args):
  """Random weights, and a policy a little away from them."""
  cfg = model.ModelConfig(
    vocab=SYMBOLS + 1,
    mask_id=SYMBOLS,
    eos_id=-1,
    pad_id=-1,
    width=16,
    layers=2,
    heads=2,
    kv_heads=2,
    mlp=24,
    dtype='float32',
    remat='none',
    block_causal=args.block,
  )
  draw = np.random.default_rng(0)
  tree = model.init(cfg, jax.random.key(0))
  noise = lambda scale: jax.tree.map(
    lambda x: jnp.asarray(scale * draw.normal(size=x.shape), x.dtype), tree
  )
  add = functools.partial(jax.tree.map, jnp.add)
  ref = add(tree, noise(0.25))
  prompts = np.full((args.rows, max(1, args.block)), 1, np.int32)

  def reward(out):
    x = np.asarray(out.tokens[:, -LENGTH:])
    return np.mean(x[:, 1:] == x[:, :-1], axis=1) + 0.5 * (x[:, 0] == 2)

  return Case(
    cfg,
    add(ref, noise(args.apart)),
    ref,
    prompts,
    np.ones(prompts.shape, bool),
    reward,
    0.3,
    args.group,
  )


def law_of(case, params, hp):
  """(81,) the law of completions under a sampler, over all its paths."""
  tokens = behind_prompt(case, STATES)
  logits = np.asarray(
    jax.jit(lambda tokens: model.full_logits(case.cfg, params, tokens))(tokens),
    np.float64,
  )[:, -LENGTH:, :SYMBOLS]
  soft = lambda x: (
    np.exp(x - x.max(-1, keepdims=True))
    / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)
  )
  sure, law = soft(logits), soft(logits / hp.temperature)
  reached = np.zeros(len(STATES))
  reached[-1] = 1.0
  for state in np.argsort(-(STATES == SYMBOLS).sum(1), kind='stable'):
    left = [i for i in range(LENGTH) if STATES[state, i] == SYMBOLS]
    if left and reached[state]:
      for places, tokens, chance in ways(left, sure[state], law[state], hp):
        new = STATES[state].copy()
        new[list(places)] = tokens
        reached[new @ PLACES] += reached[state] * chance
  return reached[OUTPUTS @ PLACES]


def behind_prompt(case, completions):
  """Returns (N, S) int32 texts of the completions behind the prompt."""
  prompts = np.broadcast_to(case.prompts[:1], (len(completions), len(case.prompts[0])))
  return np.concatenate([prompts, completions], 1).astype(np.int32)


def ways(left, sure, law, hp):
  """(places, tokens, probability) of all that a step may reveal."""
  left = [i for i in left if i // hp.block == left[0] // hp.block]
  count = hp.length // hp.steps
  if hp.pick == 'random_order':
    choices, count = [((i,), 1 / len(left)) for i in left], 1
  elif hp.rank == 'max':
    best = sorted(left, key=lambda i: -sure[i].max())[:count]
    choices = [(tuple(best), 1.0)]
  else:
    choices = [(places, 1.0) for places in itertools.combinations(left, count)]
  for places, share in choices:
    for tokens in itertools.product(range(SYMBOLS), repeat=len(places)):
      chance = share * np.prod(law[list(places), list(tokens)])
      if hp.rank == 'token' and hp.pick == 'confidence':
        least = min(sure[list(places), list(tokens)])
        chance *= np.prod(
          [law[j][sure[j] < least].sum() for j in left if j not in places]
        )
      yield places, list(tokens), chance


def tiny(args):
  case = tiny_case(args)
  block = args.block or LENGTH
  hp = sampler.SampleConfig(LENGTH, block, LENGTH, args.temperature, rank='max')
  samplers = {
    'max, 1 a step': hp,
    'max, 2 a step': dataclasses.replace(hp, steps=2),
    'random order': dataclasses.replace(hp, pick='random_order'),
    'token, 1 a step': dataclasses.replace(hp, rank='token'),
    'token, 2 a step': dataclasses.replace(hp, rank='token', steps=2),
  }
  if args.block:  # LLaDA's rule in blocks has no estimator here
    samplers = {name: hp for name, hp in samplers.items() if hp.rank == 'max'}
  place = SYMBOLS ** np.arange(LENGTH)[::-1]
  name_of = lambda out: np.asarray(out.tokens[:, -LENGTH:]) @ place
  tokens = behind_prompt(case, OUTPUTS)
  masks = every_mask(args.block)
  slopes = slopes_of(case, tokens, np.ones(tokens.shape, bool), masks)
  all_of = case.reward(sampler.Rollouts(tokens, *[None] * 5))

  def truth_of(hp, out):
    ref, old = (law_of(case, p, hp) for p in (case.ref, case.old))
    for p in (ref, old):
      assert abs(p.sum() - 1) < 1e-6
    name = name_of(out)
    return (np.log(ref) - np.log(old))[name], name, np.zeros_like(name)

  def exact(hp, out, truth):
    goal = law_of(case, case.ref, hp) * np.exp(all_of / case.alpha)
    return (goal / goal.sum() - law_of(case, case.old, hp)) @ slopes

  measure(
    case,
    samplers,
    args,
    truth_of,
    lambda out: slopes[name_of(out)],
    exact,
    args.batches,
  )


# ---- a run and its base


def run_case(args):
  """(Case, the run's config) of a run of the quickstart's kind."""
  from benchmarks.accuracy import trained
  from dmpo_jax import build, grader, metrics, train

  built, old = trained(args.workdir)
  with metrics.Writer(args.workdir, enabled=False) as writer:
    ref = train.run('sft', train.Session(built, args.workdir, writer))[0]
  problems, c = build.problems(built, 'train'), built.config
  at = np.repeat(np.arange(args.rows // args.group), args.group)

  def reward(out):
    tokens = np.asarray(out.tokens[:, -c.sampler.length :])
    tokens = data.after_given(out.order, tokens, built.tokenizer.eos_token_id)
    texts = data.decode(built.tokenizer, tokens, model.stops(built.model))
    return grader.judge(
      built.task,
      c.data.protocol,
      texts,
      [problems.examples[i] for i in at],
      c.reward.weights,
    ).reward

  local = lambda tree: jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree)
  case = Case(
    built.model,
    local(old),
    local(ref),
    problems.tokens[at],
    problems.valid[at],
    reward,
    c.objective.alpha,
    args.group,
  )
  return case, c.sampler.length


def run(args):
  case, length = run_case(args)
  block = case.cfg.block_causal or length
  hp = sampler.SampleConfig(length, block, length, args.temperature, rank='max')
  samplers = {
    'max, 1 a step': hp,
    'max, 2 a step': dataclasses.replace(hp, steps=length // 2),
    'token, 1 a step': dataclasses.replace(hp, rank='token'),
  }
  if case.cfg.block_causal:
    samplers.pop('token, 1 a step')
  ids, kept = jnp.arange(args.rows), {}

  def truth_of(hp, out):
    if hp.rank == 'token':
      return None, None, None
    ref, old = (
      np.asarray(jax.jit(lambda p: own_order(case.cfg, p, out, hp))(p), np.float64)
      for p in (case.ref, case.old)
    )
    # The policy's own order is the recorded one.
    assert np.abs(old - np.asarray(out.logp).sum(1)).max() < 1e-2
    return ref - old, np.asarray(ids), None

  def slopes(out):
    args_ = rng.key_for(1, 'mask'), ids, canvas_of(case, out), args.masks
    masks = masking.draw_even(*args_, (0.0, 1.0))
    masks = masks._replace(weight=masks.weight / length / args.masks)
    return slopes_of(case, out.tokens, out.valid, masks)

  def exact(hp, out, truth):
    if truth is None:
      return None
    weight, _ = weights_of(case.reward(out), truth, case)
    goal = gradient(weight, case, slopes_kept[0], 1)[0]
    kept.setdefault('loss', (out, weight, goal))
    return goal

  slopes_kept = []

  def keeping(out):
    slopes_kept[:] = [slopes(out)]
    return slopes_kept[0]

  measure(case, samplers, args, truth_of, keeping, exact, 1)
  out, weight_R, goal = kept['loss']
  loss_table(case, out, weight_R, goal, args)


def main():
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  parser.add_argument(
    '--block', type=int, default=0, choices=(0, 2), help='without: attention block'
  )
  parser.add_argument('--workdir', default='', help='of a run; its base is ref')
  parser.add_argument('--rows', type=int, default=0, help='completions')
  parser.add_argument('--group', type=int, default=8, help='G')
  parser.add_argument('--temperature', type=float, default=0.8)
  parser.add_argument('--repeats', type=int, default=64, help='of estimates')
  parser.add_argument(
    '--masks',
    type=int,
    default=1024,
    help='with --workdir: draws of the exact gradient',
  )
  parser.add_argument(
    '--apart',
    type=float,
    default=0.06,
    help='without: s.d. that is added to the weights',
  )
  parser.add_argument(
    '--batches',
    type=int,
    default=128,
    help='without: pieces of the rows, an update each',
  )
  args = parser.parse_args()
  args.rows = args.rows or (128 if args.workdir else 16384)
  if args.workdir:
    run(args)
  else:
    args.repeats = 1  # a completion comes again and again
    tiny(args)


if __name__ == '__main__':
  main()
