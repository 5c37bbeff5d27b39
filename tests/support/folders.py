"""Small model folders on disk and recipes of them, for the tests of merging files."""

import hashlib
import json
import pathlib

import numpy as np
import pytest
import recipes

from jaxmerge.files import execute
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Files

CONFIG = {"model_type": "llama", "num_hidden_layers": 3, "torch_dtype": "float32"}


def tensors(seed, *, layers=3, vocabulary=10, width=6, near=None, dtype=np.float32):
  """Tensors of a tiny decoder; those of a fine-tuned model lie near another one's."""
  rng = np.random.default_rng(seed)
  shapes = {"model.embed_tokens.weight": (vocabulary, width)}
  for i in range(layers):
    shapes |= {
      f"model.layers.{i}.input_layernorm.weight": (width,),
      f"model.layers.{i}.mlp.up_proj.weight": (2 * width, width),
      f"model.layers.{i}.self_attn.q_proj.weight": (width, width),
    }
  shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
  made = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
  if near is not None:
    made = {n: near[n].astype(np.float32) + x / 8 for n, x in made.items()}
  return {n: x.astype(dtype) for n, x in made.items()} | {
    "position_ids": np.arange(4, dtype=np.int32)
  }


def write(folder, tensors, *, config=None, shards=1):
  """Writes a Hugging Face folder."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
  (folder / "generation_config.json").write_text('{"max_length": 20, "do_sample": true}')
  (folder / "tokenizer.json").write_text('{"version": "1.0"}')
  for old in folder.glob("model*.safetensors*"):
    old.unlink()
  names = list(tensors)
  if shards == 1:
    safetensors.save(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder
  places = {}
  for i in range(shards):
    file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
    own = names[i::shards]
    safetensors.save(folder / file, {n: tensors[n] for n in own}, {"format": "pt"})
    places |= dict.fromkeys(own, file)
  index = {"metadata": {}, "weight_map": places}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return folder


def cached(cache, name, folder, *, revision="main"):
  """Moves a folder into a cache as the hub's client lays it out; returns the commit."""
  repository = cache / f"models--{name.replace('/', '--')}"
  commit = hashlib.sha1(name.encode()).hexdigest()
  for part in ("refs", "blobs", f"snapshots/{commit}"):
    (repository / part).mkdir(parents=True, exist_ok=True)
  (repository / "refs" / revision).write_text(commit)
  for path in sorted(folder.iterdir()):
    blob = hashlib.sha256(path.read_bytes()).hexdigest()
    path.replace(repository / "blobs" / blob)
    (repository / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{blob}")
  folder.rmdir()
  return commit


def family(root, count=3, **options):
  """Writes a base and models near it; returns their tensors, the base's first."""
  base = tensors(0, **options)
  models = [tensors(k + 1, near=base, **options) for k in range(count)]
  write(root / "base", base)
  for k, model in enumerate(models):
    write(root / f"m{k}", model, shards=k + 1)
  return [base, *models]


def read(folder):
  """All tensors of a folder, whatever its shards."""
  found = {}
  for path in sorted(folder.glob("*.safetensors")):
    found |= safetensors.load(path)
  return found


@pytest.fixture
def family_here(tmp_path, monkeypatch):
  """A base and three models near it, in the current directory: `family = folders.family_here`."""
  monkeypatch.chdir(tmp_path)
  return family(tmp_path)


def plan_of(text, **options):
  """The plan of a recipe, which is written to `recipe.yml`."""
  pathlib.Path("recipe.yml").write_text(text)
  return recipes.plan_of_file("recipe.yml", Files(), **options)


def run(text, out="out", **options):
  """Runs a recipe, and returns the tensors of the result."""
  return read(execute.run(plan_of(text), out, **options))


def write_adapter(folder, module):
  """Writes an adapter of rank 2 and scale 2 for one matrix; returns A and B."""
  rng = np.random.default_rng(0)
  a, b = (rng.normal(size=s).astype(np.float32) for s in ((2, 6), (6, 2)))
  pathlib.Path(folder).mkdir()
  config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
  pathlib.Path(folder, "adapter_config.json").write_text(json.dumps(config))
  weights = {f"base_model.model.{module}.lora_{k}.weight": x for k, x in (("A", a), ("B", b))}
  safetensors.save(f"{folder}/adapter_model.safetensors", weights)
  return a, b


def write_tied(folder, tensors):
  """Writes a model without a head, whose config says that the head is the embedding."""
  config = CONFIG | {"tie_word_embeddings": True}
  own = {n: x for n, x in tensors.items() if n != "lm_head.weight"}
  write(pathlib.Path(folder), own, config=config)
