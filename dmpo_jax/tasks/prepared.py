"""data.path = tfds: the field's data sets through tensorflow-datasets.

GSM8K is downloaded by the builder that comes with it. The others are prepared
from files that are put into its folder for manual downloads. Everything is
stored as array_record and read without TensorFlow.
"""

import json
import os

import tensorflow_datasets as tfds
from tensorflow_datasets.text.gsm8k import Gsm8k  # found by import alone

WHERE = {
  'gsm8k': 'github.com/openai/grade-school-math, '
  'grade_school_math/data/train.jsonl and test.jsonl',
  'math': 'train: ankner/math-500, test: HuggingFaceH4/MATH-500, both on '
  'huggingface.co, as train.parquet (or .jsonl) and test.jsonl',
  'countdown': 'train: Jiayi-Pan/Countdown-Tasks-3to4 on huggingface.co, '
  'test: countdown_cd3_test.jsonl of github.com/dllm-reasoning/'
  'd1, as train.jsonl and test.jsonl',
  'sudoku': '4x4_sudoku_unique_puzzles.csv and 4x4_test_sudoku.csv of '
  'github.com/dllm-reasoning/d1, as train.csv and test.csv',
}


class DmpoProblems(tfds.core.GeneratorBasedBuilder):
  """A task's train and test files, each problem as one JSON text."""

  VERSION = tfds.core.Version('1.0.0')
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in WHERE]
  MANUAL_DOWNLOAD_INSTRUCTIONS = 'train and test files: see dmpo_jax WHERE'
  read = staticmethod(lambda path: ())  # file -> examples; set by `records`
  files = staticmethod(lambda folder, split: '')  # (folder, split) -> file

  def _info(self):
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict({'example': tfds.features.Text()})
    )

  def _split_generators(self, dl_manager):
    folder = os.path.join(dl_manager.manual_dir, self.builder_config.name)
    return {
      split: self._generate_examples(self.files(folder, split))
      for split in ('train', 'test')
    }

  def _generate_examples(self, path):
    for i, example in enumerate(self.read(path)):
      yield i, {'example': json.dumps(example)}


def records(task, split, read, files):
  """The examples of a task's train or test file, prepared at first use.

  read: file -> examples; files: (folder, split) -> file. ValueError says which
  files are missing, where they go and where they come from.
  """
  if task == 'gsm8k':
    builder = Gsm8k(file_format='array_record')
  else:
    builder = DmpoProblems(config=task, file_format='array_record')
    builder.read, builder.files = read, files
  try:
    builder.download_and_prepare()
  except Exception as error:  # of the network, of TFDS, of the files
    manual = os.path.join(
      os.path.expanduser(str(tfds.core.constants.DATA_DIR)), 'downloads', 'manual', task
    )
    first = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(
      f'data.path = tfds: {task} cannot be prepared ({first}). It needs '
      f'{WHERE[task]}; put them into {manual} (data.path = that directory '
      'works as well)'
    ) from error
  for row in builder.as_data_source(split=split):
    row = {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()}
    yield (
      json.loads(row['example'])
      if 'example' in row
      else {name: row[name] for name in ('question', 'answer')}
    )
