"""Tests GSM8K and MATH: tables of (completion, reward terms, grade), and files."""

import dataclasses
import json
import random
import re

import pytest

from dmpo_jax import types
from dmpo_jax.tasks import TASKS, answers, datasets, gsm8k, math, sudoku, symbolic

OPTIONS = types.TaskOptions(train_size=0, validation_size=0, test_size=0)
GSM = {
  'question': 'How many clips?',
  'answer': 'In May 48/2 = <<48/2=24>>24.\n#### 1,072',
}
MATH = {
  'problem': 'Half of one?',
  'solution': r'As \boxed{2} is wrong, it is $\boxed{\frac{1}{2}}$.',
}
GRID, OTHER = '1234341221434321', '2134341212434321'  # differ in four cells
R = '<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>'.format


def terms(task, text, example, protocol):
  return [round(x, 6) for x in task.reward(text, example, protocol).values()]


# ---- GSM8K

# (completion, [correctness, int, strict_format, soft_format, xmlcount], grade)
PAPER = [
  # Gold is compared as a string, comma and all; a comma is no digit.
  (R('x', '1,072') + '\n', [2, 0, 0.5, 0, 0.5], 0),
  (R('x', '1072') + '\n', [0, 0.5, 0.5, 0, 0.5], 1),
  # No line break at the end: 0.001 for each of the 50 characters of it all,
  # and one thousandth back, as the other term counts len - 1.
  (R('x', '1072'), [0, 0.5, 0, 0, 0.451], 1),
  # Reasoning of two lines is in no format.
  (R('x\ny', '1072') + '\n', [0, 0.5, 0, 0, 0.5], 1),
  # The soft format wants one line and the very beginning.
  ('<reasoning>x</reasoning> <answer>1,072</answer>', [2, 0, 0, 0.5, 0], 0),
  ('<reasoning>x</reasoning>\n\n<answer>7</answer>', [0, 0.5, 0, 0.5, 0], 0),
  (' <reasoning>x</reasoning><answer>7</answer>', [0, 0.5, 0, 0, 0], 0),
  # Text behind the answer costs by the character.
  (R('x', '1,072') + '\nwell', [2, 0, 0, 0, 0.492], 0),
  # Without tags the whole text is the answer.
  ('1,072', [2, 0, 0, 0, 0], 0),
  ('\u00b2', [0, 0.5, 0, 0, 0], 0),  # isdigit() is true of superscripts
  ('', [0, 0, 0, 0, 0], 0),
  # The grade reads the first boxed number, and of text its first number...
  (r'\boxed{1072} \boxed{3}', [0, 0, 0, 0, 0], 1),
  (r'\boxed{...} \boxed{1072}', [0, 0, 0, 0, 0], 1),
  (r'\boxed{1,072}', [0, 0, 0, 0, 0], 0),  # reads 1
  (r'\boxed{\text{1072} clips}', [0, 0, 0, 0, 0], 1),
  (r'\boxed{\frac{1072}{1}}', [0, 0, 0, 0, 0], 1),  # cut at the first }
  (r'\boxed{1.072e3}', [0, 0, 0, 0, 0], 1),
  (r'\boxed{1072.} is it', [0, 0, 0, 0, 0], 1),
  (r'\boxed{none} <answer>1072</answer>', [0, 0.5, 0, 0, 0], 1),
  # ... and of the first answer the last one.
  ('<answer>7, no, 1072 clips</answer>', [0, 0, 0, 0, 0], 1),
  ('<answer>1072</answer><answer>7</answer>', [0, 0.5, 0, 0, 0], 1),
  ('<answer>1,072</answer>', [2, 0, 0, 0, 0], 0),  # reads 072
  ('<answer>1072', [0, 0.5, 0, 0, 0], 0),
]
STRICT = [
  (R('x', '1,072') + '\n', [2, 0.5, 0.5, 0.5, 0.5], 1),
  (R('x\ny', '1072') + '\n', [2, 0.5, 0.5, 0.5, 0.5], 1),
  (R('x', '1072'), [2, 0.5, 0, 0.5, 0.5], 1),
  (R('x', '$1,072.00') + '\n', [2, 0, 0.5, 0.5, 0.5], 1),
  (R('x', '1072 clips.') + '\n', [2, 0, 0.5, 0.5, 0.5], 1),
  (R('x', r'\boxed{1072}') + '\n', [2, 0.5, 0.5, 0.5, 0.5], 1),
  (R('x', '7 or 1072') + '\n', [0, 0, 0.5, 0.5, 0.5], 0),
  (R('x', '\N{MINUS SIGN}1072') + '\n', [0, 0, 0.5, 0.5, 0.5], 0),
  (R('x', '') + '\n', [0, 0, 0.5, 0.5, 0.5], 0),
  (R('x', 'not 1072') + '\n', [0, 0, 0.5, 0.5, 0.5], 0),
  (R('x', r'not $\boxed{1072}$') + '\n', [0, 0, 0.5, 0.5, 0.5], 0),
  (R('x', r'not 7, but \boxed{1072}') + '\n', [0, 0, 0.5, 0.5, 0.5], 0),
  (R('x', r'not 7: \boxed{1072}') + '\n', [2, 0.5, 0.5, 0.5, 0.5], 1),
  (R('x', '1 072') + '\n', [2, 0, 0.5, 0.5, 0.5], 1),
  (R('x', '1072') + '\nwell', [2, 0.5, 0, 0, 0.496], 1),
  (R('x', '1072') * 2, [2, 0.5, 0, 0, 0], 1),
  (R('<answer>', '1072'), [2, 0.5, 0, 0, 0.375], 1),
  ('<reasoning>x</reasoning> <answer>1072</answer>', [2, 0.5, 0, 0.5, 0.5], 1),
  ('<answer>1072</answer><reasoning>x</reasoning>', [2, 0.5, 0, 0, 0.476], 1),
  (r'so \boxed{1072}', [2, 0.5, 0, 0, 0], 1),
  ('1072', [2, 0.5, 0, 0, 0], 1),  # as style 'bare' asks
  ('so 1,072 clips', [2, 0, 0, 0, 0], 1),
  ('<answer>1072', [0, 0, 0, 0, 0.125], 0),
  ('<answer>' + '9' * 5000 + '</answer>', [0, 0.5, 0, 0, 0.25], 0),
]


