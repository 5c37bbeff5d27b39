"""Parses the text of a compiled program: computations, operations, and loop trip counts.

The text is that of `jax.stages.Compiled.as_text()`: optimised HLO for one device of many. Unknown
syntax is an error: no operation is skipped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Shape(NamedTuple):
  """An array: its dtype as HLO writes it, its sizes, and its memory space (0: main memory)."""

  dtype: str
  sizes: tuple[int, ...]
  space: int = 0

  @property
  def entries(self) -> int:
    """Number of entries."""
    return math.prod(self.sizes)

  @property
  def bytes(self) -> int:
    """Bytes, without the padding of tiles."""
    return math.ceil(self.entries * _bits(self.dtype) / 8)


class Op(NamedTuple):
  """An operation.

  Attributes:
    name: unique in its computation.
    kind: the opcode, such as "all-reduce-start".
    shapes: of the result; a tuple has several.
    operands: names of the operands; for a parameter or a constant, the text in brackets.
    attributes: the rest of the line.
    root: whether it is the computation's result.
  """

  name: str
  kind: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str
  root: bool = False


class Module(NamedTuple):
  """A program: its computations by name, the entry computation, and the number of devices."""

  entry: str
  computations: dict[str, dict[str, Op]]
  devices: int


class Step(NamedTuple):
  """An operation with its computation, how often it runs, and whether it is in a fusion."""

  op: Op
  within: dict[str, Op]
  times: int
  fused: bool


def read(text: str) -> Module:
  """Parses a program.

  Raises:
    ValueError: if the text is not a compiled program, or has replicas in addition to partitions.

  Example:
    >>> module = read('''HloModule small, num_partitions=2
    ... ENTRY %main (x: f32[4]) -> f32[4] {
    ...   %x = f32[4]{0} parameter(0)
    ...   ROOT %y = f32[4]{0} negate(%x)
    ... }''')
    >>> module.devices, module.computations["main"]["y"].operands
    (2, ('x',))
  """
  head = text.partition("\n")[0]
  if not head.startswith("HloModule"):
    raise ValueError(f"this is not the text of a compiled program: {head[:80]!r}.")
  if int(_search(r"replica_count=(\d+)", head) or 1) != 1:
    raise ValueError("the program has replicas beside partitions; collectives of such are unknown.")
  computations: dict[str, dict[str, Op]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if line.endswith("{") and " -> " in line and (match := _HEAD.match(line)):
      current = computations.setdefault(match[2], {})
      entry = match[2] if match[1] else entry
    elif line.startswith("}"):
      current = None
    elif current is not None and (match := _LINE.match(line)):
      op = _op(match[2], line[match.end() :], bool(match[1]))
      current[op.name] = op
  if not entry:
    raise ValueError("the text of the program has no entry computation.")
  return Module(entry, computations, int(_search(r"num_partitions=(\d+)", head) or 1))


def steps(module: Module, trips: int = 1) -> Iterator[Step]:
  """Yields every operation that runs, and how often.

  All branches of a conditional count. The scalar functions of reductions and sorts do not.

  Args:
    module: the program.
    trips: trip count to assume for loops with a dynamic one.
  """
  yield from _steps_of(module, module.entry, 1, False, trips)


def _steps_of(module: Module, name: str, times: int, fused: bool, trips: int) -> Iterator[Step]:
  within = module.computations[name]
  for op in within.values():
    yield Step(op, within, times, fused)
    for called, count in _callees(module, within, op, trips):
      inside = fused or op.kind in ("fusion", "custom-call")
      yield from _steps_of(module, called, times * count, inside, trips)


def _callees(
  module: Module, within: dict[str, Op], op: Op, trips: int
) -> Iterator[tuple[str, int]]:
  """Yields the computations that an operation runs, and how often."""
  if op.kind == "while":
    count = loop(module, within, op)
    count = trips if count is None else count
    yield attribute(op, "body"), count
    yield attribute(op, "condition"), count + 1
  elif op.kind == "conditional":
    names = _search(r"branch_computations=\{([^}]*)\}", op.attributes)
    branches = re.findall(r"%?([\w.\-]+)", names) if names else []
    if not branches:
      branches = [attribute(op, f"{side}_computation") for side in ("true", "false")]
    yield from ((branch, 1) for branch in branches)
  elif op.kind == "call":
    yield attribute(op, "to_apply"), 1
  elif op.kind in ("fusion", "async-start"):
    yield attribute(op, "calls"), 1
  elif op.kind == "custom-call" and (
    names := _search(r"(?:called_computations=\{|calls=\{?)([^},]*)", op.attributes)
  ):
    yield names.lstrip("%"), 1


def attribute(op: Op, key: str) -> str:
  """Returns the name in an attribute, such as the body of a loop.

  Raises:
    ValueError: naming the operation, if it has no such attribute.
  """
  name = _search(rf"(?:^|, ){key}=%?([\w.\-]+)", op.attributes)
  if name is None:
    raise ValueError(f"{op.kind} {op.name!r} has no {key}: {op.attributes[:80]!r}.")
  return name


def loop(module: Module, within: dict[str, Op], op: Op) -> int | None:
  """Returns the trip count of a loop; None if it is dynamic."""
  if known := _search(r'"known_trip_count":\{"n":"(\d+)"\}', op.attributes):
    return int(known)
  body = module.computations[attribute(op, "body")]
  test, way = _test(module, module.computations[attribute(op, "condition")])
  if test is None:
    return None
  now, limit = (_counter(operand, body, within, op) for operand in test)
  start = now and now.start
  if now is None or limit is None or start is None or limit.start is None:
    return None
  if limit.step != 0 or not now.step or way not in _WAYS:
    return None
  ahead = (limit.start - start) / now.step
  count = math.floor(ahead) + 1 if way in ("LE", "GE") else math.ceil(ahead)
  return max(0, count)


class _Counter(NamedTuple):
  """An integer in a loop's carry: its start, and its increment per trip; None: unknown."""

  start: int | None
  step: int | None


