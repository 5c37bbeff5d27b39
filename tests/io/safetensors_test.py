"""Safetensors files and atomic writes: round trips, agreement with the reference, damaged files."""

import errno
import json
import os
import stat
import time

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxmerge.io.disk import atomic
from jaxmerge.io.tensors import safetensors as files

NAMES = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda s: s != "__metadata__")
ARRAYS = hnp.arrays(
  st.sampled_from(sorted(map(str, files.DTYPES.values()))).map(np.dtype),
  hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
  elements=st.just(0),
)


def filled(x, seed):
  """The array with random bytes: all bit patterns, NaN included."""
  raw = np.random.default_rng(seed).integers(0, 256, x.nbytes, dtype=np.uint8)
  raw = raw & 1 if x.dtype == bool else raw
  return np.frombuffer(raw.tobytes(), x.dtype).reshape(x.shape)


def raw_file(path, header, data=b""):
  """Writes a file with the header given as text or as an object."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + data)
  return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@hypothesis.given(st.dictionaries(NAMES, ARRAYS, max_size=4), st.dictionaries(NAMES, NAMES))
def test_what_is_saved_is_loaded_bit_for_bit_in_order(tmp_path_factory, tensors, metadata):
  tensors = {name: filled(x, k) for k, (name, x) in enumerate(tensors.items())}
  path = tmp_path_factory.mktemp("round") / "m.safetensors"
  files.save(path, tensors, metadata)
  found = files.load(path)
  assert sorted(found) == sorted(tensors)
  # Tensors without a byte share a position with their neighbour; all others keep their order.
  assert [n for n in found if found[n].nbytes] == [n for n in tensors if tensors[n].nbytes]
  for name, x in tensors.items():
    assert found[name].dtype == x.dtype
    assert found[name].shape == x.shape
    assert found[name].tobytes() == x.tobytes()
  assert files.header(path).metadata == metadata


def some_tensors():
  rng = np.random.default_rng(0)
  return {
    "b": rng.normal(size=(3, 4)).astype(np.float32),
    "a": rng.normal(size=(5,)).astype(ml_dtypes.bfloat16),
    "n": np.arange(6).reshape(1, 6),
    "flags": np.array([True, False, True]),
  }


def test_the_reference_implementation_reads_what_is_written(tmp_path):
  files.save(tmp_path / "m.safetensors", some_tensors(), {"format": "pt"})
  with safetensors.safe_open(tmp_path / "m.safetensors", "numpy") as opened:
    assert opened.metadata() == {"format": "pt"}
    for name, x in some_tensors().items():
      np.testing.assert_array_equal(opened.get_tensor(name), x)


def test_what_the_reference_implementation_writes_is_read(tmp_path):
  safetensors.numpy.save_file(some_tensors(), tmp_path / "m.safetensors", {"by": "reference"})
  found = files.load(tmp_path / "m.safetensors")
  assert files.header(tmp_path / "m.safetensors").metadata == {"by": "reference"}
  assert found.keys() == some_tensors().keys()
  for name, x in some_tensors().items():
    np.testing.assert_array_equal(found[name], x)


def test_transposed_views_keep_their_values(tmp_path):
  x = np.arange(6, dtype=np.float32).reshape(2, 3)
  files.save(tmp_path / "m.safetensors", {"t": x.T, "every": x[:, ::2], "big": x.astype(">f4")})
  found = files.load(tmp_path / "m.safetensors")
  np.testing.assert_array_equal(found["t"], x.T)
  np.testing.assert_array_equal(found["every"], x[:, ::2])
  np.testing.assert_array_equal(found["big"], x)


def test_entries_say_where_the_bytes_are(tmp_path):
  path = tmp_path / "m.safetensors"
  files.save(path, some_tensors())
  for name, found in files.header(path).tensors.items():
    raw = path.read_bytes()[found.start : found.stop]
    assert raw == some_tensors()[name].tobytes()


DAMAGED = {
  "names 'w' twice": (b'{"w": {}, "w": {}}', b""),
  "not JSON": (b'{"w": ', b""),
  "JSON object": (b"[1, 2]", b""),
  "not JSON .*can't decode": (b'{"\xff": 1}', b""),
  r"not JSON \(nested too deep\)": (b"[" * 500_000, b""),
  "not JSON .*4300 digits": (b'{"w": ' + b"9" * 5000 + b"}", b""),
  r"an unpaired surrogate is not text, in .*ud800": (b'{"w\\ud800": {}}', b""),
  "'w': its shape has 65 axes, over the limit of 64": ({"w": entry(shape=[1] * 65)}, bytes(8)),
  r"'w': F32 \[0, 4611686018427387904\] is larger": ({"w": entry(shape=(0, 2**62))}, bytes(8)),
  r"'w': shape \[18446744073709551616\]": ({"w": entry(shape=(2**64,))}, bytes(8)),
  "'w': data_offsets .* must be two positions": ({"w": entry(offsets=(0, 2**64))}, bytes(8)),
  "'w'.*overlaps 'v'": ({"v": entry(), "w": entry(offsets=(4, 12))}, bytes(12)),
  "'w' leaves a gap after 'v'": ({"v": entry(), "w": entry(offsets=(12, 20))}, bytes(20)),
  "'w' leaves a gap after the header": ({"w": entry(offsets=(4, 12))}, bytes(12)),
  "'w' ends at byte .* truncated": ({"w": entry()}, bytes(7)),
  "3 bytes after the last tensor": ({"w": entry()}, bytes(11)),
  r"'w': F32 \[2\] takes 8 bytes, but .* hold 4": ({"w": entry(offsets=(0, 4))}, bytes(4)),
  "'w': dtype 'F31' is unknown": ({"w": entry(dtype="F31")}, bytes(8)),
  r"'w': shape \[-2\]": ({"w": entry(shape=(-2,))}, bytes(8)),
  r"'w': shape \[True\]": ({"w": entry(shape=(True,))}, bytes(8)),
  r"'w': data_offsets \[8\]": ({"w": entry(offsets=(8,))}, bytes(8)),
  "'w': expected dtype, shape": ({"w": {"dtype": "F32"}}, b""),
  "__metadata__ must map text to text": ({"__metadata__": {"a": 1}}, b""),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged_files_are_refused_by_name(tmp_path, message):
  path = raw_file(tmp_path / "bad.safetensors", *DAMAGED[message])
  with pytest.raises(ValueError, match=r"bad\.safetensors: .*" + message):
    files.load(path)


def test_truncated_anywhere_is_refused(tmp_path):
  path = tmp_path / "m.safetensors"
  files.save(path, some_tensors())
  whole = path.read_bytes()
  for length in range(len(whole)):
    path.write_bytes(whole[:length])
    with pytest.raises(ValueError, match=r"m\.safetensors: .*truncated"):
      files.header(path)


def test_a_name_that_is_there_twice_is_found_soon_among_many(tmp_path):
  """In time that grows with the number of names, not with its square."""
  names = b", ".join(b'"w%d": 0' % i for i in range(200_000))
  path = raw_file(tmp_path / "bad.safetensors", b"{" + names + b', "w199999": 0}')
  start = time.perf_counter()
  with pytest.raises(ValueError, match=r"bad\.safetensors: the header: names 'w199999' twice"):
    files.header(path)
  assert time.perf_counter() - start < 20  # A fifth of a second where nothing else runs.


def test_a_name_of_a_whole_surrogate_pair_is_one(tmp_path):
  path = raw_file(
    tmp_path / "m.safetensors", json.dumps({"w\U0001f600": entry()}).encode(), bytes(8)
  )
  assert b"\\ud83d" in path.read_bytes()
  assert files.header(path).tensors.keys() == {"w\U0001f600"}


def test_a_header_that_is_too_long_is_refused_unread(tmp_path):
  (tmp_path / "m.safetensors").write_bytes((10**12).to_bytes(8, "little") + b"{}")
  with pytest.raises(ValueError, match="claims a length of 1000000000000 bytes, over the limit"):
    files.header(tmp_path / "m.safetensors")


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"none\.safetensors: no such file"):
    files.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
  ("tensors", "message"),
  [
    ({"w": np.zeros(2, np.complex64)}, "tensor 'w' is complex64"),
    ({"w": np.array(["text"])}, "tensor 'w' is <U4"),
    ({"__metadata__": np.zeros(2)}, "'__metadata__' cannot be the name"),
  ],
)
def test_what_the_format_cannot_hold_is_refused_before_writing(tmp_path, tensors, message):
  with pytest.raises(ValueError, match=message):
    files.save(tmp_path / "m.safetensors", tensors)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
  path = tmp_path / "m.safetensors"
  files.save(path, some_tensors())
  before = path.read_bytes()

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, call, full)
  with pytest.raises(OSError, match="No space left"):
    files.save(path, {"other": np.zeros(1000)})
  assert path.read_bytes() == before
  assert os.listdir(tmp_path) == ["m.safetensors"]


def test_an_error_within_the_block_leaves_the_old_file_and_nothing_else(tmp_path):
  (tmp_path / "a").write_text("old")

  def interrupted():
    with atomic.write(tmp_path / "a") as file:
      file.write(b"half of the n")
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    interrupted()
  assert (tmp_path / "a").read_text() == "old"
  assert os.listdir(tmp_path) == ["a"]


def test_the_old_file_is_there_until_the_block_ends(tmp_path):
  (tmp_path / "a").write_text("old")
  with atomic.write(tmp_path / "a") as file:
    file.write(b"new")
    file.flush()
    assert (tmp_path / "a").read_text() == "old"
  assert (tmp_path / "a").read_text() == "new"
  assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_any_new_file(tmp_path, umask):
  old = os.umask(umask)
  try:
    with atomic.write(tmp_path / "deep" / "a") as file:
      file.write(b"x")
    with atomic.folder(tmp_path / "b") as beside:
      (beside / "c").write_text("x")
  finally:
    os.umask(old)
  assert stat.S_IMODE((tmp_path / "deep" / "a").stat().st_mode) == 0o666 & ~umask
  assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o777 & ~umask


def tree_of(path):
  return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}


def test_a_folder_appears_whole(tmp_path):
  with atomic.folder(tmp_path / "deep" / "new") as beside:
    (beside / "inner").mkdir()
    (beside / "inner" / "a").write_text("1")
    (beside / "b").write_text("2")
    assert not (tmp_path / "deep" / "new").exists()
  assert tree_of(tmp_path) == {"deep/new/inner/a": "1", "deep/new/b": "2"}


def test_a_folder_that_is_there_is_replaced_only_when_asked(tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "old").write_text("1")
  with (
    pytest.raises(FileExistsError, match="out exists; pass replace=True"),
    atomic.folder(tmp_path / "out"),
  ):
    pytest.fail("the block must not run.")
  with atomic.folder(tmp_path / "out", replace=True) as beside:
    (beside / "new").write_text("2")
    assert tree_of(tmp_path / "out") == {"old": "1"}
  assert tree_of(tmp_path) == {"out/new": "2"}


def test_what_a_kill_between_two_renames_has_left_is_removed_later(tmp_path):
  for name in (".out.0123abcd.old", ".out.mine.old", ".other.0123abcd.old"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "kept").write_text("1")
  with atomic.folder(tmp_path / "out", replace=True) as beside:
    (beside / "new").write_text("2")
  assert sorted(os.listdir(tmp_path)) == [".other.0123abcd.old", ".out.mine.old", "out"]


def test_a_folder_never_takes_the_place_of_a_file(tmp_path):
  (tmp_path / "out").write_text("1")
  with (
    pytest.raises(NotADirectoryError, match="out is a file"),
    atomic.folder(tmp_path / "out", replace=True),
  ):
    pytest.fail("the block must not run.")
  assert tree_of(tmp_path) == {"out": "1"}


@pytest.mark.parametrize("fails_at", ["block", "fsync", "rename 1", "rename 2"])
def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path, monkeypatch, fails_at):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "old").write_text("1")
  real, calls = os.rename, []

  def full(*args):
    calls.append(args)
    if fails_at != "rename 2" or len(calls) == 2:
      raise OSError(errno.ENOSPC, "No space left on device")
    return real(*args)

  if fails_at != "block":
    monkeypatch.setattr(os, fails_at.split()[0], full)

  def save():
    with atomic.folder(tmp_path / "out", replace=True) as beside:
      (beside / "new").write_text("2")
      if fails_at == "block":
        full()

  with pytest.raises(OSError, match="No space left"):
    save()
  assert tree_of(tmp_path) == {"out/old": "1"}
  assert os.listdir(tmp_path) == ["out"]