@pytest.mark.parametrize('text, want, right', PAPER)
def test_gsm8k_paper(text, want, right):
  assert terms(gsm8k, text, GSM, 'paper') == want
  assert gsm8k.grade(text, GSM, 'paper') == right


@pytest.mark.parametrize('text, want, right', STRICT)
def test_gsm8k_strict(text, want, right):
  assert terms(gsm8k, text, GSM, 'strict') == want
  assert gsm8k.grade(text, GSM, 'strict') == right


@pytest.mark.parametrize(
  'text, value',
  [
    ('5', 5),
    ('-5', -5),
    ('+5', 5),
    ('5.50', 5.5),
    ('.5', 0.5),
    ('1,000', 1000),
    ('1,00', None),
    ('5 6', None),
    ('5%', 5),
    ('$5.', 5),
    ('five', None),
    ('', None),
    ('1.2.3', None),
    ('\u0665', None),
    ('12,345,678.5', 12345678.5),
    ('1{,}072', 1072),
    (r'1\,072', 1072),
    (r'1,\!072', 1072),
    (r'\$1,072', 1072),
    (r'1072\text{ dollars}', 1072),
    ('1072 apples.', 1072),
    ('**1072**', 1072),
    (r'\(1072\)', 1072),
    (r'1072\,\text{km}', 1072),
    (r'15\%', 15),
    ('5 m\u00b2', 5),
    ('5 m', 5),
    ('5 books', 5),
    ('\u20135', -5),
    ('\u2013.5', -0.5),
    ('cost \u2013 5', 5),
    ('3\u20135', None),
    (r'\sqrt{1072}', None),
    (r'1072\pi', None),
    ('\u221a1072', None),
    ('1072\u00b2', None),
    ('1072\u00bd', None),
    ('1072!', None),
    ('1072^2', None),
    ('1072 million', None),
    ('5k', None),
    ('5 Thousand', None),
    ('5M', None),
    (r'1072\text{ million}', None),
    (r'\frac{1072}{}', None),
    (r'1\,07', None),
    ('1e3', None),
    # Units and their powers, thousands, hours (from the trackers of lm-evaluation-
    # harness and math-verify, and d1's completions).
    ('29 cm^2', 29),
    (r'29\ \text{cm}^{2}', 29),
    ('29 cm2', 29),
    ('29 m/s^2', 29),
    ('29 square feet', 29),
    ('29-year-old', 29),
    ('It takes 29 days.', 29),
    ('She bought 29 pens', 29),
    ('USD 29', 29),
    ('US$29', 29),
    ('Rs. 29', 29),
    ('*29*', 29),
    ('\u200b29\ufeff', 29),
    ('29 lakh', None),
    ('29 crore rupees', None),
    ('29 grand', None),
    ('29 gross', None),
    ('29 score', None),
    ('29 mil', None),
    ('29 less one', None),
    ('29 too few', None),
    ('29-', None),
    ('29hours', 29),
    ('29 p.m.', 29),
    ('70 000', 70000),
    ('$70 000.50', 70000.5),
    ('70\u202f000', 70000),
    ("70'000", 70000),
    (r'70\ 000 \text{ dollars}', 70000),
    ('5 60', None),
    ('2024 100', None),
    ('29:100', None),
    ('2:00 pm', 2),
    ('2:30 pm', None),
    ('29:00', None),
    # What stands before the number: a name or a verb; about is near enough.
    ('The answer is 29.', 29),
    ('x = 29', 29),
    ('Box C is 2 dollars more than Box B.', 2),
    ('#### 29', 29),
    (r'\textbf{29 apples}', 29),
    ('about 29', 29),
    (r'\approx 29', 29),
    ('-$5', -5),
    # Denied, doubted, one of several, bounded.
    ('not 29', None),
    ("isn't 29", None),
    ('it is not true that it is 29', None),
    ('29 is wrong', None),
    ('29 (not sure)', None),
    ('maybe 29', None),
    ('29?', None),
    ('29 or so', None),
    ('anything but 29', None),
    ('less than 29', None),
    ('at least 29', None),
    ('29 at most', None),
    ('nearly 29', None),
    ('> 29', None),
    ('\u2260 29', None),
    (r'\neq 29', None),
    # Another number is left to compute.
    ('half of 29', None),
    ('double 29', None),
    ('29 and a half', None),
    ('29 dozen', None),
    ('29 minus one', None),
    ('29 squared', None),
    ('29 thirds', None),
    ('29x', None),
    ('29 x', None),
    ('29\u03c0', None),
    ('{29}^2', None),
    ('- 29', None),
    ('-x = 29', None),
    ('\u00b129', None),
  ],
)
def test_one_number(text, value):
  assert gsm8k.number(text) == value


