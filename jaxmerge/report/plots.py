"""The figures of a report, each a function of the record."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any  # Any: a record is JSON, and Matplotlib is optional.

import numpy as np

from jaxmerge.report import figure_elements as figure_lib
from jaxmerge.report import labels as label_lib
from jaxmerge.report import task_vector_plots, vector

Rounds = Sequence[Mapping[str, Any]]


NAMES = ("mean", "per_task", "gap_closed", "cosines", "norms", "sign_conflict")


def figures(record: Mapping[str, Any], width: float = figure_lib.WIDTH) -> dict[str, Any]:
  """Returns the figures for which the record has data, by name, in the order of `NAMES`."""
  figures_by_name = {name: make(record, width) for name, make in _makers().items()}
  return {name: figure for name, figure in figures_by_name.items() if figure is not None}


def drawings(record: Mapping[str, Any]) -> dict[str, vector.Drawing]:
  """Returns the figures as SVG for a page, by name."""
  drawn = {
    name: vector.drawing(functools.partial(make, record), name) for name, make in _makers().items()
  }
  return {name: drawing for name, drawing in drawn.items() if drawing is not None}


def _makers() -> dict[str, Callable[[Mapping[str, Any], float], Any]]:
  makers = (
    mean,
    per_task,
    gap_closed,
    task_vector_plots.cosines,
    task_vector_plots.norms,
    task_vector_plots.sign_conflict,
  )
  return dict(zip(NAMES, makers, strict=True))


def images(record: Mapping[str, Any]) -> dict[str, bytes]:
  """Returns the figures as PNG bytes, by name."""
  return {name: figure_lib.png(figure) for name, figure in figures(record).items()}


def write(record: Mapping[str, Any], folder: str | pathlib.Path) -> list[pathlib.Path]:
  """Writes the figures into the folder as NAME.png and returns their paths."""
  drawn = images(record)
  home = pathlib.Path(folder)
  home.mkdir(parents=True, exist_ok=True)
  paths = []
  for name, data in drawn.items():
    path = home / f"{name}.png"
    path.write_bytes(data)
    paths.append(path)
  return paths


def runs(record: Mapping[str, Any]) -> dict[str, Rounds]:
  """Returns the rounds of each ATM run; the record has those of the first as `rounds`."""
  loop = {"atm": record["rounds"]} if record["rounds"] else {}
  return loop | {n: r for n, r in record.get("curves", {}).items() if r}


def rounds_split(record: Mapping[str, Any]) -> str:
  """Returns the split of the rounds: validation, never test."""
  return record.get("rounds_split", "validation")


def _means(record: Mapping[str, Any]) -> tuple[dict[str, float], str]:
  """Returns the means of all models on the split of the rounds, else as reported, and the split."""
  validation = record.get("validation")
  if validation and rounds_split(record) == "validation":
    means, split = validation, "validation"
  else:
    means = {n: m["mean"] for n, m in record["models"].items()}
    split = label_lib.split(record)
  return {n: means[n] for n in label_lib.order(means) if means[n] is not None}, split


def _unit(record: Mapping[str, Any]) -> float:
  return 100.0 if label_lib.percent(record) else 1.0


def mean(record: Mapping[str, Any], width: float = figure_lib.WIDTH) -> Any:
  """Draws the mean over tasks after each round, other models as labelled lines."""
  curves, unit = runs(record), _unit(record)
  if not curves:
    return None
  means, split = _means(record)
  palette = figure_lib.colors(label_lib.order({**means, **curves}))
  fig, axes = _graph(width)
  figure_lib.span(axes, [r["round"] for rounds in curves.values() for r in rounds])
  marks, heights = [], []
  for name, level in means.items():
    if name in curves:
      continue
    axes.axhline(
      unit * level,
      color=palette[name],
      linewidth=1.1,
      linestyle=figure_lib.dashes(name),
      zorder=1.5,
    )
    text = f"{figure_lib.model(name)} {label_lib.value(record, level)}"
    line = figure_lib.dashes(name)
    marks.append(figure_lib.Mark(unit * level, text, palette[name], line=line))
  for name, rounds in curves.items():
    ys = figure_lib.column(rounds, "mean") * unit
    scored = np.isfinite(ys)
    if not scored.any():
      continue
    lead = name == "atm"
    thick = 2.2 if lead else 1.6
    xs, ys = figure_lib.column(rounds, "round")[scored], ys[scored]
    figure_lib.curve(axes, xs.tolist(), ys.tolist(), palette[name], linewidth=thick, zorder=3)
    last = ys[-1]
    text = f"{figure_lib.model(name)} {label_lib.value(record, last / unit)}"
    marks.append(figure_lib.Mark(last, text, palette[name], lead=True))
    heights += ys.tolist()
  if not marks:
    return None
  curves_split, same = rounds_split(record), split == rounds_split(record)
  what = f"Mean {label_lib.axis(record, f', {curves_split}' if same else '')}"
  across = "Round" if same else f"Round (curves: {curves_split}; lines: {split})"
  figure_lib.dress(axes, "Mean over tasks after every round", across, what)
  figure_lib.fit(axes, [*heights, *(m.y for m in marks)])
  figure_lib.label_right(fig, axes, marks)
  return fig


def _graph(width: float) -> tuple[Any, Any]:
  """Returns the figure and axes of curves."""
  return figure_lib.figure(3.9 if width == figure_lib.WIDTH else 2.9, width=width)


def models_of_bars(record: Mapping[str, Any]) -> list[str]:
  """Returns the models of the bar chart: base, best merges, joint training, experts."""
  chosen = ("base", label_lib.best(record, "one-shot"), label_lib.best(record, "loop"))
  names = [*chosen, "multitask", "experts"]
  return [n for n in names if n is not None and n in record["models"]]


def per_task(record: Mapping[str, Any], width: float = figure_lib.WIDTH) -> Any:
  """Draws a group of bars per task: base, best merges, joint training, experts."""
  names, tasks = models_of_bars(record), record["tasks"]
  if not names:
    return None
  many = len(tasks) > 12
  thick = 0.08 if many else 0.135  # inches
  pitch = thick * len(names) + (0.1 if many else 0.16)
  starts = np.arange(len(tasks)) * pitch
  fig, axes = figure_lib.figure(len(tasks) * pitch + 1.05, width=width)
  what = label_lib.axis(record, f", {label_lib.split(record)}")
  what = what[0].upper() + what[1:]
  figure_lib.dress(axes, "", what, "")
  narrow = figure_lib.is_narrow(fig)
  _bars(axes, record, names, starts, thick, numbers=not many)
  _chance(axes, record, starts, thick, len(names))
  labels = list(figure_lib.names(tasks, 16 if narrow else 24).values())
  axes.set_yticks(starts + thick * (len(names) - 1) / 2, labels)
  axes.tick_params(axis="y", length=0, labelcolor=figure_lib.INK)
  axes.spines["left"].set_visible(False)
  axes.grid(visible=False, axis="y")
  axes.grid(axis="x", color=figure_lib.GRID, linewidth=0.6)
  axes.set_ylim(starts[-1] + thick * (len(names) - 0.3), -0.7 * thick)
  if label_lib.percent(record):
    axes.set_xlim(0, 106)
    axes.set_xticks(range(0, 101, 20))
  left = max(figure_lib.text_width(fig, t) for t in labels)
  figure_lib.headline(fig, "Per task")
  more = (figure_lib.legend(fig, axes, 0.34) - 1) * figure_lib.LINE
  figure_lib.grow(fig, more)
  figure_lib.set_edges(fig, left + 0.15, 0.1, 0.48, 0.59 + more)
  return fig


def _bars(
  axes: Any,
  record: Mapping[str, Any],
  names: Sequence[str],
  starts: np.ndarray,
  thick: float,
  *,
  numbers: bool,
) -> None:
  """Draws the bars of one model after another, with their values at the ends."""
  palette = figure_lib.colors(label_lib.order(record["models"])) | figure_lib.BARS
  style = {"fontsize": 7, "va": "center_baseline", "color": figure_lib.INK}
  for i, name in enumerate(names):
    row = record["models"][name]["per_task"]
    values = _unit(record) * figure_lib.numbers([row[task] for task in record["tasks"]])
    at = starts + i * thick
    axes.barh(at, values, 0.86 * thick, color=palette[name], label=label_lib.label(name), zorder=2)
    for y, x, task in zip(at, values, record["tasks"], strict=True):
      if numbers and np.isfinite(x):
        text = label_lib.value(record, row[task])
        axes.annotate(text, (max(x, 0.0), y), (3, 0), textcoords="offset points", **style)


def _chance(
  axes: Any, record: Mapping[str, Any], starts: np.ndarray, thick: float, count: int
) -> None:
  """Marks the chance line of every task across its group of bars."""
  if not record.get("chance"):
    return
  for start, task in zip(starts, record["tasks"], strict=True):
    x = record["chance"][task]
    if x is not None:
      ends = start + np.array([-0.6, count - 0.4]) * thick
      axes.plot([_unit(record) * x] * 2, ends, color=figure_lib.PAGE, linewidth=2.6, zorder=3)
      axes.plot([_unit(record) * x] * 2, ends, color=figure_lib.INK, linewidth=1.1, zorder=4)
  style = {"linestyle": "none", "marker": "|", "markersize": 9, "color": figure_lib.INK}
  axes.plot([], [], label="Chance", **style)


def gap_closed(record: Mapping[str, Any], width: float = figure_lib.WIDTH) -> Any:
  """Draws the share of the gap closed against parameter exchanges.

  One-shot merges are points at one exchange. Curves need base and experts on the split of the
  rounds; without them, an ATM run is a point at its last round.
  """
  means, split = _means(record)
  base, experts = means.get("base"), means.get("experts")
  if base is None or experts is None or base == experts:
    return None
  curves = _exchange_curves(record, means, split)
  if not curves:
    return None
  closed = {n: 100 * (y - base) / (experts - base) for n, y in means.items()}
  shots = {n: y for n, y in closed.items() if label_lib.kind(n) == "one-shot"}
  palette = figure_lib.colors(label_lib.order({**means, **curves}))
  broken = figure_lib.DASHES["experts"]
  ends = [figure_lib.Mark(100.0, "Experts 100", figure_lib.INK, line=broken)]
  for name, (_, ys) in curves.items():
    text = f"{figure_lib.model(name)} {label_lib.share(ys[-1] / 100)}"
    ends.append(figure_lib.Mark(ys[-1], text, palette[name], lead=True))
  starts = [
    figure_lib.Mark(y, f"{figure_lib.model(n)} {label_lib.share(y / 100)}", palette[n], line="D")
    for n, y in shots.items()
  ]
  fig, axes = _graph(width)
  narrow = figure_lib.is_narrow(fig)
  what = f"Gap from base to experts closed, {split} (%)"
  figure_lib.dress(axes, "Gap closed against exchanges", "Parameter exchanges per task", what)
  figure_lib.fit(axes, [*shots.values(), *(y for _, ys in curves.values() for y in ys), 100.0], 0.0)
  figure_lib.settle(fig, axes, [] if narrow else [m.text for m in ends])
  _exchange_axis(
    fig, axes, [] if narrow else starts, max(2.0, *(x for xs, _ in curves.values() for x in xs))
  )
  axes.axhline(100, color=figure_lib.INK, linewidth=0.9, linestyle=broken, zorder=1)
  for name, (xs, ys) in curves.items():
    thick = 2.2 if name == "atm" else 1.6
    figure_lib.curve(axes, xs.tolist(), ys.tolist(), palette[name], linewidth=thick, zorder=3)
  for mark in starts:
    axes.plot([1], [mark.y], "D", color=mark.color, markersize=4.5, zorder=4)
  figure_lib.label_right(fig, axes, [*ends, *starts] if narrow else ends)
  if not narrow:
    figure_lib.label_left(fig, axes, 1.0, starts)
  return fig


def _exchange_curves(
  record: Mapping[str, Any], means: Mapping[str, float], split: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Exchanges and gap closed (%) of every ATM run, round by round where the splits agree."""
  base, experts = means["base"], means["experts"]
  curves = {}
  if split == rounds_split(record):
    for name, rounds in runs(record).items():
      xs, ys = figure_lib.column(rounds, "exchanges"), figure_lib.column(rounds, "mean")
      is_finite = np.isfinite(xs) & np.isfinite(ys)
      if is_finite.any():
        curves[name] = (xs[is_finite], 100 * (ys[is_finite] - base) / (experts - base))
  for name in means:
    exchanges = record["budget"].get(name, {}).get("exchanges")
    if label_lib.kind(name) == "loop" and name not in curves and exchanges is not None:
      share = 100 * (means[name] - base) / (experts - base)
      curves[name] = (np.array([float(exchanges)]), np.array([share]))
  return curves


def _exchange_axis(fig: Any, axes: Any, starts: Sequence[figure_lib.Mark], top: float) -> None:
  """Sets the x axis to 1 .. top, with room for the labels of the one-shot merges left of 1."""
  right, inside = 1 + 1.03 * (top - 1), axes.get_position().width * fig.get_size_inches()[0]
  room = max((figure_lib.text_width(fig, m.text) for m in starts), default=-0.3) + 0.4
  axes.set_xlim(1 - room * (right - 1) / (inside - room), right)
  figure_lib.whole_ticks(axes)
  # No tick close to 1, which must stay readable.
  axes.set_xticks([1, *(t for t in axes.get_xticks() if 1 + 0.05 * (top - 1) < t <= right)])
