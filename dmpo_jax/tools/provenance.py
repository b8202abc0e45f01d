"""Where a run's numbers come from: a record of each start, in provenance.json.

What config.json does not say: overrides, code, versions, devices, flags.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
from absl import logging

from dmpo_jax import metrics

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
FLAGS = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'JAX_PLATFORMS')
LONGEST = 1 << 20  # characters of a diff that are kept


def record(overrides, seeds):
  """A JSON-able dict of this start; asks git, if it and a repository are there.

  overrides: {field: value} of the command line; seeds: {name: number}.
  """
  versions = {}
  for name in PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return dict(
    time=datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    command=sys.argv,
    overrides=overrides,
    seeds=seeds,
    git=code(),
    versions={'python': platform.python_version(), **versions},
    device=jax.devices()[0].device_kind,
    devices=jax.device_count(),
    processes=jax.process_count(),
    host=platform.platform(),
    flags={name: os.environ[name] for name in FLAGS if name in os.environ},
  )


def code():
  """Revision, diff to it and files it has not, of this project; {} if unknown.

  Only of a repository whose root is the project's: not of one around it.
  """
  root = pathlib.Path(__file__).resolve().parents[1]

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


def append(workdir, entry):
  """Adds a record to the workdir's list; a damaged list is kept beside it."""
  path = os.path.join(workdir, FILE)
  entries = []
  if os.path.exists(path):
    try:
      with open(path, encoding='utf-8') as f:
        entries = list(json.load(f))
    except (ValueError, TypeError):
      logging.warning('%s is damaged: it is now %s.damaged', path, path)
      os.replace(path, path + '.damaged')
  metrics.replace(path, json.dumps([*entries, entry], indent=2))
