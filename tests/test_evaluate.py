"""Tests intervals, majorities, results cards, prompt styles and templates."""

import html.parser
import json
import re

import pytest

from configs import base
from dmpo_jax import build, data, evaluate
from dmpo_jax.tasks import TASKS, sudoku
from dmpo_jax.tools import cards, report, watch


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
  assert cards.wilson(rate, count) == pytest.approx([low, high], abs=2e-4)


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
  assert cards.vote(group) == grade


def test_lengths_keep_the_tokens_per_step():
  c = base.get_config().lock()
  c.eval.sampler.update(length=64, block=16, steps=32)
  section = cards.section_of(c.eval.sampler, 128)
  assert (section.length, section.steps, section.block) == (128, 64, 16)
  assert (c.eval.sampler.length, c.eval.sampler.steps) == (64, 32)
  with pytest.raises(ValueError, match='eval.lengths has 40.*eval.sampler.block'):
    cards.section_of(c.eval.sampler, 40)
  c.eval.sampler.steps = 48
  with pytest.raises(ValueError, match='steps = 48 must divide'):
    cards.section_of(c.eval.sampler, 128)


def test_a_folder_belongs_to_one_source(tmp_path):
  """The same source continues; another or an unknown source is refused."""
  mine = {'parameters': 1, 'seed': 0}
  for _ in range(2):
    cards.claim(str(tmp_path / 'new'), mine)
  with pytest.raises(ValueError, match='parameters: 1 there.*--out'):
    cards.claim(str(tmp_path / 'new'), {**mine, 'parameters': 2})
  (tmp_path / 'old').mkdir()
  (tmp_path / 'old' / 'sudoku_base_16_16.jsonl').write_text('')
  with pytest.raises(ValueError, match='old has generations.*source.json.*--out'):
    cards.claim(str(tmp_path / 'old'), mine)


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
  made['interval'] = cards.wilson(made['accuracy'], made['problems'])
  path.write_text(json.dumps(made))
  return path


def test_cards_are_compared_by_length(tmp_path):
  """The best of a length is first; a star marks overlapping intervals."""
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
    with pytest.raises(ValueError, match=f'{field}.*--cards'):
      report.compare_cards([*paths, other], tmp_path / 'out.png')
  with pytest.raises(ValueError, match='no card'):
    report.compare_cards([], tmp_path / 'out.png')
  assert report.compare_cards(paths)[1] == tmp_path / 'cards.png'


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
def test_records_are_read_back(name, example):
  """A problem saved as JSON is read back as the same problem."""
  task = TASKS[name]
  question, truth = json.loads(json.dumps(task.record(example)))
  assert task.recall(question, truth) == example
  for wrong in (None, [], {}, True, 'x'):
    if (name, wrong) != ('math', 'x'):
      with pytest.raises(ValueError, match='ground_truth'):
        task.recall(question, wrong)


def test_truths_that_cannot_be_graded():
  """Unpaired braces leave another truth, or none."""
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
  """The paper's sudoku accuracy counts cells over all puzzles together."""
  built, grid = built_with(**{'data.protocol': protocol}), '1234341221434321'
  puzzles = [{'puzzle': '0' * n + grid[n:], 'solution': grid} for n in (4, 8)]
  # Of 4 empty cells 2 and 4 are right, of 8 empty cells 4 and 6.
  texts = ['2134' + grid[4:], grid, '21344312' + grid[8:], '21343412' + grid[8:]]
  rows = [
    {
      'problem': i // 2,
      'text': f'<answer>{text}</answer>',
      'batch_forwards': 1,
      'forwards': 1,
      'order': [0],
    }
    for i, text in enumerate(texts)
  ]
  examples = [puzzles[row['problem']] for row in rows]
  numbers, _ = cards.numbers_of(built.task, protocol, {}, rows, examples)
  assert numbers['accuracy'] == pytest.approx(accuracy)
  assert numbers['pass@2'] == pytest.approx(best)
  assert numbers['majority'] == pytest.approx(majority)
  monkeypatch.setattr(evaluate, 'generate', lambda *_: rows)
  mean, _ = evaluate.accuracy(built, {}, data.Problems(puzzles, None, None))
  assert mean['accuracy'] == numbers['accuracy']
  full = [{'puzzle': grid, 'solution': grid}]
  assert evaluate.averaged(built.task, protocol, full, [0.0]) == 0.0  # no empty cell


