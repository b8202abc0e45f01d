"""Every field once, with its unit or its allowed values.

An experiment file calls `get_config()` and says only what differs. Override
any field with --config.section.field=value.
"""

import ml_collections


def get_config():
  c = ml_collections.ConfigDict()
  c.name = 'base'  # of the experiment; part of the default workdir
  c.seed = 0  # of everything random but the problems (data.seed)
  c.cache = True  # compiled programs stay in ~/.cache/dmpo_jax, but for CPUs

  c.model = m = ml_collections.ConfigDict()
  m.checkpoint = ''  # Hugging Face directory or hub name; '' = from nothing
  m.preset = 'tiny'  # a name in model.PRESETS; 0 below = as the preset says
  m.width = 0  # D
  m.layers = 0  # N
  m.heads = 0  # H
  m.kv_heads = 0  # fewer than heads: grouped-query attention
  m.mlp = 0  # F, inner width of the SwiGLU
  m.dtype = 'float32'  # of the matmuls: float32 | bfloat16
  m.param_dtype = 'float32'  # as stored: float32 | bfloat16
  m.quantize = 'none'  # the frozen base under adapters: none | int8 | nf4
  m.remat = 'none'  # none | dots (keep linears' results) | full: less memory
  m.attention = 'xla'  # xla | cudnn (GPU, bfloat16) | splash (TPU)
  m.head_chunk = 0  # completion positions per head call; 0 = all at once

  c.lora = lo = ml_collections.ConfigDict()
  lo.rank = 0  # 0 = train every parameter
  lo.alpha = 64.0  # the adapter is scaled by alpha / rank
  lo.targets = 'all'  # all | paper (q, k, v, up) | a regex on linears' names
  lo.dropout = 0.0  # of the adapters' input, in updates
  lo.path = ''  # PEFT adapter directory to start from

  c.data = d = ml_collections.ConfigDict()
  d.task = 'sudoku'  # a name in tasks.TASKS
  d.path = ''  # file, folder with train and test, or tfds; '' generates
  d.tokenizer = ''  # char | a directory; '' = the checkpoint's, else char
  d.style = 'bare'  # how problems are put: bare | chat | eval | ... (types)
  d.template = ''  # file with {field}s, in place of a style
  d.protocol = 'strict'  # strict (correct rules) | paper (reference rules)
  d.prompt_length = 0  # P in tokens; 0 = the longest prompt's
  d.overlong = 'error'  # longer prompts: error | drop | cut (from the left)
  d.bucket = 0  # P of a buffer: multiple of this; 0 = one P for all
  d.attend_padding = False  # True: padding is seen, as in the papers' code
  d.seed = 0  # of the problems and their split
  d.train_size = 2000  # problems; 0 = all of a file
  d.validation_size = 128  # problems; 0 = all of a file
  d.test_size = 256  # problems; 0 = all of a file
  d.min_blanks = 4  # sudoku: fewest empty cells
  d.max_blanks = 10  # sudoku: most empty cells
  d.largest = 99  # countdown: largest of the generated numbers
  d.numbers = 0  # countdown files: numbers of a problem; 0 = 2 to 6

  c.reward = w = ml_collections.ConfigDict()
  w.workers = 0  # processes that compare expressions; 0 = one a core
  w.deadline = 3.0  # seconds one comparison may take
  w.weights = dict(  # factor of each term a task pays
    correctness=1.0,
    int=1.0,
    strict_format=1.0,
    soft_format=1.0,
    xmlcount=1.0,
    format=1.0,
    countdown=1.0,
    sudoku=1.0,
  )

  c.sft = s = ml_collections.ConfigDict()
  s.steps = 0  # supervised steps before RL; 0 = none
  s.batch = 128  # rows
  s.lr = 2e-3  # after warm-up, constant
  s.warmup = 20  # steps
  s.weight_decay = 0.0  # of matrices
  s.clip = 1.0  # by global norm; 0 = off

  c.sampler = sampler()  # of rollouts
  c.objective = o = ml_collections.ConfigDict()
  o.name = 'dmpo'  # a name in objectives.OBJECTIVES
  o.alpha = 0.04  # temperature of the target; 0 = reward alone
  o.coef = 1.0  # proximal coefficient c in (0, 1]
  o.ess = 0.0  # 0 = c as given; else c per group for this effective size
  o.baseline = 'individual'  # of wdce: none | group | individual | model
  o.strength = 1.0  # of the baseline
  o.best = 0.0  # the largest reward; groups far from it count less; 0 = off
  o.loss = 'wdce'  # wdce | ddo
  o.ddo_alpha = 1.0  # ddo: scale of the term that pushes down
  o.ddo_beta = 1.0  # ddo: inverse temperature of the gap
  o.draws = 4  # K masked copies of a completion per update
  o.spread = False  # masked counts spread evenly over a completion's copies
  o.low = 0.1  # mask rate ~ U(low, high)
  o.high = 1.0  # the release's range; its comment says 0.9
  o.antithetic = True  # second half of the draws = complement of the first
  o.loss_tail = True  # train the tokens after the first EOS
  o.common_masks = False  # model: log p_old under the loss's own masks
  o.advantage = 'mean'  # reward less: mean | loo (of the others) | zscore
  o.clip = 0.2  # ratios count down to 1 - clip (gdsd: gaps; 0 = no clamp)
  o.clip_high = 0.0  # and up to 1 + clip_high; 0 = as clip
  o.beta = 0.0  # of the KL to the reference; vrpo: of the ELBO's gap
  o.kl = 'k3_ratio'  # its estimator: k1 | k2 | k3 | k3_ratio
  o.choose = 'entropy'  # recorded steps: each | uniform | entropy | top
  o.variant = 'released'  # which form; the objective's file has them
  o.masks = 'stratified'  # of the loss's ELBO; the objective's file has them
  o.mask_prompt = 0.15  # chance of prompt tokens (spg: of all) to be masked
  o.truncate = 2.0  # diffpo: largest importance correction
  o.step_coef = 0.5  # egspo: of the gain over completing the state at once
  o.centre = False  # gdsd: logits less their mean, not log-probs
  o.places = True  # mapg: with the gradient of the choice of positions
  o.fresh = True  # residual: the gap under masks of its own
  o.per_token = False  # residual: ELBOs per token
  o.bound = 'mix'  # spg, of bad completions: elbo | eubo | mix | none
  o.power = 1.5  # spg: of the probabilities in the EUBO, >= 1
  o.mix = 0.5  # spg: share of the EUBO in bound mix
  o.sft_coef = 0.05  # vrpo: of the winners' likelihood
  o.skip_equal = False  # groups of equal rewards weigh nothing
  o.elbo_coef = 0.0  # of the rollouts' mean ELBO per token, added; 0 = off
  o.elbo_draws = 2  # masks of that ELBO, in pairs of complements

  # What p_ref is: the product of p_k^weight over these.
  c.reference = r = ml_collections.ConfigDict()
  r.of = ('base',)  # base | moving (follows the policy) | directory, adapter
  r.weights = (1.0,)  # one each
  r.every = 1  # moving: updates between its moves
  r.mix = 1.0  # moving: share of the policy it takes; 1 = a copy

  c.logprob = e = ml_collections.ConfigDict()  # log p_ref and log p_old
  e.estimator = 'elbo'  # elbo | trajectory (along the recorded states)
  e.elbo = 'paper'  # paper (Bernoulli, L/m) | stratified (exact counts)
  e.draws = 4  # masked copies
  e.low = 0.1  # paper: mask rate ~ U(low, high)
  e.high = 1.0  # paper
  e.antithetic = True  # paper: second half of the draws = complement
  e.tail = True  # count the tokens after the first EOS
  e.states = 0  # trajectory: states to visit; 0 = all
  e.fuse = False  # with adapters: old and ref in one pass of twice the rows

  c.train = t = ml_collections.ConfigDict()
  t.iterations = 100  # rollout buffers
  t.prompts = 8  # B per buffer
  t.group = 16  # G completions of each
  t.inner = 2  # I updates per buffer
  t.microbatches = 4  # pieces an update's rows are cut into
  t.overlap = False  # sample the next buffer before this one's updates

  c.optim = p = ml_collections.ConfigDict()
  p.lr = 1e-4  # after warm-up
  p.warmup = 10  # updates
  p.decay_steps = 0  # updates until the rate is zero; 0 = constant
  p.b1 = 0.9  # AdamW
  p.b2 = 0.99  # AdamW
  p.eps = 1e-8  # AdamW
  p.weight_decay = 0.0  # of matrices
  p.clip = 1.0  # by global norm; 0 = off

  c.eval = v = ml_collections.ConfigDict()
  v.every = 10  # iterations between validations; 0 = only at the end
  v.batch = 128  # rows per call
  v.style = ''  # of validation and test prompts; '' = as training's
  v.template = ''  # the same for a template
  v.lengths = ()  # --mode=eval: completion lengths; () = eval.sampler.length
  v.samples = 1  # --mode=eval: completions of a problem
  v.sampler = sampler()  # of evaluation
  v.sampler.temperature = 0.0  # greedy

  c.checkpoint = k = ml_collections.ConfigDict()
  k.every = 20  # updates between checkpoints
  k.every_minutes = 0.0  # and after so long, at the next update; 0 = off
  k.keep = 2  # latest checkpoints; the best by validation is kept beside them

  # Rules on the buffers (docs/running.md); a bound of 0 is off.
  c.health = y = ml_collections.ConfigDict()
  y.action = 'warn'  # none | warn | stop (exit 77)
  y.patience = 5  # buffers in a row that break a rule before anything follows
  y.empty = 0.5  # above: share of completions that begin with EOS
  y.repeated = 0.5  # above: share of tokens equal to the one before
  y.distinct = 0.0  # below: different completions of a group / G
  y.equal = 0.0  # above: share of groups with equal rewards and all wrong
  y.reward = 0.5  # below: mean reward / its best mean over `patience` buffers
  y.ess = 0.0  # below: effective size of a group's weights, in (0, 1]
  y.kl = 0.0  # above: KL to the reference, nats a completion
  y.grad_norm = 0.0  # above: of a buffer's last update, before clipping
  y.measure = False  # KL and ELBO drift for any objective: up to three passes

  c.mesh = h = ml_collections.ConfigDict()
  h.data = 0  # devices that replicate weights; 0 = what the others leave
  h.fsdp = 1  # devices that split weights
  h.tensor = 1  # devices that split heads and MLP
  h.cpu = 1  # devices that a CPU is split into, where there is no other

  c.log = g = ml_collections.ConfigDict()
  g.every_seconds = 10.0  # between log lines where there is no terminal
  g.samples = 2  # completions per buffer written to samples.jsonl
  g.stuck_minutes = 0.0  # no progress so long: says where, exits 76; 0 = off
  return c


