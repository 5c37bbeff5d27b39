"""Checks callers' arguments: converts them if the meaning is clear, else raises with a reason."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any  # Any: whatever a caller gives.

import jax
import numpy as np

from jaxmerge import errors
from jaxmerge.catalog import lookup
from jaxmerge.core import fingerprint, stage, tree
from jaxmerge.core.stage import Method, Stage
from jaxmerge.core.tree import Tree
from jaxmerge.io.tensors import quantized
from jaxmerge.methods import factory


def method(value: Any) -> Method:
  """Returns a method, or raises ValueError naming what was passed instead.

  Example:
    >>> method("ties")
    Traceback (most recent call last):
    ValueError: 'ties' is the name of a method: pass the method, jaxmerge.methods.ties().
  """
  if isinstance(value, Method):
    return value
  if isinstance(value, tuple) and all(isinstance(step, Stage) for step in value):
    return Method(value)
  wanted = "the method comes first, and is what a call such as jaxmerge.methods.ties() returns"
  if isinstance(value, str):
    if value in lookup.METHODS:
      raise ValueError(
        f"{value!r} is the name of a method: pass the method, jaxmerge.methods.{value}()."
      )
    raise ValueError(f"no method is called {value!r}{errors.nearest(value, lookup.METHODS)}.")
  if isinstance(value, Stage):
    raise ValueError("a method is a sequence of stages, not one: write (stage,).")
  if callable(value):
    word = getattr(value, "__name__", "it")
    raise ValueError(f"{word} makes a method and is none: call it, {word}().")
  if isinstance(value, list | tuple):
    raise ValueError(
      f"{wanted}; several, or a list of stages, are joined by jaxmerge.core.stage.chain(...)."
    )
  raise ValueError(f"{wanted}; got {_kind(value)}.")


def refuse_weights(method: Method, instead: str, vectors: str) -> None:
  """Raises ValueError for a published method of task vectors without a base.

  Args:
    method: what merges them.
    instead: how to give a base.
    vectors: how to give task vectors.
  """
  names = [n for n in map(factory.name_of, method) if n in lookup.METHODS]
  if name := next((n for n in names if lookup.METHODS[n].on == "task vectors"), None):
    raise ValueError(
      f"{name} merges task vectors, the differences from a base, but there is no base: give one, "
      f"{instead}; for models that are task vectors already, {vectors}."
    )


def describe_method(
  method: Method, numbers: Mapping[str, Any], words: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns a plan's record of a method, and its hyperparameters with defaults filled in.

  A published method is described by its name and settings, another by a digest of its code.

  Example:
    >>> from jaxmerge import methods
    >>> describe_method(methods.average(normalize=False), {"weight": 0.5})
    ({'method': 'average', 'normalize': False}, {'weight': 0.5})
  """
  every = {**{n: v for n, v in stage.hparams(method).items() if n != "seed"}, **numbers}
  called = words or ("" if method.name in lookup.METHODS else method.name)
  said: dict[str, Any] = {"words": called} if called else {}
  if not factory.is_published(method):
    return {"method": fingerprint.fingerprint(method), **said}, dict(numbers)
  if masks := [step.where for step in method if step.where is not None]:
    said["where"] = f"some leaves, by {fingerprint.fingerprint(masks)}"
  return {"method": method.name, **dict(method.settings), **said}, every


def stack_models(
  base: Any,
  models: Any,
  names: Sequence[str] | None = None,
  call: str = "merge(method, models, base)",
) -> tuple[Tree, Sequence[str] | None]:
  """Returns the stack of models and their names: a list or dict of trees like the base is stacked.

  Args:
    base: tree of arrays [*s].
    models: stack [K, *s], or several trees like the base: a sequence, or a dict by name.
    names: of the models; else the keys of the dict.
    call: what the caller should have written.

  Raises:
    ValueError: for what is no tree of arrays, one model in place of several, and models where the
      base should be.

  Example:
    >>> one = {"w": np.ones(1)}
    >>> stack, names = stack_models({"w": np.zeros(1)}, {"a": one, "b": one})
    >>> stack["w"].shape, names
    ((2, 1), ['a', 'b'])
  """
  if isinstance(names, str):
    raise ValueError(f"names must be a list with a name for each model, got the text {names!r}.")
  models = list(models) if isinstance(models, Iterator) else models
  _refuse_others(base, "the base")
  if _names(models) != _names(base):
    if _several(models, base):
      if isinstance(models, Mapping):
        names = list(map(str, models)) if names is None else names
        models = list(models.values())
      for k, one in enumerate(models):
        _refuse_others(one, f"model {k}")
      return tree.stack(models), names
    if _several(base, models):
      raise ValueError(_SWAPPED.format(call, "the base has several models"))
    if isinstance(models, list | tuple) and not isinstance(base, list | tuple):
      for k, one in enumerate(models):
        _refuse_others(one, f"model {k}")
        tree.check_same(base, one, left="the base", right=f"model {k}", dtype=False)
  _refuse_others(models, "the models")
  ours, theirs = tree.named(base), tree.named(models)
  if ours and ours.keys() == theirs.keys():
    pairs = [(ours[n].shape, theirs[n].shape) for n in ours]
    if all(a == b for a, b in pairs):
      raise ValueError(
        "one model is given in place of a stack: every leaf is as large as the base's, without an "
        "axis of models; give a list of models, such as [model]."
      )
    if all(len(a) == len(b) + 1 and a[1:] == b for a, b in pairs):
      raise ValueError(_SWAPPED.format(call, "the leaves of the base have an axis of models"))
  return models, names


