"""The catalog as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable

from jaxmerge.catalog import lookup
from jaxmerge.catalog.entry import Entry
from jaxmerge.catalog.other_merges import Other


def markdown() -> str:
  """Returns the table of methods as Markdown, as docs/methods/README.md shows it."""
  rows = []
  for name, e in lookup.METHODS.items():
    numbers = ", ".join(f"{p}={q.default!r}" for p, q in e.parameters.items() if q.number)
    call = f"`{name}({numbers})`{mark(e)}"
    rows.append((call, e.formula, e.paper, needs(name), e.fallback or "as all", cost(name)))
  return _table(("method", "formula", "paper", "needs", "leaves without a view", "cost"), rows)


def others_markdown() -> str:
  """Returns the table of other merges as Markdown, as docs/methods/README.md shows it."""
  rows = [
    (f"`{n}`{mark(o)}", o.formula, o.paper, o.needs, o.gives) for n, o in lookup.OTHERS.items()
  ]
  return _table(("function", "formula", "paper", "needs", "gives"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
  return "\n".join(f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *rows])


def mark(e: Entry | Other) -> str:
  """Returns the mark after the name of an experimental method.

  Example:
    >>> mark(lookup.METHODS["ties"]), mark(lookup.METHODS["ties_slack"])
    ('', ' (experimental)')
  """
  return " (experimental)" if e.experimental else ""


def needs(method: str) -> str:
  """Returns the arguments that a method needs beside its parameters.

  Example:
    >>> needs("dare"), needs("tsv")
    ('weights, seed', 'weights, views')
  """
  return lookup.entry(method).needs + (", views" if lookup.entry(method).fallback else "")


def cost(method: str) -> str:
  """Returns a method's number of passes over the models, its unit in memory, and its SVDs.

  Example:
    >>> cost("ties"), cost("tsv")
    ('3 passes, slices', '1 pass, matrices, K + 2 SVDs')
  """
  e = lookup.entry(method)
  unit = {"entry": "slices", "row": "rows", "matrix": "matrices"}[e.unit]
  svds = f", {e.svds} SVD{'s' * (e.svds != '1')}" if e.svds else ""
  return f"{e.passes} pass{'es' * (e.passes != 1)}, {unit}{svds}"
