"""What callers give a merge: put right where it is clear what is meant, else told what is wrong."""

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


def method(given: Any) -> Method:
  """Returns a method; ValueError that says what was given in its place.

  Example:
    >>> method("ties")
    Traceback (most recent call last):
    ValueError: a method is wanted, not its name: call jaxmerge.methods.ties().
  """
  if isinstance(given, Method):
    return given
  if isinstance(given, tuple) and all(isinstance(step, Stage) for step in given):
    return Method(given)
  wanted = "the method comes first, and is what a call such as jaxmerge.methods.ties() returns"
  if isinstance(given, str):
    if given in lookup.METHODS:
      raise ValueError(f"a method is wanted, not its name: call jaxmerge.methods.{given}().")
    raise ValueError(f"no method is called {given!r}{errors.nearest(given, lookup.METHODS)}.")
  if isinstance(given, Stage):
    raise ValueError("a method is a sequence of stages, not one: write (stage,).")
  if callable(given):
    word = getattr(given, "__name__", "it")
    raise ValueError(f"{word} makes a method and is none: call it, {word}().")
  if isinstance(given, list | tuple):
    raise ValueError(
      f"{wanted}; several, or a list of stages, are joined by jaxmerge.core.stage.chain(...)."
    )
  raise ValueError(f"{wanted}; got {_kind(given)}.")


def refuse_weights(method: Method, instead: str, vectors: str) -> None:
  """Raises ValueError for a published method of task vectors that is given the weights themselves.

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


def described(
  method: Method, numbers: Mapping[str, Any], words: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns what a plan says of a method, and its hyperparameters with their defaults.

  A published method is told by its name and settings, another by a digest of its code.

  Example:
    >>> from jaxmerge import methods
    >>> described(methods.average(normalize=False), {"weight": 0.5})
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


def stacked(
  base: Any, models: Any, names: Sequence[str] | None = None
) -> tuple[Tree, Sequence[str] | None]:
  """Returns the stack of models and their names: a list or dict of trees like the base is stacked.

  Args:
    base: tree of arrays [*s].
    models: stack [K, *s], or several trees like the base: a sequence, or a dict by name.
    names: of the models; else the keys of the dict.

  Raises:
    ValueError: for what is no tree of arrays, one model in place of several, and models where the
      base should be.

  Example:
    >>> stack, names = stacked({"w": np.zeros(1)}, {"a": {"w": np.ones(1)}, "b": {"w": np.ones(1)}})
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
      raise ValueError(f"{_SWAPPED}: what is given as the base holds several models.")
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
      raise ValueError(f"{_SWAPPED}: the leaves of the base have an axis of models.")
  return models, names


_SWAPPED = "base and models seem to be swapped: it is merge(method, models, base)"


def without_base(models: Any) -> Tree:
  """Returns a stack to be merged without a base; ValueError for what may be models, each a tree."""
  models = list(models) if isinstance(models, Iterator) else models
  refuse(models, "the models")
  listed = isinstance(models, list | tuple) and not hasattr(models, "_fields")
  each = list(models) if listed else list(models.values()) if isinstance(models, Mapping) else []
  trees = [jax.tree.map(lambda x: getattr(x, "shape", None), m) for m in each]
  inner = all(isinstance(m, Mapping) for m in each)
  # A stack often has one part, such as params, and several arrays alike.
  several = len(each) > (0 if listed and inner else 1) and (listed or inner)
  if several and all(own == trees[0] for own in trees[1:]):
    kind, stack = ("list", "models") if listed else ("dict", "list(models.values())")
    alike = "trees alike" if len(each) > 1 else "tree"
    raise ValueError(
      f"a {kind} of {len(each)} {alike} is given in place of a stack; if they are models, "
      f"stack them: merge(method, jaxmerge.stack({stack})); if they are parts of a stack, put "
      "them into one more dict: merge(method, {'model': stack})['model']."
    )
  _refuse_others(models, "the models")
  return models


