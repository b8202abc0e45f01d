"""Intervals, majorities, cards side by side, styles and templates."""

import html.parser
import json
import types

import pytest

from configs import base
from dmpo_jax import build, evaluate
from dmpo_jax.tasks import TASKS, sudoku
from dmpo_jax.tools import report, watch


@pytest.mark.parametrize(
  'rate, count, low, high',
  [
    (0.5, 100, 0.4038, 0.5962),
    (0.0, 10, 0.0, 0.2775),
    (1.0, 10, 0.7225, 1.0),
    (0.8, 1319, 0.7776, 0.8207),
  ],
)
def test_wilson(rate, count, low, high):
  """Against published tables of the score interval."""
  assert evaluate.wilson(rate, count) == pytest.approx([low, high], abs=2e-4)


@pytest.mark.parametrize(
  'group, grade',
  [
    ([('a', 1.0), ('b', 0.0), ('a', 1.0)], 1.0),
    ([('a', 1.0), ('b', 0.0), ('b', 0.0)], 0.0),
    ([('a', 0.0), ('b', 1.0)], 0.0),
    ([(None, 0.0), ('b', 1.0)], 1.0),
    ([(None, 0.0), (None, 0.0), ('b', 1.0)], 1.0),
    ([(None, 0.0)], 0.0),
  ],
)
def test_majority(group, grade):
  assert evaluate.vote(group) == grade


def test_lengths_keep_the_tokens_a_step():
  c = base.get_config().lock()
  c.eval.sampler.update(length=64, block=16, steps=32)
  section = evaluate.section_of(c, 128)
  assert (section.length, section.steps, section.block) == (128, 64, 16)
  assert (c.eval.sampler.length, c.eval.sampler.steps) == (64, 32)
  with pytest.raises(ValueError, match='eval.lengths has 40'):
    evaluate.section_of(c, 40)
  c.eval.sampler.steps = 48
  with pytest.raises(ValueError, match='steps = 48 must divide'):
    evaluate.section_of(c, 128)


def test_a_folder_belongs_to_one_source(tmp_path):
  """Its own goes on; another's, and an unknown one's, are refused."""
  mine = {'parameters': 1, 'seed': 0}
  for _ in range(2):
    evaluate.claim(str(tmp_path / 'new'), mine)
  with pytest.raises(ValueError, match='another model .*parameters: 1 there'):
    evaluate.claim(str(tmp_path / 'new'), {**mine, 'parameters': 2})
  (tmp_path / 'old').mkdir()
  (tmp_path / 'old' / 'sudoku_base_16_16.jsonl').write_text('')
  with pytest.raises(ValueError, match='old has generations, but no source'):
    evaluate.claim(str(tmp_path / 'old'), mine)


def card(path, **changes):
  made = (
    dict(
      task='math',
      protocol='paper',
      split='test',
      style='chat',
      problems=500,
      model='m',
      parameters='base',
      steps=128,
      length=256,
      accuracy=0.3,
      forwards=128.0,
    )
    | changes
  )
  made['interval'] = evaluate.wilson(made['accuracy'], made['problems'])
  path.write_text(json.dumps(made))
  return path


def test_cards_side_by_side(tmp_path):
  """Best first in a length; a star where the intervals overlap."""
  paths = [
    card(tmp_path / 'a', accuracy=0.30),
    card(tmp_path / 'b', parameters='latest', accuracy=0.33),
    card(tmp_path / 'c', model='n', accuracy=0.20),
    card(tmp_path / 'd', parameters='latest', length=512, accuracy=0.4),
  ]
  text, picture = report.compare_cards(paths, tmp_path / 'out.png')
  rows = [line for line in text.splitlines() if line[:3] in ('| 2', '| 5')]
  assert [
    '0.330 |' in rows[0],
    '0.300 * |' in rows[1],
    '0.200 |' in rows[2],
    '0.400 |' in rows[3],
  ] == [True] * 4
  assert picture.stat().st_size > 1000
  for field, value in (
    ('protocol', 'strict'),
    ('task', 'gsm8k'),
    ('problems', 100),
    ('style', 'eval'),
  ):
    other = card(tmp_path / 'e', **{field: value})
    with pytest.raises(ValueError, match=f'cannot be compared.*{field}'):
      report.compare_cards([*paths, other], tmp_path / 'out.png')
  with pytest.raises(ValueError, match='no card'):
    report.compare_cards([], tmp_path / 'out.png')


