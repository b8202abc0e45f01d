"""Tests tokenizers, padded prompts and the order of the data."""

import string

import numpy as np
import pytest

from dmpo_jax import data, types
from dmpo_jax.tasks import TASKS


@pytest.fixture(scope='module')
def tokenizer():
  return data.char_tokenizer()


def ids(tokenizer, text):
  return tokenizer(text, add_special_tokens=False)['input_ids']


@pytest.mark.smoke
def test_left_pad():
  """Ids stand on the right, padding on the left; an empty list is all padding."""
  tokens, valid = data.left_pad([[5, 6, 7], [], [8]], 4, 99)
  np.testing.assert_array_equal(tokens, [[99, 5, 6, 7], [99] * 4, [99, 99, 99, 8]])
  np.testing.assert_array_equal(valid, tokens != 99)
  assert tokens.dtype == np.int32 and valid.dtype == bool


@pytest.mark.smoke
def test_characters_round_trip(tokenizer):
  """Every printable ASCII character and the line feed is one token."""
  text = ''.join(chr(c) for c in range(32, 127)) + '\n'
  got = ids(tokenizer, text)
  assert len(got) == len(set(got)) == len(text) == 96
  assert tokenizer.decode(got) == text
  assert set(string.printable) - set(text) == set('\t\r\x0b\x0c')


def test_text_round_trip(tokenizer):
  """Spaces, doubled or at an end, and punctuation survive decoding."""
  text = "  a  b .\n\n \" x ' , \n n't  "
  assert tokenizer.decode(ids(tokenizer, text)) == text


def test_tags_and_specials_are_single_tokens(tokenizer):
  """Tags are one token each, also within text, and are no special tokens."""
  for tag in data.TAGS + data.SPECIAL:
    assert len(ids(tokenizer, tag)) == 1
  text = '<reasoning>ab</reasoning>\n<answer>12</answer>'
  got = ids(tokenizer, text)
  assert len(got) == 2 + 2 + 1 + 2 + 2
  assert tokenizer.decode(got, skip_special_tokens=True) == text
  named = (
    tokenizer.pad_token_id,
    tokenizer.mask_token_id,
    tokenizer.eos_token_id,
    tokenizer.unk_token_id,
  )
  assert sorted(named) == [0, 1, 2, 3]
  assert ids(tokenizer, 'é') == [tokenizer.unk_token_id]


def test_chat_template_ends_at_the_assistant(tokenizer):
  """The ids are the user tag, the text and the assistant tag."""
  got = data.encode_chat(tokenizer, '12 3')
  assert tokenizer.decode(got) == '<|user|>12 3<|assistant|>'
  assert len(got) == 6


def test_tokenizer_on_disk(tokenizer, tmp_path):
  """save_pretrained and load_tokenizer give the same tokenizer."""
  tokenizer.save_pretrained(tmp_path)
  loaded = data.load_tokenizer(str(tmp_path))
  text = '<answer>1 + 2</answer>  \n'
  assert len(loaded) == len(tokenizer)
  assert ids(loaded, text) == ids(tokenizer, text)
  assert loaded.decode(ids(loaded, text)) == text
  assert data.encode_chat(loaded, text) == data.encode_chat(tokenizer, text)
  assert loaded.mask_token_id == tokenizer.mask_token_id
  assert loaded.eos_token_id == tokenizer.eos_token_id


def test_unknown_tokenizer_is_refused():
  """A name that is neither 'char' nor a directory is never looked up."""
  with pytest.raises(ValueError, match="data.tokenizer = 'gpt2' must be"):
    data.load_tokenizer('gpt2')


# --- problems


EXAMPLES = [{'n': i} for i in range(3)]
TEXTS = ['1', '123', '12']


def encode(tokenizer, **how):
  return data.encode_problems(EXAMPLES, TEXTS, tokenizer, data.PromptOptions(**how))


def test_problems_are_left_padded(tokenizer):
  """Length 0 means the longest prompt's; every row ends at the assistant."""
  found = encode(tokenizer)
  assert found.tokens.shape == (3, 5)
  np.testing.assert_array_equal(found.valid.sum(1), [3, 5, 4])
  assert (found.tokens[~found.valid] == tokenizer.pad_token_id).all()
  for row, text in enumerate(TEXTS):
    real = found.tokens[row][found.valid[row]]
    np.testing.assert_array_equal(real, data.encode_chat(tokenizer, text))
    assert found.valid[row, -1]


