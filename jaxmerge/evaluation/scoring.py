"""Scores models on the rows of tasks, over a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxmerge.core.stage import Array
from jaxmerge.parallel import mesh as meshes
from jaxmerge.tasks import batch, losses

Scorer = Callable[[Any, batch.TaskBatch], Array]


def scorer(apply: batch.Apply, metric: losses.Rowwise, *, mesh: Mesh, chunk: int = 100) -> Scorer:
  """Compiles (stack of models [M, *s], rows of T tasks) -> scores of all rows, float32 [M, T, N].

  The task axis of the mesh shards tasks; padded rows score zero.

  Args:
    apply: the model.
    metric: (outputs, labels) -> score of each row.
    mesh: the mesh.
    chunk: rows per call of the model.
  """
  task = functools.partial(_score, apply, metric, chunk)

  def local(models: Any, rows: batch.TaskBatch) -> Array:
    return lax.map(lambda params: lax.map(functools.partial(task, params), rows), models)

  return jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(P(), P("task")),
      out_specs=P(None, "task"),
      axis_names={"task"},
      check_vma=False,
    ),
    out_shardings=meshes.replicated(mesh),  # Every process reads all scores.
  )


def expert_scorer(
  apply: batch.Apply, metric: losses.Rowwise, *, mesh: Mesh, chunk: int = 100
) -> Scorer:
  """Compiles (experts [T, *s], rows of T tasks) -> scores of experts on their own tasks, [T, N]."""

  def local(models: Any, rows: batch.TaskBatch) -> Array:
    return lax.map(lambda pair: _score(apply, metric, chunk, *pair), (models, rows))

  return jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=P("task"),
      out_specs=P("task"),
      axis_names={"task"},
      check_vma=False,
    ),
    out_shardings=meshes.replicated(mesh),  # Every process reads all scores.
  )


def per_row(scores: Any, counts: Sequence[int]) -> list[np.ndarray]:
  """Removes the padding: scores [T, N] of one model -> one array [rows] per task."""
  return [np.asarray(s)[:n] for s, n in zip(np.asarray(scores), counts, strict=False)]


def means(scores: Any, counts: Sequence[int]) -> list[float]:
  """Returns the mean score of each task: scores [T, N] of one model -> T numbers."""
  return [float(s.mean(dtype=np.float64)) for s in per_row(scores, counts)]


def refuse_unscored(names: Sequence[str], scores: Sequence[np.ndarray], label: str) -> None:
  """Raises ValueError, naming task and row, for scores that are not finite.

  >>> refuse_unscored(["ant"], [np.array([0.5, np.nan])], "round 3")
  Traceback (most recent call last):
    ...
  ValueError: round 3: the score of row 1 of task 'ant' is nan; a metric must be finite.
  """
  for name, rows in zip(names, scores, strict=True):
    wrong = np.flatnonzero(~np.isfinite(rows))
    if wrong.size:
      row = int(wrong[0])
      what = f"the score of row {row} of task {name!r} is {rows[row]}"
      raise ValueError(f"{label}: {what}; a metric must be finite.")


def _score(
  apply: batch.Apply, metric: losses.Rowwise, chunk: int, params: Any, rows: batch.TaskBatch
) -> Array:
  """Scores one model on the rows of one task, chunk by chunk: [N], zero for padded rows."""
  total = rows.labels.shape[0]
  size = min(chunk, total)
  starts = jnp.arange(-(-total // size), dtype=jnp.int32) * size

  def part(start: Array) -> Array:
    index = jnp.minimum(start + jnp.arange(size, dtype=jnp.int32), total - 1)

    def score() -> Array:
      inputs, labels = jax.tree.map(lambda x: x[index], (rows.inputs, rows.labels))
      out = batch.outputs(apply, params, inputs, rows.head, rows.classes)
      return metric(out.astype(jnp.float32), labels).astype(jnp.float32)

    return lax.cond(start < rows.filled, score, lambda: jnp.zeros(size, jnp.float32))

  scores = lax.map(part, starts).reshape(-1)[:total]
  return jnp.where(jnp.arange(total, dtype=jnp.int32) < rows.filled, scores, 0)
