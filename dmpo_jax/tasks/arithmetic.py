"""Exact, bounded evaluation of arithmetic that a model wrote.

  sum     = product (('+' | '-') product)*
  product = operand (('*' | '/') operand)*
  operand = integer | '(' sum ')'

A parser of its own, because the reference calls Python's `eval` on completions
(DMPO reward_func.py:120-127): `9**9**9` hangs it, and `**` and `//` count as
solutions. Here every number is a Fraction, so nothing overflows or rounds, and
length, depth and digits are bounded, so no text takes long. Unary signs are
refused: the rule is about the given, positive numbers. As in Python, an
integer has no leading zeros and a product is never implied.
"""

import fractions
import re

MAX_LENGTH = 256  # characters of an expression
MAX_DEPTH = 32  # open parentheses
MAX_DIGITS = 9  # digits in a row

_TOKEN = re.compile(r'[0-9.]+|\*\*|//|[-+*/()]|[ \t\f]+|[\n\r]+')


class Refused(ValueError):
  """The text is not an expression that we evaluate; the message says why."""


def evaluate(text, lenient=False):
  """The exact value of `text`; raises Refused if it is not plain arithmetic.

  `lenient` takes more of what Python takes: unary signs and decimals; and, like
  Python, it refuses a line break outside parentheses.
  """
  tokens = _tokens(text.strip(), lenient)
  value, at = _sum(tokens, 0, lenient)
  if at < len(tokens) - 1:
    raise Refused(f'unexpected {_show(tokens[at])}')
  return value


def numbers(text):
  """All runs of digits as integers, in order; raises Refused on a long one."""
  runs = re.findall(r'[0-9]+', text)
  if any(len(run) > MAX_DIGITS for run in runs):
    raise Refused(f'a number has more than {MAX_DIGITS} digits')
  return [int(run) for run in runs]


def _tokens(text, lenient):
  """Fractions and one-character operators, closed by a None."""
  if not text:
    raise Refused('empty expression')
  if len(text) > MAX_LENGTH:
    raise Refused(f'longer than {MAX_LENGTH} characters')
  tokens, at, depth = [], 0, 0
  while at < len(text):
    match = _TOKEN.match(text, at)
    if match is None:
      raise Refused(f'character {text[at]!r} is not allowed')
    token, at = match.group(), match.end()
    if token in ('**', '//'):
      raise Refused(f'operator {token} is not allowed')
    depth += (token == '(') - (token == ')')
    if depth > MAX_DEPTH:
      raise Refused(f'more than {MAX_DEPTH} open parentheses')
    if lenient and depth == 0 and token[0] in '\n\r':
      raise Refused('a line break outside parentheses')
    if not token.isspace():
      tokens.append(token if token in '+-*/()' else _number(token, lenient))
  return tokens + [None]


def _number(token, lenient):
  whole, point, part = token.partition('.')
  if max(len(whole), len(part)) > MAX_DIGITS:
    raise Refused(f'a number has more than {MAX_DIGITS} digits')
  if point and (not lenient or '.' in part or not whole + part):
    raise Refused(f'decimal {token!r} is not allowed')
  if not point and len(whole) > 1 and whole.strip('0') and whole[0] == '0':
    raise Refused(f'{token!r} has leading zeros')
  return fractions.Fraction(int(whole + part), 10 ** len(part))


def _sum(tokens, at, lenient):
  value, at = _product(tokens, at, lenient)
  while tokens[at] in ('+', '-'):
    right, after = _product(tokens, at + 1, lenient)
    value, at = value + right if tokens[at] == '+' else value - right, after
  return value, at


def _product(tokens, at, lenient):
  value, at = _operand(tokens, at, lenient)
  while tokens[at] in ('*', '/'):
    right, after = _operand(tokens, at + 1, lenient)
    if tokens[at] == '/' and right == 0:
      raise Refused('division by zero')
    value, at = value * right if tokens[at] == '*' else value / right, after
  return value, at


def _operand(tokens, at, lenient):
  sign = 1
  while tokens[at] in ('+', '-'):  # a loop: 255 signs must not recurse
    if not lenient:
      raise Refused(f'unary {tokens[at]} is not allowed')
    sign, at = -sign if tokens[at] == '-' else sign, at + 1
  if isinstance(tokens[at], fractions.Fraction):
    return sign * tokens[at], at + 1
  if tokens[at] != '(':
    raise Refused(f'a number should stand before {_show(tokens[at])}')
  value, at = _sum(tokens, at + 1, lenient)
  if tokens[at] != ')':
    raise Refused(f'")" should stand before {_show(tokens[at])}')
  return sign * value, at + 1


def _show(token):
  return 'the end' if token is None else f'"{token}"'
