"""The PyTorch side of `peer`: a worker that answers requests on stdin.

Imports the reference from a folder with generate.py, modeling_llada.py and
configuration_llada.py (fast_samplers/fast_dllm of the DMPO release); needs
torch and the transformers that it was written for (4.49), and no JAX.
"""

import importlib
import json
import pathlib
import sys
import time

import numpy as np
import torch
from safetensors.torch import load_file

# The reference's functions for our names of caches.
GENERATE = {
  'none': 'generate_pd',
  'prefix': 'generate_with_prefix_cache',
  'dual': 'generate_with_dual_cache',
}


def load(reference, folder):
  """(the model with the weights of a LLaDA directory, module of samplers)."""
  reference = pathlib.Path(reference).resolve()
  sys.path.insert(0, str(reference.parent))
  part = lambda name: importlib.import_module(f'{reference.name}.{name}')
  fields = json.loads((pathlib.Path(folder) / 'config.json').read_text())
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
  model, module, mask_id = load(reference, folder)
  tokens = torch.from_numpy(np.load(pathlib.Path(folder) / 'prompts.npy')).long()
  whole = torch.from_numpy(np.load(pathlib.Path(folder) / 'rows.npy')).long()
  # As dear as any rate, and later cases still sample from the same weights.
  optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
  print(
    json.dumps({'torch': torch.__version__, 'threads': torch.get_num_threads()}),
    flush=True,
  )
  for line in sys.stdin:
    request = json.loads(line)
    if request['what'] == 'train':
      answer = train(model, optimizer, mask_id, whole, request)
    else:
      answer = sample(model, module, mask_id, tokens, request)
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()
