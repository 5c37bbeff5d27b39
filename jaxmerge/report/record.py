"""The record of a run: a plain tree of numbers and strings.

`report.json` is such a record. Accuracies are fractions; for other metrics `lower_is_better` says
which way to rank. `None` stands for a missing number.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any  # Any: a record is JSON.

import numpy as np

from jaxmerge.report import comparisons

_REQUIRED = ("tasks", "models", "rounds", "budget", "config", "versions")
# The JSON type of each section, and its name in errors.
_SECTIONS: dict[str, tuple[type | tuple[type, ...], str]] = {
  "title": (str, "a string"),
  "tasks": (list, "a list of names"),
  "families": (dict, "an object of names, one a task"),
  "seed": (int, "an integer"),
  "split": (str, "'validation' or 'test'"),
  "metric": (str, "a string, the name of the metric"),
  "lower_is_better": (bool, "true or false"),
  "models": (dict, "an object of models"),
  "gap_closed": (dict, "an object of numbers"),
  "budget": (dict, "an object of counters"),
  "rounds": (list, "a list of rounds"),
  "rounds_split": (str, "'validation' or 'test'"),
  "curves": (dict, "an object of lists of rounds"),
  "validation": (dict, "an object of numbers"),
  "methods": (dict, "an object of settings and costs"),
  "failed": (dict, "an object of reasons"),
  "rows": (dict, "an object of digests"),
  "differences": (list, "a list of differences"),
  "chance": (dict, "an object of numbers"),
  "transfer": (dict, "an object of objects"),
  "parameters": (int, "an integer"),
  "seconds": (dict, "an object of numbers"),
  "config": (dict, "an object"),
  "versions": (dict, "an object"),
  "notes": (list, "a list of strings"),
}


def plain(record: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the record as strict JSON: lists, objects with string keys, finite numbers.

  Arrays and NumPy scalars become lists and numbers. NaN and infinity, which are not JSON, become
  None, and a note in the record names the places.
  """
  lost: list[str] = []
  result = _plain(record, "", lost)
  if lost:
    where = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
    note = f"Not finite, recorded as null: {where}."
    result["notes"] = [*(result.get("notes") or []), note]
  return result


def _plain(x: Any, path: str, lost: list[str]) -> Any:
  if hasattr(x, "tolist"):
    x = x.tolist()
  if x is None or isinstance(x, bool | int | str):
    return x
  if isinstance(x, float):
    if not math.isfinite(x):
      lost.append(path)
      return None
    return x
  if isinstance(x, Mapping):
    keys = [str(k) for k in x]
    if len(set(keys)) < len(keys):
      raise ValueError(f"record: {path or 'the top level'} has two keys with one name: {keys}.")
    return {str(k): _plain(v, f"{path}.{k}" if path else str(k), lost) for k, v in x.items()}
  if isinstance(x, Sequence):
    return [_plain(v, f"{path}[{i}]", lost) for i, v in enumerate(x)]
  if isinstance(x, os.PathLike):
    return os.fspath(x)
  raise ValueError(
    f"record: {path} is a {type(x).__name__}; a record holds strings, numbers, lists and objects."
  )


