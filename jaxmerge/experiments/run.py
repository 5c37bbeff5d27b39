"""From a config to a run: base, experts, one-shot merges, joint training, ATM, and the report."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any  # Any: configs and records are plain trees.

from jaxmerge.experiments import events, identity, phases, results, schema, setup
from jaxmerge.experiments import workdir as workdirs
from jaxmerge.io.disk import shared
from jaxmerge.parallel import processes
from jaxmerge.training.budget import Budget


def run(
  config: Any,
  workdir: str | pathlib.Path,
  *,
  resume: str = "auto",
  progress: Callable[[events.Event], None] = lambda event: None,
  stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
  """Runs the experiment of a config, and leaves report, checkpoints and models in `workdir`.

  Args:
    config: an ml_collections ConfigDict, as in `configs/`.
    workdir: the folder: it is created, or an interrupted run in it goes on.
    resume: "auto" goes on with a run of the same config, "never" wants an empty folder, "must"
      wants a run to go on with.
    progress: called with events: {"phase", "done", "total", "unit", "numbers"} or {"message"}.
    stop: asked after each round, or part of another phase, whether to stop there.

  Returns:
    The record that `report.json` holds. Of many processes the first one writes, alone.

  Raises:
    Stopped: where `stop` said yes; rounds are saved, a phase that is not done will start anew.
    ValueError: if the folder holds a run of another config, or of a user's experiment whose code or
      rows have changed, or another run is at work in it.
  """
  folder, plain = (
    pathlib.Path(workdir),
    json.loads(schema.fill(config, schema.Experiment).to_json()),
  )
  with workdirs.hold(folder, plain, resume):
    shared.check(folder)
    if record := workdirs.read_finished(folder, plain):
      return record
    ready = setup.prepare(plain, folder, events.Events(progress, stop))
    identity.check(folder, plain["experiment"], ready.problem)
    if processes.is_first():
      workdirs.claim(folder, plain)
      identity.write(folder, plain["experiment"], ready.problem)
    return compare(ready)


def compare(ready: setup.Setup) -> dict[str, Any]:
  """Runs all phases, compares their models, and returns the record of the run."""
  experts = phases.tune_experts(ready)
  models = {"base": phases.Model(ready.params, Budget())}
  models |= phases.merge_once(ready, experts["experts"])
  models |= phases.train_jointly(ready)
  models |= phases.tune_and_merge(ready, models)
  return results.write(ready, models, experts)
