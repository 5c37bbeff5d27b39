"""Inspects a folder of weights: tensors, totals, ties, provenance, as plain records.

Most of it comes from headers; only checksums read the weights. Does not import jax.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any  # A record is JSON, its values have no one type.

import numpy as np
import xxhash

from jaxmerge.io import formats
from jaxmerge.io.huggingface import folder
from jaxmerge.io.peft import adapter
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Files, Tensor

Record = dict[str, Any]

PART = 2**22  # Bytes read at a time.


def inspect(path: str | os.PathLike[str]) -> Record:
  """Describes a model, a merged model, a checkpoint or a PEFT adapter, from headers and manifests.

  Returns:
    `folder`, of a run that of its newest step; `kind`, "model", "checkpoint", "flax", "pipeline" or
    "adapter"; `files` (name, bytes); `tensors` (name, dtype, shape, bytes, file), 2 before 10;
    `dtypes`, their totals; `parameters`, entries of floating tensors; `tied`, tie_word_embeddings
    of config.json, None where it is silent; `shared`, tensors that are not stored to those with
    their bytes, by the files' metadata; `adapter`, the adapter's config, and `provenance`, all but
    the checksums, where there are such files.

  Raises:
    FileNotFoundError: where the folder or its weights are missing.
    ValueError: naming the file that is damaged, and the tensor.
  """
  weights = formats.open_weights(path, Files())
  path = weights.folder
  tensors = [
    {
      "name": name,
      "dtype": tensor.dtype.name,
      "shape": list(tensor.shape),
      "bytes": math.prod(tensor.shape) * tensor.dtype.itemsize,
      "file": _inside(weights.homes[name], path),
    }
    for name, tensor in sorted(weights.tensors.items(), key=lambda item: _natural(item[0]))
  ]
  floating = (t for t in weights.tensors.values() if safetensors.is_floating(t.dtype))
  is_safetensors = weights.kind in ("model", "adapter")
  names = ((_inside(file, path), file.stat().st_size) for file in weights.files)
  record = {
    "folder": str(path),
    "kind": weights.kind,
    "files": [{"name": name, "bytes": size} for name, size in names],
    "tensors": tensors,
    "dtypes": _totals(tensors),
    "parameters": sum(math.prod(t.shape) for t in floating),
    "tied": _tie_flag(path),
    "shared": _shared_bytes(weights.files, weights.tensors) if is_safetensors else {},
  }
  if weights.orbax is not None:
    record["reference"] = weights.orbax.reference
  if weights.kind == "adapter":
    record["adapter"] = folder.read_json(path / adapter.CONFIG)
  if folder.provenance_file(path).is_file():
    record["provenance"], _ = _provenance(path)
  return record


def _inside(file: pathlib.Path, path: pathlib.Path) -> str:
  """Returns the name of a file in a folder; a raw file is the whole model."""
  return file.name if file == path else str(file.relative_to(path))


def add_checksums(record: Record, progress: Callable[[int], None] = lambda count: None) -> Record:
  """Reads the weights once: adds `xxh3_128` to each tensor, and `equal`, lists of names.

  Args:
    record: of `inspect`.
    progress: called with the number of bytes that were read.
  """
  files = Files()
  try:
    where = record["reference"] if "reference" in record else record["folder"]
    tensors = formats.open_weights(where, files).tensors
    digests = {t["name"]: _digest(tensors[t["name"]], progress) for t in record["tensors"]}
  finally:
    files.close()
  entries = [{**entry, "xxh3_128": digests[entry["name"]]} for entry in record["tensors"]]
  groups: dict[Any, list[str]] = {}
  for entry in entries:
    # Empty tensors are all equal, but not tied.
    if entry["bytes"]:
      kind = entry["dtype"], tuple(entry["shape"]), entry["xxh3_128"]
      groups.setdefault(kind, []).append(entry["name"])
  return {**record, "tensors": entries, "equal": [g for g in groups.values() if len(g) > 1]}


def compare_checksums(
  record: Record, progress: Callable[[int], None] = lambda count: None
) -> Record:
  """Reads the weights, and adds `check`: how they compare with the checksums of the provenance.

  It has the number of tensors that are the `same`, and the names of tensors that are `changed`,
  `missing` (recorded, but absent) and `added`.

  Raises:
    FileNotFoundError: if there is no provenance.
    ValueError: if the provenance has no checksums.
  """
  _, recorded = _provenance(pathlib.Path(record["folder"]))
  record = add_checksums(record, progress)
  digests = {tensor["name"]: tensor["xxh3_128"] for tensor in record["tensors"]}
  both = digests.keys() & recorded.keys()
  check = {
    "same": sum(digests[name] == recorded[name] for name in both),
    "changed": sorted((n for n in both if digests[n] != recorded[n]), key=_natural),
    "missing": sorted(recorded.keys() - digests.keys(), key=_natural),
    "added": sorted(digests.keys() - recorded.keys(), key=_natural),
  }
  return {**record, "check": check}


def _natural(name: str) -> list[Any]:
  return [int(x) if x.isdigit() else x for x in re.split(r"([0-9]+)", name)]


def _totals(tensors: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
  totals: dict[str, dict[str, int]] = {}
  for tensor in tensors:
    total = totals.setdefault(tensor["dtype"], {"tensors": 0, "entries": 0, "bytes": 0})
    total["tensors"] += 1
    total["entries"] += math.prod(tensor["shape"])
    total["bytes"] += tensor["bytes"]
  return totals


def _tie_flag(path: pathlib.Path) -> bool | None:
  """Returns the config's flag for tied weights, from the text part if there are several parts."""
  if not (path / folder.CONFIG).is_file():
    return None
  config = folder.config(path)
  inner = config.get("text_config")
  both = [config, inner if isinstance(inner, dict) else {}]
  return next((c["tie_word_embeddings"] for c in both if "tie_word_embeddings" in c), None)


def _shared_bytes(files: Iterable[pathlib.Path], names: Mapping[str, Any]) -> dict[str, str]:
  """Maps tensors that safetensors does not store, because another has their bytes, to that one."""
  pairs = (item for file in files for item in safetensors.header(file).metadata.items())
  return {name: stored for name, stored in pairs if stored in names and name not in names}


def _digest(tensor: Tensor, progress: Callable[[int], None]) -> str:
  hasher, size = xxhash.xxh3_128(), math.prod(tensor.shape)
  for start in range(0, size, step := PART // tensor.dtype.itemsize):
    part = np.empty(min(step, size - start), tensor.dtype)
    tensor.read(start, part)
    hasher.update(part.view(np.uint8).data)
    progress(part.nbytes)
  return hasher.hexdigest()


def _provenance(path: pathlib.Path) -> tuple[Record, dict[str, str]]:
  """Returns the provenance of a merged model, and the checksums of its tensors."""
  file = folder.provenance_file(path)
  if not file.is_file():
    raise FileNotFoundError(f"{file}: no such file; only what jaxmerge merged can be checked.")
  content = folder.provenance(path)
  tensors = content.pop("tensors", None)
  try:
    return content, {name: entry["xxh3_128"] for name, entry in tensors.items()}
  except (AttributeError, TypeError, KeyError) as error:
    raise ValueError(f"{file}: tensors must map names to xxh3_128; it is damaged.") from error