@pytest.mark.parametrize(
  'name, example',
  [
    ('sudoku', {'puzzle': '0234341221434321', 'solution': '1234341221434321'}),
    ('countdown', {'numbers': [7, 3, 5], 'target': 22}),
    ('gsm8k', {'question': 'Q', 'answer': '#### 1072'}),
    ('gsm8k', {'question': 'Q', 'answer': '#### -2.5'}),
    ('math', {'problem': 'P', 'solution': r'\boxed{\frac{1}{2}}'}),
  ],
)
def test_records_come_back(name, example):
  """Through JSON to the same problem and the same verdict."""
  task = TASKS[name]
  question, truth = json.loads(json.dumps(task.record(example)))
  assert task.recall(question, truth) == example
  for wrong in (None, [], {}, True, 'x'):
    if (name, wrong) != ('math', 'x'):
      with pytest.raises(ValueError, match='ground_truth'):
        task.recall(question, wrong)


def test_truths_that_cannot_be_graded():
  """Braces that do not pair leave another truth, or none."""
  for wrong in (r'\left\{1', '{', 'x}{'):
    with pytest.raises(ValueError, match='ground_truth'):
      TASKS['math'].recall('q', wrong)


def built_with(**changes):
  c = base.get_config()
  c.update_from_flattened_dict(
    {
      'data.train_size': 8,
      'data.validation_size': 8,
      'data.test_size': 8,
      'train.microbatches': 1,
      **changes,
    }
  )
  return build.build(c)


@pytest.mark.parametrize(
  'protocol, accuracy, best, majority',
  [
    ('paper', (2 + 4 + 4 + 6) / 24, (4 + 6) / 12, (2 + 4) / 12),
    ('strict', 1 / 4, 1 / 2, 0),
  ],
)
def test_cells_are_counted_together(protocol, accuracy, best, majority, monkeypatch):
  """Paper's sudoku: the right ones of all empty cells, not a mean of shares."""
  built, grid = built_with(**{'data.protocol': protocol}), '1234341221434321'
  told = [{'puzzle': '0' * n + grid[n:], 'solution': grid} for n in (4, 8)]
  # Of 4 empty cells 2 and 4 are right, of 8 empty cells 4 and 6.
  texts = ['2134' + grid[4:], grid, '21344312' + grid[8:], '21343412' + grid[8:]]
  rows = [
    {
      'problem': i // 2,
      'text': f'<answer>{text}</answer>',
      'batch_forwards': 1,
      'order': [0],
    }
    for i, text in enumerate(texts)
  ]
  examples = [told[row['problem']] for row in rows]
  numbers, _ = evaluate.numbers_of(built, rows, examples)
  assert numbers['accuracy'] == pytest.approx(accuracy)
  assert numbers['pass@2'] == pytest.approx(best)
  assert numbers['majority'] == pytest.approx(majority)
  monkeypatch.setattr(evaluate, 'generate', lambda *_: rows)
  mean, _ = evaluate.accuracy(built, None, types.SimpleNamespace(examples=told))
  assert mean['accuracy'] == numbers['accuracy']
  full = [{'puzzle': grid, 'solution': grid}]
  assert evaluate.averaged(built, full, [0.0]) == 0.0  # nothing to count


