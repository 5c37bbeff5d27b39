"""Names, structure and dtypes of trees of arrays.

A model is a nested dict (any pytree) of arrays. A stack is the same tree with a leading task axis K
on each leaf. A leaf's name is its path joined by slashes; a tag is the CRC32 of a name.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any  # A tree is whatever jax.tree accepts.

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
Predicate = Callable[[str], bool]

# Where the containers of optimizers are defined, and the keys that they lie under where a state
# has been made a dict.
_OPTIMIZERS = (
  "optax",
  "flax.training.train_state",
  "flax.nnx.training.optimizer",
  "jax.example_libraries.optimizers",
)
_OPTIMIZER_KEYS = {"opt_state", "optimizer_state"}
_WEIGHTS = {  # What to give in place of containers, by where they are defined, and of keys.
  "flax.training": "state.params",
  "flax.nnx": "flax.nnx.state(model)",
  "": "the weights alone, such as state.params or state['params']",
}


def name_of(path: tuple[Any, ...]) -> str:
  """Joins a key path to a name.

  Example:
    >>> name_of((jax.tree_util.DictKey("encoder"), jax.tree_util.SequenceKey(0)))
    'encoder/0'
  """
  return jax.tree_util.keystr(path, simple=True, separator="/")


def named(tree: Tree) -> dict[str, Any]:
  """Returns the leaves by name, in the order of their names.

  Raises:
    ValueError: if two leaves have the same name, as in {"a": {"b": x}, "a/b": y}.

  Example:
    >>> named({"b": 1, "a": {"c": 2}})
    {'a/c': 2, 'b': 1}
  """
  leaves: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = name_of(path)
    if name in leaves:
      raise ValueError(f"two leaves are named {name!r}; rename one of them.")
    leaves[name] = leaf
  return dict(sorted(leaves.items()))


def rebuild(tree: Tree, leaves: dict[str, Any]) -> Tree:
  """Puts leaves given by name into the structure of `tree`.

  Example:
    >>> rebuild({"b": 1, "a": {"c": 2}}, {"a/c": 20, "b": 10})
    {'a': {'c': 20}, 'b': 10}
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: leaves[name_of(path)], tree)


def tag(name: str) -> int:
  """Returns the CRC32 of a name: the same in every process, unlike `hash`.

  Example:
    >>> tag("encoder/kernel")
    1146623514
  """
  return zlib.crc32(name.encode())


def matching(pattern: str) -> Predicate:
  """Returns a predicate that holds for names that the regular expression matches somewhere.

  Example:
    >>> matching("kernel$")("encoder/kernel")
    True
  """
  search = re.compile(pattern).search
  return lambda name: search(name) is not None


def stack(trees: Sequence[Tree] | Any) -> Tree:
  """Stacks models of one structure: K trees of [*s] -> one tree of [K, *s].

  Raises:
    ValueError: for no trees, or naming the first leaf that differs in structure, shape or dtype.

  Example:
    >>> stack([{"w": jnp.array([1, 2])}, {"w": jnp.array([3, 4])}])["w"].tolist()
    [[1, 2], [3, 4]]
  """
  if isinstance(trees, Mapping):
    raise ValueError("stack takes a list of trees, got a dict; of a dict by name: models.values().")
  trees = list(trees)
  if not trees:
    raise ValueError("stack needs at least one tree, got none.")
  for k, params in enumerate(trees):
    refuse_optimizers(params, f"model {k}")
  for k, other in enumerate(trees[1:], start=1):
    check_same(trees[0], other, left="model 0", right=f"model {k}")
  return jax.tree.map(lambda *leaves: _stack_leaves(leaves), *trees)


def _stack_leaves(leaves: Sequence[Any]) -> Any:
  """Stacks leaves; by NumPy those of NumPy that JAX, as it is set, would make narrow."""
  every = all(isinstance(x, (np.ndarray, np.generic)) for x in leaves)
  narrowed = every and jax.dtypes.canonicalize_dtype(leaves[0].dtype) != leaves[0].dtype
  return np.stack(leaves) if narrowed else jnp.stack(leaves)


def unstack(models: Tree) -> list[Tree]:
  """Splits a stack into its models: one tree of [K, *s] -> K trees of [*s].

  Example:
    >>> [model["w"].tolist() for model in unstack({"w": jnp.array([[1, 2], [3, 4]])})]
    [[1, 2], [3, 4]]
  """
  return [jax.tree.map(lambda leaf: leaf[k], models) for k in range(num_models(models))]


def num_models(models: Tree) -> int:
  """Returns K, the length of the task axis that all leaves of a stack share.

  Raises:
    ValueError: for a leaf without a task axis, or naming the first leaf whose K differs.

  Example:
    >>> num_models({"w": jnp.zeros((3, 2)), "b": jnp.zeros(3)})
    3
  """
  leaves = named(models)
  if not leaves:
    raise ValueError("a stack needs at least one leaf, got an empty tree.")
  first = next(iter(leaves))
  for name, leaf in leaves.items():
    if jnp.ndim(leaf) == 0:
      raise ValueError(f"leaf {name!r} is a scalar; in a stack every leaf has a leading task axis.")
    if leaf.shape[0] != leaves[first].shape[0]:
      raise ValueError(
        f"leaf {name!r} holds {leaf.shape[0]} models, but {first!r} holds {leaves[first].shape[0]}"
        "; is it no stack, which jaxmerge.stack makes of models?"
      )
  return leaves[first].shape[0]


