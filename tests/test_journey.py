"""One user's way through the project, by the commands of the documentation.

An autoregressive directory -> a diffusion model by supervised training on a file of
chats -> DMPO with a reward function of the user's -> evaluation, and the tasks of
lm-evaluation-harness where it is installed -> an exported adapter that loads again.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import autoregressive
import pytest

ROOT = pathlib.Path(__file__).parents[1]
WORDS = ('red', 'blue', 'green', 'white')
REWARD = '''
def short(prompts, completions, answer, **columns):
  """Pays the wanted first letter, and little text."""
  return [
    (text[:1] == want[:1]) - len(text) / 100
    for text, want in zip(completions, answer, strict=True)
  ]
'''
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: eval.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""
SMALL = (
  '--config.train.prompts=2', '--config.train.group=4', '--config.train.inner=1',
  '--config.train.microbatches=1', '--config.train.iterations=2', '--config.mesh.cpu=1',
  '--config.model.head_chunk=0',
  '--config.sampler.length=8', '--config.sampler.block=4', '--config.sampler.steps=8',
  '--config.eval.sampler.length=8', '--config.eval.sampler.block=4',
  '--config.eval.sampler.steps=8', '--config.eval.batch=4', '--config.data.test_size=4',
  '--config.data.validation_size=4',
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
  """A folder of a user: a checkpoint, chats, problems, a reward, a task."""
  autoregressive.write(tmp_path / 'qwen3', 'qwen3')
  asked = [f'Say {word} please' for word in WORDS]
  lines = {
    'chats.jsonl': [
      {'messages': [
        {'role': 'user', 'content': question}, {'role': 'assistant', 'content': word},
      ]}
      for question, word in zip(asked, WORDS, strict=True)
    ] * 2,
    'problems.jsonl': [
      {'question': f'{question} {n}', 'answer': word}
      for n in range(8)
      for question, word in zip(asked, WORDS, strict=True)
    ],
    'eval.jsonl': [
      {'question': question, 'answer': word}
      for question, word in zip(asked, WORDS, strict=True)
    ],
  }  # fmt: skip
  for name, rows in lines.items():
    (tmp_path / name).write_text(''.join(json.dumps(row) + '\n' for row in rows))
  (tmp_path / 'my_reward.py').write_text(REWARD)
  (tmp_path / 'colours.yaml').write_text(TASK)
  return tmp_path


def run(folder, *command):
  """Runs `python ...` in the folder; returns what it printed."""
  done = subprocess.run(
    [sys.executable, *command],
    cwd=folder,
    env={name: x for name, x in os.environ.items() if name != 'XLA_FLAGS'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert not done.returncode, done.stdout + done.stderr
  return done.stdout


def generations(folder):
  (path,) = folder.rglob('*_0_generations.json')
  found = json.loads(path.read_text())['generations']
  return [item['generations'] for item in found]


@pytest.mark.slow
@pytest.mark.long
def test_from_an_autoregressive_model_to_a_published_adapter(folder):
  main = str(ROOT / 'main.py')
  base = ('--config.model.checkpoint=qwen3', '--config.data.task=prompts:exact')
  data = '--config.data.path=problems.jsonl'
  run(
    *(folder, main, '--config=a2d_qwen3:masked', *base, data, *SMALL),
    *('--mode=sft', '--workdir=sft', "--config.sft.path=('chats.jsonl',)"),
    *('--config.sft.steps=3', '--config.sft.batch=4', '--config.sft.microbatches=1'),
    *('--config.sft.length=128', '--config.sft.bucket=0', '--config.sft.warmup=0'),
    *('--config.data.style=chat',),
  )
  run(folder, main, '--mode=export', '--of=base', '--workdir=sft', '--out=a2d')
  written = json.loads((folder / 'a2d/config.json').read_text())
  assert written['model_type'] == 'a2d-qwen3' and 'mask_token_id' in written
  how = (
    *('--config=base', '--config.model.checkpoint=a2d'),
    *('--config.data.task=prompts:exact', data, *SMALL),
  )
  said = run(
    *(folder, main, *how, '--config.reward.file=my_reward.py:short'),
    *('--config.lora.rank=2', '--config.optim.lr=0.1', '--workdir=rl'),
  )
  assert re.search(r'--mode=eval', said)
  rows = map(json.loads, (folder / 'rl/metrics.jsonl').read_text().splitlines())
  assert all('reward/short' in row for row in rows if row['phase'] == 'rl')
  run(folder, main, '--workdir=rl', '--mode=eval', '--out=mine')
  export = (main, '--workdir=rl', '--mode=export', '--format=adapter', '--out=adapter')
  report = json.loads(run(folder, *export).splitlines()[-1])
  assert report['max_logit_difference'] < 1e-4
  run(
    *(folder, main, *how, '--mode=eval', '--out=theirs', '--workdir=none'),
    *('--config.lora.rank=2', '--config.lora.path=adapter'),
    '--config.reward.file=my_reward.py:short',
  )
  answers = generations(folder / 'mine')
  assert answers == generations(folder / 'theirs') and len(answers) == 4
  if importlib.util.find_spec('lm_eval'):
    run(
      *(folder, '-m', 'dmpo_jax.harness', '--model', 'dmpo', '--tasks', 'colours'),
      *('--include_path', '.', '--model_args', 'checkpoint=rl,block=4,steps=8'),
      *('--batch_size', '4', '--output_path', 'results', '--log_samples'),
    )
    (path,) = folder.rglob('results_*.json')
    assert 'colours' in json.loads(path.read_text())['results']
