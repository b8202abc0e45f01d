"""Reads data sets through tensorflow-datasets: data.path = tfds, or a folder of its.

TFDS has a builder that downloads GSM8K. The other tasks are prepared from files
in its folder for manual downloads. Everything is stored as array_record and read
without TensorFlow.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants
from tensorflow_datasets.text.gsm8k import Gsm8k  # registers the builder


class DmpoProblems(tfds.core.GeneratorBasedBuilder):
  """Stores a task's train and test files, each problem as one JSON text."""

  VERSION = tfds.core.Version('1.0.0')
  MANUAL_DOWNLOAD_INSTRUCTIONS = 'train and test files: see Source.origin of the task'
  source: Any  # a datasets.Source, set by `records`

  def _info(self):
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict({'example': tfds.features.Text()})
    )

  def _split_generators(self, dl_manager):
    folder = os.path.join(dl_manager.manual_dir, self.source.task)
    return {
      split: self._generate_examples(folder, split) for split in ('train', 'test')
    }

  def _generate_examples(self, folder, split):
    for i, example in enumerate(self.source.read_split(folder, split)):
      yield i, {'example': json.dumps(example)}


def records(source: Any, split: str) -> Iterator[dict]:
  """Yields the examples of a datasets.Source's train or test file.

  They are prepared at first use. Raises ValueError that names the missing files,
  their folder and their origin.
  """
  if source.task == 'gsm8k':
    builder = Gsm8k(file_format='array_record')
  else:
    config = tfds.core.BuilderConfig(name=source.task)
    builder = DmpoProblems(config=config, file_format='array_record')
    builder.source = source
  try:
    builder.download_and_prepare()
  except Exception as error:  # of the network, of TFDS, of the files
    manual = os.path.join(
      os.path.expanduser(str(constants.DATA_DIR)), *('downloads', 'manual', source.task)
    )
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(
      f'data.path = tfds: {source.task} cannot be prepared ({reason}). Put a train '
      f'and a test file into {manual}, or set data.path to that directory. The '
      f'files are at: {source.origin}'
    ) from error
  read: Any = builder.as_data_source  # its decorator hides the signature
  for row in read(split=split):
    row = {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()}
    if source.task == 'gsm8k':
      yield {name: row[name] for name in ('question', 'answer')}
    else:
      yield json.loads(row['example'])


# --- a folder that TFDS has prepared


def splits_of(folder: str) -> list[str]:
  """Returns the splits of a data set that TFDS has prepared in a folder."""
  return list(_builder(folder).info.splits)


def folder_rows(folder: str, split: str) -> Iterator[dict]:
  """Yields the records of a split as plain values; ValueError if it cannot be read."""
  read: Any = _builder(folder).as_data_source
  try:
    for row in read(split=split):
      yield {name: _plain(value) for name, value in row.items()}
  except Exception as error:  # of its readers
    text = ' '.join(str(error).split())[:300]
    raise ValueError(
      f"{folder} cannot be read: prepare it with file_format='array_record' ({text})"
    ) from error


def _builder(folder: str) -> Any:
  try:
    return tfds.builder_from_directory(folder)
  except Exception as error:  # several kinds
    text = ' '.join(str(error).split())[:300]
    raise ValueError(f'{folder}: not a data set of TFDS, or damaged: {text}') from error


def _plain(value: Any) -> Any:
  if isinstance(value, bytes):
    return value.decode()
  return value.tolist() if hasattr(value, 'tolist') else value
