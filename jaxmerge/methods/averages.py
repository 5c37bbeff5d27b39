"""Means and weighted sums of the models."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal  # Any: states; numbers of NumPy, or traced.

import jax.numpy as jnp
import numpy as np

from jaxmerge.catalog import decays, lookup
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
  kind: Literal["sma", "wma", "ema", "decay"] = "sma",
  alpha: float = 0.2,
  start: Literal["first", "zero"] = "first",
  decay: Literal["1-sqrt", "linear", "cosine"] = "1-sqrt",
  zero_at: Literal["after", "last"] = "after",
) -> Method:
  """Averages checkpoints of one run, the oldest first: [K, ...] -> [1, ...].

  Args:
    kind: "sma", equal weights; "wma", weight i for the i-th; "ema", a moving average,
      m + alpha (x - m); "decay", weights that decay the learning rate of equally spaced checkpoints
      after the fact.
    alpha: share of the newest, for "ema".
    start: the moving average begins with the first checkpoint, which then weighs more than those
      that follow, or at zero; that is divided by the sum of the weights, and alpha must not be 0.
    decay: of the updates between the checkpoints, for "decay"; see `catalog.decays.decay_weights`.
    zero_at: where it is zero: one interval after the last checkpoint, or at the last, whose weight
      is then zero.

  Reference: Li et al. 2025, Model merging in pre-training (arXiv:2505.12082); for "decay" Tian et
  al. 2025, WSM (arXiv:2507.17634).

  Example:
    >>> import jax.numpy as jnp, jaxmerge
    >>> jaxmerge.merge(checkpoint_average("wma"), {"w": jnp.array([0.0, 3.0, 6.0])})["w"].tolist()
    4.0
  """
  weights = {"kind": kind, "decay": decay, "zero_at": zero_at}
  lookup.check("checkpoint_average", {**weights, "alpha": alpha, "start": start})
  if kind == "decay":
    return _decayed(decay, zero_at, alpha)
  add = functools.partial(_add_checkpoints, kind, start)
  finish = functools.partial(_divide_checkpoints, kind, start)

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


def _add_checkpoints(kind: str, start: str, state: State, x: Array, leaf: Leaf) -> State:
  """Adds checkpoints to the weighted sum of those before; None stands for none before."""
  K = x.shape[0]
  before = jnp.zeros((), x.dtype) if state is None else state["count"]
  decay: Any = 1.0  # Of the sum before.
  if kind == "sma":
    weights = jnp.ones(K, x.dtype)
  elif kind == "wma":
    weights = before + jnp.arange(1, K + 1, dtype=x.dtype)
  else:
    alpha = leaf.scalar("alpha", x)
    terms = moving_weights(K, alpha)
    if state is not None or start == "zero":
      terms[0] = alpha * (1 - alpha) ** (K - 1)
    weights = jnp.stack(terms)
    decay = (1 - alpha) ** K
  part = _sum(x * weights.reshape((-1,) + (1,) * (x.ndim - 1)))
  total = part if state is None else state["sum"] * decay + part
  return {"sum": total, "count": before + K}


def _divide_checkpoints(kind: str, start: str, state: State, leaf: Leaf) -> Array:
  """Divides the weighted sum of checkpoints by the sum of their weights."""
  count = state["count"]
  if kind != "ema":
    return state["sum"] * (1 / count if kind == "sma" else 2 / (count * (count + 1)))
  weights = 1.0 if start == "first" else 1 - (1 - leaf.scalar("alpha", state["sum"])) ** count
  return state["sum"] / weights


def _decayed(decay: str, zero_at: str, alpha: float) -> Method:
  """Returns the average of checkpoints whose weights are those of a decay."""

  def update(x: Array, leaf: Leaf, known: State) -> Array:
    weights = jnp.asarray(decays.decay_weights(x.shape[0], decay, zero_at), x.dtype)
    return _sum(x * weights.reshape((-1,) + (1,) * (x.ndim - 1)))

  # The weights of the others depend on how many come after.
  foldable = zero_at == "after" and decay in ("1-sqrt", "linear")
  root = decay == "1-sqrt"

  def add(state: State, x: Array, leaf: Leaf) -> State:
    before = jnp.zeros((), x.dtype) if state is None else state["count"]
    places = before + jnp.arange(x.shape[0], dtype=x.dtype)
    # √(i+1) - √i, without the cancellation.
    weights = 1 / (jnp.sqrt(places + 1) + jnp.sqrt(places)) if root else jnp.ones_like(places)
    part = _sum(x * weights.reshape((-1,) + (1,) * (x.ndim - 1)))
    return {"sum": part if state is None else state["sum"] + part, "count": before + x.shape[0]}

  def finish(state: State, leaf: Leaf) -> Array:
    count = state["count"]
    return state["sum"] * (1 / (jnp.sqrt(count) if root else count))

  stage = Stage(
    update,
    hparams={"alpha": alpha},
    combines=True,
    ordered=True,
    fold=Fold(add, finish) if foldable else None,
    moments="same",
  )
  return Method((stage,))


def moving_weights(num_models: int, alpha: Any) -> list[Any]:
  """Returns the weights of a moving average of checkpoints, the oldest first.

  Example:
    >>> moving_weights(3, 0.5)
    [0.25, 0.25, 0.5]
  """
  powers = [(1 - alpha) ** (num_models - 1 - i) for i in range(num_models)]
  return [powers[0], *(alpha * x for x in powers[1:])]


@named
def weighted_sum(weight: float | tuple[float, ...] = 1.0, *, normalize: bool = False) -> Method:
  """Adds up the models, each times its weight: [K, ...] -> [1, ...].

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
      fold=Fold(_add_to_mean, lambda state, leaf: state["sum"] / _safe(state["weight"])),
    )

  def add(state: Array | None, x: Array, leaf: Leaf) -> Array:
    part = _sum(x * leaf.hparam("weight", x))
    return part if state is None else state + part

  return leafwise(
    lambda x, leaf: _sum(x * leaf.hparam("weight", x)),
    hparams={"weight": weight},
    combines=True,
    fold=Fold(add, lambda state, leaf: state),
  )


