"""The identity of a user's code in the workdir of a run: digests of functions and rows.

A config names an experiment, and may name optimisers and a method of the user's. Their code may
change between a run and its resumption. Built-in
experiments change only with jaxmerge's version and have no such record. The digest of a function
covers its closure and the functions that it calls by a global name, not functions reached through
another module (`module.function`).
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

from jaxmerge.core import fingerprint
from jaxmerge.experiments import registry
from jaxmerge.experiments.problem import Problem
from jaxmerge.io.disk import atomic
from jaxmerge.io.huggingface import folder as folders
from jaxmerge.training import identity


def describe(problem: Problem) -> dict[str, str]:
  """Returns digests of a problem's functions and rows, by name.

  A function without a reproducible digest, such as one that holds an open file, is left out.
  """
  functions = {"apply": problem.apply, "loss": problem.loss, "metric": problem.metric}
  digests = {n: fingerprint.stable_fingerprint(f) for n, f in functions.items()}
  rows = {f"task {t.name!r}": identity.task_digest(t) for t in problem.tasks}
  return {n: d for n, d in digests.items() if d is not None} | rows


def check(
  workdir: pathlib.Path, name: str, problem: Problem, functions: Mapping[str, str] = {}
) -> None:
  """Raises ValueError if a resumed run's experiment has changed.

  Args:
    workdir: the folder of the run.
    name: the experiment's name in the config.
    problem: the experiment as it is now.
    functions: digests of the optimisers and methods that the config names as functions.

  Raises:
    ValueError: naming what has changed.
  """
  path = workdir / "experiment.json"
  if not path.exists():
    return
  recorded, current = folders.read_json(path), _record(name, problem, functions)
  changed = [
    n for n in sorted(recorded.keys() | current.keys()) if recorded.get(n) != current.get(n)
  ]
  if changed:
    raise ValueError(
      f"{workdir} holds a run of {name!r} from before a change of its {', '.join(changed)}: "
      "its checkpoints belong to the old code or data. Choose another workdir, or undo the change "
      "to resume."
    )


def write(
  workdir: pathlib.Path, name: str, problem: Problem, functions: Mapping[str, str] = {}
) -> None:
  """Writes the digests of a user's experiment, and of functions, into the folder of its run."""
  if record := _record(name, problem, functions):
    with atomic.write(workdir / "experiment.json") as file:
      file.write((json.dumps(record, indent=2, sort_keys=True) + "\n").encode())


def _record(name: str, problem: Problem, functions: Mapping[str, str]) -> dict[str, str]:
  """Returns all digests of a run; those of a built-in experiment are left out."""
  return ({} if name in registry.ALIASES else describe(problem)) | dict(functions)
