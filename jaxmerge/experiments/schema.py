"""The keys of configs, their types and defaults. Free of jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_type_hints  # Any: kinds and values of any type.

from ml_collections.config_dict import ConfigDict

from jaxmerge.training import settings

# Keys that tell the configs of commands apart.
_COMMANDS = {"atm": ("experiment",), "bench": ("run", "methods"), "compile": ("models", "entries")}
AXES = ("task", "data", "model")  # As `mesh.AXES`, whose module imports jax.
Group = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Checkpoints: how many of the newest to retain, and rounds between saves."""

  keep: int = 2
  every: int = 1


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices by axis, -1 for all remaining; `devices`: fake CPU devices, None: real ones."""

  task: int = -1
  data: int = 1
  model: int = 1
  devices: int | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The keys of an experiment's config, besides the settings of its loop.

  Attributes:
    experiment: its function: a short name, or `module:function`.
    final: report scores on test rows, read once per model at the end; else on validation.
    keep_experts: save the tuned experts in `experts/`, for later merges.
    method: the merge of the loop: its name, and its hyperparameters.
    variant: pa: train rows, from the base; ph: validation rows, from a merged model.
    baselines: models to compare at the same budget; scales are chosen on validation.
    also: further runs of the loop: name of the run -> changes to this config.
    data: settings of the experiment's data, such as rows per task.
    checkpoint: checkpoints of the loop.
    mesh: devices.
  """

  experiment: str
  final: bool = False
  keep_experts: bool = False
  method: Group = dataclasses.field(default_factory=lambda: {"name": "average"})
  variant: Literal["pa", "ph"] = "pa"
  baselines: Group = dataclasses.field(default_factory=dict)
  also: Group = dataclasses.field(default_factory=dict)
  data: Group = dataclasses.field(default_factory=dict)
  checkpoint: Checkpoint = Checkpoint()
  mesh: Mesh = Mesh()


@dataclasses.dataclass(frozen=True)
class Bench:
  """A leaderboard of methods.

  Attributes:
    run: the experiment's config in the same folder: data, base, budget of the experts.
    methods: settings of each method; a tuple is a list of values to try.
    experts: folder of an ATM run whose experts are merged, with {seed} for the seed; empty:
      they are tuned.
    seeds: number of seeds.
    final: scores of test rows; hyperparameters are chosen on validation.
    changes: to the experiment's config.
  """

  run: str
  methods: Group
  experts: str = ""
  seeds: int = 1
  final: bool = True
  changes: Group = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Merge:
  """A merge of decoders, to compile.

  Attributes:
    models: number of experts, besides the base.
    model: fields of `jaxmerge.models.decoder_config.Config`.
    method: its name, and its hyperparameters.
    dtype: of all weights; the merge computes in float32.
    mesh: devices by axis, -1 for all remaining.
    entries: per slice, for models streamed through one device.
  """

  models: int
  model: Group
  method: Group
  dtype: Literal["bfloat16", "float32"] = "bfloat16"
  mesh: Group = dataclasses.field(default_factory=lambda: {"task": 1, "data": 1, "model": -1})
  entries: int = 2**20


def kinds(schema: type) -> dict[str, Any]:
  """Returns the type of each key of a schema; groups with fixed keys are flattened.

  >>> kinds(Experiment)["mesh.devices"]
  int | None
  """
  by_key = {}
  for name, kind in get_type_hints(schema).items():
    if dataclasses.is_dataclass(kind):
      by_key.update({f"{name}.{k}": v for k, v in get_type_hints(kind).items()})
    else:
      by_key[name] = dict if kind == Group else kind
  return by_key


def fill(config: ConfigDict, schema: type) -> ConfigDict:
  """Returns a config with missing keys set to the defaults of a schema.

  For an experiment these include the loop's settings.
  """
  config = config.copy_and_resolve_references().unlock()
  with config.ignore_type():
    for name, value in defaults(schema).items():
      if name not in config:
        config[name] = ConfigDict(value) if isinstance(value, dict) else value
      elif schema is Experiment and name in ("checkpoint", "mesh"):
        _fill_group(config[name], value)
  return config


def defaults(schema: type) -> dict[str, Any]:
  """Returns the defaults of a schema, groups as dicts; for an experiment also its loop's."""
  loop = defaults(settings.Settings) if schema is Experiment else {}
  values = {}
  for field in dataclasses.fields(schema):
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
      value = field.default_factory()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
      value = dataclasses.asdict(value)
    if value is not dataclasses.MISSING:
      values[field.name] = dict(value) if isinstance(value, Mapping) else value
  return {**loop, **values}


def _fill_group(group: Any, defaults: Group) -> None:
  """Sets the defaults of a group in place; other values are refused later."""
  if isinstance(group, ConfigDict):
    for key in defaults.keys() - group.keys():
      group[key] = defaults[key]


def check_command(config: Mapping[str, Any] | ConfigDict, path: str, command: str) -> None:
  """Raises ValueError for a config of another command, and names that command."""
  has = [name for name, keys in _COMMANDS.items() if all(key in config for key in keys)]
  if has and command not in has:
    more = " --topology=v5e:2x2" if has[0] == "compile" else " --workdir=FOLDER"
    raise ValueError(
      f"{path} is a config for `jaxmerge {has[0]}`, not for {command}: run "
      f"jaxmerge {has[0]} --config={path}{more}."
    )
