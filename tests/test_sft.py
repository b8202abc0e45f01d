"""Supervised training: files of texts, rows of tokens, their order, and the loss."""

import dataclasses
import functools
import json
import sys
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow
import pytest
from pyarrow import parquet
from tiny_run import fail_sft_at, interrupt, letters, rows, run, run_sft, same, tiny

from dmpo_jax import (
  build,
  check,
  config,
  data,
  dialogues,
  hf,
  lessons,
  masking,
  mesh,
  model,
  resume,
  step,
)  # fmt: skip
from dmpo_jax.phases import texts as phase_texts
from dmpo_jax.types import Canvas, Lesson, Masks

pytest_plugins = ('tiny_run',)

USER, BOT = {'role': 'user', 'content': 'Ab?'}, {'role': 'assistant', 'content': 'cd'}
MORE = {'role': 'user', 'content': 'e'}, {'role': 'assistant', 'content': 'fgh'}
TALK = [USER, BOT, *MORE]
# Rows in the formats of public files: chat (HuggingFaceH4/ultrachat_200k), trl's
# prompt-completion, GSM8K, s1K (simplescaling/s1K), ShareGPT.
S1K = {
  'solution': '3', 'question': 'How many?', 'cot_type': 'math', 'source_type': 'x',
  'thinking_trajectories': ['Count.\nThree.'], 'attempt': 'It is 3.',
}  # fmt: skip
ROWS = [
  ({'prompt_id': 'x', 'messages': TALK}, TALK),
  ({'prompt': 'Ab?', 'completion': 'cd'}, [USER, BOT]),
  ({'prompt': [USER], 'completion': [BOT]}, [USER, BOT]),
  ({'question': 'Ab?', 'answer': 'cd'}, [USER, BOT]),
  (
    {
      'conversations': [
        {'from': 'human', 'value': 'Ab?'},
        {'from': 'gpt', 'value': 'cd'},
      ]
    },
    [USER, BOT],
  ),
]


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def tokenizer(template='<|im_start|>'):
  """The character tokenizer with a family's chat template and its tokens."""
  made = data.char_tokenizer()
  ends = {'<|im_start|>': ['<|im_start|>', '<|im_end|>']}.get(
    template, ['<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>']
  )
  if template != '<|assistant|>':
    made.add_special_tokens({'additional_special_tokens': ends})
    made.bos_token = '<|pad|>'
  made.chat_template = data.TEMPLATES[template]
  return made


# --- files


def test_shapes_of_rows_are_read(tmp_path):
  """From JSONL and parquet; s1K as d1 trains on it."""
  table = pyarrow.Table.from_pylist([S1K])
  parquet.write_table(table, tmp_path / 'train.parquet')
  path = write(tmp_path / 'chat.jsonl', [row for row, _ in ROWS])
  found = list(dialogues.read(path))
  assert [one.messages for one in found] == [want for _, want in ROWS]
  assert found[2].where == f'{path}:3'
  (one,) = dialogues.read(str(tmp_path))
  asked, answer = (message['content'] for message in one.messages)
  assert asked.endswith('</answer>\n\n\nHow many?') and '<reasoning>' in asked
  assert answer == ('<reasoning>Count.\nThree.</reasoning>\n<answer>It is 3.</answer>')


@pytest.mark.parametrize(
  'row, named',
  [
    ({'text': 'a'}, 'columns are text.*messages; .*prompt, completion'),
    ({'prompt': 'a', 'completion': None}, 'columns are prompt, completion'),
    ({'prompt': 'a', 'completion': 3}, 'column completion must hold text'),
    ({'prompt': '\ud83d', 'completion': 'a'}, 'column prompt has .*half'),
    ({'messages': 'hello'}, 'column messages must be a list'),
    ({'messages': [USER, 'b']}, r'column messages\[1\] must have role and content'),
    ({'messages': [USER]}, 'column messages has no message of the assistant'),
    ({'messages': [{'role': 'bot', 'content': 'a'}]}, r'\[0\].role = .bot. must be'),
    ({'messages': [USER, {**BOT, 'content': ''}]}, r'messages\[1\].content must hold'),
    ({**S1K, 'thinking_trajectories': []}, r'thinking_trajectories\[0\] must hold'),
  ],
)
def test_wrong_rows_name_file_line_and_column(row, named, tmp_path):
  path = write(tmp_path / 'bad.jsonl', [ROWS[1][0], row])
  with pytest.raises(ValueError, match=f'bad.jsonl:2: .*{named}'):
    list(dialogues.read(path))


