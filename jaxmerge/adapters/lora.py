"""Low-rank factors of an adapter, and how they apply to the leaves of a model.

An adapter is a dict from the names of matrices to their low-rank factors.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple  # Any: arrays of jax, or of NumPy where loaded.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.core import double_precision, layouts, leaf_names, matrix_views, tree
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import arguments, finiteness
from jaxmerge.io.tensors import names


class Lora(NamedTuple):
  """The factors of a low-rank matrix, scale * b @ a.

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

  Examples are GPT-2's layers. A layout, if there is one, decides before this class does.
  """


Adapter = Mapping[str, Lora]


class Target(NamedTuple):
  """A matrix of an adapter, and the view, shape and rule of the leaf to which it is added."""

  lora: Lora
  view: str
  shape: tuple[int, ...]
  rule: layouts.Rule

  def delta(self) -> jax.Array:
    """Returns the delta of the leaf, [*s]."""
    return matrix_views.from_rows(self.lora.delta()[None], self.view, self.shape)[0]


def find_targets(
  leaves: Mapping[str, Any], adapter: Adapter, layout: layouts.Layout | None
) -> dict[str, Target]:
  """Returns the matrices of an adapter by the leaves of a model to which they are added.

  Raises:
    ValueError: naming the matrix that the model lacks, or that has another shape.
  """
  targets: dict[str, Target] = {}
  rules = layouts.of_leaves(leaves, layout)
  for name, x in adapter.items():
    leaf, view, shape = find_matrix(leaves, name, rules, x)
    if leaf in targets:
      raise ValueError(f"{name!r} is not the only matrix of an adapter that is added to {leaf!r}.")
    if x.a.shape[0] != x.b.shape[1]:
      raise ValueError(
        f"the factors of {name!r} have other ranks: a is {list(x.a.shape)}, [rank, in], and b is "
        f"{list(x.b.shape)}, [out, rank]."
      )
    if shape != (x.b.shape[0], x.a.shape[1]):
      raise ValueError(
        f"the adapter of {name!r} is for a matrix {[x.b.shape[0], x.a.shape[1]]} of outputs and "
        f"inputs, but {leaf!r} is {list(np.shape(leaves[leaf]))}, {view!r}."
      )
    # A lookup keeps its rule, although an adapter adds a matrix to it; an open rule is settled.
    same = view == (rules[leaf].view or "").replace("l", "o") and not rules[leaf].open
    rule = rules[leaf] if same else layouts.Rule(view, "adapter")
    targets[leaf] = Target(x, view, np.shape(leaves[leaf]), rule)
  _check_square({n: x for n, x in targets.items() if not _is_explicit(rules[n])})
  return targets


def _check_square(targets: Mapping[str, Target]) -> None:
  """Raises ValueError for a square matrix, if the views of other leaves contradict the adapter."""
  leaves = {n: x for n, x in targets.items() if not _is_kernel(n) and len(x.shape) == 2}
  square = [n for n, x in leaves.items() if x.shape[0] == x.shape[1]]
  wrong = [n for n, x in leaves.items() if (x.view == "io") != isinstance(x.lora, Swapped)]
  if square and wrong:
    raise ValueError(
      f"{square[0]!r} is square, and its adapter is wrong about the layout of "
      f"{wrong[0]!r}: give its layout, such as ({square[0]!r}, 'oi')."
    )


def find_matrix(
  leaves: Mapping[str, Any],
  name: str,
  rules: Mapping[str, layouts.Rule],
  lora: Lora | None = None,
) -> tuple[str, str, tuple[int, ...]]:
  """Returns the leaf that a name in an adapter means, its view, and its rows and columns.

  Args:
    leaves: of a model, by name.
    name: of the adapter's matrix: the leaf's, or that without `/kernel`, `.weight`, nnx's
      `/value`, or a prefix.
    rules: the layout rule of each leaf.
    lora: the factors, if they are known: their shape decides if only one view fits.

  Raises:
    ValueError: for a leaf that is missing, or is no matrix of floating-point numbers.
  """
  leaf = next(filter(None, (names.find(f"{name}{end}", leaves) for end in _ENDS)), None)
  if leaf is None:
    raise ValueError(f"the model has no matrix {name!r}{_nearest(name, leaves)}.")
  shape, dtype, rule = np.shape(leaves[leaf]), leaves[leaf].dtype, rules[leaf]
  if not tree.is_floating(leaves[leaf]) or rule.view is None:
    raise ValueError(f"{leaf!r} is {dtype}{list(shape)}, which is no floating-point matrix.")
  if rule.open and len(shape) > 2:
    choices = " or ".join(f"[({leaf!r}, {view!r})]" for view in layouts.choices(leaf, shape))
    raise ValueError(f"how {leaf!r} {list(shape)} lies is not known: say it by layout, {choices}.")
  view = rule.view.replace("l", "o")
  if not _is_explicit(rule) and not _is_kernel(leaf) and len(shape) == 2:
    view = _view(view, shape, lora)
  matrix = jax.eval_shape(
    lambda x: matrix_views.rows(x, view), jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  )
  return leaf, view, matrix.shape[1:]


# What may follow an adapter's name of a matrix in the leaf's: nnx has boxes around its leaves.
_ENDS = tuple(
  matrix + box for box in ("", "/value", "/raw_value") for matrix in ("", "/kernel", ".weight")
)


def _nearest(name: str, leaves: Mapping[str, Any]) -> str:
  """Returns a hint with names close to a missing matrix, and some known ones."""
  matrices = [n for n, x in leaves.items() if np.ndim(x) > 1] or list(leaves)
  known = sorted({re.sub(r"([/.](kernel|weight))?(/(raw_)?value)?$", "", n) or n for n in matrices})
  alike = {n.replace(".", "/"): n for n in (*leaves, *known)}.get(name.replace(".", "/"))
  if alike is not None and alike != name:
    return f": the parts of its names have {'/' if '/' in alike else '.'} between, write {alike!r}"
  close = difflib.get_close_matches(name, known, n=3)
  hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ";"
  more = f", ... ({len(known)} in all)" if len(known) > 12 else ""
  return f"{hint} Known: {', '.join(known[:12])}{more}"


def _is_kernel(leaf: str) -> bool:
  """Returns whether a leaf is a Flax kernel, boxed or not."""
  return leaf_names.name(leaf).leaf.endswith("kernel")


def _is_explicit(rule: layouts.Rule) -> bool:
  """Returns whether the caller's layout names a leaf."""
  return rule.reason.startswith("layout ")


