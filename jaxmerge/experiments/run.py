"""Runs an experiment: base, experts, one-shot merges, joint training, ATM, report."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable
from typing import Any  # Any: configs and records are plain trees.

from jaxmerge.experiments import config as configs
from jaxmerge.experiments import events, identity, phases, results, schema, setup, user_functions
from jaxmerge.experiments import workdir as workdirs
from jaxmerge.io.disk import shared
from jaxmerge.parallel import processes
from jaxmerge.training import trackers
from jaxmerge.training.budget import Budget


def run(
  config: Any,
  workdir: str | pathlib.Path,
  *,
  resume: str = "auto",
  progress: Callable[[events.Event], None] = lambda event: None,
  stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
  """Runs the experiment of a config, and writes report, checkpoints and models to `workdir`.

  Args:
    config: an ml_collections ConfigDict, as in `configs/`.
    workdir: the folder; created if missing, else the run in it is resumed.
    resume: "auto" resumes a run of the same config, "never" requires an empty folder, "must"
      requires a run to resume.
    progress: called with events: {"phase", "done", "total", "unit", "numbers"} or {"message"}.
    stop: polled after each round or part of another phase; True stops the run there.

  Returns:
    The content of `report.json`. Only the first of many processes writes.

  Raises:
    Stopped: where `stop` is true; rounds are saved, an unfinished phase starts over.
    ValueError: if the folder holds a run of another config, or of a user's experiment whose code or
      rows have changed, or another run is using it.
  """
  folder, plain = (
    pathlib.Path(workdir),
    json.loads(schema.fill(config, schema.Experiment).to_json()),
  )
  with workdirs.hold(folder, plain, resume):
    shared.check(folder)
    if record := workdirs.read_finished(folder, plain):
      return record
    reports = events.Events(progress, stop)
    ready = setup.prepare(plain, folder, reports)
    functions = user_functions.digests(configs.flat(plain))
    identity.check(folder, plain["experiment"], ready.problem, functions)
    if processes.is_first():
      workdirs.claim(folder, plain)
      identity.write(folder, plain["experiment"], ready.problem, functions)
      reports.tracker = trackers.open_tracker(plain.get("tracker", "none"), folder, plain)
    if reports.tracker is None:
      return compare(ready)
    with contextlib.closing(reports.tracker) as tracker:
      reports.say(f"tracked in {tracker.where}")
      record = compare(ready)
      trackers.write_final(tracker, record)
    return record


def compare(ready: setup.Setup) -> dict[str, Any]:
  """Runs all phases, compares their models, and returns the record."""
  experts = phases.tune_experts(ready)
  models = {"base": phases.Model(ready.params, Budget())}
  models |= phases.merge_once(ready, experts["experts"])
  models |= phases.train_jointly(ready)
  models |= phases.tune_and_merge(ready, models)
  return results.write(ready, models, experts)
