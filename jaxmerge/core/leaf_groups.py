"""Groups of leaves: which ones a stage acts on, and over which its reductions are added up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any  # Any: values of any type, by leaf name.

import numpy as np

from jaxmerge.core.stage import Stage


def members(step: Stage, names: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
  """Returns the leaves that a stage acts on, by group.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxmerge.core.stage import masked, pointwise
    >>> (step,) = masked(pointwise(jnp.abs), lambda name: name != "b")
    >>> members(step, {"a": (2,), "b": (3,), "c": ()})
    {'': ('a', 'c')}
  """
  groups: dict[str, list[str]] = {}
  for name in names:
    if step.where is None or step.where(name):
      groups.setdefault(step.group(name), []).append(name)
  return {group: tuple(leaves) for group, leaves in groups.items()}


def offsets(step: Stage, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.uint32]:
  """Counts, for each leaf that a stage acts on, the entries before it in its group.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxmerge.core.stage import pointwise
    >>> (step,) = pointwise(jnp.abs)
    >>> {name: int(n) for name, n in offsets(step, {"a": (2, 3), "b": (4,), "c": ()}).items()}
    {'a': 0, 'b': 6, 'c': 10}
  """
  out = {}
  for names in members(step, shapes).values():
    sizes = [math.prod(shapes[n]) for n in names]
    # Wraps past 2**32, where ranking by position is refused.
    out.update({n: np.uint32(sum(sizes[:i]) % 2**32) for i, n in enumerate(names)})
  return out


def is_coupled(method: Iterable[Stage]) -> bool:
  """Returns whether a method has reductions over several leaves."""
  return any(step.reductions and step.scope != "leaf" for step in method)