def test_evaluation_has_its_own_prompt_style(tmp_path):
  """Training keeps its style; answers are prefilled; templates are used as written."""
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
  order = [2, 0, 1, 0, -1]  # the last one is revealed by no step
  texts = watch.texts_of(
    [5, 6, 7, 8, 9],
    lambda ids: '<' if ids[0] == 5 else '\n' if ids[0] == 6 else str(ids[0]),
  )
  steps = watch.pieces(texts, order)
  assert [step for step, _ in steps] == [-1, 0, 1, 2]
  assert {parts[4] for _, parts in steps} == {(watch.MASK, 'mask')}
  for position, at in enumerate(order[:4]):
    kinds = [parts[position][1] for _, parts in steps]
    assert kinds == ['mask'] * (at + 1) + ['new'] + ['old'] * (2 - at)
  lines = watch.terminal(steps, colour=False).splitlines()
  assert lines[0] == f'   0 {watch.MASK * 5}'
  assert lines[-1] == f'   3 <{watch.BREAK}78{watch.MASK}'
  assert watch.NEW in watch.terminal(steps)
  tokens = list(zip(texts, order, (0.5, 1.0, 0.25, 1 / 3, 0.0), strict=True))
  page = watch.page(tokens, 'a<b', 'p&q', 't', 'a drawing')
  assert 'a&lt;b' in page and '<pre>a drawing</pre>' in page
  # The slider goes from all masks to the last step, and the script has every token.
  assert 'min="0" max="3" value="3"' in page
  data = page.partition('id="tokens">')[2].partition('</script>')[0]
  assert [tuple(x.values()) for x in json.loads(data)] == [
    (text, step, round(p, 4)) for text, step, p in tokens
  ]


def test_page_escapes_the_completion():
  """A completion adds no tag, attribute or entity, and no terminal command."""
  evil = [
    '<script>alert(1)</script>',
    '" onload="alert(1)',
    "' x='",
    '&lt;',
    '\x1b]0;owned\x07',
    '</pre></td>{rows}',
  ]
  texts = watch.texts_of(range(6), lambda ids: evil[ids[0]])
  steps = watch.pieces(texts, range(6))
  tokens = zip(texts, range(6), [0.5] * 6, strict=True)
  page = watch.page(
    list(tokens), *['<b title="x">' + text for text in evil[:3]], evil[5]
  )
  found, scripts = [], []

  class Reader(html.parser.HTMLParser):
    def handle_starttag(self, tag, attributes):
      found.append((tag, dict(attributes)))

    def handle_data(self, data):
      if found and found[-1][0] == 'script':
        scripts.append(data)

  Reader().feed(page)
  names = ('id', 'class', 'type', 'min', 'max', 'value', 'charset')
  assert all(set(attributes) <= set(names) for _, attributes in found)
  assert [tag for tag, _ in found if tag in ('script', 'b')] == ['script', 'script']
  assert [x['text'] for x in json.loads(scripts[0])] == texts  # no early end of it
  assert not set(re.findall(r'innerHTML|insertAdjacent|document\.write', page))
  assert '\x1b' not in page + watch.terminal(steps, colour=False)
  last = watch.terminal(steps, colour=False).splitlines()[-1]
  assert '·]0;owned·' in last


def test_saved_generations_are_graded_without_a_config(tmp_path):
  """Weights scale the reward; a wrong file is refused by the field it lacks."""
  grid = '1234341221434321'
  example, path = {'puzzle': '0' + grid[1:], 'solution': grid}, tmp_path / 'file.json'
  question, truth = TASKS['sudoku'].record(example)
  item = {
    'question': question,
    'generations': f'<answer>{grid}</answer>',
    'ground_truth': truth,
  }
  path.write_text(json.dumps({'generations': [item], 'gen_length': 16}))
  made = cards.score_file('sudoku', 'strict', str(path), {'sudoku': 0.5})
  assert (made['accuracy'], made['problems'], made['length']) == (1.0, 1, 16)
  plain = cards.score_file('sudoku', 'strict', str(path))
  assert made['reward'] == plain['reward'] / 2 > 0
  assert '100.0 %' in cards.headline(made) and '| accuracy | 1 |' in cards.as_text(made)
  for text, field in (
    ('{', 'no valid JSON'),
    ('[]', 'list of generations'),
    (json.dumps({'generations': [{'question': ''}]}), 'generations, ground_truth'),
  ):
    path.write_text(text)
    with pytest.raises(ValueError, match=field):
      cards.score_file('sudoku', 'strict', str(path))
  with pytest.raises(ValueError, match="'chess' must be one of.*sudoku"):
    cards.score_file('chess', 'strict', str(path))
