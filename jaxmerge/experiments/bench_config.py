"""Reads the config of a leaderboard of methods."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections.config_dict import ConfigDict

from jaxmerge import errors
from jaxmerge.catalog import lookup
from jaxmerge.experiments import config as configs
from jaxmerge.experiments import schema, shipped_configs


def load(path: str, changes: Sequence[tuple[str, str]] = ()) -> ConfigDict:
  """Returns the locked config of a leaderboard of methods, changed and checked.

  `run` is the experiment's config, in the same folder or shipped. `experts` is the folder of an ATM
  run whose experts are merged, with {seed} for the seed; empty: experts are tuned. `methods` maps a
  row's name to settings of the method of that name, or of the method under `name`; a tuple lists
  values to try. `changes` are changes to the experiment's config.
  """
  schema.check_command(configs.read(path), path, "bench")
  config = configs.load_as(path, schema.Bench, changes)
  if config.seeds < 1:
    raise ValueError(f"{path}: config.seeds must be at least 1, got {config.seeds}.")
  for name, options in config.methods.items():
    where = f"{path}: config.methods.{name}"
    settings_ = {"name": name, **options}
    word = settings_.pop("name")
    entry = lookup.METHODS.get(word)
    if entry is None:
      raise ValueError(
        f"{where}: no method is called {word!r}{errors.nearest(word, lookup.METHODS)}."
      )
    if entry.on == "weights" or entry.models[1] is not None:
      raise ValueError(f"{where}: {word} does not merge the task vectors of any number of models.")
    for key, value in settings_.items():
      for one in value if isinstance(value, tuple | list) else (value,):
        configs.check_method({"name": word, key: one}, where)
  experiment_config(config, path, 0)
  return config.lock()


def experiment_config(config: Mapping[str, Any] | ConfigDict, source: str, seed: int) -> ConfigDict:
  """Returns the config of the experts that a leaderboard merges."""
  beside = pathlib.Path(shipped_configs.locate(source)).parent / config["run"]
  path = str(beside) if beside.is_file() else config["run"]
  experiment = configs.load(path).copy_and_resolve_references().unlock()
  experts = experiment.baselines.get("experts", ConfigDict())
  with experiment.ignore_type():
    experiment.baselines, experiment.also = ConfigDict({"experts": experts}), ConfigDict()
  changes = {**config["changes"], "seed": seed, "final": config["final"], "keep_experts": False}
  for key, value in configs.flat(changes).items():
    if key not in configs.flat(experiment):
      raise ValueError(
        f"{source}: config.changes: {path} has no key "
        f"{key!r}{errors.nearest(key, configs.flat(experiment))}."
      )
    configs.change(experiment, key, value, f"{source}: config.changes")
  configs.check(experiment, path)
  return experiment.lock()
