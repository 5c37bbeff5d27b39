"""Resolves the matrix view of each leaf: the caller's layout first, then library conventions.

The same rule serves models in memory, files and the training loop. A `layout` is a sequence of
(regular expression, view); the first match in a leaf's name wins, and the view None means that the
leaf is no matrix. Leaves without a match get the view of `jaxmerge.core.conventions`. Does not
import jax.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple  # Any: a tree, and a method, which is only looked at.

from jaxmerge.catalog import lookup
from jaxmerge.core import conventions, leaf_names
from jaxmerge.core.kernel_axes import Rule, Shapes

Layout = Sequence[tuple[str, str | None]]
Form = Callable[[str, Sequence[str]], str]

SHOWN = 6  # Kinds of leaves that an error lists.


class Table(NamedTuple):
  """The leaves of a model, grouped by rule; hashable, so that it can be a static argument.

  Attributes:
    groups: pairs of a rule and the names of its leaves.
  """

  groups: tuple[tuple[Rule, frozenset[str]], ...] = ()

  def view(self, name: str) -> str | None:
    """Returns the view of a leaf; None where it has none."""
    return next((rule.view for rule, names in self.groups if name in names), None)

  def plain(self) -> list[dict[str, Any]]:
    """Returns the rules as plain JSON: view, reason, and the names of the leaves."""
    return [
      {"view": rule.view, "reason": rule.reason, "leaves": sorted(names)}
      for rule, names in self.groups
    ]


class Unit(NamedTuple):
  """The part of a leaf that a stage processes at a time, as far as views matter.

  Attributes:
    unit: "entry", "row" or "matrix".
    lookups: whether an entry of a lookup table is a row, a column, or not part of a matrix (None).
    where: the leaves that the stage acts on, by name; None: all.
  """

  unit: str
  lookups: Literal["row", "column"] | None = None
  where: Any = None


NONE = Table()


def of(method: Iterable[Any], base: Any, *, layout: Layout | Table | None = ()) -> dict[str, Rule]:
  """Returns the matrix view that each leaf has for a method, and why.

  Leaves whose view is None are not matrices for the method; each method documents how it merges
  them. `jaxmerge.core.matrix_views` explains the letters; in a lookup table, such as an embedding,
  `l` is the axis of the entries.

  Args:
    method: a method, such as `jaxmerge.methods` returns.
    base: tree of arrays [*s], or of their shapes.
    layout: matrix views, as for `jaxmerge.merge`.

  Raises:
    ValueError: as `jaxmerge.merge` does, if the layout does not fit or leaves a view open.

  Example:
    >>> import jax.numpy as jnp, jaxmerge
    >>> base = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    >>> by_leaf = jaxmerge.core.layouts.of(jaxmerge.methods.tsv(), base)
    >>> {name: (rule.view, rule.reason) for name, rule in by_leaf.items()}
    {'dense/bias': (None, 'vector'), 'dense/kernel': ('io', 'kernel')}
  """
  from jaxmerge.core import tree  # Imports jax, which planning does not need.

  leaves = tree.named(base)
  shapes = {n: tuple(x.shape) for n, x in leaves.items() if tree.is_floating(x)}
  table = resolve(method, shapes, layout, names=leaves)
  units = [unit for unit in units_of(method) if unit.unit != "entry"]
  by_leaf = {n: rule for rule, names in table.groups for n in names}
  sees = {
    n: r._replace(view=next((v for u in units if (v := view_for(r.view, u))), None))
    for n, r in by_leaf.items()
  }
  return dict(sorted(sees.items()))


def check(layout: Any) -> Layout:
  """Returns a layout as a tuple of pairs, or raises ValueError if it is not a layout.

  Example:
    >>> check([("kernel$", "ix")])
    Traceback (most recent call last):
    ValueError: view 'ix' of 'kernel$' must consist of the letters b, o and i, or be None.
  """
  layout = tuple(layout.items()) if isinstance(layout, Mapping) else layout
  if isinstance(layout, str):
    raise ValueError(
      f"layout must be a list of pairs, such as [('kernel$', 'io')], got {layout!r}."
    )
  pairs = []
  for pair in layout or ():
    if not (isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)):
      raise ValueError(f"layout must be a list of pairs, such as [('kernel$', 'io')]: {pair!r}.")
    pattern, view = pair
    view = None if view == "none" else view  # As recipes write it.
    if view is not None and (not isinstance(view, str) or not re.fullmatch("[boi]+", view)):
      raise ValueError(
        f"view {view!r} of {pattern!r} must consist of the letters b, o and i, or be None."
      )
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(f"{pattern!r}, of {view!r}, is no regular expression: {error}.") from error
    pairs.append((pattern, view))
  return tuple(pairs)


def resolve(
  method: Iterable[Any],
  shapes: Shapes,
  layout: Layout | Table | None = (),
  *,
  names: Iterable[str] | None = None,
) -> Table:
  """Resolves the view of each leaf for a method; the table is empty if it needs no views.

  Args:
    method: the method.
    shapes: shapes of the merged leaves, without a task axis.
    layout: the caller's layout; a table is already resolved.
    names: names of all leaves, if some are not merged: a pattern may match only those.

  Raises:
    ValueError: for patterns that match no leaf, views with another number of axes than the leaf,
      leaves whose layout neither name nor shape decides, and matrix methods without a matrix.
  """
  if isinstance(layout, Table):
    return layout
  said = check(layout)
  declared = _rules_of_layout(said, shapes, shapes if names is None else names)
  if all(unit.unit == "entry" for unit in units_of(method)):
    return NONE
  return fit(method, shapes, conventions.rules(shapes) | declared)


def fit(method: Iterable[Any], shapes: Shapes, rules: Mapping[str, Rule]) -> Table:
  """Returns the table of rules by leaf; raises ValueError if the method cannot use them."""
  for unit in units_of(method):
    if problem := find_problem(unit, rules, shapes):
      raise ValueError(problem + advice(unit, rules, shapes, _item, "\n  "))
  return table(rules)


def of_leaves(leaves: Mapping[str, Any], layout: Layout | None = ()) -> dict[str, Rule]:
  """Returns the rule of each leaf, from the caller's layout or else from library conventions."""
  shapes = {n: tuple(getattr(x, "shape", ())) for n, x in leaves.items()}
  return conventions.rules(shapes) | _rules_of_layout(check(layout), shapes, shapes)


