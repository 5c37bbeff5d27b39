"""Results as a single safetensors file, `merged.safetensors`, with the provenance next to it."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence

from jaxmerge.io.disk import atomic
from jaxmerge.io.huggingface import folder, raw

LIMIT = 2**62  # Shard size in bytes that puts all tensors into one file.


def is_output(out: pathlib.Path) -> bool:
  """Returns whether the path of a result names a file.

  >>> is_output(pathlib.Path("merged.safetensors")), is_output(pathlib.Path("merged"))
  (True, False)
  """
  return out.suffix == raw.ENDING


def check_free(out: pathlib.Path, replace: bool) -> None:
  """Raises an error, with advice, if a result, a file or a folder, cannot be created."""
  if not is_output(out):
    atomic.check_free(out, replace)
    return
  atomic.check_name(out)
  if out.is_symlink() or out.is_dir():
    what = "a link" if out.is_symlink() else "a folder"
    raise IsADirectoryError(f"{out} is {what}; remove it, or choose another path.")
  if out.exists() and not replace:
    raise FileExistsError(
      f"{out} exists; pass replace=True (--replace) to replace it, or choose another path."
    )


def check_shards(out: pathlib.Path, shards: Mapping[str, Sequence[str]], out_format: str) -> None:
  """Raises ValueError for a result that does not fit into one file."""
  if not is_output(out):
    return
  if out_format != "safetensors":
    raise ValueError(f"{out}: a safetensors file is no checkpoint; use the path of a folder.")
  if others := [name for name in shards if name != folder.WEIGHTS]:
    raise ValueError(f"{out}: {others[0]} is part of the result; use the path of a folder.")


def move(directory: pathlib.Path, out: pathlib.Path, *, replace: bool) -> None:
  """Moves the weights and the provenance of a complete folder to their paths, and removes it."""
  weights, provenance = directory / folder.WEIGHTS, directory / folder.PROVENANCE
  for path in (weights, provenance):
    atomic.sync(path)
  check_free(out, replace)
  os.replace(provenance, folder.provenance_file(out))
  os.replace(weights, out)
  atomic.sync(out.parent)
  shutil.rmtree(directory)
