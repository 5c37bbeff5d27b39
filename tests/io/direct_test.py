"""Files written past the cache of their pages hold the same bytes as others."""

import errno
import fcntl
import itertools
import os

import numpy as np
import pytest

from jaxmerge.io.disk import direct


def written(path, pieces, size):
  """Writes pieces (start, bytes), and returns what the file holds afterwards."""
  file = direct.PagedFile(path)
  os.truncate(file.handle, size)
  for start, data in pieces:
    file.write(memoryview(data), start)
  file.sync()
  file.close()
  return path.read_bytes()


@pytest.fixture
def cut():
  """Bytes, and pieces of them that neither begin nor end at pages, in any order."""
  rng = np.random.default_rng(0)
  data = rng.bytes(3 * 2**20 + 77)
  ends = [0, 5, 4096, 4097, 90_001, 2**20, 2**20 + 8192, 3 * 2**20, len(data)]
  pieces = [(a, data[a:b]) for a, b in itertools.pairwise(ends)]
  return data, [pieces[i] for i in rng.permutation(len(pieces))]


def test_pieces_of_any_length_and_order(cut, tmp_path):
  data, pieces = cut
  assert written(tmp_path / "file", pieces, len(data)) == data


def test_most_of_it_goes_past_the_cache_where_that_can_be(cut, tmp_path, monkeypatch):
  data, pieces = cut
  write, counts = os.pwrite, {True: 0, False: 0}

  def counted(handle, part, position):
    past = bool(_flags(handle) & os.O_DIRECT)
    counts[past] += len(part)
    return write(handle, part, position)

  try:
    os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
  except OSError:
    pytest.skip("this disk has a cache that cannot be passed.")
  monkeypatch.setattr(os, "pwrite", counted)
  assert written(tmp_path / "file", pieces, len(data)) == data
  assert counts[False] < 110_000 < counts[True]


def _flags(handle):
  return fcntl.fcntl(handle, fcntl.F_GETFL)


@pytest.mark.parametrize("refused", ["open", "pwrite"])
def test_a_disk_that_cannot(cut, tmp_path, monkeypatch, refused):
  """It says so when the file is opened, or only at the first write."""
  data, pieces = cut
  real_open, real_write = os.open, os.pwrite

  def opened(path, flags, *mode):
    if flags & os.O_DIRECT:
      raise OSError(errno.EINVAL, "no")
    return real_open(path, flags, *mode)

  def write(handle, part, position):
    if _flags(handle) & os.O_DIRECT:
      raise OSError(errno.EINVAL, "no")
    return real_write(handle, part, position)

  monkeypatch.setattr(os, refused, {"open": opened, "pwrite": write}[refused])
  assert written(tmp_path / "file", pieces, len(data)) == data


def test_a_short_write_goes_on(cut, tmp_path, monkeypatch):
  data, pieces = cut
  write = os.pwrite
  monkeypatch.setattr(os, "pwrite", lambda handle, part, at: write(handle, part[:12_345], at))
  monkeypatch.setattr(direct, "LEAST", 2**40)
  assert written(tmp_path / "file", pieces, len(data)) == data


def test_other_errors_are_told(cut, tmp_path, monkeypatch):
  data, pieces = cut

  def full(handle, part, position):
    raise OSError(errno.ENOSPC, "full")

  monkeypatch.setattr(os, "pwrite", full)
  with pytest.raises(OSError, match="No space left"):
    written(tmp_path / "file", pieces, len(data))
