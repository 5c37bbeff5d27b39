"""A manifest of checksums, which detects changes in a folder since it was sealed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from jaxmerge.io.disk import atomic, strict_json

NAME = "manifest.json"
_FORMAT = 1


def seal(folder: Path, facts: dict, *, within: str = ".") -> None:
  """Writes the manifest of a folder: sizes and BLAKE2b digests of its files, and some facts.

  All files, the manifest and all directories below the folder are synced.

  Args:
    folder: a folder without a manifest, to which nothing is written any more.
    facts: plain JSON that is part of the manifest.
    within: the subfolder to seal; files outside it may change.
  """
  files = _files(folder, within)
  for path in files.values():
    atomic.sync(path)
  sizes = {name: [path.stat().st_size, _digest(path)] for name, path in files.items()}
  body = {"format": _FORMAT, "facts": facts, "files": sizes}
  with atomic.write(folder / NAME) as file:
    file.write(json.dumps({"body": body, "blake2b": _text_digest(body)}, indent=1).encode())
  for below in (path for path in folder.rglob("*") if path.is_dir()):
    atomic.sync(below)


def facts(folder: Path) -> dict:
  """Returns the facts in a folder's manifest; raises ValueError if the manifest is damaged."""
  return _body(folder)["facts"]


def damage(folder: Path, *, within: str = ".", contents: bool = True) -> str | None:
  """Returns the first problem of a sealed folder; None if there is none.

  Args:
    folder: the folder.
    within: the subfolder to check.
    contents: whether files are read for their checksums; otherwise names and sizes are checked.
  """
  if not folder.is_dir():
    return "it is not a directory"
  if not any(folder.iterdir()):
    return "the directory is empty"
  try:
    sealed = _body(folder)["files"]
  except FileNotFoundError:
    return f"{NAME} is missing"
  except ValueError as error:
    return f"{NAME} is damaged: {error}"
  files = _files(folder, within)
  inside = Path(within)
  sealed = {name: entry for name, entry in sealed.items() if Path(name).is_relative_to(inside)}
  if missing := sorted(sealed.keys() - files.keys()):
    return f"file {missing[0]} is missing"
  if added := sorted(files.keys() - sealed.keys()):
    return f"file {added[0]} is not in {NAME}"
  for name, path in files.items():
    size, digest = sealed[name]
    if path.stat().st_size != size:
      return f"file {name} has {path.stat().st_size} bytes, not {size}"
    if contents and _digest(path) != digest:
      return f"file {name} fails its checksum"
  return None


def _body(folder: Path) -> dict:
  """Returns the manifest without its digest, after checking the digest."""
  whole = strict_json.parse(NAME, (folder / NAME).read_bytes())
  body = whole.get("body")
  if whole.keys() != {"body", "blake2b"} or not isinstance(body, dict):
    raise ValueError("it is no manifest")
  if whole["blake2b"] != _text_digest(body):
    raise ValueError("it fails its checksum")
  if body.get("format") != _FORMAT:
    raise ValueError(f"it is of format {body.get('format')!r:.40}, this version reads {_FORMAT}")
  sizes = body.get("files")
  if not isinstance(body.get("facts"), dict) or not isinstance(sizes, dict):
    raise ValueError("it is no manifest")
  if any(not isinstance(pair, list) or len(pair) != 2 for pair in sizes.values()):
    raise ValueError("its files have no size and digest")
  return body


def _files(folder: Path, within: str) -> dict[str, Path]:
  """Returns all files within a folder but the manifest, by relative name, sorted.

  A link counts as a file: sealed folders have none, so it is reported as an added file.
  """
  inner = (folder / within).rglob("*")
  paths = {p.relative_to(folder).as_posix(): p for p in inner if not _is_folder(p)}
  return {name: path for name, path in sorted(paths.items()) if name != NAME}


def _is_folder(path: Path) -> bool:
  return path.is_dir() and not path.is_symlink()


def _digest(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, hashlib.blake2b).hexdigest()


def _text_digest(body: dict) -> str:
  return hashlib.blake2b(json.dumps(body, sort_keys=True).encode()).hexdigest()
