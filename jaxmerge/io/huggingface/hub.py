"""Locates models of the hub in the local cache; uses no network without `download`."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxmerge.io.huggingface import folder, pipeline
from jaxmerge.io.peft import adapter

# Only these files, and the weights that the index names, are downloaded: no pickles, no code.
SMALL = (*folder.COPIED, folder.INDEX, adapter.CONFIG, pipeline.INDEX)

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"\w[\w./-]*", re.ASCII)


class Location(NamedTuple):
  """The place of a model on disk.

  Attributes:
    folder: its folder.
    commit: commit of the hub's repository; None: not a model of the hub.
    home: machine-independent name of the folder in records: `id@commit`.
  """

  folder: pathlib.Path
  commit: str | None = None
  home: str | None = None


def is_id(path: str, revision: str | None = None) -> bool:
  """Returns whether a path is meant as the id of a model of the hub, `owner/name`.

  A folder is no id, and neither is a path below an existing folder, which is more likely misspelt.
  With a revision, the latter is an id, and the owner is optional.

  >>> is_id("org/model"), is_id("./org/model"), is_id("gpt2"), is_id("gpt2", "main")
  (True, False, False, True)
  """
  if os.path.isdir(path) or ".." in path or not _ID.fullmatch(path):
    return False
  return revision is not None or ("/" in path and not os.path.exists(path.split("/")[0]))


def split(reference: str | os.PathLike[str]) -> tuple[str, str | None]:
  """Returns path and revision of `path@revision`; does not split a folder or a `Path`.

  >>> split("org/model@main"), split("org/model"), split(pathlib.Path("org/model@main"))
  (('org/model', 'main'), ('org/model', None), ('./org/model@main', None))
  """
  if not isinstance(reference, str):
    path = os.fspath(reference)
    return path if os.path.isabs(path) else os.path.join(os.curdir, path), None
  if os.path.isdir(reference):
    return reference, None
  path, at, revision = reference.partition("@")
  return (path, revision) if at and is_id(path, revision) else (reference, None)


def join(path: str, revision: str | None) -> str:
  """Returns `path@revision`, as recipes write it."""
  return path if revision is None else f"{path}@{revision}"


def locate(
  path: str, revision: str | None = None, *, download: bool = False, weights: bool = True
) -> Location:
  """Returns the location of a model or an adapter: the folder itself, or the snapshot of an id.

  Without `download` no network is used: a snapshot that is not in the hub's cache is an error.

  Args:
    path: a folder, or an id of the hub. Any other path is returned as is.
    revision: a branch, a tag or a commit of the hub's repository; None: its main branch.
    download: whether missing files are downloaded: safetensors, config, tokenizer.
    weights: whether weights are needed, beside the small files.

  Raises:
    ValueError: for a revision of a path that is not on the hub.
    FileNotFoundError: if it is not in the cache, or cannot be downloaded; says what to do.
  """
  if is_id(path, revision):
    return _snapshot(path, revision, download, weights)
  owner, slash, _ = path.partition("/")
  if revision is None and slash and not os.path.exists(path) and is_id(path, "main"):
    hint = f"for a model of the hub, write {path}@main, as {owner} is a folder here"
    raise FileNotFoundError(f"{path}: no such folder; {hint}.")
  is_run = "://" in path or (os.path.isdir(path) and not folder.is_usual(path))
  if is_run and revision is not None and re.fullmatch(r"[0-9]+(:.+)?", revision):
    return Location(pathlib.Path(join(path, revision)))  # A step of checkpoints.
  if revision is not None:
    what = "a folder here" if os.path.isdir(path) else "no id of the hub (owner/name)"
    raise ValueError(f"{path} is {what} and has no revision: remove {revision!r}.")
  return Location(pathlib.Path(path))


class Finder:
  """Locates models, and collects the commits of those from the hub.

  Attributes:
    commits: commits of the models of the hub, by reference.
  """

  def __init__(self, *, download: bool = False):
    self.commits: dict[str, str] = {}
    self._download = download

  def __call__(self, path: str, revision: str | None = None, *, weights: bool = True) -> Location:
    """Returns the location of a model or an adapter; see `locate`."""
    location = locate(path, revision, download=self._download, weights=weights)
    if location.commit is not None:
      self.commits[join(path, revision)] = location.commit
    return location

  @property
  def facts(self) -> dict[str, dict[str, str]]:
    """Returns facts of the hub for the provenance; empty if no model came from there."""
    return {"hub": self.commits} if self.commits else {}


def _snapshot(name: str, revision: str | None, download: bool, weights: bool) -> Location:
  reference = join(name, revision)
  if revision is not None and (".." in revision or not _REVISION.fullmatch(revision)):
    raise ValueError(f"{reference}: the revision must be a branch, a tag or a commit.")
  try:
    import huggingface_hub
    from huggingface_hub import errors
  except ModuleNotFoundError as error:
    what = f"{reference}: no such folder; models of the hub need an extra"
    raise FileNotFoundError(f"{what}: pip install 'jaxmerge[hub]'.") from error

  def fetch(commit: str | None, names: Sequence[str]) -> pathlib.Path:
    path = huggingface_hub.snapshot_download(
      name, revision=commit, allow_patterns=list(names), local_files_only=not download
    )
    return pathlib.Path(path)

  missing = (
    f"{reference}: no such folder, and not, or only in part, in the hub's cache; --download, or "
    "download=True in Python, downloads it."
  )
  try:
    home = fetch(revision, SMALL)
    is_pipeline = pipeline.is_pipeline(home)
    if is_pipeline:
      fetch(home.name, [*pipeline.COPIED, *(f"*/{name}" for name in pipeline.COPIED)])
    if weights:
      fetch(home.name, _weights(home))
    if weights and is_pipeline and not any(home.glob("*/*.safetensors")):
      fetch(home.name, ["*/*.safetensors"])  # All its weight files are variants.
  except (OSError, errors.HTTPError) as error:
    reason = " ".join(str(error).split())
    why = f"{reference}: no such folder, and the download from the hub failed: {reason}"
    raise FileNotFoundError(why if download else missing) from error
  try:
    if weights:
      _check_weights(home)
  except FileNotFoundError as error:
    why = f"{reference}: the hub has no safetensors for it, and pickles are not read: {error}"
    raise FileNotFoundError(why if download else missing) from error
  return Location(home, home.name, f"{name}@{home.name}")


def _check_weights(home: pathlib.Path) -> None:
  """Raises FileNotFoundError if weights are missing."""
  if adapter.is_adapter(home):
    adapter.paths(home)
  elif pipeline.is_pipeline(home):
    pipeline.parts(home)
  else:
    folder.weights(home)


def _weights(home: pathlib.Path) -> list[str]:
  """Returns names of weight files, from the index if there is one."""
  if pipeline.is_pipeline(home):
    return [f"*/{stem}{end}.safetensors" for stem in pipeline.STEMS for end in ("", "-*-of-*")]
  index = folder.read_json(home / folder.INDEX) if (home / folder.INDEX).is_file() else {}
  shards = index.get("weight_map")
  named = set(shards.values()) if isinstance(shards, dict) else set()
  names = {n for n in named if isinstance(n, str) and n.endswith(".safetensors")}
  return sorted({folder.WEIGHTS, f"{folder.MODULE}/{folder.WEIGHTS}", adapter.WEIGHTS, *names})
