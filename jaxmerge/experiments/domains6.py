"""Six domains of text and a small decoder."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.evaluation import metrics
from jaxmerge.experiments import decoder
from jaxmerge.experiments.problem import Problem
from jaxmerge.experiments.registry import Cache
from jaxmerge.models import llama
from jaxmerge.tasks import domains
from jaxmerge.tasks.task import Task
from jaxmerge.training import joint
from jaxmerge.training.settings import Settings

# For compilation; no texts are read.
problem_shapes = decoder.problem


def problem(config: Mapping[str, Any], cache: Cache) -> Problem:
  """Returns six domains of text and a byte-level decoder, pretrained on a mixture of them."""
  fields, apply = llama.from_fields(config["model"], jnp.dtype(config["compute_dtype"]))
  sizes = dict(config["data"])
  loaded = domains.load(sizes.pop("domains"), seed=config["seed"], **sizes)
  rows = jax.tree.map(lambda *xs: np.concatenate(xs), *[d.pretrain for d in loaded])
  mixture = Task("mixture", rows, loaded[0].task.validation)
  settings = Settings(schedule="cosine", clip_norm=1.0, seed=config["seed"], **config["pretrain"])
  start = functools.partial(llama.init, fields, jax.random.key(config["seed"]))

  def train() -> Any:
    return joint.train(apply, start(), [mixture], settings, mixed=False)[0]

  def save(folder: pathlib.Path, params: Any, readme: str) -> None:
    length = sizes["length"]
    llama.export(folder, fields, params, max_positions=length, readme=readme, replace=True)

  params = cache(jax.eval_shape(start), train)
  seen = "trained on some rows of every domain"
  million = sum(x.size for x in jax.tree.leaves(params)) / 1e6
  return Problem(
    apply=apply,
    params=params,
    tasks=[d.task for d in loaded],
    metric=metrics.BITS_PER_BYTE,
    layout=llama.VIEWS,
    sharding=llama.SHARDING,
    title=f"{len(loaded)} domains of text, a byte-level decoder",
    base=f"a decoder of bytes with {million:.1f} M parameters, {seen}",
    license="apache-2.0",
    save=save,
  )
