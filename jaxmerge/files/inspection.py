"""What is in a folder of weights: tensors, totals, ties, provenance, as plain records.

Headers say most of it; only checksums read the weights. Free of jax.
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

PART = 2**22  # Bytes that are read at a time.


def inspect(path: str | os.PathLike[str]) -> Record:
  """Describes a model, a merged model, a checkpoint or a PEFT adapter, from headers and manifests.

  Returns:
    `folder`, of a run that of its newest step; `kind`, "model", "checkpoint" or "adapter"; `files`
    (name, bytes); `tensors` (name, dtype, shape, bytes, file), 2 before 10; `dtypes`, their totals;
    `parameters`, entries of floating-point tensors; `tied`, tie_word_embeddings of config.json,
    None where it is silent; `shared`, names of tensors that are not stored to the names that hold
    their bytes, as the files say; `adapter`, the adapter's config, and `provenance`, all but the
    checksums, where there are such files.

  Raises:
    FileNotFoundError: where the folder or its weights are missing.
    ValueError: naming the file that is damaged, and the tensor.
  """
  own = formats.open_weights(path, Files())
  path = own.folder
  tensors = [
    {
      "name": name,
      "dtype": tensor.dtype.name,
      "shape": list(tensor.shape),
      "bytes": math.prod(tensor.shape) * tensor.dtype.itemsize,
      "file": str(own.homes[name].relative_to(path)),
    }
    for name, tensor in sorted(own.tensors.items(), key=lambda item: _natural(item[0]))
  ]
  floating = (t for t in own.tensors.values() if safetensors.is_floating(t.dtype))
  names = ((str(file.relative_to(path)), file.stat().st_size) for file in own.files)
  record = {
    "folder": str(path),
    "kind": own.kind,
    "files": [{"name": name, "bytes": size} for name, size in names],
    "tensors": tensors,
    "dtypes": _totals(tensors),
    "parameters": sum(math.prod(t.shape) for t in floating),
    "tied": _tied(path),
    "shared": {} if own.kind == "checkpoint" else _shared(own.files, own.tensors),
  }
  if own.kind == "adapter":
    record["adapter"] = folder.read_json(path / adapter.CONFIG)
  if (path / folder.PROVENANCE).is_file():
    record["provenance"], _ = _provenance(path)
  return record


def add_checksums(record: Record, progress: Callable[[int], None] = lambda count: None) -> Record:
  """Reads the weights once: adds `xxh3_128` to each tensor, and `equal`, lists of names.

  Args:
    record: of `inspect`.
    progress: called with the number of bytes that were read.
  """
  files = Files()
  try:
    own = formats.open_weights(record["folder"], files).tensors
    digests = {name: _digest(own[name], progress) for name in _names(record)}
  finally:
    files.close()
  tensors = [{**tensor, "xxh3_128": digests[tensor["name"]]} for tensor in record["tensors"]]
  groups: dict[Any, list[str]] = {}
  for tensor in tensors:
    # Without entries all are equal, and nothing is tied.
    if tensor["bytes"]:
      kind = tensor["dtype"], tuple(tensor["shape"]), tensor["xxh3_128"]
      groups.setdefault(kind, []).append(tensor["name"])
  return {**record, "tensors": tensors, "equal": [g for g in groups.values() if len(g) > 1]}


def compare_checksums(
  record: Record, progress: Callable[[int], None] = lambda count: None
) -> Record:
  """Reads the weights, and adds `check`: how they compare with the checksums of the provenance.

  It has the number of tensors that are the `same`, and the names of those that are `changed`,
  `missing` (recorded, not there) and `added`.

  Raises:
    FileNotFoundError: where there is no provenance.
    ValueError: where it has no checksums.
  """
  _, recorded = _provenance(pathlib.Path(record["folder"]))
  record = add_checksums(record, progress)
  found = {tensor["name"]: tensor["xxh3_128"] for tensor in record["tensors"]}
  both = found.keys() & recorded.keys()
  check = {
    "same": sum(found[name] == recorded[name] for name in both),
    "changed": sorted((n for n in both if found[n] != recorded[n]), key=_natural),
    "missing": sorted(recorded.keys() - found.keys(), key=_natural),
    "added": sorted(found.keys() - recorded.keys(), key=_natural),
  }
  return {**record, "check": check}


def _names(record: Record) -> list[str]:
  return [tensor["name"] for tensor in record["tensors"]]


def _natural(name: str) -> list[Any]:
  return [int(x) if x.isdigit() else x for x in re.split(r"([0-9]+)", name)]


def _totals(tensors: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
  totals: dict[str, dict[str, int]] = {}
  for tensor in tensors:
    own = totals.setdefault(tensor["dtype"], {"tensors": 0, "entries": 0, "bytes": 0})
    own["tensors"] += 1
    own["entries"] += math.prod(tensor["shape"])
    own["bytes"] += tensor["bytes"]
  return totals


def _tied(path: pathlib.Path) -> bool | None:
  """What the config says of tied weights; models of several parts say it of the text part."""
  if not (path / folder.CONFIG).is_file():
    return None
  config = folder.config(path)
  inner = config.get("text_config")
  both = [config, inner if isinstance(inner, dict) else {}]
  return next((c["tie_word_embeddings"] for c in both if "tie_word_embeddings" in c), None)


def _shared(files: Iterable[pathlib.Path], names: Mapping[str, Any]) -> dict[str, str]:
  """Tensors that share the bytes of others: safetensors stores one, and names it for the rest."""
  noted = (item for file in files for item in safetensors.header(file).metadata.items())
  return {name: held for name, held in noted if held in names and name not in names}


def _digest(tensor: Tensor, progress: Callable[[int], None]) -> str:
  found, size = xxhash.xxh3_128(), math.prod(tensor.shape)
  for start in range(0, size, step := PART // tensor.dtype.itemsize):
    part = np.empty(min(step, size - start), tensor.dtype)
    tensor.read(start, part)
    found.update(part.view(np.uint8).data)
    progress(part.nbytes)
  return found.hexdigest()


def _provenance(path: pathlib.Path) -> tuple[Record, dict[str, str]]:
  """What a merged model says about itself, and the checksums of its tensors."""
  file = path / folder.PROVENANCE
  if not file.is_file():
    raise FileNotFoundError(f"{file}: no such file; only what jaxmerge merged can be checked.")
  content = folder.provenance(path)
  tensors = content.pop("tensors", None)
  try:
    return content, {name: entry["xxh3_128"] for name, entry in tensors.items()}
  except (AttributeError, TypeError, KeyError) as error:
    raise ValueError(f"{file}: tensors must map names to xxh3_128; it is damaged.") from error