@pytest.mark.parametrize(
  'gold, value',
  [('$18', 18), ('18%', 18), ('18 dollars', 18), ('1,800', 1800), ('-2.5', -2.5)],
)
@pytest.mark.parametrize('protocol', answers.PROTOCOLS)
def test_gold_may_have_a_unit(protocol, gold, value):
  """Every problem that loads can be graded and saved."""
  example = {'question': '?', 'answer': f'So.\n#### {gold}'}
  assert gsm8k.record(example) == ('?', value)
  for text, right in ((rf'\boxed{{{value}}}', 1), (r'\boxed{19}', 0)):
    assert gsm8k.grade(text, example, protocol) == right


@pytest.mark.parametrize('truth', [float('nan'), float('inf'), 10**200])
def test_gsm8k_refuses_truths_that_are_no_numbers(truth):
  with pytest.raises(ValueError, match='ground_truth .* is not a number'):
    gsm8k.recall('?', truth)
  assert gsm8k.record(gsm8k.recall('?', 1e-7)) == ('?', 1e-7)


def test_the_length_penalty_grows_with_the_whole_text():
  """As in the release, 100 more characters of reasoning cost 0.1."""
  short, long = (
    gsm8k.reward(R('x' * n, '7'), GSM, 'paper')['xmlcount'] for n in (10, 110)
  )
  assert short - long == pytest.approx(0.1)
  short, long = (
    gsm8k.reward(R('x' * n, '7') + '\n', GSM, 'paper')['xmlcount'] for n in (10, 110)
  )
  assert short == long


