"""Six domains of text and a small decoder."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.evaluation import metrics
from jaxmerge.experiments import problem
from jaxmerge.models import llama
from jaxmerge.tasks import domains
from jaxmerge.tasks.task import Task
from jaxmerge.training import joint
from jaxmerge.training.settings import Settings

# (shapes, how it is made) -> what was trained for the base: made, or what was saved of it.
Keep = Callable[[Any, Callable[[], Any]], Any]


def domains6(config: Mapping[str, Any], keep: Keep) -> problem.Problem:
  """Six domains of bytes and a decoder that has been trained on some rows of each, mixed."""
  own, apply = llama.of_fields(config["model"], jnp.dtype(config["compute_dtype"]))
  sizes = dict(config["data"])
  found = domains.load(sizes.pop("domains"), seed=config["seed"], **sizes)
  mixed = jax.tree.map(lambda *xs: np.concatenate(xs), *[d.pretrain for d in found])
  settings = Settings(schedule="cosine", clip_norm=1.0, seed=config["seed"], **config["pretrain"])
  start = functools.partial(llama.init, own, jax.random.key(config["seed"]))
  mixture = Task("mixture", mixed, found[0].task.validation)

  def trained() -> Any:
    return joint.joint(apply, start(), [mixture], settings, mixed=False)[0]

  params = keep(jax.eval_shape(start), trained)

  def save(folder: pathlib.Path, params: Any, readme: str) -> None:
    length = sizes["length"]
    llama.export(folder, own, params, max_positions=length, readme=readme, replace=True)

  million = sum(x.size for x in jax.tree.leaves(params)) / 1e6
  return problem.Problem(
    f"{len(found)} domains of text, a byte-level decoder",
    f"a decoder of bytes with {million:.1f} M parameters, trained on some rows of every domain",
    apply,
    params,
    tuple(d.task for d in found),
    llama.VIEWS,
    save,
    "apache-2.0",
    metric=metrics.BITS_PER_BYTE,
    sharding=llama.SHARDING,
  )
