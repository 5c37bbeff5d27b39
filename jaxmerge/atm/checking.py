"""What is refused before any training: tasks without rows, a model that does not fit them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any  # Any: parameters, inputs and what is to be checked are the user's.

import jax
import numpy as np

from jaxmerge.atm import tune
from jaxmerge.tasks import task as tasks


def check(apply: tune.Apply, params: Any, given: Any, loss: tune.Rowwise) -> None:
  """Raises ValueError, naming task and row, for what cannot be tuned; nothing is computed.

  Args:
    apply: (params, inputs, head) -> outputs.
    params: tree of arrays.
    given: the tasks; a list of them, or what was given in its place.
    loss: what is minimised; outputs of another than `cross_entropy` may have any shape.
  """
  if isinstance(given, tasks.Task | Mapping | str) or not isinstance(given, Sequence):
    raise ValueError(f"tasks must be a list of jaxmerge.Task, got {type(given).__name__}.")
  if not given:
    raise ValueError("at least one task is needed, got none.")
  for k, task in enumerate(given):
    if not isinstance(task, tasks.Task):
      raise ValueError(f"tasks[{k}] must be a jaxmerge.Task, got {type(task).__name__}.")
  names = [t.name for t in given]
  if len(set(names)) != len(names):
    raise ValueError(f"task names must differ, got {names}.")
  for task in given:
    tasks.check(task)
  tune.heads(given)
  _check_outputs(apply, params, given, loss)


def _check_outputs(
  apply: tune.Apply, params: Any, given: Sequence[tasks.Task], loss: tune.Rowwise
) -> None:
  """Compares the shape of the model's outputs with the labels, class by class."""
  try:
    inspect.signature(apply).bind(None, None, None)
  except TypeError as error:
    raise ValueError(
      f"apply must take (params, inputs, head), where head is None if tasks have none: {error}."
    ) from error
  except ValueError:  # A callable that does not tell its signature.
    pass
  widest = max(given, key=lambda t: t.num_classes)
  inputs, labels, head = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.canonicalize_dtype(x.dtype)),
    (widest.train.inputs, widest.train.labels, widest.head),
  )
  shape = np.shape(jax.eval_shape(apply, params, inputs, head))
  if loss is not tune.cross_entropy:
    return
  if shape[:-1] != labels.shape or shape[-1] < widest.num_classes:
    raise ValueError(
      f"task {widest.name!r}: the model's outputs are {list(shape)} for labels "
      f"{list(labels.shape)}; cross entropy needs logits {[*labels.shape, widest.num_classes]} or "
      "more, one for each class: give the tasks a head, or the model a wider one."
    )