def test_formatted_agrees_with_the_regexes():
  """Compares `answers.formatted` with a regex on random texts of few pieces."""
  loose = re.compile(r'<reasoning>.*</reasoning>\s*<answer>.*</answer>', re.S)
  lines = re.compile(
    r'<reasoning>\n.*\n</reasoning>\n\s*<answer>\n.*\n'
    r'</answer>\n',
    re.S,
  )
  pieces, rng = (*answers.TAGS, '\n', '\n', 'x', ' '), random.Random(0)
  found = 0
  for _ in range(20000):
    text = ''.join(rng.choices(pieces, k=rng.randint(0, 3)))
    text = rng.choice((text, R('x', 'y') + text, text + R('x', 'y\n') + '\n'))
    for i in range(rng.randint(0, 2)):
      at = rng.randint(0, len(text))
      text = text[:at] + rng.choice('\n x') + text[at + i :]
    once = all(text.count(tag) == 1 for tag in answers.TAGS)
    assert answers.formatted(text) == bool(once and loose.fullmatch(text))
    assert answers.formatted(text, '\n') == bool(once and lines.fullmatch(text)), text
    found += answers.formatted(text, '\n')
  assert found > 100


# ---- MATH

HALF = r'\boxed{\frac{1}{2}}'
# (completion, paper [correctness, format], grade, strict terms, grade)
ROWS = [
  (R('x', HALF), [2, 1], 1, [2, 1], 1),
  (R('x', HALF) + '\n', [2, 1], 1, [2, 1], 1),
  (f'<answer>{HALF}', [2, 1], 1, [2, 0], 1),  # an unclosed tag pays in full
  (HALF, [2, 0.5], 1, [2, 0], 1),
  (R('x', r'\frac12'), [0, 0.75], 1, [0, 0.5], 0),
  (R(HALF, r'0.5'), [2, 0.75], 1, [0, 0.5], 0),  # boxed in the reasoning
  (R('x', r'\boxed{\dfrac{1}{2}}'), [2, 1], 1, [2, 1], 1),
  (R('x', r'\boxed{1/2}'), [2, 1], 1, [2, 1], 1),
  (R('x', r'\boxed{.5}'), [2, 1], 1, [2, 1], 1),
  (R('x', r'\boxed{0.50}'), [0, 1], 0, [2, 1], 1),
  (R('x', r'\boxed{2/4}'), [0, 1], 0, [2, 1], 1),
  (R('x', r'\boxed{x = \frac12}'), [2, 1], 1, [2, 1], 1),
  (R('x', r'\boxed{xy=\frac12}'), [2, 1], 1, [2, 1], 1),
  (R('x', r'\boxed{x y=\frac12}'), [0, 1], 0, [2, 1], 1),  # math-verify
  (R('x', r'\boxed{\frac{1}{2}'), [0, 1], 0, [0, 0.5], 0),
  (R('x', r'\boxed{1} \boxed{\frac{1}{2}}'), [2, 1], 1, [2, 1], 1),
  (R('x', r'\boxed{\frac{1}{2}} \boxed{1}'), [0, 1], 0, [0, 1], 0),
  (r'\frac{1}{2}', [2, 0.25], 0, [0, 0], 0),  # the text as a whole
  (r'\boxed \frac{1}{2}$ then', [2, 0.5], 1, [2, 0], 1),
  (r'\fbox{\frac{1}{2}}', [0, 0.25], 0, [0, 0], 0),
  ('<answer></answer>', [0, 0.75], 0, [0, 0], 0),
  ('', [0, 0.25], 0, [0, 0], 0),
]


@pytest.mark.parametrize('text, paper, paper_grade, strict, strict_grade', ROWS)
def test_math(text, paper, paper_grade, strict, strict_grade):
  assert terms(math, text, MATH, 'paper') == paper
  assert math.grade(text, MATH, 'paper') == paper_grade
  assert terms(math, text, MATH, 'strict') == strict
  assert math.grade(text, MATH, 'strict') == strict_grade


