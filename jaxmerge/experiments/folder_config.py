"""The config of a leaderboard of methods on model folders, and its checks. Free of jax."""

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
    base: a folder, a checkpoint, or a hub id; adapters follow a `+`.
    models: the models to merge, in the same forms.
    evaluate: command with `{out}`, see `jaxmerge.evaluation.external`; its numbers select settings.
    methods: names of methods; `all` for all that merge any number of task vectors.
    final: command for the reported numbers, run on each method's best merge; empty: `evaluate`.
    trials: the most settings to try per method.
    changes: the search space of parameters, by method and parameter.
    numbers: which of the numbers enter the score; empty: all.
    lower_is_better: whether lower numbers are better.
    keep: which merges stay on disk: the best of all, all, or none.
    seed: seed of random masks.
    download: whether models missing from the hub's cache are downloaded.
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
  """Returns the bench with `all` replaced by names; raises ValueError if it cannot be run."""
  names: list[str] = []
  for name in bench.methods:
    enough = (n for n, e in lookup.METHODS.items() if e.models[0] <= len(bench.models))
    names += sorted(filter(_fits, enough)) if name == "all" else [name]
  for name in names:
    entry = lookup.entry(name)
    if not _fits(name):
      raise ValueError(
        f"{name} does not merge the task vectors of any number of models: "
        "merge with it by a recipe and `jaxmerge merge`; bench takes those of `--methods all`."
      )
    box.axes(name, bench.changes.get(name))
    if len(bench.models) < entry.models[0]:
      raise ValueError(f"{name} needs {entry.models[0]} models, got {len(bench.models)}.")
  for name in bench.changes:
    if name not in names:
      near = errors.nearest(name, names)
      raise ValueError(f"search space of {name!r}: it is not among the methods{near}.")
  if not names:
    raise ValueError("no methods: name one or more, or all.")
  if bench.trials < 1:
    raise ValueError(f"trials must be 1 or more, got {bench.trials}.")
  if bench.keep not in KEEP:
    raise ValueError(f"keep must be one of {', '.join(KEEP)}, got {bench.keep!r}.")
  inputs.short_names([bench.base, *bench.models])
  return bench._replace(methods=tuple(dict.fromkeys(names)))


def _fits(name: str) -> bool:
  entry = lookup.METHODS[name]
  return entry.on != "weights" and entry.models[1] is None
