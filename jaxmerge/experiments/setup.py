"""The set-up of a run: its problem, settings and devices, shared by all phases."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any  # Any: configs are plain trees, parameters trees of arrays.

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmerge.evaluation import scoring
from jaxmerge.experiments import merges, phase_cache, registry, user_functions, workdir
from jaxmerge.experiments import problem as problems
from jaxmerge.experiments.events import Events
from jaxmerge.experiments.problem import Problem
from jaxmerge.parallel import mesh as meshes
from jaxmerge.parallel import processes
from jaxmerge.search import scales
from jaxmerge.tasks import batch
from jaxmerge.tasks.task import Task
from jaxmerge.training import placement
from jaxmerge.training.settings import Settings


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
  """The state that all phases of a run share.

  Attributes:
    config: the plain config.
    folder: the workdir.
    events: the reports of the run.
    problem: model, tasks, loss and metric.
    settings: of the loop.
    mesh: the devices.
    params: the base, in float32.
    rows: the validation rows, on the devices.
    score: scores of models [M, *s] on all tasks, see `scoring.scorer`.
    score_experts: scores of models [T, *s], each on its own task.
  """

  config: dict[str, Any]
  folder: pathlib.Path
  events: Events
  problem: Problem
  settings: Settings
  mesh: Mesh
  params: Any
  rows: batch.TaskBatch
  score: scoring.Scorer
  score_experts: scoring.Scorer

  @property
  def names(self) -> list[str]:
    """Names of the tasks."""
    return [t.name for t in self.problem.tasks]

  @property
  def training(self) -> dict[str, Any]:
    """Common arguments of the loop and of tuning experts."""
    sharding = self.problem.sharding if self.mesh.shape["model"] > 1 else ()
    loss, metric = self.problem.loss, self.problem.metric
    return {"loss": loss, "metric": metric, "mesh": self.mesh, "sharding": sharding}

  def mean(self, params: Any) -> float:
    """Returns the mean validation score of a model over the tasks."""
    stack = jax.tree.map(lambda p: p[None], replicate(self.mesh, params))
    return float(np.mean(scoring.means(self.score(stack, self.rows)[0], self.counts("validation"))))

  def counts(self, split: str) -> list[int]:
    """Returns the number of rows of each task in a split."""
    return [len(t.splits()[split].labels) for t in self.problem.tasks]

  def validation(self, models: Any, name: str, seed: int | None) -> scales.Validation:
    """Returns the objective of merging the experts: the score on validation."""
    return scales.Validation(
      self.params,
      models,
      self.score,
      self.rows,
      counts=self.counts("validation"),
      names=self.names,
      seed=seed,
      layout=self.problem.layout,
      metric=self.problem.metric,
      name=name,
    )

  def restore_or_make(
    self, phase: str, like: Any, make: Callable[[], tuple[Any, dict[str, Any]]], of: str = ""
  ) -> tuple[Any, dict[str, Any]]:
    """Restores arrays and facts of a phase from its checkpoint, or makes and saves them."""
    return phase_cache.restore_or_make(
      self.folder / "checkpoints" / phase, like, make, say=self.events.say, name=phase, of=of
    )


def prepare(config: dict[str, Any], folder: pathlib.Path, events: Events) -> Setup:
  """Makes the problem of a config, and puts its base and its validation rows on the devices.

  Raises:
    ValueError: for an experiment that fails, or settings that do not fit the mesh.
  """

  def cache(like: Any, make: Callable[[], Any]) -> Any:
    def make_once() -> tuple[Any, dict[str, Any]]:
      arrays = processes.broadcast(make())
      if processes.is_first():
        workdir.claim(folder, config)  # A saved base belongs to a run.
      return arrays, {}

    place = folder / "checkpoints" / "base"
    arrays, _ = phase_cache.restore_or_make(place, like, make_once, say=events.say, name="base")
    return meshes.fetch(arrays)

  for changes in ({}, *config.get("also", {}).values()):  # Errors come before any training.
    user_functions.make_settings(config | changes)
    merges.make_method((config | changes)["method"])
  with events.timed("data and base"):
    problem = problems.share(registry.make(config, cache))
  axes = {k: config["mesh"][k] for k in meshes.AXES}
  mesh = meshes.make(**axes, tasks=len(problem.tasks))
  params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), problem.params)
  rowwise = problem.metric.rowwise
  return Setup(
    config,
    folder,
    events,
    problem,
    user_functions.make_settings(config),
    mesh,
    replicate(mesh, params),
    place_rows(mesh, problem.tasks, "validation"),
    scoring.scorer(problem.apply, rowwise, mesh=mesh),
    scoring.expert_scorer(problem.apply, rowwise, mesh=mesh),
  )


def place_rows(mesh: Mesh, tasks: Sequence[Task], split: str) -> batch.TaskBatch:
  """Puts a split of all tasks on the devices."""
  return placement.rows(tasks, split, mesh)


def pad(mesh: Mesh, stack: Any, num_slots: int) -> Any:
  """Puts a stack of models on the devices, padded to a number of slots."""
  padded = jax.tree.map(lambda x: batch.pad(x, num_slots), meshes.fetch(stack))
  return meshes.put(padded, meshes.task_sharding(mesh))


def replicate(mesh: Mesh, params: Any) -> Any:
  """Returns the first process's copy of a model, replicated over all processes."""
  if jax.process_count() == 1 or not jax.tree.leaves(params)[0].is_fully_addressable:
    return params
  return meshes.put(processes.broadcast(params), meshes.replicated(mesh))


def model_shapes(params: Any, mesh: Mesh) -> Any:
  """Returns the replicated shapes of one model in a checkpoint."""
  return _shapes(params, (), meshes.replicated(mesh))


def stack_shapes(params: Any, mesh: Mesh, num_tasks: int) -> Any:
  """Returns the shapes of a stack in a checkpoint, sharded over tasks if that is even."""
  even = num_tasks % mesh.shape["task"] == 0
  return _shapes(
    params, (num_tasks,), meshes.task_sharding(mesh) if even else meshes.replicated(mesh)
  )


def _shapes(params: Any, lead: tuple[int, ...], sharding: Any) -> Any:
  return jax.tree.map(
    lambda p: jax.ShapeDtypeStruct((*lead, *p.shape), p.dtype, sharding=sharding), params
  )
