"""Methods that mergekit does not have, in recipes: by the names and parameters of the catalog."""

import pathlib

import folders
import numpy as np
import pytest
import recipes
import small
from marking import some_fast
from recipes import problems

import jaxmerge
from jaxmerge import methods
from jaxmerge.catalog import lookup
from jaxmerge.files import execute
from jaxmerge.io.tensors.tensor import Files
from jaxmerge.recipe import METHODS

# Methods whose parameters, or number of models, are mergekit's.
OTHERS = {"linear", "dare_linear"}
OWN = [n for n in lookup.METHODS if METHODS[n].parameters == dict(lookup.METHODS[n].parameters)]
FAST = {"wudi": {"steps": 5}, "optmerge": {"steps": 5}, "doge": {"steps": 5}}
COUNT = {"trimmed_mean": 3, "krum": 5}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
  """A base and five models near it, small enough for many decompositions."""
  root = tmp_path_factory.mktemp("family")
  return root, folders.family(root, count=5)


def test_every_method_of_the_library_has_a_name_in_recipes():
  assert METHODS.keys() == lookup.METHODS.keys() | OTHERS
  assert len(OWN) >= 23


@pytest.mark.parametrize("name", some_fast(OWN, ["consensus"]))
def test_a_recipe_is_the_method(family, tmp_path, monkeypatch, name):
  root, (base, *models) = family
  monkeypatch.chdir(root)  # Masks depend on the names of the models.
  entry = lookup.METHODS[name]
  count = entry.models[0] if entry.models[1] else max(2, entry.models[0])
  settings = FAST.get(name, {})
  lines = [f"merge_method: {name}", "seed: 7", "models:"]
  lines += [f"  - model: m{k}" for k in range(count)]
  lines += ["base_model: base"] if METHODS[name].base == "required" else []
  lines += [f"parameters: {{{', '.join(f'{n}: {v}' for n, v in settings.items())}}}"]
  (tmp_path / "recipe.yml").write_text("\n".join(lines) + "\n")
  found = folders.read(
    execute.run(recipes.plan_of_file(tmp_path / "recipe.yml", Files()), tmp_path / "out")
  )
  method, stack = getattr(methods, name)(**settings), jaxmerge.stack(models[:count])
  options = {"names": [f"m{k}" for k in range(count)], "seed": 7 if METHODS[name].random else None}
  if METHODS[name].base == "required":
    expected = jaxmerge.merge(method, stack, base, **options)
  else:
    expected = jaxmerge.merge(method, stack, **options)
  small.close(found, {n: np.asarray(x) for n, x in expected.items()}, 2e-5)


@pytest.mark.slow
def test_words_choose(family, tmp_path):
  root, (base, *models) = family
  text = f"""
merge_method: lwptv
base_model: {root / "base"}
models:
  - {{model: {root / "m0"}, parameters: {{weight: 2.0}}}}
  - model: {root / "m1"}
parameters: {{score: rms, prune: highest, prune_ratio: 0.5}}
"""
  (tmp_path / "recipe.yml").write_text(text)
  found = folders.read(
    execute.run(recipes.plan_of_file(tmp_path / "recipe.yml", Files()), tmp_path / "out")
  )
  method = methods.lwptv(0.5, weight=(2.0, 1.0), score="rms", prune="highest")
  expected = jaxmerge.merge(method, jaxmerge.stack(models[:2]), base, names=["m0", "m1"])
  small.close(found, {n: np.asarray(x) for n, x in expected.items()})


RECIPE = """\
merge_method: {method}
base_model: base
models: [{{model: m0}}, {{model: m1}}]
parameters: {{{parameters}}}
"""


@pytest.mark.parametrize(
  ("method", "parameters", "message"),
  [
    ("lwptv", "score: deviaton", "score cannot be 'deviaton'; did you mean 'deviation'? Known: "),
    ("lwptv", "prune: 1", "prune cannot be 1; Known: highest, lowest"),
    ("drm", "drop_rate: 1.5", "drop_rate must be in [0, 1], got 1.5"),
    ("doge", "steps: 2.5", "steps must be a whole number in [0, infinity), got 2.5"),
    ("pcb", "ratios: 0.2", "unknown key 'ratios' in the parameters of pcb; did you mean 'ratio'?"),
    ("opmc", "alpha: 0.2", "merge_method cannot be 'opmc'; did you mean 'opcm'?"),
    ("analogy", "scale: 1", "analogy merges 3 and the base, got 2 beside the base: m0, m1"),
    ("iso_c", "weight: 1", "weight is no parameter of iso_c, which has scale, "),
  ],
)
def test_what_is_wrong_is_told(method, parameters, message):
  text = RECIPE.format(method=method, parameters=parameters)
  assert any(message in line for line in problems(text, "base", "m0", "m1"))


def test_a_recipe_of_its_own_names(tmp_path, family, capsys):
  """The summary of a dry run names the method as the catalog does."""
  from jaxmerge.cli import main

  root, _ = family
  path = pathlib.Path(tmp_path / "recipe.yml")
  path.write_text(
    f"merge_method: median\nmodels: [{{model: {root / 'm0'}}}, {{model: {root / 'm1'}}}]\n"
  )
  assert main.main(["merge", str(path), str(tmp_path / "out"), "--dry-run"]) == 0
  assert "median" in capsys.readouterr().out
