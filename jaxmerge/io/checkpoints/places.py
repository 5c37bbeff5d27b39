"""Lists and reads folders of checkpoints, on a local disk or at a URL such as `gs://`.

URLs are read by TensorStore, which Orbax also uses for its arrays.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any, NamedTuple  # Any: specs of TensorStore.

from jaxmerge.io.disk import strict_json

STORES = "checkpoints"  # Where trainers keep steps in the folder of a run, and jaxmerge its stores.
UNFINISHED = ".orbax-checkpoint-tmp"  # Part of the names of Orbax's unfinished saves.
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/(?!/)|[a-z][a-z0-9+.-]+://")


class Place(NamedTuple):
  """A folder.

  Attributes:
    text: its path or URL, without a slash at the end.
  """

  text: str

  @property
  def is_remote(self) -> bool:
    """Returns whether it is a URL."""
    return _URL.match(self.text) is not None

  @property
  def path(self) -> pathlib.Path:
    """Returns it as a path; for a URL, this is a name that does not exist on disk."""
    return pathlib.Path(self.text)

  @property
  def name(self) -> str:
    """Returns the last part of its path."""
    return self.text.rpartition("/")[2]

  def __truediv__(self, inner: str) -> Place:
    """Returns a folder in it; itself for an empty path."""
    return Place(f"{self.text}/{inner}") if inner else self

  def names(self) -> list[str]:
    """Returns the sorted names of its files and folders; an empty list if it does not exist."""
    if not self.is_remote:
      return sorted(os.listdir(self.text)) if os.path.isdir(self.text) else []
    keys = (key.decode() for key in self._store().list().result())
    return sorted({key.partition("/")[0] for key in keys})

  def read(self, name: str) -> bytes | None:
    """Returns the content of a file in it; None if there is no such file."""
    if not self.is_remote:
      path = self.path / name
      return path.read_bytes() if path.is_file() else None
    entry = self._store().read(name).result()
    return entry.value if entry.state == "value" else None

  def kvstore(self, inner: str = "") -> Any:
    """Returns the spec of a key-value store of TensorStore at a path in it.

    >>> Place("gs://bucket/run").kvstore("10/default")
    'gs://bucket/run/10/default/'
    """
    inner = f"{inner}/" if inner else ""
    if self.is_remote:
      return f"{self.text}/{inner}"
    return {"driver": "file", "path": f"{self.path.resolve()}/{inner}"}

  def _store(self) -> Any:
    import tensorstore  # Late: plans, help and errors do without.

    return tensorstore.KvStore.open(self.kvstore()).result()


def place(text: str | os.PathLike[str]) -> Place:
  """Returns the place of a path or URL; restores a URL whose slashes `Path` has merged.

  >>> place(pathlib.Path("gs://bucket/run")), place("runs/a/")
  (Place(text='gs://bucket/run'), Place(text='runs/a'))
  """
  text = os.fspath(text)
  if match := re.match(r"([a-z][a-z0-9+.-]+):/+(?=[^/])", text):
    scheme, rest = match[1], text[match.end() :]
    return Place(f"{scheme}://{'/' if scheme == 'file' else ''}{rest.rstrip('/')}")
  return Place(str(pathlib.Path(text)))


def json_of(folder: Place, name: str) -> dict[str, Any] | None:
  """Returns the object in a JSON file of a folder; None if there is no such file.

  Raises:
    ValueError: naming the file, if it is damaged.
  """
  content = folder.read(name)
  if content is None:
    return None
  return strict_json.parse(f"{folder.text}/{name}", content)
