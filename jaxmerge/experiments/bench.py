"""Benchmarks methods on the same experts: hyperparameters from validation, several seeds."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any  # Any: configs and records are plain trees.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import report
from jaxmerge.core import layouts, stage
from jaxmerge.evaluation import scoring
from jaxmerge.experiments import bench_config, config, phases, workdir
from jaxmerge.experiments import setup as setups
from jaxmerge.experiments.events import Events
from jaxmerge.experiments.setup import Setup
from jaxmerge.io.checkpoints import store as stores
from jaxmerge.io.disk import atomic
from jaxmerge.io.huggingface import folder as files
from jaxmerge.report import leaderboard
from jaxmerge.search import grid, objective, scales
from jaxmerge.tasks import batch

Progress = Callable[[Mapping[str, Any]], None]
# Keys of an experiment's config that do not affect its experts.
_FREE = (
  "also",
  "baselines.",
  "checkpoint",
  "early_stopping",
  "final",
  "keep_experts",
  "mesh",
  "method",
  "outer",
  "reference",
  "score_every",
  "tracker",
  "variant",
)


def run(
  config: Any,
  source: str,
  folder: str | pathlib.Path,
  *,
  resume: str = "auto",
  progress: Progress = lambda event: None,
) -> dict[str, Any]:
  """Tunes experts for each seed, merges them by every method, and writes the leaderboard.

  Writes `leaderboard.json`, `leaderboard.md` and `leaderboard.png` into the folder. An interrupted
  run resumes at the first method of a seed without a result. Methods and seeds may be added to a
  run: results with the same settings are reused.

  Args:
    config: the bench's config, from `bench_config.load`.
    source: path of the config file; the experiment's config is in the same folder.
    folder: folder of the run; created if missing.
    resume: see `run.run`.
    progress: see `run.run`.

  Returns:
    The content of `leaderboard.json`.

  Raises:
    ValueError: if the folder holds a run of another config, naming the first differences, if
      `config.experts` names a run with other experts or none, or if another process is using the
      folder.
  """
  folder, plain = pathlib.Path(folder), json.loads(config.to_json())
  with workdir.hold(folder, plain, resume, free=("methods.", "seeds")):
    if (facts := _read_finished(folder, plain)) is not None:
      return facts
    workdir.claim(folder, plain)
    records = [_seed(plain, source, folder, seed, progress) for seed in range(plain["seeds"])]
    return _write(plain, records, folder)


def _read_finished(folder: pathlib.Path, plain: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns the leaderboard of a finished run of the same config, else None."""
  if not all((folder / f"leaderboard.{ending}").is_file() for ending in ("json", "md", "png")):
    return None
  facts = read(folder / "leaderboard.json")
  homes = [folder / f"seed{seed}" / "methods" for seed in range(plain["seeds"])]
  listed = plain["methods"].items()
  paths = {home / f"{name}.json": options for home in homes for name, options in listed}
  whole = all(p.is_file() and read(p).get("tried") == options for p, options in paths.items())
  return facts if whole and facts.get("config") == plain else None


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON file of a bench; raises ValueError if it is damaged."""
  try:
    return files.read_json(path)
  except ValueError as error:
    raise ValueError(f"{error} Remove it, and the next run computes it again.") from error


def _write(
  plain: dict[str, Any], records: Sequence[Mapping[str, Any]], folder: pathlib.Path
) -> dict[str, Any]:
  """Writes the leaderboard of all seeds, and returns its JSON content."""
  shared = set.intersection(*(set(r["record"]["models"]) for r in records))
  for r in records:  # Drop references that are missing for one of the seeds.
    r["record"]["models"] = {n: m for n, m in r["record"]["models"].items() if n in shared}
  summary = report.merge_seeds([r["record"] for r in records])
  facts = {
    "config": plain,
    "versions": workdir.versions(),
    "noise": [r["noise"] for r in records],
    "methods": {n: [r["methods"][n] for r in records] for n in plain["methods"]},
    "summary": summary,
  }
  with atomic.write(folder / "leaderboard.json") as file:
    file.write((json.dumps(facts, indent=1) + "\n").encode())
  with atomic.write(folder / "leaderboard.md") as file:
    file.write(leaderboard.markdown(facts).encode())
  leaderboard.write(facts, folder / "leaderboard.png")
  return facts


def _seed(
  config: dict[str, Any], source: str, folder: pathlib.Path, seed: int, progress: Progress
) -> dict[str, Any]:
  """Returns the scores of base, experts and all methods, for one seed."""
  experiment = bench_config.experiment_config(config, source, seed)
  plain, home = json.loads(experiment.to_json()), folder / f"seed{seed}"
  with workdir.hold(home, plain, "auto"):  # It may be a run of `jaxmerge atm`.
    workdir.claim(home, plain)
    return _compare(config, plain, home, seed, progress)


def _compare(
  config: dict[str, Any], plain: dict[str, Any], home: pathlib.Path, seed: int, progress: Progress
) -> dict[str, Any]:
  """Returns the record of a seed: scores of base, experts and all methods."""
  setup = setups.prepare(plain, home, Events(progress))
  if config["experts"]:
    experts = _experts_of_run(setup, pathlib.Path(config["experts"].format(seed=seed)))
  else:
    experts = phases.tune_experts(setup)["experts"].params
  split = "test" if config["final"] else "validation"
  rows, tasks = setup.rows, setup.problem.tasks
  if split != "validation":
    rows = setups.place_rows(setup.mesh, tasks, split)
  methods = _methods(setup, config["methods"], experts, rows, split, seed)
  stack = setups.pad(setup.mesh, experts, rows.filled.shape[0])
  by_row = scoring.per_row(setup.score_experts(stack, rows), setup.counts(split))
  means = [float(s.mean(dtype=np.float64)) for s in by_row]
  scores = {
    "base": _per_task(setup, setup.params, rows, split),
    "experts": dict(zip(setup.names, means, strict=True)),
    **{name: result["per_task"] for name, result in methods.items()},
  }
  models = {n: {"mean": float(np.mean(list(t.values()))), "per_task": t} for n, t in scores.items()}
  if config["experts"]:
    models |= _references(pathlib.Path(config["experts"].format(seed=seed)), setup.names, split)
  return {
    "record": {
      "tasks": setup.names,
      "models": models,
      "rounds": [],
      "budget": {},
      "config": plain,
      "versions": workdir.versions(),
      "metric": setup.problem.metric.name,
      "lower_is_better": setup.problem.metric.lower_is_better,
      "split": split,
      "seed": seed,
    },
    "noise": _noise(by_row),
    "methods": methods,
  }


def _methods(
  setup: Setup,
  listed: Mapping[str, Any],
  experts: Any,
  rows: batch.TaskBatch,
  split: str,
  seed: int,
) -> dict[str, dict[str, Any]]:
  """Returns the result of each method, from its file where the settings are the same."""
  show = setup.events.bar(f"methods, seed {seed}", len(listed), "method")
  results = {}
  for done, (name, settings) in enumerate(listed.items()):
    path = setup.folder / "methods" / f"{name}.json"
    result = read(path) if path.exists() else {}
    if result.get("tried") != settings:
      if result:
        words = "its result has other settings; computed again"
        setup.events.say(f"{name}, seed {seed}: {words}")
      result = {"tried": settings, **_search(setup, experts, name, settings)}
      result["per_task"] = _per_task(setup, result.pop("params"), rows, split)
      path.parent.mkdir(exist_ok=True)
      with atomic.write(path) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
    results[name] = result
    show(done + 1, len(listed), mean=float(np.mean(list(result["per_task"].values()))))
  return results


def _per_task(setup: Setup, params: Any, rows: batch.TaskBatch, split: str) -> dict[str, float]:
  """Returns the mean score of a model on each task's rows of a split."""
  by_row = setup.score(jax.tree.map(lambda p: p[None], params), rows)[0]
  return dict(zip(setup.names, scoring.means(by_row, setup.counts(split)), strict=True))


