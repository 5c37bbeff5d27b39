"""TPU chips and slices by name: devices to compile for, and peak speeds.

Peak numbers are per chip, from the pages of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x};
links of v4 are from Jouppi et al. 2023 (arXiv:2304.01433).
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple  # Any: devices of a topology are no `jax.Device`.

GIB = 2**30
# Set before jax is imported: jax does not look for a TPU, several compilers may run side by side,
# and the compiler accepts a machine outside of Cloud; the topology is an argument.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "JAX_PLATFORMS": "cpu",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}


class Chip(NamedTuple):
  """Peak numbers of one chip.

  Attributes:
    flops: bfloat16 operations per second.
    memory: bytes of high-bandwidth memory.
    bandwidth: of that memory, bytes per second.
    links: bytes per second that all links to other chips send together.
    ports: number of links.
    outside: bytes per second to other slices, over the data centre's network; None: not published.
    shapes: of slices, as documented.
  """

  flops: float
  memory: int
  bandwidth: float
  links: float
  ports: int
  outside: float | None
  shapes: tuple[str, ...]

  @property
  def ring(self) -> float:
    """Bytes per second that a chip sends in a ring along one axis of the torus, both ways."""
    return 2 * self.links / self.ports


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_LARGE = (*_CUBE, "8x16x16", "16x16x16")
CHIPS: Mapping[str, Chip] = {
  "v4": Chip(275e12, 32 * GIB, 1200e9, 300e9, 6, None, _LARGE),
  "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, 4, 6.4e12 / 8 / 256, _FLAT),
  "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, 6, None, (*_LARGE, "16x16x24")),
  "v6e": Chip(918e12, 32 * GIB, 1638e9, 400e9, 4, 25.6e12 / 8 / 256, _FLAT),
  "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 600e9, 6, None, _LARGE),
}


class Topology(NamedTuple):
  """A TPU topology: chips of a kind in a shape, in one or more slices, such as "v5e:4x4"."""

  name: str
  kind: str
  sizes: tuple[int, ...]
  slices: int

  @property
  def chip(self) -> Chip:
    """Peak numbers of one chip."""
    return CHIPS[self.kind]

  @property
  def chips(self) -> int:
    """Number of chips, in all slices."""
    return self.slices * math.prod(self.sizes)


def parse_topology(name: str, slices: int = 1) -> Topology:
  """Parses the name of a topology.

  >>> parse_topology("v5p:4x4x8", slices=2).chips
  256

  Raises:
    ValueError: for an unknown name, with the known ones.
  """
  match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
  if match is None or match[1] not in CHIPS:
    raise ValueError(f"there is no TPU topology {name!r}.{_near(name)} There are {_names()}.")
  if slices < 1:
    raise ValueError(f"slices must be at least 1, got {slices}.")
  kind, sizes = match[1], tuple(int(n) for n in match[2].split("x"))
  shapes = CHIPS[kind].shapes
  largest = max((tuple(map(int, s.split("x"))) for s in shapes), key=math.prod)
  good = len(sizes) == len(largest) and all(0 < a <= b for a, b in zip(sizes, largest, strict=True))
  even = sizes == (1, 1) or not (sizes[0] % 2 or sizes[1] % 2) if len(sizes) > 1 else False
  if not (good and even):
    raise ValueError(
      f"there is no TPU topology {name!r}: {kind} has {len(largest)} axes of at most "
      f"{'x'.join(map(str, largest))} chips, the first two even, such as "
      f"{', '.join(f'{kind}:{s}' for s in shapes)}."
    )
  return Topology(name, kind, sizes, slices)


def devices(place: Topology) -> list[Any]:
  """Returns the devices of a slice, to compile for. No TPU is needed, but its compiler is.

  Raises:
    ValueError: if libtpu is not installed, or is not the version that this jax needs.
  """
  check_compiler()
  from jax.experimental import topologies

  options: dict[str, Any] = {"num_slices": place.slices} if place.slices > 1 else {}
  if place.sizes == (1, 1):
    options["chips_per_host_bounds"] = (1, 1, 1)
  topology = topologies.get_topology_desc(platform="tpu", topology_name=place.name, **options)
  return list(topology.devices)


def check_compiler() -> None:
  """Raises ValueError, with what to install, if libtpu is missing or of a wrong version."""
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError("compiling for TPU needs libtpu: pip install 'jaxmerge[tpu]'.")
  required = _required_libtpu(importlib.metadata.requires("jax") or ())
  libtpu, jax = importlib.metadata.version("libtpu"), importlib.metadata.version("jax")
  if (
    required is not None
    and re.fullmatch(required.replace(".", r"\.").replace("*", ".*"), libtpu) is None
  ):
    raise ValueError(
      f"jax {jax} goes with libtpu {required}, but {libtpu} is installed: "
      f"pip install 'jax[tpu]=={jax}'."
    )


def set_environment() -> None:
  """Sets the environment for the TPU compiler on a machine without TPU, before importing jax."""
  os.environ.update(ENVIRONMENT)


def _required_libtpu(requirements: Iterable[str]) -> str | None:
  """Returns the version of libtpu in a package's requirements, such as "0.0.42.*"."""
  for requirement in requirements:
    if match := re.match(r"libtpu\s*==\s*([\d.*]+)", requirement):
      return match[1]
  return None


def _names() -> str:
  return "; ".join(f"{kind}:{', '.join(chip.shapes)}" for kind, chip in CHIPS.items())


def _near(name: str) -> str:
  """Suggests a topology for a Cloud machine type or a misspelt name."""
  known = [f"{kind}:{shape}" for kind, chip in CHIPS.items() for shape in chip.shapes]
  if match := re.fullmatch(r"(v4|v5p|v5e|v5litepod|v6e|tpu7x)-(\d+)", name.lower()):
    kind = {"v5litepod": "v5e"}.get(match[1], match[1])
    count = int(match[2]) // (2 if kind in ("v4", "v5p") else 1)  # Those count cores.
    known = [n for n in known if n.startswith(f"{kind}:") and parse_topology(n).chips == count]
    return f" Did you mean {known[-1]}?" if known else ""
  close = difflib.get_close_matches(name, known, n=1)
  return f" Did you mean {close[0]}?" if close else ""
