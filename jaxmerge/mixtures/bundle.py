"""Bundles: one shared task vector, with a mask and a scale for each task.

A bundle is not one model: `for_task` returns the model of a task, built from the base. It takes the
memory of one task vector, plus one bit per entry for each task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple  # Any: arrays of jax, or of NumPy where loaded.

import jax
import jax.numpy as jnp

from jaxmerge import errors
from jaxmerge.core import double_precision, interpreter, running_statistics, tree
from jaxmerge.core.tree import Tree
from jaxmerge.drivers import arguments, finiteness
from jaxmerge.mixtures import low_rank

rmm = low_rank.rmm


class Bundle(NamedTuple):
  """A base, a shared task vector, and each task's mask and scale.

  Attributes:
    method: name of the method, such as "emr".
    names: names of the tasks.
    base: tree of arrays [*s].
    shared: leaves of the task vector [*s] by name, float32 or wider, without integer leaves.
    masks: boolean [K, *s] by name.
    scales: factor of each task, [K].
    statistics: running statistics of each task by name, [K, *s], as in its model.
  """

  method: str
  names: tuple[str, ...]
  base: Tree
  shared: dict[str, Any]
  masks: dict[str, Any]
  scales: Any
  statistics: dict[str, Any]

  @double_precision.aware
  def for_task(self, name: str) -> Tree:
    """Returns the model of a task: the base plus its scale times its entries of the shared vector.

    Raises:
      ValueError: for a task that the bundle does not have.
    """
    if name not in self.names:
      raise ValueError(f"the bundle has no task {name!r}{errors.nearest(name, self.names)}.")
    k = self.names.index(name)

    def one(key: str, base: Any) -> Any:
      if key in self.statistics:
        return jnp.asarray(self.statistics[key])[k].astype(base.dtype)
      if key not in self.shared:
        return base
      wide = jnp.asarray(base).astype(self.shared[key].dtype)
      entries = jnp.where(self.masks[key][k], self.shared[key], 0)
      return (wide + self.scales[k].astype(wide.dtype) * entries).astype(base.dtype)

    out = {n: one(n, x) for n, x in tree.named(self.base).items()}
    changed = {n: out[n] for n in self.shared.keys() | self.statistics.keys()}
    return tree.rebuild(self.base, out | finiteness.check_result(changed))


def task_vectors(base: Tree, models: Tree) -> tuple[dict[str, jax.Array], dict[str, Any]]:
  """Returns the task vectors of floating leaves by name, [K, *s], and the running statistics."""
  arguments.refuse(base, "the base")
  arguments.refuse(models, "the models")
  interpreter.check_models(base, models, base)
  bases, stacks = tree.named(base), tree.named(models)
  floating = [n for n, x in bases.items() if tree.is_floating(x)]
  finiteness.refuse_inputs({n: bases[n] for n in floating}, {n: stacks[n] for n in floating})
  running = running_statistics.of(floating)
  taus = {
    n: interpreter.task_vectors(jnp.asarray(stacks[n]), jnp.asarray(bases[n]))
    for n in floating
    if n not in running
  }
  return taus, {n: double_precision.copy_leaf(stacks[n]) for n in floating if n in running}


def task_names(names: Sequence[str] | None, models: Tree) -> tuple[str, ...]:
  """Returns a name for each model; raises ValueError for repeated names or a wrong number."""
  num_models = tree.num_models(models)
  names = tuple(str(k) for k in range(num_models)) if names is None else tuple(names)
  if len(names) != num_models or len(set(names)) != num_models:
    raise ValueError(f"{num_models} models need as many different names, got {list(names)}.")
  return names
