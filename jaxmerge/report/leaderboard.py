"""The leaderboard of methods as a table and a plot; free of jax."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any  # Any: a record is JSON, and Matplotlib is optional.

from jaxmerge.report import figure_elements as figures
from jaxmerge.report import labels, tables
from jaxmerge.report import record as seeds
from jaxmerge.report.tables import Cell, Table

# Costs of a method's run: heading and format.
_COSTS: Mapping[str, tuple[str, Callable[[float], str]]] = {
  "seconds": ("CPU seconds", lambda x: f"{x:.2g}"),
  "bytes": ("MB", lambda x: f"{x / 1e6:.0f}"),
  "merge_seconds": ("Merges (s)", lambda x: f"{x:.3g}"),
  "evaluate_seconds": ("Evaluations (s)", lambda x: f"{x:.3g}"),
}


def from_records(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the leaderboard of records with `methods`, one for each seed."""
  first = records[0]
  return {
    "config": first["config"],
    "versions": first["versions"],
    "methods": {n: [r["methods"][n] for r in records] for n in first["methods"]},
    "failed": {n: why for r in records for n, why in r.get("failed", {}).items()},
    "summary": seeds.merge_seeds(records),
  }


def rank(facts: Mapping[str, Any]) -> list[str]:
  """Returns the methods, best mean first."""
  models, summary = facts["summary"]["models"], facts["summary"]
  return sorted(facts["methods"], key=lambda n: -labels.gain(summary, models[n]["mean"]["mean"]))


def best(facts: Mapping[str, Any]) -> str | None:
  """Returns the best method on validation, by the mean over seeds; see `labels.best`."""
  seen = {n: [r.get("validation") for r in runs] for n, runs in facts["methods"].items()}
  means = {n: sum(v) / len(v) for n, v in seen.items() if v and None not in v}
  flat = tables.as_record(facts["summary"])
  models = {n: flat["models"][n] for n in rank(facts)}
  return labels.best(flat | {"models": models, "validation": means}, "one-shot")


def table(facts: Mapping[str, Any], most: int | None = None) -> Table:
  """Returns a row per method, at most `most`, below experts and loops and above the base.

  The best method on validation is marked.
  """
  models, tasks = facts["summary"]["models"], facts["summary"]["tasks"]
  chosen, marked, flat = rank(facts), best(facts), tables.as_record(facts["summary"])
  others = [n for n in models if labels.kind(n) != "one-shot" and n != "base"]
  above = sorted(others, key=lambda n: (n != "experts", n))
  first = {n: runs[0] for n, runs in facts["methods"].items()}
  costs = [c for c in _COSTS if any(c in run for run in first.values())]
  head = ["Method", f"Mean{labels.unit(flat)}", "Gap closed (%)", "Settings", "Trials"]
  rows = []
  for name in [*above, *chosen[:most], *["base"] * ("base" in models)]:
    row_of_model, runs = models[name], facts["methods"].get(name, [])
    run = first.get(name, {})
    row = [labels.label(name) if not runs else name, _spread(row_of_model["mean"], flat)]
    row += [
      _spread(row_of_model["gap_closed"], None),
      labels.settings(runs),
      str(run.get("trials", "")),
    ]
    row += [_COSTS[c][1](run[c]) if c in run else "" for c in costs]
    row += [_spread(row_of_model["per_task"][t], flat) for t in tasks]
    rows.append([Cell(text, best=name == marked and i == 1) for i, text in enumerate(row)])
  return Table([*head, *(_COSTS[c][0] for c in costs), *tasks], rows)


def short(facts: Mapping[str, Any]) -> Table:
  """Returns the table without the columns of the tasks, where they are many."""
  whole, tasks = table(facts), len(facts["summary"]["tasks"])
  if tasks <= 4:
    return whole
  return Table(whole.head[:-tasks], [row[:-tasks] for row in whole.rows])


def top(facts: Mapping[str, Any], most: int) -> Table:
  """Returns mean, gap and cost of the best `most` methods, between experts and base."""
  whole, columns = table(facts, most), (0, 1, 2, 4, 5)
  return Table([whole.head[i] for i in columns], [[row[i] for i in columns] for row in whole.rows])


