"""The data files that ship with the package; LICENSES.md says where each comes from."""

from __future__ import annotations

import importlib.resources
import pathlib


def path(name: str) -> pathlib.Path:
  """Gives the path of a shipped file; FileNotFoundError for another name says which there are."""
  folder = pathlib.Path(str(importlib.resources.files(__name__)))
  if not (folder / name).is_file():
    known = sorted(p.name for p in folder.iterdir() if p.suffix in (".npz", ".gz", ".md"))
    raise FileNotFoundError(f"no data file {name!r} in the package; there are: {', '.join(known)}.")
  return folder / name