def sampler():
  c = ml_collections.ConfigDict()
  c.length = 16  # L, tokens of a completion
  c.block = 16  # W, unmasked block by block
  c.steps = 16  # of picks with a schedule, as confidence, random, margin
  c.temperature = 1.0  # 0 = greedy
  c.pick = 'confidence'  # a name in picks.PICKS, or wino
  c.rank = 'max'  # confidence of the best token (max) or the sampled (token)
  c.rank_law = 'model'  # judged at: model (T = 1) | sampling (Dream)
  c.rank_temperature = 0.0  # > 0: positions drawn, not the best (alg_temp)
  c.schedule = 'even'  # of picks with one: even (LLaDA) | dream
  c.threshold = 0.9  # picks threshold and wino
  c.fallback = 'best'  # where no token reaches it: best | leftmost (Fork-dLLM)
  c.verify = 0.9  # pick wino: below this in hindsight is masked again
  c.factor = 1.0  # pick factor
  c.entropy_bound = 0.1  # pick entropy, nats
  c.top_p = 1.0  # nucleus of tokens; 1 = all
  c.top_k = 0  # most probable tokens; 0 = all
  c.guidance = 0.0  # classifier-free guidance; 0 = off
  c.cache = 'none'  # none (exact) | prefix | dual: what a block keeps
  c.refresh = 0  # steps between full forwards with a cache; 0 = once a block
  c.eos_stop = False  # a row ends when all before its first EOS is there
  c.parallel = 'jit'  # jit | pmap (replicated small models)
  return c
