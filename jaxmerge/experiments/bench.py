"""Every method on the same experts: numbers chosen on validation, several seeds, a leaderboard."""

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
from jaxmerge.core.stage import Method
from jaxmerge.evaluation import scoring
from jaxmerge.experiments import bench_config, config, problem, workdir
from jaxmerge.experiments import run as runs
from jaxmerge.io.checkpoints import store as stores
from jaxmerge.io.disk import atomic
from jaxmerge.io.huggingface import folder as files
from jaxmerge.report import leaderboard
from jaxmerge.search import grid, objective
from jaxmerge.search import scales as search_scales

Progress = Callable[[Mapping[str, Any]], None]
# Keys of an experiment's config on which its experts do not depend.
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
  """Tunes the experts of an experiment for each seed, merges them by every method, compares.

  Leaves `leaderboard.json`, `leaderboard.md` and `leaderboard.png` in the folder. An interrupted
  run goes on with the first method of the seed that it has no result of. Methods and seeds may be
  added to a run: what has the same settings as before is not made again.

  Args:
    config: of the bench, as `bench_config.bench` reads it.
    source: path of its file: the experiment's config is found beside it.
    folder: of the run; it is created.
    resume: see `run.run`.
    progress: see `run.run`.

  Returns:
    What `leaderboard.json` holds.

  Raises:
    ValueError: if the folder holds a run of another config, naming the first differences, or
      `config.experts` names a run with other experts or none, or another process is at work in
      the folder.
  """
  folder, plain = pathlib.Path(folder), json.loads(config.to_json())
  with workdir.held(folder, plain, resume, free=("methods.", "seeds")):
    if (facts := _finished(folder, plain)) is not None:
      return facts
    workdir.claim(folder, plain)
    records = [_seed(plain, source, folder, seed, progress) for seed in range(plain["seeds"])]
    return _written(plain, records, folder)


def _finished(folder: pathlib.Path, plain: Mapping[str, Any]) -> dict[str, Any] | None:
  """What `leaderboard.json` holds, where all is there and as the config asks for, else None."""
  if not all((folder / f"leaderboard.{ending}").is_file() for ending in ("json", "md", "png")):
    return None
  facts = read(folder / "leaderboard.json")
  homes = [folder / f"seed{seed}" / "methods" for seed in range(plain["seeds"])]
  paths = {h / f"{name}.json": own for h in homes for name, own in plain["methods"].items()}
  whole = all(path.is_file() and read(path).get("tried") == own for path, own in paths.items())
  return facts if whole and facts.get("config") == plain else None


def read(path: pathlib.Path) -> dict[str, Any]:
  """Returns the JSON of a file of a bench; ValueError, naming it, where it is damaged."""
  try:
    return files.read_json(path)
  except ValueError as error:
    raise ValueError(f"{error} If it is removed, it is made again.") from error


def _written(
  plain: dict[str, Any], records: Sequence[Mapping[str, Any]], folder: pathlib.Path
) -> dict[str, Any]:
  """Writes the leaderboard of all seeds."""
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
  """The scores of base, experts and all methods, for one seed."""
  own = bench_config.of_bench(config, source, seed)
  plain, home = json.loads(own.to_json()), folder / f"seed{seed}"
  with workdir.held(home, plain, "auto"):  # It may be a run of `jaxmerge atm` as well.
    workdir.claim(home, plain)
    return _scored(config, plain, home, seed, progress)


def _scored(
  config: dict[str, Any], plain: dict[str, Any], home: pathlib.Path, seed: int, progress: Progress
) -> dict[str, Any]:
  """The record of a seed, in its folder."""
  work = runs.Work(plain, home, progress)
  work.base()
  if config["experts"]:
    work.stacks["experts"] = _taken(work, pathlib.Path(config["experts"].format(seed=seed)))
  else:
    work.experts()
  split = "test" if config["final"] else "validation"
  rows = work.rows if split == "validation" else work.placed(work.problem.tasks, split)
  counts = [len(t.splits()[split].labels) for t in work.problem.tasks]

  def scored(params: Any) -> dict[str, float]:
    found = work.score(jax.tree.map(lambda p: p[None], params), rows)
    return dict(zip(work.names, scoring.means(found[0], counts), strict=True))

  whole = home / "methods"
  shown = work.bar(f"methods, seed {seed}", len(config["methods"]), "method")
  made = {}
  for done, (name, settings) in enumerate(config["methods"].items()):
    path = whole / f"{name}.json"
    known = read(path) if path.exists() else {}
    if known.get("tried") != settings:
      if known:
        work.say(f"{name}, seed {seed}: other settings than its result was found with; made again")
      known = {"tried": settings, **_searched(work, name, settings)}
      known["per_task"] = scored(known.pop("params"))
      whole.mkdir(exist_ok=True)
      with atomic.write(path) as file:
        file.write((json.dumps(known, indent=1) + "\n").encode())
    made[name] = known
    mean = float(np.mean(list(made[name]["per_task"].values())))
    shown(done + 1, len(config["methods"]), mean=mean)
  height = rows.filled.shape[0]
  own_rows = scoring.per_row(
    work.own_score(work.padded(work.stacks["experts"], height), rows), counts
  )
  own_scores = [float(s.mean(dtype=np.float64)) for s in own_rows]
  scores = {"base": scored(work.params), "experts": dict(zip(work.names, own_scores, strict=True))}
  scores |= {name: own["per_task"] for name, own in made.items()}
  models = {n: {"mean": float(np.mean(list(t.values()))), "per_task": t} for n, t in scores.items()}
  return {
    "record": {
      "tasks": work.names,
      "models": models,
      "rounds": [],
      "budget": {},
      "config": plain,
      "versions": workdir.versions(),
      "metric": work.metric.name,
      "lower_is_better": work.metric.lower_is_better,
      "split": split,
      "seed": seed,
    },
    "noise": _noise(own_rows),
    "methods": made,
  }


