"""Records that stages and drivers exchange: parts of leaves, groups of leaves, reductions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple  # Any: states are trees that a stage defines.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import errors

Array = jax.Array
State = Any


def _find(hparams: Mapping[str, Any], name: str) -> Any:
  if name not in hparams:
    raise ValueError(
      f"no stage declares the hyperparameter {name!r}{errors.nearest(name, hparams)}."
    )
  return hparams[name]


class Leaf(NamedTuple):
  """Metadata of the part of a leaf that a stage processes.

  Attributes:
    base: the reference's part [*s]; None where raw weights are merged.
    hparams: the method's hyperparameters, scalars or [K].
    models: [K] tags of the models, uint32.
    tag: tag of this leaf's name, uint32 scalar.
    start: entries of the leaf before this part, row by row, uint32 scalar (counted past 2**32 from
      zero again).
    offset: entries of the leaves before this one in its group, uint32 scalar.
    places: places of the part's entries after `start`, uint32 [1, n]; None: 0, 1, ... row by row.
    statistics: statistics that the stage declares, by name: [K, *s], cut as the models are, or
      [K, ...], of any shape; see `core/statistics.py`.
  """

  base: Array | None
  hparams: Mapping[str, Any]
  models: Array
  tag: Array | np.generic
  start: Array | np.generic
  offset: Array | np.generic
  places: Array | np.ndarray | None = None
  statistics: Mapping[str, Array] = {}

  def hparam(self, name: str, x: Array) -> Array:
    """Returns hyperparameter `name` in the dtype of `x`, shaped to multiply a stack x [K, *s].

    Raises:
      ValueError: if no stage declares it, or it has one value per model, but x has another number
        of models.
    """
    value = jnp.asarray(_find(self.hparams, name), x.dtype)
    if value.ndim and value.shape[0] != x.shape[0]:
      raise ValueError(
        f"{name} has {value.shape[0]} values, but acts on a stack of {x.shape[0]}; "
        "after a combiner it must be one number."
      )
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value

  def scalar(self, name: str, x: Array) -> Array:
    """Returns hyperparameter `name`, a scalar, in the dtype of `x`; ValueError if not a scalar."""
    value = jnp.asarray(_find(self.hparams, name), x.dtype)
    if value.ndim:
      raise ValueError(f"{name} must be one number for all models, got {value.shape[0]} values.")
    return value

  def statistic(self, name: str, x: Array) -> Array:
    """Returns the statistic `name`, [K, ...], in the dtype of a stack x [K, *s].

    Raises:
      ValueError: if the stage does not declare it, the leaf has none, or x holds other models.
    """
    if name not in self.statistics:
      raise ValueError(
        f"a stage reads the statistic {name!r}, but there is none of this leaf; a stage declares "
        f"what it reads: Stage(..., statistics={{{name!r}: 'entry'}}), or 'leaf'."
      )
    value = jnp.asarray(self.statistics[name]).astype(x.dtype)
    if value.shape[0] != x.shape[0]:
      raise ValueError(
        f"statistic {name!r} is of {value.shape[0]} models, but acts on a stack of {x.shape[0]}; "
        "read it before a combiner."
      )
    return value

  def compared(self, method: str) -> Array:
    """Returns the base, or raises ValueError naming the method if raw weights are merged."""
    if self.base is None:
      raise ValueError(
        f"{method} compares with a base, but there is none: merge(method, models, base)."
      )
    return self.base


class Group(NamedTuple):
  """A group of leaves before any weight is read, for `Stage.init`.

  Attributes:
    shapes: shapes of its leaves by name, without the task axis.
    num_models: number of models K.
    hparams: the method's hyperparameters, without those that differ between leaves.
  """

  shapes: Mapping[str, tuple[int, ...]]
  num_models: int
  hparams: Mapping[str, Any]

  @property
  def size(self) -> int:
    """Number of entries of one model."""
    return sum(math.prod(shape) for shape in self.shapes.values())

  def hparam(self, name: str) -> Any:
    """Returns a hyperparameter, or raises ValueError if it differs between leaves of the group."""
    if name not in self.hparams:
      raise ValueError(
        f"{name} is counted over {len(self.shapes)} leaves together and cannot differ between "
        "them; give one number, or scope='leaf'."
      )
    return self.hparams[name]

  def seen(self, name: str) -> np.ndarray | None:
    """Returns a hyperparameter, scalar or [K]; None if traced, remote, or different by entry."""
    value = self.hparam(name)
    if isinstance(value, jax.core.Tracer) or not getattr(value, "is_fully_addressable", True):
      return None
    each = np.asarray(value, np.float64)
    return each if each.ndim <= 1 else None


class Sum(NamedTuple):
  """A reduction that adds up over all leaves of a group.

  Attributes:
    name: the key of the result in `stats`.
    measure: (x, leaf, stats) -> partial, a tree of arrays.
    combine: combines two partials; addition by default.
    finish: (total, stats) -> result.
  """

  name: str
  measure: Callable[[Any, Leaf, State], State]
  combine: Callable[[Array, Array], Array] = jnp.add
  # The names of its arguments are part of digests, which are on disk.
  finish: Callable[[State, State], State] = lambda total, known: total


class Rank(NamedTuple):
  """A reduction that finds the n-th largest value of of(x) >= 0, per row, over a group.

  Every driver finds it exactly, by its own algorithm; the result is an `order_statistics.Cut`.

  Attributes:
    name: the key of the result in `stats`.
    of: (x, leaf, stats) -> values [M, *s], elementwise, none negative; each row has a
      cut.
    rank: name of the count n in `stats`, limbs [2, M].
    exact: ties at the value are broken by position, so that exactly n entries are kept; otherwise
      all ties are kept.
  """

  name: str
  of: Callable[[Any, Leaf, State], Array]
  rank: str
  exact: bool = False


Reduction = Sum | Rank


class Fold(NamedTuple):
  """A combiner that takes a few models at a time, and keeps only an accumulator.

  Attributes:
    add: (accumulator or None, x [k, *s], leaf) -> accumulator, a tree of arrays.
    finish: (accumulator, leaf) -> [1, *s].
  """

  add: Callable[[State, Array, Leaf], State]
  finish: Callable[[State, Leaf], Array]