_SWAPPED = "base and models seem to be swapped: it is {}: {}."


def check_stack(models: Any, call: str = "merge(method, {})") -> Tree:
  """Returns a stack to merge without a base; raises ValueError if it looks like separate trees.

  Args:
    models: stack [K, *s].
    call: what the caller should have written, with {} in place of the stack.
  """
  models = list(models) if isinstance(models, Iterator) else models
  refuse(models, "the models")
  listed = isinstance(models, list | tuple) and not hasattr(models, "_fields")
  each = list(models) if listed else list(models.values()) if isinstance(models, Mapping) else []
  # By name: modules of Flax are equal to themselves alone.
  trees = [{n: getattr(x, "shape", None) for n, x in tree.named(m).items()} for m in each]
  inner = all(_has_parts(m) for m in each)
  # A stack often has a single entry, such as params, and several arrays of equal shape.
  several = len(each) > (0 if listed and inner else 1) and (listed or inner)
  if several and all(shapes == trees[0] for shapes in trees[1:]):
    kind, stack = ("list", "models") if listed else ("dict", "list(models.values())")
    alike = "trees alike" if len(each) > 1 else "tree"
    raise ValueError(
      f"a {kind} of {len(each)} {alike} is given in place of a stack; if they are models, "
      f"stack them: {call.format(f'jaxmerge.stack({stack})')}; if they are parts of a stack, put "
      "them into one more dict, {'model': stack}."
    )
  _refuse_others(models, "the models")
  return models


def paths(models: Any, names: Sequence[str] | None) -> tuple[list[Any], Sequence[str] | None]:
  """Returns the paths of models and their names, from a list or a dict by name.

  Example:
    >>> paths({"chat": "models/chat"}, None)
    (['models/chat'], ['chat'])
  """
  if isinstance(models, str | os.PathLike):
    raise ValueError(f"models must be a list of folders, got one: give [{str(models)!r}].")
  if isinstance(names, str):
    raise ValueError(f"names must be a list with a name for each model, got the text {names!r}.")
  if isinstance(models, Mapping):
    names, models = names or list(models), models.values()
  folders = list(models)
  for path in folders:
    if not isinstance(path, str | os.PathLike):
      raise ValueError(
        f"models must be folders or ids, got {_kind(path)}; jaxmerge.merge merges arrays in memory."
      )
  return folders, names


def adapters(value: Any, names: Sequence[str] | None) -> tuple[list[Any], Sequence[str] | None]:
  """Returns adapters and their names, from a list, a dict by name, or one dict of factors."""
  if isinstance(value, Mapping):
    several = any(isinstance(one, Mapping) for one in value.values())
    names = (names or list(value)) if several else names
    value = list(value.values()) if several else [value]
  if isinstance(value, str | os.PathLike) or not hasattr(value, "__iter__"):
    raise ValueError(
      f"adapters must be a list of adapters, got {_kind(value)}{_hint_to_load(value)}."
    )
  return [adapter(one, f"adapter {k}") for k, one in enumerate(value)], names


def adapter(value: Any, label: str = "the adapter") -> Any:
  """Returns an adapter; raises ValueError unless it is a dict of factors by matrix name.

  Example:
    >>> adapter([{}])
    Traceback (most recent call last):
    ValueError: the adapter must be a dict of Lora by matrix, got a list: give one of its items; \
adapters.merge merges several.
  """
  shape = f"{label} must be a dict of Lora by matrix, got"
  if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
    raise ValueError(
      f"{shape} a {_kind(value)}: give one of its items; adapters.merge merges several."
    )
  if not isinstance(value, Mapping):
    raise ValueError(f"{shape} {_kind(value)}{_hint_to_load(value)}.")
  for name, factors in value.items():
    if isinstance(factors, Mapping):
      raise ValueError(f"{shape} a dict by name: give one, such as its {name!r}.")
    if not (hasattr(factors, "a") and hasattr(factors, "b") and hasattr(factors, "scale")):
      raise ValueError(f"{shape} {_kind(factors)} for {name!r}: give adapters.Lora(a, b, scale).")
  return value


def _hint_to_load(value: Any) -> str:
  is_path = isinstance(value, str | os.PathLike)
  return f"; adapters.load({str(value)!r}) reads one" if is_path else ""


def hparams(hparams: Any, seed: Any) -> dict[str, Any]:
  """Returns hyperparameters by name, with the seed; ValueError for anything but a mapping.

  Example:
    >>> hparams({"scale": 0.5}, 7)
    {'scale': 0.5, 'seed': 7}
  """
  if hparams is not None and not isinstance(hparams, Mapping):
    raise ValueError(
      f"hparams must be hyperparameters by name, such as {{'scale': 0.5}}, got {_kind(hparams)}."
    )
  return {**(hparams or {}), **({} if seed is None else {"seed": seed})}


