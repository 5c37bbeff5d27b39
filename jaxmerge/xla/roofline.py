"""A lower bound on the time of a compiled program, on chips of known peak speed.

A roofline (Williams et al. 2009, CACM 52(4)): products at the peak of the matrix units, bytes at
the peak memory bandwidth, collectives at the peak of the links. The slowest of the three is the
bound, as if they overlapped perfectly. Vector units and latencies are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxmerge.xla import chips
from jaxmerge.xla.communication import Collective
from jaxmerge.xla.cost import Work


class Times(NamedTuple):
  """Lower bounds in seconds.

  Attributes:
    products: matrix products, at the peak of the matrix units.
    memory: traffic to the device's memory.
    links: collectives between chips, one mesh axis after the other.
    outside: collectives between slices; None if the speed of that network is not published.
  """

  products: float
  memory: float
  links: float
  outside: float | None

  @property
  def bound(self) -> float:
    """Returns the largest of them."""
    return max(self.products, self.memory, self.links, self.outside or 0.0)

  @property
  def by(self) -> str:
    """Returns the name of the largest."""
    return max(self._fields, key=lambda name: getattr(self, name) or 0.0)


def times(
  work: Work, collectives: Sequence[Collective], chip: chips.Chip, devices: int = 1
) -> Times:
  """Returns the least times of a program.

  A collective counts as a ring along one axis of the torus, whatever mesh axes it spans.

  Args:
    work: FLOPs and bytes of one device.
    collectives: collectives of the program.
    chip: the chip.
    devices: devices per chip, which share its speed evenly.

  Example:
    >>> reduce = [Collective("all-reduce", ("task",), 10**9, 2, 3)]
    >>> times(Work(197 * 10**12, 0, 0), reduce, chips.CHIPS["v5e"]).bound
    1.0
    >>> round(times(Work(0, 0, 0), reduce, chips.CHIPS["v5e"]).links, 3)
    0.03
  """
  inside = sum(c.bytes_sent for c in collectives if not c.outside)
  outside = sum(c.bytes_sent for c in collectives if c.outside)
  over = None if chip.outside is None else outside * devices / chip.outside
  return Times(
    work.flops * devices / chip.flops,
    work.bytes * devices / chip.bandwidth,
    inside * devices / chip.ring,
    over if outside else 0.0,
  )
