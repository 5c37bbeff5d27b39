"""Tables, figures and files of how models differ from their base, from the record of `diff`."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any  # Any: a record is JSON, and Matplotlib is optional.

from jaxmerge.io.disk import atomic
from jaxmerge.report import figure_elements as figure_lib
from jaxmerge.report import tables, task_vector_plots
from jaxmerge.report.tables import Cell, Table

PAIRS = 6  # Up to this many cosines have a column each; beyond, their mean is shown.
FIGURES = ("cosines", "norms")


def text(record: Mapping[str, Any], width: int = 100) -> str:
  """Formats all tables for a terminal of `width` columns, the whole model last."""
  names = record["models"]
  several = ", sign conflicts, cosines" if len(names) > 1 else ""
  parts = [("By tensor: norms (in % of the base's)", groups(record["tensors"], names, brief=True))]
  if record["singular"]:
    title = f"Energy in the {record['top']} largest singular values (%)"
    parts.append((title, singular(record)))
  for kind in ("layer", "kind"):
    title = f"By {kind}: norms (in % of the base's){several}"
    parts.append((title, groups(record[f"{kind}s"], names)))
  parts.append(("Whole models", whole(record)))
  written = [f"{title}\n{tables.to_text(table, width)}" for title, table in parts]
  if len(names) > 1:
    conflict, size = percent(record["whole"]["sign_conflict"]), record["whole"]["entries"]
    written.append(f"Models disagree on the sign at {conflict} % of {size:,} entries.")
  if record["uncompared"]:
    written.append(f"Not compared, as they hold integers: {', '.join(record['uncompared'])}.")
  return "\n\n".join(written) + "\n"


def groups(
  entries: Mapping[str, Mapping[str, Any]], names: Sequence[str], *, brief: bool = False
) -> Table:
  """Returns a row per group: norms, sign conflicts, cosines between tasks; `brief`: norms only."""
  pairs = [] if brief else list(itertools.combinations(range(len(names)), 2))
  head, rows = ["", *names], []
  for group, measures in entries.items():
    sizes = [f"{measures['norms'][n]:.4g} ({percent(measures['relative'][n])})" for n in names]
    cosines = [measures["cosines"][i][j] for i, j in pairs]
    if len(pairs) > PAIRS:
      known = [x for x in cosines if x is not None]
      cosines = [sum(known) / len(known) if known else None]
    conflict = [percent(measures["sign_conflict"])] * bool(pairs)
    rows.append([Cell(x) for x in (group, *sizes, *conflict, *map(_cosine, cosines))])
  if pairs:
    head.append("Sign conflicts (%)")
    apart = [f"{names[i]} · {names[j]}" for i, j in pairs]
    head += apart if len(pairs) <= PAIRS else ["Mean cosine"]
  return Table(head, rows)


def whole(record: Mapping[str, Any]) -> Table:
  """Returns a row per model: its norm, and its cosines with the others."""
  measures, names = record["whole"], record["models"]
  several = len(names) > 1
  rows = [
    [name, f"{measures['norms'][name]:.4g}", percent(measures["relative"][name])]
    + [_cosine(x) for x in cosines] * several
    for name, cosines in zip(names, measures["cosines"], strict=True)
  ]
  head = ["Model", "Norm", "% of the base's", *names * several]
  return Table(head, [[Cell(x) for x in row] for row in rows])


def singular(record: Mapping[str, Any]) -> Table:
  """Returns a row per matrix: the share of each model's energy in its top singular values."""
  names = record["models"]
  rows = [
    [Cell(matrix), *(Cell(percent(by_model[n]["share"])) for n in names)]
    for matrix, by_model in record["singular"].items()
  ]
  return Table(["", *names], rows)


def percent(x: float | None) -> str:
  """Returns a share in percent, to three digits."""
  return "–" if x is None else f"{100 * x:#.3g}".rstrip(".")


def _cosine(x: float | None) -> str:
  # Adding zero turns -0 into 0.
  return "–" if x is None else f"{round(x, 3) + 0.0:.3f}"


# --- Figures ---


def figures(record: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the figures for which the record has data, by name."""
  figures_by_name = {"cosines": cosines(record), "norms": norms(record)}
  return {name: figure for name, figure in figures_by_name.items() if figure is not None}


def cosines(record: Mapping[str, Any], width: float = figure_lib.WIDTH) -> Any:
  """Draws the cosines between the task vectors of two models or more."""
  several = len(record["models"]) > 1
  return (
    task_vector_plots.matrices({"Whole model": record["whole"]["cosines"]}, record["models"], width)
    if several
    else None
  )


def norms(record: Mapping[str, Any], width: float = figure_lib.WIDTH) -> Any:
  """Draws the norms of task vectors over two layers or more, in % of the base's norms."""
  layers = {
    int(key): measures["relative"] for key, measures in record["layers"].items() if key.isdecimal()
  }
  if len(layers) < 2:
    return None
  curves = {n: 100 * figure_lib.column(list(layers.values()), n) for n in record["models"]}
  return task_vector_plots.lengths(
    list(layers), curves, "Layer", "Norm (L2, in % of the base's)", width
  )


def write(record: Mapping[str, Any], folder: str | pathlib.Path) -> list[pathlib.Path]:
  """Writes NAME.png of all figures and diff.json into a folder, and returns their paths.

  Figures are drawn before anything is written; outdated figures of an earlier record are
  removed.
  """
  drawn = {f"{name}.png": figure_lib.png(figure) for name, figure in figures(record).items()}
  files = {**drawn, "diff.json": (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()}
  home = pathlib.Path(folder)
  for name in FIGURES:
    if f"{name}.png" not in drawn:
      (home / f"{name}.png").unlink(missing_ok=True)
  for name, data in files.items():
    with atomic.write(home / name) as file:
      file.write(data)
  return [home / name for name in files]
