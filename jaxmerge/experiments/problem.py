"""What an experiment is about: its model, tasks, loss and metric."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple  # Any: parameters are nested dicts of arrays.

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmerge import methods
from jaxmerge.catalog import lookup
from jaxmerge.core import layouts, tree
from jaxmerge.core.stage import Method
from jaxmerge.evaluation import metrics
from jaxmerge.parallel import mesh as meshes
from jaxmerge.parallel import processes
from jaxmerge.tasks import batch, losses
from jaxmerge.tasks.task import Task


class Problem(NamedTuple):
  """What an experiment runs on.

  Attributes:
    title: one line for the report.
    base: what the base model is called, for the model card.
    apply: (params, inputs, head) -> logits.
    params: the base's parameters.
    tasks: the tasks, with heads.
    layout: matrix views of the leaves.
    save: (folder, params, readme) writes a model that other tools open.
    license: of the base model.
    loss: (outputs, labels) -> [B, ...], whose mean is minimised.
    metric: what models are judged by.
    sharding: rules for a mesh whose model axis splits the weights of a copy; none: it cannot.
  """

  title: str
  base: str
  apply: batch.Apply
  params: Any
  tasks: tuple[Task, ...]
  layout: tuple[tuple[str, str], ...]
  save: Callable[[pathlib.Path, Any, str], None]
  license: str
  loss: losses.Rowwise = losses.cross_entropy
  metric: metrics.Metric = metrics.ACCURACY
  sharding: meshes.Rules = ()


def shared(problem: Problem) -> Problem:
  """A problem that each process has made by itself, with the first one's weights and heads."""
  heads = [t.head for t in problem.tasks if t.head is not None]
  params, heads = processes.same((problem.params, heads))
  if heads:
    tasks = zip(problem.tasks, heads, strict=True)
    problem = problem._replace(tasks=tuple(dataclasses.replace(t, head=h) for t, h in tasks))
  return problem._replace(params=params)


def make_like(params: Any, height: int, phase: str, mesh: Mesh) -> Any:
  """The shapes and places of what a phase keeps: a stack of experts, or one model."""
  lead = (height,) if phase.split("_")[0] == "experts" else ()
  even = lead and height % mesh.shape["task"] == 0
  place = meshes.by_task(mesh) if even else meshes.everywhere(mesh)
  return jax.tree.map(
    lambda p: jax.ShapeDtypeStruct((*lead, *p.shape), p.dtype, sharding=place), params
  )


def method_of(settings: Mapping[str, Any]) -> Method:
  """Makes the method that a config names: {"name": "ties", "density": 0.2}."""
  settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
  name = settings.pop("name")
  lookup.check(name, settings)
  return getattr(methods, name)(**settings)


def one_shot_plan(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns the settings of a config's one-shot merges by name; the average is always one."""
  asked = {k: dict(v) for k, v in config["baselines"].items() if k in lookup.METHODS}
  return {"average": {}, **asked}


def layout_notes(problem: Problem, params: Any, config: Mapping[str, Any]) -> list[str]:
  """Says of each method of rows or matrices which leaves have which matrix view, and why."""
  named = {n: {"name": n, **settings} for n, settings in one_shot_plan(config).items()}
  named["atm"] = dict(config["method"])
  leaves, notes = tree.named(params), []
  shapes = {n: tuple(x.shape) for n, x in leaves.items() if tree.is_floating(x)}
  for name, settings in named.items():
    settings.pop("scales", None)
    method = method_of(settings)
    table = layouts.settled(method, shapes, problem.layout, names=leaves)
    notes += [f"{name}: {line}" for line in layouts.lines(method, table)]
  return notes


def post_hoc(tasks: Sequence[Task]) -> tuple[Task, ...]:
  """Returns tasks for post-hoc ATM: tuned on one half of the validation rows, chosen by the other.

  The halves are drawn at random, the same for every run.
  """
  out = []
  for t in tasks:
    rows = len(t.validation.labels)
    drawn = np.random.default_rng(tree.tag(t.name)).permutation(rows)
    halves = (np.sort(drawn[: -(-rows // 2)]), np.sort(drawn[-(-rows // 2) :]))
    parts = [jax.tree.map(lambda x, own=own: x[own], t.validation) for own in halves]
    out.append(dataclasses.replace(t, train=parts[0], validation=parts[1]))
  return tuple(out)
