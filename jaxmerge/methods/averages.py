"""Averages and sums of the models."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal  # Any: what is known; numbers of NumPy, or traced.

import jax.numpy as jnp
import numpy as np

from jaxmerge.catalog import lookup
from jaxmerge.core import running_statistics
from jaxmerge.core.stage import Array, Fold, Group, Leaf, Method, Stage, State, leafwise, masked
from jaxmerge.methods.factory import named

_sum = functools.partial(jnp.sum, axis=0, keepdims=True)


@named
def average(weight: float | tuple[float, ...] = 1.0, normalize: bool = True) -> Method:
  """Averages the models, or their task vectors: [K, ...] -> [1, ...].

  The weighted mean of task vectors, added to the base, is the weighted mean of the models; without
  `normalize` the weighted sum is returned.

  Args:
    weight: weight of each model, scalar or one per model. Their sum must not be zero.
    normalize: divide by the sum of the weights.

  Reference: Wortsman et al. 2022, Model soups (arXiv:2203.05482).

  Example:
    >>> import jax.numpy as jnp, jaxmerge
    >>> jaxmerge.merge(average(), {"w": jnp.array([[1.0], [3.0]])})["w"].tolist()
    [2.0]
  """
  lookup.check("average", {"weight": weight, "normalize": normalize})
  if not normalize:
    return weighted_sum(weight)
  stage = Stage(
    lambda x, leaf, known: _mean(_add_to_mean(None, x, leaf), leaf),
    init=refuse_zero_sum("average"),
    hparams={"weight": weight},
    scope="leaf",
    combines=True,
    fold=Fold(_add_to_mean, _mean),
    moments="same",
  )
  return Method((stage,))


@named
def checkpoint_average(
  kind: Literal["sma", "wma", "ema"] = "sma",
  alpha: float = 0.2,
  start: Literal["first", "zero"] = "first",
) -> Method:
  """Averages checkpoints of one run, the oldest first: [K, ...] -> [1, ...].

  Args:
    kind: "sma", all alike; "wma", the i-th i times; "ema", a moving average, m + alpha (x - m).
    alpha: share of the newest, for "ema".
    start: the moving average begins with the first checkpoint, which so weighs more than those that
      follow, or at zero, and is divided by the sum of the weights; alpha must not be 0 then.

  Reference: Li et al. 2025, Model merging in pre-training (arXiv:2505.12082).

  Example:
    >>> import jax.numpy as jnp, jaxmerge
    >>> jaxmerge.merge(checkpoint_average("wma"), {"w": jnp.array([0.0, 3.0, 6.0])})["w"].tolist()
    4.0
  """
  lookup.check("checkpoint_average", {"kind": kind, "alpha": alpha, "start": start})

  def add(held: State, x: Array, leaf: Leaf) -> State:
    K = x.shape[0]
    before = jnp.zeros((), x.dtype) if held is None else held["count"]
    left: Any = 1.0  # Of what is held.
    if kind == "sma":
      weights = jnp.ones(K, x.dtype)
    elif kind == "wma":
      weights = before + jnp.arange(1, K + 1, dtype=x.dtype)
    else:
      alpha = leaf.scalar("alpha", x)
      own = moving_weights(K, alpha)
      if held is not None or start == "zero":
        own[0] = alpha * (1 - alpha) ** (K - 1)
      weights = jnp.stack(own)
      left = (1 - alpha) ** K
    part = _sum(x * weights.reshape((-1,) + (1,) * (x.ndim - 1)))
    total = part if held is None else held["sum"] * left + part
    return {"sum": total, "count": before + K}

  def finish(held: State, leaf: Leaf) -> Array:
    count = held["count"]
    if kind != "ema":
      return held["sum"] * (1 / count if kind == "sma" else 2 / (count * (count + 1)))
    weights = 1.0 if start == "first" else 1 - (1 - leaf.scalar("alpha", held["sum"])) ** count
    return held["sum"] / weights

  def init(group: Group) -> State:
    alpha = group.seen("alpha") if "alpha" in group.hparams else None
    if kind == "ema" and start == "zero" and alpha is not None and not alpha.all():
      raise ValueError("checkpoint_average: alpha must not be 0 where the average begins at zero.")
    return {}

  stage = Stage(
    lambda x, leaf, known: finish(add(None, x, leaf), leaf),
    init=init,
    hparams={"alpha": alpha},
    combines=True,
    ordered=True,
    fold=Fold(add, finish),
    moments="same",
  )
  return Method((stage,))


def moving_weights(height: int, alpha: Any) -> list[Any]:
  """Returns the weights of a moving average of checkpoints, the oldest first.

  Example:
    >>> moving_weights(3, 0.5)
    [0.25, 0.25, 0.5]
  """
  left = [(1 - alpha) ** (height - 1 - i) for i in range(height)]
  return [left[0], *(alpha * x for x in left[1:])]


@named
def weighted_sum(weight: float | tuple[float, ...] = 1.0, *, normalize: bool = False) -> Method:
  """Adds the models up, each times its weight: [K, ...] -> [1, ...].

  Args:
    weight: weight of each model, scalar or one per model.
    normalize: divide by the sum of the weights; by 1 where that is below 1e-8 in magnitude.

  Example:
    >>> import jaxmerge
    >>> jaxmerge.merge(weighted_sum((1.0, -1.0)), {"w": jnp.array([[3.0], [1.0]])})["w"].tolist()
    [2.0]
  """
  if normalize:
    return leafwise(
      # The weights are divided, not the sum: a scale that follows would be multiplied into it.
      lambda x, leaf: _sum(x * _shares(x, leaf)),
      hparams={"weight": weight},
      combines=True,
      fold=Fold(_add_to_mean, lambda held, leaf: held["sum"] / _safe(held["weight"])),
    )

  def add(held: Array | None, x: Array, leaf: Leaf) -> Array:
    part = _sum(x * leaf.hparam("weight", x))
    return part if held is None else held + part

  return leafwise(
    lambda x, leaf: _sum(x * leaf.hparam("weight", x)),
    hparams={"weight": weight},
    combines=True,
    fold=Fold(add, lambda held, leaf: held),
  )


def _counted(held: dict[str, Array] | None, x: Array, leaf: Leaf) -> dict[str, Array]:
  part = {"sum": _sum(x), "count": jnp.full((), x.shape[0], x.dtype)}
  return part if held is None else {k: held[k] + part[k] for k in part}


(_PLAIN,) = leafwise(
  lambda x, leaf: _sum(x) * (1 / x.shape[0]),
  combines=True,
  fold=Fold(_counted, lambda held, leaf: held["sum"] * (1 / held["count"])),
)


def with_moments(method: Method, names: Iterable[str] | None = None) -> Method:
  """Returns the method for leaves of these names, or any: running statistics are averaged instead.

  A method that is a mean of the models itself has the same weights for them.

  Example:
    >>> import jaxmerge
    >>> base = {"bn.running_var": jnp.array([4.0]), "w": jnp.array([4.0])}
    >>> models = {n: jnp.array([[1.0], [2.0], [3.0]]) for n in base}
    >>> merged = jaxmerge.merge(jaxmerge.methods.task_arithmetic(1.0), models, base)
    >>> merged["bn.running_var"].tolist(), merged["w"].tolist()
    ([2.0], [-2.0])
  """
  own = None if names is None else running_statistics.of(names)
  same = len(method) == 1 and method[0].moments == "same" and method[0].where is None
  if own == frozenset() or same or any(step.moments == "done" for step in method):
    return method
  # By its name alone where that is enough: programs are then the same for other leaves.
  return _with_moments(
    method, frozenset(n for n in own or () if not running_statistics.is_moment(n))
  )


@dataclasses.dataclass(frozen=True)
class _Statistics:
  """Whether a leaf is a running statistic, or is none; by value, as it is part of compiled keys."""

  more: frozenset[str]
  are: bool = True

  def __call__(self, name: str) -> bool:
    return (name in self.more or running_statistics.is_moment(name)) == self.are


def _with_moments(method: Method, more: frozenset[str]) -> Method:
  combiners = [step for step in method if step.combines]
  last, apart = _PLAIN, None
  if len(combiners) == 1 and combiners[0].where is None:
    (one,) = combiners
    apart = one if one.moments == "same" else one.moments
    if isinstance(apart, Stage):
      known = one.key is not None and apart is not one
      last = dataclasses.replace(apart, key=(one.key, "moments")) if known else apart
  last = dataclasses.replace(last, moments="done", where=_Statistics(more))
  stages = (*masked(method, _Statistics(more, are=False)), last)
  return dataclasses.replace(method, stages=stages)


@named
def scaled(scale: float | tuple[float, ...]) -> Method:
  """Multiplies the stack by the number `scale`.

  Example:
    >>> import jaxmerge
    >>> jaxmerge.merge(scaled(0.5), {"w": jnp.array([[3.0]])})["w"].tolist()
    [1.5]
  """
  return leafwise(lambda x, leaf: x * leaf.hparam("scale", x), hparams={"scale": scale})


@named
def weighted(weight: float | tuple[float, ...]) -> Method:
  """Multiplies each model by its weight, and keeps them apart.

  Example:
    >>> import jaxmerge
    >>> jaxmerge.merge(weighted(2.0), {"w": jnp.array([[3.0]])})["w"].tolist()
    [6.0]
  """
  return leafwise(lambda x, leaf: x * leaf.hparam("weight", x), hparams={"weight": weight})


def _spread(x: Array, leaf: Leaf) -> Array:
  """The weights as [K, 1, ...], also where one number stands for all models."""
  weight = leaf.hparam("weight", x)
  return jnp.broadcast_to(weight, x.shape[:1] + (1,) * (x.ndim - 1)) if weight.ndim == 0 else weight


def _mean(held: dict[str, Array], leaf: Leaf) -> Array:
  # Compilers make a product of a division by one number where the array is large, but not where it
  # is small: the last bit would depend on how a leaf is cut.
  return held["sum"] * (1 / held["weight"])


def _shares(x: Array, leaf: Leaf) -> Array:
  """The weights over their sum, or over 1 where that is nearly zero."""
  weight = _spread(x, leaf)
  return weight / _safe(_sum(weight))


def _safe(divisor: Array) -> Array:
  return jnp.where(jnp.abs(divisor) < 1e-8, 1, divisor)


def _add_to_mean(held: dict[str, Array] | None, x: Array, leaf: Leaf) -> dict[str, Array]:
  weight = _spread(x, leaf)
  part = {"sum": _sum(x * weight), "weight": _sum(weight)}
  return part if held is None else {k: held[k] + part[k] for k in part}


def refuse_zero_sum(method: str) -> Callable[[Group], dict[str, Array]]:
  """Makes a `Stage.init` that refuses weights that add up to zero, naming method and leaf."""

  def init(group: Group) -> dict[str, Array]:
    weight = group.seen("weight")
    if weight is not None and abs(np.broadcast_to(weight, (group.num_models,)).sum()) < 1e-8:
      (name,) = group.shapes
      raise ValueError(
        f"{method}: weights must not add up to zero, got {weight.tolist()} for leaf {name!r}; "
        "give other weights or normalize=False."
      )
    return {}

  return init
