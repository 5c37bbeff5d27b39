"""One compiled program: what it needs, moves and computes, as a record."""

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
    name: what it is called.
    lower: traces it.
    mesh: over which it runs.
    trips: how often its loops run whose number of trips the program computes: local steps.
  """

  name: str
  lower: Callable[[], jax.stages.Lowered]
  mesh: Mesh
  trips: int = 1


def record(program: Program, chip: chips.Chip | None, *, devices: int = 1) -> dict[str, Any]:
  """Compiles a program and returns what it needs, as plain JSON.

  Args:
    program: the program.
    chip: for whose memory and speed it is; None: only what the program says.
    devices: of a chip.

  Returns:
    {"name", "fits", "reason", "seconds", "mesh", "memory", "work", "collectives", "times"}; of a
    program that the compiler refuses for want of memory, only the first five.
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
  own = cost.count(text, program.trips)
  found = communication.collectives(text, program.mesh, program.trips)
  needs = needed(compiled.memory_analysis())
  limit = None if chip is None else chip.memory // devices
  fits = limit is None or needs["total"] <= limit
  reason = "" if fits else f"needs {needs['total']} bytes a device; it has {limit}"
  times = None if chip is None else roofline.times(own, found, chip, devices)
  return {
    "name": program.name,
    "fits": fits,
    "reason": reason,
    "seconds": took,
    "mesh": dict(program.mesh.shape),
    "memory": needs,
    "work": own._asdict(),
    "collectives": [
      {"kind": kind, "axes": list(axes), "outside": outside, "times": count, "bytes_sent": sent}
      for outside in (False, True)
      for (kind, axes), (count, sent) in sorted(
        communication.by_axis(c for c in found if c.outside == outside).items()
      )
    ],
    "times": None if times is None else {**times._asdict(), "bound": times.bound, "by": times.by},
  }


def needed(analysis: Any) -> dict[str, int]:
  """Returns the bytes that a program needs on each device, by kind, and in total."""
  own = {
    "arguments": analysis.argument_size_in_bytes,
    "outputs": analysis.output_size_in_bytes,
    "temporaries": analysis.temp_size_in_bytes,
    "aliased": analysis.alias_size_in_bytes,
    "code": analysis.generated_code_size_in_bytes,
  }
  return {**own, "total": sum(own.values()) - 2 * own["aliased"]}
