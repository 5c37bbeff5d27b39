"""Four image tasks and a small network, pretrained on some of their rows."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxmerge.core import tree
from jaxmerge.experiments import problem
from jaxmerge.io.disk import atomic
from jaxmerge.io.tensors import safetensors
from jaxmerge.models import cnn
from jaxmerge.tasks import batch, images, losses
from jaxmerge.tasks.task import Task
from jaxmerge.training import schedule as schedules

# (shapes, how it is made) -> what was trained for the base: made, or what was saved of it.
Keep = Callable[[Any, Callable[[], Any]], Any]


def images4(config: Mapping[str, Any], keep: Keep) -> problem.Problem:
  """Four image tasks and a small CNN that has been pretrained, briefly, on a few rows of each.

  The heads are trained with the base and frozen after that.
  """
  tasks = images.load(config["seed"], **config["data"])
  settings = dict(config["pretrain"])
  like = {
    "params": jax.eval_shape(cnn.init, jax.random.key(0)),
    "heads": [jax.ShapeDtypeStruct((cnn.FEATURES, t.num_classes), np.float32) for t in tasks],
  }

  def trained() -> dict[str, Any]:
    params, own = pretrain(tasks, seed=config["seed"], **settings)
    return {"params": params, "heads": own}

  made = keep(like, trained)
  params, own = made["params"], map(np.asarray, made["heads"])
  tasks = tuple(dataclasses.replace(t, head=h) for t, h in zip(tasks, own, strict=True))

  def save(folder: pathlib.Path, params: Any, readme: str) -> None:
    leaves = {n: np.asarray(v) for n, v in tree.named(params).items()}
    own = {f"head/{t.name}": np.asarray(t.head) for t in tasks}
    with atomic.folder(folder, replace=True) as beside:
      safetensors.save(beside / "model.safetensors", leaves | own)
      (beside / "README.md").write_text(readme, encoding="utf-8")

  return problem.Problem(
    "Four image tasks, one small CNN",
    "a CNN of 0.12 M parameters, pretrained on a few rows of every task",
    cnn.apply,
    params,
    tasks,
    cnn.VIEWS,
    save,
    "apache-2.0",
  )


def pretrain(
  tasks: Sequence[Task], *, seed: int, rows: int, steps: int, learning_rate: float
) -> tuple[Any, list[np.ndarray]]:
  """Trains the CNN and one linear head a task jointly, on the first `rows` rows of each task."""
  few = [
    t.train._replace(inputs=t.train.inputs[:rows], labels=t.train.labels[:rows]) for t in tasks
  ]
  own = batch.stacked(
    [dataclasses.replace(t, train=s) for t, s in zip(tasks, few, strict=True)], "train"
  )
  own = jax.tree.map(jnp.asarray, own)
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

    rows = own._replace(head=None)
    return lax.map(lambda each: task(*each), (both[1], rows, index)).sum()

  @jax.jit
  def train(key: Any, index: Any) -> Any:
    both = (cnn.init(key), jnp.zeros((len(tasks), cnn.FEATURES, wide), jnp.float32))

    def step(carry: Any, index: Any) -> Any:
      both, state = carry
      updates, state = optimizer.update(jax.grad(loss)(both, index), state, both)
      return (optax.apply_updates(both, updates), state), None

    return lax.scan(step, (both, optimizer.init(both)), index)[0][0]

  params, made = train(jax.random.key(seed), index)
  return params, [np.asarray(made[i, :, : t.num_classes]) for i, t in enumerate(tasks)]
