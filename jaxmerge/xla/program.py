"""Compiles one program and records its memory, work and communication."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxmerge.xla import chips, communication, cost, roofline


class Program(NamedTuple):
  """A program to compile.

  Attributes:
    name: name in reports.
    lower: traces and lowers it.
    mesh: the mesh that it runs on.
    trips: trip count to assume for loops with a dynamic one, such as local steps.
  """

  name: str
  lower: Callable[[], jax.stages.Lowered]
  mesh: Mesh
  trips: int = 1


def record(program: Program, chip: chips.Chip | None, *, devices: int = 1) -> dict[str, Any]:
  """Compiles a program and returns its memory, work and communication, as plain JSON.

  Args:
    program: the program.
    chip: the chip, for its memory and speed; None: neither is checked.
    devices: devices per chip.

  Returns:
    {"name", "fits", "reason", "seconds", "mesh", "memory", "work", "collectives", "times"}; only
    the first five if the compiler runs out of memory.
  """
  begun, busy = time.perf_counter(), time.process_time()
  lowered = program.lower()
  traced = time.perf_counter()

  def seconds() -> dict[str, float]:
    now = time.perf_counter()
    return {"trace": traced - begun, "compile": now - traced, "cpu": time.process_time() - busy}

  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if not str(e).startswith("RESOURCE_EXHAUSTED"):
      raise
    reason = " ".join(str(e).split())[:300]
    facts = {"name": program.name, "fits": False, "reason": reason, "seconds": seconds()}
    return {**facts, "mesh": dict(program.mesh.shape)}
  took = seconds()
  text = compiled.as_text() or ""
  work = cost.count(text, program.trips)
  collectives = communication.collectives(text, program.mesh, program.trips)
  needs = memory_by_kind(compiled.memory_analysis())
  limit = None if chip is None else chip.memory // devices
  fits = limit is None or needs["total"] <= limit
  reason = "" if fits else f"needs {needs['total']} bytes a device; it has {limit}"
  times = None if chip is None else roofline.times(work, collectives, chip, devices)
  return {
    "name": program.name,
    "fits": fits,
    "reason": reason,
    "seconds": took,
    "mesh": dict(program.mesh.shape),
    "memory": needs,
    "work": work._asdict(),
    "collectives": _describe(collectives),
    "times": None if times is None else {**times._asdict(), "bound": times.bound, "by": times.by},
  }


def _describe(collectives: list[communication.Collective]) -> list[dict[str, Any]]:
  """Returns runs and sent bytes of collectives by kind and axes; those within slices first."""
  return [
    {"kind": kind, "axes": list(axes), "outside": outside, "times": count, "bytes_sent": sent}
    for outside in (False, True)
    for (kind, axes), (count, sent) in sorted(
      communication.by_axis(c for c in collectives if c.outside == outside).items()
    )
  ]


def memory_by_kind(analysis: Any) -> dict[str, int]:
  """Returns the bytes of a program on each device, by kind and in total."""
  sizes = {
    "arguments": analysis.argument_size_in_bytes,
    "outputs": analysis.output_size_in_bytes,
    "temporaries": analysis.temp_size_in_bytes,
    "aliased": analysis.alias_size_in_bytes,
    "code": analysis.generated_code_size_in_bytes,
  }
  return {**sizes, "total": sum(sizes.values()) - 2 * sizes["aliased"]}
