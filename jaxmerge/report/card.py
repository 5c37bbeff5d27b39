"""Model cards of merged models: Markdown with YAML front matter, as model hubs read it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any  # Any: a record is JSON.

from jaxmerge import display
from jaxmerge.catalog import lookup
from jaxmerge.report import labels, page, tables
from jaxmerge.report import record as records


def model_card(
  record: Mapping[str, Any], base_name: str, method: str, *, license: str = "other"
) -> str:
  """Writes the model card of a model of the record.

  Args:
    record: the run; NumPy numbers are converted.
    base_name: hub id of the base model.
    method: a name in `record["models"]`, such as "atm" or "ties".
    license: identifier of the licence, normally the base model's.
  """
  record = records.plain(record)
  if method not in record["models"]:
    known = ", ".join(labels.order(record["models"]))
    raise ValueError(f"method must be a model of the record ({known}), got {method!r}.")
  name, model = labels.label(method), record["models"][method]
  sign = " %" if labels.percent(record) else ""
  reached = f"{labels.value(record, model['mean'])}{sign} mean {labels.metric(record)}"
  over = f"over {len(record['tasks'])} tasks, judged on {labels.split(record)}"
  gap = labels.gaps(record).get(method)
  closed = f": {labels.share(gap)} % of the gap between base and experts" if gap is not None else ""
  parts = [
    _head({"license": license, "base_model": base_name}),
    f"# {tables.escape(labels.title(record))}: {tables.escape(name)}",
    f"One model for {len(record['tasks'])} tasks, merged with jaxmerge from "
    f"{tables.escape(base_name)}.",
    f"It reaches {reached} {over}{closed}.",
    f"## Results\n\n{tables.to_markdown(tables.results(record))}",
    f"## How it was made\n\n{_describe_run(record, method)}",
  ]
  if record.get("notes"):
    notes = "\n".join(f"- {tables.escape(note)}" for note in record["notes"])
    parts.append(f"## Notes\n\n{notes}")
  return display.shown("\n\n".join(parts).rstrip() + "\n")


def merge_card(summary: Mapping[str, Any]) -> str:
  """Writes the model card of a merge of files, from `describe.summary`.

  The front matter names hub models only: a hub would take a path for the id of another model.
  """
  ids = dict.fromkeys(reference.split("@")[0] for reference in summary["hub"])
  head = {"base_model": list(ids), "base_model_relation": "merge"} if ids else {}
  if summary["library"] is not None:
    head["library_name"] = summary["library"]
  merges = [*summary["earlier"].values(), summary]
  names = dict.fromkeys(_name(m) for merge in merges for m in merge["methods"])
  models = dict.fromkeys(
    m for merge in merges for m in merge["models"] if m not in summary["earlier"]
  )
  title = f"Merge of {_many([*models])}: {', '.join(names) or 'copies of tensors'}"
  commits = (f"{reference}: commit {commit}" for reference, commit in summary["hub"].items())
  parts = [
    _head(head),
    f"# {tables.escape(title)}",
    "Merged with jaxmerge from these models; the first gave config and tokenizer.",
    _list(summary["models"]),
    *itertools.chain(*(_earlier(name, merge) for name, merge in summary["earlier"].items())),
    *([f"From the hub:\n\n{_list(commits)}"] if ids else []),
    f"## Method\n\n{_counts(summary)}",
    *map(_method, summary["methods"]),
    *([f"## Notes\n\n{_list(summary['notes'])}"] if summary["notes"] else []),
    *_recipe(summary["recipe"], summary.get("compat")),
    _list(_versions(summary["versions"])),
    "`jaxmerge_provenance.json` has checksums, and what became of every tensor of every model.",
  ]
  return display.shown("\n\n".join(parts) + "\n")


def _earlier(name: str, summary: Mapping[str, Any]) -> Iterator[str]:
  """Describes an earlier merge whose result is one of the models."""
  yield f"## Merged before: {tables.escape(name)}\n\n{_counts(summary)}"
  yield _list(summary["models"])
  yield from map(_method, summary["methods"])
  if summary["notes"]:
    yield f"Notes:\n\n{_list(summary['notes'])}"


def _counts(summary: Mapping[str, Any]) -> str:
  return f"Tensors: {summary['counts']}."


def _name(method: Mapping[str, Any]) -> str:
  """Returns the name of a method: the user's, or the catalog's."""
  if "words" in method["settings"]:
    return method["settings"]["words"]
  if method["method"] in lookup.METHODS or method["method"] == "mean":
    return labels.label(method["method"])
  return "a method given in Python"


def _many(models: Sequence[str]) -> str:
  return f"{len(models)} model{'s' * (len(models) != 1)}"


def _method(method: Mapping[str, Any]) -> str:
  """Describes what merged some of the tensors."""
  entry = lookup.METHODS.get(method["method"])
  many = f"{method['tensors']} tensors of {_many(method['models'])}"
  about = f"**{tables.escape(_name(method))}**, {many}"
  if entry is not None:
    mark = " This method is experimental." if entry.experimental else ""
    about = f"{about}: {tables.escape(f'{entry.formula}; {entry.paper}')}.{mark}"
  settings = {k: v for k, v in method["settings"].items() if k != "words"}
  if entry is None and method["method"] != "mean":
    settings["fingerprint of its code"] = method["method"]
  recipe = {"in the recipe": method["recipe"]} if method.get("recipe") else {}
  facts = {
    "models": ", ".join(method["models"]),
    **recipe,
    **method["hparams"],
    **dict(page.flat(settings)),
  }
  if method["seed"] is not None:
    facts["seed"] = str(method["seed"])
  if method.get("layout"):
    facts["outputs and inputs"] = method["layout"]
  return f"{about}\n\n{_list(f'{k}: {v}' for k, v in facts.items() if k)}"


def _recipe(text: str | None, compat: str | None = None) -> Sequence[str]:
  """Shows the recipe, in a fence longer than any in it, and the command that repeats it."""
  if text is None:
    return ("## How it was made\n\nBy `jaxmerge.merge_files`, from Python.",)
  fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
  flag = f" --compat {compat}" if compat else ""
  command = f"```sh\njaxmerge merge jaxmerge_recipe.yml OUT{flag}\n```"
  return (
    f"## Recipe\n\n{fence}yaml\n{text.rstrip()}\n{fence}",
    f"## How it was made\n\n{command}\n\nIts paths are relative to the folder where it ran.",
  )


def _head(fields: Mapping[str, Any]) -> str:
  """Writes the YAML front matter. JSON strings are valid YAML, so no name can break out of it."""
  lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
  return "\n".join(["---", *lines, "tags:", "- merge", "- jaxmerge", "---"])


def _list(lines: Iterable[str]) -> str:
  return "\n".join(f"- {tables.escape(line)}" for line in lines)


def _versions(versions: Mapping[str, Any]) -> list[str]:
  return [f"Version of {k}: {v}" for k, v in page.flat(versions) if k]


def _describe_run(record: Mapping[str, Any], method: str) -> str:
  """Describes a run: the kind of merge, then settings, budget, config and versions as a list."""
  model, budget = record["models"][method], record["budget"].get(method, {})
  how = {
    "loop": "Tuned and merged in rounds (ATM): each task tunes a copy of the current model, the "
    "task vectors are merged, and the next round starts from the result.",
    "one-shot": "Every task tuned a copy of the base once; the task vectors were merged.",
    "reference": "This model is not a merge; it is listed for comparison.",
  }[labels.kind(method)]
  facts = {
    labels.counter(k): labels.number(budget[k]) for k in labels.counters(record) if k in budget
  }
  if model.get("scale") is not None:
    facts = {"Scale": labels.number(model["scale"]), **facts}
  if model.get("settings"):
    facts |= dict(page.flat(model["settings"]))
  if "seed" in record:
    facts["Seed"] = str(record["seed"])
  lines = [*(f"{k}: {v}" for k, v in facts.items()), *_versions(record["versions"])]
  config = "\n".join(
    f"    {k} = {' '.join(v.split())}" for k, v in page.flat(record["config"]) if k
  )
  parts = [how, f"Tasks: {', '.join(map(tables.escape, record['tasks']))}.", _list(lines)]
  return "\n\n".join(p for p in [*parts, config and f"Config:\n\n{config}"] if p)
