"""Files of flax.serialization: what flax writes is read, in parts, and what is damaged is named."""

import contextlib
import json

import flax
import folders
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax.training import train_state

from jaxmerge import methods
from jaxmerge.cli import main
from jaxmerge.files import merge
from jaxmerge.io import formats
from jaxmerge.io.tensors import msgpack, pieces, safetensors
from jaxmerge.io.tensors.tensor import Files

TREE = {
  "dense": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float16)},
  "half": np.arange(4).astype(ml_dtypes.bfloat16),
  "blocks": [{"w": np.arange(70_000, dtype=np.int32)}, {"w": np.float32(3)}],
  "none": None,
}
NAMES = {"dense/kernel", "dense/bias", "half", "blocks/0/w", "blocks/1/w"}


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_arrays_of_flax_are_read_in_parts(home):
  (home / "a.msgpack").write_bytes(flax.serialization.to_bytes(TREE))
  contents = msgpack.read("a.msgpack", Files())
  assert contents.arrays.keys() == NAMES
  assert contents.others == ("none",)
  flat = flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(TREE), sep="/")
  for name, tensor in contents.arrays.items():
    assert tensor.dtype == flat[name].dtype
    np.testing.assert_array_equal(pieces.load(tensor), flat[name])
  part = np.empty(5, np.int32)
  contents.arrays["blocks/0/w"].read(69_000, part)
  np.testing.assert_array_equal(part, np.arange(69_000, 69_005))


def test_chunks_of_a_large_array_are_one(home, monkeypatch):
  monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)
  big = np.arange(100, dtype=np.float32).reshape(10, 10)
  data = flax.serialization.msgpack_serialize({"a": {"w": big}, "b": np.ones(2)})
  (home / "a.msgpack").write_bytes(data)
  contents = msgpack.read("a.msgpack", Files())
  assert contents.arrays.keys() == {"a/w", "b"}
  np.testing.assert_array_equal(pieces.load(contents.arrays["a/w"]), big)


def test_folders_and_files_are_merged(home, capsys):
  tree = {"dense": {"kernel": np.ones((2, 3), np.float32)}}
  (home / "m").mkdir()
  (home / "m/flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))
  (home / "m/config.json").write_text(json.dumps(folders.CONFIG))
  state = train_state.TrainState.create(
    apply_fn=None, params={"dense": {"kernel": jnp.full((2, 3), 3.0)}}, tx=optax.adam(1e-3)
  )
  (home / "state.msgpack").write_bytes(flax.serialization.to_bytes(state))
  out = merge.merge_files(methods.average(), ["m", "state.msgpack"], "out")
  tensors = safetensors.load(out / "model.safetensors")
  assert tensors.keys() == {"dense/kernel"}
  np.testing.assert_array_equal(tensors["dense/kernel"], np.full((2, 3), 2.0))
  facts = json.loads((out / "jaxmerge_provenance.json").read_text())
  assert any("state.msgpack is a training state: 3 arrays of" in n for n in facts["notes"])
  assert json.loads((out / "config.json").read_text()) == folders.CONFIG
  assert main.main(["inspect", "state.msgpack"]) == 0
  assert "dense/kernel" in capsys.readouterr().out


def test_shards_are_one_model(home):
  (home / "m").mkdir()
  places = {}
  for k in range(2):
    file = f"flax_model-0000{k + 1}-of-00002.msgpack"
    tree = {"layer": {str(k): {"kernel": np.full(3, k, np.float32)}}}
    (home / "m" / file).write_bytes(flax.serialization.to_bytes(tree))
    places[f"layer/{k}/kernel"] = file
  (home / "m/flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": places}))
  assert formats.open_model("m", Files()).tensors.keys() == places.keys()
  (home / "m" / file).unlink()
  with pytest.raises(FileNotFoundError, match=f"m/{file}: no such file"):
    formats.open_model("m", Files())


def test_every_cut_is_named(home):
  whole = flax.serialization.to_bytes({"a": {"w": np.arange(9.0)}, "b": [1, "x", -5, 2.5, None]})
  for stop in range(len(whole)):
    (home / "a.msgpack").write_bytes(whole[:stop])
    with pytest.raises(ValueError, match=r"a.msgpack"):
      msgpack.read("a.msgpack", Files())


def test_every_changed_byte_is_read_or_named(home):
  """No error but ValueError, whatever is in the file."""
  whole = bytearray(flax.serialization.to_bytes({"a": {"w": np.arange(3.0)}, "b": np.ones(1)}))
  values = (0x00, 0x83, 0x93, 0xC1, 0xC6, 0xC9, 0xDF, 0xFF)
  for place in range(len(whole)):
    # Kinds of values in turn, so that each is tried at many places.
    for value in values[place % 4 :: 4]:
      changed = bytearray(whole)
      changed[place] = value
      (home / "a.msgpack").write_bytes(changed)
      with contextlib.suppress(ValueError):
        msgpack.read("a.msgpack", Files())
