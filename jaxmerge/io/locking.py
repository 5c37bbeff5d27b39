"""A lock on a place: one process at a time works there, and one that has ended holds nothing.

The lock is on an open file (`flock`), so the system releases it whatever ends the process, a kill
as well; that the file is there says nothing. Free of jax.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import time
import warnings
from collections.abc import Iterator

Path = str | os.PathLike[str]

NAME = ".lock"  # Of the file where the lock lies in the folder that it is for.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def held(file: Path, busy: str, *, patience: float = 0.0) -> Iterator[None]:
  """Holds the lock of a place until the block, or the process, ends.

  Threads of one process, and two stores in it, keep each other out as processes do. On a shared
  disk such as NFS so do machines. In a folder that cannot be written nothing is locked.

  >>> with held("runs/images4/.lock", "runs/images4 is in use"):  # doctest: +SKIP
  ...   ...

  Args:
    file: of the lock, in the folder or beside it; it is made, and removed at the end.
    busy: says what is in use; who uses it is added.
    patience: seconds to wait for another that holds it.

  Raises:
    ValueError: where another holds it, with the process and its machine.
  """
  handle = _locked(pathlib.Path(file), busy, time.monotonic() + patience)
  try:
    yield
  finally:
    if handle is not None:
      # Before it is released: whoever opened this file meanwhile sees that it is no longer there.
      if _is_at(handle, file):
        os.unlink(file)
      os.close(handle)


def _locked(file: pathlib.Path, busy: str, end: float) -> int | None:
  """Opens and locks a file; None where that cannot be."""
  while True:
    handle = _opened(file)
    if handle is None:
      return None
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      holder = _holder(handle)
      os.close(handle)
      if time.monotonic() >= end:
        raise ValueError(f"{busy}{holder}.") from None
      time.sleep(0.1)
      continue
    except OSError as error:
      os.close(handle)
      if error.errno not in _NO_LOCKS:
        raise
      what = "this disk has no locks, so nothing keeps a second process from working here"
      warnings.warn(f"{file.parent}: {what} at the same time.", stacklevel=4)
      return None
    if _is_at(handle, file):
      with contextlib.suppress(OSError):  # It is another user's file, or the disk is full.
        os.truncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
      return handle
    os.close(handle)  # The one before has removed it: there may be a new one by now.


def _opened(file: pathlib.Path) -> int | None:
  """Opens the file of a lock, which is made if need be; None in a folder that is only read."""
  try:
    return os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
  except OSError as error:
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
      raise
  try:
    return os.open(file, os.O_RDONLY)  # Another user's: it can be locked all the same.
  except OSError:
    return None


def _is_at(handle: int, file: Path) -> bool:
  """Tells whether an open file is the one at a path."""
  try:
    return os.path.samestat(os.fstat(handle), os.stat(file))
  except FileNotFoundError:
    return False


def _holder(handle: int) -> str:
  """Says which process holds a lock, as far as it has said so itself."""
  number, _, machine = os.pread(handle, 300, 0).decode(errors="replace").partition(" ")
  if not number.isdecimal() or not machine.isprintable():
    return ""
  here = machine == socket.gethostname()
  if here and int(number) == os.getpid():
    return " by this very process, which has not closed it yet"
  return f" by process {number} on {'this machine' if here else machine}"
