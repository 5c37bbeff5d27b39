"""The figures of a diff page: by layer, kind and module, and spectra."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple  # Any: a record is JSON, and Matplotlib is optional.

import numpy as np

from jaxmerge.io.tensors import layer_names
from jaxmerge.report import diff_text, task_vector_plots, vector
from jaxmerge.report import figure_elements as figures

PAIRS = 6  # Up to this many pairs of models have a curve each; beyond, the mean is drawn.
PANELS = 4  # Up to this many models have a map each.
MODULES = 40  # The most rows of a map.


class Map(NamedTuple):
  """Measures by module (row) and layer (column); NaN where a layer lacks the module.

  Attributes:
    modules: names of tensors, with a star for each number in them.
    layers: layer numbers.
    relative: norms of task vectors over the base's, [models, modules, layers].
    cosine: mean cosine over pairs of models, [modules, layers].
  """

  modules: list[str]
  layers: list[int]
  relative: np.ndarray
  cosine: np.ndarray


def drawings(record: Mapping[str, Any], spectra: Mapping[str, Any]) -> dict[str, vector.Drawing]:
  """Returns the figures for which the record has data, by name."""
  grid = modules(record)
  drawn = {
    "norms": lambda width: diff_text.norms(record, width),
    "cosines": lambda width: diff_text.cosines(record, width),
    "cosines by layer": lambda width: cosines(record, width),
    "sign conflicts": lambda width: sign_conflicts(record, width),
    "kinds": lambda width: kinds(record, width),
    "norms by module": lambda width: norm_map(record, grid, width),
    "cosines by module": lambda width: cosine_map(record, grid, width),
    "spectra": lambda width: spectrum(record, spectra, width),
  }
  drawings = {name: vector.drawing(make, name) for name, make in drawn.items()}
  return {name: drawing for name, drawing in drawings.items() if drawing is not None}


def _layers(record: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
  return {int(key): value for key, value in record["layers"].items() if key.isdecimal()}


def _pairs(record: Mapping[str, Any]) -> list[tuple[int, int]]:
  return list(itertools.combinations(range(len(record["models"])), 2))


def cosines(record: Mapping[str, Any], width: float) -> Any:
  """Draws the cosine of each pair of models by layer; for many pairs, their mean."""
  layers, pairs, names = _layers(record), _pairs(record), record["models"]
  if len(layers) < 2 or not pairs:
    return None
  curves = {
    f"{names[i]} · {names[j]}": figures.numbers([x["cosines"][i][j] for x in layers.values()])
    for i, j in pairs
  }
  if len(pairs) > PAIRS:
    curves = {"Mean of all pairs": np.mean(list(curves.values()), axis=0)}
  title = "Cosines by layer"
  return task_vector_plots.lengths(
    list(layers), curves, "Layer", "Cosine", width, title=title, floor=None
  )


def sign_conflicts(record: Mapping[str, Any], width: float) -> Any:
  """Draws the share of entries with a sign conflict by layer."""
  layers = _layers(record)
  if len(layers) < 2 or not _pairs(record):
    return None
  curves = {"In conflict": 100 * figures.column(list(layers.values()), "sign_conflict")}
  title, y = "Sign conflicts by layer", "Entries in conflict (%)"
  return task_vector_plots.lengths(list(layers), curves, "Layer", y, width, title=title)


def kinds(record: Mapping[str, Any], width: float) -> Any:
  """Draws the norms of task vectors, in % of the base's, as a group of bars per tensor kind."""
  names, groups = record["models"][: len(figures.SERIES)], record["kinds"]
  pitch = 0.135 * len(names) + 0.16
  starts = np.arange(len(groups)) * pitch
  fig, axes = figures.figure(len(groups) * pitch + 1.05, width=width)
  figures.dress(axes, "", "Norm (L2, in % of the base's)", "")
  for i, name in enumerate(names):
    values = 100 * figures.numbers([g["relative"][name] for g in groups.values()])
    places = starts + 0.135 * i
    axes.barh(places, values, 0.116, color=figures.SERIES[i], label=figures.model(name))
    for y, x in zip(places, values, strict=True):
      if np.isfinite(x):
        style = {"fontsize": 7, "va": "center_baseline", "color": figures.INK}
        axes.annotate(f"{x:#.3g}", (x, y), (3, 0), textcoords="offset points", **style)
  axes.margins(x=0.12)
  axes.set_yticks(starts + 0.135 * (len(names) - 1) / 2, list(groups))
  axes.tick_params(axis="y", length=0, labelcolor=figures.INK)
  axes.grid(visible=False, axis="y")
  axes.grid(axis="x", color=figures.GRID, linewidth=0.6)
  axes.set_ylim(starts[-1] + 0.135 * (len(names) - 0.3), -0.1)
  left = max(figures.text_width(fig, t) for t in groups) + 0.15
  figures.headline(fig, "By kind of tensor")
  more = (figures.legend(fig, axes, 0.34) - 1) * figures.LINE
  figures.grow(fig, more)
  figures.set_edges(fig, left, 0.1, 0.48, 0.59 + more)
  return fig