@pytest.mark.parametrize(
  'left, right, same',
  [
    (r'\tfrac12', r'\frac{1}{2}', True),
    (r'\frac1{72}', r'\frac{1}{72}', True),
    (r'\frac{72}1', r'\frac{72}{1}', False),
    (r'\sqrt3', r'\sqrt{3}', True),
    (r'\left(1, 2\right)', '(1,2)', True),
    (r'90^\circ', '90', True),
    (r'90^{\circ}', '90', True),
    (r'\$5', '5', True),
    (r'50\%', '50', True),
    (r'5\text{ cm}', '5', True),
    (r'5\text{cm}', '5', False),
    (r'k = 5', '5', True),
    ('k  = 5', '5', False),
    ('k=5', '5', True),
    ('xy=5', '5', True),
    ('xyz=5', '5', False),
    ('.5', '0.5', True),
    ('0.5', r'\frac12', True),
    ('-.5', '-0.5', False),
    ('3/4', r'\frac{3}{4}', True),
    ('a/b', r'\frac{a}{b}', False),
    ('a/b', 'a/b', True),
    ('a/ b', 'a/b', False),  # no integers: the reference gives up on both
    ('1\n0', '10', True),
    (r'1\!0', '10', True),
    ('1 0', '10', True),
    (r'a\\b', r'a\b', True),
    (r'\frac', r'\frac', True),
    (r'\frac ', r'\frac', False),
    (r'\sqrt', r'\sqrt', True),
    (r'\text{ a}\text{ b}', r'\text{ a}\text{ b}', True),
    ('', '', True),
    ('1,000', '1000', False),
    ('0.50', '0.5', False),
    ('x', 'X', False),
  ],
)
def test_equality_of_the_paper(left, right, same):
  assert math.equal_text(left, right) == same == math.equal_text(right, left)


@pytest.mark.parametrize(
  'left, right, same',
  [
    ('x^2+1', '1+x^2', True),
    ('x^2+3x+2', '(x+1)(x+2)', True),
    ('3+4i', '4i+3', True),
    (r'1+2\sqrt{3}', r'2\sqrt{3}+1', True),
    ('x^3+3x^2', 'x^2(x+3)', True),
    (r'2\cdot\pi', r'2\pi', True),
    (r'\pm 3', '3,-3', True),
    (r'\left(-3, +4\right)', '(-3,4)', True),
    ('+7x', '7x', True),
    ('2^{1/3}', r'\sqrt[3]{2}', True),
    ('e^{-1}', r'\frac{1}{e}', True),
    ('2^3', '8', False),
    ('10-8', '2', False),
    ('10 - 8', '2', False),
    ('1+(1)', '2', False),
    ('1+{1}', '2', False),
    (r'1\!+\!1', '2', False),
    (r'2\times(3)', '6', False),
    ('2*3', '6', False),
    ('2**3', '8', False),
    (r'2\times(-3)', '-6', False),
    (r'4\cdot\frac{1}{2}', '2', False),
    (r'6\div 2', '3', False),
    (r'5\pm 0', '5', False),
    ('5!', '120', False),
    (r'\binom{10}{3}', '120', False),
    (r'\sum_{i=1}^{10} i', '55', False),
    (r'\lfloor 2.5 \rfloor', '2', False),
    (r'\gcd(4,6)', '2', False),
    (r'\frac{1+1}{2}', '1', False),
    ('i^2', '-1', False),
  ],
)
def test_operations_left_to_do_are_no_answer(left, right, same, monkeypatch):
  """They count only if the truth has one. Compares in this process."""
  monkeypatch.setattr(symbolic, '_ask', lambda check, *pair: check(*pair))
  assert math.equal(left, right) == same


