"""Checks that files are unchanged, by inode, size and times."""

from __future__ import annotations

import os
import pathlib
import stat
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_TICK = 20_000_000  # Nanoseconds: writes closer together may have the same time.
_COARSE = 2_000_000_000  # The same on disks that store whole seconds.


class Stamp(NamedTuple):
  """The state of a file on disk; it changes when the file is written or replaced.

  Attributes:
    device: the disk.
    inode: the file on the disk.
    size: number of bytes.
    modified: time of the last write (mtime), in nanoseconds; programs can set it.
    changed: time of the last write, rename or change of mtime (ctime); programs cannot set it.
  """

  device: int
  inode: int
  size: int
  modified: int
  changed: int


class Changed(ValueError):
  """A file has changed."""


def of(path: pathlib.Path) -> Stamp:
  """Returns the stamp of a file, through an open handle, for which a network disk asks its server.

  Raises:
    FileNotFoundError: if the file does not exist.
    ValueError: if it is a device, a pipe or a folder.
  """
  handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # A pipe would wait for a writer.
  try:
    s = os.fstat(handle)
  finally:
    os.close(handle)
  if not stat.S_ISREG(s.st_mode):
    raise ValueError(f"{path}: not a regular file; use one that can be read again.")
  return Stamp(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)


def take(paths: Iterable[pathlib.Path]) -> dict[pathlib.Path, Stamp]:
  """Returns the stamps of files that are about to be read.

  If a file has just been written, it waits until another write would get a later time.
  """
  stamps = {path: of(path) for path in paths}
  last = max((s.changed for s in stamps.values()), default=0)
  coarse = any(s.changed % 1_000_000_000 == 0 for s in stamps.values())
  wait = last + (_COARSE if coarse else _TICK) - time.time_ns()
  if 0 < wait <= (_COARSE if coarse else _TICK):  # A longer wait means another machine's clock.
    time.sleep(wait / 1e9)
  return stamps


def check(before: Mapping[pathlib.Path, Stamp]) -> None:
  """Raises Changed, naming the first file that has changed."""
  for path, stamp in before.items():
    try:
      now = of(path)
    except (OSError, ValueError) as error:
      raise Changed(f"{path} was changed while it was read: {_gone(error)}.") from error
    if now != stamp:
      raise Changed(f"{path} was changed while it was read: {_difference(stamp, now)}.")


def _gone(error: Exception) -> str:
  return "it is no longer there" if isinstance(error, FileNotFoundError) else f"{error}".rstrip(".")


def _difference(before: Stamp, now: Stamp) -> str:
  if (before.device, before.inode) != (now.device, now.inode):
    return "another file has taken its place"
  if before.size != now.size:
    return f"it had {before.size:,} bytes, and has {now.size:,}"
  return "it was written to" if before.modified != now.modified else "its ctime has changed"
