"""Figures with direct labels: colours, axes, labels that do not overlap, PNG bytes.

A figure of width `NARROW` is for a phone: labels stand below the axes, and not beside them.
Matplotlib is imported when a figure is drawn, through its Figure class: no window, no global state.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: Matplotlib is optional.

import numpy as np

from jaxmerge import display
from jaxmerge.report import labels

WIDTH = 6.2  # inches: 8 points are 12 px where a page shows a figure 700 px wide
NARROW = 3.5  # inches: 8 points are 11 px on a phone
DPI = 200
SIZE = 8.0  # points, of all text but titles
LINE = 0.17  # inches between the lines of a legend
_LEFT = 0.52  # inches left of the axes of a narrow figure, for tick labels
PAGE, INK, SOFT, GRID = "#ffffff", "#222222", "#666666", "#e3e3e3"
POSITIVE, NEGATIVE = "#e08214", "#8073ac"  # of a scale through zero: ink is legible on both
# Okabe and Ito's palette for colour-blind readers; grey and black for references.
COLORS = {
  "base": "#8a8a8a",
  "experts": "#111111",
  "multitask": "#5c5c5c",
  "average": "#56b4e9",
  "task_arithmetic": "#e69f00",
  "ties": "#009e73",
  "dare": "#cc79a7",
  "breadcrumbs": "#882255",
  "atm": "#0072b2",
}
# Wide black areas would dominate the merges.
BARS = {"base": "#c4c4c4", "multitask": "#999999", "experts": "#555555"}
_MORE = ("#d55e00", "#332288", "#999933", "#44aa99", "#aa4499", "#661100")
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#111111", "#882255")
DASHES: Mapping[str, Any] = {"base": (0, (4, 2)), "experts": (0, (4, 2)), "multitask": (0, (1, 1))}


class Mark(NamedTuple):
  """A label beside a point: its height in data units, its words, its colour, whether it leads.

  `line` is the line style of what it labels, or "D" for a diamond.
  """

  y: float
  text: str
  color: str
  lead: bool = False
  line: Any = "solid"


def figure(height: float, columns: int = 0, width: float = WIDTH) -> tuple[Any, Any]:
  """Returns an empty figure and its axes, a list for `columns`; sizes are in inches."""
  try:
    figures = importlib.import_module("matplotlib.figure")
    agg = importlib.import_module("matplotlib.backends.backend_agg")
  except ImportError as error:
    raise ImportError(f'plots need Matplotlib: pip install "jaxmerge[demo]" ({error}).') from error
  fig = figures.Figure(figsize=(width, height), dpi=DPI, facecolor="white")
  agg.FigureCanvasAgg(fig)
  axes = fig.subplots(1, columns or 1, squeeze=False)[0]
  return fig, list(axes) if columns else axes[0]


def is_narrow(fig: Any) -> bool:
  """Returns whether the figure is for a phone."""
  return bool(fig.get_size_inches()[0] < 0.75 * WIDTH)


def place(fig: Any, axes: Any, box: tuple[float, float, float, float]) -> None:
  """Puts axes at (left, bottom, width, height) in inches."""
  width, height = fig.get_size_inches()
  left, bottom, wide, tall = box
  axes.set_position((left / width, bottom / height, wide / width, tall / height))


def headline(fig: Any, text: str, below: str = "") -> None:
  """Writes the title of a whole figure in its upper left corner, and lines below it."""
  transforms = importlib.import_module("matplotlib.transforms")

  def write(words: str, down: float, **style: Any) -> None:
    shift = transforms.ScaledTranslation(7 / 72, -down / 72, fig.dpi_scale_trans)
    fig.text(0, 1, words, va="top", transform=fig.transFigure + shift, **style)

  write(text, 7, fontsize=10, fontweight="bold", color=INK)
  for i, line in enumerate(below.splitlines()):
    write(line, 22 + 10.5 * i, fontsize=SIZE, color=SOFT)


def grow(fig: Any, inches: float) -> None:
  """Makes a figure higher."""
  width, height = fig.get_size_inches()
  fig.set_size_inches(width, height + inches)


def png(fig: Any) -> bytes:
  """Returns the figure as deterministic PNG bytes."""
  buffer = io.BytesIO()
  fig.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
  return buffer.getvalue()


def colors(names: Sequence[str]) -> dict[str, str]:
  """Returns the colour of every model; those without a fixed colour take the free ones."""
  others = [n for n in names if n not in COLORS]
  fixed = {n: COLORS[n] for n in names if n in COLORS}
  return fixed | {n: _MORE[i % len(_MORE)] for i, n in enumerate(others)}


def dashes(name: str) -> Any:
  """Returns the line style of a model: solid for merges, dashed for references."""
  head = name.split("_")[0]
  return DASHES.get(head, "solid") if labels.kind(name) == "reference" else "solid"


def literal(x: str) -> str:
  """Returns a name for a figure: on one line, and never parsed as a formula."""
  return display.name(" ".join(x.split())).replace("$", "\\$")


def names(tasks: Sequence[str], length: int = 24) -> dict[str, str]:
  """Returns short, distinct names of tasks for figures."""
  return {task: literal(text) for task, text in labels.shorts(tasks, length).items()}


def model(name: str) -> str:
  """Returns the name of a model for figures."""
  return literal(labels.short(labels.label(name), 20))


def curve(axes: Any, xs: Sequence[float], ys: Sequence[float], color: str, **style: Any) -> None:
  """Draws a curve, with markers where points are few, and a faint line to its label."""
  dot = 3.5 if len(xs) <= 25 else 0.0
  axes.plot(xs, ys, color=color, marker="o", markersize=dot, solid_capstyle="round", **style)
  known = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
  (x, y), right = known[-1], axes.get_xlim()[1]
  axes.plot([x, right], [y, y], color=color, linewidth=0.8, linestyle=(0, (1, 2.5)), zorder=1.4)


def dress(axes: Any, title: str, x: str, y: str) -> None:
  """Gives axes their title, axis titles, quiet spines and a light grid.

  In a narrow figure the y title is a line below the title: turned, it would not fit.
  """
  if is_narrow(axes.figure):
    headline(axes.figure, title, y)
  else:
    axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold", pad=8)
    axes.set_ylabel(y, fontsize=SIZE, color=INK)
  axes.set_xlabel(x, fontsize=SIZE, color=INK)
  axes.tick_params(labelsize=SIZE, colors=SOFT, length=3, width=0.6)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  for side in ("left", "bottom"):
    axes.spines[side].set_color(SOFT)
    axes.spines[side].set_linewidth(0.6)
  axes.grid(axis="y", color=GRID, linewidth=0.6)
  axes.set_axisbelow(True)


def whole_ticks(axes: Any) -> None:
  """Places ticks of the x axis at integers only."""
  ticker = importlib.import_module("matplotlib.ticker")
  axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=10, integer=True, min_n_ticks=1))


def span(axes: Any, xs: Sequence[float]) -> None:
  """Sets the x range to integers with a margin; a single point is centred."""
  low, high = min(xs), max(xs)
  air = 0.03 * (high - low) if high > low else 0.5
  axes.set_xlim(low - air, high + air)
  whole_ticks(axes)


def fit(axes: Any, ys: Sequence[float], floor: float | None = None) -> None:
  """Sets the y range to the values with a margin, from `floor` if set."""
  low, high = min(ys), max(ys)
  if floor is not None:
    low = min(low, floor)
  air = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
  axes.set_ylim(low if low == floor else low - air, high + air)


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
  """Moves values as little as possible (least squares) to keep neighbours `gap` apart.

  The order stays, and all are within [low, high]; where they do not fit, the gap shrinks.

  >>> spread([1.0, 1.0, 5.0], 1.0, 0.0, 9.0)
  [0.5, 1.5, 5.0]
  """
  count = len(values)
  if count > 1:
    gap = min(gap, (high - low) / (count - 1))
  order = sorted(range(count), key=lambda i: values[i])
  # With z_i = y_i - i * gap the condition is that z rises: isotonic regression, by pooling.
  pools: list[tuple[float, int]] = []
  for place, i in enumerate(order):
    mean, size = values[i] - place * gap, 1
    while pools and pools[-1][0] >= mean:
      other, number = pools.pop()
      mean, size = (mean * size + other * number) / (size + number), size + number
    pools.append((mean, size))
  rising = [mean for mean, size in pools for _ in range(size)]
  top = high - (count - 1) * gap
  result = [0.0] * count
  for place, i in enumerate(order):
    result[i] = min(max(rising[place], low), max(top, low)) + place * gap
  return result


def settle(fig: Any, axes: Any, right: Sequence[str] = (), left: float = 0.7) -> None:
  """Fixes the position of the axes in inches, with room on the right for the longest label."""
  room = max((text_width(fig, t) for t in right), default=0.0) + (0.34 if right else 0.1)
  narrow = is_narrow(fig)
  if narrow and left == 0.7:
    left = _LEFT
  set_edges(fig, left, room, 0.48, 0.52 if narrow else 0.36)


def set_edges(fig: Any, left: float, right: float, below: float, above: float) -> None:
  """Puts all axes between margins in inches."""
  width, height = fig.get_size_inches()
  edges = {"left": left / width, "right": 1 - right / width}
  fig.subplots_adjust(**edges, bottom=below / height, top=1 - above / height)


def text_width(fig: Any, text: str, size: float = SIZE) -> float:
  """Returns the width of a text in inches, drawn bold to be safe."""
  probe = fig.text(0, 0, text, fontsize=size, fontweight="bold")
  width = probe.get_window_extent(fig.canvas.get_renderer()).width / fig.dpi
  probe.remove()
  return float(width)


def label_right(fig: Any, axes: Any, marks: Sequence[Mark]) -> None:
  """Writes labels right of the axes, each joined to its height; in a narrow figure, below."""
  if is_narrow(fig):
    _label_below(fig, axes, marks)
    return
  settle(fig, axes, [m.text for m in marks])
  width = axes.get_position().width * fig.get_size_inches()[0]
  for mark, y in _spread(fig, axes, marks):
    near, far = 1 + 0.03 / width, 1 + 0.2 / width
    axes.plot(
      [near, far],
      [mark.y, y],
      transform=axes.get_yaxis_transform(),
      color=mark.color,
      linewidth=0.9,
      clip_on=False,
    )
    _write(axes, 1 + 0.24 / width, y, mark, "left", axes.get_yaxis_transform())


def _label_below(fig: Any, axes: Any, marks: Sequence[Mark]) -> None:
  """Writes labels below the axes, the highest first, in two columns where they are short."""
  room, swatch = 0.1, 0.3  # inches
  widest = max(text_width(fig, m.text) for m in marks) + swatch + 0.1
  columns = 2 if 2 * widest <= NARROW - 2 * room else 1
  lines = math.ceil(len(marks) / columns)
  grow(fig, lines * LINE + 0.05)
  set_edges(fig, _LEFT, room, 0.48 + lines * LINE + 0.05, 0.52)
  width, height = fig.get_size_inches()
  for i, mark in enumerate(sorted(marks, key=lambda m: -m.y)):
    column, line = divmod(i, lines)
    x = room + column * (NARROW / 2 - room / 2)
    y = (lines - line - 0.5) * LINE + 0.06
    diamond = mark.line == "D"
    xs = [x + swatch / 2 - 0.04] if diamond else [x, x + swatch - 0.08]
    style = {"marker": "D", "markersize": 4.5} if diamond else {"linestyle": mark.line}
    axes.plot(
      [x / width for x in xs],
      [y / height] * len(xs),
      transform=fig.transFigure,
      color=mark.color,
      linewidth=2.2 if mark.lead else 1.4,
      clip_on=False,
      **style,
    )
    _write(axes, (x + swatch) / width, y / height, mark, "left", fig.transFigure)


def label_left(fig: Any, axes: Any, x: float, marks: Sequence[Mark]) -> None:
  """Writes labels left of the points at `x`, without overlaps, each connected to its point."""
  inch = (axes.get_xlim()[1] - axes.get_xlim()[0]) / (
    axes.get_position().width * fig.get_size_inches()[0]
  )
  for mark, y in _spread(fig, axes, marks):
    axes.plot([x - 0.24 * inch, x], [y, mark.y], color=mark.color, linewidth=0.7, zorder=1.5)
    _write(axes, x - 0.28 * inch, y, mark, "right", axes.transData)


def _spread(fig: Any, axes: Any, marks: Sequence[Mark]) -> Iterator[tuple[Mark, float]]:
  low, high = axes.get_ylim()
  tall = axes.get_position().height * fig.get_size_inches()[1] * 72  # points
  line = 1.3 * SIZE * (high - low) / tall
  places = spread([m.y for m in marks], line, low + line / 3, high - line / 3)
  return zip(marks, places, strict=True)


def _write(axes: Any, x: float, y: float, mark: Mark, side: str, transform: Any) -> None:
  axes.text(
    x,
    y,
    mark.text,
    transform=transform,
    fontsize=SIZE,
    color=mark.color if mark.lead else INK,
    fontweight="bold" if mark.lead else "normal",
    ha=side,
    va="center_baseline",
    clip_on=False,
  )


def legend(fig: Any, axes: Any, down: float) -> int:
  """Writes the legend `down` inches below the top of the figure, and returns its lines."""
  handles, texts = axes.get_legend_handles_labels()
  wide = [text_width(fig, t) + 0.3 for t in texts]
  width, height = fig.get_size_inches()
  lines = 1
  while lines < len(wide) and _columns(wide, lines) > width - 0.1:
    lines += 1
  middle = down + 0.06 + (lines - 1) * LINE / 2
  fig.legend(
    handles,
    texts,
    loc="center left",
    bbox_to_anchor=(0.06 / width, 1 - middle / height),
    ncols=math.ceil(len(wide) / lines),
    fontsize=SIZE,
    frameon=False,
    borderaxespad=0,
    borderpad=0.2,
    handlelength=1.0,
    handleheight=0.8,
    columnspacing=1.3,
    labelcolor=INK,
  )
  return lines


def _columns(wide: Sequence[float], lines: int) -> float:
  """Returns the width of a legend whose columns have so many lines."""
  return sum(max(wide[i : i + lines]) for i in range(0, len(wide), lines))


def numbers(values: Sequence[float | None]) -> np.ndarray:
  """Returns values as an array, NaN for None."""
  return np.array([np.nan if x is None else x for x in values], dtype=float)


def column(rounds: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
  """Returns one number of every round, NaN where it is missing."""
  return numbers([r.get(key) for r in rounds])
