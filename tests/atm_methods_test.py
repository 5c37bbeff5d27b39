"""Any method merges in a round of the loop: what it does with the copies is what `merge` does."""

import numpy as np
import pytest
import small_tasks as small

import jaxmerge
from jaxmerge import mesh as meshes
from jaxmerge import methods
from jaxmerge.atm import baselines, loop, settings

NAMES = ("ant", "bee", "cat", "dog", "eel")
LAYOUT = (("kernel$", "io"),)
# One of each kind: random masks by row, an order, whole matrices, ranks beside them, whole models.
KINDS = {
  "della": methods.della(),
  "checkpoint_average": methods.checkpoint_average("wma"),
  "tsv": methods.tsv(),
  "doge": methods.doge(steps=5),
  "krum": methods.krum(),
}


def chosen(**changes):
  return settings.Settings(rounds=1, epochs=2.0, batch_size=4, learning_rate=0.05, **changes)


@pytest.fixture(scope="module")
def tuned():
  """The start, the tasks, and the copies that are tuned on them."""
  tasks, start = [small.classified(n, 8) for n in NAMES], small.weights()
  copies, _ = baselines.experts(small.network, start, tasks, chosen(), mesh=meshes.make(1))
  return start, tasks, copies


@pytest.mark.parametrize(("name", "at_once"), [*((n, 0) for n in KINDS), ("tsv", 2)])
def test_a_round_merges_what_was_tuned(tuned, name, at_once):
  start, tasks, copies = tuned
  method = KINDS[name]
  seed = {"seed": int(loop._seed(0, 0))} if name == "della" else {}
  expected = jaxmerge.merge(method, start, copies, names=NAMES, layout=LAYOUT, **seed)
  found = loop.tune_and_merge(
    small.network,
    start,
    tasks,
    method,
    chosen(outer="none", at_once=at_once),
    mesh=meshes.make(1),
    layout=LAYOUT,
  )
  assert np.abs(expected["dense"]["kernel"] - start["dense"]["kernel"]).max() > 1e-3
  small.assert_close(found.params, expected, rtol=1e-5, atol=1e-5)
