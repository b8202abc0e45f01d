"""Objectives by name. A new one is a file beside this and a line here."""

from dmpo_jax.objectives import (
  agrpo,
  coupled_grpo,
  diffpo,
  diffu_grpo,
  dmpo,
  egspo,
  espo,
  fork_grpo,
  gdpo,
  gdsd,
  just_grpo,
  mapg,
  residual,
  spg,
  vrpo,
  wd1,
)

OBJECTIVES = {
  'dmpo': dmpo.OBJECTIVE,
  'agrpo': agrpo.OBJECTIVE,
  'coupled_grpo': coupled_grpo.OBJECTIVE,
  'diffpo': diffpo.OBJECTIVE,
  'diffu_grpo': diffu_grpo.OBJECTIVE,
  'egspo': egspo.OBJECTIVE,
  'espo': espo.OBJECTIVE,
  'fork_grpo': fork_grpo.OBJECTIVE,
  'gdpo': gdpo.OBJECTIVE,
  'gdsd': gdsd.OBJECTIVE,
  'just_grpo': just_grpo.OBJECTIVE,
  'mapg': mapg.OBJECTIVE,
  'residual': residual.OBJECTIVE,
  'spg': spg.OBJECTIVE,
  'vrpo': vrpo.OBJECTIVE,
  'wd1': wd1.OBJECTIVE,
}