def check_same(a: Tree, b: Tree, *, left: str, right: str, dtype: bool = True) -> None:
  """Raises ValueError, naming the first leaf that is missing or differs in shape or dtype.

  Example:
    >>> check_same({"w": jnp.zeros(2)}, {"w": jnp.zeros(3)}, left="the base", right="the expert")
    Traceback (most recent call last):
    ValueError: leaf 'w' is (2,) in the base but (3,) in the expert.
  """
  ours, theirs = named(a), named(b)
  for name in sorted(ours.keys() ^ theirs.keys()):
    where, other = (left, right) if name in ours else (right, left)
    raise ValueError(f"leaf {name!r} is in {where} but not in {other}{_prefix(ours, theirs)}.")
  for name, leaf in ours.items():
    x, y = (v if hasattr(v, "dtype") else np.asarray(v) for v in (leaf, theirs[name]))
    if x.shape != y.shape:
      raise ValueError(f"leaf {name!r} is {x.shape} in {left} but {y.shape} in {right}.")
    if dtype and x.dtype != y.dtype:
      raise ValueError(f"leaf {name!r} is {x.dtype} in {left} but {y.dtype} in {right}.")


def _prefix(ours: Collection[str], theirs: Collection[str]) -> str:
  """Says under which one key all leaves of a tree lie that lie in the other without it."""
  for more, less in ((ours, theirs), (theirs, ours)):
    words = {name.split("/", 1)[0] for name in more}
    if len(words) == 1 and {name.partition("/")[2] for name in more} == set(less):
      return f": of one all leaves lie under {words.pop()!r}, of the other they do not"
  return ""


def is_floating(leaf: Any) -> bool:
  """Returns whether a leaf is merged; integers, booleans and keys are copied from the base.

  Example:
    >>> is_floating(jnp.zeros(2, jnp.bfloat16)), is_floating(jnp.arange(2))
    (True, False)
  """
  return jnp.issubdtype(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf), jnp.floating)


def is_equal(a: Any, b: Any) -> bool:
  """Returns whether two arrays are equal, bit for bit; neither goes through a program of JAX.

  Example:
    >>> is_equal(np.array([2**40, 1]), np.array([0, 1]))
    False
  """
  on_host = all(isinstance(x, np.ndarray) for x in (a, b))
  return bool((a == b).all() if on_host else jnp.all(a == b))


def refuse_optimizers(tree: Tree, whose: str) -> None:
  """Raises ValueError, naming the place, for the state of an optimizer: it is no part of a model.

  Known are the containers of optax, Flax's `TrainState` and `nnx.Optimizer`, by the modules of
  their types, and what lies under the key `opt_state`.

  Example:
    >>> refuse_optimizers({"params": {"w": 1}, "opt_state": {"w": 1}}, "the base")
    Traceback (most recent call last):
    ValueError: 'opt_state/w' of the base is an optimizer's state, no weight: give the weights \
alone, such as state.params or state['params'].
  """
  for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_of_optimizer):
    kind = ""
    if _of_optimizer(node) and jax.tree.leaves(node):  # Some are empty.
      kind = f"{type(node).__module__}.{type(node).__qualname__}"
    elif not set(name_of(path).split("/")) & _OPTIMIZER_KEYS:
      continue
    what = f"{name_of(path)!r} of {whose}" if path else whose
    also = f" ({kind})" if kind else ""
    advice = next((text for home, text in _WEIGHTS.items() if kind.startswith(home)), "")
    raise ValueError(f"{what} is an optimizer's state{also}, no weight: give {advice}.")


def _of_optimizer(node: Any) -> bool:
  """Returns whether the type of a node is an optimizer's, or derived from one; imports none."""
  homes = [f"{kind.__module__}." for kind in type(node).__mro__]
  return any(home.startswith(f"{package}.") for home in homes for package in _OPTIMIZERS)


def refuse_complex(base: Tree | None, models: Tree) -> None:
  """Raises ValueError, naming the leaf, for complex numbers that differ, or that are traced."""
  ones = {} if base is None else named(base)
  for name, leaf in named(models).items():
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if not jnp.issubdtype(dtype, jnp.complexfloating):
      continue
    one = leaf[:1] if base is None else ones[name]
    traced = any(isinstance(x, jax.core.Tracer) for x in (leaf, one))
    if traced or not is_equal(leaf, one if base is None else one[None]):
      raise ValueError(
        f"leaf {name!r} is {dtype}, and complex numbers are not merged; give its real and its "
        "imaginary part as two leaves."
      )


def compute_dtype(*dtypes: Any) -> np.dtype:
  """Returns the dtype to compute in: the widest of float32 and those of the arguments.

  Example:
    >>> compute_dtype(jnp.bfloat16)
    dtype('float32')
  """
  # By size: jnp.promote_types refuses to promote under strict promotion.
  return max((np.dtype(np.float32), *map(np.dtype, dtypes)), key=lambda dtype: dtype.itemsize)
