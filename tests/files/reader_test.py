"""Slices of inputs, where a device takes them from, and their checksums."""

import json

import folders
import jax
import numpy as np
import xxhash

from jaxmerge import methods
from jaxmerge.files import execute, reader
from jaxmerge.files import merge as files_merge


def paths(root, count=3):
  return [root / f"m{k}" for k in range(count)]


def test_checksums_of_inputs_are_those_of_their_tensors(tmp_path):
  """By where they are from: a base, and a model of another dtype, read in many slices."""
  base, first, *_ = folders.family(tmp_path)
  half = {n: x.astype(np.float16) if x.dtype == np.float32 else x for n, x in first.items()}
  folders.write(tmp_path / "m0", half)
  out = files_merge.merge_files(
    methods.average(), paths(tmp_path), tmp_path / "out", base=tmp_path / "base", entries=7
  )
  told = json.loads((out / execute.PROVENANCE).read_text())["tensors"]
  for name, x in folders.read(out).items():
    assert told[name]["xxh3_128"] == xxhash.xxh3_128_hexdigest(x.tobytes())
    sources = {"base": base} if name == "position_ids" else {"base": base, "m0": half}
    for folder, tensors in sources.items():
      where = f"{tmp_path / folder / 'model.safetensors'}: tensor {name!r}"
      assert told[name]["inputs"][where] == xxhash.xxh3_128_hexdigest(tensors[name].tobytes())


def test_a_device_takes_slices_from_where_they_were_read():
  """A CPU's device copies what does not begin at a multiple of 64 bytes."""
  for size in (64, 4096, 2**20):
    read = reader._aligned_bytes(size).view(np.float32)
    assert jax.device_put(read).unsafe_buffer_pointer() == read.ctypes.data
    aside = reader._aligned_bytes(size + 64).view(np.float32)[1:]
    assert jax.device_put(aside).unsafe_buffer_pointer() != aside.ctypes.data
