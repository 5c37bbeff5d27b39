"""Hugging Face folders: shards, what is copied, what is refused."""

import errno
import json
import os

import numpy as np
import pytest

from jaxmerge.io.huggingface import folder
from jaxmerge.io.tensors import safetensors

TENSORS = {
  "layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
  "layer.bias": np.ones(2, np.float16),
  "ids": np.arange(3),
}
CONFIG = b'{\n  "model_type": "bert"\n}\n'
SIDE = {
  "tokenizer.json": b'{"version": "1.0"}',
  "vocab.txt": b"[PAD]\n[UNK]\n",
  "spiece.model": bytes(range(256)),
  "multilingual.tiktoken": b"IQ== 0",
  "normalizer.json": b"{}",
  "source.spm": bytes(range(256)),
  "tekken.json": b"{}",
  "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
  "video_preprocessor_config.json": b"{}",
  "1_Pooling/config.json": b"{}",
}


def fill(path, content):
  for name, data in content.items():
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(data)
  return path


@pytest.fixture
def single(tmp_path):
  base = fill(tmp_path / "base", {"config.json": CONFIG, **SIDE})
  safetensors.save(base / folder.WEIGHTS, TENSORS, {"format": "pt"})
  return base


@pytest.fixture
def sharded(tmp_path):
  base = fill(tmp_path / "sharded", {"config.json": CONFIG})
  homes = {}
  for k, name in enumerate(TENSORS):
    homes[name] = f"model-{k + 1:05}-of-00003.safetensors"
    safetensors.save(base / homes[name], {name: TENSORS[name]})
  (base / folder.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": homes}))
  return base


def contents(path):
  return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_one_file_and_shards_hold_the_same(request, kind):
  tensors, config = folder.load(request.getfixturevalue(kind))
  assert config == {"model_type": "bert"}
  assert tensors.keys() == TENSORS.keys()
  for name, x in TENSORS.items():
    assert tensors[name].dtype == x.dtype
    np.testing.assert_array_equal(tensors[name], x)


def test_saving_what_was_loaded_gives_the_same_bytes(single, tmp_path):
  tensors, _ = folder.load(single)
  out = folder.save(tmp_path / "out", tensors, source=single)
  assert contents(out) == contents(single)


def test_weights_code_and_the_model_card_of_the_base_are_not_copied(single, tmp_path):
  fill(single, {"README.md": b"base", "modeling.py": b"print()", "pytorch_model.bin": b"x"})
  out = folder.save(tmp_path / "out", {"w": np.zeros(1)}, source=single, readme="# mérged\n")
  assert contents(out).keys() == {"config.json", *SIDE, "model.safetensors", "README.md"}
  assert (out / "README.md").read_text(encoding="utf-8") == "# mérged\n"
  assert list(folder.load(out)[0]) == ["w"]


def test_a_folder_may_replace_its_own_source(single):
  folder.save(single, {"w": np.zeros(1)}, source=single, replace=True)
  assert list(folder.load(single)[0]) == ["w"]
  assert contents(single).keys() == {"config.json", *SIDE, "model.safetensors"}


def test_a_folder_that_is_there_is_left_alone(single, tmp_path):
  fill(tmp_path / "out", {"mine": b"1"})
  with pytest.raises(FileExistsError, match="out exists; pass replace=True"):
    folder.save(tmp_path / "out", TENSORS, source=single)
  assert contents(tmp_path / "out") == {"mine": b"1"}


def test_a_full_disk_leaves_nothing(single, tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="No space left"):
    folder.save(tmp_path / "out", TENSORS, source=single)
  assert os.listdir(tmp_path) == ["base"]


def reindex(base, **changes):
  index = json.loads((base / folder.INDEX).read_text())
  for name, shard in changes.items():
    index["weight_map"][name] = shard
  (base / folder.INDEX).write_text(json.dumps(index))


def test_a_missing_shard_is_named(sharded):
  (sharded / "model-00003-of-00003.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"'ids' is in model-00003-of-00003.*missing"):
    folder.load(sharded)


@pytest.mark.parametrize(
  "shard", ["../base/model.safetensors", "/model.safetensors", "a\\b", 3, "", "a" * 10_000]
)
def test_an_index_does_not_lead_out_of_its_folder(sharded, single, shard):
  reindex(sharded, ids=shard)
  with pytest.raises(ValueError, match=r"tensor 'ids': .* is not the name of a file in its folder"):
    folder.load(sharded)


def test_an_index_that_names_the_wrong_shard_is_refused(sharded):
  reindex(sharded, ids="model-00001-of-00003.safetensors")
  with pytest.raises(ValueError, match=r"'ids' is in model-00001.* but in no shard on disk"):
    folder.load(sharded)


def test_a_tensor_that_the_index_does_not_list_is_refused(sharded):
  name = "model-00001-of-00003.safetensors"
  safetensors.save(sharded / name, {**safetensors.load(sharded / name), "more": np.zeros(1)})
  with pytest.raises(
    ValueError, match=f"'more' is in no shard according to the index, but in {name}"
  ):
    folder.load(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
  name = "model-00001-of-00003.safetensors"
  safetensors.save(sharded / name, {**safetensors.load(sharded / name), "ids": np.zeros(1)})
  with pytest.raises(ValueError, match=f"tensor 'ids' is also in {name}"):
    folder.load(sharded)


@pytest.mark.parametrize(
  ("name", "data", "error", "message"),
  [
    ("config.json", b"{", ValueError, "config.json: not JSON"),
    ("config.json", b"[]", ValueError, "config.json: must be a JSON object"),
    ("config.json", b'{"a":' * 500_000, ValueError, "config.json: not JSON .nested too deep"),
    ("config.json", b'{"a": 1' + b"0" * 5000 + b"}", ValueError, "config.json: not JSON .*digits"),
    ("config.json", b'{"a": 1, "a": 1}', ValueError, "config.json: names 'a' twice"),
    ("config.json", b'{"a": "\\udc00"}', ValueError, "config.json: an unpaired surrogate"),
    ("model.safetensors", b"12345", ValueError, "model.safetensors: .*truncated"),
    ("model.safetensors", None, FileNotFoundError, "neither model.safetensors nor"),
    ("config.json", None, FileNotFoundError, "config.json: no such file"),
  ],
)
def test_damaged_and_missing_files_are_named(single, name, data, error, message):
  (single / name).unlink()
  if data is not None:
    (single / name).write_bytes(data)
  with pytest.raises(error, match=message):
    folder.load(single)


@pytest.mark.parametrize("name", [folder.INDEX, "config.json"])
def test_a_huge_file_is_refused_unread(sharded, name):
  with open(sharded / name, "r+b") as file:
    file.truncate(10**10)  # Sparse: it takes no room.
  with pytest.raises(ValueError, match=f"{name}: 10000000000 bytes are over the limit"):
    folder.load(sharded)


def test_an_index_that_names_a_tensor_twice_is_refused(sharded):
  text = (sharded / folder.INDEX).read_text()
  assert '"ids": ' in text
  again = text.replace('"ids": ', '"ids": "model-00001-of-00003.safetensors", "ids": ')
  (sharded / folder.INDEX).write_text(again)
  with pytest.raises(ValueError, match=r"index\.json: names 'ids' twice"):
    folder.load(sharded)


@pytest.mark.parametrize("stale", [False, True])
def test_one_file_beside_an_index_of_others_is_refused(sharded, stale):
  safetensors.save(sharded / folder.WEIGHTS, TENSORS, {"format": "pt"})
  if stale:
    (sharded / "model-00001-of-00003.safetensors").unlink()
  with pytest.raises(ValueError, match=r"model\.safetensors and an index of other files, such as"):
    folder.load(sharded)


def test_an_index_may_name_the_one_file(single):
  homes = dict.fromkeys(TENSORS, folder.WEIGHTS)
  (single / folder.INDEX).write_text(json.dumps({"weight_map": homes}))
  assert list(folder.load(single)[0]) == list(TENSORS)
  (single / folder.INDEX).write_text(json.dumps({"weight_map": homes | {"x": folder.WEIGHTS}}))
  with pytest.raises(ValueError, match=r"'x' is in model.safetensors according to the index"):
    folder.load(single)


def modular(base):
  """Adds modules, as sentence-transformers writes them: one of them has weights."""
  fill(base, {"modules.json": b"[]", "1_Pooling/config.json": b"{}", "2_Dense/config.json": b"{}"})
  dense = {"linear.weight": np.eye(2, dtype=np.float32)}
  safetensors.save(base / "2_Dense" / folder.WEIGHTS, dense, {"format": "pt"})
  return {f"2_Dense/{name}": x for name, x in dense.items()}


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_weights_of_modules_are_read_and_written(request, tmp_path, kind):
  source = request.getfixturevalue(kind)
  dense = modular(source)
  tensors, _ = folder.load(source)
  assert tensors.keys() == TENSORS.keys() | dense.keys()
  np.testing.assert_array_equal(tensors["2_Dense/linear.weight"], np.eye(2))
  out = folder.save(tmp_path / "out", tensors, source=source)
  for file in ("2_Dense/model.safetensors", "2_Dense/config.json", "1_Pooling/config.json"):
    assert (out / file).read_bytes() == (source / file).read_bytes()
  assert safetensors.header(out / folder.WEIGHTS).tensors.keys() == TENSORS.keys()


def test_a_pickle_of_a_module_is_not_read(single):
  modular(single)
  os.rename(single / "2_Dense" / folder.WEIGHTS, single / "2_Dense" / "pytorch_model.bin")
  with pytest.raises(
    FileNotFoundError, match=r"2_Dense: model.safetensors is missing; .* is a pickle"
  ):
    folder.load(single)
  (single / "2_Dense" / "pytorch_model.bin").unlink()
  with pytest.raises(FileNotFoundError, match=r"2_Dense: model.safetensors is missing\."):
    folder.load(single)


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth"])
def test_a_pickle_is_not_read_and_it_is_said_how_to_convert_it(single, ending):
  name = f"pytorch_model{ending}"
  os.rename(single / folder.WEIGHTS, single / name)
  fill(single, {"optimizer.pt": b"", "args.bin": b""})
  how = rf"safetensors\.torch\.save_file\(torch\.load\('{name}', weights_only=True\), 'model\.safe"
  with pytest.raises(FileNotFoundError, match=rf"; {name} is a pickle, .* save_pretrained .*{how}"):
    folder.load(single)
  with pytest.raises(FileNotFoundError, match=rf"{name}: no folder; {name} is a pickle, .*{how}"):
    folder.load(single / name)


def test_a_file_of_weights_is_no_folder(single):
  with pytest.raises(FileNotFoundError, match="is a file; give its folder"):
    folder.load(single / folder.WEIGHTS)


def test_a_missing_folder_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="none: no such folder"):
    folder.load(tmp_path / "none")
