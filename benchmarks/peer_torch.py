"""The PyTorch side of `peer`: a worker that answers requests on stdin.

Imports the reference from a folder with generate.py, modeling_X.py and
configuration_X.py: X is llada (fast_samplers/fast_dllm of the DMPO release) or sdar
(the repository's generate.py beside the modelling files of a release). Needs torch,
transformers 4.52 and no JAX.
"""

import importlib
import importlib.machinery
import json
import pathlib
import sys
import time
import types

import numpy as np
import torch
from safetensors.torch import load_file

# The reference's functions for our names of caches.
GENERATE = {
  'none': 'generate_pd',
  'prefix': 'generate_with_prefix_cache',
  'dual': 'generate_with_dual_cache',
}


def stand_ins(package):
  """Puts torch's own functions where SDAR's model asks for kernels of a GPU."""
  attend = torch.nn.functional.scaled_dot_product_attention

  def norm(x, weight, bias, eps):
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)

  def attention(q, k, v, causal, softmax_scale):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attend(q, k, v, scale=softmax_scale, enable_gqa=True).transpose(1, 2)

  names = dict.fromkeys(('index_first_axis', 'pad_input', 'unpad_input'))
  for name, held in (
    ('flash_attn', {'flash_attn_func': attention, 'flash_attn_varlen_func': None}),
    ('flash_attn.bert_padding', names),
    ('flash_attn.ops', {}),
    ('flash_attn.ops.triton', {}),
    ('flash_attn.ops.triton.layer_norm', {'rms_norm_fn': norm}),
    (
      f'{package}.fused_linear_diffusion_cross_entropy',
      {'FusedLinearDiffusionCrossEntropyLoss': None},
    ),
  ):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # transformers looks
    vars(module).update(held)
    sys.modules[name] = module


def load(reference, folder):
  """(the model with the weights of a directory, module of samplers, mask id)."""
  reference = pathlib.Path(reference).resolve()
  sys.path.insert(0, str(reference.parent))
  part = lambda name: importlib.import_module(f'{reference.name}.{name}')
  fields = json.loads((pathlib.Path(folder) / 'config.json').read_text())
  if (reference / 'modeling_sdar.py').exists():
    stand_ins(reference.name)
    cfg = part('configuration_sdar').SDARConfig(
      **fields, attn_implementation='sdpa', fuse_cross_entropy=False
    )
    model = part('modeling_sdar').SDARForCausalLM(cfg)
  else:
    cfg = part('configuration_llada').LLaDAConfig(
      **fields, init_device='cpu', use_cache=False
    )
    model = part('modeling_llada').LLaDAModelLM(cfg)
  weights = load_file(pathlib.Path(folder) / 'model.safetensors')
  missing = model.load_state_dict(weights, strict=False)
  if missing.missing_keys or missing.unexpected_keys:
    raise ValueError(f'the weights do not fit the reference: {missing}')
  return model.float().eval(), part('generate'), cfg.mask_token_id


def sample(model, module, mask_id, prompts, request):
  run = getattr(module, GENERATE[request['cache']])
  begun = time.perf_counter()
  out = run(
    model,
    prompts,
    steps=request['steps'],
    gen_length=request['length'],
    block_length=request['block'],
    temperature=0.0,
    mask_id=mask_id,
    threshold_pd=request['threshold'],
  )
  return {'seconds': time.perf_counter() - begun, 'tokens': out.tolist()}


def sample_blocks(model, module, mask_id, prompts, request):
  """SDAR's sampler, which takes one prompt at a time.

  It has no greedy mode: the most probable token takes the place of the draw.
  """
  torch.multinomial = lambda probs, num_samples: probs.argmax(-1, keepdim=True)
  threshold = request['threshold']
  begun = time.perf_counter()
  rows = [
    module.block_diffusion_generate(
      model,
      {'input_ids': prompt[None]},
      mask_id,
      gen_length=request['length'],
      block_length=request['block'],
      denoising_steps=request['steps'] * request['block'] // request['length'],
      remasking_strategy=f'low_confidence_{"dynamic" if threshold else "static"}',
      confidence_threshold=threshold or 0.0,
    )[0]
    for prompt in prompts
  ]
  return {'seconds': time.perf_counter() - begun, 'tokens': torch.stack(rows).tolist()}


def train(model, optimizer, mask_id, tokens, request):
  """One update: masked copies, weighted cross-entropy, AdamW.

  The weights of the objective do not change its cost: ones.
  """
  draws, length = request['draws'], request['length']
  begun = time.perf_counter()
  noisy = tokens.repeat_interleave(draws, 0)
  targets = noisy[:, -length:].clone()
  masked = torch.rand(targets.shape) < torch.rand(len(targets), 1)
  noisy[:, -length:][masked] = mask_id
  logits = model(noisy).logits[:, -length:]
  logp = torch.log_softmax(logits.float(), -1)
  logp = torch.gather(logp, -1, targets[..., None])[..., 0]
  loss = -(logp * masked).sum() / masked.sum()
  loss.backward()
  torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
  optimizer.step()
  optimizer.zero_grad()
  return {'seconds': time.perf_counter() - begun}


def main():
  reference, folder = sys.argv[1:]
  answers, sys.stdout = sys.stdout, sys.stderr  # the reference may print
  model, module, mask_id = load(reference, folder)
  tokens = torch.from_numpy(np.load(pathlib.Path(folder) / 'prompts.npy')).long()
  whole = torch.from_numpy(np.load(pathlib.Path(folder) / 'rows.npy')).long()
  # As dear as any rate, and later cases still sample from the same weights.
  optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
  print(
    json.dumps({'torch': torch.__version__, 'threads': torch.get_num_threads()}),
    file=answers,
    flush=True,
  )
  for line in sys.stdin:
    request = json.loads(line)
    if request['what'] == 'train':
      answer = train(model, optimizer, mask_id, whole, request)
    elif request['cache'] == 'block':
      answer = sample_blocks(model, module, mask_id, tokens, request)
    else:
      answer = sample(model, module, mask_id, tokens, request)
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == '__main__':
  main()
