"""The methods that a recipe can name: their inputs, and parameters with defaults and ranges.

Names and defaults are mergekit's, so that its recipes keep their meaning. Methods that mergekit
lacks have the names, parameters and defaults of `jaxmerge.catalog`, which describes all formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple  # Any: a value of YAML.

from jaxmerge import errors
from jaxmerge.catalog import entry, lookup
from jaxmerge.catalog.parameter import Parameter
from jaxmerge.recipe.errors import show


class Method(NamedTuple):
  """The inputs and parameters of a method.

  Attributes:
    doc: what it computes.
    base: whether a base is required, optional or ignored; an ignored base can be a source.
    others: the fewest and the most models beside the base; None: no limit.
    each: parameters with a value per model except the base. A default of None: required.
    shared: parameters with one value for all models.
    random: whether it draws random masks.
    divides: the parameter that turns on division by the sum of the weights; "always" if there is
      none.
  """

  doc: str
  base: Literal["required", "optional", "ignored"]
  others: tuple[int, int | None]
  each: Mapping[str, Parameter]
  shared: Mapping[str, Parameter]
  random: bool = False
  divides: str | None = None

  @property
  def parameters(self) -> dict[str, Parameter]:
    """Returns all parameters by name."""
    return {**self.each, **self.shared}

  @property
  def models(self) -> str:
    """Returns the number of models in words."""
    low, high = self.others
    number = str(low) if low == high else f"{low} or more"
    words = {"required": " and the base", "optional": ", and a base if given", "ignored": ""}
    return number + words[self.base]


def _switch(default: bool, doc: str) -> Parameter:
  return Parameter(default, doc, choices=(True, False))


_WEIGHT = Parameter(None, "weight of the model")
_FRACTION = Parameter(1.0, "fraction of entries kept", low=0.0, high=1.0)
_ABOVE_ZERO = _FRACTION._replace(open_low=True)
_MASK = _switch(False, "accepted, changes nothing: masks need no storage here")
_GAMMA = Parameter(0.01, "fraction of the largest entries removed", low=0.0, high=1.0)
_SPREAD = Parameter(
  0.15, "half-width of the range of keep probabilities around the density", low=0.0, high=0.5
)
_SMALL = Parameter(1e-5, "changes up to this size count as none", low=0.0)


def _arithmetic(
  doc: str,
  density: Parameter | None = None,
  more: Mapping[str, Parameter] | None = None,
  *,
  normalize: bool = False,
  rescale: bool = False,
  random: bool = False,
) -> Method:
  """Returns a method that sums weighted task vectors, sparsified if a density is passed."""
  each, shared = {"weight": _WEIGHT}, {}
  if density:
    each.update({"density": density, **(more or {})})
    shared["rescale"] = _switch(rescale, "make up for the entries dropped")
  shared |= {
    "normalize": _switch(normalize, "divide by the sum of the weights"),
    "lambda": Parameter(1.0, "factor on the merged task vector"),
    "int8_mask": _MASK,
  }
  return Method(doc, "required", (1, None), each, shared, random, "normalize")


MERGEKITS: Mapping[str, Method] = {
  "linear": Method(
    "weighted mean of the weights",
    "ignored",
    (1, None),
    {"weight": _WEIGHT},
    {"normalize": _switch(True, "divide by the sum of the weights")},
    divides="normalize",
  ),
  "slerp": Method(
    "point on the arc between the base and another model",
    "required",
    (1, 1),
    {},
    {"t": Parameter(None, "0 is the base, 1 the other model", low=0.0, high=1.0)},
  ),
  "nuslerp": Method(
    "point on the arc between two models, or between their task vectors",
    "optional",
    (2, 2),
    {"weight": _WEIGHT},
    {
      "nuslerp_flatten": _switch(True, "take a tensor as one vector"),
      "nuslerp_row_wise": _switch(False, "without flatten: vectors along the first axis"),
    },
    divides="always",
  ),
  "multislerp": Method(
    "weighted mean on the sphere, in a tangent space",
    "optional",
    (1, None),
    {"weight": _WEIGHT},
    {
      "normalize_weights": _switch(True, "divide by the sum of the weights"),
      "eps": Parameter(1e-8, "guards divisions by a norm", low=0.0),
    },
    divides="normalize_weights",
  ),
  "karcher": Method(
    "mean on the sphere, by iteration, of equal weights",
    "ignored",
    (1, None),
    {},
    {
      "max_iter": Parameter(10, "the most iterations", low=0, high=1_000_000, integer=True),
      "tol": Parameter(1e-5, "a step this small ends the iteration", low=0.0),
    },
  ),
  "task_arithmetic": _arithmetic("base plus weighted sum of task vectors"),
  "ties": _arithmetic("trim, elect sign, disjoint mean", _ABOVE_ZERO, normalize=True),
  "dare_ties": _arithmetic("drop at random, elect sign", _FRACTION, rescale=True, random=True),
  "dare_linear": _arithmetic("drop at random", _FRACTION, rescale=True, random=True),
  "della": _arithmetic(
    "drop at random by magnitude, elect sign",
    _ABOVE_ZERO,
    {"epsilon": _SPREAD},
    normalize=True,
    rescale=True,
    random=True,
  ),
  "della_linear": _arithmetic(
    "drop at random by magnitude", _ABOVE_ZERO, {"epsilon": _SPREAD}, rescale=True, random=True
  ),
  "breadcrumbs": _arithmetic(
    "remove the largest and the smallest entries", _ABOVE_ZERO, {"gamma": _GAMMA}
  ),
  "breadcrumbs_ties": _arithmetic(
    "remove the largest and the smallest entries, elect sign", _ABOVE_ZERO, {"gamma": _GAMMA}
  ),
  "sce": Method(
    "select by variance, weight by energy, elect sign",
    "required",
    (1, None),
    {},
    {
      "select_topk": _ABOVE_ZERO._replace(doc="fraction of positions kept, by variance"),
      "int8_mask": _MASK,
    },
  ),
  "model_stock": Method(
    "between base and mean, by the angle of the task vectors",
    "required",
    (2, None),
    {},
    {"filter_wise": _switch(False, "an angle for every row instead of every tensor")},
  ),
  "arcee_fusion": Method(
    "take over the changes of importance above a quantile", "required", (1, 1), {}, {}
  ),
  "nearswap": Method(
    "take over the other model where it is near",
    "required",
    (1, 1),
    {},
    {"t": Parameter(None, "distance up to which the other model is taken", low=0.0)},
  ),
  "ram": Method(
    "mean of shared changes, sum of unique ones", "required", (1, None), {}, {"epsilon": _SMALL}
  ),
  "ramplus_tl": Method(
    "as ram, unique changes amplified",
    "required",
    (1, None),
    {},
    {
      "epsilon": _SMALL,
      "r": Parameter(0.1, "strength of the amplification", low=0.0),
      "alpha": Parameter(0.2, "bound of the ratio of shared to unique changes", low=0.0),
    },
  ),
  "passthrough": Method(
    "copy of one model, or of its layers",
    "ignored",
    (1, 1),
    {"scale": Parameter(1.0, "factor on the tensor")},
    {},
  ),
}


def _of_catalog(entry: entry.Entry) -> Method:
  """Returns the inputs and parameters of a method of the catalog."""
  needs: dict[str, Literal["required", "optional", "ignored"]] = {
    "task vectors": "required",
    "either": "optional",
    "weights": "ignored",
  }
  each = {n: p for n, p in entry.parameters.items() if p.each}
  shared = {n: p for n, p in entry.parameters.items() if not p.each}
  divides = "normalize" if "normalize" in shared else None
  random = "seed" in entry.needs
  return Method(entry.formula, needs[entry.on], entry.models, each, shared, random, divides)


METHODS: Mapping[str, Method] = {
  **MERGEKITS,
  **{n: _of_catalog(entry) for n, entry in lookup.METHODS.items() if n not in MERGEKITS},
}


def value_error(name: str, parameter: Parameter, value: Any) -> str | None:
  """Returns the error of a parameter's value; None for an allowed one.

  >>> value_error("density", METHODS["ties"].each["density"], 1.5)
  'density must be in (0, 1], got 1.5.'
  """
  if parameter.choices == (True, False):
    right = isinstance(value, int | float) and value in (0, 1)  # mergekit writes 1.0 and 0.0.
    return None if right else f"{name} must be true or false, got {show(value)}."
  if parameter.choices:
    words = [c for c in parameter.choices if c is not None]
    if value in words:
      return None
    near = errors.nearest(value if isinstance(value, str) else "", words)
    return f"{name} cannot be {show(value)}{near}."
  if isinstance(value, bool) or not isinstance(value, int | float):
    kind = "a whole number" if parameter.integer else "a number"
    return f"{name} must be {kind} in {parameter.range}, got {show(value)}."
  try:
    parameter.check(name, value)
  except ValueError as error:
    return str(error)
  return None


def markdown() -> str:
  """Returns the table of methods as Markdown, as docs/recipes.md shows it."""
  rows = ["| method | base | models | per model | for all models | what |", "| --- " * 6 + "|"]
  for name, m in METHODS.items():
    each, shared = (", ".join(map(_cell, p, p.values())) or "-" for p in (m.each, m.shared))
    mark = " (random)" if m.random else ""
    rows.append(f"| `{name}`{mark} | {m.base} | {m.models} | {each} | {shared} | {m.doc} |")
  return "\n".join(rows)


def parameter_markdown() -> str:
  """Returns the table of parameters as Markdown, as docs/recipes.md shows it."""
  users_of: dict[tuple[str, Parameter], list[str]] = {}
  for name, m in METHODS.items():
    for pair in m.parameters.items():
      key = (pair[0], pair[1]._replace(default=None))
      users_of.setdefault(key, []).append(name)
  rows = ["| parameter | range | methods | meaning |", "| --- " * 4 + "|"]
  for (name, p), users in sorted(users_of.items(), key=lambda item: item[0][0]):
    values = "true, false" if p.choices == (True, False) else p.range
    values = ("whole, " if p.integer else "") + values
    rows.append(f"| `{name}` | {values} | {', '.join(users)} | {p.doc} |")
  return "\n".join(rows)


def _cell(name: str, parameter: Parameter) -> str:
  default = parameter.default
  if default is None:
    return f"`{name}` (required)"
  return f"`{name}` = {show(default) if isinstance(default, bool | str) else f'{default:g}'}"
