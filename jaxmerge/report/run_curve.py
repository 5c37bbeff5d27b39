"""The scores of merges along a training run, as a table, a plot and a sentence; free of jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any  # A record is JSON, and Matplotlib is optional: neither has types to name.

from jaxmerge.report import figure_elements as figures
from jaxmerge.report import tables
from jaxmerge.report.tables import Cell, Table

MERGED, ALONE = "Merged", "Checkpoint alone"


def best(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
  """Returns the best point by the record's metric, the earliest of equal ones; None if empty."""
  sign = 1 if record["lower_is_better"] else -1
  points = [p for p in record["points"] if record["metric"] in p["scores"]]
  return min(points, key=lambda p: sign * p["scores"][record["metric"]], default=None)


def table(record: Mapping[str, Any]) -> Table:
  """Returns a row per merge: its newest step, its range of steps, and its scores."""
  points, chosen = record["points"], best(record)
  names = list(dict.fromkeys(n for p in points for n in p["scores"]))
  alone = any(p.get("alone") for p in points)
  head = ["Step", "Checkpoints"]
  for name in names:
    head += [f"{MERGED}: {name}", f"{ALONE}: {name}"] if alone else [name]
  rows = []
  for p in points:
    row = [Cell(str(p["step"])), Cell(f"{p['steps'][0]} to {p['steps'][-1]}")]
    for name in names:
      row.append(Cell(_number(p["scores"].get(name)), p is chosen and name == record["metric"]))
      row += [Cell(_number((p.get("alone") or {}).get(name)))] if alone else []
    rows.append(row)
  return Table(head, rows)


def sentence(record: Mapping[str, Any]) -> str:
  """Returns a sentence on the best merge."""
  point = best(record)
  if point is None:
    return "no merge was evaluated"
  better = "lower" if record["lower_is_better"] else "higher"
  score = _number(point["scores"][record["metric"]])
  return f"best: step {point['step']}, {record['metric']} {score} ({better} is better)"


def markdown(record: Mapping[str, Any]) -> str:
  """Returns the table as a Markdown page, below a sentence on the run and the method."""
  settings = ", ".join(f"{n} {v}" for n, v in record["parameters"].items())
  about = (
    f"Merges of the newest {record['window']} checkpoints of {record['run']}, at every "
    f"{record['every']}: {record['method']}, {settings}."
  )
  return f"{about}\n\n{tables.to_markdown(table(record))}\n{sentence(record)}\n"


def figure(record: Mapping[str, Any]) -> Any:
  """Draws the metric over steps, for merges and, if recorded, single checkpoints."""
  metric, points = record["metric"], record["points"]
  curves = {MERGED: [(p["step"], p["scores"].get(metric)) for p in points]}
  curves[ALONE] = [(p["step"], (p.get("alone") or {}).get(metric)) for p in points]
  curves = {n: [(x, y) for x, y in pairs if y is not None] for n, pairs in curves.items()}
  fig, axes = figures.figure(3.0)
  figures.span(axes, [p["step"] for p in points])
  axes.locator_params(axis="x", nbins=6)  # Step numbers have many digits.
  marks: list[figures.Mark] = []
  for (name, pairs), color in zip(curves.items(), figures.SERIES, strict=False):
    if pairs:
      xs, ys = zip(*pairs, strict=True)
      figures.curve(axes, xs, ys, color, linewidth=2.0 if name == MERGED else 1.4)
      marks.append(figures.Mark(ys[-1], f"{name} {ys[-1]:.4g}", color, lead=name == MERGED))
  figures.dress(axes, f"{metric} along the run", "Step", metric)
  figures.fit(axes, _heights(curves.values()))
  figures.label_right(fig, axes, marks)
  return fig


def _heights(curves: Any) -> list[float]:
  return [y for pairs in curves for _, y in pairs]


def _number(x: float | None) -> str:
  return "" if x is None else f"{x:.6g}"
