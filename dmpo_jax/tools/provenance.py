"""Records each start of a run in provenance.json: code, versions, devices, flags.

These are the causes of a run's numbers that config.json does not hold.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging

from dmpo_jax import files

FILE = 'provenance.json'
PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'numpy',
  'transformers',
  'math-verify',
  'libtpu',
)
FLAGS = ('JAX_', 'XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'NVIDIA_TF32')  # they begin so
LONGEST = 1 << 20  # characters of a diff that are saved


def versions(packages: Sequence[str]) -> dict[str, str]:
  """Returns the versions of those packages that are installed."""
  found = {}
  for name in packages:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def record(
  overrides: dict[str, Any],
  seeds: dict[str, int],
  revisions: dict[str, str] | None = None,
) -> dict[str, Any]:
  """Returns this start as a dict for JSON; asks git for the code if it can.

  overrides: fields set on the command line, and their values. revisions: of what the
  fields name on the hub.
  """
  return dict(
    time=datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    command=sys.argv,
    overrides=overrides,
    seeds=seeds,
    git=code(),
    versions={'python': platform.python_version(), **versions(PACKAGES)},
    device=jax.devices()[0].device_kind,
    devices=jax.device_count(),
    processes=jax.process_count(),
    host=platform.platform(),
    flags={name: x for name, x in os.environ.items() if name.startswith(FLAGS)},
    revisions=revisions or {},
  )


def code() -> dict[str, Any]:
  """Returns this project's revision, the diff to it and its untracked files.

  Returns {} if they are unknown. Asks only a repository whose root is the
  project's, not one around it.
  """
  root = pathlib.Path(__file__).resolve().parents[2]

  def git(*args):
    return subprocess.run(
      ('git', '-C', root, *args),
      capture_output=True,
      check=True,
      timeout=60,
      encoding='utf-8',
      errors='replace',
    ).stdout

  try:
    if pathlib.Path(git('rev-parse', '--show-toplevel').strip()) != root:
      return {}
    diff = git('diff', 'HEAD')
    untracked = git('ls-files', '--others', '--exclude-standard').splitlines()
    return dict(
      revision=git('rev-parse', 'HEAD').strip(),
      untracked=untracked,
      diff=diff[:LONGEST],
      diff_characters=len(diff),
    )
  except (OSError, subprocess.SubprocessError):
    return {}


def read(workdir: files.Path) -> list[dict]:
  """Returns the recorded starts of a run; [] if there are none to be read."""
  try:
    entries = json.loads((pathlib.Path(workdir) / FILE).read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return []
  return [entry for entry in entries if isinstance(entry, dict)]


def append(workdir: files.Path, entry: dict[str, Any]) -> None:
  """Adds a start to the workdir's list; a damaged list is saved beside it."""
  path = os.path.join(workdir, FILE)
  entries = []
  if os.path.exists(path):
    try:
      with open(path, encoding='utf-8') as f:
        entries = list(json.load(f))
    except (ValueError, TypeError):
      logging.warning('%s is damaged: it is now %s.damaged', path, path)
      os.replace(path, path + '.damaged')
  old, new = (x.get('flags', {}) for x in (*entries[-1:], entry, entry)[:2])
  for name in sorted(old.keys() | new.keys()):
    if old.get(name) != new.get(name) and 'CACHE' not in name:
      logging.warning(
        '%s was %s at the last start, and is %s now: numbers may differ in rounding',
        name,
        old.get(name),
        new.get(name),
      )
  files.replace(path, json.dumps([*entries, entry], indent=2))
