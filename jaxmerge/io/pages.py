"""Files that are written in large pieces, past the cache that the system keeps of their pages.

What goes through that cache takes a page of memory for each page of the file, and a machine that
has to find them, above all a virtual one that gives back to its host what it does not use, spends
more time on that than a merge of averages on all the rest.
"""

from __future__ import annotations

import errno
import mmap
import os
import pathlib

from jaxmerge.io import atomic

PAGE = 4096  # Bytes; what goes past the cache begins and ends at a multiple, in file and memory.
LEAST = 2**16  # Shorter pieces are not worth it.
ROOM = 2**21


class PagedFile:
  """A file for pieces at any place; those that are written must not overlap before a sync.

  Where the system cannot write past its cache, all goes through it.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   file = PagedFile(pathlib.Path(folder) / "file")
  ...   file.write(memoryview(bytes(2**17)), 5)
  ...   file.write(memoryview(b"begin"), 0)
  ...   file.sync()
  ...   found = bytearray(6)
  ...   print(file.read(memoryview(found), 0), list(found), os.fstat(file.handle).st_size)
  ...   file.close()
  6 [98, 101, 103, 105, 110, 0] 131077
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    self._past: int | None = None
    self._room: mmap.mmap | None = None
    try:
      if flag := getattr(os, "O_DIRECT", 0):
        self._past = os.open(path, os.O_WRONLY | flag)
    except OSError as error:
      if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
        raise

  def write(self, data: memoryview, position: int) -> None:
    """Writes bytes; none of them counts before `sync`. OSError names the file of a full disk."""
    first = -position % PAGE
    whole = (len(data) - first) // PAGE * PAGE
    with atomic.room(self.path):
      if self._past is None or whole < LEAST:
        self._write(self.handle, data, position)
        return
      self._write(self.handle, data[:first], position)
      self._write_pages(self._past, data[first : first + whole], position + first)
      self._write(self.handle, data[first + whole :], position + first + whole)

  def read(self, out: memoryview, position: int) -> int:
    """Reads bytes back; returns how many there were."""
    count = 0
    while count < len(out) and (more := os.preadv(self.handle, [out[count:]], position + count)):
      count += more
    return count

  def sync(self) -> None:
    """Brings what was written to the disk."""
    with atomic.room(self.path):
      os.fsync(self.handle)

  def close(self) -> None:
    """Closes the file."""
    os.close(self.handle)
    if self._past is not None:
      os.close(self._past)

  def _write_pages(self, past: int, data: memoryview, position: int) -> None:
    """Writes whole pages, from memory that lies as the disk wants it."""
    self._room = self._room or mmap.mmap(-1, ROOM)
    for start in range(0, len(data), ROOM):
      own = data[start : start + ROOM]
      self._room[: len(own)] = own
      pages = memoryview(self._room)[: len(own)]
      done = 0
      try:
        while self._past is not None and done < len(own) and done % PAGE == 0:
          done += os.pwrite(past, pages[done:], position + start + done)
      except OSError as error:
        if error.errno != errno.EINVAL:
          raise
        os.close(past)  # This disk wants it otherwise.
        self._past = None
      self._write(self.handle, own[done:], position + start + done)

  @staticmethod
  def _write(handle: int, data: memoryview, position: int) -> None:
    while data:
      count = os.pwrite(handle, data, position)
      data, position = data[count:], position + count
