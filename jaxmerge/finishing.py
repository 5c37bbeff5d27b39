"""What is around the weights of a merge of files: its identity, config, card and provenance."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any  # Any: digests are plain JSON.

from jaxmerge import fingerprint, summarizing
from jaxmerge.io import checkpoint, folder, growing
from jaxmerge.planning import Plan
from jaxmerge.report import card


def identity(plan: Plan, shards: Mapping[str, Sequence[str]], out_format: str) -> str:
  """A digest of all that decides about the bytes of the result."""
  content = {
    "jaxmerge": importlib.metadata.version("jaxmerge"),
    "outputs": [[o.name, o.dtype.name, o.shape, o.job, o.precision] for o in plan.outputs],
    "sources": [[t.where for t in (o.base, *o.models) if t is not None] for o in plan.outputs],
    "jobs": [
      [j.words, j.models, fingerprint.fingerprint(j.numbers), j.seed, list(j.layout)]
      for j in plan.jobs
    ],
    "shards": shards,
    "format": out_format,
    "inputs": {str(path): _stamp(path) for path in sorted(plan.inputs)},
    "facts": plan.facts,
    "texts": plan.texts,
  }
  text = json.dumps(content, default=str, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_begun(plan: Plan, out: pathlib.Path, *, shard_size: int, out_format: str) -> None:
  """Raises ValueError where an interrupted merge of other inputs or settings lies beside `out`."""
  part = growing.part_of(out)
  if growing.journals(part):
    shards = folder.shards({o.name: o.size for o in plan.outputs}, shard_size)
    growing.noted(part, identity(plan, shards, out_format))


def _stamp(path: pathlib.Path) -> list[int]:
  status = path.stat()
  return [status.st_size, status.st_mtime_ns]


def transcribe(
  part: pathlib.Path, weights: growing.Growing, progress: Callable[[int], None]
) -> None:
  """Makes a checkpoint of the shards."""
  tensors = {name: weights.tensor(name) for name in weights.places}
  checkpoint.write(part, tensors, progress)


def complete(
  part: pathlib.Path,
  plan: Plan,
  shards: Mapping[str, list[str]],
  identity: str,
  digests: Mapping[str, Any],
  out_format: str,
) -> None:
  """Adds to the weights what makes a folder of them that other tools open; removes the rest."""
  passing = [path.name for path in growing.journals(part)]
  passing += [] if out_format == "safetensors" else shards
  if len(shards) > 1 and out_format == "safetensors":
    text = folder.index(shards, {o.name: o.size for o in plan.outputs})
    (part / folder.INDEX).write_text(text, encoding="utf-8")
  for path in folder.copied(plan.donor):
    target = part / path.relative_to(plan.donor)
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, target)
  text = card.merge_card(summarizing.summary(plan))
  (part / folder.README).write_text(text, encoding="utf-8")
  for name, own in plan.texts.items():
    (part / name).unlink(missing_ok=True)
    if own is not None:
      (part / name).write_text(own, encoding="utf-8")
  facts = {
    "plan": identity,
    "jaxmerge": importlib.metadata.version("jaxmerge"),
    "jax": importlib.metadata.version("jax"),
    **plan.facts,
    "jobs": [{"method": j.words, "models": j.models, "seed": j.seed} for j in plan.jobs],
    "tensors": {o.name: digests[o.name] for o in plan.outputs},
    "inputs": plan.fates,
  }
  (part / folder.PROVENANCE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
  for name in passing:
    (part / name).unlink()
