"""Tables of a record, as Markdown and as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple  # Any: a record is JSON, its values have no one type.

from jaxmerge import display
from jaxmerge.report import comparisons, labels


class Cell(NamedTuple):
  """A cell: its text, and whether it is the best of its column."""

  text: str
  best: bool = False


class Table(NamedTuple):
  """A table: the heading of every column, and rows of cells; the first column names the row."""

  head: list[str]
  rows: list[list[Cell]]


def results(record: Mapping[str, Any]) -> Table:
  """Returns a row per model: mean, gap closed, scale, and each task; best merges are marked."""
  models, tasks = record["models"], record["tasks"]
  names, gaps = labels.order(models), labels.gaps(record)
  has_scale = any(models[n].get("scale") is not None for n in names)
  columns = [_mark_best(record, names, {n: models[n]["mean"] for n in names})]
  if gaps:
    columns.append([Cell(labels.share(gaps.get(n))) for n in names])
  families = labels.families(record)
  if families:
    once = {n: comparisons.family_mean(models[n]["per_task"], families) for n in names}
    columns.append(_mark_best(record, names, once))
  if has_scale:
    columns.append([Cell(labels.number(models[n].get("scale"))) for n in names])
  for task in tasks:
    columns.append(_mark_best(record, names, {n: models[n]["per_task"][task] for n in names}))
  rows = [list(row) for row in zip([Cell(labels.label(n)) for n in names], *columns, strict=True)]
  if "chance" in record:
    chance = record["chance"]
    known = [chance[t] for t in tasks if chance[t] is not None]
    mean = sum(known) / len(known) if len(known) == len(tasks) else None
    blank = [Cell("")] * (bool(gaps) + bool(families) + has_scale)
    cells = [Cell(labels.value(record, chance[t])) for t in tasks]
    rows.insert(0, [Cell("Chance"), Cell(labels.value(record, mean)), *blank, *cells])
  head = ["Model", f"Mean{labels.unit(record)}"]
  head += ["Gap closed (%)"] * bool(gaps)
  head += [f"Families once{labels.unit(record)}"] * bool(families) + ["Scale"] * has_scale
  return Table([*head, *tasks], rows)


def _mark_best(
  record: Mapping[str, Any], names: Sequence[str], values: Mapping[str, float | None]
) -> list[Cell]:
  """Returns a column with the best merge marked; equal texts count as equal."""
  texts = {n: labels.value(record, values[n]) for n in names}
  merges = [n for n in names if labels.kind(n) != "reference" and values[n] is not None]
  best = max(merges, key=lambda n: labels.gain(record, values[n] or 0.0), default="")
  top = texts[best] if len(merges) > 1 else None
  return [Cell(texts[n], n in merges and texts[n] == top) for n in names]


def gaps(record: Mapping[str, Any]) -> Table | None:
  """Returns the share of each task's gap that the merges close; None without a gap."""
  lower = labels.lower_is_better(record)
  gaps_by_model = comparisons.task_gaps(record["models"], record["tasks"], lower_is_better=lower)
  led = [t for t in record["tasks"] if t in gaps_by_model.get("experts", {})]
  names = [
    n for n in labels.order(gaps_by_model) if labels.kind(n) != "reference" or n == "multitask"
  ]
  if not led or not names:
    return None
  rows = [
    [Cell(labels.label(n)), *(Cell(labels.share(gaps_by_model[n].get(t))) for t in led)]
    for n in names
  ]
  return Table(["Gap closed (%)", *led], rows)


def budget(record: Mapping[str, Any]) -> Table | None:
  """Returns the budget counters of every model; None without any."""
  counters, names = labels.counters(record), labels.order(record["budget"])
  if not counters:
    return None
  rows = [
    [Cell(labels.label(n)), *(Cell(labels.number(record["budget"][n].get(c))) for c in counters)]
    for n in names
  ]
  return Table(["Model", *map(labels.counter, counters)], rows)


def transfer(record: Mapping[str, Any]) -> Table | None:
  """Returns the score of each row's expert on each column's task, and the base below."""
  if not record.get("transfer"):
    return None
  tasks = record["tasks"]
  rows = [
    [Cell(e), *(Cell(labels.value(record, record["transfer"][e][t]), e == t) for t in tasks)]
    for e in tasks
    if e in record["transfer"]
  ]
  if "base" in record["models"]:
    base = record["models"]["base"]["per_task"]
    rows.append([Cell("Base"), *(Cell(labels.value(record, base[t])) for t in tasks)])
  return Table([f"Expert{labels.unit(record)}", *tasks], rows)