def _references(folder: pathlib.Path, tasks: Sequence[str], split: str) -> dict[str, Any]:
  """Returns the scores of ATM and joint training from the run of the experts, if it has them."""
  path = folder / "report.json"
  theirs = read(path) if path.is_file() else {}
  if theirs.get("split") != split or theirs.get("tasks") != list(tasks):
    return {}
  heads = ("atm", "multitask")
  return {n: m for n, m in theirs["models"].items() if n.split("_")[0] in heads}


def _experts_of_run(setup: Setup, folder: pathlib.Path) -> Any:
  """Returns the experts of an ATM run; ValueError for a run without them, or with others."""
  path, place = folder / "config.json", folder / "checkpoints" / "experts"
  if not path.is_file() or not place.is_dir():
    raise ValueError(f"config.experts: {folder} holds no experts of a run ({place}).")
  theirs, ours = (config.flat(c) for c in (workdir.read_config(folder), setup.config))
  for key in sorted(theirs.keys() | ours.keys()):
    if (key.startswith("baselines.experts.") or not key.startswith(_FREE)) and theirs.get(
      key
    ) != ours.get(key):
      raise ValueError(
        f"config.experts: {folder} tuned other experts: {key} is {theirs.get(key)!r} there and "
        f"{ours.get(key)!r} here."
      )
  like = setups.stack_shapes(setup.params, setup.mesh, len(setup.names))
  with stores.Checkpoints(place, keep=1) as store:
    checkpoint = store.restore(like)
  if checkpoint is None:
    raise ValueError(f"config.experts: {place} holds no complete checkpoint.")
  setup.events.say(f"experts: those of {folder}")
  return checkpoint.state