def table(rules: Mapping[str, Rule]) -> Table:
  """Returns a table from rules by leaf."""
  groups = collections.defaultdict[Rule, set[str]](set)
  for name, rule in rules.items():
    groups[rule].add(name)
  return Table(tuple((r, frozenset(names)) for r, names in sorted(groups.items(), key=str)))


def units_of(method: Iterable[Any]) -> list[Unit]:
  """Returns the units of a method's stages."""
  return [Unit(step.unit, step.lookups, step.where) for step in method]


def unit_of(spec: Any) -> Unit:
  """Returns the unit of a job's method, from its catalog entry.

  >>> unit_of({"method": "nuslerp", "scope": "column"})
  Unit(unit='matrix', lookups='row', where=None)
  """
  settings = spec if isinstance(spec, Mapping) else {}
  entry = lookup.METHODS.get(str(settings.get("method")))
  scopes = {"row": Unit("row"), "column": Unit("matrix", "row")}
  by_name = Unit("entry") if entry is None else Unit(entry.unit, entry.lookups)
  return scopes.get(str(settings.get("scope")), by_name)


def view_for(view: str | None, unit: Unit) -> str | None:
  """Returns the view of a leaf for a stage of rows or matrices; None if it has none.

  Example:
    >>> [view_for("li", Unit("matrix", lookups)) for lookups in (None, "row", "column")]
    [None, 'oi', 'io']
  """
  if view is None or "l" not in view:
    return view
  if unit.unit == "row" or unit.lookups == "row":
    return view.replace("l", "o")
  return view.translate(str.maketrans("li", "io")) if unit.lookups == "column" else None


def summary(table: Table, unit: Unit) -> str:
  """Returns how many leaves have which view, and why; empty if the method needs no views.

  Example:
    >>> rules = {"up": Rule("io", "kernel"), "wte": Rule("li", "lookup")}
    >>> summary(table(rules), Unit("matrix"))
    '1 io (kernel), 1 no matrix (lookup)'
  """
  none = "no matrix" if unit.unit == "matrix" else "one row"
  counts = collections.Counter[str]()
  for rule, names in table.groups:
    counts[f"{view_for(rule.view, unit) or none} ({rule.reason})"] += len(names)
  return ", ".join(f"{count} {words}" for words, count in sorted(counts.items()))


def lines(method: Iterable[Any], rules: Table) -> tuple[str, ...]:
  """Returns the `summary` of each stage that needs views."""
  asks = dict.fromkeys(summary(rules, u) for u in units_of(method) if u.unit != "entry")
  return tuple(f"outputs and inputs: {words}" for words in asks if words)


def find_problem(unit: Unit, rules: Mapping[str, Rule], shapes: Shapes) -> str | None:
  """Returns why a matrix stage cannot run: a leaf's layout is open, or no leaf is a matrix."""
  if unit.unit != "matrix":
    return None
  acted = {n: r for n, r in rules.items() if unit.where is None or unit.where(n)}
  if rules and not acted:
    return "the method works on matrices, but is restricted to leaves of which there are none"
  for name, rule in acted.items():
    if missing := _missing(view_for(rule.view, unit)):
      return f"the method works on matrices, but view {rule.view!r} of {name!r} has no {missing}"
  if unit.lookups != "row" and any(r.open for r in acted.values()):
    return "the method works on matrices, but neither name nor shape say how these leaves lie"
  if acted and not any(view_for(r.view, unit) for r in acted.values()):
    kinds = collections.Counter(r.reason for r in acted.values())
    each = ", ".join(f"{count} of kind {reason!r}" for reason, count in sorted(kinds.items()))
    return f"the method works on matrices, but none of the leaves is one ({each})"
  return None


