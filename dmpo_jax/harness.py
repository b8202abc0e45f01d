"""lm-evaluation-harness on any model of ours: its tasks, its code, its tables.

  python -m dmpo_jax.harness --model dmpo --tasks gsm8k --apply_chat_template \
      --model_args checkpoint=GSAI-ML/LLaDA-8B-Instruct,preset=llada,dtype=bfloat16

hands on to `lm_eval` with the model `dmpo` registered. In Python, importing this module
does the same: lm_eval.simple_evaluate(model='dmpo', ...) or model=Harness(...).

The harness asks for two things. `generate_until` samples with the preset and the
sampler fields of --model_args. Where neither is given, max_gen_toks, temperature, top_p
and top_k are the task's. `loglikelihood` is an ELBO or the log-prob along the greedy
trajectory (likelihood.py). The results' config states which.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging

try:
  from lm_eval import utils  # pyright: ignore
  from lm_eval.__main__ import cli_evaluate  # pyright: ignore
  from lm_eval.api.model import TemplateLM  # pyright: ignore
  from lm_eval.api.registry import register_model  # pyright: ignore
except ImportError as error:
  missing = f'lm-evaluation-harness is missing ({error}): pip install "dmpo_jax[eval]"'
  if __name__ == '__main__':
    sys.exit(f'error: {missing}')
  raise ValueError(missing) from error

from dmpo_jax import api, conventions, likelihood, loaded, runner
from dmpo_jax.sampler import SampleConfig

DRAWS = 128  # masked copies of an ELBO where no preset says another number: LLaDA's
LENGTH = 256  # tokens of a completion where neither the task nor an argument says it
LAW = tuple(SampleConfig.__dataclass_fields__)


@register_model('dmpo')
class Harness(TemplateLM):
  """A model of ours, as lm-evaluation-harness calls it.

  checkpoint: a directory, a hub name, a workdir or a config, as dj.load takes it. of:
  latest | best | base of a workdir. preset: a name in conventions.py. by: elbo |
  trajectory; draws: masked copies of the ELBO. seed: of random draws. batch_size: rows
  of a forward; auto = the config's. dtype: float32 | bfloat16, of weights and products.
  Further arguments are fields of the sampler (length=512) or of the config
  (model.quantize=int8).
  """

  def __init__(
    self,
    checkpoint: str = '',
    preset: str = '',
    batch_size: int | str = 'auto',
    by: str = 'elbo',
    seed: int = 0,
    **more: Any,
  ):
    super().__init__()
    if not checkpoint:
      raise ValueError('--model_args needs checkpoint=DIR, a hub name or a workdir')
    more = {
      name: x for name, x in more.items() if name not in ('device', 'max_batch_size')
    }
    self.preset, self.seed = preset, int(seed)
    self.law = {name: more.pop(name) for name in LAW if name in more}
    published = conventions.preset_of(preset).draws if preset else 0
    self.how = loaded.likelihood_of(by=by, draws=more.pop('draws', published or DRAWS))
    of, dtype = more.pop('of', ''), more.pop('dtype', '')
    overrides: dict[str, Any] = {'model.dtype': dtype, 'model.param_dtype': dtype}
    overrides = overrides if dtype else {}
    if unknown := [name for name in more if '.' not in name]:
      raise ValueError(
        f'--model_args: {", ".join(unknown)}: no argument of the model, and no field '
        f'of the sampler ({", ".join(LAW)}) or of the config (section.field)'
      )
    runner.share_gpu()
    if batch_size != 'auto':
      devices = jax.device_count()
      overrides['eval.batch'] = -(-int(batch_size) // devices) * devices
    self.model = api.load(checkpoint, of, overrides | more)
    self.checkpoint, self.tokenizer = checkpoint, self.model.built.tokenizer
    self.scored = self.model.law(preset, **self.law)

  # --- what the harness asks

  def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
    """Returns completions, cut at the first of each request's stop texts."""
    groups: dict[SampleConfig, list[int]] = {}
    for at, request in enumerate(requests):
      groups.setdefault(self.law_of(request.args[1]), []).append(at)
    found: dict[int, str] = {}
    for law, places in groups.items():
      texts = [requests[at].args[0] for at in places]
      rows = self.model.complete(texts, law, 1, self.seed, False)
      for at, (row,) in zip(places, rows, strict=True):
        found[at] = self.cut(row['text'], requests[at].args[1].get('until') or ())
        self.cache_hook.add_partial('generate_until', requests[at].args, found[at])
    return [found[at] for at in range(len(requests))]

  def _loglikelihood_tokens(
    self, requests: Sequence, disable_tqdm: bool = False, **_: Any
  ) -> list[tuple[float, bool]]:
    cfg, cut, pairs = self.model.built.model, 0, []
    for _, context, text in requests:
      canvas = likelihood.canvas_length(cfg, self.scored, -1, len(text))
      over = max(0, len(context) + canvas - cfg.positions)
      cut += over > 0
      pairs.append((context[over:], text))
    if cut:
      logging.warning(
        '%d contexts are cut on the left to the %d positions', cut, cfg.positions
      )
    how = {'by': self.how.by, 'draws': self.how.draws}
    found = self.model.logp_of(pairs, self.scored, self.seed, **how)
    for (texts, _, _), answer in zip(requests, found, strict=True):
      if texts is not None:
        self.cache_hook.add_partial('loglikelihood', texts, answer)
    return found

  def loglikelihood_rolling(
    self, requests: Sequence, disable_tqdm: bool = False
  ) -> list[float]:
    """Returns the log-likelihoods of texts, in windows of the model's positions."""
    cfg, owner, windows = self.model.built.model, [], []
    unit = likelihood.unit_of(cfg, self.scored, cfg.positions)
    longest = (cfg.positions - 1) // unit * unit - cfg.block_causal
    for at, request in enumerate(requests):
      cut = utils.get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=longest,
        context_len=1,
      )
      pairs = [(None, *pair) for pair in map(utils.make_disjoint_window, cut)]
      windows += pairs
      owner += [at] * len(pairs)
    found = [0.0] * len(requests)
    for at, (logp, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
      found[at] += logp
    return found

  # --- settings of a request

  def law_of(self, asked: dict[str, Any]) -> SampleConfig:
    """Returns the sampler of a request.

    The preset and the arguments say all; without them the task's own words count.
    """
    if self.preset:
      return self.scored
    fields: dict[str, Any] = {'length': int(asked.get('max_gen_toks', LENGTH))}
    if not asked.get('do_sample', True):
      fields['temperature'] = 0.0
    elif 'temperature' in asked:
      fields['temperature'] = float(asked['temperature'])
    if fields.get('temperature'):
      fields |= {name: asked[name] for name in ('top_p', 'top_k') if asked.get(name)}
    fields |= self.law
    if 'length' not in self.law and 'block' not in self.law:
      unit = self.model.built.model.block_causal or 1
      fields['length'] = -(-fields['length'] // unit) * unit
    return self.model.law(**fields)

  def cut(self, text: str, until: str | Sequence[str]) -> str:
    """Returns a text before the first stop text, without special tokens."""
    for stop in [until] if isinstance(until, str) else until:
      text = text.split(stop)[0] if stop else text
    for token in self.tokenizer.all_special_tokens:
      text = text.replace(token, '')
    return text

  # --- tokens

  @property
  def eot_token_id(self) -> int:
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self) -> int:
    """What a text without a context follows: the beginning of text, else EOS."""
    start = self.tokenizer.bos_token_id
    return self.eot_token_id if start is None else start

  @property
  def max_length(self) -> int:
    return self.model.built.model.positions

  @property
  def tokenizer_name(self) -> str:
    return str(self.tokenizer.name_or_path).replace('/', '__')

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **_: Any
  ) -> list[int]:
    """Returns ids; None adds special tokens, unless the text begins with one."""
    if add_special_tokens is None:
      return loaded.encode(self.tokenizer, string, False)
    return self.tokenizer(string, add_special_tokens=add_special_tokens)['input_ids']

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """Returns a chat as text, up to where the assistant begins."""
    return self.tokenizer.apply_chat_template(
      chat_history,
      tokenize=False,
      add_generation_prompt=add_generation_prompt,
      continue_final_message=not add_generation_prompt,
    )

  def get_model_info(self) -> dict[str, Any]:
    """Returns what the harness writes into the results' config."""
    by = 'exact, along the greedy trajectory'
    if self.how.by == 'elbo':
      by = f'ELBO, {self.how.draws} masked copies'
    return {
      'checkpoint': self.checkpoint,
      'parameters': self.model.name,
      'preset': self.preset or 'none',
      'loglikelihood': by,
      'sampler': dict(vars(self.scored)),
      'dtype': self.model.config.model.dtype,
      'quantize': self.model.config.model.quantize,
    }


def main() -> None:
  """Runs the command line of lm-evaluation-harness; bad input ends in one sentence."""
  try:
    cli_evaluate()
  except ValueError as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