def chosen(record: Mapping[str, Any]) -> Table | None:
  """Returns the settings that were chosen for each method; None where nothing was searched."""
  methods = record.get("methods", {})
  if not any(m["settings"] for m in methods.values()):
    return None
  rows = []
  for name in labels.order(methods):
    method = methods[name]
    score = labels.value(record, method.get("validation"))
    cells = (labels.settings([method]) or "–", labels.number(method.get("trials")), score)
    rows.append([Cell(labels.label(name)), *map(Cell, cells)])
  return Table(["Method", "Settings", "Trials", f"Score that chose{labels.unit(record)}"], rows)


def differences(record: Mapping[str, Any]) -> Table | None:
  """Returns the paired differences with their intervals; None without any."""
  if not record.get("differences"):
    return None
  rows = []
  for entry in record["differences"]:
    what = f"{labels.label(entry['a'])} − {labels.label(entry['b'])}"
    numbers = (labels.value(record, entry[key]) for key in ("mean", "low", "high"))
    rows.append([Cell(what), *map(Cell, numbers)])
  unit = " (points)" if labels.percent(record) else labels.unit(record)
  return Table(["Models", f"Difference{unit}", "2.5 %", "97.5 %"], rows)


def headings(record: Mapping[str, Any]) -> list[tuple[str, str, Table]]:
  """Returns the tables of a record, each with a heading and an explanation."""
  split = labels.split(record)
  metric = labels.metric(record)
  less = "; less is better" if labels.lower_is_better(record) else ""
  note = (
    f"{metric.capitalize()} on {split} rows{less}. The best merge of a column is marked; base, "
  )
  note += "joint training and experts are no merges."
  if families := labels.families(record):
    shared = [f for f in dict.fromkeys(families.values()) if list(families.values()).count(f) > 1]
    kin = "; ".join(", ".join(t for t in record["tasks"] if families[t] == f) for f in shared)
    note += f" In “Families once” these count as one task: {kin}."
  sections = [
    (
      f"Results on {split}",
      note,
      results(record),
    ),
    (
      "Gap closed by task",
      "Share of the gap between base and experts, where the experts lead by over "
      f"{labels.lead(record)}.",
      gaps(record),
    ),
    (
      "Differences",
      "Paired differences of the mean over tasks, with 95 % bootstrap intervals.",
      differences(record),
    ),
    (
      "Settings",
      "The best of so many trials on validation.",
      chosen(record),
    ),
    ("Budget", "What each model was allowed to use.", budget(record)),
    (
      "Transfer",
      f"{metric.capitalize()} of every expert on the {split} rows of every task; its own is "
      "marked.",
      transfer(record),
    ),
  ]
  return [(title, note, table) for title, note, table in sections if table is not None]


def markdown(record: Mapping[str, Any]) -> str:
  """Formats all tables of a record as Markdown."""
  parts = [
    f"**{title}**\n\n{note}\n\n{to_markdown(table)}" for title, note, table in headings(record)
  ]
  return "\n".join(parts)


def text(record: Mapping[str, Any], width: int = 100) -> str:
  """Formats the summary, the results and the budget for a terminal of `width` columns."""
  parts = [textwrap.fill(labels.sentence(record), width)]
  for title, _, table in headings(record):
    if title not in ("Gap closed by task", "Transfer"):
      parts.append(f"{title}\n{to_text(table, width)}")
  return "\n\n".join(parts) + "\n"


def to_markdown(table: Table) -> str:
  """Formats a table as Markdown; the best cells are bold."""
  lines = [
    [escape(h) for h in table.head],
    [":--", *["--:"] * (len(table.head) - 1)],
    *[[_bold(cell) for cell in row] for row in table.rows],
  ]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _bold(cell: Cell) -> str:
  return f"**{escape(cell.text)}**" if cell.best else escape(cell.text)


def escape(x: str) -> str:
  """Escapes a name, so that it cannot break a table or become a tag, a link or emphasis."""
  for old, new in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
    x = x.replace(old, new)
  for c in "\\|*_`[]":
    x = x.replace(c, f"\\{c}")
  return display.name(" ".join(x.split()))


