"""Translates the methods and parameters of recipes to those of this library.

Without `compat`, a method follows its paper; with `compat: mergekit`, it gives mergekit's numbers.
docs/recipes.md has the table of differences.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from jaxmerge.catalog import lookup
from jaxmerge.recipe.records import Scalar


class Translation(NamedTuple):
  """A method of this library, with its settings and hyperparameters.

  Attributes:
    method: its name in `jaxmerge.methods`.
    settings: arguments of its factory.
    hparams: by hyperparameter, a function of a tensor's parameters in the recipe.
    of_weights: whether it merges the weights instead of task vectors.
    pair: whether the base is the first of the models.
  """

  method: str
  settings: Mapping[str, Any]
  hparams: Mapping[str, Callable[[Mapping[str, Any]], Any]]
  of_weights: bool = False
  pair: bool = False


def translate(
  name: str,
  shared: Mapping[str, Scalar],
  *,
  base: bool,
  varied: Collection[str] = (),
  compat: bool = False,
) -> Translation:
  """Returns this library's equivalent of a recipe's method.

  Args:
    name: the recipe's method.
    shared: its parameters with one value for all models, as of any of its tensors.
    base: whether there is a base.
    varied: parameters that differ between tensors; a density among them is counted per tensor.
    compat: whether to reproduce mergekit's numbers.
  """
  if name not in _METHODS:
    return _translate_catalog(name, shared, base)
  return _METHODS[name](_Options(shared, base, "density" in varied, compat))


def _translate_catalog(name: str, shared: Mapping[str, Scalar], base: bool) -> Translation:
  """Translates a method that mergekit lacks: its parameters are those of the factory."""
  entry = lookup.METHODS[name]
  settings = {
    n: shared[n]
    for n, p in entry.parameters.items()
    if not p.number and n in shared and not lookup.without_effect(name, n, shared)
  }
  hparams = {n: _of(n) for n, p in entry.parameters.items() if p.number}
  return Translation(name, settings, hparams, of_weights=entry.on == "either" and not base)


class _Options(NamedTuple):
  shared: Mapping[str, Scalar]
  base: bool
  apart: bool
  compat: bool

  @property
  def zero_sum(self) -> dict[str, str]:
    return {"zero_sum": "plus" if self.compat else "majority"}

  @property
  def reduce(self) -> dict[str, str]:
    return {"reduce": "mean" if self.shared["normalize"] else "sum"}

  @property
  def trim(self) -> dict[str, str]:
    if self.compat:
      return {"scope": "leaf", "rule": "exact"}
    return {"scope": "leaf" if self.apart else "tree", "rule": "kth"}

  @property
  def drop(self) -> dict[str, str | None]:
    return {"rescale": ("l1" if self.compat else "inverse") if self.shared["rescale"] else None}

  @property
  def restore(self) -> dict[str, str | None]:
    return {"rescale": "l1" if self.shared["rescale"] else None}


def _of(parameter: str) -> Callable[[Mapping[str, Any]], Any]:
  return lambda values: values[parameter]


def _rest(parameter: str) -> Callable[[Mapping[str, Any]], Any]:
  """Returns a function for one minus a parameter, as a drop rate is one minus a density."""

  def complement(values: Mapping[str, Any]) -> Any:
    value = values[parameter]
    return tuple(1 - v for v in value) if isinstance(value, tuple) else 1 - value

  return complement


_SUMMED = {"weight": _of("weight"), "scale": _of("lambda")}
_DENSE = _SUMMED | {"density": _of("density")}
_BANDED = _SUMMED | {"keep": _of("density"), "remove": _of("gamma")}


def _normalize_setting(options: _Options) -> dict[str, Any]:
  return {"normalize": options.shared["normalize"]}


def _nuslerp(options: _Options) -> Translation:
  scope = "column" if options.shared["nuslerp_row_wise"] else "row"
  settings = {"scope": "leaf" if options.shared["nuslerp_flatten"] else scope}
  return Translation("nuslerp", settings, {"weight": _of("weight")}, of_weights=not options.base)


def _band(options: _Options) -> dict[str, Any]:
  return {"yields": "remove" if options.compat else "keep", **options.restore}


_METHODS: Mapping[str, Callable[[_Options], Translation]] = {
  "linear": lambda g: Translation(
    "average", _normalize_setting(g), {"weight": _of("weight")}, of_weights=True
  ),
  "slerp": lambda g: Translation("slerp", {}, {"t": _of("t")}, of_weights=True, pair=True),
  "nuslerp": _nuslerp,
  "multislerp": lambda g: Translation(
    "multislerp",
    {"normalize": g.shared["normalize_weights"]},
    {"weight": _of("weight")},
    of_weights=not g.base,
  ),
  "karcher": lambda g: Translation(
    "karcher", {"max_iter": g.shared["max_iter"]}, {"tol": _of("tol")}, of_weights=True
  ),
  "task_arithmetic": lambda g: Translation("task_arithmetic", _normalize_setting(g), _SUMMED),
  "ties": lambda g: Translation("ties", {**g.trim, **g.reduce, **g.zero_sum, **g.restore}, _DENSE),
  "dare_ties": lambda g: Translation(
    "dare_ties",
    {"density": 1.0, **g.drop, **g.reduce, **g.zero_sum},
    _SUMMED | {"drop_rate": _rest("density")},
  ),
  "dare_linear": lambda g: Translation(
    "dare", {**g.drop, **_normalize_setting(g)}, _SUMMED | {"drop_rate": _rest("density")}
  ),
  "della": lambda g: Translation(
    "della",
    {**g.drop, **g.reduce, "zero_sum": "plus"},
    _DENSE | {"epsilon": _of("epsilon")},
  ),
  "della_linear": lambda g: Translation(
    "della_linear", {**g.drop, **_normalize_setting(g)}, _DENSE | {"epsilon": _of("epsilon")}
  ),
  "breadcrumbs": lambda g: Translation(
    "breadcrumbs", {**_band(g), **_normalize_setting(g)}, _BANDED
  ),
  "breadcrumbs_ties": lambda g: Translation(
    "breadcrumbs_ties", {**_band(g), **g.reduce, **g.zero_sum}, _BANDED
  ),
  "sce": lambda g: Translation(
    "sce", {"floor": 1e-6 if g.compat else 0.0}, {"density": _of("select_topk")}
  ),
  "model_stock": lambda g: Translation(
    "model_stock",
    {"scope": "row" if g.shared["filter_wise"] else "leaf", "floor": 1e-6 if g.compat else 0.0},
    {},
  ),
  "arcee_fusion": lambda g: Translation("arcee_fusion", {}, {}),
  "nearswap": lambda g: Translation("nearswap", {}, {"t": _of("t")}, of_weights=True, pair=True),
  "ram": lambda g: Translation("ram", {}, {"threshold": _of("epsilon")}),
  "ramplus_tl": lambda g: Translation(
    "ramplus_tl", {}, {"threshold": _of("epsilon"), "boost": _of("r"), "limit": _of("alpha")}
  ),
  "passthrough": lambda g: Translation("passthrough", {}, {"scale": _of("scale")}, of_weights=True),
}
