"""The identity of a user's experiment in its workdir: digests of its functions and of its rows.

A config names an experiment, and its code may change between a run and its resumption. Built-in
experiments change with the version of jaxmerge alone, and have no such record. Functions count with
what they close over and the functions that they call by a global name, not with those that they
reach through another module (`module.function`).
"""

from __future__ import annotations

import json
import pathlib

from jaxmerge.core import fingerprint
from jaxmerge.experiments import registry
from jaxmerge.experiments.problem import Problem
from jaxmerge.io.disk import atomic
from jaxmerge.io.huggingface import folder as folders
from jaxmerge.training import identity


def describe(problem: Problem) -> dict[str, str]:
  """Returns the digests of what a problem computes with, by name.

  A function that holds what no other process would know again, such as an open file, has none.
  """
  functions = {"apply": problem.apply, "loss": problem.loss, "metric": problem.metric}
  digests = {n: fingerprint.stable_fingerprint(f) for n, f in functions.items()}
  rows = {f"task {t.name!r}": identity.task_digest(t) for t in problem.tasks}
  return {n: d for n, d in digests.items() if d is not None} | rows


def check(workdir: pathlib.Path, name: str, problem: Problem) -> None:
  """Refuses to resume a run whose experiment is another one now; a new run passes.

  Args:
    workdir: the folder of the run.
    name: the experiment's name in the config.
    problem: what it makes now.

  Raises:
    ValueError: naming what has changed.
  """
  path = workdir / "experiment.json"
  if name in registry.ALIASES or not path.exists():
    return
  recorded, current = folders.read_json(path), describe(problem)
  changed = [
    n for n in sorted(recorded.keys() | current.keys()) if recorded.get(n) != current.get(n)
  ]
  if changed:
    raise ValueError(
      f"{workdir} holds a run of {name!r} as it was before a change of its {', '.join(changed)}: "
      "what is saved there belongs to the old code or data. Choose another workdir, or take the "
      "change back to resume."
    )


def write(workdir: pathlib.Path, name: str, problem: Problem) -> None:
  """Writes the digests of a user's experiment into the folder of its run."""
  if name not in registry.ALIASES:
    with atomic.write(workdir / "experiment.json") as file:
      file.write((json.dumps(describe(problem), indent=2, sort_keys=True) + "\n").encode())
