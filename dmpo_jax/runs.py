"""Workdirs: which run a command means, and whether it may go on or be judged there.

A workdir is a run once something was computed in it: a checkpoint or a row of metrics.
Before that its config.json binds nobody.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
from typing import Any

import jax
from ml_collections import ConfigDict

from dmpo_jax import check, files, metrics, resume

FOLDER = 'runs'  # of the default workdirs
EVALS = 'evals'  # of the results of checkpoints that no run here has made


def path_of(flag: str, path: str, written: bool = False, file: bool = False) -> str:
  """Returns the path of a flag with ~ expanded, if files can lie there.

  written: the command begins to write there. file: it is a file, which may be there.
  ValueError names the flag and what is in the way; '' stays ''.
  """
  if not path:
    return path
  if found := re.match(r'(\w+):/', path):
    raise ValueError(
      f'{flag}={path}: {found[1]}:// is no path of a file system: mount the bucket '
      '(such as by gcsfuse) and give the path of the mount'
    )
  path = os.path.expanduser(path)
  if path.startswith('~'):
    raise ValueError(f'{flag}={path}: there is no such user')
  above = os.path.abspath(path)
  if file:
    if os.path.isdir(above):
      raise ValueError(f'{flag}={path} is a folder: name a file in it')
    above = os.path.dirname(above)
  while not os.path.lexists(above):
    above = os.path.dirname(above)
  if not os.path.isdir(above):
    raise ValueError(f'{flag}={path}: {above} is no folder: name another path')
  if written and not os.access(above, os.W_OK):
    raise ValueError(f'{flag}={path}: {above} cannot be written to: name another path')
  return path


def workdir_of(path: str, written: bool = False) -> str:
  """Returns `path_of` --workdir. ValueError if Orbax could not read checkpoints there.

  Orbax looks for its files by patterns, and its storage turns \\ into /.
  """
  path = path_of('--workdir', path, written)
  if bad := sorted(set(os.path.abspath(path)) & set('*?[\\')):
    raise ValueError(
      f'--workdir={path}: checkpoints below {os.path.abspath(path)} could not be read '
      f'again, because of {" ".join(bad)} in the path: name another'
    )
  return path


def default(c: Any) -> str:
  """Returns runs/NAME-HASH; fields that training does not read are not in the hash."""
  fields = {k: v for k, v in check.plain(c).items() if not k.startswith(check.UNNAMED)}
  digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
  return os.path.join(FOLDER, f'{c.name}-{digest.hexdigest()[:8]}')


def is_begun(workdir: str) -> bool:
  """Returns whether anything was computed in a workdir."""
  saved = any(resume.saved_updates(workdir, phase) for phase in ('sft', 'pairs', 'rl'))
  return saved or is_done(workdir) or bool(metrics.read(workdir))


def read_config(workdir: str) -> dict[str, Any]:
  """Returns the sections of a workdir's config.json; {} if there is none."""
  try:
    return files.read_object(os.path.join(workdir, 'config.json'))
  except ValueError as error:
    raise ValueError(f'{error}: remove it if this is the config of that run') from None


def config_of(workdir: str) -> ConfigDict:
  """Returns the config of the run in a workdir, for a command without --config.

  ValueError if there is none, or if its fields are not those of this version.
  """
  saved = read_config(workdir)
  if not saved:
    raise ValueError(
      f'--config=FILE is missing, such as configs/quickstart.py, and no run is in '
      f'--workdir={workdir} (-h lists the flags)'
    )
  c = ConfigDict(tuples(saved))
  try:
    check.section_problems(c)
  except (KeyError, AttributeError, TypeError) as error:
    raise ValueError(
      f'{workdir}/config.json was written by another version of this code ({error}): '
      'give --config=FILE'
    ) from None
  return c


def tuples(x: Any) -> Any:
  """Returns what JSON holds as a config does: with tuples for lists."""
  if isinstance(x, dict):
    return {name: tuples(value) for name, value in x.items()}
  return tuple(map(tuples, x)) if isinstance(x, list) else x


def other(c: Any, workdir: str, free: tuple[str, ...]) -> str:
  """Returns how the config of a begun run differs from c, but in fields of `free`."""
  old = read_config(workdir) if is_begun(workdir) else {}
  return check.changes(check.flatten(old), check.plain(c), free) if old else ''


def refuse_other(c: Any, workdir: str, free: tuple[str, ...]) -> None:
  """Raises ValueError if a workdir has a run of another config."""
  if changed := other(c, workdir, free):
    raise ValueError(
      f'{workdir} was written by another config ({changed}): name another --workdir, '
      f'or leave out --config to take its own (only {", ".join(free)} may change)'
    )


def claim(c: Any, workdir: str) -> None:
  """Writes config.json where nothing was computed yet; call it under guard.alone.

  ValueError if the workdir has a run of another config.
  """
  refuse_other(c, workdir, check.FREE)
  if jax.process_index() == 0 and not (is_begun(workdir) and read_config(workdir)):
    text = c.to_json(sort_keys=True, indent=2)
    files.replace(os.path.join(workdir, 'config.json'), text)


def find(c: Any, workdir: str = '') -> tuple[str, dict[str, str]]:
  """Returns the workdir of the run that c may judge, and runs that nearly fit.

  The run may differ in the fields of check.JUDGING. '' if there is none. The others
  have the name and the model.checkpoint of c: workdir -> how they differ. ValueError
  if several fit, or if the named workdir has a run of another config.
  """
  if workdir:
    refuse_other(c, workdir, check.JUDGING)
    return workdir if is_begun(workdir) else '', {}
  if is_begun(default(c)) and not other(c, default(c), check.JUDGING):
    return default(c), {}
  fits, near = [], {}
  for path in sorted(glob.glob(os.path.join(FOLDER, f'{glob.escape(c.name)}-*'))):
    with contextlib.suppress(ValueError):  # a damaged file is no run
      saved = check.flatten(read_config(path))
      if saved and is_begun(path):
        changed = other(c, path, check.JUDGING)
        if not changed:
          fits.append(path)
        elif saved['model.checkpoint'] == c.model.checkpoint:
          near[path] = changed
  if len(fits) > 1:
    raise ValueError(f'{", ".join(fits)} fit this config: name one by --workdir')
  return fits[0] if fits else '', near


def is_done(workdir: str) -> bool:
  """Returns whether a run is complete: results.json, the last file, is there and whole.

  A damaged one is made again.
  """
  with contextlib.suppress(FileNotFoundError, ValueError):
    files.read_json(os.path.join(workdir, 'results.json'))
    return True
  return False
