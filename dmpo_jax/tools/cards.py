"""Results cards: evaluations that others compare with."""

from dmpo_jax.evaluate import as_text, rescore, run, source_of

__all__ = ['as_text', 'rescore', 'run', 'source_of']
