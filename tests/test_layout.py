"""The package's layout: who may import whom, and what code may not hold.

A module has a floor and imports only from lower ones, so that any of them is
read, tested and replaced knowing only what lies below. `complaints` checks a
tree; the tests below run it on the package, and on small trees with one fault
each to show that it finds them.
"""

import ast
import pathlib
import re

import pytest

PACKAGE = 'dmpo_jax'
FLOORS = {
  '__init__': -1,  # everybody imports it, so it imports nobody
  'types': 0, 'files': 0, 'rules': 0, 'boards': 0,
  'rng': 1, 'curriculum': 1, 'health': 1, 'metrics': 1,
  'conventions': 1, 'mesh': 1,
  'masking': 2, 'model': 2, 'tasks': 2, 'routing': 2,
  'hf': 3, 'layout': 3, 'sampler': 3, 'data': 3, 'optim': 3, 'checkpoint': 3,
  'grader': 3, 'guard': 3, 'dialogues': 3, 'anneal': 3, 'buffers': 3, 'verify': 3,
  'logprob': 4, 'weights': 4, 'lessons': 4, 'control': 4, 'drafting': 4, 'pairs': 4,
  'objectives': 5, 'agreement': 5,
  'config': 6, 'step': 6,
  'check': 7, 'likelihood': 7, 'score': 7, 'rollout': 7,
  'parts': 8,
  'build': 9,
  'evaluate': 10, 'resume': 10, 'fits': 10,
  'tools': 11, 'runs': 11,
  'phases': 12,
  'train': 13,
  'runner': 14,
  'rounds': 15, 'loaded': 15,
  'cli': 16, 'api': 16,
  'harness': 17,
}  # fmt: skip
# Folders whose files may import each other.
PLUGINS = ('tasks', 'objectives', 'model', 'hf', 'sampler', 'tools', 'phases')
JAX = ('jax', 'jaxlib', 'flax', 'optax', 'orbax')  # each imports jax
COMPILE = ('jit', 'pmap', 'pjit')
CONFIG = {'cfg', 'config', 'c'}
UNSAFE_MODULES = (
  'pickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal',
)  # fmt: skip
UNSAFE_CALLS = (
  'eval', 'exec', '__import__', 'torch.load', 'yaml.load', 'yaml.full_load',
  'yaml.unsafe_load', 'os.system', 'os.popen', 'os.chmod', 'os.umask',
  'pd.read_pickle', 'pandas.read_pickle', 'sympy.sympify', 'sympy.parse_expr',
)  # fmt: skip
SANDBOXED = pathlib.Path('tasks/sandboxed.py')
UNSAFE_WORDS = ('allow_pickle', 'trust_remote_code', 'shell')
UNFINISHED = r'\b(TODO|FIXME|XXX|NotImplementedError)\b'
# The ceiling of the package without tools/. It only falls, but for a commit that says
# which capability it buys. Types, sentences and checks of input are not cut to meet it.
MAX_LINES, MAX_FUNCTION, MAX_ARGUMENTS = 29900, 60, 6
# These take more: the keyword options of one pass, a window with its cache, and the
# signature that scripts outside the project call, with its first half.
WIDE = {'view_logp', 'hidden', 'window_logits', 'beside_cache', 'sample', 'opened'}


def sources(root):
  """{path under root: text} of all modules."""
  return {
    path.relative_to(root): path.read_text(encoding='utf-8')
    for path in sorted(root.rglob('*.py'))
  }


def owner(path):
  """What has the floor: the module, or its folder."""
  return path.parts[0] if len(path.parts) > 1 else path.stem


def imports(tree, path):
  """(dotted name, line) of all that is imported, at any depth of the code."""
  here = [PACKAGE, *path.parent.parts]
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, node.lineno
    elif isinstance(node, ast.ImportFrom):
      start = here[: len(here) + 1 - node.level] if node.level else []
      base = '.'.join([*start, *([node.module] if node.module else [])])
      for alias in node.names:
        yield f'{base}.{alias.name}', node.lineno


def used(tree, path):
  """Dotted names of the package's parts that are imported: {name: line}."""
  found = {}
  for name, line in imports(tree, path):
    parts = name.split('.')
    if parts[0] == PACKAGE:
      # `from dmpo_jax import x` may mean a module or a name in __init__.
      target = parts[1] if len(parts) > 1 else '__init__'
      found[target if target in FLOORS else '__init__'] = line
  return found


