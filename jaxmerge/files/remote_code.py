"""References remote code that a result's configs name; it is never copied or run."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any  # Any: JSON.

from jaxmerge.files.plan import Model, Plan
from jaxmerge.io.huggingface import folder

_MAP, _PIPELINES = "auto_map", "custom_pipelines"
_FILES = tuple(name for name in folder.COPIED if name.endswith("config.json") and "/" not in name)


def refer_to_code(plan: Plan, models: Sequence[Model]) -> Plan:
  """Returns a plan whose result references the code of its classes.

  For a hub model this is `owner/name--file.Class`, which transformers resolves. For a folder it is
  a note on which files to copy.

  Args:
    plan: the plan.
    models: all inputs, the donor first.
  """
  texts, missing = dict(plan.texts), dict[str, list[str]]()
  for name in _FILES:
    content = _content(plan.donor, name, plan.texts)
    references = list(_references(content))
    if not references:
      continue
    owner = next((m for m in models if _same(content, _content(m.folder, name, m.texts))), None)
    if owner is not None and owner.home is not None:
      hub = owner.home.split("@")[0]
      texts[name] = json.dumps(_map(content, lambda name: f"{hub}--{name}"), indent=2) + "\n"
    else:
      where = "" if owner is None else str(owner.folder)
      missing.setdefault(where, []).extend(f"{name.split('.')[0]}.py" for name in references)
  if modules := list(_modules(plan.donor)):
    missing.setdefault(str(plan.donor), []).extend(modules)
  notes = [_note(where, dict.fromkeys(names)) for where, names in missing.items()]
  return plan._replace(texts=texts, notes=(*plan.notes, *notes)) if texts or notes else plan


def _note(where: str, names: Mapping[str, None]) -> str:
  lies = [n for n in names if where and (pathlib.Path(where) / n).is_file()]
  origin = f"from {where}" if len(lies) == len(names) else "from where the model was published"
  return (
    f"the result names code that is not copied, {', '.join(names)}: to open it with "
    f"trust_remote_code, copy this, and what it imports, {origin} into it."
  )


def _content(
  path: pathlib.Path, name: str, texts: Mapping[str, str | bytes | None]
) -> dict[str, Any]:
  """Returns the JSON object of a small file of a model; empty without the file."""
  if name in texts:
    return json.loads(texts[name] or "{}")
  return folder.read_json(path / name) if (path / name).is_file() else {}


def _modules(donor: pathlib.Path) -> Iterator[str]:
  """Yields the files of custom classes of a model's sentence-transformers modules."""
  path = donor / folder.MODULES
  try:
    listed = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
  except ValueError as error:
    raise ValueError(f"{path}: not JSON: {error}.") from error
  for each in listed if isinstance(listed, list) else ():
    kind = each.get("type") if isinstance(each, dict) else None
    if isinstance(kind, str) and kind.split(".")[0] not in ("sentence_transformers", "torch"):
      yield f"{kind.rpartition('.')[0].replace('.', '/')}.py"


def _same(content: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
  return set(_references(content)) <= set(_references(other))


def _references(content: Mapping[str, Any]) -> Iterator[str]:
  """Yields class names without the location of their code."""
  names: list[str] = []

  def collect(name: str) -> str:
    names.append(name)
    return name

  _map(content, collect)
  yield from names


def _map(content: Any, change: Callable[[str], str], inside: str = "") -> Any:
  """Returns JSON with such class names replaced."""
  if isinstance(content, Mapping):
    return {
      key: _map(value, change, key if key in (_MAP, _PIPELINES) else inside)
      if key != "impl" or inside != _PIPELINES
      else _map(value, change, _MAP)
      for key, value in content.items()
    }
  if isinstance(content, list):
    return [_map(value, change, inside) for value in content]
  named = inside == _MAP and isinstance(content, str) and "." in content and "--" not in content
  return change(content) if named else content
