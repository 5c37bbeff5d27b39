"""LoRA adapters stacked or averaged: rules for their factors, from adapters to an adapter."""

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
  """Stacks adapters: one adapter that adds the weighted sum of what they add, without any error.

  Its rank is the sum of theirs, which may differ. A matrix that an adapter does not have counts as
  one to which it adds nothing.

  Args:
    adapters: one a client or task.
    weights: of the adapters; else equal ones that add up to 1.

  Reference: Wang et al. 2024, FLoRA (arXiv:2409.05976).

  Example:
    >>> one = {"w": Lora(jnp.array([[1.0, 2.0]]), jnp.array([[1.0], [0.0]]))}
    >>> two = {"w": Lora(jnp.array([[0.0, 2.0]]), jnp.array([[0.0], [1.0]]), 2.0)}
    >>> flora([one, two])["w"].delta().tolist()
    [[0.5, 1.0], [0.0, 2.0]]
  """
  adapters, _ = arguments.adapters(adapters, None)
  shares = _shares(adapters, weights)

  def stacked(name: str) -> Lora:
    own = [(s * x[name].scale, x[name]) for s, x in _with(name, shares, adapters)]
    a = jnp.concatenate([times(factor, x.a) for factor, x in own])
    b = jnp.concatenate([jnp.asarray(x.b) for _, x in own], axis=1)
    return _kind(name, [x for _, x in own])(a, b)

  return sound({name: stacked(name) for name in _names(adapters)})


@double_precision.aware
def averaged(
  adapters: Sequence[Adapter] | Any, weights: Sequence[float] | None = None, *, pad: bool = False
) -> dict[str, Lora]:
  """Averages the factors one by one, as federated averaging does: products get cross terms.

  For comparison with `flora`. Ranks must be equal, or `pad` fills lower ones up with zeros.

  Raises:
    ValueError: naming a matrix that some adapter does not have, or has with another rank.

  Example:
    >>> one = {"w": Lora(jnp.array([[2.0]]), jnp.array([[1.0]]))}
    >>> two = {"w": Lora(jnp.array([[0.0]]), jnp.array([[3.0]]))}
    >>> averaged([one, two])["w"].delta().tolist()
    [[2.0]]
  """
  adapters, _ = arguments.adapters(adapters, None)
  shares = _shares(adapters, weights)

  def mean(name: str) -> Lora:
    own = _with(name, shares, adapters)
    ranks = [x[name].rank for _, x in own]
    if len(own) < len(adapters) or (len(set(ranks)) > 1 and not pad):
      found = [x[name].rank if name in x else 0 for x in adapters]
      raise ValueError(
        f"factors of {name!r} cannot be averaged: their ranks are {found}; stack them (flora)"
        + (", or fill them up with zeros (pad=True)." if all(found) else ".")
      )
    short = [(s, x[name], (0, max(ranks) - x[name].rank)) for s, x in own]
    a = sum(times(s, jnp.pad(x.a, (more, (0, 0)))) for s, x, more in short)
    # The scale goes to b: it may differ from adapter to adapter.
    b = sum(times(s * x.scale, jnp.pad(x.b, ((0, 0), more))) for s, x, more in short)
    return _kind(name, [x[name] for _, x in own])(a, b)

  return sound({name: mean(name) for name in _names(adapters)})


def sound(adapter: dict[str, Lora]) -> dict[str, Lora]:
  """An adapter whose factors are finite; ValueError for others, where they can be looked at."""
  parts = {"a": "lora_A", "b": "lora_B"}
  finiteness.checked(
    {f"{n}.{said}": getattr(own, x) for n, own in adapter.items() for x, said in parts.items()}
  )
  return adapter


def _kind(name: str, own: Sequence[Lora]) -> type[Lora]:
  """Whether models store a matrix the other way round: all its adapters must say the same."""
  kinds = {type(x) for x in own}
  if len(kinds) > 1:
    raise ValueError(f"{name!r} lies [in, out] by some of its adapters, and [out, in] by others.")
  return kinds.pop()


def times(factor: Any, x: Any) -> jax.Array:
  """Multiplies an array by a factor in float32 or wider; the result has its dtype."""
  wide = tree.compute_dtype(x.dtype)
  return (jnp.asarray(factor, wide) * jnp.asarray(x).astype(wide)).astype(x.dtype)


def _names(adapters: Sequence[Adapter]) -> list[str]:
  return sorted({name for own in adapters for name in own})


def _shares(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[float]:
  if not adapters:
    raise ValueError("no adapters are given.")
  if weights is None:
    return [1 / len(adapters)] * len(adapters)
  if len(weights) != len(adapters):
    raise ValueError(f"{len(adapters)} adapters need as many weights, got {list(weights)}.")
  return [float(w) for w in weights]


def _with(name: str, shares: Sequence[float], adapters: Sequence[Adapter]) -> list[Any]:
  return [(s, own) for s, own in zip(shares, adapters, strict=True) if name in own]