def _view(view: str, shape: tuple[int, ...], lora: Lora | None) -> str:
  """Returns the view of a matrix that is no kernel, by the sizes of the factors or their class."""
  if lora is None or lora.a.ndim != 2 or lora.b.ndim != 2:
    return view
  out, inputs = lora.b.shape[0], lora.a.shape[1]
  fits = [v for v, sizes in (("oi", (out, inputs)), ("io", (inputs, out))) if sizes == shape]
  if len(fits) == 2:
    return "io" if isinstance(lora, Swapped) else view
  return fits[0] if fits else view


@double_precision.aware
def apply(params: Tree, adapter: Adapter | Any, *, layout: layouts.Layout | None = ()) -> Tree:
  """Adds an adapter to a model: its matrices become matrix + scale * b @ a.

  A matrix is the leaf of the adapter's name, or that name with `/kernel` or `.weight`, and the
  `/value` of nnx. `layout` decides on a leaf's view, then its library (see
  `jaxmerge.core.layouts`). If neither knows a leaf of two axes, the first are the outputs.

  Raises:
    ValueError: naming the matrix that the model lacks, or that has another shape.

  Example:
    >>> params = {"dense": {"kernel": jnp.zeros((3, 2))}}
    >>> adapter = {"dense": Lora(jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[1.0], [3.0]]))}
    >>> apply(params, adapter)["dense"]["kernel"].tolist()
    [[1.0, 3.0], [0.0, 0.0], [2.0, 6.0]]
  """
  adapter, leaves, changed = arguments.adapter(adapter), tree.named(params), {}
  for leaf, target in find_targets(leaves, adapter, layout).items():
    x, delta = jnp.asarray(leaves[leaf]), target.delta()
    wide = tree.compute_dtype(x.dtype, delta.dtype)
    changed[leaf] = (x.astype(wide) + delta.astype(wide)).astype(x.dtype)
  return tree.rebuild(params, leaves | finiteness.check_result(changed))
