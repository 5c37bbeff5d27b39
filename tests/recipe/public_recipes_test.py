"""Recipes as people publish them: what mergekit runs is planned, and a sample is merged."""

import json
import pathlib

import folders
import numpy as np
import pytest
import recipes
import yaml
from marking import some_fast

from jaxmerge.files import execute
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Files

EVERY = yaml.safe_load(pathlib.Path(__file__).with_name("public_recipes.yml").read_text())
WORDS = [f"w{i}" for i in range(8)]
MERGED = [
  *("ties with gradients", "weights of stock", "sce with leftovers", "della, weights by part"),
  *("karcher of many, one twice", "fusion, weights", "grown, new layers silent"),
]


def write(root, name, seed, layers, near=None):
  """A model with a tokenizer that has a token of its own."""
  own = [*WORDS, "<s>", "</s>"]
  made = folders.tensors(seed, layers=layers, vocabulary=10, width=4, near=near)
  config = folders.CONFIG | {"num_hidden_layers": layers, "vocab_size": 10}
  folder = folders.write(root / name, made, config=config)
  vocabulary = {token: i for i, token in enumerate(own)}
  model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
  tokenizer = {"version": "1.0", "added_tokens": [], "model": model}
  (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
  (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
  return made


def adapt(root, name, seed):
  rng = np.random.default_rng(seed)
  name_of = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
  shapes = {"A": (2, 4), "B": (4, 2)}
  (root / name).mkdir()
  safetensors.save(
    root / name / "adapter_model.safetensors",
    {name_of.format(k): rng.normal(size=s).astype(np.float32) for k, s in shapes.items()},
  )
  config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
  (root / name / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  """Folders with a base, four models near it, and three adapters; by their number of layers."""
  made = {}

  def place(layers):
    if layers not in made:
      made[layers] = root = tmp_path_factory.mktemp(f"layers{layers}")
      base = write(root, "b", 0, layers)
      for k in range(4):
        write(root, f"m{k}", k + 1, layers, base)
      for k in range(3):
        adapt(root, f"a{k}", k)
    return made[layers]

  return place


def plan(text):
  pathlib.Path("recipe.yml").write_text(text)
  return recipes.plan_of_file("recipe.yml", Files())


RUN = {own["name"]: own for own in EVERY if "refused" not in own}
REFUSED = {own["name"]: own for own in EVERY if "refused" in own}


@pytest.mark.parametrize("name", some_fast(RUN, list(RUN)[::4]))
def test_what_people_publish_is_planned(places, monkeypatch, name):
  shape = RUN[name]
  monkeypatch.chdir(places(shape.get("layers", 4)))
  made = plan(shape["recipe"])
  assert made.outputs
  notes = [line for own in (*made.earlier.values(), made) for line in own.notes]
  ignored = [line for line in notes if line.startswith("line ")]
  assert len(ignored) == shape.get("notes", 0), ignored


@pytest.mark.parametrize("name", REFUSED)
def test_what_mergekit_does_not_run_is_refused_with_the_reason(places, monkeypatch, name):
  shape = REFUSED[name]
  monkeypatch.chdir(places(shape.get("layers", 4)))
  with pytest.raises(ValueError) as error:
    plan(shape["recipe"])
  assert shape["refused"] in str(error.value)


@pytest.mark.parametrize("name", some_fast(MERGED, ["ties with gradients"]))
def test_a_sample_of_them_is_merged(places, monkeypatch, tmp_path, name):
  monkeypatch.chdir(places(RUN[name].get("layers", 4)))
  found = folders.read(execute.run(plan(RUN[name]["recipe"]), tmp_path / "out"))
  assert all(np.isfinite(x.astype(np.float32)).all() for x in found.values())
  base = folders.read(pathlib.Path("b"))
  assert any((x.astype(np.float32) != base[n]).any() for n, x in found.items() if n in base)


def test_all_of_them_are_different():
  assert len({shape["recipe"] for shape in EVERY}) == len(EVERY) >= 90
