"""Repeats or reorders the layers of a base as an adapter's layer_replication says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any  # Any: values of JSON.

from jaxmerge.io.peft.settings import Settings, shown
from jaxmerge.io.tensors.tensor import Tensor

_LAYER = re.compile(r"(?P<stack>(?:.+\.)?(?:layers|layer|h))\.(?P<number>\d{1,6})\.(?P<rest>.+)")
_MOST = 10_000  # Layers of a result.


def replicate(
  base: Mapping[str, Tensor], config: Settings
) -> tuple[tuple[int, ...] | None, dict[str, Tensor]]:
  """Returns the base's layer of each layer, None if unchanged, and the tensors.

  Raises:
    ValueError: for an invalid map, or for a base with more than one stack of layers.
  """
  ranges = config.values.get("layer_replication")
  if not ranges:
    return None, dict(base)
  stacks: dict[str, int] = {}
  for name in base:
    if match := _LAYER.fullmatch(name):
      stacks[match["stack"]] = max(stacks.get(match["stack"], 0), int(match["number"]) + 1)
  if len(stacks) != 1:
    raise config.refusal("layer_replication", f"needs one stack of layers, not {list(stacks)}")
  ((stack, height),) = stacks.items()
  order = _order(config, ranges, height)
  tensors = {n: t for n, t in base.items() if not n.startswith(f"{stack}.")}
  for new, old in enumerate(order):
    head = f"{stack}.{old}."
    tensors |= {
      f"{stack}.{new}.{n.removeprefix(head)}": base[n] for n in base if n.startswith(head)
    }
  return order, tensors


def _order(config: Settings, ranges: Any, height: int) -> tuple[int, ...]:
  """Returns the base's layers in the order of the result, from ranges [first, last)."""
  if not isinstance(ranges, list) or not all(
    isinstance(r, list) and len(r) == 2 and all(type(i) is int for i in r) for r in ranges
  ):
    raise ValueError(
      f"{config.path}: layer_replication must list ranges of layers, got {shown(ranges)}."
    )
  if not all(0 <= first < last <= height for first, last in ranges) or len(ranges) > _MOST:
    text = f"must be ranges of the base's {height} layers"
    raise ValueError(f"{config.path}: layer_replication {shown(ranges)} {text}.")
  order = tuple(i for first, last in ranges for i in range(first, last))
  if len(order) > _MOST:
    raise ValueError(f"{config.path}: layer_replication gives {len(order)} layers, over {_MOST}.")
  return order
