"""Evaluates arithmetic that a model wrote, exactly and within bounds.

The reference calls Python's `eval` on completions (DMPO reward_func.py:120-127):
`9**9**9` hangs it, and `**` and `//` count as solutions. Here `ast.parse` reads
the text, which runs nothing, and only + - * / on Fractions are carried out.
Length, parentheses and digits are bounded, so no text takes long.
"""

import ast
import fractions
import itertools
import operator
import re

MAX_LENGTH = 256  # characters of an expression
MAX_DEPTH = 32  # open parentheses
MAX_DIGITS = 9  # digits in a row

_ALLOWED = re.compile(r'[-+*/().0-9 \t\f\n\r]+')
_LONG_NUMBER = re.compile(f'[0-9]{{{MAX_DIGITS + 1}}}')
_OPERATORS = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.UAdd: operator.pos,
  ast.USub: operator.neg,
}


class Refused(ValueError):
  """The text is not plain arithmetic within the bounds; the message says why."""


def evaluate(text: str, lenient: bool = False) -> fractions.Fraction:
  """Returns the exact value of `text`; raises Refused if it is not arithmetic.

  Takes integers, + - * / and parentheses. The numbers of a problem are given
  and positive, so unary signs are refused. `lenient` takes more of what Python
  takes: unary signs and decimals. Like Python, it then refuses a line break
  outside parentheses.
  """
  text = text.strip()
  if len(text) > MAX_LENGTH:
    raise Refused(f'the expression has more than {MAX_LENGTH} characters')
  if not _ALLOWED.fullmatch(text):
    raise Refused('the expression is empty or has characters other than 0-9.+-*/()')
  if _LONG_NUMBER.search(text):
    raise Refused(f'a number has more than {MAX_DIGITS} digits')
  depths = itertools.accumulate((c == '(') - (c == ')') for c in text)
  if max(depths) > MAX_DEPTH:
    raise Refused(f'more than {MAX_DEPTH} parentheses are open')
  if not lenient:
    text = re.sub(r'\s', ' ', text)
  try:
    return _value(ast.parse(text, mode='eval').body, text, lenient)
  except SyntaxError as error:
    raise Refused(f'the expression is malformed: {error.msg}') from error
  except ZeroDivisionError as error:
    raise Refused('division by zero') from error


def _value(node: ast.expr, text: str, lenient: bool) -> fractions.Fraction:
  match node:
    case ast.Constant(value=int() as number):
      return fractions.Fraction(number)
    case ast.Constant(value=float()) if lenient:
      # The digits as written: a float would round them.
      return fractions.Fraction(str(ast.get_source_segment(text, node)))
    case ast.BinOp() if type(node.op) in _OPERATORS:
      left = _value(node.left, text, lenient)
      return _OPERATORS[type(node.op)](left, _value(node.right, text, lenient))
    case ast.UnaryOp() if lenient:
      return _OPERATORS[type(node.op)](_value(node.operand, text, lenient))
  kind = type(getattr(node, 'op', node)).__name__
  raise Refused(f'{kind} is not allowed, only numbers and + - * /')


def numbers(text: str) -> list[int]:
  """Returns all runs of digits as integers; raises Refused on a long one."""
  if _LONG_NUMBER.search(text):
    raise Refused(f'a number has more than {MAX_DIGITS} digits')
  return [int(run) for run in re.findall('[0-9]+', text)]
