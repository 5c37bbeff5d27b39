"""Direct I/O: writes files in large pieces, bypassing the page cache.

Buffered writes take a page of memory for each page of the file. On a machine that must find free
pages, above all a virtual one that returns unused memory to its host, this takes longer than
everything else in a merge of averages.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import pathlib

from jaxmerge.io.disk import atomic

PAGE = 4096  # Bytes; direct I/O is aligned to multiples of this, in file and memory.
LEAST = 2**16  # Shorter pieces are buffered.
ROOM = 2**21


class PagedFile:
  """A file for writes at any position; writes between two syncs must not overlap.

  Where the system has no direct I/O, all writes are buffered.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   file = PagedFile(pathlib.Path(folder) / "file")
  ...   file.write(memoryview(bytes(2**17)), 5)
  ...   file.write(memoryview(b"begin"), 0)
  ...   file.sync()
  ...   part = bytearray(6)
  ...   print(file.read(memoryview(part), 0), list(part), os.fstat(file.handle).st_size)
  ...   file.close()
  6 [98, 101, 103, 105, 110, 0] 131077
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    # The second handle is open from the first large piece to the next sync: shards can be many.
    self._past: int | None = None
    self._flag = getattr(os, "O_DIRECT", 0)  # 0: no direct I/O.

  def write(self, data: memoryview, position: int) -> None:
    """Writes bytes, durable only after `sync`; OSError names the file on a full disk."""
    first = -position % PAGE
    whole = (len(data) - first) // PAGE * PAGE
    with atomic.room(self.path):
      past = self._open_past_cache() if whole >= LEAST else None
      if past is None:
        self._write(self.handle, data, position)
        return
      self._write(self.handle, data[:first], position)
      self._write_pages(past, data[first : first + whole], position + first)
      self._write(self.handle, data[first + whole :], position + first + whole)

  def read(self, out: memoryview, position: int) -> int:
    """Reads bytes back; returns their number."""
    count = 0
    while count < len(out) and (more := os.preadv(self.handle, [out[count:]], position + count)):
      count += more
    return count

  def sync(self) -> None:
    """Syncs all writes to the disk."""
    with atomic.room(self.path):
      os.fsync(self.handle)
    self._shut()

  def close(self) -> None:
    """Closes the file."""
    self._shut()
    os.close(self.handle)

  def _open_past_cache(self) -> int | None:
    """Returns a handle that passes the cache, where there can be one."""
    if self._past is None and self._flag:
      try:
        self._past = os.open(self.path, os.O_WRONLY | self._flag)
      except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
          raise
        self._flag = 0
    return self._past

  def _shut(self) -> None:
    if self._past is not None:
      os.close(self._past)
      self._past = None

  def _write_pages(self, past: int, data: memoryview, position: int) -> None:
    """Writes whole pages, from memory that is aligned as the disk wants it."""
    buffer = _buffer()
    for start in range(0, len(data), ROOM):
      block, done = data[start : start + ROOM], 0
      buffer[: len(block)] = block
      try:
        while self._flag and done < len(block) and done % PAGE == 0:
          done += os.pwrite(past, buffer[done : len(block)], position + start + done)
      except OSError as error:
        if error.errno != errno.EINVAL:
          raise
        self._flag = 0  # This disk wants it otherwise.
      self._write(self.handle, block[done:], position + start + done)

  @staticmethod
  def _write(handle: int, data: memoryview, position: int) -> None:
    while data:
      count = os.pwrite(handle, data, position)
      data, position = data[count:], position + count


@functools.cache
def _buffer() -> memoryview:
  """Returns memory that begins at a page, one for all files."""
  return memoryview(mmap.mmap(-1, ROOM))