def test_prompt_length_and_attended_padding(tokenizer):
  """A larger prompt_length pads more; attend_padding makes padding valid."""
  found = encode(tokenizer, prompt_length=9)
  assert found.tokens.shape == (3, 9)
  np.testing.assert_array_equal(found.valid.sum(1), [3, 5, 4])
  attended = encode(tokenizer, prompt_length=9, attend_padding=True)
  np.testing.assert_array_equal(attended.tokens, found.tokens)
  assert attended.valid.all()


def test_impossible_problems_are_refused(tokenizer):
  """The errors for a long prompt, no problems and too few positions name the field."""
  with pytest.raises(ValueError, match='data.prompt_length = 4 .* 1 of 3 .*5'):
    encode(tokenizer, prompt_length=4)
  with pytest.raises(ValueError, match='empty: data.path'):
    data.encode_problems([], [], tokenizer)
  found = encode(tokenizer)
  data.check_positions(found, {'sampler.length': 5}, 10)
  with pytest.raises(ValueError, match='eval.sampler.length = 6 exceed .* 10'):
    data.check_positions(found, {'eval.sampler.length': 6}, 10)


def test_overlong_prompts(tokenizer, caplog):
  """'cut' keeps a prompt's end, 'drop' drops the problem; both are counted."""
  whole = encode(tokenizer)
  lengths = whole.valid.sum(1)
  limit = int(lengths.max()) - 1
  cut = encode(tokenizer, prompt_length=limit, overlong='cut')
  np.testing.assert_array_equal(cut.tokens, whole.tokens[:, 1:])
  np.testing.assert_array_equal(cut.valid.sum(1), np.minimum(lengths, limit))
  dropped = encode(tokenizer, prompt_length=limit, overlong='drop')
  kept = np.flatnonzero(lengths <= limit)
  assert whole.changed == 0 and cut.changed == dropped.changed == 3 - len(kept)
  assert dropped.examples == [EXAMPLES[i] for i in kept]
  np.testing.assert_array_equal(dropped.tokens, whole.tokens[kept, 1:])
  with pytest.raises(ValueError, match='data.prompt_length = 1 drops all 3'):
    encode(tokenizer, prompt_length=1, overlong='drop')


@pytest.mark.parametrize('style, prefill', [('bare', ''), ('eval', '<reasoning>')])
def test_load_problems(tokenizer, style, prefill):
  """Prompts are the task's in the wanted style, with the assistant's prefill."""
  options = types.TaskOptions(test_size=4)
  how = data.PromptOptions(style=style)
  task = TASKS['countdown']
  found = data.load_problems(task, 'test', tokenizer, options, how)
  assert found.examples == task.load('test', options)
  for example, tokens, valid in zip(*found[:3], strict=True):
    text = tokenizer.decode(tokens[valid])
    assert text == f'<|user|>{task.prompt(example, style)}<|assistant|>{prefill}'


def test_templates_replace_the_fields_of_a_problem(tmp_path):
  """Other braces stay; a template without a field is refused."""
  path = tmp_path / 'template.txt'
  path.write_text('{n} and {n} of {m}, {not} {{}}')
  texts = data.fill_template(str(path), [{'n': 1, 'm': [2, 3]}, {'n': 4, 'm': 5}])
  assert texts == ['1 and 1 of [2, 3], {not} {{}}', '4 and 4 of 5, {not} {{}}']
  path.write_text('{n}')  # a problem's text is not a template
  assert data.fill_template(str(path), [{'n': '{m}?', 'm': 'secret'}]) == ['{m}?']
  path.write_text('no field')
  with pytest.raises(ValueError, match='template.txt .*use {n}, {m}'):
    data.fill_template(str(path), [{'n': 1, 'm': 2}])


# --- order


