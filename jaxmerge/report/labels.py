"""The texts of a report: model names, units of numbers, the one-sentence summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any  # Any: a record is JSON.

from jaxmerge.report import comparisons

LABELS = {
  "base": "Base",
  "average": "Average",
  "task_arithmetic": "Task arithmetic",
  "ties": "TIES",
  "dare": "DARE",
  "breadcrumbs": "Breadcrumbs",
  "atm": "ATM",
  "multitask": "Joint training",
  "experts": "Experts",
}
_REFERENCES = ("base", "multitask", "experts")
_COUNTERS = {
  "epochs_per_task": "Epochs per task",
  "gradient_steps": "Gradient steps",
  "sequential_steps": "Sequential steps",
  "samples": "Samples",
  "exchanges": "Exchanges",
  "trials": "Trials",
}


def label(name: str) -> str:
  """Returns the display name of a model: `atm_nesterov` is "ATM (nesterov)"."""
  if name in LABELS:
    return LABELS[name]
  for head in ("atm", *_REFERENCES):
    if name.startswith(f"{head}_"):
      return f"{LABELS[head]} ({name[len(head) + 1 :].replace('_', ' ')})"
  return name.replace("_", " ")


def kind(name: str) -> str:
  """Returns "reference" (not a merge), "loop" (ATM) or "one-shot" (any other merge)."""
  head = name.split("_")[0]
  if head in _REFERENCES:
    return "reference"
  return "loop" if head == "atm" else "one-shot"


def order(models: Mapping[str, Any]) -> list[str]:
  """Returns the model names in display order: base, merges, experts."""
  known = list(LABELS)

  def place(name: str) -> tuple[int, str]:
    if name in known:
      return 10 * known.index(name), name
    head = name.split("_")[0]
    if kind(name) == "one-shot":
      return 10 * known.index("breadcrumbs") + 1, name
    return 10 * known.index(head) + 1, name

  return sorted(models, key=place)


def split(record: Mapping[str, Any]) -> str:
  """Returns the split of the scores; validation where the record has none."""
  return record.get("split", "validation")


def families(record: Mapping[str, Any]) -> Mapping[str, str]:
  """Returns the family of each task; empty where every family has one task."""
  by_task = record.get("families", {})
  return by_task if len(set(by_task.values())) < len(by_task) else {}


def metric(record: Mapping[str, Any]) -> str:
  """Returns the name of the metric."""
  return record.get("metric", "accuracy")


def lower_is_better(record: Mapping[str, Any]) -> bool:
  """Returns whether lower values of the metric are better, as for a loss."""
  return bool(record.get("lower_is_better", False))


def gain(record: Mapping[str, Any], x: float) -> float:
  """Returns a value of the metric, negated where lower is better."""
  return -x if lower_is_better(record) else x


def percent(record: Mapping[str, Any]) -> bool:
  """Returns whether the metric is a fraction, higher being better, to show in percent."""
  if lower_is_better(record):
    return False
  values = [v for m in record["models"].values() for v in (m["mean"], *m["per_task"].values())]
  values += [entry["mean"] for entry in record["rounds"]]
  return all(0 <= v <= 1 for v in values if v is not None)


def unit(record: Mapping[str, Any]) -> str:
  """Returns " (%)" for fractions, the metric's name where lower is better, else nothing."""
  if lower_is_better(record):
    return f" ({metric(record)})"
  return " (%)" if percent(record) else ""


def axis(record: Mapping[str, Any], what: str) -> str:
  """Returns the label of an axis of the metric, with `what` after its name."""
  name = f"{metric(record)}{what}"
  return f"{name} (less is better)" if lower_is_better(record) else f"{name}{unit(record)}"


def lead(record: Mapping[str, Any]) -> str:
  """Returns the lead of the experts that a task needs for its gap to be shown, as text."""
  return f"0.05 {metric(record)}" if lower_is_better(record) else "5 points"


def value(record: Mapping[str, Any], x: float | None, digits: int = 1) -> str:
  """Formats a metric value: 0.7663 as "76.6", 2.34567 bits as "2.346"; others with 4 digits."""
  if x is None:
    return "–"
  if lower_is_better(record):
    return f"{x:.3f}"
  return f"{100 * x:.{digits}f}" if percent(record) else f"{x:.4g}"


def number(x: float | None) -> str:
  """Formats a counter or a setting: 12,800, 0.3, 1.0."""
  if x is None:
    return "–"
  if isinstance(x, int) or (float(x).is_integer() and abs(x) >= 1000):
    return f"{int(x):,}"
  text = f"{x:.3g}" if abs(x) < 1000 else f"{x:,.1f}"
  return text if any(c in text for c in ".e") else f"{text}.0"