def modules(record: Mapping[str, Any]) -> Map:
  """Sums the measures of tensors by module and layer."""
  sums: dict[tuple[str, int], tuple[np.ndarray, float]] = {}
  names = record["models"]
  for name, measures in record["tensors"].items():
    if key := _module(name):
      norms = np.array([measures["norms"][n] for n in names])
      cosine = np.array([figures.numbers(row) for row in measures["cosines"]])
      gram = np.nan_to_num(cosine) * np.outer(norms, norms)
      np.fill_diagonal(gram, norms**2)
      other, base = sums.get(key, (0.0, 0.0))
      sums[key] = gram + other, base + measures["base_norm"] ** 2
  rows = list(dict.fromkeys(module for module, _ in sums))
  columns = sorted({layer for _, layer in sums})
  relative = np.full((len(names), len(rows), len(columns)), np.nan)
  cosine = np.full((len(rows), len(columns)), np.nan)
  upper = np.triu_indices(len(names), 1)
  for (module, layer), (gram, base) in sums.items():
    place = rows.index(module), columns.index(layer)
    norms = np.sqrt(gram.diagonal())
    with np.errstate(invalid="ignore", divide="ignore"):
      relative[:, *place] = norms / np.sqrt(base) if base else np.nan
      values = (gram / np.outer(norms, norms))[upper]
    cosine[place] = values.mean() if len(values) else np.nan
  return Map(rows, columns, relative, cosine)


def _module(name: str) -> tuple[str, int] | None:
  """Returns the name of a tensor with a star for each number, and its layer; None outside."""
  at = layer_names.layer_of_path(name)
  stack, layer, rest = at or ("", None, name)
  separator = "." if at is None else "/"
  parts = rest.split(separator)
  numbers = [layer] if layer is not None else [int(part) for part in parts if part.isdecimal()]
  if not numbers:
    return None
  stars = separator.join("*" if part.isdecimal() else part for part in parts)
  return (stars if at is None else f"{stack}*/{stars}".rstrip("/")), numbers[0]


def norm_map(record: Mapping[str, Any], grid: Map, width: float) -> Any:
  """Draws the norms of task vectors by module and layer, one map per model or the mean of many."""
  if len(grid.layers) < 2:
    return None
  names = record["models"]
  if len(names) > PANELS:
    panels = {"Root mean square of all models": np.sqrt(np.mean(grid.relative**2, axis=0))}
  else:
    panels = dict(zip(map(figures.model, names), grid.relative, strict=True))
  panels = {name: 100 * values for name, values in panels.items()}
  return _maps("Norms by module (% of the base's)", panels, grid, width)


def cosine_map(record: Mapping[str, Any], grid: Map, width: float) -> Any:
  """Draws cosines by module and layer, averaged over pairs of models."""
  if len(grid.layers) < 2 or not _pairs(record):
    return None
  several = len(record["models"]) > 2
  panels = {"Mean over pairs" if several else "": grid.cosine}
  return _maps("Cosines by module", panels, grid, width, signed=True)