@pytest.mark.parametrize(
  'left, right, same',
  [
    # Hedges, and equations that are false.
    (r'5\text{ or }7\text{or }9', '5', False),
    ('x=4=5', '5', False),
    (r'5\text{ (or maybe }6)', '5', False),
    (r'5\text{ or }7', '5', False),
    (r'5\text{ or }7', r'5\text{ or }9', False),
    (r'5\text{ not}', '5', False),
    (r'5\text{ or }7', '5,7', True),
    (r'5\text{ and }7', '5,7', True),
    (r'\text{ Monday}', r'\text{ Tuesday}', False),
    (r'\text{ Monday}', r'\text{Monday}', True),
    ('6=5', '5', False),
    ('123=5', '5', False),
    ('7x=5', '5', False),
    ('-x=5', '5', False),
    (r'\pi=5', '5', False),
    ('x=1,y=5', '5', False),
    ('6=5', 'x=5', False),
    ('7x=5', 'x=5', False),
    ('7x=5', '7y=5', False),
    ('x=5', '5', True),
    ('y_1 = 5', '5', True),
    (r'\theta=5', '5', True),
    ('f(x)=2x', '2x', True),
    ('f^{-1}(x) = 2x', '2x', True),
    (r'\text{Area}=5', '5', True),
    (r'm\angle ABC = 5', '5', True),
    ('x=1, x=2', '1,2', True),
    (r'x=1 \text{ or } x=2', '1,2', True),
    ('5', 'x=5', True),
    ('x = 5', 'x=5', True),
    ('y=2x+1', 'y = 1+2x', True),
    # Signs within a number, and bases.
    ('5$3', '53', False),
    (r'4^\circ5', '45', False),
    (r'5\%3', '53', False),
    (r'5\$3', '53', False),
    (r'4^{\circ}\!5', '45', False),
    (r'\$5', '5', True),
    ('$5$', '5', True),
    (r'90^\circ', '90', True),
    (r'-\$5', '-5', True),
    (r'(30^\circ, 60^\circ)', '(30,60)', True),
    (r'90^\circ, 45^\circ', '90,45', True),
    (r'50\%', '50', True),
    ('10_3', '10_2', False),
    ('10_{2}', '10_2', True),
    ('10', '10_2', True),
    # Decimals are exact.
    ('1.414214', r'\sqrt{2}', False),
    ('3.141593', r'\pi', False),
    (r'1.414214\sqrt{1}', r'\sqrt{2}', False),
    ('2.718282', 'e', False),
    (r'1.5\pi', r'\frac{3\pi}{2}', True),
    ('0.5x', r'\frac{x}{2}', True),
    ('0.5', r'\frac{1}{2}', True),
    # Units stand at the end.
    (r'5\text{ cm}', '5', True),
    (r'5 \text{ cm}^2.', '5', True),
    (r'5\text{cm}', '5', True),
    ('5', r'5\text{ square units}', True),
  ],
)
def test_strict_equality(left, right, same, monkeypatch):
  monkeypatch.setattr(symbolic, '_ask', lambda check, *pair: check(*pair))
  assert math.equal(left, right) == same


@pytest.mark.parametrize(
  'text, value',
  [
    ('7', 7),
    ('-7', -7),
    ('1,234', 1234),
    ('1{,}234', 1234),
    (r'1,\!234', 1234),
    (r'\$3.50', 3.5),
    ('3/4', 0.75),
    (r'-\frac{3}{4}', -0.75),
    (r'\frac{-3}{4}', -0.75),
    (r'\dfrac34', 0.75),
    (r'45^\circ', 45),
    ('1/0', None),
    (r'\frac{1}{0}', None),
    ('', None),
    ('-', None),
    ('.', None),
    ('1,2', None),
    ('(1,2)', None),
    (r'50\%', None),
    ('x', None),
    ('9' * 101, None),
    (r'\frac', None),
    ('\u0663', None),
  ],
)
def test_values(text, value):
  assert math.value(text) == value
  if value is not None:
    assert math.equal(text, str(value))


# ---- both

EXAMPLES = {'gsm8k': GSM, 'math': MATH}


@pytest.mark.parametrize('name', EXAMPLES)
def test_targets_get_the_full_reward(name):
  task, example = TASKS[name], EXAMPLES[name]
  text = task.target(example, 'chat')
  for protocol in answers.PROTOCOLS:
    if (name, protocol) != ('gsm8k', 'paper'):  # reads 072: see the table
      assert task.grade(text, example, protocol) == 1
  most = sum(task.reward(text, example, 'strict').values())
  assert most == {'gsm8k': 4.0, 'math': 3.0}[name]
  assert '<<' not in text


@pytest.mark.parametrize('name', EXAMPLES)
def test_prompts_contain_the_problem(name):
  task, example = TASKS[name], EXAMPLES[name]
  problem = next(iter(example.values()))
  assert task.prompt(example, 'bare') == problem
  text = task.prompt(example, 'chat')
  assert text.endswith(problem) and all(tag in text for tag in answers.TAGS)
  assert '{{' not in text and '\\\n' not in text


def write(path, name, count, first=0):
  """Writes a file in the field's format; returns the problems in order."""
  field, solution = list(EXAMPLES[name])
  records = [
    {field: f'Problem {i}?', solution: EXAMPLES[name][solution]}
    for i in range(first, first + count)
  ]
  if path.suffix == '.parquet':
    pa = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(records), path)
  elif path.suffix == '.csv':
    import csv

    with open(path, 'w', newline='') as f:
      writer = csv.DictWriter(f, (field, solution))
      writer.writeheader()
      writer.writerows(records)
  else:
    path.write_text('\n'.join(map(json.dumps, records)))
  return [record[field] for record in records]


