"""The documentation agrees with the code, and its links lead somewhere."""

import pathlib
import re

import pytest

from dmpo_jax import metrics
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
  phases = {'sft', 'rl', 'update', 'eval', 'held_out'}
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
