"""The diff of models and their base as one HTML file, with figures and tables."""

from __future__ import annotations

import html as entities
import os
import pathlib
from collections.abc import Mapping
from typing import Any  # A record is JSON, its values have no one type.

import numpy as np

from jaxmerge.io.disk import atomic
from jaxmerge.report import diff_figures, diff_text, page
from jaxmerge.report.tables import Cell, Table

ROWS = 20  # The most tensors in a table.
DIRECTIONS = 16  # Number of singular values for the energy column.

_CAPTIONS = {
  "norms": "How far each model moved from the base, by layer.",
  "cosines": "Similarity of two task vectors: 1 is the same direction, 0 unrelated, -1 opposite.",
  "cosines by layer": "The same by layer; far from 0, models share a direction.",
  "sign conflicts": "Entries that some models raise and others lower. With unrelated task vectors, "
  "half of the entries conflict between two models, three quarters between three.",
  "kinds": "How far each model moved, by kind of tensor. Norms and biases are small, so a large "
  "percentage may be a small change.",
  "norms by module": "A row is a module, a column a layer; the stronger the colour, the further "
  "from the base.",
  "cosines by module": "Orange: models agree; violet: they oppose; no colour: unrelated.",
  "spectra": "A line is a matrix of a model. The steeper it is, the fewer directions tuning used. "
  "The lines of LoRA reach 100 % at its rank.",
}


def html(record: Mapping[str, Any], spectra: Mapping[str, Any]) -> str:
  """Returns the page as HTML.

  Args:
    record: the result of `diff.compare`.
    spectra: the result of `spectra.measure` for the same models; may be empty.
  """
  names = record["models"]
  drawings = diff_figures.drawings(record, spectra)
  drawn = "".join(page.figure(d, name, _CAPTIONS[name]) for name, d in drawings.items())
  sections = [
    f"<header><h1>{entities.escape(_title(record))}</h1>",
    f'<p class="summary">{entities.escape(sentence(record))}</p></header>',
    page.table("Models", "Norms of task vectors, and cosines.", diff_text.whole(record), {}),
    f'<h2>Figures</h2><div class="plots">{drawn}</div>',
    page.table("Tensors that hardly moved", _still(record), extremes(record), {}),
    page.table(
      "Tensors that moved most",
      "Norms (in % of the base's).",
      extremes(record, most=True),
      {},
    ),
  ]
  if spectra:
    sections.append(page.table("Spectra", _about(spectra), spectrum_table(record, spectra), {}))
  note = "Norms (in % of the base's)" + ", sign conflicts, cosines" * (len(names) > 1) + "."
  for group in ("Kind", "Layer"):
    table = _named(group, diff_text.groups(record[f"{group.lower()}s"], names))
    sections.append(page.table(f"By {group.lower()}", note, table, {}))
  if record["uncompared"]:
    listed = entities.escape(", ".join(record["uncompared"]))
    sections.append(f'<p class="note">Not compared, as they hold integers: {listed}.</p>')
  return page.document(entities.escape(_title(record)), sections)


def write(
  record: Mapping[str, Any], spectra: Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
  """Writes the page to a file atomically."""
  text = html(record, spectra)
  with atomic.write(pathlib.Path(path)) as file:
    file.write(text.encode())


def _title(record: Mapping[str, Any]) -> str:
  return f"{', '.join(record['models'])} against {pathlib.Path(record['base']).name}"


def sentence(record: Mapping[str, Any]) -> str:
  """Returns a summary of the whole models in one or two sentences."""
  whole, names = record["whole"], record["models"]
  sizes = [diff_text.percent(whole["relative"][n]) for n in names]
  text = f"{whole['entries']:,} entries. Task vectors have {_listed(sizes)} % of the base's norm"
  if len(names) == 1:
    return f"{text}."
  upper = [whole["cosines"][i][j] for i in range(len(names)) for j in range(i)]
  cosines = [x for x in upper if x is not None]
  if cosines:
    middle = f"{np.mean(cosines):.2f}".replace("-", "−")
    text += f"; the mean cosine of two of them is {middle}"
  return f"{text}. Models disagree on the sign at {diff_text.percent(whole['sign_conflict'])} %."


def _listed(texts: list[str]) -> str:
  return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def extremes(record: Mapping[str, Any], *, most: bool = False) -> Table:
  """Returns the tensors that moved least, or most, by their largest relative norm."""
  names = record["models"]
  moved = {name: _distance(x) for name, x in record["tensors"].items() if _distance(x) > 0}
  order = sorted(moved, key=lambda name: (-moved[name] if most else moved[name], name))
  chosen = {name: record["tensors"][name] for name in order[:ROWS]}
  return _named("Tensor", diff_text.groups(chosen, names, brief=True))


def _named(first: str, table: Table) -> Table:
  return table._replace(head=[first, *table.head[1:]])


def _distance(measures: Mapping[str, Any]) -> float:
  """Returns the largest relative norm; infinity if the base is zero and a model is not."""
  if not any(measures["norms"].values()):
    return 0.0
  return max(float("inf") if x is None else x for x in measures["relative"].values())


def _still(record: Mapping[str, Any]) -> str:
  total = len(record["tensors"])
  equal = sum(_distance(x) == 0 for x in record["tensors"].values())
  text = f"{equal} of {total} tensors are the base's in all models." if equal else ""
  return f"{text} Of those that moved, the least: norms (in % of the base's).".strip()


def _about(spectra: Mapping[str, Any]) -> str:
  rough = sum(not x["exact"] for x in spectra.values())
  text = f"{len(spectra)} matrices, evenly over the model, or those of --singular."
  if rough:
    text += (
      f" {'All' if rough == len(spectra) else rough} of them are large: their largest singular "
      "values come from a randomised decomposition with one power iteration, and are lower bounds."
    )
  return text


def spectrum_table(record: Mapping[str, Any], spectra: Mapping[str, Any]) -> Table:
  """Returns a row per matrix: energy in the top singular values, and how many hold 90 % of it."""
  head, rows = ["Matrix"], []
  for name in record["models"]:
    head += [f"{name}: in {DIRECTIONS} largest (%)", f"{name}: for 90 %"]
  for matrix, measured in spectra.items():
    cells = [Cell(matrix)]
    for name in record["models"]:
      values, energy = measured["models"][name]["values"], measured["models"][name]["energy"]
      cells += [Cell(text) for text in _directions(values, energy)]
    rows.append(cells)
  return Table(head, rows)


def _directions(values: list[float], energy: float) -> tuple[str, str]:
  if not energy:
    return "–", "–"
  shares = np.cumsum(np.square(values)) / energy
  count = int((shares < 0.9 * (1 - 1e-12)).sum()) + 1
  return (
    diff_text.percent(float(shares[:DIRECTIONS][-1])),
    str(count) if count <= len(values) else f"> {len(values)}",
  )
