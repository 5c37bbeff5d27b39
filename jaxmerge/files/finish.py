"""Completes a result's folder: config, card and provenance next to the weights."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxmerge.core import fingerprint
from jaxmerge.files import describe, out_formats, outcomes
from jaxmerge.files.plan import Job, Plan
from jaxmerge.io.checkpoints import like, metadata
from jaxmerge.io.disk import atomic, stamps
from jaxmerge.io.huggingface import folder, pipeline, shard_writer
from jaxmerge.report import card


def write_checkpoint(
  directory: pathlib.Path,
  plan: Plan,
  weights: shard_writer.ShardWriter,
  out_format: str,
  progress: Callable[[int], None],
) -> None:
  """Writes the tensors of the shards as a checkpoint, of our own or in the layout of the base."""
  tensors = {name: weights.tensor(name) for name in weights.places}
  with atomic.room(directory / metadata.STATE):
    if out_format == out_formats.LIKE_BASE and plan.orbax is not None:
      like.write(directory, plan.orbax, tensors, progress)
    else:
      metadata.write(directory, tensors, progress)


def complete(
  directory: pathlib.Path,
  plan: Plan,
  shards: Mapping[str, list[str]],
  identity: str,
  digests: Mapping[str, Any],
  out_format: str,
) -> None:
  """Adds index, config, tokenizer, card and provenance to the weights, and removes the journals."""
  if folder.WEIGHTS not in shards and out_format == "safetensors":
    sizes = {o.name: o.size for o in plan.outputs}
    parts = pipeline.is_pipeline(plan.donor)
    index = {} if parts else {folder.INDEX: folder.index(shards, sizes)}
    for name, content in (pipeline.indices(shards, sizes) if parts else index).items():
      _write(directory / name, content)
  for path in _files_of_donor(plan):
    target = directory / path.relative_to(plan.donor)
    with atomic.room(target):
      target.parent.mkdir(exist_ok=True)
      shutil.copyfile(path, target)
  _write(directory / folder.README, card.merge_card(describe.summary(plan)))
  for name, text in plan.texts.items():
    (directory / name).unlink(missing_ok=True)
    if text is not None:
      _write(directory / name, text)
  stamps.check(plan.stamps)  # After the last read, and before the result counts as complete.
  facts = {
    "plan": identity,
    "jaxmerge": importlib.metadata.version("jaxmerge"),
    "jax": importlib.metadata.version("jax"),
    **plan.facts,
    **({"notes": plan.notes} if plan.notes else {}),
    "counts": outcomes.counts(plan),
    "jobs": [_job(plan, number) for number in range(len(plan.jobs))],
    "tensors": {
      o.name: digests[o.name] | ({} if o.job is None else {"job": o.job + 1}) for o in plan.outputs
    },
    "inputs": outcomes.texts(plan),
  }
  with atomic.write(directory / folder.PROVENANCE) as file:
    file.write(json.dumps(facts, indent=1, default=str).encode() + b"\n")
  shard_writer.strip(directory, shards, out_format)


def _state(plan: Plan, out_format: str) -> str:
  """Returns the folder in the result in which a checkpoint has its arrays."""
  if out_format != out_formats.LIKE_BASE or plan.orbax is None:
    return metadata.STATE
  return plan.orbax.inner or "."


def names(plan: Plan, shard_size: int, out_format: str) -> list[str]:
  """Returns the names of the files that a result will have, without those of an evaluation."""
  shards = plan.shards(shard_size)
  weights = list(shards) if out_format == "safetensors" else [f"{_state(plan, out_format)}/..."]
  sizes = {o.name: o.size for o in plan.outputs}
  if out_format == "safetensors" and pipeline.is_pipeline(plan.donor):
    weights += pipeline.indices(shards, sizes)
  elif out_format == "safetensors" and folder.WEIGHTS not in shards:
    weights.append(folder.INDEX)
  copied = [str(path.relative_to(plan.donor)) for path in _files_of_donor(plan)]
  texts = {name for name, text in plan.texts.items() if text is not None}
  dropped = plan.texts.keys() - texts
  every = {*weights, *copied, *texts, folder.README, folder.PROVENANCE} - dropped
  return sorted(every)


def _files_of_donor(plan: Plan) -> list[pathlib.Path]:
  """Returns the donor's files to copy: those that existed when it was opened.

  If the donor's small files were not stamped, as in a checkpoint, these are all its files.
  """
  if pipeline.is_pipeline(plan.donor):
    return pipeline.small_files(plan.donor)
  paths = folder.files_to_copy(plan.donor)
  is_stamped = plan.donor / folder.CONFIG in plan.stamps
  return [path for path in paths if path in plan.stamps] if is_stamped else paths


def _write(path: pathlib.Path, text: str | bytes) -> None:
  with atomic.room(path):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def _job(plan: Plan, number: int) -> dict[str, Any]:
  """Returns the record of a job in the provenance; jobs are numbered from 1."""
  job = plan.jobs[number]
  return {
    "job": number + 1,
    "method": job.spec,
    **({"recipe": job.recipe} if job.recipe else {}),
    "numbers": _hparams(job),
    "models": job.models,
    **({"weights": weights} if (weights := describe.checkpoint_weights(job)) else {}),
    "seed": job.seed,
    "layout": job.layout.plain(),
    "tensors": sum(o.job == number for o in plan.outputs),
  }


def _hparams(job: Job) -> dict[str, Any]:
  """Returns the method's hyperparameters: the job's, for all tensors or for each, over defaults."""
  from jaxmerge.core import stage  # Imports jax, which a dry run does not need.

  hparams = {**stage.hparams(job.method()), **job.hparams}
  return {name: _plain(x, len(job.models)) for name, x in hparams.items() if name != "seed"}


def _plain(value: Any, most: int) -> Any:
  """Returns a hyperparameter as plain JSON; an array of more values than `most` as a digest."""
  if value is None or isinstance(value, bool | int | float | str):
    return value
  if isinstance(value, Mapping):
    return {name: _plain(inner, most) for name, inner in value.items()}
  array = np.asarray(value)
  if array.size <= most:
    return array.tolist()
  return {"shape": list(array.shape), "fingerprint": fingerprint.fingerprint(array)}