def open_leaves(
  unit: Unit, rules: Mapping[str, Rule], shapes: Shapes
) -> Iterator[tuple[str, tuple[str, ...]]]:
  """Yields the leaves that a layout should name: a pattern for similar leaves, and their names."""
  acted = [n for n in rules if unit.where is None or unit.where(n)]
  wanted = [n for n in acted if _missing(view_for(rules[n].view, unit))]
  wanted = wanted or [n for n in acted if rules[n].open]
  wanted = [n for n in wanted or acted if len(shapes[n]) > 1]
  alike: dict[tuple[str, int], list[str]] = {}
  for name in wanted:
    # Numbers of layers and experts become \d+; a number in the last part distinguishes matrices.
    pattern = r"\d+".join(re.escape(p) for p in re.split(r"\d+(?=.*[/.])", name))
    alike.setdefault((pattern, len(shapes[name])), []).append(name)
  for (pattern, _), names in alike.items():
    yield f"^{pattern}$", tuple(names)


def _missing(view: str | None) -> str:
  """Returns the letter that a view lacks to be a matrix view; empty if it lacks none."""
  return "" if view is None else next((letter for letter in "oi" if letter not in view), "")


def choices(name: str, shape: Sequence[int]) -> tuple[str, ...]:
  """Returns the views that a leaf's name and shape allow.

  Example:
    >>> choices("w", (4, 2)), choices("experts/w1", (3, 4, 2)), choices("q/kernel", (4, 2, 2))
    (('io', 'oi'), ('bio', 'boi'), ('ioo', 'iio', 'bio', 'boi'))
  """
  words, axes = leaf_names.name(name), len(shape)
  if axes == 3:
    if words.is_of_experts:
      return "bio", "boi"
    if words.is_of_attention or words.is_outward:
      return "ioo", "iio", "bio", "boi"
    return "bio", "boi", "iio", "oii", "ioo"
  if axes == 4 and words.is_of_experts:
    return "bbio", "bboi"
  plain = ("i" * (axes - 1) + "o", "o" + "i" * (axes - 1))
  if axes == 4 and (words.is_of_attention or words.is_outward):
    return "bioo", "biio", "iboo", "ibio", "iooo"
  return (*plain, "bioo", "biio") if axes == 4 else plain


def advice(unit: Unit, rules: Mapping[str, Rule], shapes: Shapes, form: Form, between: str) -> str:
  """Returns the end of an error: what to add to a layout; the user chooses among the views.

  Args:
    unit: unit of the method.
    rules: rules by leaf.
    shapes: shapes by leaf.
    form: (pattern, views) -> an item.
    between: separator before each item.
  """
  items = []
  for pattern, names in open_leaves(unit, rules, shapes):
    fused = rules[names[0]].reason == conventions.FUSED
    views = () if fused else choices(names[0], shapes[names[0]])
    like = f"{names[0]!r} is {list(shapes[names[0]])}"
    like += f", and {len(names) - 1} more" if len(names) > 1 else ""
    like += f" ({conventions.FUSED})" if fused else ""
    items.append(f"{form(pattern, views)}: {like}")
  if not items:
    return "; use one that works on entries, such as average, ties or task_arithmetic."
  more = [f"and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
  letters = "o for outputs, i for inputs, b for one of many, none for no matrix"
  return between.join([f"; add to layout, with one view each ({letters}):", *items[:SHOWN], *more])


def _item(pattern: str, views: Sequence[str]) -> str:
  return f"(r'{pattern}', {' | '.join([*map(repr, views), 'None'])})"


def _rules_of_layout(
  said: Layout, shapes: Shapes, names: Collection[str] | Iterable[str]
) -> dict[str, Rule]:
  """Returns the rules of the leaves that the caller's layout matches."""
  every, declared = list(names), dict[str, Rule]()
  for pattern, view in said:
    of = [n for n in every if re.search(pattern, n)]
    if not of:
      raise ValueError(f"layout: {pattern!r} is found in no leaf's name; there are {_some(every)}.")
    for name in of:
      if name in declared or name not in shapes:
        continue
      if view is not None and len(view) != len(shapes[name]):
        raise ValueError(
          f"layout: view {view!r} of {pattern!r} names {len(view)} axes, but {name!r} is "
          f"{list(shapes[name])}; narrow the pattern, or name every axis."
        )
      declared[name] = Rule(view, f"layout {pattern!r}")
  return declared


def _some(names: Sequence[str]) -> str:
  shown = ", ".join(repr(n) for n in names[:SHOWN])
  return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
