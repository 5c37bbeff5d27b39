"""Raw safetensors: a file, or a folder of them, is a model without a config."""

import folders
import numpy as np
import pytest

import jaxmerge
from jaxmerge import methods
from jaxmerge.cli import main
from jaxmerge.io import formats
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Files

W = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_files_and_folders_of_files_are_merged(home, capsys):
  safetensors.save("one.safetensors", W)
  for k, name in enumerate(W):
    safetensors.save(f"two/part{k}.safetensors", {name: 3 * W[name]})
  (home / "recipe.yml").write_text(
    "merge_method: linear\nparameters: {weight: 0.5}\n"
    "models: [{model: one.safetensors}, {model: two}]\n"
  )
  assert main.main(["merge", "recipe.yml", "out", "--dry-run"]) == 0
  said = capsys.readouterr().out
  assert "one.safetensors has no config.json" in said
  assert "two has no config.json" in said
  assert main.main(["merge", "recipe.yml", "out"]) == 0
  merged = safetensors.load("out/model.safetensors")
  for name, x in W.items():
    np.testing.assert_array_equal(merged[name], 2 * x)
  assert not (home / "out" / "config.json").exists()
  assert main.main(["inspect", "one.safetensors", "--checksums"]) == 0
  assert main.main(["inspect", "out", "--check"]) == 0
  assert main.main(["diff", "one.safetensors", "two"]) == 0
  jaxmerge.merge_files(methods.average(), ["out", "one.safetensors"], "again")


def test_a_file_beside_a_config_is_read_alone(home):
  folders.write(home / "m", W)
  (home / "m/model.safetensors").rename(home / "m/model.fp16.safetensors")
  weights = formats.open_model("m/model.fp16.safetensors", Files())
  assert weights.tensors.keys() == W.keys()
  assert formats.config(weights.folder) == {}
  assert formats.config(formats.open_model("m", Files()).folder) == folders.CONFIG


def test_two_models_in_a_folder_are_no_model(home):
  for name in ("x", "y"):
    safetensors.save(f"m/{name}.safetensors", W)
  with pytest.raises(
    ValueError, match=r"'a.weight' is also in x.safetensors; .*use the path of one file"
  ):
    formats.open_model("m", Files())


def test_shards_without_an_index_are_all_there(home):
  for k, (name, x) in enumerate(W.items()):
    safetensors.save(f"m/model-0000{k + 1}-of-00002.safetensors", {name: x})
  assert formats.open_model("m", Files()).tensors.keys() == W.keys()
  (home / "m/model-00001-of-00002.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"m/model-00001-of-00002.safetensors: no such file"):
    formats.open_model("m", Files())


def test_a_result_may_be_one_file(home, capsys):
  """Its bytes are those of the folder's file; the provenance is beside it."""
  for k, name in enumerate(("a", "b")):
    folders.write(home / name, folders.tensors(k))
  (home / "recipe.yml").write_text(
    "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: a}, {model: b}]\n"
  )
  merge = ["merge", "recipe.yml"]
  assert main.main([*merge, "out"]) == 0
  assert main.main([*merge, "out.safetensors", "--shard-size=1KB"]) == 0
  assert "note: a file has the weights alone" in capsys.readouterr().out
  assert (home / "out.safetensors").read_bytes() == (home / "out/model.safetensors").read_bytes()
  beside = {p.name for p in home.iterdir()} - {"a", "b", "out", "recipe.yml"}
  assert beside == {"out.safetensors", "out.jaxmerge_provenance.json"}
  assert main.main(["inspect", "out.safetensors", "--check"]) == 0
  assert main.main([*merge, "out.safetensors"]) == 1
  assert "out.safetensors exists; pass --replace" in capsys.readouterr().err
  assert main.main([*merge, "out.safetensors", "--replace"]) == 0
  jaxmerge.merge_files(methods.average(), ["out.safetensors", "a"], "again.safetensors")
  assert main.main(["inspect", "again.safetensors", "--check"]) == 0


def test_what_is_no_file_is_refused(home, capsys):
  safetensors.save("a.safetensors", W)
  (home / "recipe.yml").write_text(
    "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a.safetensors}]\n"
  )
  (home / "dir.safetensors").mkdir()
  cases = {
    "dir.safetensors is a folder; remove it": ["dir.safetensors"],
    "a safetensors file is no checkpoint": ["b.safetensors", "--out-format=orbax"],
    "--evaluate and --push need a folder": ["b.safetensors", "--evaluate=python x.py {out}"],
  }
  for words, arguments in cases.items():
    assert main.main(["merge", "recipe.yml", *arguments]) == 1
    assert words in capsys.readouterr().err
  assert not (home / "b.safetensors").exists()
