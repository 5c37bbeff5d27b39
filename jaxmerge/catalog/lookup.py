"""What is asked of the one table of all methods, `published/`. Free of jax.

Factories read defaults and ranges here, so do configs, error messages, `jaxmerge methods` and the
README: a fact about a method stands in one place.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any  # Settings are of many kinds.

from jaxmerge import parameter, published
from jaxmerge.parameter import Parameter
from jaxmerge.published import Entry, Other

METHODS = published.METHODS
OTHERS = published.OTHERS
SEED = published.SEED
plain = parameter.plain


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
    if not parameters[name].number or not hasattr(value, "dtype"):
      parameters[name].check(f"{method}: {name}", value)


def knows(name: str) -> bool:
  """Tells whether some method has a number of this name."""
  return any(name in e.parameters for e in METHODS.values())


def check_number(name: str, value: Any, *, label: str = "") -> None:
  """Raises ValueError for a plain number outside the ranges that methods give to this name."""
  own = [e.parameters[name] for e in METHODS.values() if name in e.parameters] or [
    Parameter(None, "")
  ]
  low, open_low = min((p.low, p.open_low) for p in own)
  widest = own[0]._replace(low=low, open_low=open_low, high=max(p.high for p in own))
  (SEED if name == "seed" else widest).check(label or name, value)


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
  rows = []
  for name, e in METHODS.items():
    numbers = ", ".join(f"{p}={q.default!r}" for p, q in e.parameters.items() if q.number)
    called = f"`{name}({numbers})`{mark(e)}"
    rows.append((called, e.formula, e.paper, needs(name), e.uncovered or "as all", cost(name)))
  return _table(("method", "formula", "paper", "needs", "leaves without a view", "cost"), rows)


def others_markdown() -> str:
  """Returns the table of what is not a method as Markdown, as the README shows it."""
  rows = [(f"`{n}`{mark(o)}", o.formula, o.paper, o.needs, o.gives) for n, o in OTHERS.items()]
  return _table(("function", "formula", "paper", "needs", "gives"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
  return "\n".join(f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *rows])


def mark(e: Entry | Other) -> str:
  """Returns what stands behind the name of what is experimental.

  Example:
    >>> mark(METHODS["ties"]), mark(METHODS["ties_slack"])
    ('', ' (experimental)')
  """
  return " (experimental)" if e.experimental else ""


def needs(method: str) -> str:
  """Returns what a method must be given.

  Example:
    >>> needs("dare"), needs("tsv")
    ('weights, seed', 'weights, views')
  """
  return entry(method).needs + (", views" if entry(method).uncovered else "")


def cost(method: str) -> str:
  """Returns how often a method reads the models, what it holds of them, and its decompositions.

  Example:
    >>> cost("ties"), cost("tsv")
    ('3 passes, slices', '1 pass, matrices, K + 2 SVDs')
  """
  e = entry(method)
  held = {"entry": "slices", "row": "rows", "matrix": "matrices"}[e.unit]
  svds = f", {e.svds} SVD{'s' * (e.svds != '1')}" if e.svds else ""
  return f"{e.reads} pass{'es' * (e.reads != 1)}, {held}{svds}"
