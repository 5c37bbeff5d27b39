"""Atomic files and folders: written beside their place, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator
from typing import BinaryIO

Path = str | os.PathLike[str]

_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


class Full(OSError):
  """Raised when a disk or a quota is full; names the file and how to continue."""


@contextlib.contextmanager
def room(path: Path, need: str = "") -> Iterator[None]:
  """Raises `Full`, naming the file, where what the block writes finds no room.

  >>> with room("model.safetensors"):
  ...   raise OSError(errno.ENOSPC, "")
  Traceback (most recent call last):
    ...
  jaxmerge.io.disk.atomic.Full: [Errno 28] No space left on device; what was finished is kept: free
  some room, and the same command goes on: 'model.safetensors'

  Args:
    path: of the file, or of the folder where it is made.
    need: words for how much it needs.

  Raises:
    Full: where the disk or the quota is full.
  """
  try:
    yield
  except OSError as error:
    if isinstance(error, Full) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    remedy = "what was finished is kept: free some room, and the same command goes on"
    text = f"{os.strerror(error.errno)}{need}; {remedy}"
    raise Full(error.errno, text, str(path)) from error


@contextlib.contextmanager
def write(path: Path) -> Iterator[BinaryIO]:
  """Opens a binary file that takes the place of `path` when the block ends without an error.

  Until then it is a hidden file beside `path`; after an error it is removed, and what was at `path`
  is as before. Permissions are those of any new file (the umask's).

  >>> with write("scale.txt") as file:  # doctest: +SKIP
  ...   file.write(b"0.3")
  """
  path = pathlib.Path(path)
  beside = _beside(path, "tmp")
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    with room(path):
      with open(beside, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
      os.replace(beside, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      beside.unlink()
    raise
  sync(path.parent)


def tidy(folder: Path) -> None:
  """Removes hidden files that killed writes left in a folder."""
  for path in filter(is_unfinished, pathlib.Path(folder).iterdir()):
    path.unlink()


def is_unfinished(path: Path) -> bool:
  """Returns whether a path has the name of a hidden file that is being written.

  >>> is_unfinished("runs/.config.json.0a1b2c3d.tmp"), is_unfinished("runs/config.json")
  (True, False)
  """
  return re.fullmatch(r"\..*\.[0-9a-f]{8}\.tmp", os.path.basename(path)) is not None


@contextlib.contextmanager
def folder(path: Path, *, replace: bool = False) -> Iterator[pathlib.Path]:
  """Makes a folder that appears at `path`, with all its files, when the block ends without error.

  The block fills a hidden folder beside `path`, which is removed after an error.
  With `replace` an old folder at `path` is moved aside, then removed once the new one is in place:
  a crash between the two renames leaves it, whole, as `.NAME.XXXXXXXX.old`, until the next folder
  has come to this place.

  Raises:
    FileExistsError: where something is at `path` already and `replace` is not set.
    NotADirectoryError: where `path` is a file.
  """
  path = pathlib.Path(path)
  check_free(path, replace)
  beside = _beside(path, "tmp")
  beside.mkdir(parents=True)
  try:
    yield beside
    move(beside, path, replace=replace)
  except BaseException:
    shutil.rmtree(beside, ignore_errors=True)
    raise


def sync(path: Path) -> None:
  """Syncs a file's bytes, or a folder's entries, to the disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    with room(path):
      os.fsync(handle)
  finally:
    os.close(handle)


def move(new: pathlib.Path, path: pathlib.Path, *, replace: bool = False) -> None:
  """Syncs a complete folder to the disk and moves it to its place; see `folder`."""
  for inner in sorted(new.rglob("*"), reverse=True):
    sync(inner)
  sync(new)
  check_free(path, replace)
  old = _beside(path, "old") if path.exists() else None
  if old is not None:
    os.rename(path, old)
  try:
    os.rename(new, path)
  except BaseException as error:
    if old is not None and not path.exists():
      os.rename(old, path)
    if isinstance(error, OSError) and error.errno in _TAKEN:
      text = f"{path} has come into being meanwhile; what was made is in {new}, whole"
      raise FileExistsError(f"{text}: move it to its place.") from error
    raise
  sync(path.parent)
  discard(path)


def discard(path: pathlib.Path) -> None:
  """Removes replaced folders of a path."""
  for old in old_folders(path):
    shutil.rmtree(old)


def old_folders(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns replaced folders of a path that a crash left behind."""
  return sorted(path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.old"))


def check_name(path: pathlib.Path) -> None:
  """Raises ValueError for a path without a name, beside which a result cannot be written."""
  if path.name in ("", ".."):
    raise ValueError(f"{path}: give the result a folder of its own, such as {path / 'merged'}.")


def check_free(path: pathlib.Path, replace: bool) -> None:
  """Raises an error, with what to do, where a folder cannot be made at a path."""
  check_name(path)
  if path.is_symlink():
    target = os.path.realpath(path)
    raise NotADirectoryError(
      f"{path} is a link to {target}; give that path itself, or remove the link."
    )
  if path.exists() and not path.is_dir():
    raise NotADirectoryError(f"{path} is a file; give the path of a folder.")
  if path.exists() and not replace:
    raise FileExistsError(
      f"{path} exists; pass replace=True (--replace) to replace it, or give another path."
    )


def _beside(path: pathlib.Path, ending: str) -> pathlib.Path:
  return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")