def test_names_of_the_hub(tmp_path, monkeypatch):
  """By the package datasets, which is named where it is missing."""
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(ValueError, match=r'pip install .dmpo_jax\[hub\]'):
    list(dialogues.read('owner/set'))
  with pytest.raises(ValueError, match='no such file'):
    list(dialogues.read(str(tmp_path / 'missing.jsonl')))

  def load(name, subset, split):
    if name != 'owner/set':
      raise RuntimeError('no such data set')
    return [{**ROWS[1][0], 'split': (subset, split)}]

  stand_in = python_types.SimpleNamespace(load_dataset=load)
  monkeypatch.setitem(sys.modules, 'datasets', stand_in)
  (one,) = dialogues.read('owner/set:main@test')
  assert one == dialogues.Dialogue('owner/set:main@test:1', [USER, BOT])
  with pytest.raises(ValueError, match='other.*hub.*no such data set'):
    list(dialogues.read('owner/other'))


# --- texts


def spoken(tok, text):
  """(what is learned, what is not) of a text, decoded."""
  ids, turn = np.array(text.ids), np.array(text.turn)
  return tok.decode(ids[turn > 0]), tok.decode(ids[turn == 0])


def texts(template, turns='all', block=0, grid='text'):
  tok = tokenizer(template)
  one = dialogues.Dialogue('f:1', TALK)
  return tok, lessons.texts_of(tok, one, turns, block, grid)


@pytest.mark.parametrize('template', list(data.TEMPLATES))
def test_answers_alone_are_learned(template):
  """With the end of the turn before EOS, one row an answer; the prompt is RL's."""
  tok, found = texts(template)
  end = {'<|assistant|>': ''}.get(template, tok.decode(data.turn_end(tok)))
  assert (end in ('<|im_end|>', '<|eot_id|>')) == bool(end)
  assert [spoken(tok, text)[0] for text in found] == [
    f'cd{end}<|eos|>', f'fgh{end}<|eos|>',
  ]  # fmt: skip
  first = np.array(found[0].ids)[np.array(found[0].turn) == 0]
  assert first.tolist() == data.encode_chat(tok, 'Ab?')
  assert texts(template, 'last')[1] == found[1:]
  targets, _ = data.encode_targets(['cd'], tok, 5)
  assert tok.decode(targets[0]).startswith(f'cd{end}<|eos|>')


def test_a_template_that_always_asks_for_an_answer():
  """LLaDA's own (GSAI-ML/LLaDA-8B-Instruct): a header follows every text, and is not
  learned."""
  tok = tokenizer('<|start_header_id|>')
  tok.chat_template = (
    '{% set loop_messages = messages %}{% for message in loop_messages %}'
    "{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    '{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}'
    '{{ content }}{% endfor %}'
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
  )
  found = lessons.texts_of(tok, dialogues.Dialogue('f:1', TALK), 'all', 4, 'text')
  assert [spoken(tok, text)[0] for text in found] == [
    'cd<|eot_id|>fgh<|eot_id|><|eos|>'
  ]


