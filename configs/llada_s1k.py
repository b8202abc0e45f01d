"""d1's two stages from LLaDA-8B-Instruct: supervised training on s1K, then RL.

python main.py --config=configs/llada_s1k.py \
    --config.model.checkpoint=GSAI-ML/LLaDA-8B-Instruct --config.data.path=DIR

RL is that of llada_gsm8k.py: it says what DIR holds and what may stand after the colon
(:diffu_grpo,h100 is d1's RL on one H100). It starts from the tuned model, which is its
reference too. Texts come from the hub by `pip install datasets`, or from a file:
--config.sft.path=s1K.parquet. In two commands:

python main.py --config=configs/llada_s1k.py ... --mode=sft --workdir=runs/s1k
python main.py --mode=export --of=base --workdir=runs/s1k --out=LLaDA-s1k

and then llada_gsm8k.py, or another task's, with --config.model.checkpoint=LLaDA-s1k.
Both ways give the same weights. Planned on one H100 (:h100), supervised training: 40.2
GiB of the 72.8 that JAX takes, at least 4.7 s an update, 1.6 h for 1,240 updates.

The settings are d1's (arXiv 2504.12216; SFT/ of its repository): adapters of rank 128,
alpha 256, dropout 0.05 on q, k and v; texts of 4096 tokens, padded with EOS, which is
learned; 1 % held out; 20 epochs of 16 rows; the adapters are merged. Two fields save
most of the time: --config.sft.bucket=256 pads a text to a multiple of 256 tokens only,
and --config.sft.fill=False neither shows nor learns the padding.

Ours differs in the header of an answer. d1 takes a prompt's length from the chat
template without a request for an answer. Where the template then leaves the header out,
d1 learns it. Where it does not, as LLaDA's own, d1 learns another header after the
answer. Here no header is learned: an answer ends with <|eot_id|> and EOS. A text longer
than 4096 tokens is cut, and learned without an end. On more than 16 devices set
--config.sft.batch, for d1's update has 16 rows.
"""

from configs import llada_gsm8k, slices


def get_config(recipe='ours'):
  c = llada_gsm8k.get_config(recipe)
  c.name = 'llada_s1k'
  c.sft.path = ('simplescaling/s1K',)
  c.sft.epochs = 20
  c.sft.batch = 16
  # A row of 4096 tokens on a device at a time; without a slice's name there are 16.
  devices = [slices.SLICES[x].devices for x in recipe.split(',') if x in slices.SLICES]
  c.sft.microbatches = max(1, 16 // (devices or [16])[0])
  c.sft.lr = 1e-5
  c.sft.warmup = 0
  c.sft.decay = 'linear'
  c.sft.weight_decay = 0.1
  c.sft.rank = 128
  c.sft.alpha = 256.0
  c.sft.targets = '^(q|k|v)$'
  c.sft.dropout = 0.05
  c.sft.length = 4096
  c.sft.overlong = 'cut'
  c.sft.held_out = 0.01
  c.sft.every = 100
  return c