def _add_with_count(state: dict[str, Array] | None, x: Array, leaf: Leaf) -> dict[str, Array]:
  part = {"sum": _sum(x), "count": jnp.full((), x.shape[0], x.dtype)}
  return part if state is None else {k: state[k] + part[k] for k in part}


(_PLAIN,) = leafwise(
  lambda x, leaf: _sum(x) * (1 / x.shape[0]),
  combines=True,
  fold=Fold(_add_with_count, lambda state, leaf: state["sum"] * (1 / state["count"])),
)


def with_moments(method: Method, names: Iterable[str] | None = None) -> Method:
  """Returns a method that averages running statistics among leaves of these names, or of any.

  A method that is a weighted mean of the models has the same weights for them.

  Example:
    >>> import jaxmerge
    >>> base = {"bn.running_var": jnp.array([4.0]), "w": jnp.array([4.0])}
    >>> models = {n: jnp.array([[1.0], [2.0], [3.0]]) for n in base}
    >>> merged = jaxmerge.merge(jaxmerge.methods.task_arithmetic(1.0), models, base)
    >>> merged["bn.running_var"].tolist(), merged["w"].tolist()
    ([2.0], [-2.0])
  """
  running = None if names is None else running_statistics.of(names)
  same = len(method) == 1 and method[0].moments == "same" and method[0].where is None
  if running == frozenset() or same or any(step.moments == "done" for step in method):
    return method
  # Names that say so themselves are left out: programs are then the same for other leaves.
  return _with_moments(
    method, frozenset(n for n in running or () if not running_statistics.is_moment(n))
  )


@dataclasses.dataclass(frozen=True)
class _Statistics:
  """Whether a leaf is a running statistic, or is none; equal by value, as a key of programs."""

  more: frozenset[str]
  are: bool = True

  def __call__(self, name: str) -> bool:
    return (name in self.more or running_statistics.is_moment(name)) == self.are


def _with_moments(method: Method, more: frozenset[str]) -> Method:
  combiners = [step for step in method if step.combines]
  last, moments = _PLAIN, None
  if len(combiners) == 1 and combiners[0].where is None:
    (combiner,) = combiners
    moments = combiner if combiner.moments == "same" else combiner.moments
    if isinstance(moments, Stage):
      has_key = combiner.key is not None and moments is not combiner
      last = dataclasses.replace(moments, key=(combiner.key, "moments")) if has_key else moments
  last = dataclasses.replace(last, moments="done", where=_Statistics(more))
  stages = (*masked(method, _Statistics(more, are=False)), last)
  return dataclasses.replace(method, stages=stages)


@named
def scaled(scale: float | tuple[float, ...]) -> Method:
  """Multiplies the stack by the hyperparameter `scale`.

  Example:
    >>> import jaxmerge
    >>> jaxmerge.merge(scaled(0.5), {"w": jnp.array([[3.0]])})["w"].tolist()
    [1.5]
  """
  return leafwise(lambda x, leaf: x * leaf.hparam("scale", x), hparams={"scale": scale})


@named
def weighted(weight: float | tuple[float, ...]) -> Method:
  """Multiplies each model by its weight: [K, ...] -> [K, ...].

  Example:
    >>> import jaxmerge
    >>> jaxmerge.merge(weighted(2.0), {"w": jnp.array([[3.0]])})["w"].tolist()
    [6.0]
  """
  return leafwise(lambda x, leaf: x * leaf.hparam("weight", x), hparams={"weight": weight})


def _spread(x: Array, leaf: Leaf) -> Array:
  """Returns the weights as [K, 1, ...], also from one number for all models."""
  weight = leaf.hparam("weight", x)
  return jnp.broadcast_to(weight, x.shape[:1] + (1,) * (x.ndim - 1)) if weight.ndim == 0 else weight


def _mean(state: dict[str, Array], leaf: Leaf) -> Array:
  # Compilers turn a division by one number into a product if the array is large, but not if it is
  # small: the last bit would depend on how a leaf is cut.
  return state["sum"] * (1 / state["weight"])


def _shares(x: Array, leaf: Leaf) -> Array:
  """Returns the weights over their sum, or over 1 where that is nearly zero."""
  weight = _spread(x, leaf)
  return weight / _safe(_sum(weight))


def _safe(divisor: Array) -> Array:
  return jnp.where(jnp.abs(divisor) < 1e-8, 1, divisor)


def _add_to_mean(state: dict[str, Array] | None, x: Array, leaf: Leaf) -> dict[str, Array]:
  weight = _spread(x, leaf)
  part = {"sum": _sum(x * weight), "weight": _sum(weight)}
  return part if state is None else {k: state[k] + part[k] for k in part}


def refuse_zero_sum(method: str) -> Callable[[Group], dict[str, Array]]:
  """Returns a `Stage.init` that refuses weights that add up to zero, naming method and leaf."""

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