def share(x: float | None) -> str:
  """Formats a share of the gap in whole percent: 0.724 as "72"."""
  # Adding zero turns -0 into 0.
  return "–" if x is None else f"{round(100 * x) + 0}"


def counter(name: str) -> str:
  """Returns the heading of a budget counter."""
  return _COUNTERS.get(name, name.replace("_", " ").capitalize())


def counters(record: Mapping[str, Any]) -> list[str]:
  """Returns the budget counters of all models, the standard ones first."""
  names = {key for row in record["budget"].values() for key in row}
  return [k for k in _COUNTERS if k in names] + sorted(names - set(_COUNTERS))


def gaps(record: Mapping[str, Any]) -> dict[str, float]:
  """Returns the share of the gap that each model closes, recorded or from the means."""
  recorded = {k: v for k, v in record.get("gap_closed", {}).items() if v is not None}
  return {**comparisons.gap_closed(record["models"]), **recorded}


def best(record: Mapping[str, Any], of_kind: str) -> str | None:
  """Returns the best model of a kind on validation; None without one.

  Tables, plots and sentences all use this rule, so that test rows never choose. Only a record
  without validation means is ranked by test rows.
  """
  models = record["models"]
  means = record.get("validation") or {n: m["mean"] for n, m in models.items()}
  names = [n for n in order(models) if kind(n) == of_kind and means.get(n) is not None]
  return max(names, key=lambda name: gain(record, means[name]), default=None)


def title(record: Mapping[str, Any]) -> str:
  """Returns the title of the report."""
  return record.get("title") or f"Merging {len(record['tasks'])} tasks"


def sentence(record: Mapping[str, Any]) -> str:
  """Returns the result in one sentence: the best loop's score, and the best one-shot merge."""
  models, share_of = record["models"], gaps(record)
  loop, one_shot = best(record, "loop"), best(record, "one-shot")
  name = loop or one_shot or next(iter(order(models)), None)
  if name is None:
    return "No models are recorded."
  sign = " %" if percent(record) else ""
  what = "" if metric(record) == "accuracy" else f" {metric(record)}"
  tasks = len(record["tasks"])
  over = f"over {tasks} tasks" if tasks > 1 else "on one task"
  loops = [m for m in models if kind(m) == "loop"]
  who = _with_scale(record, name)
  if name == loop and len(loops) > 1:
    who = f"The best of {len(loops)} ATM runs, {who},"
  result = (
    f"{who} reaches {value(record, models[name]['mean'])}{sign}{what} {over} ({split(record)})"
  )
  if name in share_of and kind(name) != "reference":
    result += f": {share(share_of[name])} % of the gap between base and experts"
  if loop and one_shot:
    other = _with_scale(record, one_shot)
    if one_shot in share_of:
      result += f"; the best one-shot merge ({other}) closes {share(share_of[one_shot])} %"
    else:
      result += f"; the best one-shot merge ({other}) reaches "
      result += f"{value(record, models[one_shot]['mean'])}{sign}"
  return result + "."


def _with_scale(record: Mapping[str, Any], name: str) -> str:
  scale = record["models"][name].get("scale")
  if scale is None or kind(name) == "loop":
    return label(name)
  return f"{label(name)}, scale {number(scale)}"


def settings(runs: Sequence[Mapping[str, Any]]) -> str:
  """Returns the chosen settings, one value per seed where seeds differ.

  >>> settings([{"settings": {"scale": 0.5}}, {"settings": {"scale": 0.3}}])
  'scale 0.5, 0.3'
  """
  names = dict.fromkeys(n for r in runs for n in r["settings"])
  parts = []
  for name in names:
    values = [_setting(r["settings"].get(name)) for r in runs]
    parts.append(f"{name} {', '.join(values if len(set(values)) > 1 else values[:1])}")
  return "; ".join(parts)


def _setting(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def short(text: str, length: int, head: int | None = None) -> str:
  """Shortens a name to `length`, cutting in the middle or after `head` characters."""
  if len(text) <= length:
    return text
  head = math.ceil((length - 1) / 2) if head is None else head
  return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def shorts(names: Sequence[str], length: int) -> dict[str, str]:
  """Shortens names so that they stay distinct.

  >>> shorts(["topic, first ten classes", "topic, other ten classes"], 12).values()
  dict_values(['topic, firs…', 'topic, othe…'])
  """
  result = {}
  for name in names:
    others = [n for n in names if n != name]
    heads = [math.ceil((length - 1) / 2), *range(length - 1, -1, -1)]
    cuts = ((short(name, length, h), {short(n, length, h) for n in others}) for h in heads)
    apart = (cut for cut, taken in cuts if cut not in taken)
    result[name] = next(apart, name)
  if len(set(result.values())) < len(set(names)):
    return {n: n for n in names}
  return result
