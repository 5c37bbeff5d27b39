"""Reads configs of programs to compile, of an experiment or a merge. Free of jax."""

from __future__ import annotations

from collections.abc import Sequence

from ml_collections.config_dict import ConfigDict

from jaxmerge.experiments import config as configs
from jaxmerge.experiments import schema


def load(path: str, changes: Sequence[tuple[str, str]] = ()) -> ConfigDict:
  """Returns the locked config of programs to compile, of an experiment or a merge.

  The config of a merge has the number of `models`, the fields of the decoder (`model`), their
  `dtype`, the `method`, the `mesh`, and the `entries` of a slice for streaming.
  """
  config = configs.read(path)
  if "experiment" in config:
    return configs.load(path, changes)
  if "models" not in config:
    raise ValueError(
      f"{path}: compile needs an experiment (config.experiment) or a merge "
      f"(config.models); the config has neither, but {', '.join(sorted(config))}."
    )
  config = configs.load_as(path, schema.Merge, changes)
  for key in ("models", "entries"):
    if config[key] < 1:
      raise ValueError(f"{path}: config.{key} must be at least 1, got {config[key]}.")
  for key, value in config.mesh.items():
    if key not in schema.AXES or type(value) is not int:
      raise ValueError(
        f"{path}: config.mesh takes integers for {', '.join(schema.AXES)}; got {key!r}: {value!r}."
      )
  configs.check_method(dict(config.method), f"{path}: config.method")
  return config.lock()
