"""Slices of models with several stacks: the text's layers are meant, or the error shows how."""

import json
import pathlib

import folders
import numpy as np
import pytest
import recipes
import yaml

from jaxmerge.files import execute
from jaxmerge.io.tensors.tensor import Files
from jaxmerge.recipe import RecipeError

SLICES = """
merge_method: passthrough
slices:
- sources: [{model: m0, layer_range: [0, 2]}]
- sources: [{model: m1, layer_range: [1, 3]}]
"""
TEXT, SIGHT = "language_model.model.layers.{}.w", "vision_tower.layers.{}.w"
EYES = ("vision_tower.embeddings.patch_embedding.weight", "vision_tower.norm.w")


def write(name, seed, config, *stacks, others):
  rng = np.random.default_rng(seed)
  names = [stack.format(i) for stack in stacks for i in range(3)] + list(others)
  made = {n: rng.normal(size=(2, 3)).astype(np.float32) for n in names}
  folders.write(pathlib.Path(name), made, config=config)
  return made


def plan(text):
  pathlib.Path("recipe.yml").write_text(text)
  return recipes.plan_of_file("recipe.yml", Files())


@pytest.mark.parametrize("nested", [True, False])
def test_slices_are_of_the_text(tmp_path, monkeypatch, nested):
  """Both stacks are equally high; what sees is of one model as a whole."""
  monkeypatch.chdir(tmp_path)
  text = {"num_hidden_layers": 3}
  config = {"vision_config": {"num_hidden_layers": 3}} | ({"text_config": text} if nested else text)
  others = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight", *EYES)
  first, second = (write(f"m{k}", k, config, TEXT, SIGHT, others=others) for k in range(2))
  found = folders.read(execute.run(plan(SLICES), "out"))
  for i, (model, layer) in enumerate([(first, 0), (first, 1), (second, 1), (second, 2)]):
    np.testing.assert_array_equal(found[TEXT.format(i)], model[TEXT.format(layer)])
  for name in (*EYES, *(SIGHT.format(i) for i in range(3)), others[1]):
    np.testing.assert_array_equal(found[name], second[name])
  np.testing.assert_array_equal(found[others[0]], first[others[0]])
  made = json.loads(pathlib.Path("out/config.json").read_text())
  assert (made["text_config"] if nested else made)["num_hidden_layers"] == 4
  assert made["vision_config"]["num_hidden_layers"] == 3


@pytest.mark.parametrize("prefix", ["", "model."])
def test_where_it_is_not_clear_the_error_has_what_to_paste(tmp_path, monkeypatch, prefix):
  """An encoder and a decoder of one height: what the error shows is a recipe that runs."""
  monkeypatch.chdir(tmp_path)
  stacks = [f"{prefix}{part}.block.{{}}.w" for part in ("encoder", "decoder")]
  others = (f"{prefix}shared.weight", "lm_head.weight")
  config = {"num_layers": 3, "num_decoder_layers": 3}
  for k in range(2):
    write(f"m{k}", k, config, *stacks, others=others)
  with pytest.raises(RecipeError, match="slices need one stack of layers; this model's are") as err:
    plan(SLICES)
  block = str(err.value).split("Write, for layers of decoder: ")[1]
  pasted = yaml.safe_load(block)
  assert pasted["modules"].keys() == {"encoder", "decoder", "shared", "lm_head"}
  made = plan(f"merge_method: passthrough\n{block}\n")
  assert sum("decoder" in o.name for o in made.outputs) == 4
  assert sum("encoder" in o.name for o in made.outputs) == 3
