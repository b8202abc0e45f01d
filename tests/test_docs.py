"""The documentation agrees with the code, and its links lead somewhere."""

import pathlib
import re

import pytest

from dmpo_jax import config, conventions, metrics
from dmpo_jax.objectives import OBJECTIVES

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), ROOT / 'benchmarks/README.md')


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
  for link in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', page.read_text()):
    assert (page.parent / link).exists(), link


def test_every_metric_is_explained():
  text, _, others = (ROOT / 'docs/metrics.md').read_text().partition('## Names in')
  explained = set(re.findall(r'^\| `([^`]+)` \|', text, re.M))
  phases = {'sft', 'rl', 'update', 'eval', 'held_out', 'pairs', 'held_out_pairs'}
  assert explained - phases == set(metrics.METRICS)
  # The names beside those of other libraries are ours.
  ours = re.findall(r'^\| `(\w+)/([^`]+)`', others, re.M)
  assert len(ours) > 15 and {phase for phase, _ in ours} <= phases
  assert [name for _, name in ours if not metrics.meaning(name)] == []


def test_every_objective_is_listed():
  text = (ROOT / 'docs/objectives.md').read_text()
  assert set(re.findall(r'^\| `([a-z0-9_]+)` \| ', text, re.M)) == set(OBJECTIVES)


def test_glossary_is_sorted():
  rows = (ROOT / 'docs/glossary.md').read_text().splitlines()
  words = [row.split(' | ')[0].strip('| ').lower() for row in rows if row[:2] == '| ']
  assert words[1:] == sorted(words[1:])


def test_every_preset_is_listed_with_its_numbers():
  text = (ROOT / 'docs/evaluation.md').read_text()
  rows = dict(re.findall(r'^\| `(\w+)` \| (\d[\d, ]+) \|', text, re.M))
  assert set(rows) == set(conventions.PRESETS)
  for name, numbers in rows.items():
    sampler, row = conventions.sampler_of(name), text.split(f'| `{name}` |')[1]
    wanted = [sampler[x] for x in ('length', 'block', 'steps') if x in sampler]
    assert [int(x) for x in numbers.split(',')] == wanted, name
    cells = [cell.strip() for cell in row.split('|')[:4]]
    assert int(cells[3] or 0) == conventions.PRESETS[name].draws, name
    laws = [sampler.get(x) for x in ('temperature', 'top_p', 'top_k')]
    assert [float(x) for x in cells[1].split(',')] == [x for x in laws if x is not None]


def test_every_field_of_the_migration_page_exists():
  """And Python names on it are not taken for fields."""
  text = (ROOT / 'docs/migration.md').read_text()
  known = {name for o in OBJECTIVES for name in config.kinds(o)} | {'reward.weights'}
  named = set(re.findall(r'`([a-z]+(?:\.[a-z_]+)+)(?: *=[^`]*)?`', text))
  files = {name for name in named if name.endswith(('.py', '.md', '.jsonl', '.yaml'))}
  python = {name for name in named if name.startswith(('dj.', 'model.score'))}
  assert named - files - python <= known, named - files - python - known
  assert len(named & known) > 60