def test_block_models_have_all_answers_in_one_text():
  """Of the same tokens; not where blocks begin at the prompt's end, and not where the
  template rewrites earlier answers."""
  tok, (packed,) = texts('<|im_start|>', block=4)
  _, rows = texts('<|im_start|>')
  assert packed.ids == rows[1].ids
  assert spoken(tok, packed)[0] == 'cd<|im_end|>fgh<|im_end|><|eos|>'
  assert max(packed.turn) == 2
  _, apart = texts('<|im_start|>', block=4, grid='prompt')
  assert [text.ids for text in apart] == [text.ids for text in rows]
  for text in apart:
    assert (text.lead + text.turn.index(1)) % 4 == 0
  tok.chat_template = tok.chat_template.replace(
    '{{ message.content }}',
    "{% if loop.last and message.role == 'assistant' %}<x>{% endif %}"
    '{{ message.content }}',
  )
  one = dialogues.Dialogue('f:1', TALK)
  assert len(lessons.texts_of(tok, one, 'all', 4, 'text')) == 2
  with pytest.raises(ValueError, match='f:1.*chat template'):
    tok.chat_template = '{{ messages | length }}{{ messages[0].content }}'
    lessons.texts_of(tok, one, 'all', 0, 'text')


# --- rows

LONG = lessons.Text([5, 6, 7, 8, 9, 10], [0, 0, 1, 1, 1, 1], 'f:1')
SHORT = lessons.Text([5, 7, 2], [0, 1, 1], 'f:2')
EOS = 2


def test_overlong_texts():
  """Refused with line and remedy, left out, or cut: then nothing stands for the end."""
  how = lessons.Layout(4, eos=EOS)
  with pytest.raises(ValueError, match='sft.length = 4 .*f:1.* 6, or set sft.overlong'):
    lessons.fit([LONG, SHORT], how)
  drop = dataclasses.replace(how, overlong='drop')
  assert lessons.fit([LONG, SHORT], drop) == [SHORT]
  with pytest.raises(ValueError, match='leaves out every text'):
    lessons.fit([LONG], drop)
  for bucket, block, width in ((0, 0, 4), (3, 0, 6), (0, 8, 8)):
    cut = dataclasses.replace(how, overlong='cut', bucket=bucket, block=block)
    kept = lessons.fit([LONG, SHORT], cut)
    tokens, valid, copies = lessons.rows_of(kept[:1], cut)
    assert tokens.shape == (1, width) and tokens[0, :4].tolist() == [5, 6, 7, 8]
    assert np.flatnonzero(copies[0]).tolist() == [2, 3]
    assert valid[0].sum() == (8 if block else 4)
  prompt_only = dataclasses.replace(drop, length=2, overlong='cut')
  assert len(lessons.fit([LONG, SHORT], prompt_only)) == 1


def test_the_padding_of_a_row_depends_on_the_row_alone():
  """Filled with EOS to its own bucket and learned there; beyond it is nothing."""
  how = lessons.Layout(8, bucket=4, eos=EOS)
  alone = lessons.rows_of([SHORT], how)
  both = lessons.rows_of([SHORT, LONG], how)
  assert alone[0].shape == (1, 4) and both[0].shape == (2, 8)
  for a, b in zip(alone, both, strict=True):
    np.testing.assert_array_equal(a[0], b[0, :4])
    assert a.dtype == b.dtype
  assert not both[1][0, 4:].any() and not both[2][0, 4:].any()
  assert (both[0][0, 3:] == EOS).all() and alone[2][0].tolist() == [0, 1, 1, 1]
  bare = dataclasses.replace(how, fill=False)
  tokens, valid, copies = lessons.rows_of([SHORT], bare)
  assert valid[0].tolist() == [True] * 3 + [False]
  assert copies[0].tolist() == [0, 1, 1, 0]


# --- order


def order(counts, takes=None, sizes=None, batch=4, seed=3):
  ends = np.cumsum(counts)
  rows = [np.arange(end - n, end) for n, end in zip(counts, ends, strict=True)]
  sizes = np.zeros(sum(counts), int) if sizes is None else sizes
  return lessons.Order(tuple(rows), tuple(takes or counts), sizes, batch, seed)


