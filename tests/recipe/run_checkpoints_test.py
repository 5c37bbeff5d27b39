"""Runs that Orbax's CheckpointManager has written, merged step by step."""

import json
import pathlib

import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxmerge
from jaxmerge import methods
from jaxmerge.files import runs
from jaxmerge.io.checkpoints import store
from jaxmerge.io.tensors import safetensors
from jaxmerge.recipe import merge_curve

STEPS = (900, 1000, 1100, 1200)


def params(step):
  rng = np.random.default_rng(step)
  return {"dense": {"kernel": rng.normal(size=(6, 4)).astype(np.float32)}}


@pytest.fixture
def run(tmp_path):
  """A run with the optimiser's state beside the model."""
  with ocp.CheckpointManager(tmp_path / "run") as manager:
    for step in STEPS:
      state = {"params": params(step), "opt_state": {"mu": params(0)}, "step": np.int32(step)}
      manager.save(step, args=ocp.args.StandardSave(state))
  return tmp_path / "run"


def decayed(steps):
  weights = np.diff(np.sqrt(range(len(steps) + 1))) / np.sqrt(len(steps))
  return sum(
    w * params(s)["dense"]["kernel"].astype(np.float64) for w, s in zip(weights, steps, strict=True)
  )


def merged(out):
  (name,) = safetensors.header(out / "model.safetensors").tensors
  return safetensors.load(out / "model.safetensors")[name]


@pytest.mark.parametrize("item", ["", ":params"])
def test_a_run_of_orbax_is_merged(run, tmp_path, item):
  recipe = {
    "merge_method": "checkpoint_average",
    "models": [{"run": f"{run}{item}", "steps": "last 3"}],
    "parameters": {"kind": "decay"},
  }
  out = jaxmerge.merge_recipe(recipe, tmp_path / "out")
  np.testing.assert_allclose(merged(out), decayed(STEPS[1:]), atol=1e-6)
  facts = json.loads((out / "jaxmerge_provenance.json").read_text())
  assert [pathlib.Path(name).name.split(":")[0] for name in facts["inputs"]] == [
    "1000",
    "1100",
    "1200",
  ]


def test_from_python(run, tmp_path):
  chosen = runs.checkpoints(run, "1000:1200:100")
  out = jaxmerge.merge_files(
    methods.checkpoint_average("decay"), [c.folder for c in chosen], tmp_path / "out"
  )
  np.testing.assert_allclose(merged(out), decayed(STEPS[1:]), atol=1e-6)


def test_a_step_without_metadata_is_named_with_the_way_on(run, tmp_path):
  for path in (run / "1100").rglob("_METADATA"):
    path.unlink()
  recipe = {"merge_method": "checkpoint_average", "models": [{"run": str(run), "steps": "last 2"}]}
  with pytest.raises(ValueError, match="1100") as caught:
    jaxmerge.merge_recipe(recipe, tmp_path / "out")
  assert str(caught.value).endswith("Without this step: steps: [1200].")


def test_a_run_of_this_library(tmp_path):
  with store.Checkpoints(tmp_path / "checkpoints" / "atm") as saved:
    for step in (1, 2, 3):
      saved.save(step, {"params": params(step)}, {})
  recipe = {
    "merge_method": "checkpoint_average",
    "models": [{"run": str(tmp_path), "steps": "all"}],
  }
  recipe["parameters"] = {"kind": "decay"}
  out = jaxmerge.merge_recipe(recipe, tmp_path / "out")
  np.testing.assert_allclose(merged(out), decayed((1, 2, 3)), atol=1e-6)


def test_a_run_behind_a_url(run, tmp_path):
  """As of a bucket, where a step is whole if Orbax's mark is in it."""
  (run / "1200" / "commit_success.txt").unlink()
  opened = runs.open_run(f"file://{run}")
  assert opened.steps == STEPS[:3]
  assert [p.name for p in opened.unfinished] == ["1200"]
  recipe = {
    "merge_method": "checkpoint_average",
    "models": [{"run": f"file://{run}:params", "steps": "last 2"}],
    "parameters": {"kind": "decay"},
  }
  out = jaxmerge.merge_recipe(recipe, tmp_path / "out")
  np.testing.assert_allclose(merged(out), decayed(STEPS[1:3]), atol=1e-6)
  with pytest.raises(ValueError, match="has no folder of a step"):
    runs.open_run(f"file://{tmp_path}/none")


def test_the_curve_of_a_run_of_orbax(run, tmp_path):
  def first(out):
    return {"first": float(merged(out).ravel()[0])}

  options = {"window": 3, "every": 1, "evaluate": first}
  record = merge_curve.merge_run(f"{run}:params", tmp_path / "out", **options)
  for point, steps in zip(record["points"], (STEPS[:3], STEPS[1:]), strict=True):
    assert point["steps"] == list(steps)
    assert point["scores"]["first"] == pytest.approx(decayed(steps).ravel()[0], abs=1e-6)