def _noise(scores: Sequence[np.ndarray]) -> float:
  """Returns the standard error of a mean over tasks due to finite rows; scores [rows] per task.

  >>> round(_noise([np.array([1.0, 1.0, 0.0, 0.0])]), 4)
  0.25
  """
  parts = [s.var(dtype=np.float64) / len(s) for s in scores]
  return float(np.sqrt(np.sum(parts)) / len(parts))


def _search(setup: Setup, experts: Any, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the best merge on validation of a method's grid, and its cost."""
  candidates = list(grid.candidates(name, settings))
  seed = setup.settings.seed if "seed" in stage.hparams(candidates[0].method) else None
  goal = setup.validation(experts, name, seed)
  result = objective.run(goal, objective.exhaustive(candidates))
  best = result.candidate
  chosen = {**best.static, **best.hparams}
  if grid.has_scale(settings.get("name", name)):
    chosen["scale"] = best.scale
  return {
    "validation": setup.problem.metric.gain(result.score),
    "settings": chosen,
    "trials": len(result.trials),
    "params": result.params,
    **({} if setup.settings.seed else _cost(goal, best)),
  }


def _cost(goal: scales.Validation, best: scales.Scaled) -> dict[str, float]:
  """Returns the CPU seconds and temporary bytes of one compiled merge in memory.

  CPU seconds are over all threads, so that other work on the machine does not count.
  """
  arrays = goal.base, goal.models, jnp.asarray([best.scale], jnp.float32), dict(best.hparams)
  static: dict[str, Any] = {"method": best.method, "seed": goal.seed, "names": tuple(goal.names)}
  static["layout"] = layouts.check(goal.layout)
  program = scales.at_scales.lower(*arrays, **static).compile()
  jax.block_until_ready(program(*arrays))
  begun = time.process_time()
  jax.block_until_ready(program(*arrays))
  seconds = time.process_time() - begun
  memory = program.memory_analysis()
  return {"seconds": seconds} | ({"bytes": float(memory.temp_size_in_bytes)} if memory else {})
