"""What a folder is that is no model: said by its name, with the way on, to whoever opens it."""

import pathlib

import numpy as np
import pytest

import jaxmerge
from jaxmerge.adapters import peft
from jaxmerge.cli import main
from jaxmerge.io import formats, other_formats
from jaxmerge.io.checkpoints import store as stores
from jaxmerge.io.tensors import safetensors, tensor


def fill(folder, *names):
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"abc")
  return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return pathlib.Path()


CACHE = "models--org--name"


@pytest.mark.parametrize(
  ("path", "files", "words"),
  [
    ("a", ["a/adapter_config.json"], r"a PEFT adapter: .*, MODEL\+a for both"),
    ("a", ["a/.metadata", "a/__0_0.distcp"], "format_utils dcp_to_torch a model.pt"),
    ("a", ["a/m.Q4.gguf", "a/README.md"], "m.Q4.gguf is a llama.cpp file"),
    ("a/m.gguf", ["a/m.gguf"], r"a/m.gguf: no folder; m.gguf is a llama.cpp file"),
    (CACHE, [f"{CACHE}/snapshots/abc/x", f"{CACHE}/refs/main"], f"name@main, or {CACHE}/snap"),
    (f"{CACHE}/snapshots", [f"{CACHE}/snapshots/0/x"], f"org/name@main, or {CACHE}/snapshots/0"),
    (f"{CACHE}/blobs", [f"{CACHE}/blobs/x", f"{CACHE}/snapshots/0/x"], "org/name@main, or"),
    (CACHE, [f"{CACHE}/blobs/x"], "name of the hub, without a snapshot: give org/name@main with"),
    (f"{CACHE}/snapshots/0", [f"{CACHE}/snapshots/0/x"], "snapshot of org/name .* without weights"),
    (
      "a",
      [f"a/{CACHE}/snapshots/0/x"],
      f"cache of the hub: .*, org/name, as a/{CACHE}/snapshots/0",
    ),
    ("a", [f"a/hub/{CACHE}/snapshots/0/x"], f"org/name, as a/hub/{CACHE}/snapshots/0"),
    ("datasets--a--b", ["datasets--a--b/snapshots/0/x"], "a data set of the hub, a/b"),
    (
      "a/adapter_model.safetensors",
      ["a/adapter_config.json", "a/adapter_model.safetensors"],
      "adapter_config.json, a, or",
    ),
    (
      "a/adapter_model.safetensors",
      ["a/adapter_model.safetensors"],
      "that holds it and its adapter_config",
    ),
    ("a", ["a/pytorch_model.bin"], "pytorch_model.bin is a pickle"),
    ("a", ["a/dataset_info.json", "a/data/train.parquet"], r"holds data \(data/train.parquet\)"),
    ("a", ["a/checkpoint-20/model.safetensors", "a/x.json"], "in it: give a/checkpoint-20"),
    ("a/b", ["a/model.safetensors", "a/b/tokenizer.json"], "one level up: give a"),
    (
      "a/model.safetensors",
      ["a/model.safetensors", "a/config.json"],
      "give its folder",
    ),
    ("a", ["a/m-00001-of-00002.safetensors"], "a/m-00002-of-00002.safetensors: no such file, but"),
    ("a", ["a/zero_to_fp32.py", "a/latest"], "of DeepSpeed: its zero_to_fp32.py"),
    ("a", ["a/tf_model.h5"], "tf_model.h5 holds weights of Keras"),
    ("a", ["a/notes.txt"], "what is there: notes.txt"),
    ("a", [], "a: no such folder"),
  ],
)
def test_a_folder_is_known_by_its_files(home, path, files, words):
  fill(home, *files)
  with pytest.raises(FileNotFoundError, match=words):
    formats.open_model(path, tensor.Files())


def test_an_adapter_is_missed_where_a_model_is_given(home):
  fill(home, "a/model.safetensors")
  (home / "b").mkdir()
  with pytest.raises(FileNotFoundError, match=r"no PEFT adapter; it is a model"):
    peft.load("a")
  with pytest.raises(FileNotFoundError, match="b: the folder is empty"):
    peft.load("b")


def test_all_who_open_a_model_say_the_same(home, capsys):
  fill(home, "a/model.onnx")
  recipe = "merge_method: linear\nparameters: {weight: 1}\nmodels:\n- model: a\n- model: a\n"
  (home / "recipe.yml").write_text(recipe)
  words = other_formats.explain_missing("a")
  for command in (["inspect", "a"], ["diff", "a", "a"], ["merge", "recipe.yml", "out"]):
    assert main.main(command) in (1, 2)
    assert words in capsys.readouterr().err
  assert main.main(["merge", "none.yml", "out"]) == 1
  assert capsys.readouterr().err == "error: none.yml: no such recipe file.\n"
  with pytest.raises(FileNotFoundError, match="ONNX"):
    jaxmerge.merge_files(jaxmerge.methods.average(), ["a"], "out")


def test_a_checkpoint_of_our_own_without_its_manifest_is_damaged(home):
  with stores.Checkpoints(pathlib.Path("OUT")) as store:
    store.save(1, {"params": {"dense": {"kernel": np.ones((2, 3), np.float32)}}}, {})
  assert list(formats.open_model("OUT", tensor.Files()).tensors) == ["dense/kernel"]
  (home / "OUT/1/manifest.json").unlink()
  with pytest.raises(ValueError, match=r"the checkpoint is damaged: manifest.json is missing"):
    formats.open_model("OUT", tensor.Files())


def test_a_checkpoint_of_orbax_without_its_metadata_is_known(home):
  fill(home, "run/5/default/manifest.ocdbt")
  with pytest.raises(FileNotFoundError, match=r"run: .* of Orbax without a file _METADATA"):
    formats.open_model("run", tensor.Files())


def test_a_pointer_of_git_lfs_is_known(home):
  pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
  (home / "model.safetensors").write_bytes(pointer)
  with pytest.raises(ValueError, match=r"a Git LFS pointer, .* `git lfs pull`"):
    safetensors.header(home / "model.safetensors")
