"""Writes a report into a folder: report.json, report.html and plots, each atomically."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any  # Any: a record is JSON.

from jaxmerge.io.disk import atomic
from jaxmerge.report import page, plots
from jaxmerge.report import record as records


def write(record: Mapping[str, Any], folder: str | os.PathLike, *, with_plots: bool = True) -> None:
  """Writes `plots/*.png`, `report.html` and, last, `report.json`.

  Plots are drawn before anything is written. Every file is written atomically; outdated plots of
  an earlier report are removed.

  Args:
    record: the run; NumPy numbers are converted, and non-finite ones become null, with a note.
    folder: created if it does not exist.
    with_plots: whether to draw plots; they need Matplotlib.
  """
  whole = records.plain(record)
  records.check(whole)
  home = pathlib.Path(folder)
  images = plots.images(whole) if with_plots else {}
  drawings = plots.drawings(whole) if with_plots else {}
  files = {home / "plots" / f"{name}.png": data for name, data in images.items()}
  files[home / "report.html"] = page.html(whole, drawings).encode()
  files[home / "report.json"] = dumps(whole).encode()
  _remove_stale(home / "plots", images)
  for path, data in files.items():
    with atomic.write(path) as file:
      file.write(data)


def _remove_stale(folder: pathlib.Path, images: Mapping[str, bytes]) -> None:
  """Removes plots that are not on the new page."""
  for name in plots.NAMES:
    if name not in images:
      (folder / f"{name}.png").unlink(missing_ok=True)


def dumps(record: Mapping[str, Any]) -> str:
  """Returns the record as deterministic, strict JSON: sorted keys, no NaN."""
  return json.dumps(record, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
