"""Objectives by name. A new one is a file beside this and a line here."""

from dmpo_jax.objectives import dmpo

OBJECTIVES = {
    'dmpo': dmpo.OBJECTIVE,
}