def to_text(table: Table, width: int = 100) -> str:
  """Formats a table with aligned columns; the best cells have a star.

  Long headings wrap. Columns beyond `width` follow below, with the row names repeated.
  """
  columns = [
    _column(head, [row[j] for row in table.rows], first=j == 0) for j, head in enumerate(table.head)
  ]
  lines = max(len(head) for head, _ in columns)
  names, *rest = ([""] * (lines - len(head)) + head + cells for head, cells in columns)
  names = [cell.ljust(max(map(len, names))) for cell in names]
  blocks: list[list[list[str]]] = []
  for cells in rest:
    wide = max(map(len, cells))
    column = [cell.rjust(wide) for cell in cells]
    if not blocks or sum(len(c[0]) + 1 for c in blocks[-1]) + wide > width:
      blocks.append([names])
    blocks[-1].append(column)
  return "\n\n".join(_block(block, lines) for block in blocks)


def _column(head: str, cells: Sequence[Cell], first: bool) -> tuple[list[str], list[str]]:
  """Returns the lines of a heading, and the cells as text, with room for a star."""
  drawn = [" ".join(c.text.split()) + ("" if first else "*" if c.best else " ") for c in cells]
  wide = 200 if first else max(14, *(len(x) - 1 for x in drawn))
  return [line + ("" if first else " ") for line in textwrap.wrap(head, wide)], drawn


def _block(columns: Sequence[Sequence[str]], lines: int) -> str:
  rows = [" ".join(row).rstrip() for row in zip(*columns, strict=True)]
  rule = "─" * (sum(len(c[0]) for c in columns) + len(columns) - 1)
  return "\n".join([*rows[:lines], rule, *rows[lines:]])


def seeds(summary: Mapping[str, Any]) -> str:
  """Formats mean ± spread over seeds of every model as Markdown, from `record.merge_seeds`."""
  models, tasks = summary["models"], summary["tasks"]
  flat = as_record(summary)
  families = labels.families(summary)
  rows = []
  for name in labels.order(models):
    m = models[name]
    gap = m["gap_closed"]
    closed = [Cell(f"{labels.share(gap['mean'])}{_plus_minus(gap['spread'], labels.share)}")]
    once = [m["family_mean"]] if families else []
    values = [m["mean"], *once, *(m["per_task"][t] for t in tasks)]
    first, *rest = (
      Cell(f"{labels.value(flat, s['mean'])}{_plus_minus(s['spread'], _value_of(flat))}")
      for s in values
    )
    rows.append([Cell(labels.label(name)), first, *closed, *rest])
  number = len(summary["seeds"])
  note = f"Mean ± standard deviation over {number} seeds" if number > 1 else "One seed"
  scale = f"{labels.metric(summary)} on {labels.split(summary)}"
  scale += "; less is better" if labels.lower_is_better(summary) else ""
  head = ["Model", f"Mean{labels.unit(flat)}", "Gap closed (%)"]
  head += [f"Families once{labels.unit(flat)}"] * bool(families)
  parts = [f"{note}, {scale}.\n", to_markdown(Table([*head, *tasks], rows))]
  if gap_table := gaps(flat | {"tasks": tasks}):
    parts += [
      f"By task, where the experts lead by over {labels.lead(flat)}:\n",
      to_markdown(gap_table),
    ]
  return "\n".join(parts)


def as_record(summary: Mapping[str, Any]) -> dict[str, Any]:
  """Returns means over seeds as a record, for the functions of `labels`."""
  models, tasks = summary["models"], summary["tasks"]
  return {
    "models": {
      n: {"mean": m["mean"]["mean"], "per_task": {t: m["per_task"][t]["mean"] for t in tasks}}
      for n, m in models.items()
    },
    # Means of seeds stand in for means of rounds.
    "rounds": [{"mean": v} for m in models.values() for v in m["mean"]["values"]],
    **{key: summary[key] for key in ("metric", "lower_is_better") if key in summary},
  }


def _value_of(record: Mapping[str, Any]) -> Any:
  return lambda x: labels.value(record, x)


def _plus_minus(spread: float | None, write: Any) -> str:
  return "" if spread is None else f" ± {write(spread)}"
