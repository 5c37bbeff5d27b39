"""Checkpoints of a run in a recipe."""

import json

import folders
import numpy as np
import pytest

import jaxmerge
from jaxmerge.cli import main
from jaxmerge.io.huggingface import folder
from jaxmerge.io.tensors import safetensors
from jaxmerge.recipe import RecipeError

STEPS = (500, 1000, 1500, 2000)
SMA = {"merge_method": "checkpoint_average", "models": [{"run": "run", "steps": "last 3"}]}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path):
  """A run of the Hugging Face trainer, by step."""
  for step in STEPS:
    folders.write(tmp_path / "run" / f"checkpoint-{step}", folders.tensors(step))
  return {step: folders.tensors(step) for step in STEPS}


def merged(recipe, name="model.embed_tokens.weight", **options):
  out = jaxmerge.merge_recipe(recipe, "out", replace=True, **options)
  return safetensors.load(out / "model.safetensors")[name]


def test_the_last_checkpoints_are_averaged(run):
  of = [run[step]["model.embed_tokens.weight"].astype(np.float64) for step in STEPS[-3:]]
  np.testing.assert_allclose(merged(SMA), np.mean(of, axis=0), rtol=3e-7, atol=1e-7)


def test_weights_of_a_decay_are_shown_and_recorded(run, tmp_path, capsys):
  decay = {**SMA, "parameters": {"kind": "decay", "decay": "cosine", "zero_at": "last"}}
  (tmp_path / "recipe.yml").write_text(json.dumps(decay))
  assert main.main(["merge", "recipe.yml", "out", "--dry-run"]) == 0
  names = [f"run/checkpoint-{step}" for step in STEPS[-3:]]
  weights = ", ".join(f"{w} ({n})" for w, n in zip((0.5, 0.5, 0), names, strict=True))
  assert f"weights, the oldest first: {weights}\n" in capsys.readouterr().out
  of = [run[step]["model.norm.weight"].astype(np.float64) for step in STEPS[-3:]]
  np.testing.assert_allclose(merged(decay, "model.norm.weight"), (of[0] + of[1]) / 2, atol=3e-7)
  (job,) = folder.provenance(tmp_path / "out")["jobs"]
  assert (job["models"], job["weights"]) == (names, [0.5, 0.5, 0.0])


def test_a_decay_over_unequal_steps_is_noted(run, tmp_path):
  uneven = {**SMA, "models": [{"run": "run", "steps": [500, 1000, 2000]}]}
  merged({**uneven, "parameters": {"kind": "decay"}})
  (note,) = folder.provenance(tmp_path / "out")["notes"]
  assert note.startswith("steps 500, 1000, 2000 are not equally spaced; a decay takes them so")
  merged(uneven)
  assert "notes" not in folder.provenance(tmp_path / "out")


def test_a_decay_of_another_kind_is_refused(run):
  with pytest.raises(RecipeError, match=r"parameters.decay: decay has no effect with kind 'ema'"):
    jaxmerge.merge_recipe({**SMA, "parameters": {"kind": "ema", "decay": "linear"}}, "out")


def test_steps_are_in_the_order_of_their_numbers(run):
  """By name 1000 comes before 500."""
  newest = {**SMA, "parameters": {"kind": "ema", "alpha": 1.0}}
  newest["models"] = [{"run": "run", "steps": [1000, 500]}]
  np.testing.assert_array_equal(merged(newest), run[1000]["model.embed_tokens.weight"])


def test_they_stand_beside_other_models_and_have_parameters(run):
  items = [{"run": "run", "steps": "500:1000", "parameters": {"weight": 0.25}}]
  items += [{"model": "run/checkpoint-2000", "parameters": {"weight": 0.5}}]
  of = {n: x["model.norm.weight"].astype(np.float64) for n, x in run.items()}
  expected = 0.25 * of[500] + 0.25 * of[1000] + 0.5 * of[2000]
  recipe = {"merge_method": "linear", "models": items}
  np.testing.assert_allclose(merged(recipe, "model.norm.weight"), expected, rtol=3e-7, atol=1e-7)


def test_missing_steps_are_named_with_the_way_on(run):
  wrong = {**SMA, "models": [{"run": "run", "steps": "500:2500:500"}]}
  with pytest.raises(RecipeError) as caught:
    jaxmerge.merge_recipe(wrong, "out")
  assert str(caught.value) == (
    "models[0].steps: run: step 2500 is missing; there are 500, 1000, 1500, 2000: choose "
    "'500:2500' for those that exist, or some of these."
  )


def test_a_broken_step_is_named_with_the_way_on(run, tmp_path):
  path = tmp_path / "run" / "checkpoint-1500" / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(RecipeError, match=r"checkpoint-1500/model.safetensors") as caught:
    jaxmerge.merge_recipe(SMA, "out")
  assert str(caught.value).endswith("Without this step: steps: [1000, 2000].")
  merged({**SMA, "models": [{"run": "run", "steps": [1000, 2000]}]})


def test_a_half_written_step_is_named_and_not_read(run, tmp_path, capsys):
  (tmp_path / "run" / "2500.orbax-checkpoint-tmp-17").mkdir()
  (tmp_path / "recipe.yml").write_text(json.dumps(SMA))
  assert main.main(["merge", "recipe.yml", "out", "--dry-run"]) == 0
  assert "run: 2500.orbax-checkpoint-tmp-17 is half written: not read." in capsys.readouterr().out
  merged(SMA)
  facts = folder.provenance(tmp_path / "out")
  assert [*facts["inputs"]] == [f"run/checkpoint-{step}" for step in STEPS[-3:]]


@pytest.mark.parametrize(
  ("item", "text"),
  [
    ({"run": "run"}, "pass either steps"),
    ({"run": "none", "steps": "all"}, "none: no such folder"),
    ({"run": "run", "steps": "last 3", "step": 2}, "unknown key 'step' in a run"),
    ({"run": "run", "steps": "newest"}, "steps must be 'last 8'"),
    ({"run": "run", "tokens": "last 1B"}, "set tokens_per_step"),
  ],
)
def test_what_is_wrong_is_said(run, item, text):
  with pytest.raises(RecipeError, match=text):
    jaxmerge.merge_recipe({**SMA, "models": [item]}, "out")
