"""Four image tasks and a small CNN, pretrained on some of their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxmerge.experiments.problem import Problem
from jaxmerge.experiments.registry import Cache
from jaxmerge.models import cnn
from jaxmerge.tasks import batch, images, losses
from jaxmerge.tasks.task import Task
from jaxmerge.training import schedule as schedules


def problem(config: Mapping[str, Any], cache: Cache) -> Problem:
  """Returns four image tasks and a small CNN, pretrained briefly on a few rows of each.

  The heads are trained with the base, then frozen.
  """
  tasks = images.load(config["seed"], **config["data"])
  like = {
    "params": jax.eval_shape(cnn.init, jax.random.key(0)),
    "heads": [jax.ShapeDtypeStruct((cnn.FEATURES, t.num_classes), np.float32) for t in tasks],
  }

  def train() -> dict[str, Any]:
    params, heads = pretrain(tasks, seed=config["seed"], **config["pretrain"])
    return {"params": params, "heads": heads}

  base = cache(like, train)
  heads = map(np.asarray, base["heads"])
  return Problem(
    apply=cnn.apply,
    params=base["params"],
    tasks=[dataclasses.replace(t, head=h) for t, h in zip(tasks, heads, strict=True)],
    layout=cnn.VIEWS,
    title="Four image tasks, one small CNN",
    base="a CNN of 0.12 M parameters, pretrained on a few rows of every task",
    license="apache-2.0",
  )


def pretrain(
  tasks: Sequence[Task], *, seed: int, rows: int, steps: int, learning_rate: float
) -> tuple[Any, list[np.ndarray]]:
  """Trains the CNN and one linear head per task jointly, on the first `rows` rows of each."""
  few = [
    t.train._replace(inputs=t.train.inputs[:rows], labels=t.train.labels[:rows]) for t in tasks
  ]
  stacked = batch.stack(
    [dataclasses.replace(t, train=s) for t, s in zip(tasks, few, strict=True)], "train"
  )
  stacked = jax.tree.map(jnp.asarray, stacked)
  wide = max(t.num_classes for t in tasks)
  schedule = optax.cosine_decay_schedule(learning_rate, steps)
  optimizer = optax.adamw(schedule, weight_decay=0.05)
  counts = [len(s.labels) for s in few]
  streams = [
    schedules.stream(t.name, n, seed, 0, steps * 32) for t, n in zip(tasks, counts, strict=True)
  ]
  index = np.stack(streams).reshape(len(tasks), steps, 32).swapaxes(0, 1)

  def loss(both: Any, index: Any) -> Any:
    def task(head: Any, rows: Any, index: Any) -> Any:
      out = batch.outputs(cnn.apply, both[0], rows.inputs[index], head, rows.classes)
      return losses.cross_entropy(out, rows.labels[index]).mean()

    rows = stacked._replace(head=None)
    return lax.map(lambda each: task(*each), (both[1], rows, index)).sum()

  @jax.jit
  def train(key: Any, index: Any) -> Any:
    both = (cnn.init(key), jnp.zeros((len(tasks), cnn.FEATURES, wide), jnp.float32))

    def step(carry: Any, index: Any) -> Any:
      both, state = carry
      updates, state = optimizer.update(jax.grad(loss)(both, index), state, both)
      return (optax.apply_updates(both, updates), state), None

    return lax.scan(step, (both, optimizer.init(both)), index)[0][0]

  params, heads = train(jax.random.key(seed), index)
  return params, [np.asarray(heads[i, :, : t.num_classes]) for i, t in enumerate(tasks)]