def tasks(apply: Any, value: Any, settings: Any) -> list[Any]:
  """Returns the tasks of a loop as a list; ValueError for arguments that are something else."""
  if not callable(apply):
    text = "a function (params, inputs, head) -> outputs, which comes before the params"
    raise ValueError(f"apply must be {text}, got {_kind(apply)}.")
  if not dataclasses.is_dataclass(settings):
    raise ValueError(f"settings must be jaxmerge.Settings(...), got {_kind(settings)}.")
  if dataclasses.is_dataclass(value):
    raise ValueError("tasks must be a list of tasks, got one: give [task].")
  if not isinstance(value, Mapping):
    return list(value)
  for name, task in value.items():
    if name != (called := getattr(task, "name", name)):
      raise ValueError(
        f"tasks: the task under {name!r} has the name {called!r}: give both one name, or a list."
      )
  return list(value.values())


def in_order_of_tasks(experts: Tree, names: Sequence[str] | None, tasks: Sequence[str]) -> Tree:
  """Returns a stack of experts in the order of their tasks; without names it is in that order.

  Example:
    >>> in_order_of_tasks({"w": np.arange(2)}, ["b", "a"], ["a", "b"])["w"].tolist()
    [1, 0]
  """
  if names is None:
    return experts
  if set(names) != set(tasks):
    strange = [n for n in names if n not in tasks]
    without = [n for n in tasks if n not in names]
    wrong = f"{strange[0]!r} is no task" if strange else f"task {without[0]!r} has none"
    raise ValueError(
      f"experts by name must be those of the tasks, {', '.join(tasks)}: {wrong}; give a dict by "
      "the names of the tasks, or a list in their order."
    )
  order = np.asarray([list(names).index(n) for n in tasks])
  return jax.tree.map(lambda x: x[order], experts)


def refuse(params: Tree, label: str) -> None:
  """Raises ValueError, naming a leaf, for leaves that are not weights: optimizer states, codes."""
  tree.refuse_optimizers(params, label)
  quantized.refuse(tree.named(params), label)


def _names(params: Any) -> set[str]:
  return set(tree.named(params))


def _several(models: Any, base: Any) -> bool:
  """Returns whether these are several trees with the leaves of a base."""
  each = list(models.values()) if isinstance(models, Mapping) else models
  if not isinstance(each, list | tuple) or not each:
    return False
  if len(each) == 1 and isinstance(models, Mapping):  # Or one tree nested under an extra key.
    return jax.tree.map(np.shape, tree.named(each[0])) == jax.tree.map(np.shape, tree.named(base))
  return all(_names(one) == _names(base) for one in each)


def _has_parts(value: Any) -> bool:
  """Returns whether a value is a mapping or a module of parts, and no array, even in a box."""
  if isinstance(value, Mapping | list | tuple):
    return isinstance(value, Mapping)
  structure: Any = jax.tree.structure(value)  # Any: its type has no children for mypy.
  parts = structure.children()
  return len(parts) > 1 or any(part.num_nodes > 1 for part in parts)


def _refuse_others(params: Any, label: str) -> None:
  """Raises ValueError for leaves that are not arrays or not weights, and for an empty tree."""
  refuse(params, label)
  leaves = tree.named(params)
  for name, leaf in leaves.items():
    if not _is_array(leaf):
      what = f"leaf {name!r} of {label} is" if name else f"{label} must be a tree of arrays, not"
      hint = "; x.numpy() makes an array of a tensor" if hasattr(leaf, "numpy") else ""
      raise ValueError(
        f"{what} {_kind(leaf)}: arrays of numbers, of NumPy or JAX, are merged{hint}."
      )
    if line := _unreadable(leaf.dtype):
      raise ValueError(f"leaf {name!r} of {label} is {leaf.dtype}, {line}.")
  if not leaves:
    hint = "; merge(method, models) merges without a base" if label == "the base" else ""
    raise ValueError(f"{label} must be a tree of arrays, but there is no leaf in it{hint}.")


def _unreadable(dtype: Any) -> str | None:
  """Returns why JAX cannot represent a dtype, and what to pass instead."""
  if not isinstance(dtype, np.dtype):
    return None
  if dtype.kind in "Mm" or dtype.names:
    return "which is no number; leave it out of the tree"
  if not dtype.isnative:
    return "in the byte order of another machine; give x.astype(x.dtype.newbyteorder('='))"
  if dtype.kind in "fc" and dtype.itemsize > (8 if dtype.kind == "f" else 16):
    return "wider than JAX can compute; give x.astype('float64')"
  return None


def _is_array(x: Any) -> bool:
  has_type = hasattr(x, "shape") and hasattr(x, "dtype") and not hasattr(x, "numpy")
  return has_type and getattr(x.dtype, "kind", "f") not in "OSU"  # Objects and texts.


def _kind(x: Any) -> str:
  kind = type(x)
  return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
