"""Qwen3-0.6B becomes a diffusion model; then DMPO on grade-school word problems.

python main.py --config=configs/a2d_qwen3.py \
    --config.model.checkpoint=Qwen/Qwen3-0.6B --config.data.path=DIR

llada_gsm8k.py says what DIR holds. The texts come from the hub by `pip install
datasets`; --config.sft.path='("chats.jsonl",)' learns a file of yours. In two commands:

python main.py --config=configs/a2d_qwen3.py ... --mode=sft --workdir=runs/a2d
python main.py --mode=export --of=base --workdir=runs/a2d --out=Qwen3-a2d

and then tiny_a2d_gsm8k.py, or another task's, with --config.model.checkpoint=Qwen3-a2d.
docs/convert.md explains the conversion. Qwen2, Qwen3 and Llama of other sizes need
--config.model.checkpoint alone.

After the file name may stand, beside the recipes and slices of llada_countdown.py:
  :block    block-causal, blocks of 32 (the default; dllm's bd3lm)
  :masked   attention over the whole text, predictions in place (dllm's mdlm)
  :shifted  the same with the predictions of the autoregressive model, one place before
            (Dream), and attention annealed in the first third (DiffuLLaMA)

The recipe is that of dllm's Tiny-A2D (examples/a2d of its repository). Known there:
supervised training alone; a new token <|mask|>; attention switched at once; rate 1e-4;
loss on answers, divided by tokens; weight 1/t; padding of EOS is learned; 512 tokens
(bd3lm) or 1024 (mdlm); 10 epochs of tulu-3-sft-mixture, smoltalk and Python of
opc-sft-stage1 and 2 in batches of 2048, ten hours on 64 GPUs. Ours: one of these sets,
768 k texts of it in batches of 256, so that one GPU is enough; warm-up of a tenth, then
cosine. Each attention block draws its own number of masks here; bd3lm draws one rate a
text.
Planned for RL on one H100 (:h100): 15.3 GiB of the 72.8 that JAX takes, at least 4.4 s
a rollout, 1.5 s an update, 2.3 h; of :masked 14.8 GiB, 4.2 s, 1.8 s, 2.6 h.
Published, GSM8K of 1319 test problems, 256 tokens: bd3lm 46.6, mdlm 29.8; the
autoregressive Qwen3-0.6B-Base 59.6. Other settings here, so other numbers.
"""

from configs import slices
from configs.llada_countdown import choose
from configs.llada_gsm8k import get_config as llada_gsm8k
from configs.sdar_math import blocks

KINDS = ('block', 'masked', 'shifted')


def get_config(recipe='block'):
  names = recipe.split(',')
  kinds = [x for x in names if x in KINDS] or ['block']
  if len(kinds) > 1:
    raise ValueError(f'{recipe} after the colon: name one of {", ".join(kinds)}')
  kind, rest = kinds[0], [x for x in names if x not in KINDS] or ['ours']
  c = blocks(llada_gsm8k('paper'), 'a2d_0_6b', length=256, block=32)
  c.name = f'a2d_qwen3_{kind}'
  c.model.convert = kind
  c.model.attention_block = 32 if kind == 'block' else 0
  c.model.param_dtype = 'float32'  # all parameters are trained
  c.sft.path = ('allenai/tulu-3-sft-mixture',)
  c.sft.steps = 3000
  c.sft.batch = 256
  devices = [slices.SLICES[x].devices for x in rest if x in slices.SLICES]
  c.sft.microbatches = max(1, 16 // (devices or [16])[0])
  c.sft.lr = 1e-4
  c.sft.warmup = 300
  c.sft.decay = 'cosine'
  c.sft.mean = 'token'
  c.sft.length = 512 if kind == 'block' else 1024
  c.sft.overlong = 'cut'
  c.sft.bucket = 256
  c.sft.anneal = 1000 if kind == 'shifted' else 0
  c.eval.sampler.pick = 'confidence'
  c.train.microbatches = 16
  if kind != 'block':
    for s in (c.sampler, c.eval.sampler):
      s.cache = 'none'
    c.logprob.states = 8
  return choose(c, ','.join(rest))
