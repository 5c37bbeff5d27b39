"""Consensus Merging and RAM: entries by the number of models that change or need them."""

import itertools

import jax.numpy as jnp
import numpy as np
from example import close, merged

import jaxmerge
from jaxmerge import methods


def test_consensus_of_none_and_of_too_many():
  """No entry is dropped, or all are; a larger threshold drops more."""
  close(merged(methods.consensus(0.3, 0.4, 0)), merged(methods.task_arithmetic(0.3)))
  close(merged(methods.consensus(1.0, 0.4, 4)), np.zeros(6), atol=0)
  kept = [merged(methods.consensus(1.0, t)) != 0 for t in (0.0, 0.2, 0.4, 0.8, 2.0)]
  assert all((more >= fewer).all() for more, fewer in itertools.pairwise(kept))
  assert kept[0].sum() > kept[-1].sum()


def test_ratios_of_ram_are_counted_over_the_leaf_or_the_model():
  """The first model shares an entry in a, and has two of its own in b: ratios 1/0, 0/2 or 1/2."""
  base = {"a": jnp.zeros(1), "b": jnp.zeros(2)}
  models = {"a": jnp.ones((2, 1)), "b": jnp.array([[1.0, 2.0], [0.0, 0.0]])}
  for scope, factor in (("leaf", 1.0), ("tree", 1.25)):
    out = jaxmerge.merge(methods.ramplus_tl(boost=0.5, limit=4.0, scope=scope), models, base)
    close(out["a"], [1.0])
    close(out["b"], [factor, 2 * factor])
