"""Resolves hyperparameters: the caller's values replace defaults, checked and in model order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any  # Numbers come as Python numbers, arrays, or trees of them.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import errors
from jaxmerge.catalog import lookup
from jaxmerge.core import stage, tree
from jaxmerge.core.stage import Group, Method

Shapes = Mapping[str, tuple[int, ...]]


def resolve(
  method: Method,
  hparams: Mapping[str, Any],
  shapes: Shapes,
  num_models: int,
  copied: Collection[str] = (),
) -> dict[str, Any]:
  """Returns the method's hyperparameters by name: one value, or a dict with one per merged leaf.

  Args:
    method: the method, with its defaults.
    hparams: the caller's values.
    shapes: shapes of the leaves that are merged, without the task axis.
    num_models: number of models K.
    copied: names of leaves that are not merged: trees of values may have them too.

  Raises:
    ValueError: for unknown, missing or ill-shaped hyperparameters, and for values out of range
      where they are concrete.
  """
  values = stage.hparams(method)
  for name, value in hparams.items():
    if name not in values:
      if any(name in step.statistics for step in method):
        raise ValueError(
          f"{name!r} is a statistic of the method: give statistics={{{name!r}: ...}}."
        )
      if name in dict(method.settings):
        raise ValueError(
          f"{name!r} is a setting of the method, which chooses its program: write "
          f"{method.name}({name}={value!r})."
        )
      raise ValueError(f"the method has no hyperparameter {name!r}{errors.nearest(name, values)}.")
    if isinstance(value, (str, bytes)):
      raise ValueError(f"{name} must be a number, got {value!r}.")
    values[name] = value
  return {
    n: _check_value(
      n,
      _by_leaf(n, value, shapes, num_models, copied) if n in hparams else value,
      shapes,
      num_models,
      copied,
    )
    for n, value in values.items()
  }


def _by_leaf(
  name: str, value: Any, shapes: Shapes, num_models: int, copied: Collection[str]
) -> Any:
  """Reads a tuple with the structure of the tree as one value per leaf, and returns a dict.

  Raises:
    ValueError: for a list or tuple that could also be one value per model, and for a named tuple
      whose fields are not leaves.
  """
  if not isinstance(value, (list, tuple)) or not lookup.plain(value):
    return value
  by_leaf, fields = _values_by_leaf(value, shapes), hasattr(value, "_fields")
  if not fields and not (shapes.keys() <= by_leaf.keys() <= shapes.keys() | set(copied)):
    return value
  if not fields and len(value) == num_models:
    raise ValueError(
      f"{name} has {num_models} values, which may be one for each of {num_models} models or "
      f"for each of the leaves {', '.join(by_leaf)}; give an array (np.array) for the models, or a "
      "dict of leaves."
    )
  return by_leaf


def order_models(
  names: Sequence[str] | None, num_models: int, *, keep: bool
) -> tuple[Any, np.ndarray]:
  """Returns the models' order by tag (None if the caller's order stays) and their tags."""
  labels = [str(k) for k in range(num_models)] if names is None else list(names)
  tags = np.array([tree.tag(n) for n in labels], np.uint32)
  if len(labels) != num_models or len(set(tags.tolist())) != num_models:
    raise ValueError(f"names must be {num_models} different names, one per model, got {labels}.")
  if names is None or keep:
    return None, tags
  order = np.argsort(tags, kind="stable")
  return (None if (order == np.arange(num_models)).all() else order), tags[order]


def permute(value: Any, order: np.ndarray) -> Any:
  """Puts values per model in another order; other values stay as they are."""
  if isinstance(value, dict):
    return {n: permute(v, order) for n, v in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(value[k] for k in order)
  return value[order] if np.ndim(value) and np.shape(value)[0] == len(order) else value


def arrays(values: Mapping[str, Any]) -> dict[str, Any]:
  """Converts plain numbers to arrays, so that a new value does not compile again."""
  return {
    name: jax.tree.map(lambda v, n=name: _array(n, v), value, is_leaf=lookup.plain)
    for name, value in values.items()
  }


def group(
  names: tuple[str, ...], shapes: Shapes, num_models: int, values: Mapping[str, Any]
) -> Group:
  """Describes a group of leaves to `Stage.init`.

  A value per leaf is part of the group only if the group is that one leaf.
  """
  alone = len(names) == 1
  hparams = {
    n: v[names[0]] if isinstance(v, dict) else v
    for n, v in values.items()
    if alone or not isinstance(v, dict)
  }
  return Group({n: shapes[n] for n in names}, num_models, hparams)


def _check_value(
  name: str, value: Any, shapes: Shapes, num_models: int, copied: Collection[str]
) -> Any:
  if value is None:
    raise ValueError(f"the method needs {name!r}: give {name}= or hparams={{{name!r}: ...}}.")
  if lookup.plain(value) or isinstance(value, (jax.Array, np.ndarray, np.generic)):
    _check(name, name, value, num_models)
    return value
  by_leaf = _values_by_leaf(value, shapes)
  for missing in sorted(shapes.keys() - by_leaf.keys()):
    raise ValueError(f"hparams {name!r} has no value for leaf {missing!r}.")
  for unknown in sorted(by_leaf.keys() - shapes.keys() - set(copied)):
    raise ValueError(
      f"hparams {name!r} has a value for {unknown!r}, which is no leaf of the models."
    )
  for leaf in shapes:
    _check(name, f"{name} of leaf {leaf!r}", by_leaf[leaf], num_models)
  return {leaf: by_leaf[leaf] for leaf in shapes}


def _values_by_leaf(value: Any, shapes: Shapes) -> dict[str, Any]:
  """Returns values by leaf; a list in the tree is one value per model unless it holds leaves."""
  by_leaf = tree.named(value)
  if shapes.keys() <= by_leaf.keys():
    return by_leaf

  def inner(v: Any) -> bool:
    some = v is not value and isinstance(v, (list, tuple)) and not hasattr(v, "_fields")
    return some and lookup.plain(v)

  lists = jax.tree.map(lambda v: np.asarray(v) if inner(v) else v, value, is_leaf=inner)
  with_lists = tree.named(lists)
  return with_lists if shapes.keys() <= with_lists.keys() else by_leaf


def _check(name: str, label: str, value: Any, num_models: int) -> None:
  """Raises ValueError if a hyperparameter's value is ill-shaped or known to be out of range."""
  shape = tuple(np.shape(value))
  if name == "seed" and shape:
    raise ValueError(f"{label} must be one whole number, such as 0, got values of shape {shape}.")
  if len(shape) > 1:
    raise ValueError(
      f"{label} has shape {shape}; a hyperparameter is one number, or one per model "
      f"{(num_models,)}. Arrays over entries are statistics, which a stage declares: "
      f"Stage(..., statistics={{{name!r}: 'entry'}})."
    )
  if shape and shape[0] != num_models:
    raise ValueError(f"{label} has {shape[0]} values, but there are {num_models} models.")
  if name == "seed" and not lookup.plain(value) and not jnp.issubdtype(value.dtype, jnp.integer):
    raise ValueError(f"{label} must be a whole number, got {value.dtype}.")
  if not isinstance(value, jax.core.Tracer) and getattr(value, "is_fully_addressable", True):
    lookup.check_number(name, np.asarray(value).tolist(), label=label)


def _array(name: str, value: Any) -> Any:
  if not lookup.plain(value):
    return value
  # A compiled program narrows float64 arguments to float32 unless x64 is enabled.
  return np.asarray(value, np.uint32 if name == "seed" else np.float64)


def refuse_unmerged(name: str, num_models: int) -> None:
  """Raises ValueError, naming the leaf, where more than one model is left."""
  if num_models != 1:
    raise ValueError(
      f"no combiner touched leaf {name!r}: {num_models} models are left of it after the last stage."
      " A stage that leaves one model says combines=True."
    )