def chain(node):
  """['a', 'b', 'c'] of the expression a.b.c; of f(x).b just ['b']."""
  names = []
  while isinstance(node, ast.Attribute):
    names.append(node.attr)
    node = node.value
  return [*([node.id] if isinstance(node, ast.Name) else []), *names[::-1]]


def check_floors(path, tree):
  me = owner(path)
  if me not in FLOORS:
    yield 1, f'unknown module {me}: give it a floor'
    return
  for target, line in used(tree, path).items():
    same = target == me and me in PLUGINS
    if not same and FLOORS[target] >= FLOORS[me] and target != '__init__':
      yield (
        line,
        f'{me} (floor {FLOORS[me]}) imports {target} (floor {FLOORS[target]})',
      )


def check_compile(path, tree):
  if path == pathlib.Path('build.py'):
    return
  bound = {'jax'}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      bound |= {a.asname for a in node.names if a.asname and a.name.startswith('jax')}
  for name, line in imports(tree, path):
    parts = name.split('.')
    if parts[0] == 'jax' and parts[-1] in COMPILE:
      yield line, f'imports {name}: only build.py compiles'
  for node in ast.walk(tree):
    names = chain(node)
    if isinstance(node, ast.Attribute) and names[0] in bound:
      if names[-1] in COMPILE:
        yield node.lineno, f'uses {".".join(names)}: only build.py compiles'


def check_linen(path, tree):
  if path.parts[0] == 'model':
    return
  for name, line in imports(tree, path):
    if name.split('.')[:2] == ['flax', 'linen']:
      yield line, 'imports flax.linen: only model/ holds modules'
  for node in ast.walk(tree):
    if chain(node) == ['flax', 'linen']:
      yield node.lineno, 'uses flax.linen: only model/ holds modules'


