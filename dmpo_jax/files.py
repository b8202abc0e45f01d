"""Files of a workdir that are written whole or not at all."""

import os


def replace(path: str | os.PathLike, text: str) -> None:
  """Replaces a file by `text` in one step, or leaves it as it was."""
  temporary = f'{path}.new'
  with open(temporary, 'w', encoding='utf-8') as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)