def check(record: Mapping[str, Any]) -> None:
  """Raises ValueError, naming the key, for a record that the tables and plots cannot read."""
  if not isinstance(record, Mapping):
    raise ValueError(f"record: must be an object, got {type(record).__name__}.")
  for key in record:
    if key not in _SECTIONS:
      near = difflib.get_close_matches(str(key), _SECTIONS, n=1)
      hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_SECTIONS)}."
      raise ValueError(f"record: unknown key {key!r}; {hint}")
  missing = [key for key in _REQUIRED if key not in record]
  if missing:
    raise ValueError(f"record: the key {missing[0]!r} is missing; it must be there.")
  for key, value in record.items():
    kind, words = _SECTIONS[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
      raise ValueError(f"record: {key} must be {words}, got {value!r:.80}.")
  _check_head(record)
  tasks = record["tasks"]
  for name, model in record["models"].items():
    where = f"models.{name}"
    _object(model, where)
    _number(model, "mean", where)
    _per_task(model, "per_task", where, tasks)
    if "scale" in model:
      _number(model, "scale", where)
  for name, method in record.get("methods", {}).items():
    _object(method, f"methods.{name}")
    _object(method.get("settings"), f"methods.{name}.settings")
    if name not in record["models"]:
      raise ValueError(f"record: methods.{name} is none of the models.")
  _check_rounds(record["rounds"], "rounds", tasks)
  for name, curve in record.get("curves", {}).items():
    if not isinstance(curve, list):
      raise ValueError(f"record: curves.{name} must be a list of rounds, got {curve!r:.80}.")
    _check_rounds(curve, f"curves.{name}", tasks)
  _check_comparisons(record)


def _check_head(record: Mapping[str, Any]) -> None:
  tasks = record["tasks"]
  if not tasks or not all(isinstance(t, str) and t for t in tasks):
    raise ValueError(f"record: tasks must be a list of names, one at least, got {tasks!r:.80}.")
  if len(set(tasks)) < len(tasks):
    raise ValueError(f"record: tasks has a name twice: {tasks!r:.200}.")
  families = record.get("families", dict.fromkeys(tasks, ""))
  if families.keys() != set(tasks) or not all(isinstance(f, str) for f in families.values()):
    raise ValueError(f"record: families must name one for each of {tasks}, got {families!r:.200}.")
  for key in ("split", "rounds_split"):
    if record.get(key, "test") not in ("validation", "test"):
      raise ValueError(f"record: {key} must be 'validation' or 'test', got {record[key]!r}.")
  if not all(isinstance(note, str) for note in record.get("notes", [])):
    raise ValueError(f"record: notes must be a list of strings, got {record['notes']!r:.80}.")


def _check_rounds(rounds: list[Any], where: str, tasks: list[str]) -> None:
  last = -1
  for i, entry in enumerate(rounds):
    at = f"{where}[{i}]"
    _object(entry, at)
    k = entry.get("round")
    if not isinstance(k, int) or isinstance(k, bool) or k <= last:
      raise ValueError(f"record: {at}.round must be an integer above {last}, got {k!r}.")
    last = k
    _number(entry, "mean", at)
    for key in ("per_task", "loss", "norms"):
      if key in entry:
        _per_task(entry, key, at, tasks)
    for key in ("sign_conflict", "exchanges", "seconds"):
      if key in entry:
        _number(entry, key, at)
    if entry.get("cosines") is not None:
      _check_matrix(entry["cosines"], f"{at}.cosines", len(tasks))


def _check_matrix(rows: Any, where: str, size: int) -> None:
  shape = np.shape(np.asarray(rows, dtype=object))
  if shape != (size, size):
    raise ValueError(f"record: {where} must be {size} x {size}, one row a task; got {shape}.")
  for i in range(size):
    for j in range(size):
      _number({"x": rows[i][j]}, "x", f"{where}[{i}][{j}]")


def _check_comparisons(record: Mapping[str, Any]) -> None:
  tasks, models = record["tasks"], record["models"]
  for key in ("gap_closed", "validation"):
    for name in record.get(key, {}):
      _number(record[key], name, key)
  for name, value in comparisons.gap_closed(models).items():
    recorded = record.get("gap_closed", {}).get(name)
    # The page would contradict itself; half a point of the gap allows for rounded numbers.
    if recorded is not None and abs(recorded - value) > 5e-3:
      raise ValueError(
        f"record: gap_closed.{name} is {recorded}, but (mean - base) / (experts - base) is {value}."
      )
  if "chance" in record:
    _per_task(record, "chance", "", tasks)
  for name, row in record.get("transfer", {}).items():
    if name not in tasks:
      raise ValueError(f"record: transfer.{name} is none of the tasks {tasks}.")
    _per_task(record["transfer"], name, "transfer", tasks)
    _object(row, f"transfer.{name}")
  for name, counters in record["budget"].items():
    _object(counters, f"budget.{name}")
    for key in counters:
      _number(counters, key, f"budget.{name}")
  for key in record.get("seconds", {}):
    _number(record["seconds"], key, "seconds")
  for i, entry in enumerate(record.get("differences", [])):
    _object(entry, f"differences[{i}]")
    for key in ("a", "b"):
      if entry.get(key) not in models:
        raise ValueError(f"record: differences[{i}].{key} is no model: {entry.get(key)!r}.")
    for key in ("mean", "low", "high"):
      _number(entry, key, f"differences[{i}]")


def _object(x: Any, where: str) -> None:
  if not isinstance(x, Mapping):
    raise ValueError(f"record: {where} must be an object, got {x!r:.80}.")


def _number(parent: Mapping[str, Any], key: str, where: str) -> None:
  name = f"{where}.{key}" if where else key
  if key not in parent:
    raise ValueError(f"record: {name} is missing; write a number, or null where there is none.")
  x = parent[key]
  if x is None:
    return
  if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
    raise ValueError(f"record: {name} must be a finite number or null, got {x!r:.80}.")


def _per_task(parent: Mapping[str, Any], key: str, where: str, tasks: list[str]) -> None:
  name = f"{where}.{key}" if where else key
  if key not in parent:
    raise ValueError(f"record: {name} is missing; it needs a number for each task.")
  _object(parent[key], name)
  for task in tasks:
    _number(parent[key], task, name)
  for task in parent[key]:
    if task not in tasks:
      raise ValueError(f"record: {name}.{task} is none of the tasks {tasks}.")


def merge_seeds(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns mean and spread over seeds of every model.

  The spread is the sample standard deviation (divided by n - 1); None for a single seed.

  Returns:
    `{"tasks", "seeds", "split", "metric", "models": {NAME: {"mean": s, "gap_closed": s,
    "per_task": {task: s}}}}`, where s is `{"mean", "spread", "values"}` with a value per seed. With
    families also `"families"`, and "family_mean": s of every model; where the records have
    validation means, also `"validation": {NAME: s}`.
  """
  if not records:
    raise ValueError("records: at least one is needed, got none.")
  for x in records:
    check(x)
  first = records[0]
  numbers = [x.get("seed") for x in records]
  if len(set(numbers)) < len(numbers):
    raise ValueError(f"records: seeds must differ between records, got {numbers}.")
  for x in records[1:]:
    for key, value, other in (
      ("tasks", first["tasks"], x["tasks"]),
      ("families", first.get("families"), x.get("families")),
      ("models", sorted(first["models"]), sorted(x["models"])),
      ("split", first.get("split"), x.get("split")),
      ("metric", first.get("metric"), x.get("metric")),
      ("lower_is_better", first.get("lower_is_better"), x.get("lower_is_better")),
    ):
      if value != other:
        raise ValueError(
          f"records: {key} of seed {x.get('seed')} differ from seed {first.get('seed')}: "
          f"{other} and {value}."
        )
  gaps = [comparisons.gap_closed(x["models"]) for x in records]
  models = {}
  for name in first["models"]:
    runs = [x["models"][name] for x in records]
    models[name] = {
      "mean": _spread([m["mean"] for m in runs]),
      "gap_closed": _spread([g.get(name) for g in gaps]),
      "per_task": {t: _spread([m["per_task"][t] for m in runs]) for t in first["tasks"]},
    }
    if families := first.get("families"):
      means = [comparisons.family_mean(m["per_task"], families) for m in runs]
      models[name]["family_mean"] = _spread(means)
  keys = ("split", "metric", "lower_is_better", "families")
  shared = {key: first[key] for key in keys if key in first}
  if all("validation" in x for x in records):
    seen = {n: [x["validation"].get(n) for x in records] for n in first["validation"]}
    shared["validation"] = {n: _spread(values) for n, values in seen.items()}
  return {"tasks": list(first["tasks"]), "seeds": numbers, "models": models, **shared}


def _spread(values: list[float | None]) -> dict[str, Any]:
  """Returns mean and sample standard deviation; None where a seed has no number."""
  known = [v for v in values if v is not None]
  whole = len(known) == len(values)
  return {
    "mean": float(np.mean(known)) if whole else None,
    "spread": float(np.std(known, ddof=1)) if whole and len(known) > 1 else None,
    "values": values,
  }
