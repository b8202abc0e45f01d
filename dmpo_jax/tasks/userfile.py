"""Imports what a user's file defines: FILE.py:NAME.

A file is imported once in a process, and again if its content changes. Its folder is
put at the end of sys.path, so that it may import its neighbours.
"""

import ast
import contextlib
import difflib
import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

_loaded: dict[tuple[str, str], Any] = {}  # (path, digest) -> module, or what is wrong


def is_spec(text: str) -> bool:
  """Returns whether a text names something in a Python file."""
  return '.py:' in text or text.endswith('.py')


def split(field: str, spec: str) -> tuple[str, str]:
  """Returns (file, name) of FILE.py:NAME; ValueError if it is none."""
  path, _, name = spec.rpartition(':')
  if not (path.endswith('.py') and name.isidentifier()):
    raise ValueError(
      f'{field} = {spec!r} must be FILE.py:NAME, such as my_file.py:mine'
    )
  return os.path.expanduser(path), name


def source(field: str, spec: str) -> tuple[str, str, bytes]:
  """Returns (file, name, content); ValueError if there is no such file."""
  path, name = split(field, spec)
  if not os.path.isfile(path):
    raise ValueError(f'{field} = {spec!r}: no such file {path}')
  with open(path, 'rb') as file:
    return path, name, file.read()


def check(field: str, spec: str) -> None:
  """Raises ValueError if the file has an error of syntax or does not define the name.

  Runs nothing of it.
  """
  path, name, text = source(field, spec)
  try:
    tree = ast.parse(text, path)
  except (SyntaxError, ValueError) as error:
    line = getattr(error, 'lineno', None)
    where = f'{path}:{line}' if line else path
    raise ValueError(f'{field}: {where}: {getattr(error, "msg", error)}') from None
  named = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      named.add(node.name)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      named.add(node.id)
    elif isinstance(node, ast.alias):
      named.add(node.asname or node.name.partition('.')[0])
  if name not in named and '*' not in named:
    raise ValueError(f'{field}: {path} does not define {name}{_near(name, named)}')


def _near(name: str, names: set[str]) -> str:
  close = difflib.get_close_matches(name, names, 1, 0.5)
  return f'; did you mean {close[0]!r}?' if close else ''


def digest(field: str, spec: str) -> str:
  """Returns a digest of what a file says; its comments and its layout do not count.

  Files that it imports do not count either.
  """
  path, _, text = source(field, spec)
  return hashlib.sha256(ast.dump(ast.parse(text, path)).encode()).hexdigest()


def load(field: str, spec: str) -> Any:
  """Returns what FILE.py:NAME names; ValueError with file and line if that fails."""
  check(field, spec)
  path, name, text = source(field, spec)
  whole = os.path.realpath(path)
  key = whole, hashlib.sha256(text).hexdigest()
  if key not in _loaded:
    _loaded[key] = _run(whole, f'user_file_{key[1][:16]}')
  module = _loaded[key]
  if isinstance(module, str):
    raise ValueError(f'{field}: {module}')
  if not hasattr(module, name):
    near = _near(name, set(vars(module)))
    raise ValueError(f'{field}: {path} does not define {name}{near}')
  return getattr(module, name)


def _run(path: str, module_name: str) -> Any:
  """Returns the module of a file, or a sentence about what is wrong with it."""
  spec: Any = importlib.util.spec_from_file_location(module_name, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[module_name] = module
  folder = os.path.dirname(path)
  if folder not in sys.path:
    sys.path.append(folder)
  try:
    spec.loader.exec_module(module)
  except (Exception, SystemExit) as error:
    sys.modules.pop(module_name)
    return described(error, path)
  return module


def described(error: BaseException, path: str = '') -> str:
  """Returns 'FILE:LINE: Type: text' by the last line of a user's file in a traceback.

  path: a file that counts as the user's beside those loaded. Their neighbours count,
  too. '' if there is no line.
  """
  mine = {os.path.dirname(found) for found in (path, *(x for x, _ in _loaded)) if found}
  frames = [
    x
    for x in traceback.extract_tb(error.__traceback__)
    if os.path.dirname(os.path.realpath(x.filename)) in mine
  ]
  if not frames:
    return f'{path}: {type(error).__name__}: {error}' if path else ''
  where = f'{frames[-1].filename}:{frames[-1].lineno}'
  return f'{where}: {type(error).__name__}: {" ".join(str(error).split())}'


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
  """Turns an error of a user's file into a ValueError with its file and line.

  A ValueError stays as it is: the file means it for its user.
  """
  try:
    yield
  except ValueError:
    raise
  except Exception as error:
    if said := described(error):
      raise ValueError(f'{what}: {said}') from error
    raise
