"""Eight text tasks and a sentence encoder."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.experiments import problem
from jaxmerge.models import bert
from jaxmerge.tasks import heads, text

# (shapes, how it is made) -> what was trained for the base: made, or what was saved of it.
Keep = Callable[[Any, Callable[[], Any]], Any]


def minilm8(config: Mapping[str, Any], keep: Keep) -> problem.Problem:
  """Eight text tasks and the real all-MiniLM-L6-v2 encoder, with frozen zero-shot heads."""
  settings = dict(config["model"])
  own, params, folder = bert.minilm(settings["folder"] or None)
  tokenizer, length = bert.tokenizer(folder), settings["length"]
  sizes = dict(config["data"])
  embed = jax.jit(lambda ids, mask: bert.embed(own, params, ids, mask))
  read = text.load(sizes.pop("tasks", None) or None, seed=config["seed"], **sizes)
  prompts = [text.tokens(task.prompts, tokenizer, length) for task in read]
  shapes = [jax.eval_shape(embed, *own).shape[::-1] for own in prompts]
  made = keep(
    {"heads": [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]},
    lambda: {"heads": [heads.zero_shot(embed, *p, scale=settings["head_scale"]) for p in prompts]},
  )
  tasks = [
    text.encode(task, tokenizer, length, np.asarray(head))
    for task, head in zip(read, made["heads"], strict=True)
  ]

  def save(target: pathlib.Path, params: Any, readme: str) -> None:
    bert.save(target, own, params, source=folder, readme=readme, replace=True)

  return problem.Problem(
    f"{len(tasks)} text tasks, all-MiniLM-L6-v2",
    "sentence-transformers/all-MiniLM-L6-v2",
    bert.apply(own, jnp.dtype(config["compute_dtype"])),
    params,
    tuple(tasks),
    bert.VIEWS,
    save,
    "apache-2.0",
  )
