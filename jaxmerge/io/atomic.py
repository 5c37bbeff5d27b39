"""Files and folders that appear whole or not at all: written beside, synced, renamed."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import BinaryIO

Path = str | os.PathLike[str]


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
  """Removes the hidden files that writings into a folder have left when they were killed."""
  for unfinished in pathlib.Path(folder).glob(".*.????????.tmp"):
    unfinished.unlink()


@contextlib.contextmanager
def folder(path: Path, *, replace: bool = False) -> Iterator[pathlib.Path]:
  """Makes a folder that appears at `path`, with all its files, when the block ends without error.

  The block fills the hidden folder beside `path` that it is given; after an error that is removed.
  With `replace` an old folder at `path` is moved aside, then removed once the new one is in place:
  a crash between the two renames leaves it, whole, as `.NAME.XXXXXXXX.old`.

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
  """Brings a file's bytes, or a folder's entries, to the disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def move(new: pathlib.Path, path: pathlib.Path, *, replace: bool = False) -> None:
  """Brings a folder that is complete to the disk, and to its place; see `folder`."""
  for inner in sorted(new.rglob("*"), reverse=True):
    sync(inner)
  sync(new)
  check_free(path, replace)
  old = _beside(path, "old") if path.exists() else None
  if old is not None:
    os.rename(path, old)
  try:
    os.rename(new, path)
  except BaseException:
    if old is not None:
      os.rename(old, path)
    raise
  sync(path.parent)
  if old is not None:
    shutil.rmtree(old)


def check_free(path: pathlib.Path, replace: bool) -> None:
  """Raises an error that says what to do where a folder cannot be made at a path."""
  if path.exists() and not path.is_dir():
    raise NotADirectoryError(f"{path} is a file; give the path of a folder.")
  if path.exists() and not replace:
    raise FileExistsError(
      f"{path} exists; pass replace=True (--replace) to replace it, or give another path."
    )


def _beside(path: pathlib.Path, ending: str) -> pathlib.Path:
  return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")