def _taken(work: runs.Work, folder: pathlib.Path) -> Any:
  """Returns the experts of an ATM run; ValueError if it has none, or was told to tune others."""
  path, place = folder / "config.json", folder / "checkpoints" / "experts"
  if not path.is_file() or not place.is_dir():
    raise ValueError(f"config.experts: {folder} holds no experts of a run ({place}).")
  theirs, ours = (config.flat(c) for c in (workdir.config_of(folder), work.config))
  for key in sorted(theirs.keys() | ours.keys()):
    if (key.startswith("baselines.experts.") or not key.startswith(_FREE)) and theirs.get(
      key
    ) != ours.get(key):
      raise ValueError(
        f"config.experts: {folder} tuned other experts: {key} is {theirs.get(key)!r} there and "
        f"{ours.get(key)!r} here."
      )
  like = problem.make_like(work.params, len(work.names), "experts", work.mesh)
  with stores.Checkpoints(place, keep=1) as store:
    found = store.restore(like)
  if found is None:
    raise ValueError(f"config.experts: {place} holds no whole checkpoint.")
  work.say(f"experts: those of {folder}")
  return found.state


def _noise(scores: Sequence[np.ndarray]) -> float:
  """Standard error of a mean over tasks that comes from the number of rows: scores [rows] a task.

  >>> round(_noise([np.array([1.0, 1.0, 0.0, 0.0])]), 4)
  0.25
  """
  parts = [s.var(dtype=np.float64) / len(s) for s in scores]
  return float(np.sqrt(np.sum(parts)) / len(parts))


def _searched(work: runs.Work, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
  """The merge that is best on validation of all on a method's grid; its cost."""
  candidates = list(grid.candidates(name, settings))
  seed = work.settings.seed if "seed" in stage.hparams(candidates[0].method) else None
  goal = search_scales.Validation(
    work.params,
    work.stacks["experts"],
    work.score,
    work.rows,
    counts=[len(t.validation.labels) for t in work.problem.tasks],
    names=work.names,
    seed=seed,
    layout=work.problem.layout,
    metric=work.metric,
    name=name,
  )
  result = objective.run(goal, objective.exhaustive(candidates))
  best = result.candidate
  chosen = {**best.static, **best.hparams}
  if grid.has_scale(settings.get("name", name)):
    chosen["scale"] = best.scale
  cost = _cost(work, best.method, best.hparams, best.scale, seed) if not work.settings.seed else {}
  return {
    "validation": work.metric.gain(result.score),
    "settings": chosen,
    "trials": len(result.trials),
    "params": result.params,
    **cost,
  }


def _cost(
  work: runs.Work,
  method: Method,
  numbers: Mapping[str, float],
  scale: float,
  seed: int | None,
) -> dict[str, float]:
  """CPU seconds of one merge in memory, compiled; the bytes that it needs beside its arguments.

  Seconds of the processor, of all threads: other work on the machine does not count.
  """
  given = work.params, work.stacks["experts"], jnp.asarray([scale], jnp.float32), dict(numbers)
  options: dict[str, Any] = {"method": method, "seed": seed, "names": tuple(work.names)}
  options["layout"] = layouts.check(work.problem.layout)
  program = search_scales.at_scales.lower(*given, **options).compile()
  jax.block_until_ready(program(*given))
  begun = time.process_time()
  jax.block_until_ready(program(*given))
  seconds = time.process_time() - begun
  memory = program.memory_analysis()
  return {"seconds": seconds} | ({"bytes": float(memory.temp_size_in_bytes)} if memory else {})
