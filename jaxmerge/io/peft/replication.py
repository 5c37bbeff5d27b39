"""Layers that an adapter stacks anew before it is trained (layer_replication)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any  # What JSON holds.

from jaxmerge.io.peft.settings import Settings, shown
from jaxmerge.io.tensors.tensor import Tensor

_LAYER = re.compile(r"(?P<stack>(?:.+\.)?(?:layers|layer|h))\.(?P<number>\d{1,6})\.(?P<rest>.+)")
_MOST = 10_000  # Layers of a result.


def replicate(
  base: Mapping[str, Tensor], own: Settings
) -> tuple[tuple[int, ...] | None, dict[str, Tensor]]:
  """Returns which of the base's layers each layer is, and the tensors; None where they stay.

  Raises:
    ValueError: for a map that is none, or a base with more than one stack of layers.
  """
  said = own.values.get("layer_replication")
  if not said:
    return None, dict(base)
  stacks: dict[str, int] = {}
  for name in base:
    if found := _LAYER.fullmatch(name):
      stacks[found["stack"]] = max(stacks.get(found["stack"], 0), int(found["number"]) + 1)
  if len(stacks) != 1:
    raise own.refused("layer_replication", f"needs one stack of layers, not {list(stacks)}")
  ((stack, height),) = stacks.items()
  order = _order(own, said, height)
  made = {n: t for n, t in base.items() if not n.startswith(f"{stack}.")}
  for new, old in enumerate(order):
    head = f"{stack}.{old}."
    made |= {f"{stack}.{new}.{n.removeprefix(head)}": base[n] for n in base if n.startswith(head)}
  return order, made


def _order(own: Settings, said: Any, height: int) -> tuple[int, ...]:
  """The base's layers in the order of the result: ranges [first, last)."""
  if not isinstance(said, list) or not all(
    isinstance(r, list) and len(r) == 2 and all(type(i) is int for i in r) for r in said
  ):
    raise ValueError(
      f"{own.path}: layer_replication must list ranges of layers, got {shown(said)}."
    )
  if not all(0 <= first < last <= height for first, last in said) or len(said) > _MOST:
    raise ValueError(
      f"{own.path}: layer_replication {shown(said)} must be ranges of the base's {height} layers."
    )
  order = tuple(i for first, last in said for i in range(first, last))
  if len(order) > _MOST:
    raise ValueError(f"{own.path}: layer_replication makes {len(order)} layers, over {_MOST}.")
  return order