def test_every_problem_once_per_epoch():
  """Epochs are permutations, joined end to end, also within a batch."""
  count, batch = 7, 3
  places = np.concatenate([data.indices_at(i, batch, count, 5) for i in range(14)])
  epochs = places.reshape(-1, count)
  assert len(epochs) == 6
  for epoch in epochs:
    assert sorted(epoch) == list(range(count))
  assert len({tuple(epoch) for epoch in epochs}) > 1


def test_position_is_a_function_of_the_step():
  """The prompts of a step do not depend on earlier calls."""
  first = data.indices_at(9, 3, 7, 5)
  for step in (2, 30, 0):
    data.indices_at(step, 3, 7, 5)
  data.permutation.cache_clear()
  np.testing.assert_array_equal(data.indices_at(9, 3, 7, 5), first)
  # One step of six equals two steps of three, so no call draws anything.
  np.testing.assert_array_equal(
    data.indices_at(4, 6, 7, 5),
    np.concatenate([data.indices_at(i, 3, 7, 5) for i in (8, 9)]),
  )
  assert not np.array_equal(data.indices_at(0, 7, 7, 5), data.indices_at(0, 7, 7, 6))


def test_prompts_at(tokenizer):
  """Returns rows of the data set with their index; a batch may exceed the set."""
  found = encode(tokenizer)
  prompts = data.prompts_at(found, 1, 4, 0)
  assert prompts.index.shape == (4,) and prompts.index.dtype == np.int32
  np.testing.assert_array_equal(prompts.tokens, found.tokens[prompts.index])
  np.testing.assert_array_equal(prompts.valid, found.valid[prompts.index])


def test_buckets_cut_padding_only(tokenizer):
  """P of a batch is the next multiple, never less than its longest prompt."""
  found = encode(tokenizer, prompt_length=9)
  for step in range(4):
    whole = data.prompts_at(found, step, 1, 0)
    short = data.prompts_at(found, step, 1, 0, bucket=4)
    length = short.tokens.shape[1]
    assert length == {3: 4, 4: 4, 5: 8}[int(whole.valid.sum())]
    np.testing.assert_array_equal(short.tokens, whole.tokens[:, -length:])
    assert short.valid.sum() == whole.valid.sum()
    np.testing.assert_array_equal(short.index, whole.index)
  assert data.bucketed(np.ones((2, 9), bool), 4) == 9  # no wider than P


# --- completions


def test_targets_end_in_eos(tokenizer):
  """The tail is all EOS; a full-length target has none."""
  got, _ = data.encode_targets(['12', '1234', ''], tokenizer, 4)
  eos = tokenizer.eos_token_id
  assert got.shape == (3, 4) and got.dtype == np.int32
  np.testing.assert_array_equal((got == eos).sum(1), [2, 0, 4])
  assert data.decode(tokenizer, got, eos) == ['12', '1234', '']
  with pytest.raises(ValueError, match="sampler.length = 3 .*'1234'.* 4"):
    data.encode_targets(['12', '1234'], tokenizer, 3)


@pytest.mark.parametrize('text', ['a<|mask|>b', 'a<|eos|>b', '<|mask|>', 'a<|pad|>'])
def test_special_tokens_of_a_target_are_text(tokenizer, text):
  """What a sampler cannot emit, or what would end the answer, is spelt out."""
  got, _ = data.encode_targets([text], tokenizer, 16)
  assert tokenizer.mask_token_id not in got
  assert data.decode(tokenizer, got, data.stop_ids(tokenizer)) == [text]
  ended, _ = data.encode_targets(['ab<|eos|>'], tokenizer, 4)
  np.testing.assert_array_equal(ended, data.encode_targets(['ab'], tokenizer, 4)[0])


def test_decode_stops_at_the_first_eos(tokenizer):
  """Text after it is dropped; other special tokens stay visible."""
  eos = tokenizer.eos_token_id
  a, b = ids(tokenizer, 'ab')
  rows = np.array([[a, eos, b, eos], [eos, a, b, a], [a, tokenizer.pad_token_id, b, a]])
  assert data.decode(tokenizer, rows, eos) == ['a', '', 'a<|pad|>ba']
  assert data.decode(tokenizer, rows, (eos, b)) == ['a', '', 'a<|pad|>']