def test_rows_are_seen_in_the_order_of_epochs():
  """As RL sees prompts; each row equally often, and each file as often as weighed."""
  plain = order([10])
  for update in (0, 1, 2, 3, 7):
    want = data.indices_at(update, 4, 10, 3)
    np.testing.assert_array_equal(plain.at(update), want)
  mixed = order([6, 10], [12, 5])  # twice the first file, half of the second
  assert mixed.count == 17
  seen = np.concatenate([mixed.epoch(epoch) for epoch in range(4)])
  assert np.bincount(seen).tolist() == [8] * 6 + [2] * 10
  made = lessons.Lessons(lambda index: (), mixed, np.arange(0))
  assert made.updates(0, 3) == 13 and made.updates(5, 0) == 5


def test_buckets_of_rows():
  """A batch has rows of nearly one size; every row comes as often as without."""
  sizes = np.random.default_rng(0).integers(1, 9, 50) * 8
  with_sizes, without = order([50], sizes=sizes), order([50])
  window = 50 // 4
  for many in (1, 3):
    updates = range(many * window)
    seen, want = (
      np.sort(np.concatenate([o.at(u) for u in updates])) for o in (with_sizes, without)
    )
    np.testing.assert_array_equal(seen, want)
  waste = lambda o: sum(np.ptp(sizes[o.at(u)]) for u in range(window))
  assert waste(with_sizes) < waste(without) / 3
  first = [sizes[with_sizes.at(u)].max() for u in range(window)]
  assert first != sorted(first)  # long and short batches are mixed
  again = order([50], sizes=sizes)
  np.testing.assert_array_equal(again.at(30), with_sizes.at(30))


def test_held_out_texts():
  """All rows of a dialogue are on one side; it is a share of the dialogues."""
  owner = np.repeat(np.arange(20), 3)
  held = lessons.take_out(owner, 0.1, 0)
  assert held.sum() == 6 and len(set(owner[held])) == 2
  assert not lessons.take_out(owner, 0.0, 0).any()
  assert lessons.take_out([0, 1], 0.01, 0).sum() == 1  # at least one
  with pytest.raises(ValueError, match='sft.held_out = 0.5 holds out all 1 texts'):
    lessons.take_out([0, 0], 0.5, 0)
  rows = np.arange(20, 25)
  made = lessons.Lessons(
    lambda index: (index[:, None], index[:, None] > 0, np.ones((len(index), 1), int)),
    order([20, 5]),
    rows,
  )
  first, last = made.held_out()
  assert first.tokens[:, 0].tolist() == [20, 21, 22, 23]
  assert last.learn[:, 0, 0].tolist() == [True, False, False, False]
  assert last.row.tolist() == [4, 5, 6, 7]


# --- the loss

W, L = 4, 16
CFG = model.ModelConfig(
  vocab=12, width=16, layers=2, heads=2, kv_heads=2, mlp=16, mask_id=0, eos_id=2,
  pad_id=1, block_causal=W,
)  # fmt: skip


def close(a, b, rtol=2e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, 1e-6), a, b)


def dialogue():
  """A text with three answers, of which two share the second block and the third."""
  turn = [0, 0, 1, 1, 1, 1, 0, 2, 2, 0, 3, 3, 3]
  ids = np.random.default_rng(1).integers(3, 12, len(turn)).tolist()
  return lessons.Text(ids, turn, 'f:1')


def lesson_of(text, how, copies=1):
  make = lambda index: lessons.rows_of([text], how)
  one = lessons.Lessons(make, order([1], batch=1), np.arange(0), copies)
  return one.at(0)


