"""Tests the grading of saved generations: the files of d1, and others of its format."""

import json

import pytest

from dmpo_jax.tasks import TASKS, answers
from dmpo_jax.tools import cards, saved

GRID = '1234341221434321'
PUZZLE = '0234341221434001'
# As in eval/eval_baselines of github.com/dllm-reasoning/d1: the prompt ends with
# <reasoning>, and the text runs on in special tokens.
END = '<|eot_id|>' + '<|endoftext|>' * 3
D1 = {
  'question': 'Two and two?',
  'generations': '\nTwo.\n</reasoning>\n<answer>\n\\boxed{4}\n</answer>\n' + END,
  'ground_truth': 4.0,
}


def write(path, *items, **header):
  path.write_text(json.dumps({'generations': list(items), **header}))
  return str(path)


def test_special_tokens_at_the_end_are_cut(tmp_path):
  """Strict grades and rewards read the text as our own are read, and its prefill."""
  item = {'question': PUZZLE, 'ground_truth': GRID}
  for end in (END, '<|im_end|>', '</s>', '<|pad|>\n[PAD]', '<|eot_id|> and more', ''):
    path = write(tmp_path / 'x.json', {**item, 'generations': GRID + end})
    made = cards.score_file('sudoku', 'strict', path)
    assert (made['accuracy'], made['cell_accuracy']) == (1, 1)
  made = cards.score_file('gsm8k', 'strict', write(tmp_path / 'x.json', D1))
  assert made['accuracy'] == 1 and made['reward'] == 4
  # A text that opens its own tag, or has none, is not given one.
  for text in ('<reasoning>x</reasoning><answer>4</answer>', '<answer>4</answer>'):
    path = write(tmp_path / 'x.json', {**D1, 'generations': text})
    expected = TASKS['gsm8k'].reward(text, {'answer': '#### 4'}, 'strict')
    assert cards.score_file('gsm8k', 'strict', path)['terms'] == expected


def test_paper_grades_read_the_whole_text(tmp_path):
  """As d1's parser does: an end token closes an answer, and spoils an expression."""
  item = {
    'question': PUZZLE,
    'generations': '<answer>12 34 34 12 21 43 43 21<|eot_id|>',
  }
  path = write(tmp_path / 'x.json', {**item, 'ground_truth': GRID})
  assert cards.score_file('sudoku', 'paper', path)['accuracy'] == 1
  item = {'question': '', 'generations': '7+3*5', 'ground_truth': [[7, 3, 5], 22.0]}
  for text, right in (('7+3*5', 1), ('7+3*5' + END, 0)):
    path = write(tmp_path / 'x.json', {**item, 'generations': text})
    assert cards.score_file('countdown', 'paper', path)['accuracy'] == right


@pytest.mark.parametrize(
  'text, want',
  [
    ('a<|eot_id|><|endoftext|>', 'a'),
    ('a\n<|im_end|>\n', 'a\n'),
    ('a<|endoftext|>b', 'a'),
    ('a <|mdm_mask|> b<|pad|>', 'a <|mdm_mask|> b'),
    ('a</s></s>', 'a'),
    ('a [MASK][PAD]', 'a '),
    ('x < |y| > z', 'x < |y| > z'),
    ('', ''),
    ('<|pad|>' * 20000, ''),
    (' ' * 100_000, ' ' * 100_000),
  ],
)
def test_special_tokens(text, want):
  assert answers.without_specials(text) == want


def test_null_truths_are_skipped_and_counted(tmp_path):
  path = write(tmp_path / 'x.json', D1, {**D1, 'ground_truth': None})
  made = cards.score_file('gsm8k', 'paper', path)
  assert (made['problems'], made['skipped'], made['accuracy']) == (1, 1, 1)
  path = write(tmp_path / 'x.json', {**D1, 'ground_truth': None})
  with pytest.raises(ValueError, match='every ground_truth is null'):
    cards.score_file('gsm8k', 'paper', path)


def test_lists_are_samples_of_one_problem(tmp_path):
  """They give pass@k and a majority, as our own `problem` does."""
  samples = [rf'\boxed{{{n}}}' for n in (4, 5, 5)]
  items = [{**D1, 'generations': samples}, {**D1, 'generations': samples[1:] * 2}]
  path = write(tmp_path / 'x.json', items[0], {**items[1], 'generations': ['', '', '']})
  made = cards.score_file('gsm8k', 'paper', path)
  assert (made['problems'], made['samples']) == (2, 3)
  assert made['accuracy'] == pytest.approx(1 / 6)
  assert (made['pass@3'], made['majority']) == (0.5, 0)
  ours = [{**D1, 'generations': text, 'problem': 0} for text in samples]
  ours += [{**D1, 'generations': '', 'problem': 1}] * 3
  again = cards.score_file('gsm8k', 'paper', write(tmp_path / 'y.json', *ours))
  for field in ('accuracy', 'pass@3', 'majority', 'problems'):
    assert made[field] == again[field]
  truth = {'question': 'x', 'ground_truth': r'\frac12'}
  path = write(tmp_path / 'x.json', {**truth, 'generations': [r'\boxed{.5}', 'no']})
  assert cards.score_file('math', 'strict', path)['pass@2'] == 1


def test_a_pattern_names_the_files_of_one_evaluation(tmp_path):
  """Their problems are different ones; another length is refused."""
  wrong = {**D1, 'generations': 'no'}
  for i, items in enumerate(([D1, wrong], [D1], [D1])):
    write(tmp_path / f'gsm_{i}_generations.json', *items, gen_length=64)
  pattern = str(tmp_path / 'gsm_*_generations.json')
  made = cards.score_file('gsm8k', 'strict', pattern)
  assert (made['problems'], made['files'], made['accuracy']) == (4, 3, 0.75)
  write(tmp_path / 'gsm_9_generations.json', D1, gen_length=128)
  with pytest.raises(ValueError, match='several evaluations: gen_length is 64 .* 128'):
    cards.score_file('gsm8k', 'strict', pattern)
  (tmp_path / 'run[1]').mkdir()  # the name of a file is no pattern
  path = write(tmp_path / 'run[1]' / 'x.json', D1)
  assert cards.score_file('gsm8k', 'strict', path)['problems'] == 1


def test_files_that_are_no_generations(tmp_path):
  """A byte order mark is read; anything else is named in one sentence."""
  path = tmp_path / 'x.json'
  path.write_text('\ufeff' + json.dumps({'generations': [D1]}), encoding='utf-8')
  assert cards.score_file('gsm8k', 'strict', str(path))['accuracy'] == 1
  for content, message in (
    (b'version https://git-lfs.github.com/spec/v1\n', 'x.json .*git-lfs pointer'),
    (b'\xff\xfe{\x00', 'x.json is no valid JSON'),
    (b'[' * 10**5, 'x.json is no valid JSON'),
    (json.dumps({'generations': [{**D1, 'generations': []}]}).encode(), 'generation 0'),
    (json.dumps({'generations': [{**D1, 'generations': [1]}]}).encode(), 'a list of'),
    (json.dumps({'generations': [{**D1, 'question': 7}]}).encode(), 'question must be'),
  ):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
      saved.read(TASKS['gsm8k'], str(path))
  with pytest.raises(ValueError, match='is a directory: .*generations.json'):
    saved.read(TASKS['gsm8k'], str(tmp_path))
  with pytest.raises(ValueError, match='nothing.json: there is no such file'):
    saved.read(TASKS['gsm8k'], str(tmp_path / 'nothing.json'))
