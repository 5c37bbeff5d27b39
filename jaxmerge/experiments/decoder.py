"""A decoder of any size, as shapes only: for compilation, without weights or rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any  # Any: configs are plain trees.

import jax
import jax.numpy as jnp

from jaxmerge.experiments.problem import Problem, split_shapes
from jaxmerge.models import llama
from jaxmerge.tasks.task import Task


def problem(config: Mapping[str, Any]) -> Problem:
  """Returns a decoder, and rows of the config's length, for next-token prediction.

  Every task has the configured number of rows; a real one with fewer documents would have fewer.
  """
  fields, apply = llama.from_fields(dict(config["model"]), jnp.dtype(config["compute_dtype"]))
  params = jax.eval_shape(lambda: llama.init(fields, jax.random.key(0)))
  length, count = config["data"]["length"], int(config["data"]["train"])
  row = jax.ShapeDtypeStruct((length,), jnp.int32)
  split = split_shapes(count, row, labels=(length,))
  tasks = [Task(str(name), split, split) for name in config["data"]["domains"]]
  return Problem(apply, params, tasks, layout=llama.VIEWS, sharding=llama.SHARDING)
