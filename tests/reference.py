"""Computes everything the plain way: NumPy in float64, one sequence, loops.

Written from the formulas of the models and samplers, not from the package, so
that a mistake there is not repeated here. Padding does not exist: a caller
strips it.
"""

import itertools
import json
import math
import pathlib

import numpy as np
from safetensors.numpy import load_file


def log_softmax(x):
  x = x - np.max(x, axis=-1, keepdims=True)
  return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


# The transformer.


def rms_norm(x, scale, eps):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def rope(x_TxC, positions_T, theta, share=1.0):
  """Turns the pair (x[i], x[i + C/2]) by position * theta^(-2i/C), for C the first
  `share` of the dimensions."""
  half = int(x_TxC.shape[1] * share) // 2
  angles = np.outer(positions_T, theta ** (-np.arange(half) / half))
  a, b, rest = np.split(x_TxC, (half, 2 * half), axis=1)
  return np.concatenate([
    a * np.cos(angles) - b * np.sin(angles),
    b * np.cos(angles) + a * np.sin(angles),
    rest,
  ], axis=1)  # fmt: skip


def attend(cfg, q, k, v, seen=True):
  """Attends to the keys of `seen`; heads share keys in groups (GQA)."""
  dim = q.shape[1] // cfg.heads
  share = cfg.heads // cfg.kv_heads
  outs = []
  for head in range(cfg.heads):
    of = slice(head * dim, (head + 1) * dim)
    kv = slice(head // share * dim, (head // share + 1) * dim)
    scores = q[:, of] @ k[:, kv].T / math.sqrt(dim)
    scores = np.where(seen, scores, -np.inf)
    outs.append(np.exp(log_softmax(scores)) @ v[:, kv])
  return np.concatenate(outs, axis=1)


def states(cfg, params, tokens_T, start=0, cache=None):
  """Returns the last hidden states of tokens from `start` on, and the cache.

  With a cache [(k, v) per layer] of the whole sequence the tokens' own keys
  and values replace the kept ones, and only the given tokens are computed.
  """
  positions = range(start, start + len(tokens_T))
  return layers(cfg, params, tokens_T, positions, True, start, cache)


def masked_states(cfg, params, tokens_T, positions, seen_TxT):
  """Returns the last hidden states of tokens with their own positions and attention."""
  return layers(cfg, params, tokens_T, positions, seen_TxT)[0]


def layers(cfg, params, tokens_T, positions, seen, start=0, cache=None):
  """Runs the network of `states`."""
  tree = params['params']
  where = slice(start, start + len(tokens_T))
  dim = cfg.head_dim or cfg.width // cfg.heads
  x = np.asarray(tree['embedding'], np.float64)[list(tokens_T)]
  new = []
  for layer in range(cfg.layers):
    own, lora = layer_of(tree, layer), layer_of(params.get('lora', {}), layer)
    get = lambda *path, own=own: pluck(own, path)

    def linear(y, name, own=own, lora=lora):
      z = y @ own[name]['kernel']
      if 'bias' in own[name]:
        z = z + own[name]['bias']
      if name in lora:
        z = z + y @ lora[name]['a'] @ lora[name]['b'] * (cfg.lora_alpha / cfg.lora_rank)
      return z

    def heads(z, name, get=get):
      """Applies the q/k norm and RoPE, head by head."""
      parts = []
      for at in range(0, z.shape[1], dim):
        part = z[:, at : at + dim]
        if cfg.qk_norm:
          part = rms_norm(part, get(f'{name}_norm', 'scale'), cfg.eps)
        parts.append(rope(part, positions, cfg.rope_theta, cfg.rotary))
      return np.concatenate(parts, axis=1)

    y = rms_norm(x, get('attn_norm', 'scale'), cfg.eps)
    q, k = heads(linear(y, 'q'), 'q'), heads(linear(y, 'k'), 'k')
    v = linear(y, 'v')
    if cache is not None:
      kept = [part.copy() for part in cache[layer]]
      kept[0][where], kept[1][where] = k, v
      k, v = kept
    new.append((k, v))
    x = x + linear(attend(cfg, q, k, v, seen), 'o')
    y = rms_norm(x, get('mlp_norm', 'scale'), cfg.eps)
    if 'router' in own:
      x = x + experts(cfg, own, y)
    else:
      x = x + linear(silu(linear(y, 'gate')) * linear(y, 'up'), 'down')
  scale = np.asarray(tree['final_norm']['scale'], np.float64)
  return rms_norm(x, scale, cfg.eps), new


def layer_of(tree, layer):
  """Returns the parameters of one layer, from layers or layers_0, layers_1, ..."""
  for name in sorted(name for name in tree if name.startswith('layers')):
    stack = tree[name]
    count = len(stack['q']['kernel' if 'kernel' in stack['q'] else 'a'])
    if layer < count:
      pick = lambda x, at=layer: np.asarray(x, np.float64)[at]
      return {
        linear: {leaf: pick(x) for leaf, x in leaves.items()}
        for linear, leaves in stack.items()
      }
    layer -= count
  return {}


def silu(x):
  return x / (1 + np.exp(-x))


def route(cfg, logits_E, bias_E):
  """Returns {expert: weight} of one token, the best first; ties go to the lower one."""
  if cfg.router == 'sigmoid':
    scores = 1 / (1 + np.exp(-logits_E))
  else:
    scores = np.exp(log_softmax(logits_E))
  choice = scores + bias_E
  groups = np.split(np.arange(cfg.experts), cfg.router_groups)
  worth = [sum(sorted(choice[group])[-2:]) for group in groups]
  open_ = [e for g in best(worth, cfg.router_groups_kept) for e in groups[g]]
  chosen = [
    sorted(open_)[i] for i in best(choice[sorted(open_)], cfg.experts_per_token)
  ]
  weigh = choice if cfg.router_bias == 'weight' else scores
  total = sum(weigh[e] for e in chosen) if cfg.router_norm else 1.0
  return {e: cfg.router_scale * weigh[e] / total for e in chosen}


def experts(cfg, own, y_TxD):
  """Returns what the experts of each token make of it, and those that see all."""
  out = []
  for y in y_TxD:
    bias = own['router'].get('bias', np.zeros(cfg.experts))
    total = np.zeros_like(y)
    for e, weight in route(cfg, y @ own['router']['kernel'], bias).items():
      gate, up, down = (
        own[f'experts_{x}']['kernel'][e] for x in ('gate', 'up', 'down')
      )
      total += weight * (silu(y @ gate) * (y @ up)) @ down
    if cfg.shared_mlp:
      gate, up, down = (own[f'shared_{x}']['kernel'] for x in ('gate', 'up', 'down'))
      total += (silu(y @ gate) * (y @ up)) @ down
    out.append(total)
  return np.array(out)


def pluck(tree, path):
  for key in path:
    tree = tree[key]
  return tree


def head(cfg, params, states_TxD):
  table = params['params']['embedding' if cfg.tied else 'head']
  return states_TxD @ np.asarray(table, np.float64).T


def full_logits(cfg, params, tokens_T):
  """Returns (T, V): at i the prediction for i. Dream's outputs predict the next
  position; its first token keeps the first output."""
  logits = head(cfg, params, states(cfg, params, tokens_T)[0])
  if cfg.shift:
    logits = np.concatenate([logits[:1], logits[:-1]])
  return logits


# The ELBO.


def subsets(length):
  """Returns all masks, (2^L, L) bool; row j masks the bits of j."""
  return np.array([[bool(j >> i & 1) for i in range(length)] for j in range(2**length)])


def index_of(masked):
  """Returns the row of `subsets` that equals the mask; (..., L) -> (...)."""
  return np.sum(masked * 2 ** np.arange(masked.shape[-1]), axis=-1)


def conditionals(cfg, params, prompt, completion):
  """Returns (2^L, L): log p(x_i | prompt, x with the j-th mask), 0 where unmasked."""
  completion = np.asarray(completion)
  table = []
  for masked in subsets(len(completion)):
    seen = np.where(masked, cfg.mask_id, completion)
    logits = full_logits(cfg, params, [*prompt, *seen])[len(prompt) :]
    logp = log_softmax(logits)[np.arange(len(completion)), completion]
    table.append(np.where(masked, logp, 0.0))
  return np.array(table)


def exact_elbo(table):
  """Returns E over m ~ U{1..L} of (L/m) E over |S| = m of the masked sum."""
  length = table.shape[1]
  counts, sums = subsets(length).sum(1), table.sum(1)
  return np.mean(
    [length / m * np.mean(sums[counts == m]) for m in range(1, length + 1)]
  )


def random_order_elbo(table):
  """Returns E over orders of the sum of log p(x_i | what is revealed before)."""
  length = table.shape[1]
  totals = []
  for order in itertools.permutations(range(length)):
    masked = np.ones(length, bool)
    total = 0.0
    for i in order:
      total += table[index_of(masked), i]
      masked[i] = False
    totals.append(total)
  return np.mean(totals)


def bernoulli_elbo(table, low, high, antithetic, weigh):
  """Returns E over rates in U(low, high) and masks of weigh(m, rate) * masked sum.

  With `antithetic`, the mean of that and of the same for the complements.
  """
  length = table.shape[1]
  nodes, weights = np.polynomial.legendre.leggauss(32)  # exact: polynomials
  rates = low + (high - low) * (nodes + 1) / 2
  total = 0.0
  for rate, weight in zip(rates, weights / 2, strict=True):
    for masked, sums in zip(subsets(length), table.sum(1), strict=True):
      m = masked.sum()
      law = rate**m * (1 - rate) ** (length - m)
      if antithetic:  # the mask may come as itself or as a complement
        law = (law + (1 - rate) ** m * rate ** (length - m)) / 2
      total += weight * law * weigh(m, rate) * sums
  return total


# The samplers.


def best(score, count):
  """Returns the indices of the `count` highest; ties go to the lower one."""
  return sorted(range(len(score)), key=lambda i: -score[i])[:count]


def entropies(probs):
  return [-sum(p * math.log(p) for p in row if p > 0) for row in probs]


def picks(hp, probs, confidence, quota, share, noise):
  """Returns which masked positions to reveal, as indices into probs.

  probs (M, V), confidence (M,) and noise (M,) of the positions still masked,
  in their order.
  """

  def scored(score):
    if hp.rank_temperature:
      gumbel = -np.log(-np.log(np.maximum(noise, 1e-30)))
      score = np.asarray(score) / hp.rank_temperature + gumbel
    return best(score, quota)

  if hp.pick == 'confidence':
    return scored(confidence)
  if hp.pick == 'plackett_luce':
    score = np.log(confidence)
    return scored(score)
  if hp.pick == 'random':
    return best(noise, quota)
  if hp.pick == 'random_order':
    return best(noise, 1)
  if hp.pick == 'origin':
    return [i for i, u in enumerate(noise) if u < share]
  if hp.pick == 'margin':
    two = np.sort(probs, axis=1)[:, -2:]
    return scored(two[:, 1] - two[:, 0])
  if hp.pick == 'lowest_entropy':
    return scored([-e for e in entropies(probs)])
  if hp.pick == 'threshold':
    over = [i for i, c in enumerate(confidence) if c >= hp.threshold]
    return over or ([0] if hp.fallback == 'leftmost' else best(confidence, 1))
  if hp.pick == 'dynamic':
    over = [i for i, c in enumerate(confidence) if c >= hp.threshold]
    return over if len(over) >= quota else best(confidence, quota)
  if hp.pick == 'sequential':
    return list(range(min(quota, len(confidence))))
  if hp.pick == 'factor':
    ranked = best(confidence, len(confidence))
    kept = ranked[:1]
    for j, i in enumerate(ranked[1:], start=2):
      if confidence[i] < 1 - hp.factor / (j + 1):
        break
      kept.append(i)
    return kept
  if hp.pick == 'entropy':
    entropy = entropies(probs)
    ranked = sorted(range(len(entropy)), key=lambda i: entropy[i])
    kept = ranked[:1]
    for i in ranked[1:]:
      values = [entropy[j] for j in [*kept, i]]
      if sum(values) - max(values) > hp.entropy_bound:
        break
      kept.append(i)
    return kept
  raise KeyError(hp.pick)


class Network:
  """Computes a block's logits, from the whole sequence or through a cache.

  A cached network is asked about one block; all later positions are computed
  again with `prefix`, none but the block with `dual`. Every `refresh`-th time
  everything is.
  """

  def __init__(self, cfg, params, cache, refresh=0):
    self.cfg, self.params, self.mode = cfg, params, cache
    self.refresh, self.calls, self.cache = refresh, 0, None

  def logits(self, tokens, start, width):
    cfg, params = self.cfg, self.params
    if self.mode == 'none':
      return full_logits(cfg, params, tokens)[start : start + width]
    first = start - cfg.shift  # the output before predicts the first token
    if self.calls == 0 or self.refresh and self.calls % self.refresh == 0:
      out, self.cache = states(cfg, params, tokens)
      out = out[first:]
    else:
      end = start + width if self.mode == 'dual' else len(tokens)
      part = tokens[first:end]
      out, self.cache = states(cfg, params, part, first, self.cache)
    self.calls += 1
    return head(cfg, params, out[:width])


def schedule(hp):
  """Returns (quota, share) of a block's steps; quota None: the share of masks."""
  per_block = max(1, hp.steps // (hp.length // hp.block))
  if hp.schedule == 'dream':
    t = np.linspace(1, 1e-3, per_block + 1, dtype=np.float32)
    shares = [1 - t[i + 1] / t[i] for i in range(per_block - 1)] + [1.0]
    return [(None, share) for share in shares]
  more = hp.block % per_block
  return [
    (hp.block // per_block + (i < more), 1 / (per_block - i)) for i in range(per_block)
  ]


def law_of(logits, hp):
  """Returns log-probs of the law that tokens are drawn from."""
  logp = log_softmax(logits / (hp.temperature or 1.0))
  for row in logp:
    if hp.top_p < 1:
      total = 0.0
      for token in np.argsort(-row, kind='stable'):
        total, before = total + np.exp(row[token]), total
        if before >= hp.top_p:
          row[token] = -np.inf
    if hp.top_k:
      row[row < np.sort(row)[-hp.top_k]] = -np.inf
  return log_softmax(logp)


def unfinished(hp, cfg, completion):
  """Returns the indices of masks that must go: with eos_stop none after an EOS."""
  end = len(completion)
  if hp.eos_stop and cfg.eos_id in completion:
    end = completion.index(cfg.eos_id)
  return [i for i in range(end) if completion[i] == cfg.mask_id]


def canvas(cfg, prompt, hp):
  """Returns a completion before its first step: (tokens, order, logp, sure, step)."""
  tokens = [int(t) for t in prompt] + [cfg.mask_id] * hp.length
  return (tokens, np.full(hp.length, -1), np.zeros(hp.length), np.zeros(hp.length), 0)


def sample(cfg, params, prompt, hp, noise=None):
  """Samples one completion: (tokens, order, logp, confidence, forwards).

  noise(step) -> (gumbel (W, V), uniform (W,)): the row's randomness.
  """
  tokens, order, logp, sure, step = canvas(cfg, prompt, hp)
  for at in range(0, hp.length, hp.block):
    start = len(prompt) + at
    nets = [Network(cfg, params, hp.cache, hp.refresh) for _ in range(2)]
    plan, done = schedule(hp), 0
    while unfinished(hp, cfg, tokens[len(prompt) :]):
      left = [i for i in range(hp.block) if tokens[start + i] == cfg.mask_id]
      if not left:
        break
      blind = [cfg.mask_id] * len(prompt) + tokens[len(prompt) :]
      logits = nets[0].logits(tokens, start, hp.block)
      if hp.guidance:
        unled = nets[1].logits(blind, start, hp.block)
        logits = unled + (hp.guidance + 1) * (logits - unled)
      logits[:, cfg.mask_id] = -np.inf  # the mask token is never drawn
      proposal, law, prob, own, confidence = proposed(
        logits, hp, noise(step) if noise else (0.0, None)
      )
      uniform = noise(step)[1] if noise else np.zeros(hp.block)
      quota, share = plan[min(done, len(plan) - 1)]
      if quota is None:
        quota = int(np.float32(len(left)) * share)
      for j in picks(hp, prob[left], confidence[left], quota, share, uniform[left]):
        i = left[j]
        tokens[start + i] = int(proposal[i])
        order[at + i], sure[at + i] = step, own[i]
        logp[at + i] = law[i, proposal[i]]
      step, done = step + 1, done + 1
  tokens = np.array(tokens[len(prompt) :])
  tokens[tokens == cfg.mask_id] = cfg.eos_id
  return tokens, order, logp, sure, step


def proposed(logits, hp, noise):
  """Returns (tokens, law, judged law, probability of the tokens, confidence)."""
  law = law_of(logits, hp)
  score = law + noise[0] if hp.temperature else law
  proposal = np.argmax(score, axis=1)
  prob = np.exp(law if hp.rank_law == 'sampling' else log_softmax(logits))
  own = np.take_along_axis(prob, proposal[:, None], 1)[:, 0]
  return proposal, law, prob, own, prob.max(1) if hp.rank == 'max' else own


def shadow_logits(cfg, params, tokens, start, width):
  """Returns the logits of the window and of its shadow: WINO's one forward.

  Attention as a plain mask over the sequence with a shadow block behind it.
  """
  size, shift = len(tokens), int(cfg.shift)
  window = list(range(start, start + width))
  shadow = [tokens[i - 1] if shift else cfg.mask_id for i in window]
  ids = [*tokens, *shadow]
  positions = [*range(size), *[i - shift for i in window]]
  seen = np.zeros((len(ids), len(ids)), bool)
  seen[:, :size] = True
  seen[size:] = True
  for j, i in enumerate(window):
    seen[size + j, i] = False  # the twin
    if shift and j + 1 < width:
      seen[size + j, size + j + 1] = False  # the next repeats the twin
  out = head(cfg, params, masked_states(cfg, params, ids, positions, seen))
  return out[start - shift : start - shift + width], out[size:]


def wino(cfg, params, prompt, hp, noise=None):
  """Samples as `sample`, by draft and verify."""
  tokens, order, logp, sure, step = canvas(cfg, prompt, hp)
  for at in range(0, hp.length, hp.block):
    start = len(prompt) + at
    before, done = 30, 0
    while unfinished(hp, cfg, tokens[len(prompt) :]):
      left = [i for i in range(hp.block) if tokens[start + i] == cfg.mask_id]
      there = [i for i in range(hp.block) if i not in left]
      if not left:
        break
      logits, shadow = shadow_logits(cfg, params, tokens, start, hp.block)
      logits[:, cfg.mask_id] = shadow[:, cfg.mask_id] = -np.inf
      proposal, law, _, own, confidence = proposed(
        logits, hp, noise(step) if noise else (0.0, None)
      )
      hindsight = np.exp(log_softmax(shadow))
      over = [j for j in range(len(left)) if confidence[left[j]] > hp.threshold]
      most = min(max(int(0.7 * len(left)), 5), 20)
      if len(over) > most:
        over = best(confidence[left], most)
      taken = [left[j] for j in over or best(confidence[left], 1)]
      again = []
      if len(taken) > 1 and done < hp.block:
        doubt = {i: hindsight[i, tokens[start + i]] for i in there}
        doubt = {i: p for i, p in doubt.items() if p < hp.verify}
        again = sorted(doubt, key=lambda i: doubt[i])[: before - 1]
      for i in taken:
        tokens[start + i] = int(proposal[i])
        order[at + i], sure[at + i] = step, own[i]
        logp[at + i] = law[i, proposal[i]]
      for i in again:
        tokens[start + i] = cfg.mask_id
      before, step, done = len(taken), step + 1, done + 1
  tokens = np.array(tokens[len(prompt) :])
  tokens[tokens == cfg.mask_id] = cfg.eos_id
  return tokens, order, logp, sure, step


def trajectory_logp(cfg, params, prompt, completion, order, hp):
  """Returns the sum over steps of the log-probs of what each revealed (no guidance)."""
  total = 0.0
  for step in range(max(order) + 1):
    seen = [
      cfg.mask_id if at >= step else int(token)
      for token, at in zip(completion, order, strict=True)
    ]
    logits = full_logits(cfg, params, [*prompt, *seen])[len(prompt) :]
    logits[:, cfg.mask_id] = -np.inf
    law = log_softmax(logits / (hp.temperature or 1.0))
    total += sum(
      law[i, token]
      for i, (token, at) in enumerate(zip(completion, order, strict=True))
      if at == step
    )
  return total


def random_order_law(cfg, params, prompt, length, temperature):
  """Returns {completion: probability} when one token a step is drawn at random."""
  law = {}

  def visit(tokens, probability):
    left = [i for i, t in enumerate(tokens) if t == cfg.mask_id]
    if not left:
      law[tokens] = law.get(tokens, 0.0) + probability
      return
    logits = full_logits(cfg, params, [*prompt, *tokens])[len(prompt) :]
    logits[:, cfg.mask_id] = -np.inf
    prob = np.exp(log_softmax(logits / temperature))
    for i in left:
      for token in range(cfg.vocab):
        if token != cfg.mask_id:
          more = tokens[:i] + (token,) + tokens[i + 1 :]
          visit(more, probability * prob[i, token] / len(left))

  visit((cfg.mask_id,) * length, 1.0)
  return law


# --- Hugging Face directories, in their own names and layouts


def hf_logits(folder, tokens_T):
  """Returns (T, V): the outputs of the network in config.json, not unshifted.

  A plain loop over torch's tensors (out, in) by their own names; attention is
  bidirectional, or block by block where config.json has a block_size.
  """
  folder = pathlib.Path(folder)
  c = json.loads((folder / 'config.json').read_text())
  t = {}
  for path in folder.glob('*.safetensors'):
    t |= {k: np.asarray(v, np.float64) for k, v in load_file(path).items()}
  llada = c['model_type'] == 'llada'
  get = lambda a, b, default=None: c.get(a if llada else b, default)
  heads = get('n_heads', 'num_attention_heads')
  kv = get('n_kv_heads', 'num_key_value_heads', heads)
  eps, theta = c['rms_norm_eps'], c['rope_theta']
  root, top = (
    ('model.transformer.blocks', 'model.transformer')
    if llada
    else ('model.layers', 'model')
  )
  names = (
    dict(
      zip(
        'qkvogud',
        ('q_proj', 'k_proj', 'v_proj', 'attn_out', 'ff_proj', 'up_proj', 'ff_out'),
        strict=True,
      )
    )
    if llada
    else dict(
      zip(
        'qkvogud',
        (
          'self_attn.q_proj',
          'self_attn.k_proj',
          'self_attn.v_proj',
          'self_attn.o_proj',
          'mlp.gate_proj',
          'mlp.up_proj',
          'mlp.down_proj',
        ),
        strict=True,
      )
    )
  )
  norms = (
    ('attn_norm', 'ff_norm')
    if llada
    else ('input_layernorm', 'post_attention_layernorm')
  )
  table = t[f'{top}.wte.weight' if llada else 'model.embed_tokens.weight']
  x = table[tokens_T]
  place = np.arange(len(tokens_T))
  block = c.get('block_size')
  seen = np.ones((len(x), len(x)), bool)
  if block:
    seen = place[None] // block <= place[:, None] // block

  def linear(i, name, y):
    stem = f'{root}.{i}.{names[name]}'
    return y @ t[f'{stem}.weight'].T + t.get(f'{stem}.bias', 0.0)

  def split(i, name, y, count):
    z = linear(i, name, y).reshape(len(y), count, -1)
    scale = t.get(f'{root}.{i}.self_attn.{name}_norm.weight')
    z = z if scale is None else rms_norm(z, scale, eps)
    if name == 'v':
      return z
    return np.stack([rope(z[:, h], place, theta) for h in range(count)], 1)

  for i in range(get('n_layers', 'num_hidden_layers')):
    y = rms_norm(x, t[f'{root}.{i}.{norms[0]}.weight'], eps)
    q, k, v = (split(i, n, y, heads if n == 'q' else kv) for n in 'qkv')
    out = []
    for h in range(heads):
      g = h * kv // heads
      score = q[:, h] @ k[:, g].T / math.sqrt(q.shape[-1])
      score = np.where(seen, score, -np.inf)
      out.append(np.exp(log_softmax(score)) @ v[:, g])
    x = x + linear(i, 'o', np.concatenate(out, -1))
    y = rms_norm(x, t[f'{root}.{i}.{norms[1]}.weight'], eps)
    gate = linear(i, 'g', y)
    x = x + linear(i, 'd', gate / (1 + np.exp(-gate)) * linear(i, 'u', y))
  x = rms_norm(x, t[f'{top}.ln_f.weight' if llada else 'model.norm.weight'], eps)
  tied = get('weight_tying', 'tie_word_embeddings')
  head = f'{top}.ff_out.weight' if llada else 'lm_head.weight'
  return x @ (table if tied else t[head]).T
