"""Bare safetensors: a file of any name, or a folder of files without an index."""

from __future__ import annotations

import os
import pathlib
import re

from jaxmerge.io import other_formats

ENDING = ".safetensors"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")


def is_file(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is a weight file that is a model by itself.

  Files of adapters are not, nor are files of a Hugging Face folder, which also has a config.

  >>> is_file("models/none.safetensors")
  False
  """
  path = pathlib.Path(path)
  if path.suffix != ENDING or not path.is_file() or path.name.startswith("adapter_model."):
    return False
  home = path.parent
  if (home / other_formats.ADAPTER).is_file():
    return False
  in_folder = path.name == other_formats.WEIGHTS or _SHARD.fullmatch(path.stem) is not None
  return not in_folder or not (home / "config.json").is_file()


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the safetensors of a folder, whatever their names.

  Raises:
    FileNotFoundError: if there are none, or if the other shards' names show that one is missing.
  """
  if is_file(folder):
    return [folder]
  paths = sorted(folder.glob(f"*{ENDING}")) if folder.is_dir() else []
  paths = [path for path in paths if path.is_file() and not path.name.startswith("adapter_model.")]
  elsewhere = (other_formats.ADAPTER, "model_index.json")
  if not paths or any((folder / name).is_file() for name in elsewhere):
    raise FileNotFoundError(other_formats.explain_missing(folder))
  for match in filter(None, (_SHARD.fullmatch(path.stem) for path in paths)):
    for number in range(1, int(match["count"]) + 1):
      shard = f"{match['stem']}-{number:05d}-of-{match['count']}{ENDING}"
      if not (folder / shard).is_file():
        raise FileNotFoundError(f"{folder / shard}: no such file, but {match[0]}{ENDING} exists.")
  return paths
