"""Runs a config with several seeds, and with several values of one or two keys, sequentially.

Free of jax until the first run starts.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple  # Any: configs and records are plain trees.

from jaxmerge import report
from jaxmerge.io.disk import atomic
from jaxmerge.report import labels, tables
from jaxmerge.report.tables import Cell, Table

Changes = Sequence[tuple[str, str]]
_MAX_KEYS = 2


class Combination(NamedTuple):
  """One combination of values, with all its seeds.

  Attributes:
    values: the value of each swept key, as text.
    runs: changes to the config, by the run's folder inside that of the sweep.
  """

  values: Mapping[str, str]
  runs: Mapping[str, Changes]


def parse_seeds(text: str) -> tuple[int, ...]:
  """Parses `0,1,2` or the half-open range `0:3`.

  >>> parse_seeds("0:3"), parse_seeds("1,4")
  ((0, 1, 2), (1, 4))
  """
  seeds: Sequence[int] = ()
  if match := re.fullmatch(r"(\d+):(\d+)", text):
    seeds = range(int(match[1]), int(match[2]))
    if not seeds:
      raise ValueError(
        f"--seeds={text} has no seeds: the end must be larger than the start; 0:3 is 0,1,2."
      )
  elif re.fullmatch(r"\d+(,\d+)*", text):
    seeds = [int(word) for word in text.split(",")]
  if not seeds or len(set(seeds)) < len(seeds):
    raise ValueError(f"--seeds must be different seeds, such as 0,1,2 or 0:3, got {text!r}.")
  return tuple(seeds)


def parse_sweep(text: str) -> tuple[str, tuple[str, ...]]:
  """Parses a key and its values; commas inside brackets do not separate values.

  >>> parse_sweep("learning_rate=1e-3,3e-4")
  ('learning_rate', ('1e-3', '3e-4'))
  """
  key, equals, words = text.partition("=")
  values = tuple(v.strip() for v in re.split(r",(?![^(\[{]*[)\]}])", words))
  if not (equals and key and all(values)) or len(set(values)) < len(values):
    raise ValueError(f"--sweep must be KEY=VALUE,VALUE of different values, got {text!r}.")
  return key.removeprefix("config."), values


def combinations(
  seeds: Sequence[int], sweeps: Sequence[tuple[str, tuple[str, ...]]]
) -> list[Combination]:
  """Returns all combinations of the values of the swept keys, each with all seeds.

  Raises:
    ValueError: for more than two keys, a repeated key, or a key that cannot be swept.
  """
  keys = [key for key, _ in sweeps]
  if len(keys) > _MAX_KEYS or len(set(keys)) < len(keys):
    raise ValueError(f"--sweep takes one or two different keys, got {', '.join(keys)}.")
  for key in keys:
    if key == "seed" or key.startswith("mesh"):
      hint = "--seeds=0:3 runs several seeds" if key == "seed" else "all runs share the devices"
      raise ValueError(f"--sweep {key}: {hint}.")
  result = []
  for values in itertools.product(*(values for _, values in sweeps)):
    chosen = dict(zip(keys, values, strict=True))
    place = "/".join(f"{k}={_as_name(v)}" for k, v in chosen.items())
    runs: dict[str, Changes] = {}
    for seed in seeds or (None,):
      changes = [*chosen.items(), *([] if seed is None else [("seed", str(seed))])]
      parts = [place, *([] if seed is None else [f"seed{seed}"])]
      runs["/".join(p for p in parts if p)] = changes
    result.append(Combination(chosen, runs))
  return result


def _as_name(value: str) -> str:
  """Returns a value in a form that fits in a path."""
  return re.sub(r"[^\w.+-]+", "_", value).strip("_.") or "_"


class LoadedCombination(NamedTuple):
  """A combination with its loaded configs, by the folder of the run."""

  values: Mapping[str, str]
  configs: Mapping[str, Any]


def load(
  combinations: Sequence[Combination], load_config: Callable[[Changes], Any]
) -> list[LoadedCombination]:
  """Loads the configs of all runs, so that a wrong value fails before the first run starts.

  Raises:
    ValueError: as `load_config` does, or if two values map to the same folder.
  """
  loaded = [
    LoadedCombination(c.values, {name: load_config(changes) for name, changes in c.runs.items()})
    for c in combinations
  ]
  folders = [name for each in loaded for name in each.configs]
  if twice := [name for name in folders if folders.count(name) > 1]:
    raise ValueError(f"two values of --sweep would run in the same folder, {twice[0]}.")
  return loaded


def run(
  loaded: Sequence[LoadedCombination],
  folder: pathlib.Path,
  start: Callable[[Any, pathlib.Path, str], dict[str, Any]],
) -> dict[str, Any]:
  """Runs all configs sequentially, each in a separate folder, and summarises them.

  Args:
    loaded: the result of `load`.
    folder: folder of the sweep, for `sweep.json` and `sweep.md`.
    start: (config, folder of the run, progress message) -> record. Starts or resumes a run.

  Returns:
    The content of `sweep.json`: values, folders and `report.merge_seeds` of each combination.
  """
  total, done = sum(len(each.configs) for each in loaded), 0
  facts: list[dict[str, Any]] = []
  for each in loaded:
    records: list[dict[str, Any]] = []
    for name, config in each.configs.items():
      done += 1
      records.append(start(config, folder / name, f"run {done} of {total}: {name}"))
    summary = report.merge_seeds(records)
    facts.append({"values": dict(each.values), "folders": [*each.configs], "summary": summary})
  result = {"combinations": facts}
  text = f"{tables.to_markdown(table(result))}\n{note(result)}\n"
  for ending, data in (("json", json.dumps(result, indent=1) + "\n"), ("md", text)):
    with atomic.write(folder / f"sweep.{ending}") as file:
      file.write(data.encode())
  return result


def table(facts: Mapping[str, Any]) -> Table:
  """Returns a row per combination and model: mean and spread over seeds.

  A sweep over keys shows only the ATM runs, which depend most on the settings.
  """
  entries = facts["combinations"]
  flat = [tables.as_record(e["summary"]) for e in entries]
  keys = [*entries[0]["values"]]
  tasks = entries[0]["summary"]["tasks"]
  head = [*keys, "Model"] if keys else ["Model"]
  head += [f"Mean{labels.unit(flat[0])}", "Gap closed (%)", *tasks]
  rows = []
  for entry, means in zip(entries, flat, strict=True):
    models = entry["summary"]["models"]
    names = labels.order(models)
    if keys:
      names = [n for n in names if labels.kind(n) == "loop"] or names
    for name in names:
      model = models[name]
      value = functools.partial(labels.value, means)
      values = [_spread(model["mean"], value), _spread(model["gap_closed"], labels.share)]
      values += [_spread(model["per_task"][t], value) for t in tasks]
      rows.append([*entry["values"].values(), labels.label(name), *values])
  return Table(head, [[Cell(text) for text in row] for row in rows])


def note(facts: Mapping[str, Any]) -> str:
  """Returns a sentence on the numbers of the table: statistic, metric and split."""
  summary = facts["combinations"][0]["summary"]
  number = len(summary["seeds"])
  over = f"Mean ± standard deviation over {number} seeds" if number > 1 else "One seed"
  return f"{over}, {labels.metric(summary)} on {labels.split(summary)}."


def _spread(statistic: Mapping[str, Any], write: Callable[[Any], str]) -> str:
  mean, spread = statistic["mean"], statistic["spread"]
  if mean is None:
    return "–"
  return write(mean) if spread is None else f"{write(mean)} ± {write(spread)}"
