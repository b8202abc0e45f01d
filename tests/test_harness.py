"""The model of lm-evaluation-harness; a true run of it where it is installed.

Without it stand-ins take the place of the names that dmpo_jax/harness.py imports, for
what is ours: settings, batches, stop texts, and what the results state.
"""

import copy
import importlib
import importlib.util
import json
import sys
import types

import pytest

from dmpo_jax import conventions

THERE = importlib.util.find_spec('lm_eval') is not None
ARGS = {
  'batch_size': 8, 'draws': 4, 'length': 8, 'block': 8, 'steps': 8,
  'model.width': 16, 'model.layers': 1, 'model.heads': 2, 'model.kv_heads': 2,
  'model.mlp': 16,
}  # fmt: skip


class Model:
  """As lm_eval.api.model.TemplateLM begins."""

  def __init__(self):
    self.cache_hook = types.SimpleNamespace(add_partial=lambda *_: None)


@pytest.fixture(scope='module')
def harness():
  """The module, over lm_eval or its stand-in."""
  with pytest.MonkeyPatch.context() as patch:
    if not THERE:
      names = {
        'lm_eval': {'utils': None},
        'lm_eval.__main__': {'cli_evaluate': None},
        'lm_eval.api': {},
        'lm_eval.api.model': {'TemplateLM': Model},
        'lm_eval.api.registry': {'register_model': lambda name: lambda cls: cls},
      }
      for name, values in names.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        patch.setitem(sys.modules, name, module)
    yield importlib.import_module('dmpo_jax.harness')
  if not THERE:
    sys.modules.pop('dmpo_jax.harness')


@pytest.fixture(scope='module')
def lm(harness):
  return harness.Harness('base', **ARGS)


def asked(*args):
  return types.SimpleNamespace(args=args)


def test_generation_keeps_order_and_stops(lm):
  texts = ['one', 'the second is longer', 'three']
  plain = lm.model.generate(texts, seed=0, chat=False, **lm.law)
  kept = []
  hook = types.SimpleNamespace(add_partial=lambda *row: kept.append(row))
  lm = copy.copy(lm)
  lm.cache_hook = hook
  stop = plain[1][2]
  requests = [asked(text, {'until': [stop, ''], 'do_sample': False}) for text in texts]
  found = lm.generate_until(requests)
  clean = lm.tokenizer.all_special_tokens
  for text, whole in zip(found, plain, strict=True):
    wanted = whole.split(stop)[0]
    for token in clean:
      wanted = wanted.replace(token, '')
    assert text == wanted and stop not in text
  assert [row[:2] for row in kept] == [
    ('generate_until', request.args) for request in requests
  ]


def test_arguments_win_over_the_task_and_a_preset_over_both(lm, harness):
  task = {'max_gen_toks': 48, 'do_sample': True, 'temperature': 0.7, 'top_k': 5}
  assert lm.law_of(task).length == 8 and lm.law_of(task).temperature == 0.7
  lm = copy.copy(lm)
  lm.law = {}
  law = lm.law_of(task)
  assert (law.length, law.temperature, law.top_k) == (48, 0.7, 5)
  assert lm.law_of({**task, 'do_sample': False}).temperature == 0.0
  assert lm.law_of({}).length == harness.LENGTH
  lm.preset, lm.scored = 'd1', lm.model.law('d1')
  assert lm.law_of(task).length == conventions.sampler_of('d1')['length']


def test_likelihoods_are_those_of_the_model(lm):
  pairs = [([5, 6, 7], [20, 21]), ([8] * 40, [22, 23, 24])]
  requests = [(('a', 'b'), *pairs[0]), (None, *pairs[1])]
  found = lm._loglikelihood_tokens(requests)
  assert found == lm.model.logp_of(pairs, lm.scored, 0, by='elbo', draws=4)
  assert all(logp < 0 and not greedy for logp, greedy in found)
  # What is longer than the model loses its beginning, not the answer.
  long = [(None, [5] * 600, [20, 21])]
  canvas = 16
  short = [(None, [5] * (lm.max_length - canvas), [20, 21])]
  assert lm._loglikelihood_tokens(long) == lm._loglikelihood_tokens(short)


def test_results_state_how_they_came_about(lm):
  told = json.loads(json.dumps(lm.get_model_info()))
  assert told['loglikelihood'] == 'ELBO, 4 masked copies'
  assert told['sampler']['length'] == 8 and told['parameters'] == 'base'
  chat = lm.apply_chat_template([{'role': 'user', 'content': 'hello'}])
  assert 'hello' in chat and chat.endswith('<|assistant|>')


@pytest.mark.parametrize(
  'args, said',
  [
    ({}, 'checkpoint'),
    ({'checkpoint': 'base', 'lenght': 3}, 'lenght'),
    ({'checkpoint': 'base', 'preset': 'dreem'}, "'dream'"),
    ({'checkpoint': 'base', 'by': 'guess'}, 'likelihood.by'),
    ({'checkpoint': 'base', 'model.widht': 3}, 'model.width'),
  ],
)
def test_bad_arguments_are_one_sentence(harness, args, said):
  with pytest.raises(ValueError, match=said) as error:
    harness.Harness(**args)
  assert '\n' not in str(error.value)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  monkeypatch.delitem(sys.modules, 'dmpo_jax.harness', raising=False)
  with pytest.raises(ValueError, match=r'pip install "dmpo_jax\[eval\]"'):
    importlib.import_module('dmpo_jax.harness')


TASKS = {
  'own_gen': """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["7"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match}]
""",
  'own_choice': """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["1", "22", "none of them"]
doc_to_target: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
  'own_text': """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
""",
}


@pytest.mark.slow
def test_the_harness_runs_its_tasks(harness, tmp_path, monkeypatch):
  if not THERE:
    pytest.skip('lm_eval is not installed')
  import lm_eval
  from lm_eval.tasks import TaskManager

  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  rows = [{'question': f'{i} and {i}?', 'answer': str(2 * i)} for i in range(4)]
  data = tmp_path / 'data.jsonl'
  data.write_text(''.join(f'{json.dumps(row)}\n' for row in rows))
  for name, text in TASKS.items():
    head = f'task: {name}\ndataset_path: json\ntest_split: test\n'
    head += f'dataset_kwargs: {{data_files: {{test: {data}}}}}\n'
    (tmp_path / f'{name}.yaml').write_text(head + text)
  found = lm_eval.simple_evaluate(
    model='dmpo',
    model_args={'checkpoint': 'base', **ARGS},
    tasks=list(TASKS),
    task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    bootstrap_iters=0,
  )
  assert set(found['results']) == set(TASKS)
  assert found['results']['own_text']['byte_perplexity,none'] > 1
  assert 0 <= found['results']['own_choice']['acc,none'] <= 1
  assert found['config']['loglikelihood'] == 'ELBO, 4 masked copies'
  assert found['n-samples']['own_gen']['effective'] == 4