@pytest.mark.parametrize('suffix', ['jsonl', 'parquet', 'csv'])
@pytest.mark.parametrize('name', EXAMPLES)
def test_directory_splits(name, suffix, tmp_path):
  """The test file stays whole and in order; train and validation share the other."""
  train = write(tmp_path / f'train-00000-of-00001.{suffix}', name, 200)
  test = write(tmp_path / f'test.{suffix}', name, 30, first=1000)
  options = dataclasses.replace(OPTIONS, path=str(tmp_path))
  field = next(iter(EXAMPLES[name]))
  split = {s: [e[field] for e in TASKS[name].load(s, options)] for s in datasets.SPLITS}
  assert split['test'] == test
  assert sorted(split['train'] + split['validation']) == sorted(train)
  assert 2 < len(split['validation']) < 20
  few = dataclasses.replace(options, test_size=7)
  assert [e[field] for e in TASKS[name].load('test', few)] == test[:7]


@pytest.mark.parametrize('name', EXAMPLES)
def test_one_file_is_shared_by_all_splits(name, tmp_path):
  path = tmp_path / 'all.jsonl'
  problems = write(path, name, 300)
  options = dataclasses.replace(OPTIONS, path=str(path))
  field = next(iter(EXAMPLES[name]))
  found = [e[field] for s in datasets.SPLITS for e in TASKS[name].load(s, options)]
  assert sorted(found) == sorted(problems)


@pytest.mark.parametrize('name', ['countdown', 'sudoku'])
def test_generated_tasks_read_directories(name, tmp_path):
  """The test file stays whole, as published numbers need it."""
  grids = [
    '1234341221434321',
    '1234341223414123',
    '2143341212344321',
    '4321123434122143',
    '3412123443212143',
    '1243341221344321',
  ]
  for split, part in (('train', grids[:4]), ('test', grids[4:])):
    if name == 'sudoku':
      (tmp_path / f'{split}.csv').write_text(
        '\n'.join(['Puzzle,Solution', *(f'0{g[1:]},{g}' for g in part)])
      )
    else:
      (tmp_path / f'{split}.jsonl').write_text(
        '\n'.join(json.dumps({'nums': [1, 2, int(g[:2])], 'target': 5}) for g in part)
      )
  options = dataclasses.replace(OPTIONS, path=str(tmp_path))
  assert len(TASKS[name].load('test', options)) == 2


@pytest.mark.parametrize('name', EXAMPLES)
def test_refused_files(name, tmp_path):
  """The error names the file, the line, the column and where files come from."""
  task = TASKS[name]
  field, solution = list(EXAMPLES[name])

  def refused(message, path):
    with pytest.raises(ValueError, match=message):
      task.load('train', dataclasses.replace(OPTIONS, path=str(path)))

  refused('needs data.path: .*github|needs data.path: .*huggingface', '')
  refused('no such file or directory', tmp_path / 'nowhere')
  refused('must hold one train file.*: none', tmp_path)
  path = tmp_path / 'train.jsonl'
  good = EXAMPLES[name]
  for bad, message in (
    ({solution: good[solution]}, f'train.jsonl:2: column {field} .*{solution}'),
    ({**good, field: ' '}, f'train.jsonl:2: column {field}'),
    ({**good, solution: 7}, f'train.jsonl:2: column {solution} .*7'),
    ({**good, solution: 'I do not know'}, f'train.jsonl:2: the {solution}'),
  ):
    path.write_text(json.dumps(good) + '\n' + json.dumps(bad))
    refused(message, path)
  path.write_text('{"a": 1}\n{')
  refused(f'train.jsonl:1: column {field}', path)
  (tmp_path / 'train.csv').write_text('a,b\n1,2\n')
  refused(f'train.csv:2: column {field} .*columns are a, b', tmp_path / 'train.csv')
  refused('must hold one train file.*train.csv, train.jsonl', tmp_path)
  (tmp_path / 'x.parquet').write_text('PAR1')
  refused('x.parquet: not a parquet file', tmp_path / 'x.parquet')


