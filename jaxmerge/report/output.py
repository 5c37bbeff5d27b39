"""Writes a report into a folder: report.json, report.html and plots, each whole or not at all."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any  # A record is JSON, its values have no one type.

from jaxmerge.io.disk import atomic
from jaxmerge.report import page, plots
from jaxmerge.report import record as records


def write(record: Mapping[str, Any], folder: str | os.PathLike, *, with_plots: bool = True) -> None:
  """Writes `plots/*.png`, `report.html` and, last, `report.json`.

  Plots are drawn before anything is written. Every file is written beside its place and renamed;
  plots of an earlier report that this one lacks are removed.

  Args:
    record: the run; numbers may be NumPy's, and what is not finite is written as null, with a note.
    folder: created if it does not exist.
    with_plots: False where Matplotlib is not installed.
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
  """Removes the plots that the new page does not show."""
  for name in plots.NAMES:
    if name not in images:
      (folder / f"{name}.png").unlink(missing_ok=True)


def dumps(record: Mapping[str, Any]) -> str:
  """Returns the record as strict JSON: sorted keys, no NaN, the same text for the same record."""
  return json.dumps(record, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
