"""Checks symbolic links in model folders.

A model folder comes from another party. Files that are copied from it, or read as text, must lie
inside it: a link `tokenizer.model -> ~/.ssh/id_rsa` would put a secret into the result, which is
then published. Links of the hub's cache to its blobs are followed. Weights are checked to be
numbers, and may lie elsewhere.
"""

from __future__ import annotations

import os
import pathlib
import re

_BLOB = re.compile(r"models--[^/]+/blobs/[0-9a-f]{40}(?:[0-9a-f]{24})?")


def check(path: pathlib.Path, folder: pathlib.Path) -> None:
  """Raises ValueError if a file of a model folder is, or lies behind, a link out of the folder.

  Args:
    path: the file.
    folder: the model folder; it may be a link itself.
  """
  target, home = pathlib.Path(os.path.realpath(path)), pathlib.Path(os.path.realpath(folder))
  if not target.is_relative_to(home) and not _is_blob(target, home):
    raise ValueError(
      f"{path} is a link out of the model's folder, to {target}, and is not followed: its target "
      "would become part of the result. If it belongs to the model, replace the link by a copy."
    )


def _is_blob(target: pathlib.Path, home: pathlib.Path) -> bool:
  """Returns whether a file is a blob of the snapshot's repository, or has a blob's name.

  Links that the hub's client puts into a `local_dir` lead to such names too.
  """
  blobs = home.parent.parent / "blobs"
  is_of_repository = home.parent.name == "snapshots" and target.parent == blobs
  return is_of_repository or _BLOB.fullmatch("/".join(target.parts[-3:])) is not None
