"""The folder of a run: its lock, its config, and the plain files in it.

A finished run is shown without importing jax.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import pathlib
import platform
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any  # Any: configs and records are plain trees.

import numpy as np

from jaxmerge.experiments import config
from jaxmerge.io.disk import atomic, locks
from jaxmerge.io.huggingface import folder
from jaxmerge.report import record as records

_RUN = "run"  # The lock lies inside the folder, which may be a mount point.


@contextlib.contextmanager
def hold(
  workdir: pathlib.Path, config: Mapping[str, Any], resume: str, free: tuple[str, ...] = ()
) -> Iterator[None]:
  """Locks a folder for one run until the block ends, and creates it if needed.

  All processes of a run call it at the same point: the first one locks it for all.

  Args:
    workdir: the folder.
    config: as for `check`, which runs once the folder is locked.
    resume: likewise.
    free: likewise.

  Raises:
    ValueError: in all processes, where another run is using the folder, or has left results in it.
  """
  from jaxmerge.parallel import processes

  if not workdir.exists():
    check(workdir, config, resume, free)  # Fail before creating anything.
  with contextlib.ExitStack() as stack:
    failure: OSError | ValueError | None = None
    if processes.is_first():
      try:
        workdir.resolve().mkdir(parents=True, exist_ok=True)
        stack.enter_context(locks.hold(workdir / _RUN, _busy(workdir), patience=0.0))
      except (
        OSError,
        ValueError,
      ) as error:  # The other processes must learn of the failure, or they hang.
        failure = error
    if processes.agree(failure is not None):
      raise failure or ValueError(f"{workdir}: process 0 could not lock this folder.")
    _check(workdir, config, resume, free)
    yield


def check(
  workdir: pathlib.Path, config: Mapping[str, Any], resume: str, free: tuple[str, ...] = ()
) -> None:
  """Raises ValueError if the folder belongs to another run; writes nothing.

  The mesh is not part of a run's identity: it may resume on other devices or processes.

  Args:
    workdir: the folder, which need not exist.
    config: the plain config of the run.
    resume: "auto" resumes a run of the same config, "never" requires a folder without a run,
      "must" one with a run.
    free: prefixes of keys that may differ.

  Raises:
    ValueError: naming the first differences, if the folder holds a run of another config; naming
      its config.json, if that is damaged; or if another run is using the folder.
  """
  try:
    _check(workdir, config, resume, free)
  except ValueError:
    if workdir.is_dir():  # An active run may not have written its config yet.
      locks.check(workdir / _RUN, _busy(workdir))
    raise


def _busy(workdir: pathlib.Path) -> str:
  return (
    f"{workdir}: another run is using this folder; wait until it ends, or choose another workdir."
  )


def _check(
  workdir: pathlib.Path, config: Mapping[str, Any], resume: str, free: tuple[str, ...]
) -> None:
  path = workdir / "config.json"
  if not path.exists():
    if resume == "must":
      raise ValueError(f"{workdir} holds no run to resume: there is no {path.name} in it.")
    if workdir.exists() and not all(map(_is_temporary, workdir.iterdir())):
      raise ValueError(f"{workdir} is not empty and holds no run; choose another workdir.")
    return
  if resume == "never":
    raise ValueError(f"{workdir} holds a run already; choose another workdir, or --resume=auto.")
  differ = _differences(read_config(workdir), config, free)
  if differ:
    more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
    raise ValueError(
      f"{workdir} holds a run of another config: {'; '.join(differ[:5])}{more}. Choose another "
      "workdir, or give the same config to resume."
    )


def _differences(
  there: Mapping[str, Any], here: Mapping[str, Any], free: tuple[str, ...] = ()
) -> list[str]:
  """Returns the differences of two configs, except in mesh, tracker and keys in `free`."""
  theirs, ours = config.flat(there), config.flat(here)
  return [
    f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here"
    for key in sorted(theirs.keys() | ours.keys())
    if theirs.get(key) != ours.get(key) and not key.startswith(("mesh.", "tracker", *free))
  ]


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """Reads the config of the run in a folder; ValueError, naming the file, if it is damaged."""
  path = workdir / "config.json"
  try:
    return folder.read_json(path)
  except ValueError as error:
    raise ValueError(f"{error} Restore it, or choose another workdir.") from error


def read_record(workdir: pathlib.Path) -> dict[str, Any]:
  """Reads the record of a finished run; ValueError, naming the file, if missing or damaged."""
  path = workdir / "report.json"
  if not path.is_file():
    raise ValueError(f"there is no {path}: the run has not finished, or this is no workdir.")
  again = "Remove it, and `jaxmerge atm` writes it again from the checkpoints."
  try:
    record = folder.read_json(path)
  except ValueError as error:
    raise ValueError(f"{error} {again}") from error
  try:
    records.check(record)
  except ValueError as error:
    raise ValueError(f"{path}: {error} {again}") from error
  return record


def read_finished(workdir: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns the record of a finished run whose files are all present, else None.

  Raises:
    ValueError: naming `report.json`, where it is damaged.
  """
  left = ["report.json", "report.html", "metrics.jsonl", "rows.npz", "merged"]
  left += ["experts"] * bool(config["keep_experts"])
  if not all((workdir / name).exists() for name in left):
    return None
  record = read_record(workdir)
  return None if _differences(record["config"], config) else record


def claim(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Writes the config.json of a run into its locked folder."""
  atomic.tidy(workdir)
  with atomic.write(workdir / "config.json") as file:
    file.write((json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _is_temporary(path: pathlib.Path) -> bool:
  """Returns whether a file is a lock, or an unfinished file of a killed process."""
  return path.name.startswith(locks.path_of(path.with_name(_RUN)).name) or atomic.is_unfinished(
    path
  )


def write_metrics(workdir: pathlib.Path, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
  """Writes metrics.jsonl: a line per round of every ATM run."""
  lines = [json.dumps({"run": n, **r}, sort_keys=True) for n, c in curves.items() for r in c]
  with atomic.write(workdir / "metrics.jsonl") as file:
    file.write("".join(f"{line}\n" for line in lines).encode())


def write_rows(workdir: pathlib.Path, scores: Mapping[str, Mapping[str, np.ndarray]]) -> None:
  """Writes rows.npz: the score of each row, by MODEL/TASK."""
  flat = {
    f"{model}/{task}": rows for model, tasks in scores.items() for task, rows in tasks.items()
  }
  with atomic.write(workdir / "rows.npz") as file:
    np.savez_compressed(file, allow_pickle=False, **flat)


def read_rows(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the scores of rows of a run as MODEL/TASK; empty where it has no rows.npz."""
  path = workdir / "rows.npz"
  if not path.is_file():
    return {}
  try:
    with np.load(path, allow_pickle=False) as file:
      return {name: file[name] for name in file.files}
  except (ValueError, OSError, zipfile.BadZipFile) as error:
    raise ValueError(
      f"{path} is damaged: {error}. Remove it, and the run writes it again."
    ) from error


def versions() -> dict[str, str]:
  """Returns the versions of the packages that affect results, and the devices."""
  import jax

  packages = ("jaxmerge", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  numbers = {p: importlib.metadata.version(p) for p in packages}
  devices = jax.devices()
  return numbers | {
    "python": platform.python_version(),
    "devices": f"{len(devices)} x {devices[0].device_kind}",
  }