@pytest.mark.parametrize('name', EXAMPLES)
def test_train_file_with_test_problems(name, tmp_path):
  """A few test problems in the train file are left out; more than half are refused."""
  load = lambda split: TASKS[name].load(
    split, dataclasses.replace(OPTIONS, path=str(tmp_path))
  )
  write(tmp_path / 'train.jsonl', name, 200)
  write(tmp_path / 'test.jsonl', name, 30, first=190)
  test = {json.dumps(e) for e in load('test')}
  train = {json.dumps(e) for e in load('train') + load('validation')}
  assert len(test) == 30 and len(train) == 190 and not test & train
  write(tmp_path / 'test.jsonl', name, 30, first=100)
  with pytest.raises(ValueError, match='training would see the test'):
    load('train')


SAME_PROBLEM = {  # test problems, and another way to write the first of them
  'gsm8k': (
    [{'question': f'How many  clips\nof {i}?', 'answer': '#### 2'} for i in range(3)],
    {'question': ' How many clips of 0? ', 'answer': 'Two.\n#### 2'},
  ),
  'math': (
    [{'problem': f'Half of  {i}?', 'solution': r'\boxed{0}'} for i in range(3)],
    {'problem': 'Half of 0?', 'solution': r'It is $\boxed{0}$.'},
  ),
  'countdown': (
    [{'nums': [7, 3, 5], 'target': t} for t in (22, 15, 27)],
    {'nums': [3, 5, 7], 'target': 22},
  ),
  'sudoku': (
    [{'Puzzle': '0' * n + GRID[n:], 'Solution': GRID} for n in (10, 1, 2)],
    {'Puzzle': '0' * 10 + GRID[10:], 'Solution': OTHER},
  ),
}


@pytest.mark.parametrize('name', SAME_PROBLEM)
def test_same_problem_written_otherwise_is_left_out(name, tmp_path):
  """With other steps, white space, order, or another of two solutions."""
  test, again = SAME_PROBLEM[name]
  for part, rows in (('train', [again] * 5), ('test', test)):
    if name == 'sudoku':
      (tmp_path / f'{part}.csv').write_text(
        '\n'.join(map(','.join, [rows[0], *(row.values() for row in rows)]))
      )
    else:
      (tmp_path / f'{part}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  options = dataclasses.replace(OPTIONS, path=str(tmp_path))
  assert len(TASKS[name].load('test', options)) == 3
  for split in ('train', 'validation'):
    with pytest.raises(ValueError, match='no example falls in the'):
      TASKS[name].load(split, options)


@pytest.mark.parametrize('name', [*EXAMPLES, 'countdown', 'sudoku'])
def test_prepared_by_tfds(name, tmp_path, monkeypatch):
  """The problems equal those of the files, stored and read without TensorFlow."""
  import sys

  import tensorflow_datasets as tfds

  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path / 'tfds'))
  files = tmp_path / 'tfds' / 'downloads' / 'manual' / name
  files.mkdir(parents=True)
  for split, first, last in (('train', 0, 60), ('test', 100, 107)):
    if name in EXAMPLES:
      write(files / f'{split}.jsonl', name, last - first, first)
    elif name == 'sudoku':
      rows = [f'0{g[1:]},{g}' for g in sudoku.grids()[first:last]]
      (files / f'{split}.csv').write_text('\n'.join(['Puzzle,Solution', *rows]))
    else:
      rows = [{'nums': [1, 2, i + 3], 'target': 5} for i in range(first, last)]
      (files / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  local = {split: files / f'{split}.jsonl' for split in ('train', 'test')}
  monkeypatch.setattr(
    tfds.download.DownloadManager, 'download_and_extract', lambda self, urls: local
  )
  load = lambda split, path: TASKS[name].load(
    split, dataclasses.replace(OPTIONS, path=str(path))
  )
  for split in datasets.SPLITS:
    key = lambda e: json.dumps(e, sort_keys=True)
    found = load(split, 'tfds')
    assert sorted(map(key, found)) == sorted(map(key, load(split, files)))
    assert len(found) == 7 or split != 'test'
  assert 'tensorflow' not in sys.modules


def test_tfds_names_the_missing_files(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path))
  with pytest.raises(ValueError, match=r'(?s)math .*manual/math.*ankner/math-500'):
    TASKS['math'].load('test', dataclasses.replace(OPTIONS, path='tfds'))
