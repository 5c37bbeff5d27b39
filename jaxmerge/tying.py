"""Tensors that are stored twice: an embedding and an output head that are one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import numpy as np

from jaxmerge.io.tensor import Tensor
from jaxmerge.io.ties import HEADS
from jaxmerge.planning import Output, Plan

HEAD = 32  # Entries that are compared before all of them are.
CHUNK = 2**20


def tied(plan: Plan) -> Plan:
  """Merges a tensor once that is there twice, so that the two stay one whatever the method.

  Those are tensors of two or more axes, outside of layers, that one job merges with the same
  numbers, and that are equal bit for bit in the base and in every model.

  Returns:
    The plan in which all but the first of them, which is no head, are copies of its result.
  """
  found: dict[object, list[Output]] = {}
  same: dict[str, str] = {}
  for output in sorted(plan.outputs, key=lambda o: o.name.endswith(HEADS)):
    if output.job is None or len(output.shape) < 2 or _in_layers(output.name):
      continue
    others = found.setdefault(_kind(plan, output), [])
    twin = next((o for o in others if _equal(o, output)), None)
    if twin is None:
      others.append(output)
    else:
      same[output.name] = twin.name
  outputs = (o._replace(job=None, same=same[o.name]) if o.name in same else o for o in plan.outputs)
  fates = {
    model: {n: f"tied to {same[n]}, its equal" if n in same else f for n, f in own.items()}
    for model, own in plan.fates.items()
  }
  return plan._replace(outputs=tuple(outputs), fates=fates) if same else plan


def _in_layers(name: str) -> bool:
  return any(part.isdigit() for part in re.split("[./]", name))


def _kind(plan: Plan, output: Output) -> object:
  """What tensors must have in common before their entries are compared."""
  numbers = plan.jobs[output.job].numbers if output.job is not None else {}
  own = [
    (n, np.asarray(v[output.name]).tolist()) for n, v in numbers.items() if isinstance(v, dict)
  ]
  return repr((output.job, output.shape, output.dtype, output.precision, own))


def _parts(output: Output) -> Iterator[Tensor]:
  yield from (t for t in (output.base, *output.models) if t is not None)


def _equal(a: Output, b: Output) -> bool:
  size = math.prod(a.shape)
  pairs = list(zip(_parts(a), _parts(b), strict=True))
  if any(x.dtype != y.dtype for x, y in pairs):
    return False
  heads = (_same(x, y, 0, min(HEAD, size)) for x, y in pairs)
  wholes = (
    _same(x, y, start, min(start + CHUNK, size))
    for x, y in pairs
    for start in range(0, size, CHUNK)
  )
  return all(heads) and all(wholes)


def _same(a: Tensor, b: Tensor, start: int, stop: int) -> bool:
  x, y = np.empty(stop - start, a.dtype), np.empty(stop - start, b.dtype)
  a.read(start, x)
  b.read(start, y)
  return bool((x.view(np.uint8) == y.view(np.uint8)).all())
