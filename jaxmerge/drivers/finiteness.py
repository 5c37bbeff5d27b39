"""Checks inputs and results for NaN and infinity.

An infinity that the base and all models share at one entry, such as the -inf of a mask, is not
merged but copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple  # Any: arrays of jax or of NumPy, or None.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.core import running_statistics
from jaxmerge.parallel import mesh as meshes


class Flags(NamedTuple):
  """Whether values of a leaf are finite: of base, reference, each model [K], and the result.

  A result that is a running variance must also not be negative.
  """

  base: Any
  reference: Any
  models: Any
  merged: Any = True


def is_finite(x: Any, first: int = 0) -> Any:
  """Returns whether values are finite, over the axes from the first one on.

  Example:
    >>> is_finite(jnp.array([[1.0, jnp.nan], [1.0, 2.0]]), 1).tolist()
    [False, True]
  """
  # The maximum is NaN or infinite if any entry is: on CPUs several times faster than `isfinite`.
  return jnp.isfinite(jnp.max(jnp.abs(x), axis=tuple(range(first, x.ndim)), initial=0))


def flags(base: Any, reference: Any, x: Any) -> Flags:
  """Returns the flags of base [*s] and reference, arrays or None, and a stack [K, *s]."""
  one, two = (True if v is None else is_finite(v) for v in (base, reference))
  return Flags(one, two, is_finite(x, 1))


def is_sound(merged: Any, variance: bool) -> Any:
  """Returns whether a merged leaf is finite, and, if it is a running variance, not negative."""
  fine = is_finite(merged)
  return fine & jnp.all(merged >= 0) if variance else fine


def check_result(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the leaves of a result; raises ValueError if a concrete one is not sound.

  Example:
    >>> check_result({"bn/var": np.array([-1.0])})
    Traceback (most recent call last):
    ValueError: leaf 'bn/var': the result has a variance below zero; choose smaller numbers.
  """
  variances = running_statistics.variances(leaves)
  for name, x in leaves.items():
    if isinstance(x, jax.core.Tracer) or not jnp.issubdtype(x.dtype, jnp.floating):
      continue
    if not meshes.fetch(is_sound(jnp.asarray(x), name in variances)):
      raise unsound_error(name, jnp.asarray(x))
  return dict(leaves)


def refuse(flags: Mapping[str, Flags], names: Sequence[str] | None, order: Any = None) -> None:
  """Raises ValueError that names the first leaf and model whose flag is False.

  Args:
    flags: flags by leaf, with models in order of tags.
    names: names of the models, or None.
    order: position of each model in the caller's stack.
  """
  for name, of_leaf in flags.items():
    k = int(np.argmin(of_leaf.models))
    k = k if order is None else int(order[k])
    each = ("the base", of_leaf.base), ("the reference", of_leaf.reference)
    for label, is_finite in (*each, (f"model {names[k] if names else k}", np.all(of_leaf.models))):
      if not is_finite:
        raise ValueError(f"leaf {name!r} of {label} has NaN or infinity.")


def refuse_statistics(leaf: str, statistics: Mapping[str, Any]) -> None:
  """Raises ValueError, naming leaf and statistic, for NaN or infinity in one."""
  for name, x in statistics.items():
    if not bool(meshes.fetch(is_finite(jnp.asarray(x)))):
      raise ValueError(f"statistic {name!r} of leaf {leaf!r} has NaN or infinity.")


def refuse_inputs(base: Mapping[str, Any], models: Mapping[str, Any]) -> None:
  """Raises ValueError, naming leaf and model, for NaN or infinity in concrete arrays."""
  for name, x in models.items():
    if not any(isinstance(v, jax.core.Tracer) for v in (x, base[name])):
      of_leaf = flags(jnp.asarray(base[name]), None, jnp.asarray(x))
      refuse({name: meshes.fetch(of_leaf)}, None)


def unsound_error(name: str, merged: Any, *, remedy: str = "") -> ValueError:
  """Returns the error for a leaf whose result is not finite, or a negative variance."""
  if bool(meshes.fetch(is_finite(merged))):
    return ValueError(
      f"leaf {name!r}: the result has a variance below zero; choose smaller numbers{remedy}."
    )
  return ValueError(
    f"leaf {name!r}: the result has NaN or infinity, though no input has: {merged.dtype} cannot "
    "hold it, or the method's numbers do not fit; choose a wider dtype for the result, or smaller "
    f"numbers{remedy}."
  )


def shared_infinities(base: Any, reference: Any, x: Any) -> Any:
  """Returns where base, reference and all models [K, *s] have the same infinity.

  Example:
    >>> models = np.array([[-np.inf, np.inf], [-np.inf, np.inf]])
    >>> shared_infinities(np.array([-np.inf, 1]), None, models)
    array([ True, False])
  """
  every = [v for v in (base, reference) if v is not None] + list(x)
  same = np.isinf(np.asarray(every[0]))
  for other in every[1:]:
    same &= np.asarray(other) == np.asarray(every[0])
  return same


def zero_at(places: Any, x: Any) -> Any:
  """Replaces entries at these places by zeros; the merge copies them separately."""
  return None if x is None else jnp.where(places, jnp.zeros((), x.dtype), jnp.asarray(x))


def finite_models(models: Any) -> jax.Array:
  """Returns which models of a stack are free of NaN and infinity: [T, *s] -> [T]."""
  each = [jnp.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(models)]
  return jnp.stack(each).all(0)
