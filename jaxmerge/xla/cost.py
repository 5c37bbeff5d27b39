"""Counts the FLOPs of a compiled program, and its traffic to a device's memory.

Every operation counts as often as it runs. XLA's cost analysis counts the body of a loop once.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from jaxmerge.xla import communication, hlo_text
from jaxmerge.xla.hlo_text import Module, Op, Shape


class Work(NamedTuple):
  """Floating-point operations and memory traffic of one device.

  Attributes:
    flops: FLOPs of matrix products and convolutions; a multiply-add counts as two.
    bytes: bytes read from and written to the device's main memory.
    open_loops: number of loops with a dynamic trip count.
  """

  flops: int
  bytes: int
  open_loops: int


# Operations that move no bytes: aliases of arrays, and the ends of asynchronous operations.
_FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "after-all",
  "opt-barrier",
  "while",
  "conditional",
  "call",
  "async-start",
  "async-update",
  "async-done",
  "copy-done",
  "slice-done",
  "add-dependency",
  "partition-id",
  "replica-id",
  "domain",
} | {f"{kind}-done" for kind in communication.KINDS}
_PARTS = ("dynamic-slice", "slice", "gather")  # These read as much as they return.


def count(text: str, trips: int = 1) -> Work:
  """Counts FLOPs and bytes of a compiled program, on one device.

  A fusion reads its operands and writes its results once; of a sliced operand, it reads the slices.
  Products inside custom calls are not counted.

  Args:
    text: the text of the program, `compiled.as_text()`.
    trips: trip count to assume for loops with a dynamic one.

  Example:
    >>> x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    >>> compiled = jax.jit(lambda x: x @ x.T).lower(x).compile()
    >>> count(compiled.as_text()).flops
    256
  """
  module = hlo_text.read(text)
  flops = moved = unknown = 0
  for step in hlo_text.steps(module, trips):
    flops += step.times * products(step.op, step.within)
    if not step.fused:
      moved += step.times * _bytes_moved(module, step.within, step.op)
    if step.op.kind == "while":
      unknown += hlo_text.loop(module, step.within, step.op) is None
  return Work(flops, moved, unknown)


def products(op: Op, within: dict[str, Op]) -> int:
  """Returns the FLOPs of a matrix product or a convolution; 0 for other operations."""
  if op.kind not in ("dot", "convolution"):
    return 0
  left, right = (within[name].shapes[0] for name in op.operands[:2])
  out = op.shapes[0]
  if op.kind == "dot":
    match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
    axes = [int(i) for i in match[1].split(",") if i] if match else []
    return 2 * out.entries * int(np.prod([left.sizes[i] for i in axes], dtype=np.int64))
  return 2 * _multiplications(op, left, right, out)


def _multiplications(op: Op, left: Shape, right: Shape, out: Shape) -> int:
  """Counts the multiplications of a convolution, without those by zeros of padding and dilation."""
  names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
  if names is None:
    raise ValueError(f"convolution {op.name!r} has no dim_labels: {op.attributes[:200]!r}.")
  inputs, kernel, outputs = names.groups()
  total = out.sizes[outputs.index("b")] * out.sizes[outputs.index("f")]
  total *= right.sizes[kernel.index("i")]
  for i in range(len(outputs) - 2):
    spatial = [
      t.sizes[n.index(str(i))] for t, n in ((left, inputs), (right, kernel), (out, outputs))
    ]
    total *= _overlaps(*spatial, **_window(op.attributes, i))
  return total


def _window(attributes: str, axis: int) -> dict[str, int]:
  """Returns stride, padding and dilations of a convolution along one axis."""
  match = re.search(r"(?:^|, )window=\{([^}]*)\}", attributes)
  fields = dict(re.findall(r"(\w+)=(\S+)", match[1])) if match else {}
  values = {
    key: fields[key].split("x")[axis]
    for key in ("stride", "pad", "lhs_dilate", "rhs_dilate")
    if key in fields
  }
  return {
    "stride": int(values.get("stride", 1)),
    "before": int(values.get("pad", "0_0").split("_")[0]),
    "spread": int(values.get("lhs_dilate", 1)),
    "apart": int(values.get("rhs_dilate", 1)),
  }


def _overlaps(
  size: int, window: int, out: int, *, stride: int, before: int, spread: int, apart: int
) -> int:
  """Counts the pairs of an output and a window position that lie on an entry of the input."""
  last = (size - 1) * spread
  if window > out:  # The longer of the two is the array, the shorter one the Python loop.
    places = np.arange(window) * apart - before
    steps = [int(o) * stride for o in range(out)]
  else:
    places = np.arange(out) * stride - before
    steps = [int(w) * apart for w in range(window)]
  at = (places + step for step in steps)
  return sum(int(((p >= 0) & (p <= last) & (p % spread == 0)).sum()) for p in at)


def _bytes_moved(module: Module, within: dict[str, Op], op: Op) -> int:
  """Returns the bytes of main memory that an operation reads and writes."""
  if op.kind in _FREE:
    return 0
  inputs = [within[name].shapes for name in op.operands if name in within]
  if op.kind == "fusion":
    inner = module.computations[hlo_text.attribute(op, "calls")]
    read = sum(min(_main(shapes), _bytes_read(module, inner, i)) for i, shapes in enumerate(inputs))
    return read + _bytes_written(inner, op)
  if op.kind in _PARTS:
    return _main(op.shapes) + min(_main(inputs[0]), sum(s.bytes for s in op.shapes))
  if op.kind == "slice-start":
    return _main(op.shapes[1:2]) + min(_main(inputs[0]), op.shapes[1].bytes)
  if op.kind == "copy-start":
    return _main(op.shapes[:1]) + _main(inputs[0])
  if op.kind == "dynamic-update-slice":
    return _main(inputs[1]) + min(_main(op.shapes), sum(s.bytes for s in inputs[1]))
  if communication.kind_of(op) is not None and op.kind.endswith("-start"):
    whole = 2 if op.kind != "all-gather-start" else 1
    return whole * sum(_main(shapes) for shapes in inputs)
  return _main(op.shapes) + sum(_main(shapes) for shapes in inputs)


def _main(shapes: tuple[Shape, ...]) -> int:
  return sum(s.bytes for s in shapes if s.space == 0)


def _bytes_read(module: Module, inner: dict[str, Op], position: int) -> int:
  """Returns the bytes that a fusion reads of an operand."""
  name = next(
    op.name for op in inner.values() if op.kind == "parameter" and op.operands[0] == str(position)
  )
  whole, total, todo = sum(s.bytes for s in inner[name].shapes), 0, [name]
  while todo:
    current = todo.pop()
    for user in inner.values():
      if user.kind in ("parameter", "constant") or current not in user.operands:
        continue
      at = user.operands.index(current)
      if user.kind == "bitcast":
        todo.append(user.name)
      elif user.kind in _PARTS and at == 0:
        total += sum(s.bytes for s in user.shapes)
      elif user.kind == "dynamic-update-slice" and at == 0:
        continue  # The rest of the array is updated in place.
      elif user.kind == "fusion":
        total += _bytes_read(module, module.computations[hlo_text.attribute(user, "calls")], at)
      else:
        return whole
  return min(total, whole)


def _bytes_written(inner: dict[str, Op], op: Op) -> int:
  """Returns the bytes that a fusion writes; for an in-place update, only those of the slice."""
  root = next(o for o in inner.values() if o.root)
  parts = [inner[name] for name in root.operands] if root.kind == "tuple" else [root]
  if len(parts) != len(op.shapes):
    return _main(op.shapes)
  total = 0
  for part, shape in zip(parts, op.shapes, strict=True):
    while part.kind == "bitcast":
      part = inner[part.operands[0]]
    size = shape.bytes
    if part.kind == "dynamic-update-slice":
      size = sum(s.bytes for s in inner[part.operands[1]].shapes)
    total += size if shape.space == 0 else 0
  return total
