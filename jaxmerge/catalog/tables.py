"""The catalog as Markdown."""

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
    called = f"`{name}({numbers})`{mark(e)}"
    rows.append((called, e.formula, e.paper, needs(name), e.uncovered or "as all", cost(name)))
  return _table(("method", "formula", "paper", "needs", "leaves without a view", "cost"), rows)


def others_markdown() -> str:
  """Returns the table of what is not a method as Markdown, as docs/methods/README.md shows it."""
  rows = [
    (f"`{n}`{mark(o)}", o.formula, o.paper, o.needs, o.gives) for n, o in lookup.OTHERS.items()
  ]
  return _table(("function", "formula", "paper", "needs", "gives"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
  return "\n".join(f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *rows])


def mark(e: Entry | Other) -> str:
  """Returns what stands behind the name of what is experimental.

  Example:
    >>> mark(lookup.METHODS["ties"]), mark(lookup.METHODS["ties_slack"])
    ('', ' (experimental)')
  """
  return " (experimental)" if e.experimental else ""


def needs(method: str) -> str:
  """Returns what a method must be given.

  Example:
    >>> needs("dare"), needs("tsv")
    ('weights, seed', 'weights, views')
  """
  return lookup.entry(method).needs + (", views" if lookup.entry(method).uncovered else "")


def cost(method: str) -> str:
  """Returns how often a method reads the models, what it holds of them, and its decompositions.

  Example:
    >>> cost("ties"), cost("tsv")
    ('3 passes, slices', '1 pass, matrices, K + 2 SVDs')
  """
  e = lookup.entry(method)
  held = {"entry": "slices", "row": "rows", "matrix": "matrices"}[e.unit]
  svds = f", {e.svds} SVD{'s' * (e.svds != '1')}" if e.svds else ""
  return f"{e.reads} pass{'es' * (e.reads != 1)}, {held}{svds}"