def _spread(statistic: Mapping[str, Any], record: Mapping[str, Any] | None) -> str:
  """Formats mean and spread in the record's metric, or as whole percent without a record."""
  if statistic["mean"] is None:
    return ""
  mean, spread = (
    x if x is None else labels.share(x) if record is None else labels.value(record, x)
    for x in (statistic["mean"], statistic["spread"])
  )
  return f"{mean}{'' if spread is None else f' ± {spread}'}"


def markdown(facts: Mapping[str, Any]) -> str:
  """Returns the leaderboard as a page of Markdown."""
  summary = facts["summary"]
  flat = tables.as_record(summary)
  unit = "points" if labels.percent(flat) else labels.metric(flat)
  less = "; less is better" if labels.lower_is_better(flat) else ""
  number = len(summary["seeds"])
  of = f"Mean ± standard deviation over {number} seeds" if number > 1 else "One seed"
  about = f"{of}, {labels.metric(flat)} on {labels.split(summary)}{less}. "
  if noise := facts.get("noise"):
    error = labels.value(flat, max(noise))
    about += f"The rows alone leave a standard error of {error} {unit} on a mean. "
  about += "The best on validation is marked. Settings are the best of so many trials on validation"
  if noise:
    about += (
      "; CPU seconds (of all threads) and MB are those of one merge in memory, once compiled, "
      "beside the models"
    )
  parts = [f"{about}.\n", tables.to_markdown(table(facts))]
  parts += [
    f"{tables.escape(n)} failed: {tables.escape(why)}\n"
    for n, why in facts.get("failed", {}).items()
  ]
  return "\n".join(parts)


def references(facts: Mapping[str, Any]) -> list[str]:
  """Returns the runs of ATM and joint training that stand beside the methods, the best first."""
  models, summary = facts["summary"]["models"], facts["summary"]
  names = [
    n
    for n in models
    if n not in facts["methods"]
    and (labels.kind(n) == "loop" or n.split("_")[0] == "multitask")
    and models[n]["mean"]["mean"] is not None
  ]
  return sorted(names, key=lambda n: -labels.gain(summary, models[n]["mean"]["mean"]))


def figure(facts: Mapping[str, Any]) -> Any:
  """Draws the share of the gap that every method closes, with its spread over seeds.

  References stand above the methods, hollow.
  """
  others, names = references(facts)[::-1], rank(facts)[::-1]
  every = [*names, *others]
  closed = [facts["summary"]["models"][n]["gap_closed"] for n in every]
  note = legend(facts)
  above = 0.36 + 0.15 * (note.count("\n") + 1)
  fig, axes = figures.figure(0.54 + above + 0.2 * len(every))
  figures.dress(axes, "", "", "")
  axes.grid(axis="y", visible=False)
  axes.grid(axis="x", color=figures.GRID, linewidth=0.6)
  values = [100 * (c["mean"] or 0.0) for c in closed]
  spreads = [100 * (c["spread"] or 0.0) for c in closed]
  for start, stop, fill in ((0, len(names), figures.INK), (len(names), len(every), figures.PAGE)):
    style = {"fmt": "o", "color": figures.INK, "mfc": fill, "markersize": 4, "linewidth": 1}
    axes.errorbar(values[start:stop], range(start, stop), xerr=spreads[start:stop], **style)
  axes.axvline(100, color=figures.INK, linewidth=0.9, linestyle=figures.DASHES["experts"])
  written = [figures.literal(n) for n in names] + [figures.model(n) for n in others]
  axes.set_yticks(range(len(every)), written, fontsize=figures.SIZE)
  axes.set_ylim(-0.7, len(every) - 0.3)
  title = f"Gap from base to experts closed, {labels.split(facts['summary'])} (%)"
  figures.headline(fig, title, note)
  width = max(figures.text_width(fig, n) for n in written)
  figures.set_edges(fig, width + 0.2, 0.1, 0.4, above)
  return fig


def legend(facts: Mapping[str, Any]) -> str:
  """Returns the legend of points, bars, the dashed line and hollow points."""
  number = len(facts["summary"]["seeds"])
  text = "Points: one seed"
  if number > 1:
    text = f"Points: mean of {number} seeds; bars: one standard deviation to each side"
  text += ". Dashed line: the experts, 100."
  if references(facts):
    text += (
      "\nHollow points are no one-shot merges: they train on all tasks, or exchange more often."
    )
  return text


def write(facts: Mapping[str, Any], path: pathlib.Path) -> None:
  """Writes the plot."""
  path.write_bytes(figures.png(figure(facts)))
