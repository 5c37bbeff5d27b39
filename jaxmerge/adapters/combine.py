"""One LoRA adapter from several: their factors stacked, or averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any  # Any: arrays of jax, or of NumPy where loaded.

import jax
import jax.numpy as jnp

from jaxmerge.adapters.lora import Adapter, Lora
from jaxmerge.core import double_precision, tree
from jaxmerge.drivers import arguments, finiteness


@double_precision.aware
def flora(
  adapters: Sequence[Adapter] | Any, weights: Sequence[float] | None = None
) -> dict[str, Lora]:
  """Stacks adapters into one that adds exactly the weighted sum of their deltas.

  Its rank is the sum of their ranks. An adapter adds nothing to a matrix that it
  lacks.

  Args:
    adapters: one per client or task.
    weights: of the adapters; by default equal ones that add up to 1.

  Reference: Wang et al. 2024, FLoRA (arXiv:2409.05976).

  Example:
    >>> one = {"w": Lora(jnp.array([[1.0, 2.0]]), jnp.array([[1.0], [0.0]]))}
    >>> two = {"w": Lora(jnp.array([[0.0, 2.0]]), jnp.array([[0.0], [1.0]]), 2.0)}
    >>> flora([one, two])["w"].delta().tolist()
    [[0.5, 1.0], [0.0, 2.0]]
  """
  adapters, _ = arguments.adapters(adapters, None)
  weights = _check_weights(adapters, weights)

  def stack(name: str) -> Lora:
    pairs = _factors_of(name, weights, adapters)
    a = jnp.concatenate([times(weight * x.scale, x.a) for weight, x in pairs])
    b = jnp.concatenate([jnp.asarray(x.b) for _, x in pairs], axis=1)
    return _orientation(name, pairs)(a, b)

  return check_finite({name: stack(name) for name in _names(adapters)})


@double_precision.aware
def average(
  adapters: Sequence[Adapter] | Any, weights: Sequence[float] | None = None, *, pad: bool = False
) -> dict[str, Lora]:
  """Averages the factors a and b separately, as federated averaging does.

  The products have cross terms; `flora` has none. Ranks must be equal, or `pad` fills lower ones up
  with zeros.

  Raises:
    ValueError: naming a matrix that some adapter lacks, or has with another rank.

  Example:
    >>> one = {"w": Lora(jnp.array([[2.0]]), jnp.array([[1.0]]))}
    >>> two = {"w": Lora(jnp.array([[0.0]]), jnp.array([[3.0]]))}
    >>> average([one, two])["w"].delta().tolist()
    [[2.0]]
  """
  adapters, _ = arguments.adapters(adapters, None)
  weights = _check_weights(adapters, weights)

  def mean(name: str) -> Lora:
    pairs = _factors_of(name, weights, adapters)
    ranks = [x[name].rank if name in x else 0 for x in adapters]
    if len(pairs) < len(adapters) or (len(set(ranks)) > 1 and not pad):
      raise ValueError(
        f"factors of {name!r} cannot be averaged: their ranks are {ranks}; stack them (flora)"
        + (", or fill them up with zeros (pad=True)." if all(ranks) else ".")
      )
    padded = [(weight, x, (0, max(ranks) - x.rank)) for weight, x in pairs]
    a = sum(times(weight, jnp.pad(x.a, (zeros, (0, 0)))) for weight, x, zeros in padded)
    # The scale goes to b: it may differ from adapter to adapter.
    b = sum(times(weight * x.scale, jnp.pad(x.b, ((0, 0), zeros))) for weight, x, zeros in padded)
    return _orientation(name, pairs)(a, b)

  return check_finite({name: mean(name) for name in _names(adapters)})


def check_finite(adapter: dict[str, Lora]) -> dict[str, Lora]:
  """Returns an adapter; raises ValueError if its factors, where known, have NaN or infinity."""
  factors = {"a": "lora_A", "b": "lora_B"}
  finiteness.check_result(
    {f"{n}.{word}": getattr(x, part) for n, x in adapter.items() for part, word in factors.items()}
  )
  return adapter


def _orientation(name: str, pairs: Sequence[tuple[float, Lora]]) -> type[Lora]:
  """Returns `Lora` or `Swapped`, on which all adapters of a matrix must agree."""
  kinds = {type(x) for _, x in pairs}
  if len(kinds) > 1:
    raise ValueError(f"{name!r} lies [in, out] by some of its adapters, and [out, in] by others.")
  return kinds.pop()


def times(factor: Any, x: Any) -> jax.Array:
  """Multiplies an array by a factor in float32 or wider; the result has its dtype."""
  wide = tree.compute_dtype(x.dtype)
  return (jnp.asarray(factor, wide) * jnp.asarray(x).astype(wide)).astype(x.dtype)


def _names(adapters: Sequence[Adapter]) -> list[str]:
  return sorted({name for adapter in adapters for name in adapter})


def _check_weights(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[float]:
  if not adapters:
    raise ValueError("no adapters are given.")
  if weights is None:
    return [1 / len(adapters)] * len(adapters)
  if len(weights) != len(adapters):
    raise ValueError(f"{len(adapters)} adapters need as many weights, got {list(weights)}.")
  return [float(w) for w in weights]


def _factors_of(
  name: str, weights: Sequence[float], adapters: Sequence[Adapter]
) -> list[tuple[float, Lora]]:
  """Returns weight and factors of each adapter that has a matrix."""
  return [
    (w, adapter[name]) for w, adapter in zip(weights, adapters, strict=True) if name in adapter
  ]
