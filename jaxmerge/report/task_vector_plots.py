"""Plots of task vectors: matrices of cosines, and norms and sign conflicts over rounds."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any  # Any: a record is JSON, and Matplotlib is optional.

import numpy as np

from jaxmerge.report import figure_elements as figures


def cosines(record: Mapping[str, Any], width: float = figures.WIDTH) -> Any:
  """Draws the cosines between task vectors in the first and the last round."""
  known = [r for r in record["rounds"] if r.get("cosines") is not None]
  tasks = record["tasks"]
  if not known or len(tasks) < 2:
    return None
  chosen = known if len(known) == 1 else [known[0], known[-1]]
  return matrices({f"Round {r['round']}": r["cosines"] for r in chosen}, tasks, width)


def matrices(cosines: Mapping[str, Any], tasks: Sequence[str], width: float = figures.WIDTH) -> Any:
  """Draws titled matrices of cosines between the task vectors of two or more tasks."""
  grids = [np.array(grid, dtype=float) for grid in cosines.values()]
  hidden = np.eye(len(tasks), dtype=bool)
  limit = max(np.max(np.abs(np.where(hidden | np.isnan(g), 0.0, g))) for g in grids)
  # A floor, so that small cosines look small.
  limit = max(float(np.ceil(limit * 10) / 10), 0.4)
  narrow = width < figures.WIDTH
  labels = list(figures.names(tasks, 14 if narrow else 20).values())
  widest = max(figures.text_width(figures.figure(1.0)[0], t) for t in labels)
  left, below = widest + 0.15, 0.75 * widest + 0.2  # inches, for row and column names
  # Many tasks: one matrix above the other, so that cells stay legible.
  across = 1 if narrow or len(tasks) > 9 else len(grids)
  side = min((width - left - 0.2 * across) / across, 0.62 * len(tasks))
  down = len(grids) // across
  height = down * (side + 0.35) + (down - 1) * 0.1 + below + (0.53 if narrow else 0.38)
  fig, plots = figures.figure(height, columns=len(grids), width=width)
  for i, (axes, title, grid) in enumerate(zip(plots, cosines, grids, strict=True)):
    shown = np.ma.masked_array(grid, hidden | np.isnan(grid))
    edges = np.arange(len(tasks) + 1) - 0.5
    image = axes.pcolormesh(edges, edges, shown, cmap=through_zero(), vmin=-limit, vmax=limit)
    axes.invert_yaxis()
    column, row = i % across, i // across
    corner = (left + column * (side + 0.2), below + (down - 1 - row) * (side + 0.45))
    figures.place(fig, axes, (*corner, side, side))
    axes.set_title(title, loc="left", fontsize=9, color=figures.INK)
    axes.set_xticks(range(len(tasks)), labels if row == down - 1 else [""] * len(tasks))
    axes.tick_params(axis="x", labelrotation=45)
    for text in axes.get_xticklabels():
      text.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(tasks)), labels if column == 0 else [""] * len(tasks))
    axes.tick_params(labelsize=figures.SIZE, length=0, labelcolor=figures.INK)
    axes.spines[:].set_visible(False)
    _numbers(axes, grid, side / len(tasks))
  figures.headline(fig, "Cosines between task vectors")
  color_bar(fig, image, (width - 1.6, height - (0.42 if narrow else 0.2)))
  return fig


def _numbers(plot: Any, grid: np.ndarray, cell: float) -> None:
  """Writes numbers into cells that are large enough to read them."""
  size = min(figures.SIZE, 72 * cell / 2.6)
  if size < 5.5:
    return
  for i, j in np.ndindex(*grid.shape):
    if not np.isfinite(grid[i, j]):
      continue
    rounded = round(float(grid[i, j]), 2) + 0.0  # no negative zero
    text = "1" if i == j else f"{rounded:.2f}".replace("0.", ".").replace("-", "−")
    color = figures.SOFT if i == j else figures.INK
    plot.text(j, i, text, ha="center", va="center", fontsize=size, color=color)


def through_zero() -> Any:
  """Returns a scale of colours that fade to nothing at zero, on a page of any colour."""
  colors = importlib.import_module("matplotlib.colors")
  shares = np.linspace(-1.0, 1.0, 41)
  ends = {True: figures.POSITIVE, False: figures.NEGATIVE}
  return colors.ListedColormap([colors.to_rgba(ends[s > 0], 0.95 * abs(s)) for s in shares])


def from_zero() -> Any:
  """Returns a scale of one colour that fades to nothing at zero."""
  colors = importlib.import_module("matplotlib.colors")
  shares = np.linspace(0.0, 0.95, 41)
  return colors.ListedColormap([colors.to_rgba(figures.POSITIVE, s) for s in shares])


def color_bar(fig: Any, image: Any, corner: tuple[float, float]) -> None:
  """Adds a thin horizontal scale for cells, from its lower left corner in inches."""
  bar = fig.add_axes([0, 0, 1, 1])
  figures.place(fig, bar, (*corner, 1.45, 0.09))
  low, high = image.norm.vmin, image.norm.vmax
  edges = np.linspace(low, high, 42)
  bar.pcolormesh(edges, [0, 1], (edges[None, 1:] + edges[None, :-1]) / 2, cmap=image.cmap)
  bar.tick_params(labelsize=7, length=2, pad=1.5, colors=figures.SOFT)
  bar.set_yticks([])
  bar.set_xticks([low, 0, high] if low < 0 else [low, high])
  bar.spines[:].set_visible(False)


def norms(record: Mapping[str, Any], width: float = figures.WIDTH) -> Any:
  """Draws the norm of each task vector over rounds."""
  rounds = [r for r in record["rounds"] if r.get("norms")]
  if not rounds:
    return None
  curves = {task: figures.column([r["norms"] for r in rounds], task) for task in record["tasks"]}
  xs = [r["round"] for r in rounds]
  return lengths(xs, curves, "Round", "Norm (L2, in units of the weights)", width)


def lengths(
  xs: Sequence[float],
  curves: Mapping[str, np.ndarray],
  x: str,
  y: str,
  width: float = figures.WIDTH,
  *,
  title: str = "Length of the task vectors",
  floor: float | None = 0.0,
) -> Any:
  """Draws a curve per task, labelled on the right with its name and last value."""
  tall = max(3.4, 0.17 * len(curves) + 1.2) if width == figures.WIDTH else 2.7
  fig, axes = figures.figure(tall, width=width)
  figures.span(axes, xs)
  labels = figures.names(list(curves))
  marks, heights = [], []
  for i, (task, ys) in enumerate(curves.items()):
    if not np.isfinite(ys).any():
      continue
    turn, place = divmod(i, len(figures.SERIES))
    color, style = figures.SERIES[place], ("solid", (0, (4, 1.5)), (0, (1, 1)))[turn % 3]
    figures.curve(axes, xs, ys.tolist(), color, linewidth=1.6, linestyle=style)
    last = float(ys[np.isfinite(ys)][-1])
    number = f"{last:#.3g}".rstrip(".")
    marks.append(figures.Mark(last, f"{labels[task]} {number}", color, line=style))
    heights += ys[np.isfinite(ys)].tolist()
  if not marks:
    return None
  figures.dress(axes, title, x, y)
  figures.fit(axes, heights, floor=floor)
  figures.label_right(fig, axes, marks)
  return fig


def sign_conflict(record: Mapping[str, Any], width: float = figures.WIDTH) -> Any:
  """Draws the share of entries with a sign conflict between tasks, over rounds."""
  rounds = [r for r in record["rounds"] if r.get("sign_conflict") is not None]
  if not rounds or len(record["tasks"]) < 2:
    return None
  xs = [r["round"] for r in rounds]
  ys = 100 * figures.column(rounds, "sign_conflict")
  fig, axes = figures.figure(2.8, width=width)
  color = figures.COLORS["atm"]
  figures.span(axes, xs)
  figures.curve(axes, xs, ys.tolist(), color, linewidth=2.0)
  figures.dress(axes, "Sign conflicts between tasks", "Round", "Entries in conflict (%)")
  figures.fit(axes, ys.tolist(), floor=0.0)
  last = f"{'Last round ' if figures.is_narrow(fig) else ''}{ys[-1]:.1f}"
  figures.label_right(fig, axes, [figures.Mark(ys[-1], last, color, lead=True)])
  return fig
