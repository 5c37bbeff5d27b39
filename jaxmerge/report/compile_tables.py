"""Tables of compiled programs from plain records: memory, collectives, least time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any  # Any: a record is JSON.

from jaxmerge.report.tables import Cell, Table

_KINDS = ("arguments", "outputs", "temporaries", "aliased", "total")
_BOUNDS = {"products": "products", "memory": "memory", "links": "links", "outside": "network"}


def line(program: Mapping[str, Any]) -> str:
  """Returns one line about a compiled program."""
  seconds = program["seconds"]["compile"]
  if not program["fits"]:
    return f"{program['name']}: compiled in {seconds:.1f} s, and does not fit"
  return f"{program['name']}: compiled in {seconds:.1f} s"


def heading(record: Mapping[str, Any]) -> str:
  """Returns one line about the devices and their mesh."""
  name = (
    record["topology"] if record["slices"] == 1 else f"{record['slices']} x {record['topology']}"
  )
  meshes = [program["mesh"] for program in record["programs"] if "mesh" in program]
  axes = ", ".join(f"{axis} {count}" for axis, count in meshes[0].items()) if meshes else "unknown"
  chips, devices = record["chips"], record["devices"]
  each = f", {devices} devices" if devices != chips else ""
  return f"{name}: {chips} chips{each}, {size(record['memory'])} each; mesh: {axes}"


def memory(record: Mapping[str, Any]) -> Table:
  """Returns a row per program: bytes per device by kind, compile time, least run time."""
  limit = size(record["memory"])
  head = ["Program", *(k.capitalize() for k in _KINDS[:-1]), f"Of {limit}", "Compile", "At least"]
  rows = []
  for program in record["programs"]:
    cells = [Cell(program["name"])]
    if "memory" in program:
      cells += [Cell(size(program["memory"][kind])) for kind in _KINDS]
    else:
      cells += [Cell("")] * (len(_KINDS) - 1) + [Cell("does not fit")]
    cells.append(Cell(f"{program['seconds']['compile']:.1f} s"))
    times = program.get("times")
    bound = f"{seconds(times['bound'])} ({_BOUNDS[times['by']]})" if times else ""
    rows.append([*cells, Cell(bound)])
  return Table(head, rows)


def traffic(record: Mapping[str, Any]) -> Table:
  """Returns a row per program, collective and axes: how often, and bytes sent."""
  rows = []
  for program in record["programs"]:
    collectives = program.get("collectives")
    if collectives == []:
      rows.append([Cell(program["name"]), Cell("none"), Cell(""), Cell(""), Cell("")])
    for collective in collectives or ():
      axes = ", ".join(collective["axes"]) + " (between slices)" * collective["outside"]
      cells = [program["name"], collective["kind"], axes, str(collective["times"])]
      rows.append([Cell(c) for c in (*cells, size(collective["bytes_sent"]))])
  return Table(["Program", "Collective", "Over", "Times", "Each device sends"], rows)


def size(count: float) -> str:
  """Writes a number of bytes.

  >>> size(7585210368), size(20972544), size(12)
  ('7.06 GiB', '20 MiB', '12 B')
  """
  for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
    if count >= 2**power:
      return f"{count / 2**power:.3g} {unit}"
  return f"{count:.0f} B"


def seconds(value: float) -> str:
  """Writes a time.

  >>> seconds(75.3), seconds(0.0481), seconds(2.8e-5)
  ('75.3 s', '48.1 ms', '28 us')
  """
  for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
    if value >= factor or unit == "us":
      return f"{value / factor:.3g} {unit}"
  return ""
