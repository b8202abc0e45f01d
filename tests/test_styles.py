"""Every task in every prompt style under both protocols: its own answer is right.

A style whose right answer 'paper' does not pay in full is refused in training.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, llada_countdown, llada_sudoku
from dmpo_jax import build, check, data, evaluate, grader, types
from dmpo_jax.objectives import dmpo
from dmpo_jax.phases import texts
from dmpo_jax.tasks import TASKS, answers

EXAMPLES = {
  'sudoku': [{'puzzle': '0234341221434001', 'solution': '1234341221434321'}],
  'countdown': [
    {'numbers': [7, 3, 5], 'target': 22},
    {'numbers': [3, 3, 8, 8], 'target': 24},  # 8/(3-8/3)
  ],
  'gsm8k': [
    {'question': 'How many?', 'answer': 'Nine by 2 is <<9*2=18>>18.\n#### 18'},
    {'question': 'And now?', 'answer': 'It is more.\n#### 1072'},
  ],
  'math': [
    {'problem': 'Half?', 'solution': r'It is $\boxed{\frac{1}{2}}$.'},
    {'problem': 'Which?', 'solution': r'These: \[\boxed{(1, 2]}\]'},
  ],
}
# What is paid in full: every term of a form that the prompt asks for.
TAGGED = {
  ('gsm8k', 'strict'): 4.0,
  ('gsm8k', 'paper'): 3.5,  # its two formats exclude each other
  ('math', 'strict'): 3.0,
  ('math', 'paper'): 3.0,
}
UNTAGGED = {
  ('gsm8k', 'strict'): 2.5,
  ('math', 'strict'): 2.0,
  ('math', 'paper'): 2.5,  # half a format for the box
}


def examples_of(name):
  """Returns problems of a task; skips the test of a task that needs files."""
  if name in EXAMPLES:
    return EXAMPLES[name]
  try:
    return TASKS[name].load('train', types.TaskOptions())[:2]
  except ValueError as error:
    pytest.skip(f'{name} generates no problems, and EXAMPLES has none: {error}')


def configured(**changes):
  c = base.get_config()
  c.update_from_flattened_dict(changes)
  return c


TABLE = [
  (name, style, protocol)
  for name, task in TASKS.items()
  for style in task.styles
  for protocol in answers.PROTOCOLS
]


@pytest.mark.parametrize('name, style, protocol', TABLE)
def test_own_answers_are_right_and_paid_in_full(name, style, protocol):
  """Or training is refused, with the field and the remedy."""
  task, prefill = TASKS[name], answers.PREFILL.get(style, '')
  refused = protocol == 'paper' and style in task.unpaid
  c = configured(**{'data.task': name, 'data.style': style, 'data.protocol': protocol})
  if refused:
    with pytest.raises(ValueError, match=f'data.style = {style} .*set data.style = '):
      check.training(c)
  else:
    check.training(c)
  for example in examples_of(name):
    text = task.target(example, style)
    paid = sum(grader.prefilled(task, prefill).reward(text, example, protocol).values())
    full = (TAGGED if '<answer>' in text else UNTAGGED).get((name, protocol), 1.0)
    right = paid == full and task.grade(text, example, protocol) == 1
    assert right != refused, (text, paid)


@pytest.mark.parametrize('name, style', dict.fromkeys(row[:2] for row in TABLE))
def test_answers_have_the_form_that_the_prompt_asks_for(name, style):
  """With its tags and its box; what the prompt has begun is not begun again."""
  task, prefill = TASKS[name], answers.PREFILL.get(style, '')
  for example in examples_of(name):
    prompt, text = task.prompt(example, style), task.target(example, style)
    assert ('<answer>' in prompt) == ('<answer>' in text)
    if style != 'bare':
      assert ('\\boxed{' in prompt) == ('\\boxed{' in text.rpartition('<answer>')[2])
    whole = prefill + text
    assert whole.count('<reasoning>') == whole.count('</reasoning>') <= 1
    assert not prefill or not text.startswith(prefill)
    assert '<<' not in text


@pytest.mark.parametrize('name', TASKS)
def test_only_right_answers_are_paid_the_best(name):
  """`Task.best` is the pay of a right answer, ten times that of any other."""
  task = TASKS[name]
  if not task.best:
    return
  for example in examples_of(name):
    right = task.target(example, 'chat')
    wrong = ['', '<answer></answer>', right.replace('/', '-').replace('+', '-')]
    for protocol in answers.PROTOCOLS:
      assert sum(task.reward(right, example, protocol).values()) == task.best
      for text in wrong:
        paid = sum(task.reward(text, example, protocol).values())
        assert paid <= task.best / 10


@pytest.fixture
def built(tmp_path):
  """A model that is trained and evaluated with prefilled answers."""
  for split in ('train', 'test'):
    rows = [
      {'question': f'{split} {i}?', 'answer': f'So it is.\n#### {i}'}
      for i in range(1, 40)
    ]
    (tmp_path / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  return build.build(
    configured(
      **{
        'data.task': 'gsm8k',
        'data.path': str(tmp_path),
        'data.style': 'eval',
        'train.microbatches': 1,
        'sampler.length': 128,
        'sampler.block': 128,
        'sampler.steps': 128,
      }
    )
  )


def test_the_prefill_is_counted_once(built, monkeypatch):
  """In rewards of rollouts and of evaluations; supervised answers do not repeat it."""
  prompt = '<|assistant|>'
  tokens, valid = texts.canvas(built)
  eos = built.tokenizer.eos_token_id
  for row, real in zip(tokens, valid, strict=True):
    (text,) = data.decode(built.tokenizer, row[real][None], eos)
    answer = text.partition(prompt)[2]
    assert answer.startswith('<reasoning>\nSo it is.\n</reasoning>\n<answer>\n\\boxed{')
    assert answer.count('<reasoning>') == 1
  train = build.problems(built, 'train')
  example = train.examples[0]
  text = built.task.target(example, 'eval')
  collector = build.collector(built, {})
  (terms,) = collector.judge([text], [example], [0]).terms
  assert terms['strict_format'] == terms['soft_format'] == terms['xmlcount'] == 0.5
  (doubled,) = collector.judge(['<reasoning>' + text], [example], [0]).terms
  assert doubled['xmlcount'] < 0.5 and not doubled['soft_format']
  rows = [
    {'problem': 0, 'text': text, 'batch_forwards': 1, 'forwards': 1, 'order': [0]}
  ]
  monkeypatch.setattr(evaluate, 'generate', lambda *_: rows)
  test = build.problems(built, 'test')._replace(examples=[example])
  mean, samples = evaluate.accuracy(built, {}, test)
  assert mean['accuracy'] == 1 and mean['reward'] == 4
  assert samples[0]['completion'] == text  # as the model wrote it


def test_recipes_take_the_best_reward_from_the_task():
  """A reward that pays in parts scales no group down."""
  for name, task in TASKS.items():
    c = llada_countdown.llada()
    c.data.task = name
    assert llada_countdown.choose(c, 'ours').objective.best == task.best


def test_no_group_holds_most_of_a_sudoku_buffer():
  """Rewards are shares of cells that differ by little, as an 8B model's are."""
  c = llada_sudoku.get_config()
  hp = check.settings(dmpo.Config, c.objective)
  rng = np.random.default_rng(0)
  most = []
  for _ in range(50):  # buffers of 8 puzzles, with 12 % of the cells right
    cells = rng.integers(4, 11, (8, 1))
    reward = jnp.asarray(rng.binomial(cells, 0.12, (8, 16)) / cells, jnp.float32)
    zero = jnp.zeros_like(reward)
    weight, *_ = dmpo.weigh(types.Scored(reward, zero, zero, zero), hp)
    group = np.abs(weight).sum(1)
    most.append(group.max() / group.sum())
  assert np.mean(most) < 0.25
