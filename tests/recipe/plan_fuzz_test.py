"""Any recipe of models that are there is planned so that nothing is lost, or refused."""

import json
import os

import folders
import numpy as np
import pytest
import recipes
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmerge import errors
from jaxmerge.files import outcomes as outcome_words
from jaxmerge.io.tensors.tensor import Files
from jaxmerge.recipe import METHODS, RecipeError

UP, NORM, HEAD = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"
MODELS = ["base", "m0", "m1", "m2", "lacking", "tied", "wide", "more"]
NUMBERS = {"weight": [0.5, 1, 2], "t": [0, 0.5, 1], "density": [0.5, 1], "scale": [1, 2]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Models that are alike, and some that lack a tensor, have another, or another vocabulary."""
  made = tmp_path_factory.mktemp("family")
  base = folders.family(made, 3)[0]
  tied = folders.CONFIG | {"tie_word_embeddings": True}
  folders.write(made / "lacking", {n: x for n, x in base.items() if n != UP})
  folders.write(made / "tied", {n: x for n, x in base.items() if n != HEAD}, config=tied)
  folders.write(made / "wide", folders.tensors(5, vocabulary=12))
  folders.write(made / "more", base | {"score.weight": np.ones((2, 6), np.float32)})
  for name in MODELS:
    words = {f"w{i}": i for i in range(12 if name == "wide" else 10)}
    text = json.dumps({"model": {"type": "WordLevel", "vocab": words}})
    (made / name / "tokenizer.json").write_text(text)
  return made, {name: set(folders.read(made / name)) for name in MODELS}


def values(name):
  """What may be said of a parameter: a number, a gradient, or one for some tensors."""
  one = st.sampled_from(NUMBERS.get(name, [1]))
  some = st.sampled_from(["mlp", "layers.1.", "lm_head"])
  listed = st.tuples(some, one, one).map(
    lambda x: [{"filter": x[0], "value": x[1]}, {"value": x[2]}]
  )
  return one | st.lists(one, min_size=2, max_size=3) | listed


@st.composite
def random_recipes(draw):
  """A recipe in which every word is known; whether its parts go together is another question."""
  own = {"merge_method": draw(methods())}
  method, model = METHODS[own["merge_method"]], st.sampled_from(MODELS)

  def maybe(key, of):
    if draw(st.integers(0, 3)) == 0:
      own[key] = draw(of)

  def sources(sliced):
    names = draw(st.lists(model, min_size=1, max_size=3, unique=not sliced))
    if not sliced:
      return [{"model": n} for n in names]
    count = draw(st.integers(1, 3))
    starts = [draw(st.integers(0, 3 - count)) for _ in names]
    return [{"model": n, "layer_range": [s, s + count]} for n, s in zip(names, starts, strict=True)]

  def inputs():
    if draw(st.booleans()):
      return {"models": sources(False)}
    return {"slices": [{"sources": sources(True)} for _ in range(draw(st.integers(1, 2)))]}

  if draw(st.integers(0, 4)):
    own |= inputs()
  else:
    count = draw(st.integers(1, 4))
    own["modules"] = {n: inputs() for n in ("model", "lm_head", "position_ids", "score")[:count]}
  if draw(st.integers(0, 4)):
    own["base_model"] = draw(model)
  named = [n for n, p in method.parameters.items() if p.default is None]
  own["parameters"] = {n: draw(values(n)) for n in named}
  maybe("missing", st.sampled_from(["base", "mean", "skip"]))
  maybe("exclude", st.sampled_from([["mlp"], ["score"], ["lm_head", "embed"]]))
  maybe("dtype", st.sampled_from(["float32", "bfloat16"]))
  maybe("compat", st.just("mergekit"))
  maybe("tokenizer_source", st.sampled_from(["union", "base", "wide"]))
  maybe("overrides", methods().map(lambda m: [{"pattern": "norm", "merge_method": m}]))
  return own


def methods():
  often = ("linear", "slerp", "passthrough", "task_arithmetic", "nuslerp", "ties")
  return st.sampled_from(often) | st.sampled_from(sorted(METHODS))


@settings(max_examples=25)
@given(random_recipes())
def test_nothing_of_a_recipe_is_lost(root, own):
  folder, tensors = root
  (folder / "recipe.yml").write_text(yaml.safe_dump(own))
  before, files = os.getcwd(), Files()
  try:
    os.chdir(folder)
    plan = recipes.plan_of_file("recipe.yml", files)
  except (RecipeError, errors.Problems) as error:
    assert str(error)  # noqa: PT017
    return
  finally:
    os.chdir(before)
    files.close()
  names = [o.name for o in plan.outputs]
  assert len(set(names)) == len(names)
  for model, outcomes in plan.outcomes.items():
    assert tensors[model] <= outcomes.keys(), model
  for o in plan.outputs:
    assert {t.shape for t in (o.base, *o.models) if t is not None} == {o.shape}
    assert (o.job is None) == (not o.models)
  if "missing" not in own:
    texts = [text for by_name in outcome_words.texts(plan).values() for text in by_name.values()]
    assert not any("not all models" in text for text in texts)
    if "models" in own:
      assert set(names) == set().union(*(tensors[m] for m in plan.outcomes))
