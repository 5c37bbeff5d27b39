"""Eight text tasks and a sentence encoder."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.experiments.problem import Problem, split_shapes
from jaxmerge.experiments.registry import Cache
from jaxmerge.models import bert, encoder
from jaxmerge.tasks import heads, text
from jaxmerge.tasks.task import Task

# all-MiniLM-L6-v2, by its config.json.
MINILM = encoder.Config(30522, 384, 6, 12, 1536, 512)


def problem(config: Mapping[str, Any], cache: Cache) -> Problem:
  """Returns eight text tasks and the real all-MiniLM-L6-v2, with frozen zero-shot heads."""
  settings = config["model"]
  fields, params, folder = bert.minilm(settings["folder"] or None)
  tokenizer, length = bert.tokenizer(folder), settings["length"]
  sizes = dict(config["data"])
  texts = text.load(sizes.pop("tasks", None) or None, seed=config["seed"], **sizes)
  task_heads = _zero_shot_heads(texts, fields, params, tokenizer, settings, cache)

  def save(target: pathlib.Path, params: Any, readme: str) -> None:
    bert.save(target, fields, params, source=folder, readme=readme, replace=True)

  return Problem(
    apply=bert.apply(fields, jnp.dtype(config["compute_dtype"])),
    params=params,
    tasks=[text.encode(t, tokenizer, length, h) for t, h in zip(texts, task_heads, strict=True)],
    layout=bert.VIEWS,
    title=f"{len(texts)} text tasks, all-MiniLM-L6-v2",
    base="sentence-transformers/all-MiniLM-L6-v2",
    license="apache-2.0",
    save=save,
  )


def _zero_shot_heads(
  texts: Sequence[Any],
  fields: encoder.Config,
  params: Any,
  tokenizer: Any,
  settings: Mapping[str, Any],
  cache: Cache,
) -> list[np.ndarray]:
  """Returns each task's head, from embeddings of its prompts or from the checkpoint."""
  embed = jax.jit(lambda ids, mask: bert.embed(fields, params, ids, mask))
  prompts = [text.tokens(task.prompts, tokenizer, settings["length"]) for task in texts]
  shapes = [jax.eval_shape(embed, *tokens).shape[::-1] for tokens in prompts]
  scale = settings["head_scale"]
  cached = cache(
    {"heads": [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]},
    lambda: {"heads": [heads.zero_shot(embed, *tokens, scale=scale) for tokens in prompts]},
  )
  return [np.asarray(head) for head in cached["heads"]]


def problem_shapes(config: Mapping[str, Any]) -> Problem:
  """Returns the shapes of `problem`, without weights and without reading texts."""
  data = dict(config["data"])
  names = data.get("tasks") or text.NAMES
  ids = jax.ShapeDtypeStruct((config["model"]["length"],), jnp.int32)
  tasks = []
  for name in names:
    head = jax.ShapeDtypeStruct((MINILM.hidden_size, len(text.classes(name))), jnp.float32)
    count = min(data.get("train") or text.TRAIN[name], text.TRAIN[name])
    split = split_shapes(count, {"ids": ids, "mask": ids})
    tasks.append(Task(name, split, split, head=head))
  return Problem(
    apply=bert.apply(MINILM, jnp.dtype(config["compute_dtype"])),
    params=jax.eval_shape(lambda: bert.init(MINILM, jax.random.key(0))),
    tasks=tasks,
    layout=bert.VIEWS,
  )
