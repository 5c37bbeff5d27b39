"""The model card of a merged model: Markdown with a YAML head, as model hubs read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any  # A record is JSON, its values have no one type.

from jaxmerge.report import page, tables, words
from jaxmerge.report import record as records


def model_card(
  record: Mapping[str, Any], base_name: str, method: str, *, license: str = "other"
) -> str:
  """Writes the model card of the model that the record calls `method`.

  Args:
    record: the run; it may hold NumPy's numbers.
    base_name: the base model, as a hub names it.
    method: a name in `record["models"]`, such as "atm" or "ties".
    license: identifier of the licence; the base model's is the one that binds.
  """
  record = records.plain(record)
  if method not in record["models"]:
    known = ", ".join(words.order(record["models"]))
    raise ValueError(f"method must be a model of the record ({known}), got {method!r}.")
  name, model = words.label(method), record["models"][method]
  # JSON strings are YAML strings, so no name can break out of the head.
  head = {"license": license, "base_model": base_name}
  lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
  sign = " %" if words.percent(record) else ""
  reached = f"{words.value(record, model['mean'])}{sign} mean {words.metric(record)}"
  over = f"over {len(record['tasks'])} tasks, judged on {words.split(record)}"
  gap = words.gaps(record).get(method)
  closed = f": {words.share(gap)} % of the gap between base and experts" if gap is not None else ""
  parts = [
    "---\n" + "\n".join([*lines, "tags:", "- merge", "- jaxmerge"]) + "\n---",
    f"# {tables.escaped(words.title(record))}: {tables.escaped(name)}",
    f"One model for {len(record['tasks'])} tasks, merged with jaxmerge from "
    f"{tables.escaped(base_name)}.",
    f"It reaches {reached} {over}{closed}.",
    f"## Results\n\n{tables.to_markdown(tables.results(record))}",
    f"## How it was made\n\n{_making(record, method)}",
  ]
  if record.get("notes"):
    notes = "\n".join(f"- {tables.escaped(note)}" for note in record["notes"])
    parts.append(f"## Notes\n\n{notes}")
  return "\n\n".join(parts).rstrip() + "\n"


def _making(record: Mapping[str, Any], method: str) -> str:
  """Says how: the kind of merge, then settings, budget, config and versions as a list."""
  model, budget = record["models"][method], record["budget"].get(method, {})
  how = {
    "loop": "Tuned and merged in rounds (ATM): every task tunes a copy of the current model, the "
    "task vectors are merged, and the next round starts from the result.",
    "one-shot": "Every task tuned a copy of the base once; the task vectors were merged.",
    "reference": "This model is no merge; it stands here for comparison.",
  }[words.kind(method)]
  facts = {words.counter(k): words.number(budget[k]) for k in words.counters(record) if k in budget}
  if model.get("scale") is not None:
    facts = {"Scale": words.number(model["scale"]), **facts}
  if model.get("settings"):
    facts |= dict(page.flat(model["settings"]))
  if "seed" in record:
    facts["Seed"] = str(record["seed"])
  facts |= {f"Version of {k}": v for k, v in page.flat(record["versions"]) if k}
  listed = "\n".join(f"- {tables.escaped(k)}: {tables.escaped(v)}" for k, v in facts.items())
  config = "\n".join(
    f"    {k} = {' '.join(v.split())}" for k, v in page.flat(record["config"]) if k
  )
  parts = [how, f"Tasks: {', '.join(map(tables.escaped, record['tasks']))}.", listed]
  return "\n\n".join(p for p in [*parts, config and f"Config:\n\n{config}"] if p)
