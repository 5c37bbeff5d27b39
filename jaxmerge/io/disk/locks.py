"""Locks paths on disk: one process writes to a path, and a second one fails with an error.

The lock is a file next to the path, so that it can be acquired before the path is read. It contains
the process id of its owner. It is a kernel lock (flock), which is released whenever the process
ends. On disks without such locks, such as some network disks, a file names the machine instead.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator

_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
_PATIENCE = 0.1  # Seconds: `check` of another process holds the lock for a moment.
_PAUSE = 0.02


class Busy(ValueError):
  """Another process has locked the path."""


def path_of(place: pathlib.Path) -> pathlib.Path:
  """Returns the lock file of a path.

  >>> path_of(pathlib.Path("models/merged")).name
  '.merged.lock'
  """
  return place.with_name(f".{place.name}.lock")


@contextlib.contextmanager
def hold(place: pathlib.Path, busy: str, *, patience: float = _PATIENCE) -> Iterator[None]:
  """Locks a path, which need not exist, while the block runs.

  Args:
    place: a folder or a file; its parent is created.
    busy: the error message if another process has the lock; that process is appended.
    patience: seconds to wait for another process.

  Raises:
    Busy: if another process has the lock; nothing was changed then.
  """
  path = path_of(place)
  if not path.parent.is_dir():
    path.parent.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(_hold_lock(path, busy, patience))
    except OSError as error:
      if error.errno not in _UNKNOWN:
        raise
      stack.enter_context(_hold_mark(path, busy, patience))
    yield


def check(place: pathlib.Path, busy: str) -> None:
  """Raises Busy if another process has locked a path; creates no file and takes no lock."""
  path = path_of(place)
  _check_mark(path, busy)
  try:
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
  except FileNotFoundError:
    return
  try:
    _take(handle, path, busy)
  except OSError as error:
    if error.errno not in _UNKNOWN:
      raise
  finally:
    os.close(handle)


@contextlib.contextmanager
def _hold_lock(path: pathlib.Path, busy: str, patience: float) -> Iterator[None]:
  """Holds the kernel's lock of a file, and removes the file with the lock."""
  while True:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
      _take(handle, path, busy, patience)
      if not _is_at(handle, path):  # The previous owner has removed it meanwhile.
        continue
      with contextlib.suppress(OSError):  # The lock also works on a full disk.
        os.truncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
      try:
        yield
      finally:
        if _is_at(handle, path):
          path.unlink()
      return
    finally:
      os.close(handle)


def _take(handle: int, path: pathlib.Path, busy: str, patience: float = _PATIENCE) -> None:
  end = time.monotonic() + patience
  while True:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      if time.monotonic() >= end:
        raise Busy(f"{busy} ({path} is locked{_holder(handle)}.)") from error
      time.sleep(_PAUSE)
    else:
      return


def _holder(handle: int) -> str:
  """Returns the end of an error with the lock's owner; empty if the file does not name it."""
  number, _, machine = os.pread(handle, 300, 0).decode(errors="replace").partition(" ")
  if not number.isdecimal() or not machine.isprintable():
    return ""
  here = machine == socket.gethostname()
  if here and int(number) == os.getpid():
    return " by this process"
  return f" by process {number} on {'this machine' if here else machine}"


def _is_at(handle: int, path: pathlib.Path) -> bool:
  try:
    return os.path.samestat(os.fstat(handle), os.lstat(path))
  except FileNotFoundError:
    return False


@contextlib.contextmanager
def _hold_mark(path: pathlib.Path, busy: str, patience: float) -> Iterator[None]:
  """Marks a path as used by this machine; a lock on the local disk excludes other processes."""
  path.unlink(missing_ok=True)  # Without kernel locks, this file has no use.
  digest = hashlib.blake2b(os.fsencode(path.absolute()), digest_size=16).hexdigest()
  local = pathlib.Path(tempfile.gettempdir()) / f".jaxmerge-{os.getuid()}-{digest}.lock"
  mark = _mark_of(path)
  with _hold_lock(local, busy, patience):
    if not _check_mark(path, busy):  # A mark of this machine is left from a killed process.
      try:
        handle = os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
      except FileExistsError as error:
        raise Busy(f"{busy} ({mark} has just been created.)") from error
      try:
        os.write(handle, _machine())
        os.fsync(handle)
      finally:
        os.close(handle)
    try:
      yield
    finally:
      mark.unlink(missing_ok=True)


def _check_mark(path: pathlib.Path, busy: str) -> bool:
  """Returns whether a path has this machine's mark; raises Busy if it has another machine's."""
  mark = _mark_of(path)
  try:
    text = mark.read_bytes()[:200]
  except FileNotFoundError:
    return False
  if text != _machine():
    host = text.decode(errors="replace").split(" ")[0]
    hint = f"This disk has no locks: if no process runs there any more, remove {mark}."
    raise Busy(f"{busy} It runs on the machine {host!r}. {hint}")
  return True


def _mark_of(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f"{path.name}.machine")


def _machine() -> bytes:
  """Returns a unique name of this machine and user."""
  return f"{socket.gethostname()} {uuid.getnode():x} {os.getuid()}".encode()
