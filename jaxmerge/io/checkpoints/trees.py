"""Reads the tree of an Orbax checkpoint from its `_METADATA`, and locates the model in it.

A trainer saves more than the model: optimizer state, step, random keys. The model is the subtree
with a name such as `params`; if several qualify, the user must choose.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple  # Any: values of JSON.

METADATA = "_METADATA"
PARAMS = ("params", "model_params", "model_parameters", "parameters")
# Names that contain a model only if all their siblings are known to be something else.
WRAPPERS = ("model", "state", "train_state", "target", "default", "items", "item", "pytree")
STATISTICS = ("batch_stats",)  # Running statistics, which are part of the model.
OTHERS = frozenset(
  {
    "opt_state", "optimizer", "optimizer_state", "opt", "optim", "tx", "step", "iter",
    "iteration", "global_step", "epoch", "rng", "rngs", "key", "prng_key", "dropout_rng",
    "dropout_key", "count", "loss_scale", "metrics", "metadata", "custom_metadata",
    "cache", "aqt", "intermediates", "data", "data_iter", "data_loader", "dataloader",
    "iterator", "hyperparams", "apply_fn", "_overwrites_with_gradient",
  }
)  # fmt: skip
# Those of them that are left out if the root of the tree is the model.
_NEVER = frozenset(
  {
    "opt_state", "optimizer", "optimizer_state", "step", "global_step", "rng", "rngs",
  }
)  # fmt: skip
_RANDOM = frozenset({"rng", "rngs"})
_VALUE = "value"  # NNX: an array is the `value` of its variable.
_ARRAYS = ("jax.Array", "np.ndarray", "scalar")


class Leaf(NamedTuple):
  """A leaf of the tree.

  Attributes:
    keys: its path.
    is_array: whether it is an array; otherwise it is a string, None, or an empty node.
  """

  keys: tuple[str, ...]
  is_array: bool

  @property
  def parameter(self) -> str:
    """Returns the name under which its array is stored."""
    return ".".join(self.keys)


class Model(NamedTuple):
  """The part of a tree that is a model.

  Attributes:
    subtree: path of its root.
    leaves: leaves by tensor name: the path below the root, without the `value` of NNX.
    left_out: number of arrays of each part of the tree that is not in the model.
  """

  subtree: tuple[str, ...]
  leaves: Mapping[str, Leaf]
  left_out: Mapping[str, int]


def leaves(where: str, content: Mapping[str, Any]) -> list[Leaf]:
  """Returns the leaves of a tree from the contents of `_METADATA`.

  Raises:
    ValueError: if these are not in Orbax's format.
  """
  try:
    records = [content["tree_metadata"][name] for name in content["tree_metadata"]]
    return [_leaf(record) for record in records]
  except (KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{where}: not the metadata of an Orbax checkpoint ({error!r}).") from error


def _leaf(record: Mapping[str, Any]) -> Leaf:
  value = record["value_metadata"]
  kind, skipped = value["value_type"], value.get("skip_deserialize", False)
  keys = tuple(str(key["key"]) for key in record["key_metadata"])
  return Leaf(keys, kind in _ARRAYS and not skipped)


def model(where: str, tree: Sequence[Leaf], subtree: tuple[str, ...] | None = None) -> Model:
  """Returns the model in a tree.

  >>> tree = [Leaf(("params", "w", "value"), True), Leaf(("step",), True)]
  >>> model("run", tree)
  Model(subtree=('params',), leaves={'w': Leaf(keys=('params', 'w', 'value'), is_array=True)}, \
left_out={'step': 1})

  Args:
    where: the checkpoint, for errors.
    tree: its leaves.
    subtree: path of the model; None: searched for by name.

  Raises:
    ValueError: if there is no model, or if there are several, with the candidates.
  """
  arrays = [leaf for leaf in tree if leaf.is_array]
  if subtree is None:
    root, outside = _find(where, arrays)
  else:
    root, outside = subtree, frozenset[str]()
  inside = [leaf for leaf in _below(arrays, root) if leaf.keys[len(root)] not in outside]
  inside = [leaf for leaf in inside if not _RANDOM.intersection(leaf.keys[len(root) :])]
  if not inside:
    known = ", ".join(sorted({leaf.keys[0] for leaf in arrays})) or "no arrays at all"
    inside_root = f"under {'/'.join(root)!r}" if root else "in it"
    raise ValueError(
      f"{where}: there is no model {inside_root}; "
      f"the tree has {known:.200}: write the path of the model in it, as PATH:SUBTREE."
    )
  named = _names(inside, len(root))
  beside = root[:-1] if subtree is None else ()
  for leaf in _below(arrays, beside) if root and subtree is None else ():
    if leaf.keys[len(beside)] in STATISTICS:
      named["/".join(_without_value(leaf.keys[len(beside) :]))] = leaf
  members = set(named.values())
  rest = collections.Counter(_label(leaf, root) for leaf in arrays if leaf not in members)
  return Model(root, dict(sorted(named.items())), dict(rest))


def _below(tree: Iterable[Leaf], root: tuple[str, ...]) -> list[Leaf]:
  return [x for x in tree if len(x.keys) > len(root) and x.keys[: len(root)] == root]


def _find(where: str, tree: Sequence[Leaf]) -> tuple[tuple[str, ...], frozenset[str]]:
  """Returns the root of the model, and the names directly below it that are not part of it."""
  root: tuple[str, ...] = ()
  in_params = False
  while True:
    below = {leaf.keys[len(root)] for leaf in _below(tree, root)}
    candidates = [n for n in sorted(below) if holds_params(n) and _below(tree, (*root, n))]
    if not candidates and not in_params:
      candidates = _wrappers(tree, root, below)
    if len(candidates) > 1:
      paths = " or ".join(f"{where}:{'/'.join((*root, name))}" for name in candidates)
      raise ValueError(f"{where}: the tree has several models: use {paths}.")
    if not candidates:
      return root, frozenset() if in_params else frozenset(below & _NEVER)
    root = (*root, candidates[0])
    in_params = in_params or holds_params(candidates[0])


def _wrappers(tree: Sequence[Leaf], root: tuple[str, ...], below: Set[str]) -> list[str]:
  """Returns the names that may contain the model, if all their siblings are known otherwise."""
  if below - OTHERS - set(STATISTICS) - set(WRAPPERS):
    return []
  names = [n for n in sorted(below) if n in WRAPPERS and _below(tree, (*root, n))]
  inner = {n: {x.keys[len(root) + 1] for x in _below(tree, (*root, n))} for n in names}
  is_state = {n: any(holds_params(i) or i in OTHERS for i in inner[n]) for n in names}
  return [n for n in names if is_state[n] or len(below) > 1]


def holds_params(name: str) -> bool:
  """Returns whether a name is a usual one for parameters."""
  return name in PARAMS or name.endswith("_params") or name.startswith("params_")


def _names(inside: Sequence[Leaf], depth: int) -> dict[str, Leaf]:
  """Returns leaves by tensor name, without a final `value` that all paths share."""
  paths = {leaf: leaf.keys[depth:] for leaf in inside}
  if all(len(keys) > 1 and keys[-1] == _VALUE for keys in paths.values()):
    paths = {leaf: keys[:-1] for leaf, keys in paths.items()}
  return {"/".join(keys): leaf for leaf, keys in paths.items()}


def _without_value(keys: tuple[str, ...]) -> tuple[str, ...]:
  return keys[:-1] if len(keys) > 1 and keys[-1] == _VALUE else keys


def _label(leaf: Leaf, root: tuple[str, ...]) -> str:
  """Returns the name of the part of the tree with a leaf that is not in the model."""
  shared = next((i for i, (a, b) in enumerate(zip(leaf.keys, root, strict=False)) if a != b), None)
  shared = min(len(root), len(leaf.keys) - 1) if shared is None else shared
  random = [i for i, key in enumerate(leaf.keys) if key in _RANDOM]
  return leaf.keys[random[0]] if random else leaf.keys[shared]