def test_answers_in_one_row_are_learned_as_if_each_had_its_own():
  """Losses and gradients, with the same masks: packed = turn by turn."""
  how = lessons.Layout(L, 4, block=W, eos=EOS)
  text = dialogue()
  copies = lessons.copies_of(text, how)
  assert copies.tolist() == [0, 0, 1, 1, 1, 1, 0, 2, 1, 0, 2, 2, 1]
  params = model.init(CFG, jax.random.key(0))
  packed = lesson_of(text, how, 2)
  draw = lambda k, canvas: masking.draw_sft(
    jax.random.fold_in(jax.random.key(5), k), packed.row, canvas
  )
  masks = jax.device_get(step.lesson_masks(CFG, packed, L, draw))
  text = lessons.filled(text, how)
  turn = np.array(text.turn)
  place = np.maximum(lessons.copies_of(text, how), 1) - 1

  def of_turn(number):
    """The row that ends with this answer, under the same masks of its tokens."""
    end = int(np.flatnonzero(turn == number)[-1]) + 1
    stop = -(-end // W) * W
    own = np.zeros((1, 1, stop), bool)
    own[0, 0, :stop] = turn[:stop] == number
    which, of_copy, weight = (
      x[..., :stop] for x in (place, masks.masked[0], masks.weight[0])
    )
    at = np.arange(stop)
    masked = of_copy[which, at][None, None] & own
    masked[0, 0, end:] = True  # the sampler's state: what follows is masked
    row = Lesson(packed.tokens[:, :stop], np.ones((1, stop), bool), own, packed.row)
    return row, Masks(masked, np.where(own, weight[which, at], 0.0))

  def whole(params):
    return jnp.sum(step.lesson_nll(CFG, params, packed, masks)[0])

  def apart(params):
    rows = [of_turn(number) for number in (1, 2, 3)]
    return sum(jnp.sum(step.lesson_nll(CFG, params, *row)[0]) for row in rows)

  got, want = (jax.jit(jax.value_and_grad(fn))(params) for fn in (whole, apart))
  assert float(got[0]) > 1
  close(got, want)


def test_a_step_of_adapters_on_rows_of_several_lengths():
  """The microbatches add up, padding beyond a row's own changes nothing, and rows or
  tokens count alike."""
  rows = [SHORT, LONG, SHORT, LONG._replace(whole=False)]
  how = lessons.Layout(L, 4, eos=EOS)
  sizes = [len(lessons.filled(row, how).ids) for row in rows]
  whole = dataclasses.replace(CFG, block_causal=0, layers=1)
  cfg = dataclasses.replace(whole, lora_rank=2, lora_alpha=4.0, lora_dropout=0.3)
  params = model.init(cfg, jax.random.key(0))
  frozen = {'params': params['params']}
  b = lambda path, x: x + 0.1 if path[-1].key == 'b' else x
  lora = {'lora': jax.tree_util.tree_map_with_path(b, params['lora'])}
  sgd = optax.sgd(1.0)

  def lesson(index):
    tokens, valid, copies = lessons.rows_of([rows[i] for i in index], how)
    return Lesson(tokens, valid, copies[:, None] == 1, np.int32(index))

  @functools.partial(jax.jit, static_argnames='setup')
  def run(trainable, frozen, lesson, setup):
    state = step.init_state(trainable, sgd)
    key = jax.random.key(7)
    new, numbers = step.sft_step(state, frozen, lesson, key, setup)
    return new.trainable, numbers

  setup, both = step.SftSetup(cfg, L, sgd), lesson([0, 1, 2, 3])
  assert sizes == [4, 8, 4, 6]
  learned = both.learn.sum((1, 2))
  alone = np.array([run(lora, frozen, lesson([i]), setup)[1]['loss'] for i in range(4)])
  close(run(lora, frozen, both, setup)[1]['loss'], alone.mean())
  by_token = dataclasses.replace(setup, by_token=True)
  one = run(lora, frozen, both, by_token)
  close(one[1]['loss'], np.sum(alone * learned) / learned.sum())
  close(one, run(lora, frozen, both, dataclasses.replace(by_token, microbatches=4)))
  # Adapters that add nothing have the loss of the base; and what they add is merged.
  zero, bare = {'lora': params['lora']}, dataclasses.replace(setup, cfg=whole)
  loss = run(frozen, {}, both, bare)[1]['loss']
  close(run(zero, frozen, both, setup)[1]['loss'], loss)
  merged = {'params': {**params['params'], 'layers': dict(params['params']['layers'])}}
  for name, ab in lora['lora']['layers'].items():
    old = merged['params']['layers'][name]
    kernel = model.merge(cfg, old['kernel'], ab['a'], ab['b'])
    merged['params']['layers'][name] = {**old, 'kernel': kernel}
  logits = lambda cfg, params: model.full_logits(cfg, params, both.tokens, both.valid)
  close(logits(cfg, {**frozen, **lora}), logits(whole, merged), 1e-4)


@pytest.mark.parametrize(
  'rates, chance',
  [
    (masking.Rates(), 0.5),
    (masking.Rates('uniform', 0.3, 0.8), 0.55),
    (masking.Rates('cosine'), 2 / np.pi),
    (masking.Rates('count'), 0.625),
  ],
  ids=str,
)
def test_laws_of_the_mask_rate(rates, chance):
  """How much is masked; each token's weighted mean is 1, so the sum is an ELBO."""
  free = np.array([[False, True, True, True, True, False]] * 20_000)
  canvas = Canvas(6, 0, free)
  masks = masking.draw_sft(jax.random.key(0), jnp.arange(20_000), canvas, rates)
  masked = np.asarray(masks.masked)[:, 0]
  assert not masked[~free].any()
  np.testing.assert_allclose(masked[:, 1:5].mean(), chance, atol=0.01)
  weight = np.broadcast_to(masks.weight[:, 0], masked.shape)
  np.testing.assert_allclose((masked * weight).mean(0)[1:5], 1, atol=0.06)


# --- runs


@pytest.fixture(scope='module')
def chat(tmp_path_factory):
  rows = [
    {'prompt': f'{i} + {j}?', 'completion': str(i + j) * (1 + i % 3)}
    for i in range(5)
    for j in range(4)
  ]
  return write(tmp_path_factory.mktemp('chat') / 'chat.jsonl', rows)


def configured(chat, **fields):
  c = tiny()
  more = {
    'sft.path': (chat,), 'sft.steps': 4, 'sft.length': 24, 'sft.bucket': 8,
    'sft.rank': 2, 'sft.alpha': 4.0, 'lora.rank': 2, 'lora.alpha': 4.0,
    'sft.warmup': 0, 'sft.lr': 0.05, 'train.iterations': 1, 'train.inner': 1,
  }  # fmt: skip
  config.update(c, {**more, **fields})
  return c


def built_of(c):
  made = build.build(c)
  return made._replace(task=made.task._replace(reward=letters))


def tuned(made, folder):
  """(what RL starts from, what it ends with) of a run."""
  base = made.steps.quantize(run_sft(made, folder))
  kept = jax.tree.map(np.asarray, mesh.fetch(base))
  return kept, run(made, folder, base), base


@pytest.mark.parametrize(
  'fields',
  [
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param(
      {'sft.merge': False, 'model.quantize': 'int8'}, marks=pytest.mark.long
    ),
  ],
  ids=['merged', 'int8'],
)
def test_supervised_training_then_rl_is_the_same_in_two_runs(fields, chat, tmp_path):
  """SFT -> RL -> export = SFT -> export -> RL -> export, to the bit."""
  start = configured(chat, **{'lora.rank': 0, 'sft.steps': 0, 'sft.rank': 0})
  source = build.build(start)
  first = str(tmp_path / 'first')
  hf.save_hf(first, source.model, source.steps.init(), source.tokenizer)
  sizes = dict.fromkeys((f'model.{name}' for name in config.SIZES), 0)
  fields = {**fields, **sizes}
  made = built_of(configured(chat, **{'model.checkpoint': first, **fields}))
  base, whole, on_device = tuned(made, tmp_path / 'one')
  goes_on = 'sft.merge' in fields
  assert ('lora' in base) == goes_on
  out = str(tmp_path / 'sft')
  hf.export(made, on_device, on_device, out, 'adapter' if goes_on else 'merged')
  again = {**sizes, 'sft.steps': 0, 'sft.rank': 0, 'model.checkpoint': out}
  if goes_on:
    again |= {'model.checkpoint': first, 'model.quantize': 'int8'}
    again |= {'lora.path': out, 'reference.of': (out,)}
  other = built_of(configured(chat, **again))
  start, end, _ = tuned(other, tmp_path / 'two')
  if goes_on:  # its adapter is lora.path
    assert jax.tree.structure(start) == jax.tree.structure({'params': base['params']})
  else:
    same(start, base)
  same(end, whole)
  assert any(np.any(x) for x in jax.tree.leaves(whole['lora']))
  names = ('logp_ref', 'loss', 'grad_norm', 'reward')
  for name in names:
    pairs = [rows(tmp_path / at) for at in ('one', 'two')]
    one, two = ([row.get(name) for row in x['rl'] + x['update']] for x in pairs)
    assert one == two
  # The reference of the first buffer is the tuned model: p_old = p_ref.
  (row,) = pairs[0]['rl']
  assert row['kl_ref'] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_used(chat, tmp_path):
  """By the loss of held-out texts; the same after an interruption; --of in a run of
  supervised training alone."""
  fields = {
    'sft.steps': 6, 'sft.held_out': 0.2, 'sft.every': 2, 'sft.lr': 0.02, 'sft.rank': 0,
    'checkpoint.keep': 1, 'train.iterations': 0, 'sft.decay': 'cosine',
    'sft.microbatches': 1,
  }  # fmt: skip
  made = build.build(configured(chat, **fields))
  losses = iter([3.0, 1.0, 2.0] * 3)
  real = made.steps.held_out
  seen = []

  def held_out(*args):
    nll, tokens = real(*args)
    seen.append(float(nll / tokens))
    return nll, tokens

  made = made._replace(steps=made.steps._replace(held_out=held_out))
  whole = run_sft(made, tmp_path / 'a')
  found = rows(tmp_path / 'a')
  assert [row['step'] for row in found['held_out']] == [2, 4, 6]
  best = min(found['held_out'], key=lambda row: row['held_out_nll'])['step']
  fake = lambda *args: (next(losses), 1)
  part = made._replace(steps=made.steps._replace(held_out=fake))
  at = tmp_path / 'b'
  params = run_sft(part, at)
  begin = lambda: made.steps.start_sft(params)
  state = resume.read_state(made, str(at / 'sft'), begin, 4)
  same(mesh.fetch(run_sft(part, at)), mesh.fetch(params))  # it is done, and read again
  same(mesh.fetch(params), mesh.fetch(state.trees['state'].trainable))
  assert resume.saved_updates(at, 'sft') == [4, 6]
  same(mesh.fetch(resume.base_of(made, at)), mesh.fetch(params))
  same(mesh.fetch(resume.base_of(made, at, True)), mesh.fetch(params))
  last = mesh.fetch(resume.base_of(made, at, False))
  pairs = zip(*map(jax.tree.leaves, (last, mesh.fetch(params))), strict=True)
  assert any(np.any(x != y) for x, y in pairs)
  broken, _ = fail_sft_at(made, 4, interrupt)
  with pytest.raises(KeyboardInterrupt):
    run_sft(broken, tmp_path / 'c')
  same(mesh.fetch(run_sft(broken, tmp_path / 'c')), mesh.fetch(whole))
  assert rows(tmp_path / 'c') == found
  assert best in (2, 4, 6) and len(seen) >= 3


def test_rules_of_supervised_training(chat):
  """Bad values, fields that do not fit together, and files that cannot be used."""

  def refused(fields, named, call=lambda c: check.config(c, 1)):
    with pytest.raises(ValueError, match=named):
      call(configured(chat, **fields))

  for fields, named in (
    ({'sft.epochs': 2}, 'sft.steps = 4 and sft.epochs = 2'),
    ({'sft.low': 0.9, 'sft.high': 0.5}, 'sft.low = 0.9 and sft.high = 0.5'),
    ({'sft.decay': 'cosin'}, "sft.decay .*did you mean 'cosine'"),
    ({'sft.weights': (1.0, 2.0)}, 'sft.weights .*a weight for each'),
    ({'sft.weights': (0.0,)}, 'sft.weights .*> 0'),
    ({'sft.microbatches': 3}, r'sft.batch = 8 .*sft.microbatches = 3'),
    ({'model.head_chunk': 16}, 'model.head_chunk = 16 must divide sft.bucket = 8'),
    ({'sft.merge': False, 'sft.rank': 4}, 'lora.rank = 2 must be sft.rank = 4'),
    ({'sft.merge': False, 'logprob.fuse': True}, 'logprob.fuse .*sft.merge = True'),
    ({'sft.held_out': 1.0}, r'sft.held_out = 1.0 must be in \[0, 1\)'),
    ({'lora.path': 'x'}, 'sft.steps = 4 would change the base'),
  ):
    refused(fields, named)
  bfloat = {'model.param_dtype': 'bfloat16'}
  refused({**bfloat, 'sft.rank': 0}, 'model.param_dtype .*sft.rank', check.training)
  check.training(configured(chat, **bfloat))
  check.training(configured(chat, **bfloat, **{'lora.rank': 0, 'train.iterations': 0}))
  lessons_of = lambda c: phase_texts.lessons_of(build.build(c, jax.devices()[:1]))
  refused({'sft.length': 9}, 'sft.length = 9 .*chat.jsonl:.*sft.overlong', lessons_of)
  refused({'sft.path': ('no.jsonl',)}, 'no.jsonl.*no such file', lessons_of)
  refused({'sft.length': 600, 'sft.bucket': 0}, 'exceed.*512 positions', lessons_of)
  refused({'sft.targets': 'zzz'}, "sft.targets = 'zzz' matches none", build.build)
  two = configured(chat, **{'sft.path': (chat, chat), 'sft.weights': (0.5, 2.0)})
  config.update(two, {'sft.epochs': 2, 'sft.steps': 0, 'sft.held_out': 0.1})
  found = lessons_of(two)
  taken = [len(found.order.files[k]) for k in (0, 1)]
  assert sum(taken) + len(found.held) == 40 and len(found.held) == 4
  takes = round(taken[0] / 2), taken[1] * 2
  assert found.order.takes == takes and found.updates(0, 2) == -(-2 * sum(takes) // 8)
  assert {found.at(u).tokens.shape[1] for u in range(10)} <= {8, 16, 24}


def test_the_tasks_solutions_at_a_length_of_their_own():
  """sft.length pads prompt and answer; a longer target is cut or left out."""
  c = tiny()
  c.sampler.length = c.sampler.block = 8
  c.sampler.steps = c.eval.sampler.length = c.eval.sampler.block = 8
  c.eval.sampler.steps = 8
  made = build.build(c, jax.devices()[:1])
  with pytest.raises(ValueError, match='sampler.length = 8 .*sft.overlong = cut'):
    phase_texts.lessons_of(made)
  c.sft.overlong = 'cut'
  eos, at = made.tokenizer.eos_token_id, np.arange(4)
  tokens = phase_texts.lessons_of(build.build(c, jax.devices()[:1])).make(at)[0]
  assert not (tokens[:, -8:] == eos).any()
  c.sft.length = 64
  tokens, valid, copies = phase_texts.lessons_of(
    build.build(c, jax.devices()[:1])
  ).make(at)
  assert tokens.shape == (4, 64) and valid.all()
  for row, learn in zip(tokens, copies, strict=True):
    answer = row[learn > 0].tolist()
    assert answer[16] == eos and eos not in answer[:16] and set(answer[16:]) == {eos}
