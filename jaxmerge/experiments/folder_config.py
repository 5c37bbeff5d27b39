"""What a leaderboard of methods on folders of models compares, checked. Free of jax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxmerge import errors
from jaxmerge.catalog import lookup
from jaxmerge.files import inputs
from jaxmerge.search import box

KEEP = ("best", "all", "none")


class Bench(NamedTuple):
  """A leaderboard of methods on folders of models.

  Attributes:
    base: a folder, a checkpoint, or an id of the hub; with adapters behind a `+`.
    models: the models to be merged, likewise.
    evaluate: command with `{out}`, see `jaxmerge.evaluation.external`, whose numbers choose.
    methods: names of methods; `all` for all that merge any number of task vectors.
    final: command whose numbers are reported, once for the best of each method; empty: `evaluate`.
    trials: settings that are tried of each method, at most.
    changes: what is tried of a method's parameters, by method and parameter.
    numbers: which of the numbers count; empty: all.
    lower_is_better: whether less of them is better.
    keep: which merges stay on the disk: the best of all, all, or none.
    seed: of random masks.
    download: whether models that the hub's cache lacks are fetched.
  """

  base: str
  models: Sequence[str]
  evaluate: str
  methods: Sequence[str]
  final: str = ""
  trials: int = 8
  changes: Mapping[str, Mapping[str, box.Axis]] = {}
  numbers: Sequence[str] = ()
  lower_is_better: bool = False
  keep: str = "best"
  seed: int = 0
  download: bool = False


def check(bench: Bench) -> Bench:
  """Returns the bench with `all` replaced by names; ValueError for what cannot be run."""
  names: list[str] = []
  for name in bench.methods:
    enough = (n for n, e in lookup.METHODS.items() if e.models[0] <= len(bench.models))
    names += sorted(filter(_fits, enough)) if name == "all" else [name]
  for name in names:
    entry = lookup.entry(name)
    if not _fits(name):
      raise ValueError(f"{name} does not merge the task vectors of any number of models.")
    box.axes(name, bench.changes.get(name))
    if len(bench.models) < entry.models[0]:
      raise ValueError(f"{name} needs {entry.models[0]} models, got {len(bench.models)}.")
  for name in bench.changes:
    if name not in names:
      near = errors.nearest(name, names)
      raise ValueError(f"what to try of {name!r}: it is none of the methods{near}.")
  if not names:
    raise ValueError("there is no method: name one or more, or all.")
  if bench.trials < 1:
    raise ValueError(f"trials must be 1 or more, got {bench.trials}.")
  if bench.keep not in KEEP:
    raise ValueError(f"keep must be one of {', '.join(KEEP)}, got {bench.keep!r}.")
  inputs.short_names([bench.base, *bench.models])
  return bench._replace(methods=tuple(dict.fromkeys(names)))


def _fits(name: str) -> bool:
  entry = lookup.METHODS[name]
  return entry.on != "weights" and entry.models[1] is None
