"""The record of an adapter extraction as text: rank and error per matrix, and other tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any  # A record is JSON, its values have no one type.

from jaxmerge.report import tables
from jaxmerge.report.tables import Cell, Table


def text(record: Mapping[str, Any], width: int = 100) -> str:
  """Formats a record for a terminal of `width` columns."""
  lines = []
  if record["matrices"]:
    lines += [f"By matrix\n{tables.to_text(matrices(record), width)}"]
  for key, what in (("saved", "saved whole"), ("unchanged", "as in the base")):
    if names := record[key]:
      lines.append(f"{what}: {_some(names)}")
  for reason in dict.fromkeys(record["skipped"].values()):
    names = [n for n, why in record["skipped"].items() if why == reason]
    lines.append(f"left out ({reason}): {_some(names)}")
  lines.append(
    f"relative error: {record['error']:.4f} of the matrices, {record['total_error']:.4f} of all "
    f"that changed; {record['parameters']:,} parameters, {record['bytes']:,} bytes"
  )
  return "\n".join(lines)


def matrices(record: Mapping[str, Any]) -> Table:
  """Returns a row per matrix: shape, rank, norm of the change and relative error."""
  rows = []
  for name, m in record["matrices"].items():
    shape = " x ".join(map(str, m["shape"]))
    cells = (name, shape, str(m["rank"]), f"{m['norm']:.4g}", f"{m['error']:.4f}")
    rows.append([Cell(cell) for cell in cells])
  return Table(["", "Shape", "Rank", "Norm", "Relative error"], rows)


def _some(names: list[str], most: int = 6) -> str:
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return f"{', '.join(names[:most])}{more}"
