"""Matrices of low rank, as adapters hold them, where they lie in a model, and added to it.

An adapter is a dict from the names of matrices to their low-rank factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple  # Any: arrays of jax, or of NumPy where loaded.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import errors
from jaxmerge.core import double_precision, layouts, matrix_views, tree
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import arguments, finiteness
from jaxmerge.io.tensors import names


class Lora(NamedTuple):
  """The factors of a matrix of low rank, scale * b @ a.

  Attributes:
    a: [rank, in].
    b: [out, rank].
    scale: number.
  """

  a: Any
  b: Any
  scale: Any = 1.0

  @property
  def rank(self) -> int:
    """Number of rows of a."""
    return self.a.shape[0]

  @double_precision.aware
  def delta(self) -> jax.Array:
    """Returns the matrix, [out, in], in float32 or wider."""
    dtype = tree.compute_dtype(self.a.dtype, self.b.dtype)
    a, b = (jnp.asarray(x).astype(dtype) for x in (self.a, self.b))
    return jnp.asarray(self.scale, dtype) * jnp.matmul(b, a, precision="highest")


class Swapped(Lora):
  """The factors of a matrix that models store as [in, out]: PEFT calls it fan_in_fan_out.

  So GPT-2's layers lie. A layout, where one is given, says it as well.
  """


Adapter = Mapping[str, Lora]


class Placed(NamedTuple):
  """A matrix of an adapter; the view, shape and rule of the leaf to which it is added."""

  lora: Lora
  view: str
  shape: tuple[int, ...]
  rule: layouts.Rule

  def delta(self) -> jax.Array:
    """What is added to the leaf, as it lies, [*s]."""
    return matrix_views.from_rows(self.lora.delta()[None], self.view, self.shape)[0]


def placed(
  leaves: Mapping[str, Any], adapter: Adapter, layout: layouts.Said | None
) -> dict[str, Placed]:
  """Returns the matrices of an adapter by the leaves of a model to which they are added.

  Raises:
    ValueError: naming the matrix that the model does not have, or that has another shape.
  """
  found: dict[str, Placed] = {}
  rules = layouts.of_leaves(leaves, layout)
  for name, own in adapter.items():
    leaf, view, shape = place(leaves, name, rules, own)
    if leaf in found:
      raise ValueError(f"{name!r} is not the only matrix of an adapter that is added to {leaf!r}.")
    if own.a.shape[0] != own.b.shape[1]:
      raise ValueError(
        f"the factors of {name!r} have other ranks: a is {list(own.a.shape)}, [rank, in], and b is "
        f"{list(own.b.shape)}, [out, rank]."
      )
    if shape != (own.b.shape[0], own.a.shape[1]):
      raise ValueError(
        f"the adapter of {name!r} is for a matrix {[own.b.shape[0], own.a.shape[1]]} of outputs "
        f"and inputs, but {leaf!r} is {list(np.shape(leaves[leaf]))}, {view!r}."
      )
    # A lookup stays one, though an adapter has rows and columns of it; what was open is not.
    known = view == (rules[leaf].view or "").replace("l", "o") and not rules[leaf].open
    rule = rules[leaf] if known else layouts.Rule(view, "adapter")
    found[leaf] = Placed(own, view, np.shape(leaves[leaf]), rule)
  _check_square({n: x for n, x in found.items() if not _is_said(rules[n])})
  return found


def _check_square(found: Mapping[str, Placed]) -> None:
  """Raises ValueError where how a square matrix lies cannot be told: other layers contradict it."""
  own = {n: x for n, x in found.items() if not n.endswith("kernel") and len(x.shape) == 2}
  square = [n for n, x in own.items() if x.shape[0] == x.shape[1]]
  wrong = [n for n, x in own.items() if (x.view == "io") != isinstance(x.lora, Swapped)]
  if square and wrong:
    raise ValueError(
      f"{square[0]!r} is square, and what its adapter says of how it lies is wrong for "
      f"{wrong[0]!r}: give its layout, such as ({square[0]!r}, 'oi')."
    )


def place(
  leaves: Mapping[str, Any],
  name: str,
  rules: Mapping[str, layouts.Rule],
  own: Lora | None = None,
) -> tuple[str, str, tuple[int, ...]]:
  """Returns the leaf that an adapter means, its view, and how many rows and columns it has.

  Args:
    leaves: of a model, by name.
    name: of the adapter's matrix: the leaf's, but for `/kernel`, `.weight` or a prefix.
    rules: how the leaves lie.
    own: the factors, where they are known: the shape decides where only one view fits.

  Raises:
    ValueError: for a leaf that is not there, or is no matrix of floating-point numbers.
  """
  ends = (name, f"{name}/kernel", f"{name}.weight")
  leaf = next((found for n in ends if (found := names.spelled(n, leaves))), None)
  if leaf is None:
    raise ValueError(f"the model has no matrix {name!r}{errors.nearest(name, leaves)}.")
  shape, dtype, rule = np.shape(leaves[leaf]), leaves[leaf].dtype, rules[leaf]
  if not tree.is_floating(leaves[leaf]) or rule.view is None:
    raise ValueError(f"{leaf!r} is {dtype}{list(shape)}, which is no floating-point matrix.")
  if rule.open and len(shape) > 2:
    said = " or ".join(f"[({leaf!r}, {view!r})]" for view in layouts.choices(leaf, shape))
    raise ValueError(f"how {leaf!r} {list(shape)} lies is not known: say it by layout, {said}.")
  view = rule.view.replace("l", "o")
  if not _is_said(rule) and not leaf.endswith("kernel") and len(shape) == 2:
    view = _view(view, shape, own)
  seen = jax.eval_shape(
    lambda x: matrix_views.rows(x, view), jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  )
  return leaf, view, seen.shape[1:]


def _is_said(rule: layouts.Rule) -> bool:
  """Whether a caller has said how a leaf lies."""
  return rule.reason.startswith("layout ")


def _view(view: str, shape: tuple[int, ...], own: Lora | None) -> str:
  """How a matrix lies that is no kernel: by the sizes of the factors, or by what they are."""
  if own is None or own.a.ndim != 2 or own.b.ndim != 2:
    return view
  out, inputs = own.b.shape[0], own.a.shape[1]
  fits = [v for v, sizes in (("oi", (out, inputs)), ("io", (inputs, out))) if sizes == shape]
  if len(fits) == 2:
    return "io" if isinstance(own, Swapped) else view
  return fits[0] if fits else view


@double_precision.aware
def applied(params: Tree, adapter: Adapter | Any, *, layout: layouts.Said | None = ()) -> Tree:
  """Adds an adapter to a model: its matrices become matrix + scale * b @ a.

  A matrix is the leaf of the adapter's name, or that name with `/kernel` or `.weight`. Leaves have
  the view that `layout` says, else that of their library (see `jaxmerge.core.layouts`); of two axes
  of which that says nothing the outputs are the first.

  Raises:
    ValueError: naming the matrix that the model does not have, or that has another shape.

  Example:
    >>> params = {"dense": {"kernel": jnp.zeros((3, 2))}}
    >>> adapter = {"dense": Lora(jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[1.0], [3.0]]))}
    >>> applied(params, adapter)["dense"]["kernel"].tolist()
    [[1.0, 3.0], [0.0, 0.0], [2.0, 6.0]]
  """
  adapter, leaves, changed = arguments.adapter(adapter), tree.named(params), {}
  for leaf, own in placed(leaves, adapter, layout).items():
    x, delta = jnp.asarray(leaves[leaf]), own.delta()
    wide = tree.compute_dtype(x.dtype, delta.dtype)
    changed[leaf] = (x.astype(wide) + delta.astype(wide)).astype(x.dtype)
  return tree.rebuild(params, leaves | finiteness.checked(changed))
