"""Trimming: how many entries remain, and norms that are restored."""

import jax.numpy as jnp
import numpy as np
import pytest
from example import TAU, close, merged
from marking import some_fast

import jaxmerge
from jaxmerge import methods


@pytest.mark.parametrize("norm", some_fast(["l1", "l2", "linf"], ["l2"]))
def test_trimming_gives_the_norm_back(norm):
  order = {"l1": 1, "l2": 2, "linf": np.inf}[norm]
  for method in (
    methods.ties(0.5, rescale=norm),
    methods.breadcrumbs(0.5, 0.2, 1.0, rescale=norm),
    methods.breadcrumbs_ties(0.5, 0.2, 1.0, rescale=norm),
  ):
    out = merged(method, TAU[:1])
    assert (out == 0).sum() >= 2
    close(np.linalg.norm(out, order), np.linalg.norm(TAU[0], order))
    close(merged(method, TAU[:1] * 0), np.zeros(6))


def test_at_least_one_entry_of_a_leaf_is_kept():
  """A fifth of four entries is none, rounded down."""
  tau = np.array([[1.0, -3.0, 2.0, 0.5]], np.float32)
  close(merged(methods.ties(0.2, scope="leaf", rule="exact"), tau), [0, -3, 0, 0])


@pytest.mark.parametrize("rule", ["kth", "exact"])
@pytest.mark.parametrize("scope", ["tree", "leaf"])
def test_the_entries_kept_are_counted_exactly(rule, scope):
  x = np.random.default_rng(0).permutation(100).astype(np.float32)[None] + 1
  models = {"a": jnp.asarray(x[:, :60]), "b": jnp.asarray(x[:, 60:])}
  method = methods.trim(0.5, scope=scope, rule=rule)
  for density in (0.001, 0.1, 0.29, 0.5, 0.7, 0.99, 1.0):
    out = jaxmerge.merge(method, models, hparams={"density": density})
    for names, size in [("ab", 100)] if scope == "tree" else [("a", 60), ("b", 40)]:
      kept = sum(int((out[n] != 0).sum()) for n in names)
      count = int(density * size)
      assert kept == (min(count + 1, size) if rule == "kth" else max(count, 1))
