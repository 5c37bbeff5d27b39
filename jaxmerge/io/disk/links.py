"""Links in the folders of models: what they may lead to.

A model's folder comes from somebody else. What is copied from it, or read as its text, must lie in
it: a link `tokenizer.model -> ~/.ssh/id_rsa` would bring a secret into the result, which is then
published. The hub's cache is made of links to its blobs; these are followed. Weights
are numbers, checked as such, and may lie elsewhere.
"""

from __future__ import annotations

import os
import pathlib
import re

_BLOB = re.compile(r"models--[^/]+/blobs/[0-9a-f]{40}(?:[0-9a-f]{24})?")


def check(path: pathlib.Path, folder: pathlib.Path) -> None:
  """Raises ValueError where a file of a model's folder is, or lies behind, a link out of it.

  Args:
    path: the file.
    folder: of the model; itself it may be a link.
  """
  target, home = pathlib.Path(os.path.realpath(path)), pathlib.Path(os.path.realpath(folder))
  if not target.is_relative_to(home) and not _is_blob(target, home):
    raise ValueError(
      f"{path} is a link out of the model's folder, to {target}, and is not followed: what it "
      "leads to would be a part of the result. If it belongs to the model, put a copy of it there."
    )


def _is_blob(target: pathlib.Path, home: pathlib.Path) -> bool:
  """Returns whether a file is a blob of the hub's cache: of the snapshot's repository, or by name.

  Folders into which the hub's client has linked models (`local_dir`) lead to such names as well.
  """
  blobs = home.parent.parent / "blobs"
  is_of_repository = home.parent.name == "snapshots" and target.parent == blobs
  return is_of_repository or _BLOB.fullmatch("/".join(target.parts[-3:])) is not None
