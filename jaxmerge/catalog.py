"""The one table of all methods: names, parameters, ranges, papers. Free of jax.

Factories read defaults and ranges here, so do configs, error messages, `jaxmerge methods` and the
README: a fact about a method stands in one place.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Parameter(NamedTuple):
  """A setting of a method.

  A *number* may be an array (scalar or one per model) and may be traced; anything else chooses a
  branch and is static. `low` and `high` bound a number, `choices` lists the values of a static one.
  `open_low` excludes the lower bound itself. `integer` marks a whole number.
  """

  default: Any
  doc: str
  low: float = -math.inf
  high: float = math.inf
  open_low: bool = False
  choices: tuple[Any, ...] = ()
  integer: bool = False

  @property
  def range(self) -> str:
    """The allowed values in words: `(0, 1]` or `'tree', 'leaf'`."""
    if self.choices:
      return ", ".join(repr(c) for c in self.choices)
    left = "(" if self.open_low or math.isinf(self.low) else "["
    right = ")" if math.isinf(self.high) else "]"
    return f"{left}{self.low:.10g}, {self.high:.10g}{right}".replace("inf", "infinity")

  def check(self, name: str, value: Any) -> None:
    """Raises ValueError, with value and range, for a value outside the range."""
    if self.choices:
      if value not in self.choices:
        raise ValueError(f"{name} must be one of {self.range}, got {value!r}.")
      return
    for v in _flat(value):
      if not plain(v):
        raise ValueError(f"{name} must be a number in {self.range}, got {v!r}.")
      inside = self.low <= v <= self.high and not (self.open_low and v == self.low)
      if not math.isfinite(v) or not inside or (self.integer and v != int(v)):
        raise ValueError(f"{name} must be in {self.range}, got {v!r}.")


class Entry(NamedTuple):
  """A method: what it computes in one formula, where it comes from, what it needs."""

  formula: str
  paper: str
  parameters: Mapping[str, Parameter]
  needs: str = "weights"
  experimental: bool = False


_WEIGHT = Parameter(1.0, "weight of each model, scalar or one per model")
_SCALE = Parameter(1.0, "factor on the merged task vector")
_DENSITY = Parameter(0.2, "fraction of entries kept", low=0.0, high=1.0, open_low=True)
_DROP_RATE = Parameter(0.5, "probability that an entry is dropped", low=0.0, high=1.0)
_SCOPE = Parameter(
  "tree", "entries are ranked over the whole model or per leaf", choices=("tree", "leaf")
)
_RULE = Parameter(
  "kth",
  "'kth' keeps all entries at the threshold, 'exact' breaks ties by position",
  choices=("kth", "exact"),
)
_RESCALE = Parameter(
  "inverse",
  "how the kept entries make up for the dropped: 1/(1-p), or the norm of the whole leaf",
  choices=("inverse", "l1", "l2", "linf", None),
)
_REDUCE = Parameter("mean", "how agreeing entries are joined", choices=("mean", "sum", "max"))
_ZERO_SUM = Parameter(
  "majority",
  "sign where task vectors cancel out: that of most entries, or plus",
  choices=("majority", "plus"),
)
SEED = Parameter(None, "seed of random masks", low=0, high=2**32 - 1, integer=True)

METHODS: Mapping[str, Entry] = {
  "average": Entry(
    "Σ wᵢθᵢ / Σ wᵢ",
    "Wortsman et al. 2022 (arXiv:2203.05482)",
    {
      "weight": _WEIGHT,
      "normalize": Parameter(True, "divide by the sum of the weights", choices=(True, False)),
    },
  ),
  "task_arithmetic": Entry(
    "θ₀ + λ Σ wᵢτᵢ",
    "Ilharco et al. 2023 (arXiv:2212.04089)",
    {"scale": _SCALE._replace(default=0.3), "weight": _WEIGHT},
  ),
  "negation": Entry(
    "θ₀ - λτ", "Ilharco et al. 2023 (arXiv:2212.04089)", {"scale": _SCALE._replace(default=0.3)}
  ),
  "analogy": Entry(
    "θ₀ + λ(τ_C + τ_B - τ_A)",
    "Ilharco et al. 2023 (arXiv:2212.04089)",
    {"scale": _SCALE._replace(default=0.3)},
  ),
  "ties": Entry(
    "trim, elect sign, disjoint mean",
    "Yadav et al. 2023 (arXiv:2306.01708)",
    {
      "density": _DENSITY,
      "scale": _SCALE,
      "weight": _WEIGHT,
      "scope": _SCOPE,
      "rule": _RULE,
      "reduce": _REDUCE,
      "zero_sum": _ZERO_SUM,
    },
  ),
  "dare": Entry(
    "θ₀ + λ Σ wᵢ (mᵢ⊙τᵢ)/(1-p)",
    "Yu et al. 2024 (arXiv:2311.03099)",
    {
      "drop_rate": _DROP_RATE,
      "scale": _SCALE._replace(default=0.3),
      "weight": _WEIGHT,
      "rescale": _RESCALE,
    },
    needs="weights, seed",
  ),
  "dare_ties": Entry(
    "DARE, then trim, elect sign, disjoint mean",
    "Yu et al. 2024 (arXiv:2311.03099)",
    {
      "drop_rate": _DROP_RATE,
      "density": _DENSITY,
      "scale": _SCALE,
      "weight": _WEIGHT,
      "rescale": _RESCALE,
      "scope": _SCOPE,
      "rule": _RULE,
      "reduce": _REDUCE,
      "zero_sum": _ZERO_SUM,
    },
    needs="weights, seed",
  ),
  "breadcrumbs": Entry(
    "θ₀ + λ Σ (mask of the largest γ and smallest 1-β-γ)⊙τᵢ",
    "Davari and Belilovsky 2024 (arXiv:2312.06795)",
    {
      "keep": Parameter(0.2, "fraction of entries kept", low=0.0, high=1.0, open_low=True),
      "remove": Parameter(0.1, "fraction of the largest entries removed", low=0.0, high=1.0),
      "scale": _SCALE._replace(default=0.3),
      "scope": Parameter(
        "leaf",
        "entries are ranked over the whole model, per leaf, or per row of a matrix view",
        choices=("tree", "leaf", "row"),
      ),
    },
  ),
}


def entry(method: str) -> Entry:
  """Returns the entry of a method; ValueError with the nearest right name for another word.

  Example:
    >>> entry("ties").parameters["density"].range
    '(0, 1]'
  """
  if method not in METHODS:
    raise ValueError(f"no method is called {method!r}{nearest(method, METHODS)}.")
  return METHODS[method]


def check(method: str, settings: Mapping[str, Any]) -> None:
  """Raises ValueError for settings that the method does not have or that are out of range.

  Arrays are passed over: they may be traced. The driver looks at those that it can.
  """
  parameters = entry(method).parameters
  for name, value in settings.items():
    if name not in parameters:
      raise ValueError(f"{method} has no parameter {name!r}{nearest(name, parameters)}.")
    if parameters[name].choices or not hasattr(value, "dtype"):
      parameters[name].check(f"{method}: {name}", value)


def knows(name: str) -> bool:
  """Tells whether some method has a number of this name."""
  return any(name in e.parameters for e in METHODS.values())


def check_number(name: str, value: Any, *, label: str = "") -> None:
  """Raises ValueError for a plain number outside the range that methods give to this name."""
  own = (e.parameters[name] for e in METHODS.values() if name in e.parameters)
  parameter = SEED if name == "seed" else next(own, Parameter(None, ""))
  parameter.check(label or name, value)


def plain(value: Any) -> bool:
  """Tells whether a value is a number, or a sequence of numbers, that can be looked at now.

  Example:
    >>> plain(0.5), plain((0.5, 1)), plain("0.5")
    (True, True, False)
  """
  if isinstance(value, (list, tuple)):
    return all(plain(v) for v in value)
  return isinstance(value, (int, float))


def nearest(word: str, known: Iterable[str]) -> str:
  """Says what is near a mistyped word, and what there is: to be appended to an error.

  Example:
    >>> nearest("densty", ["scale", "density"])
    "; did you mean 'density'? Known: density, scale"
  """
  known = sorted(known)
  close = difflib.get_close_matches(word, known, n=1)
  hint = f"; did you mean {close[0]!r}?" if close else ";"
  return f"{hint} Known: {', '.join(known)}"


def markdown() -> str:
  """Returns the table of methods as Markdown, as the README shows it."""
  rows = ["| method | formula | paper | needs |", "| --- | --- | --- | --- |"]
  for name, e in METHODS.items():
    mark = " (experimental)" if e.experimental else ""
    numbers = ", ".join(f"{p}={q.default!r}" for p, q in e.parameters.items() if not q.choices)
    rows.append(f"| `{name}({numbers})`{mark} | {e.formula} | {e.paper} | {e.needs} |")
  return "\n".join(rows)


def _flat(value: Any) -> list[Any]:
  if isinstance(value, (list, tuple)):
    return [v for part in value for v in _flat(part)]
  return [value]
