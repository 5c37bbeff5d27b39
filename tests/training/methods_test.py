"""Any method merges in a round of the loop: what it does with the copies is what `merge` does."""

import numpy as np
import pytest
import small_tasks as small
from marking import some_fast

import jaxmerge
from jaxmerge import methods
from jaxmerge.catalog import lookup
from jaxmerge.core import stage
from jaxmerge.parallel import mesh as meshes
from jaxmerge.training import build, finetune, loop, settings

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
  copies, _ = finetune.experts(small.network, start, tasks, chosen(), mesh=meshes.make(1))
  return start, tasks, copies


@pytest.mark.parametrize("at_once", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", some_fast(KINDS, ["tsv"]))
def test_a_round_merges_what_was_tuned(tuned, name, at_once):
  start, tasks, copies = tuned
  method = KINDS[name]
  seed = {"seed": int(build.seed(0, 0))} if name == "della" else {}
  expected = jaxmerge.merge(method, copies, start, names=NAMES, layout=LAYOUT, **seed)
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


# Numbers that methods share, and whose defaults differ.
COMMON = dict(scale=0.5, density=0.5, alpha=0.5, threshold=1e-3, learning_rate=1e-4, rank_tol=1e-6)


def together(names):
  """Few methods of many: each acts on the leaves of its name, and they share what numbers they do.

  A round is one program, and compiling it is what takes the time.
  """
  groups = []
  for name in names:
    own = {n: v for n, v in COMMON.items() if n in lookup.entry(name).parameters}
    made = getattr(methods, name)(**own)
    made = stage.masked(made, lambda leaf, room=f"{name}/": leaf.startswith(room))
    for group in groups:
      left, right = (stage.hparams(m) for m in (group["method"], made))
      if all(left[n] == right[n] for n in left.keys() & right.keys()):
        group["names"].append(name)
        group["method"] = stage.chain(group["method"], made)
        break
    else:
      groups.append({"names": [name], "method": made})
  return groups


@pytest.mark.slow
def test_a_round_merges_by_each_method_of_the_catalog():
  """That takes any number of models."""

  def network(params, inputs, head):
    return sum(inputs @ own["kernel"] for own in params.values()) @ head / len(params)

  tasks, kernel = [small.classified(n, 4) for n in NAMES], small.weights()["dense"]["kernel"]
  plain = chosen(outer="none", optimizer="sgd", clip_norm=0.0)
  every = [n for n, e in lookup.METHODS.items() if e.models[1] is None]
  one = meshes.make(1)
  for group in together(every):
    start = {n: {"kernel": kernel} for n in group["names"]}
    copies, _ = finetune.experts(network, start, tasks, plain, mesh=one)
    method = group["method"]
    seed = {"seed": int(build.seed(0, 0))} if "seed" in stage.hparams(method) else {}
    expected = jaxmerge.merge(method, copies, start, names=NAMES, layout=LAYOUT, **seed)
    found = loop.tune_and_merge(network, start, tasks, method, plain, mesh=one, layout=LAYOUT)
    small.assert_close(found.params, expected, rtol=1e-5, atol=1e-6)
    for name, own in expected.items():
      assert np.abs(own["kernel"] - kernel).max() > 1e-4, name