def _maps(
  title: str, panels: Mapping[str, np.ndarray], grid: Map, width: float, *, signed: bool = False
) -> Any:
  """Draws maps of modules and layers below each other, on a common colour scale."""
  labels = _labels(grid.modules[:MODULES], 18 if width < figures.WIDTH else 34)
  probe = figures.figure(1.0)[0]
  left = max(figures.text_width(probe, text, 7) for text in labels) + 0.15
  tall = 0.16 * len(labels)
  height = 0.75 + len(panels) * (tall + 0.3) + 0.3
  fig, plots = figures.figure(height, columns=len(panels), width=width)
  known = np.concatenate([values[: len(labels)].ravel() for values in panels.values()])
  top = float(np.nanmax(np.abs(known))) if np.isfinite(known).any() else 1.0
  top = float(f"{top or 1.0:.2g}")
  scale = task_vector_plots.through_zero() if signed else task_vector_plots.from_zero()
  edges = [*(np.array(grid.layers) - 0.5), grid.layers[-1] + 0.5]
  for i, (axes, (name, values)) in enumerate(zip(plots, panels.items(), strict=True)):
    shown = np.ma.masked_invalid(values[: len(labels)])
    places = np.arange(len(labels) + 1) - 0.5
    image = axes.pcolormesh(edges, places, shown, cmap=scale, vmin=-top if signed else 0, vmax=top)
    axes.invert_yaxis()
    below = 0.45 + (len(panels) - 1 - i) * (tall + 0.3)
    figures.place(fig, axes, (left, below, width - left - 0.12, tall))
    axes.set_title(name, loc="left", fontsize=9, color=figures.INK, pad=4)
    axes.set_yticks(range(len(labels)), labels)
    figures.whole_ticks(axes)
    axes.tick_params(labelsize=figures.SIZE, colors=figures.SOFT, length=2, width=0.6)
    axes.tick_params(axis="y", labelsize=7, length=0, labelcolor=figures.INK)
    axes.tick_params(axis="x", labelbottom=i == len(panels) - 1)
    axes.spines[:].set_visible(False)
  if len(labels) < len(grid.modules):
    title += f", {len(labels)} of {len(grid.modules)}"
  plots[-1].set_xlabel("Layer", fontsize=figures.SIZE, color=figures.INK)
  figures.headline(fig, title)
  task_vector_plots.color_bar(fig, image, (width - 1.65, height - 0.42))
  return fig


def _labels(names: Sequence[str], length: int) -> list[str]:
  """Returns names without their common first and last parts."""
  separator = "/" if any("/" in name for name in names) else "."
  parts = [name.split(separator) for name in names]
  while len(parts) > 1 and len({p[0] for p in parts}) == 1 and min(map(len, parts)) > 1:
    parts = [p[1:] for p in parts]
  while len(parts) > 1 and len({p[-1] for p in parts}) == 1 and min(map(len, parts)) > 1:
    parts = [p[:-1] for p in parts]
  short = [separator.join(p) for p in parts]
  return [figures.literal(x if len(x) <= length else f"…{x[1 - length :]}") for x in short]


def spectrum(record: Mapping[str, Any], spectra: Mapping[str, Any], width: float) -> Any:
  """Draws the share of energy in the largest singular values, a line per matrix and model."""
  lines = [
    (i, 100 * np.cumsum(np.square(measured["values"])) / measured["energy"])
    for matrix in spectra.values()
    for i, name in enumerate(record["models"][: len(figures.SERIES)])
    if (measured := matrix["models"][name])["energy"] > 0
  ]
  if not lines:
    return None
  fig, axes = figures.figure(3.3, width=width)
  title, y = "Spectra of task vectors", "Energy in the largest (%)"
  figures.dress(axes, "", "Singular values", y if width == figures.WIDTH else "")
  named: set[int] = set()
  for i, shares in lines:
    label = None if i in named else figures.model(record["models"][i])
    named.add(i)
    color = figures.SERIES[i]
    axes.plot(range(1, len(shares) + 1), shares, color=color, linewidth=1.1, label=label)
  axes.set_xscale("log", base=2)
  most = max(len(shares) for _, shares in lines)
  ticks = [2**i for i in range(12) if 2**i <= most]
  axes.set_xticks(ticks, [str(x) for x in ticks])
  axes.set_xticks([], minor=True)
  axes.set_ylim(0, 102)
  wide = width == figures.WIDTH
  figures.headline(fig, title, "" if wide else y)
  down = 0.34 if wide else 0.5
  more = (figures.legend(fig, axes, down) - 1) * figures.LINE
  figures.grow(fig, more)
  figures.set_edges(fig, 0.7 if wide else 0.45, 0.12, 0.48, down + 0.25 + more)
  return fig