def paths(models: Any, names: Sequence[str] | None) -> tuple[list[Any], Sequence[str] | None]:
  """Returns the places of models and their names: a list, or a dict of them by name.

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
  listed = list(models)
  for own in listed:
    if not isinstance(own, str | os.PathLike):
      raise ValueError(
        f"models must be folders or ids, got {_kind(own)}; jaxmerge.merge merges arrays in memory."
      )
  return listed, names


def adapters(given: Any, names: Sequence[str] | None) -> tuple[list[Any], Sequence[str] | None]:
  """Returns adapters and their names: a list, a dict of them by name, or one, a dict of factors."""
  if isinstance(given, Mapping):
    several = any(isinstance(own, Mapping) for own in given.values())
    names = (names or list(given)) if several else names
    given = list(given.values()) if several else [given]
  if isinstance(given, str | os.PathLike) or not hasattr(given, "__iter__"):
    raise ValueError(f"adapters must be a list of adapters, got {_kind(given)}{_loaded(given)}.")
  return [adapter(own, f"adapter {k}") for k, own in enumerate(given)], names


def adapter(given: Any, whose: str = "the adapter") -> Any:
  """Returns an adapter; ValueError for what is no dict of the factors of matrices by their names.

  Example:
    >>> adapter([{}])
    Traceback (most recent call last):
    ValueError: the adapter must be a dict of Lora by matrix, got a list: give one of its items; \
adapters.merge merges several.
  """
  shape = f"{whose} must be a dict of Lora by matrix, got"
  if isinstance(given, list | tuple) and not hasattr(given, "_fields"):
    raise ValueError(
      f"{shape} a {_kind(given)}: give one of its items; adapters.merge merges several."
    )
  if not isinstance(given, Mapping):
    raise ValueError(f"{shape} {_kind(given)}{_loaded(given)}.")
  for name, own in given.items():
    if isinstance(own, Mapping):
      raise ValueError(f"{shape} a dict by name: give one, such as its {name!r}.")
    if not (hasattr(own, "a") and hasattr(own, "b") and hasattr(own, "scale")):
      raise ValueError(f"{shape} {_kind(own)} for {name!r}: give adapters.Lora(a, b, scale).")
  return given


def _loaded(given: Any) -> str:
  known = isinstance(given, str | os.PathLike)
  return f"; adapters.load({str(given)!r}) reads one" if known else ""


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


def tasks(apply: Any, given: Any, settings: Any) -> list[Any]:
  """Returns the tasks of a loop as a list; ValueError for arguments that are something else."""
  if not callable(apply):
    text = "a function (params, inputs, head) -> outputs, which comes before the params"
    raise ValueError(f"apply must be {text}, got {_kind(apply)}.")
  if not dataclasses.is_dataclass(settings):
    raise ValueError(f"settings must be jaxmerge.Settings(...), got {_kind(settings)}.")
  if dataclasses.is_dataclass(given):
    raise ValueError("tasks must be a list of tasks, got one: give [task].")
  return list(given.values()) if isinstance(given, Mapping) else list(given)


def refuse(given: Tree, whose: str) -> None:
  """Raises ValueError, naming a leaf, for what is no weight: optimizers' states, codes."""
  tree.refuse_optimizers(given, whose)
  quantized.refuse(tree.named(given), whose)


def _names(given: Any) -> set[str]:
  return set(tree.named(given))


def _several(models: Any, base: Any) -> bool:
  """Tells whether these are several trees with the leaves of a base."""
  each = list(models.values()) if isinstance(models, Mapping) else models
  if not isinstance(each, list | tuple) or not each:
    return False
  if len(each) == 1 and isinstance(models, Mapping):  # Or a tree that lies under one key more.
    return jax.tree.map(np.shape, tree.named(each[0])) == jax.tree.map(np.shape, tree.named(base))
  return all(_names(one) == _names(base) for one in each)


def _refuse_others(given: Any, whose: str) -> None:
  """Raises ValueError for leaves that are no arrays or no weights, and for no leaves."""
  refuse(given, whose)
  leaves = tree.named(given)
  for name, leaf in leaves.items():
    if not _is_array(leaf):
      what = f"leaf {name!r} of {whose} is" if name else f"{whose} must be a tree of arrays, not"
      hint = "; x.numpy() makes an array of a tensor" if hasattr(leaf, "numpy") else ""
      raise ValueError(
        f"{what} {_kind(leaf)}: arrays of numbers, of NumPy or JAX, are merged{hint}."
      )
    if line := _unreadable(leaf.dtype):
      raise ValueError(f"leaf {name!r} of {whose} is {leaf.dtype}, {line}.")
  if not leaves:
    hint = "; merge(method, models) merges without a base" if whose == "the base" else ""
    raise ValueError(f"{whose} must be a tree of arrays, but there is no leaf in it{hint}.")


def _unreadable(dtype: Any) -> str | None:
  """Says what of a dtype JAX has no numbers of, and what to give in its place."""
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
  known = hasattr(x, "shape") and hasattr(x, "dtype") and not hasattr(x, "numpy")
  return known and getattr(x.dtype, "kind", "f") not in "OSU"  # Objects and texts.


def _kind(x: Any) -> str:
  kind = type(x)
  return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