_WAYS = ("LT", "LE", "GT", "GE", "NE")


def _test(
  module: Module, condition: dict[str, Op]
) -> tuple[tuple[int | str, int | str] | None, str]:
  """Returns both sides of a loop's comparison, and its direction.

  A side is a constant as text, or an index of the carry.
  """
  root = next(op for op in condition.values() if op.root)
  sides = [_origin(condition, name) for name in root.operands]
  if root.kind == "fusion":
    inner = module.computations[attribute(root, "calls")]
    root = next(op for op in inner.values() if op.root)
    operands = [_plain(inner, name) for name in root.operands]
    sides = [
      sides[int(op.operands[0])] if op.kind == "parameter" else _origin(inner, op.name)
      for op in operands
    ]
  if root.kind != "compare" or len(sides) != 2 or None in sides:
    return None, ""
  return (sides[0], sides[1]), attribute(root, "direction")  # type: ignore[return-value]


def _plain(within: dict[str, Op], name: str) -> Op:
  """Returns the operation of a name, looking through copies and bitcasts."""
  op = within[name]
  while op.kind in ("copy", "bitcast") and op.operands[0] in within:
    op = within[op.operands[0]]
  return op


def _origin(within: dict[str, Op], name: str) -> int | str | None:
  """Returns a constant as text, or an index of the tuple that is the computation's parameter."""
  op = _plain(within, name)
  if op.kind == "constant":
    return op.operands[0] if re.fullmatch(r"-?\d+", op.operands[0]) else None
  if op.kind == "get-tuple-element" and _plain(within, op.operands[0]).kind == "parameter":
    return _index(op)
  return None


def _index(op: Op) -> int:
  return int(_search(r"index=(\d+)", op.attributes) or 0)


def _counter(
  side: int | str, body: dict[str, Op], within: dict[str, Op], op: Op
) -> _Counter | None:
  if isinstance(side, str):
    return _Counter(int(side), 0)
  initial = _plain(within, op.operands[0])
  if initial.kind != "tuple":
    return None
  first = _origin(within, initial.operands[side])
  after = next(o for o in body.values() if o.root)
  if after.kind != "tuple":
    return None
  return _Counter(int(first) if isinstance(first, str) else None, _increment(body, after, side))


def _increment(body: dict[str, Op], after: Op, side: int) -> int | None:
  """Returns the increment per trip of an integer in the loop's carry."""
  if _origin(body, after.operands[side]) == side:
    return 0
  op = _plain(body, after.operands[side])
  if op.kind != "add":
    return None
  origins = [_origin(body, name) for name in op.operands]
  numbers = [int(x) for x in origins if isinstance(x, str)]
  return numbers[0] if side in origins and numbers else None


def _op(name: str, rest: str, root: bool) -> Op:
  rest = re.sub(r"/\*.*?\*/", "", rest)
  kind_at = _end(rest) if rest.startswith("(") else rest.index(" ")
  shapes = tuple(
    Shape(dtype, tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n), _space(layout))
    for dtype, sizes, layout in _SHAPE.findall(rest[:kind_at])
  )
  rest = rest[kind_at:].lstrip()
  kind, _, inside = rest.partition("(")
  stop = _end(f"({inside}") - 1
  arguments = inside[: stop - 1] if stop else inside
  if kind in ("parameter", "constant"):
    operands: tuple[str, ...] = (arguments,)
  else:
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
  return Op(name, kind, shapes, operands, inside[stop:].removeprefix(", "), root)


def _end(text: str) -> int:
  """Returns the end of the text's opening bracket, or the length of the text plus one."""
  depth = 0
  for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[()]', text):
    depth += {"(": 1, ")": -1}.get(match[0], 0)
    if not depth:
      return match.end()
  return len(text) + 1


def _space(layout: str) -> int:
  return int(_search(r"S\((\d+)\)", layout) or 0)


def _search(pattern: str, text: str) -> str | None:
  match = re.search(pattern, text)
  return match[1] if match else None


def _bits(dtype: str) -> int:
  """Bits of an entry; tokens have none."""
  if dtype in ("token", "opaque"):
    return 0
  if dtype == "pred":
    return 8
  width = _search(r"^(?:[suf]|bf|c)(\d+)", dtype)
  if width is None:
    raise ValueError(f"a program has entries of the dtype {dtype!r}, whose size is not known.")
  return int(width)


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