def test_evaluation_asks_in_its_own_style(tmp_path):
  """Training's style for training; prefilled answers; templates as written."""
  built = built_with(**{'data.style': 'chat', 'eval.style': 'eval'})
  end = built.tokenizer.convert_tokens_to_ids('<reasoning>')
  train, test = (build.problems(built, s) for s in ('train', 'test'))
  assert (test.tokens[:, -1] == end).all() and test.valid.all(1).any()
  assert (train.tokens[:, -1] != end).all()
  path = tmp_path / 'template.txt'
  path.write_text('{puzzle} is {not} solved.')
  built = built_with(**{'eval.template': str(path)})
  text = built.tokenizer.decode(build.problems(built, 'test').tokens[0])
  puzzle = build.problems(built, 'test').examples[0]['puzzle']
  assert f'{puzzle} is {{not}} solved.' in text
  text = built.tokenizer.decode(build.problems(built, 'train').tokens[0])
  assert 'solved' not in text
  empty = tmp_path / 'empty.csv'
  empty.write_text('Puzzle,Solution\n')
  with pytest.raises(ValueError, match='the data set is empty'):
    build.problems(
      built_with(**{'data.path': str(empty), 'data.template': str(path)}), 'test'
    )
  path.write_text('no field')
  with pytest.raises(ValueError, match='{puzzle}'):
    build.problems(built_with(**{'eval.template': str(path)}), 'test')
  with pytest.raises(ValueError, match="eval.template = '/none': no such"):
    built_with(**{'eval.template': '/none'})
  with pytest.raises(ValueError, match="data.style = 'boxed' must be one of"):
    built_with(**{'data.style': 'boxed'})


def test_worked_examples_are_right():
  shown = sudoku.TEMPLATES['three_shot'].format(puzzle='0' * 16)
  for puzzle, solution in sudoku.SHOWN:
    found = [g for g in sudoku.grids() if sudoku._keeps(puzzle, g)]
    assert found == [solution] and solution in shown
  assert sudoku.TEMPLATES['one_shot'].count('<answer>\n') == 1


def test_watching():
  """Every position is new in exactly one line, then old; masks before."""
  order = [2, 0, 1, 0]
  steps = watch.pieces(
    [5, 6, 7, 8],
    order,
    lambda ids: '<' if ids[0] == 5 else '\n' if ids[0] == 6 else str(ids[0]),
  )
  assert [step for step, _ in steps] == [-1, 0, 1, 2]
  for place, at in enumerate(order):
    kinds = [parts[place][1] for _, parts in steps]
    assert kinds == ['mask'] * (at + 1) + ['new'] + ['old'] * (2 - at)
  lines = watch.terminal(steps, colour=False).splitlines()
  assert lines[0] == f'   0 {watch.MASK * 4}'
  assert lines[-1] == f'   3 <{watch.BREAK}78'
  assert watch.NEW in watch.terminal(steps)
  page = watch.page(steps, 'a<b', 'p&q', 't')
  assert 'a&lt;b' in page and '<span class="new">&lt;</span>' in page


def test_page_shows_what_a_model_writes_as_text():
  """No tag, no attribute, no entity of its own; nor a terminal's command."""
  evil = [
    '<script>alert(1)</script>',
    '" onload="alert(1)',
    "' x='",
    '&lt;',
    '\x1b]0;owned\x07',
    '</pre></td>{rows}',
  ]
  steps = watch.pieces(range(6), [0, 1, 2, 3, 4, 5], lambda ids: evil[ids[0]])
  page = watch.page(steps, *['<b title="x">' + text for text in evil[:3]])
  found = []

  class Reader(html.parser.HTMLParser):
    def handle_starttag(self, tag, attributes):
      found.append((tag, attributes))

  Reader().feed(page)
  tags = {tag for tag, _ in found}
  assert tags == {
    'meta',
    'title',
    'style',
    'h1',
    'pre',
    'p',
    'table',
    'tr',
    'td',
    'span',
  }
  assert {tuple(a) for _, a in found} == {
    (),
    (('charset', 'utf-8'),),
    (('class', 'new'),),
    (('class', 'mask'),),
  }
  assert '\x1b' not in page + watch.terminal(steps, colour=False)
  last = watch.terminal(steps, colour=False).splitlines()[-1]
  assert '·]0;owned·' in last
