"""The identity of a run in its checkpoints: records of method and tasks."""

from __future__ import annotations

import importlib.metadata
import platform
import zlib
from collections.abc import Mapping, Sequence
from typing import Any  # Any: parameters are the user's tree, records are plain JSON.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.core import fingerprint, stage, tree
from jaxmerge.core.stage import Method
from jaxmerge.tasks.task import Task


def method_record(method: Method, hparams: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the names of a method's stages, and its hyperparameters with their defaults."""
  values = {n: hparams.get(n, v) for n, v in stage.hparams(method).items()}
  return {"stages": fingerprint.stages(method)} | {n: _digest(v) for n, v in values.items()}


def task_digest(task: Task) -> str:
  """Returns the number of training rows, and a checksum of training and validation rows."""
  checksum = 0
  for leaf in jax.tree.leaves((task.train, task.validation)):
    checksum = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), checksum)
  return f"{len(task.train.labels)} rows, crc32 {checksum:08x}"


def functions_record(**functions: Any) -> dict[str, str]:
  """Returns a digest of each function that has one, and the versions it holds for."""
  digests = {n: fingerprint.stable_fingerprint(f) for n, f in functions.items()}
  versions = (
    f"Python {platform.python_version()}, jaxmerge {importlib.metadata.version('jaxmerge')}"
  )
  return {"versions": versions} | {n: d for n, d in digests.items() if d is not None}


def refuse_other_functions(theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
  """Raises ValueError for functions whose code differs, if both digests are of the same versions.

  Checkpoints of before have no digests.
  """
  if theirs.get("versions") != ours["versions"]:
    return
  for name in sorted(theirs.keys() & ours.keys()):
    if theirs[name] != ours[name]:
      raise ValueError(
        f"the checkpoints belong to another run: {name} has other code, or uses other values, "
        "there than here; undo the change, or use another folder."
      )


def refuse_other_heads(theirs: Any, ours: Any, tasks: Sequence[Task]) -> None:
  """Raises ValueError, naming the task, if a head differs by more than rounding explains."""
  for task, one, other in zip(tasks, np.asarray(theirs), np.asarray(ours), strict=False):
    size = max(float(np.abs(one).max(initial=0)), 1e-30)
    if one.shape != other.shape or float(np.abs(one - other).max(initial=0)) > 1e-3 * size:
      raise ValueError(
        f"the checkpoints belong to another run: the head of task {task.name!r} differs; use the "
        "same head, or another folder."
      )


def refuse_other(part: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
  """Raises ValueError, naming the first difference, if a checkpoint's record is another run's."""
  for name in sorted(theirs.keys() | ours.keys()):
    if theirs.get(name) != ours.get(name):
      raise ValueError(
        f"the checkpoints belong to another run: {part} {name!r} is {theirs.get(name)!r} there and "
        f"{ours.get(name)!r} here; use the same value, or another folder."
      )


def refuse_other_start(theirs: Any, ours: Any) -> None:
  """Raises ValueError if the start differs by more than rounding on another mesh explains."""
  leaves = tree.named(ours)
  for name, x in tree.named(theirs).items():
    distance, size = (float(jnp.abs(v).max(initial=0)) for v in (x - leaves[name], x))
    if distance > 1e-3 * max(size, 1e-30):
      raise ValueError(
        f"the checkpoints belong to another run: leaf {name!r} of the initial model differs; start "
        "from the same model, or use another folder."
      )


def _digest(value: Any) -> Any:
  """Returns small arrays as lists, large ones as a checksum."""
  arrays = [np.asarray(x) for x in jax.tree.leaves(value)]
  if sum(x.size for x in arrays) <= 64:
    return [x.tolist() for x in arrays]
  return f"crc32 {zlib.crc32(b''.join(x.tobytes() for x in arrays)):08x}"
