"""Configs of programs to compile: that of an experiment, or that of a merge. Free of jax."""

from __future__ import annotations

from collections.abc import Sequence

from ml_collections.config_dict import ConfigDict

from jaxmerge.experiments import config as configs
from jaxmerge.experiments import schema


def load(path: str, changes: Sequence[tuple[str, str]] = ()) -> ConfigDict:
  """Returns the locked config of programs to compile: that of an experiment, or of a merge.

  That of a merge says how many `models` of a decoder (`model`, its fields) of what `dtype` a
  `method` merges over a `mesh`, and how many `entries` a slice has where they are streamed.
  """
  config = configs.read(path)
  if "experiment" in config:
    return configs.load(path, changes)
  if "models" not in config:
    raise ValueError(
      f"{path}: programs are compiled of an experiment (config.experiment) or of a merge "
      f"(config.models); it has neither, but {', '.join(sorted(config))}."
    )
  config = configs.load_as(path, schema.Merge, changes)
  for key in ("models", "entries"):
    if config[key] < 1:
      raise ValueError(f"{path}: config.{key} must be at least 1, got {config[key]}.")
  for key, value in config.mesh.items():
    if key not in schema.AXES or type(value) is not int:
      raise ValueError(
        f"{path}: config.mesh has whole numbers {', '.join(schema.AXES)}; got {key!r}: {value!r}."
      )
  configs.check_method(dict(config.method), f"{path}: config.method")
  return config.lock()
