"""The collectives of a compiled program: their kinds, the mesh axes they span, their bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from jax.sharding import Mesh

from jaxmerge.xla import hlo_text, replica_groups

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-broadcast",
  "collective-permute",
)
# Transfers between TPU slices, through the hosts.
_SENDS, _RECEIVES = ("send", "send-start"), ("recv", "recv-start")


class Collective(NamedTuple):
  """One collective of a program.

  Attributes:
    kind: one of `KINDS`.
    axes: mesh axes along which devices communicate, in the mesh's order; () for none.
    bytes: size of the array that is gathered, reduced or exchanged, on one device.
    devices: number of devices in a group.
    times: how often it runs.
    outside: whether it runs between TPU slices, over the data-center network (DCN).
  """

  kind: str
  axes: tuple[str, ...]
  bytes: int
  devices: int
  times: int
  outside: bool = False

  @property
  def bytes_sent(self) -> float:
    """Returns the total bytes that one device sends, with the ring algorithm."""
    share = (self.devices - 1) / self.devices
    if self.kind in ("collective-permute", "collective-broadcast"):
      share = float(self.devices > 1)
    return self.times * self.bytes * share * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str, mesh: Mesh, trips: int = 1) -> list[Collective]:
  """Returns the collectives of a compiled program, in the order of its text.

  Args:
    text: the text of the program, `compiled.as_text()`.
    mesh: the mesh that it is compiled for.
    trips: trip count to assume for loops with a dynamic one.

  Raises:
    ValueError: for a collective that cannot be attributed to mesh axes (unknown replica groups,
      mode or operation), or a mesh with another number of devices.

  Example:
    >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("task",))
    >>> place = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("task"))
    >>> x = jax.ShapeDtypeStruct((2, 4), jnp.float32, sharding=place)
    >>> compiled = jax.jit(lambda x: x.sum(0)).lower(x).compile()
    >>> [(c.kind, c.axes, c.bytes) for c in collectives(compiled.as_text(), mesh)]
    [('all-reduce', ('task',), 16)]
  """
  module = hlo_text.read(text)
  slices = _slices(mesh)
  if module.devices != mesh.size // len(slices):
    raise ValueError(
      f"the program is for {module.devices * len(slices)} devices, the mesh has {mesh.size}."
    )
  out, seen, begun, going_on = [], set[str](), set[str | None](), dict[str | None, str]()
  for step in hlo_text.steps(module, trips):
    if step.op.kind in _SENDS:
      out.append(_transfer(step, mesh))
    if step.op.kind in _RECEIVES and _HOSTS not in step.op.attributes:
      raise ValueError(f"{step.op.kind} {step.op.name!r} cannot be attributed to mesh axes.")
    if kind_of(step.op) is not None:
      seen.add(step.op.name)
      if _continues(step):
        going_on[_chain(step.op)] = step.op.name
      else:
        begun.add(_chain(step.op))
        out.append(_collective(module, step, mesh, slices))
  written = set(
    re.findall(rf"%?([\w.\-]+) = [^\n]*?[)}}\]] (?:{'|'.join(KINDS)})(?:-start)?\(", text)
  )
  if missed := sorted(written - seen):
    raise ValueError(f"a collective was not reached: {', '.join(missed)}.")
  if orphans := sorted(name for chain, name in going_on.items() if chain not in begun):
    raise ValueError(f"a collective goes on that has not begun: {', '.join(orphans)}.")
  return out


def kind_of(op: hlo_text.Op) -> str | None:
  """Returns the kind of a collective that an operation starts, or None."""
  kind = op.kind.removesuffix("-start")
  return kind if kind in KINDS else None


def by_axis(items: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], tuple[int, float]]:
  """Sums runs and sent bytes of collectives by kind and axes, without those along no axis."""
  out: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
  for item in items:
    if item.axes:
      times, sent = out.get((item.kind, item.axes), (0, 0.0))
      out[item.kind, item.axes] = (times + item.times, sent + item.bytes_sent)
  return out


def _chain(op: hlo_text.Op) -> str | None:
  """Returns the id of a collective that a TPU runs in parts, overlapped with several fusions."""
  chain = re.search(r'chain_id="(\d+)"', op.attributes)
  channel = re.search(r"(?:^|, )channel_id=(\d+)", op.attributes)
  return f"{channel[1]}:{chain[1]}" if chain and channel else None


def _continues(step: hlo_text.Step) -> bool:
  """Returns whether an operation is a later part of a collective.

  In the text each part looks like a whole collective; only the first feeds the custom call that
  starts it.
  """
  if _chain(step.op) is None:
    return False
  users = [op for op in step.within.values() if step.op.name in op.operands]
  return not any('custom_call_target="AsyncCollectiveStart"' in op.attributes for op in users)


def _slices(mesh: Mesh) -> list[list[int]]:
  """Returns the mesh positions of each slice's devices; a program is compiled for one slice.

  Raises:
    ValueError: if the devices of slices are mixed: their numbers in a program are not known.
  """
  slice_of = [getattr(d, "slice_index", None) or 0 for d in mesh.devices.flat]
  out = [[i for i, s in enumerate(slice_of) if s == number] for number in sorted(set(slice_of))]
  if sorted(slice_of) != slice_of or len({len(places) for places in out}) != 1:
    raise ValueError("the mesh must list its devices slice by slice, with all devices of each.")
  return out


_HOSTS = '_xla_host_transfer_handler_name="xla_megascale_runtime"'


def _transfer(step: hlo_text.Step, mesh: Mesh) -> Collective:
  """Returns a transfer between slices as a collective; its text names device ids."""
  op = step.op
  place = {d.id: i for i, d in enumerate(mesh.devices.flat)}
  match = re.search(r"_xla_megascale_target=(\{\{.*?\}\}|\"[^\"]*\")", op.attributes)
  target = match[1] if match and _HOSTS in op.attributes else ""
  pairs = re.fullmatch(r"\{(?:\{\d+->\d+\},?)+\}", target)
  every = re.fullmatch(r'"\{(\d+(?:,\d+)*)\}x\{(\d+):(\d+)\}"', target)
  transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.attributes)
  word = transfer[1] if transfer else ""
  if pairs:
    kind = "collective-permute"
    groups = [tuple(map(int, pair)) for pair in re.findall(r"(\d+)->(\d+)", target)]
  elif every and word in _BY_ALL:
    numbers = [int(n) for n in every[1].split(",")]
    inside = range(int(every[2]), int(every[3]) + 1)
    kind, groups = _BY_ALL[word], [tuple(_SLICE * n + i for n in numbers) for i in inside]
  else:
    raise ValueError(f"{op.kind} {op.name!r} cannot be attributed to mesh axes: {target[:200]!r}.")
  try:
    ids = [[place[i] for i in group] for group in groups]
  except KeyError as e:
    raise ValueError(f"{op.kind} {op.name!r} names device {e}, which is not in the mesh.") from e
  size = sum(s.bytes for s in step.within[op.operands[0]].shapes)
  size *= max(map(len, groups)) if kind == "all-gather" else 1
  spans = replica_groups.axes(ids, dict(mesh.shape))
  return Collective(kind, spans, size, max(map(len, groups)), step.times, outside=True)


_BY_ALL = {"ALL_REDUCE": "all-reduce", "ALL_GATHER": "all-gather"}
_SLICE = 100_000  # The ids of devices of slice n begin at n times that.


def _collective(
  module: hlo_text.Module, step: hlo_text.Step, mesh: Mesh, slices: list[list[int]]
) -> Collective:
  op, kind = step.op, kind_of(step.op)
  assert kind is not None
  if kind == "collective-permute":
    groups = replica_groups.pairs(op.attributes, module.devices)
    size = 2 if any(a != b for a, b in groups) else 1
  else:
    _check_mode(op, kind, module.devices)
    groups = replica_groups.replica_groups(op.attributes, module.devices)
    size = max(len(group) for group in groups)
  inside = sum(s.bytes for name in op.operands for s in step.within[name].shapes)
  whole = inside * size if kind == "all-gather" else inside
  ids = [[places[i] for i in group] for places in slices for group in groups]
  return Collective(kind, replica_groups.axes(ids, dict(mesh.shape)), whole, size, step.times)


def _check_mode(op: hlo_text.Op, kind: str, devices: int) -> None:
  """Raises ValueError if the numbers in replica groups are not device numbers."""
  by_id = "use_global_device_ids=true" in op.attributes
  # These name partitions as soon as they have a channel.
  by_partition = kind in ("all-to-all", "ragged-all-to-all", "collective-broadcast")
  across = re.search(r"(?:^|, )channel_id=\d+", op.attributes)
  if devices > 1 and not (across and (by_id or by_partition)):
    raise ValueError(f"{op.kind} {op.name!r} names replicas, not devices: {op.attributes[:200]!r}.")
