"""The results of a run: scores of all models, the report, saved models and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any  # Any: records are plain trees.

import jax
import numpy as np

from jaxmerge import report
from jaxmerge.evaluation import compare
from jaxmerge.experiments import merges, phase_cache, workdir
from jaxmerge.experiments import problem as problems
from jaxmerge.experiments.phases import Models
from jaxmerge.experiments.setup import Setup, pad, place_rows
from jaxmerge.parallel import mesh as meshes
from jaxmerge.parallel import processes


def write(setup: Setup, models: Models, stacks: Models) -> dict[str, Any]:
  """Scores all models, writes report, models and metrics, and returns the record.

  Args:
    setup: the set-up.
    models: the compared models by name; `atm` is saved in `merged/`.
    stacks: stacks of experts: `experts`, and those with other settings.
  """
  split = "test" if setup.config["final"] else "validation"
  with setup.events.timed("final scores"):
    record, scores = score(setup, models, stacks, split)
    if split == "test":
      validation, _ = score(setup, models, stacks, "validation")
      record["validation"] = {n: m["mean"] for n, m in validation["models"].items()}
  curves = {n: list(m.rounds) for n, m in models.items() if m.rounds}
  record |= _facts(setup, {"base": models["base"], **stacks, **models}, curves, split)
  record["gap_closed"] = report.gap_closed(record["models"])
  record["differences"] = compare.differences(record, scores)
  problem = setup.problem
  card = report.model_card(record, problem.base, "atm", license=problem.license)
  merged = meshes.fetch(models["atm"].params)
  if processes.is_first():
    problems.save(problem, setup.folder / "merged", merged, card)
    workdir.write_metrics(setup.folder, curves)
    workdir.write_rows(setup.folder, scores)
    report.write(record, setup.folder)
  return record


def score(
  setup: Setup, models: Models, stacks: Models, split: str
) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
  """Scores each model on all tasks of a split, and each model of a stack on its own task."""
  tasks, metric = setup.problem.tasks, setup.problem.metric
  stacked = {n: m.params for n, m in stacks.items() if n != "experts"}
  experts = compare.split_experts(stacks["experts"].params, len(tasks))
  single = {n: m.params for n, m in models.items()} | experts

  def make() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    rows = setup.rows if split == "validation" else place_rows(setup.mesh, tasks, split)
    by_model = {
      n: setup.score(jax.tree.map(lambda p: p[None], params), rows)[0]
      for n, params in single.items()
    }
    for name, params in stacked.items():
      by_model[name] = setup.score_experts(pad(setup.mesh, params, rows.filled.shape[0]), rows)
    return {n: np.asarray(s)[: len(tasks)] for n, s in by_model.items()}, {}

  like = compare.shapes([*single, *stacked], tasks, split)
  digest = phase_cache.digest([single, stacked])
  by_model = meshes.fetch(setup.restore_or_make(f"scores_{split}", like, make, digest)[0])
  scores, by_expert = compare.by_row(by_model, list(like), tasks, split, metric)
  facts = {n: m.facts for n, m in models.items()}
  return compare.summary(tasks, split, scores, by_expert, facts, metric), scores


def _facts(setup: Setup, models: Models, curves: Mapping[str, Any], split: str) -> dict[str, Any]:
  """Returns the rest of a record: curves, costs, config, versions, notes."""
  layout, params, config = setup.problem.layout, setup.params, setup.config
  return {
    "title": setup.problem.title,
    "seed": setup.settings.seed,
    "split": split,
    "rounds_split": "validation",
    "rounds": curves["atm"],
    "curves": {n: c for n, c in curves.items() if n != "atm"},
    "budget": {n: m.cost._asdict() for n, m in models.items()},
    "parameters": sum(x.size for x in jax.tree.leaves(params)),
    "seconds": setup.events.seconds,
    "config": config,
    "versions": workdir.versions(),
    "notes": merges.layout_notes(layout, params, config),
  }
