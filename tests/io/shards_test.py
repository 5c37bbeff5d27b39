"""The files that a merge writes: bytes that are not the entry's are refused, and few are open."""

import os
import resource

import ml_dtypes
import numpy as np
import pytest

from jaxmerge.io.huggingface import shards
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Files, stored_tensor


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.float16, ml_dtypes.bfloat16])
def test_a_buffer_of_another_dtype_is_refused(tmp_path, dtype):
  """Float32 in slots of eight bytes was a wrong model; int16 has the size of bfloat16."""
  kinds, wrong = {"w": (np.dtype(dtype), (4,))}, {8: np.float32, 2: np.int16}
  with shards.open_shards(tmp_path, kinds, {"model.safetensors": ["w"]}) as files:
    right = np.arange(4).astype(dtype)
    with pytest.raises(ValueError, match=r"model.safetensors: tensor 'w' is .*, got entries of"):
      files.write("w", 0, right.astype(wrong[right.itemsize]))
    files.write("w", 0, right)
    files.sync()
  np.testing.assert_array_equal(safetensors.load(tmp_path / "model.safetensors")["w"], right)


@pytest.mark.parametrize(("start", "count"), [(2, 3), (3, 1), (0, 5)])
def test_entries_beyond_the_tensor_or_after_a_gap_are_refused(tmp_path, start, count):
  kinds = {"w": (np.dtype(np.float32), (4,)), "v": (np.dtype(np.float32), (4,))}
  with shards.open_shards(tmp_path, kinds, {"model.safetensors": ["w", "v"]}) as files:
    files.write("w", 0, np.ones(2, np.float32))
    with pytest.raises(ValueError, match=r"has 4 entries, of which 2 are written"):
      files.write("w", start, np.ones(count, np.float32))
    files.write("w", 2, np.ones(2, np.float32))


def test_hundreds_of_files_are_written_and_read_with_few_handles(tmp_path):
  names = [f"w{i}" for i in range(500)]
  kinds = {n: (np.dtype(np.float32), (40_000 if i == 0 else 3,)) for i, n in enumerate(names)}
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  free = os.open(os.devnull, os.O_RDONLY)  # Lower numbers are taken by the tests.
  os.close(free)
  resource.setrlimit(resource.RLIMIT_NOFILE, (max(free, 64) + 120, limits[1]))
  try:
    reader = Files()
    with shards.open_shards(tmp_path, kinds, {f"{n}.safetensors": [n] for n in names}) as files:
      for i, name in enumerate(names):
        files.write(name, 0, np.full(kinds[name][1], i, np.float32))
      files.sync()
      for i, name in enumerate(names):
        found = np.empty(3, np.float32)
        files.read(name, 0, found)
        path = tmp_path / f"{name}.safetensors"
        own = stored_tensor(reader, path, name, safetensors.header(path).tensors[name])
        other = np.empty(own.shape, np.float32)
        own.read(0, other)
        assert found.tolist() == [i] * 3
        assert (other == i).all()
    reader.close()
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