def check_config(path, tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
      names = chain(node.func)
      if names[-1] == 'get' and CONFIG & set(names[:-1]):
        yield (node.lineno, f'{".".join(names)}(): a default belongs into the config')


def check_functions(path, tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      length = node.end_lineno - node.lineno + 1
      if length > MAX_FUNCTION:
        yield node.lineno, f'{node.name} has {length} lines'


def check_signatures(path, tree):
  """Public functions say what they take and give, and take few arguments."""
  for node in ast.walk(tree):
    if not isinstance(node, ast.FunctionDef):
      continue
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments = [a for a in arguments if a.arg not in ('self', 'cls')]
    if len(arguments) > MAX_ARGUMENTS and node.name not in WIDE:
      yield node.lineno, f'{node.name} takes {len(arguments)} arguments'
  methods = [m for n in tree.body if isinstance(n, ast.ClassDef) for m in n.body]
  for node in [*tree.body, *methods]:
    if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
      for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
        if a.annotation is None and a.arg not in ('self', 'cls'):
          yield node.lineno, f'{node.name} does not annotate {a.arg}'


def check_host(trees):
  """Tasks and what they import stay free of jax, so that hosts load fast."""
  by_owner = {}
  for path in trees:
    by_owner.setdefault(owner(path), []).append(path)
  todo, seen = ['tasks', 'types'], set()
  while todo:
    me = todo.pop()
    if me in seen:
      continue
    seen.add(me)
    for path in by_owner.get(me, ()):
      # Upward imports are the business of `check_floors`.
      below = [t for t in used(trees[path], path) if FLOORS[t] < FLOORS[me]]
      todo += below
      for name, line in imports(trees[path], path):
        if name.split('.')[0] in JAX:
          yield path, line, f'imports {name}, but tasks need it without jax'


def check_safety(path, tree):
  """Nothing that runs what a file or a model says, or sets a file's mode.

  One file does, in a process of its own that nobody imports.
  """
  for name, line in imports(tree, path):
    if name.split('.')[0] in UNSAFE_MODULES:
      yield line, f'imports {name}: files are data, not code'
    if name.split('.')[-1] == SANDBOXED.stem or path == SANDBOXED and PACKAGE in name:
      yield line, f'imports {name}: {SANDBOXED} is text for a process of its own'
  for node in ast.walk(tree):
    if not isinstance(node, ast.Call):
      continue
    names = chain(node.func)
    dotted = '.'.join(names)
    method = isinstance(node.func, ast.Attribute) and len(names) == 1
    own = path == SANDBOXED and dotted == 'exec'
    if dotted in UNSAFE_CALLS and not method and not own:  # f(x).eval() is torch's
      yield node.lineno, f'calls {dotted}'
    for word in node.keywords:
      off = isinstance(word.value, ast.Constant) and not word.value.value
      if word.arg in UNSAFE_WORDS and not off:
        yield node.lineno, f'{word.arg} is not False'


CHECKS = (
  check_floors, check_compile, check_linen, check_config, check_functions,
  check_safety, check_signatures,
)  # fmt: skip


def complaints(root):
  """All that is wrong with the package at `root`, as 'file:line: what'."""
  texts = sources(root)
  trees = {path: ast.parse(text, str(path)) for path, text in texts.items()}
  found = list(check_host(trees))
  for path, tree in trees.items():
    for check in CHECKS:
      found += [(path, line, what) for line, what in check(path, tree)]
    for number, line in enumerate(texts[path].splitlines(), 1):
      if match := re.search(UNFINISHED, line):
        found.append((path, number, f'unfinished: {match.group()}'))
  package = [text for path, text in texts.items() if owner(path) != 'tools']
  total = sum(len(text.splitlines()) for text in package)
  if total > MAX_LINES:
    found.append(('', 0, f'the package has {total} lines'))
  return [f'{path}:{line}: {what}' for path, line, what in found]


def test_package():
  root = pathlib.Path(__file__).parents[1] / PACKAGE
  assert (root / 'types.py').exists()
  assert complaints(root) == []


def test_nothing_runs_what_a_file_says():
  """The package is in `test_package`; this is what stands around it."""
  root = pathlib.Path(__file__).parents[1]
  paths = [root / 'main.py', *root.glob('configs/*.py'), *root.glob('benchmarks/*.py')]
  found = {
    str(path): list(check_safety(path, ast.parse(path.read_text()))) for path in paths
  }
  assert len(found) > 5 and not any(found.values()), found


CLEAN = {
  '__init__.py': '"""The package."""\n',
  'types.py': 'import dataclasses\nfrom typing import Any\n',
  'rng.py': 'import jax\n',
  'model/__init__.py': 'import jax\nfrom flax import linen as nn\nimport flax.linen\n',
  'tasks/__init__.py': 'from dmpo_jax.tasks import sudoku\n',
  'tasks/sudoku.py': 'import re\nfrom dmpo_jax.types import Task\n'
  'from dmpo_jax.tasks import common\n',
  'tasks/common.py': 'from ..types import Task\nfrom . import sudoku\n',
  'objectives/__init__.py': 'from dmpo_jax import logprob, types\n',
  'logprob.py': 'from dmpo_jax import masking, model\nimport dmpo_jax.rng\n',
  'masking.py': 'import jax\nfrom jax import numpy as jnp\n'
  'def _f(key, d, state):\n  return d.get(key), state.jit, jax.vmap\n',
  'optim.py': 'import numpy as np\nimport subprocess\n'
  'def _f(x):\n  f(x).eval(), np.load("a", allow_pickle=False)\n'
  '  return subprocess.run(("git",), shell=False)\n',
  'build.py': 'import jax\nfrom jax import jit\nf = jax.jit(jax.pmap)\n',
  'train.py': 'from dmpo_jax import build, evaluate\n'
  'def _f(config):\n  return config.get_ref("a")\n',
  'evaluate.py': 'from dmpo_jax import build\n',
}

# What is put into a clean tree (file, text) -> what is said of it.
FAULTS = {
  'upward': ('types.py', 'from dmpo_jax import rollout\n', 'imports rollout'),
  'sideways': ('evaluate.py', 'import dmpo_jax.resume\n', 'imports resume'),
  'sideways_relative': ('masking.py', 'from . import model\n', 'imports model'),
  'self': ('mesh.py', 'from dmpo_jax.mesh import f\n', 'imports mesh'),
  'across_plugins': (
    'tasks/sudoku.py', 'from dmpo_jax import objectives\n',
    'tasks (floor 2) imports objectives (floor 5)',
  ),
  'relative_up': (
    'tasks/sudoku.py', 'from ..train import f\n', 'imports train',
  ),
  'lazy': (
    'rng.py', 'def f():\n  from dmpo_jax.step import g\n  return g\n',
    'rng.py:2: rng (floor 1) imports step (floor 6)',
  ),
  'unknown': ('extra.py', 'import os\n', 'extra: give it a floor'),
  'unknown_folder': ('extra/a.py', '', 'extra: give it a floor'),
  'init_imports': (
    '__init__.py', 'from dmpo_jax import types\n', 'imports types',
  ),
  'jit': ('step.py', 'import jax\n\n\n@jax.jit\ndef f(): ...\n', 'jax.jit'),
  'jit_alias': ('step.py', 'import jax as j\nf = j.jit\n', 'uses j.jit'),
  'jit_from': ('step.py', 'from jax import jit\n', 'imports jax.jit'),
  'pmap': ('step.py', 'import jax\nf = jax.pmap(id)\n', 'jax.pmap'),
  'pjit': (
    'step.py', 'from jax.experimental.pjit import pjit\n', 'only build.py',
  ),
  'linen': ('step.py', 'from flax import linen as nn\n', 'flax.linen'),
  'linen_import': ('step.py', 'import flax.linen as nn\n', 'flax.linen'),
  'linen_from': ('step.py', 'from flax.linen import Dense\n', 'flax.linen'),
  'linen_use': ('step.py', 'import flax\nf = flax.linen\n', 'flax.linen'),
  'task_jax': ('tasks/maths.py', 'import jax.numpy as jnp\n', 'without jax'),
  'types_jax': ('types.py', 'from jax import Array\n', 'without jax'),
  'task_jax_below': (
    'tasks/maths.py', 'from dmpo_jax import rng\n',
    'rng.py:1: imports jax, but tasks need it without jax',
  ),
  'get': ('step.py', 'def _f(cfg):\n  return cfg.get("a", 1)\n', 'cfg.get()'),
  'get_c': ('step.py', 'def _f(c):\n  return c.get("a")\n', 'c.get()'),
  'get_deep': (
    'step.py', 'def _f(run):\n  return run.config.optim.get("a")\n',
    'run.config.optim.get()',
  ),
  'unfinished': ('step.py', 'x = 1  # TODO later\n', 'unfinished: TODO'),
  'fixme': ('step.py', '# FIXME\n', 'unfinished: FIXME'),
  'xxx': ('step.py', '"""XXX."""\n', 'unfinished: XXX'),
  'stub': ('step.py', 'def f():\n  raise NotImplementedError\n', 'unfinished'),
  'pickle': ('step.py', 'import pickle\n', 'imports pickle'),
  'pickle_from': ('step.py', 'from joblib import load\n', 'imports joblib'),
  'sandboxed': (
    'tasks/sudoku.py', 'from dmpo_jax.tasks import sandboxed\n', 'process of its own',
  ),
  'sandboxed_imports': (
    'tasks/sandboxed.py', 'from dmpo_jax.tasks import sudoku\n', 'process of its own',
  ),
  'eval': ('step.py', 'def _f(x):\n  return eval(x)\n', 'calls eval'),
  'exec': ('step.py', 'exec("x = 1")\n', 'calls exec'),
  'torch': ('step.py', 'import torch\nx = torch.load("x")\n', 'torch.load'),
  'yaml': ('step.py', 'import yaml\nx = yaml.load("x")\n', 'yaml.load'),
  'chmod': ('step.py', 'import os\nos.chmod("x", 7)\n', 'calls os.chmod'),
  'allow_pickle': (
    'step.py', 'import numpy as np\nx = np.load("x", allow_pickle=True)\n',
    'allow_pickle is not False',
  ),
  'remote_code': (
    'step.py', 'def _f(load, yes):\n  return load("x", trust_remote_code=yes)\n',
    'trust_remote_code is not False',
  ),
  'shell': (
    'step.py', 'import subprocess\nsubprocess.run("ls", shell=True)\n',
    'shell is not False',
  ),
  'wide_function': (
    'step.py', 'def _f(a, b, c, d, e, f, *, g): ...\n', '_f takes 7 arguments',
  ),
  'bare_argument': (
    'step.py', 'def f(a: int, b): ...\n', 'f does not annotate b',
  ),
  'bare_method': (
    'step.py', 'class A:\n  def f(self, b): ...\n', 'f does not annotate b',
  ),
  'long_function': (
    'step.py', 'def f():\n' + '  pass\n' * MAX_FUNCTION,
    f'f has {MAX_FUNCTION + 1} lines',
  ),
  'long_package': (
    'step.py', 'x = 1\n' * MAX_LINES,
    f'the package has {MAX_LINES // 100}',
  ),
}  # fmt: skip


def plant(root, files):
  for name, text in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_clean_tree(tmp_path):
  fits = {'step.py': 'def f():\n' + '  pass\n' * (MAX_FUNCTION - 1)}
  plant(tmp_path, CLEAN | fits)
  assert complaints(tmp_path) == []


@pytest.mark.parametrize('fault', FAULTS)
def test_fault_is_found(fault, tmp_path):
  name, text, said = FAULTS[fault]
  plant(tmp_path, CLEAN)
  plant(tmp_path, {name: text})
  found = complaints(tmp_path)
  assert len(found) == 1 and said in found[0], found
