"""`merge_run`: merges a sliding window of checkpoints along a training run, and scores each merge.

The output folder has `merge_run.json`, the record, with one point per merge, from which an
interrupted call resumes; `merge_run.md` and `merge_run.png`, its table and plot; and `merges/STEP`,
the merges that remain on disk.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: a record is JSON.

from jaxmerge.catalog import decays, lookup
from jaxmerge.evaluation import external
from jaxmerge.files import runs
from jaxmerge.io.disk import atomic, locks, strict_json
from jaxmerge.recipe import run as recipe_run
from jaxmerge.report import figure_elements, run_curve

NAME = "merge_run"
MERGES, ALONE = "merges", "alone"
KEEP = ("best", "all", "none")
METHOD = "checkpoint_average"
_CHOSEN_LATER = ("points", "metric", "lower_is_better")  # The first point fixes all others.

Record = dict[str, Any]


class _Job(NamedTuple):
  """The arguments of a call that are not part of its record."""

  out: pathlib.Path
  run: runs.Run
  evaluate: external.Evaluate
  keep: str
  options: Mapping[str, Any]
  message: Callable[[str], None]


def merge_run(
  run: str | os.PathLike[str],
  out: str | os.PathLike[str],
  *,
  window: int = 8,
  every: int = 4,
  evaluate: str | external.Evaluate,
  steps: Any = "all",
  parameters: Mapping[str, Any] | None = None,
  metric: str | None = None,
  lower_is_better: bool = False,
  keep: str = "best",
  alone: bool = False,
  out_format: str = "safetensors",
  shard_size: int = 5_000_000_000,
  message: Callable[[str], None] = lambda text: None,
  progress: recipe_run.Progress | None = None,
) -> Record:
  """Merges the last `window` checkpoints at every `every`-th one of a run, and scores each merge.

  The newest checkpoint is always merged. A second call resumes an interrupted one, with the same
  record as that of a single call, and adds checkpoints that were saved since.

  Args:
    run: a folder with one folder per step, as for `files.runs.open_run`.
    out: folder of record, table, plot and merges.
    window: number of checkpoints of a merge.
    every: distance between merges, in checkpoints; the first merge is at the first full window,
      and the last one at the newest checkpoint.
    evaluate: a command with `{out}` for the folder of a merge, whose last line of output is a JSON
      object of numbers; or a function from the folder to numbers by name.
    steps: the checkpoints to use, as for `files.runs.select`.
    parameters: of `checkpoint_average`; None: {"kind": "decay"}.
    metric: name of the number that ranks the merges; None: the only one.
    lower_is_better: whether the best merge has the lowest metric.
    keep: which merges remain on disk: "best", "all" or "none".
    alone: whether to score the newest checkpoint of each window on its own too.
    out_format: as for `merge_recipe`.
    shard_size: as for `merge_recipe`.
    message: called with a line for each point.
    progress: as for `merge_recipe`.

  Returns:
    The record: the settings, and under `points` a dict for each merge: `step`, its newest; `steps`;
    `weights`; `scores`; `alone`, the scores of the newest checkpoint; `extra`, true for a merge at
    the newest checkpoint that is not an `every`-th one.

  Raises:
    ValueError: for a window larger than the run, settings other than those of the record in `out`,
      and for all errors of `merge_recipe`.
  """
  out = pathlib.Path(out)
  _check(window, every, keep)
  parameters = dict({"kind": "decay"} if parameters is None else parameters)
  lookup.check(METHOD, parameters)
  figure_elements.figure(1.0)  # Fails now, not after hours, where Matplotlib is not installed.
  score = external.command(evaluate) if isinstance(evaluate, str) else evaluate
  opened = runs.open_run(run)
  opened = opened._replace(checkpoints=runs.select(opened, steps))
  options = {"out_format": out_format, "shard_size": shard_size, "progress": progress}
  job = _Job(out, opened, score, keep, options, message)
  record: Record = {
    "format": 1,
    "run": os.fspath(run),
    "method": METHOD,
    "parameters": parameters,
    "window": window,
    "every": every,
    "evaluate": evaluate if isinstance(evaluate, str) else getattr(evaluate, "__qualname__", ""),
    "alone": alone,
    "out_format": out_format,
    "metric": metric,
    "lower_is_better": lower_is_better,
    "points": [],
  }
  atomic.check_name(out)
  with locks.hold(out, f"{out}: another process merges a run there; wait for it."):
    return _run(job, record)


def _run(job: _Job, record: Record) -> Record:
  """Adds the points that are missing from the record, one by one."""
  record = _go_on(job.out, record)
  _enough(job, record)
  _write(job.out, record)
  for checkpoints in _windows(job.run, record):
    record = _add_point(job, record, checkpoints)
  _discard(job, record)
  return record


def read(out: str | os.PathLike[str]) -> Record | None:
  """Returns the record of a folder; None if there is none.

  Raises:
    ValueError: naming the file, if it is damaged.
  """
  path = pathlib.Path(out) / f"{NAME}.json"
  if not path.is_file():
    return None
  record = strict_json.parse(str(path), path.read_bytes())
  if record.get("format") != 1 or not isinstance(record.get("points"), list):
    raise ValueError(f"{path}: not a record of merge_run; choose another folder.")
  return record


def _check(window: Any, every: Any, keep: Any) -> None:
  for name, value in (("window", window), ("every", every)):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(f"{name} must be a number of checkpoints, 1 or more, got {value!r}.")
  if keep not in KEEP:
    raise ValueError(f"keep must be one of {', '.join(map(repr, KEEP))}, got {keep!r}.")


def _go_on(out: pathlib.Path, record: Record) -> Record:
  """Returns the record with the points of an earlier call with the same settings."""
  if (before := read(out)) is None:
    if out.exists() and any(out.iterdir()):
      raise FileExistsError(f"{out}: not empty, and has no {NAME}.json; choose another folder.")
    out.mkdir(parents=True, exist_ok=True)
    return record
  for key in record.keys() - set(_CHOSEN_LATER):
    if _same(key, before.get(key), record[key]):
      continue
    if before["points"]:
      raise ValueError(
        f"{out}: its merges have {key} {before.get(key)!r}, not {record[key]!r}: use the former, "
        "or another folder."
      )
    shutil.rmtree(out / MERGES, ignore_errors=True)  # Started with other settings.
  metric = record["metric"] or before.get("metric")
  return {**record, "metric": metric, "points": before["points"]}


def _same(key: str, before: Any, now: Any) -> bool:
  if key == "run":
    return os.path.realpath(str(before)) == os.path.realpath(now)
  return bool(before == json.loads(json.dumps(now)))


def _enough(job: _Job, record: Record) -> None:
  count, window = len(job.run.checkpoints), record["window"]
  if count < window and not record["points"]:
    raise ValueError(
      f"{job.run.folder}: a window of {window} checkpoints is more than the {count} of the run: "
      "choose a smaller window, or try again when the run has more."
    )


def _windows(run: runs.Run, record: Record) -> Iterator[Sequence[runs.Checkpoint]]:
  """Yields the windows that are not in the record, in the order of steps.

  The newest checkpoint ends a window even where it is not an `every`-th one. Such a window does not
  move those that a later call adds.
  """
  window, every, all_ = record["window"], record["every"], run.checkpoints
  last = done = window - 1 - every
  if points := record["points"]:  # Older checkpoints may have been deleted since.
    regular = [p["step"] for p in points if not p.get("extra")] or [0]
    last = sum(c.step <= regular[-1] for c in all_) - 1
    done = sum(c.step <= points[-1]["step"] for c in all_) - 1
  ends = set(range(last + every, len(all_), every)) | {len(all_) - 1}
  for end in sorted(e for e in ends if e > done and e >= window - 1):
    yield all_[end - window + 1 : end + 1]


def _is_extra(run: runs.Run, record: Record, step: int) -> bool:
  """Returns whether a window ends at a step only because that is the newest."""
  regular = [p["step"] for p in record["points"] if not p.get("extra")]
  if not regular:
    return False
  return sum(regular[-1] < c.step <= step for c in run.checkpoints) % int(record["every"]) != 0


def _add_point(job: _Job, record: Record, checkpoints: Sequence[runs.Checkpoint]) -> Record:
  """Merges and scores a window; writes the record before it removes anything."""
  steps = [c.step for c in checkpoints]
  scores = _score(job, record, record["parameters"], steps, job.out / MERGES / str(steps[-1]))
  record = {**record, "metric": _metric(record["metric"], scores)}
  point = {"step": steps[-1], "steps": steps, "weights": _weights(record, len(steps))}
  point["scores"] = scores
  if record["alone"]:
    place = job.out / ALONE / str(steps[-1])
    point["alone"] = _score(job, record, {"kind": "sma"}, steps[-1:], place)
  if _is_extra(job.run, record, steps[-1]):
    point["extra"] = True
  record = {**record, "points": [*record["points"], point]}
  _write(job.out, record)
  _discard(job, record)
  numbers = ", ".join(f"{n} {x:.6g}" for n, x in scores.items())
  job.message(f"step {steps[-1]}: {len(steps)} checkpoints merged, {numbers}")
  return record


def _score(
  job: _Job,
  record: Record,
  parameters: Mapping[str, Any],
  steps: Sequence[int],
  place: pathlib.Path,
) -> dict[str, int | float]:
  """Returns the scores of a merge of checkpoints; reuses a folder and scores that exist."""
  if not place.exists():
    models = [{"run": record["run"], "steps": list(steps)}]
    recipe = {"merge_method": METHOD, "parameters": dict(parameters), "models": models}
    recipe_run.merge_recipe(recipe, place, **job.options)
  done = place / external.NAME
  if done.is_file():
    return external.check_numbers(strict_json.parse(str(done), done.read_bytes()))
  return external.run(place, job.evaluate)


def _metric(metric: str | None, scores: Mapping[str, Any]) -> str:
  """Returns the name of the number that ranks the merges."""
  if metric is None and len(scores) == 1:
    return next(iter(scores))
  if metric is None or metric not in scores:
    what = "several numbers" if metric is None else f"no {metric!r}"
    raise ValueError(
      f"the evaluation returned {what}: choose the metric among {', '.join(scores)}; finished "
      "evaluations are not repeated."
    )
  return metric


def _weights(record: Record, count: int) -> list[float]:
  known = {n: x for n, x in record["parameters"].items() if n != "kind"}
  return list(decays.checkpoint_weights(count, record["parameters"].get("kind", "sma"), **known))


def _discard(job: _Job, record: Record) -> None:
  """Removes the merges that `keep` does not select."""
  shutil.rmtree(job.out / ALONE, ignore_errors=True)
  best = run_curve.best(record)
  stays = {str(best["step"])} if best is not None and job.keep == "best" else set()
  for point in record["points"] if job.keep != "all" else ():
    place = job.out / MERGES / str(point["step"])
    if place.name not in stays and place.exists():
      shutil.rmtree(place)


def _write(out: pathlib.Path, record: Record) -> None:
  """Writes the plot, the table and then the record."""
  texts = {f"{NAME}.json": (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()}
  if record["points"]:
    image = figure_elements.png(run_curve.figure(record))
    texts = {f"{NAME}.png": image, f"{NAME}.md": run_curve.markdown(record).encode(), **texts}
  for name, content in texts.items():
    with atomic.write(out / name) as file:
      file.write(content)
