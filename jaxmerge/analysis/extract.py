"""Extracts a PEFT adapter from a tuned model and its base, with one matrix in memory at a time.

Matrices become LoRA factors. All other modules, and by default embeddings and heads, are saved
whole (modules_to_save). Free of jax.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: a record is JSON.

import numpy as np

from jaxmerge.analysis import extract_plan, low_rank
from jaxmerge.analysis.extract_plan import Module
from jaxmerge.files import inputs
from jaxmerge.files.plan import Model
from jaxmerge.io.disk import atomic
from jaxmerge.io.huggingface import folder, hub
from jaxmerge.io.peft import adapter
from jaxmerge.io.tensors import pieces, safetensors
from jaxmerge.io.tensors.tensor import Files, Tensor, compute_dtype

Record = dict[str, Any]
Path = str | os.PathLike[str]

RECORD = "jaxmerge_extract.json"
_SPILL = ".factors"
_PREFIX = "base_model.model."


def extract_adapter(
  base: Path,
  model: Path,
  out: Path,
  *,
  rank: int | None = None,
  energy: float | None = None,
  embeddings: str = "save",
  rest: str = "save",
  biases: str = "save",
  include: Sequence[str] = (),
  exclude: Sequence[str] = (),
  save: Sequence[str] = (),
  dtype: str = "float32",
  replace: bool = False,
  download: bool = False,
  progress: Callable[[str, int], Callable[[int], None]] | None = None,
) -> Record:
  """Writes the difference of a model from its base as an adapter that PEFT loads.

  Args:
    base: the base: a folder, or any other model reference that `merge_files` takes.
    model: the tuned model, likewise.
    out: folder of the adapter.
    rank: rank of the factors, or less for a matrix of lower rank; 128 if neither this nor `energy`
      is set. With `energy`, the largest rank.
    energy: fraction of each matrix's squared singular values that its factors retain at least.
    embeddings: treatment of changed embeddings and output heads: "save", whole; "lora", as
      factors; "skip", left out.
    rest: treatment of changed norms and other tensors that are not matrices: "save" or "skip".
    biases: treatment of changed biases. If all matrices have one, PEFT adds them; otherwise "save"
      saves the module whole, and "skip" leaves the bias out.
    include: regular expressions: only modules whose name matches one of them; all by default.
    exclude: regular expressions of modules that are left out.
    save: modules that are saved whole, by their names or the last parts of these.
    dtype: dtype of the stored factors and modules.
    replace: whether an existing folder is replaced.
    download: whether models that are not in the hub's cache are downloaded.
    progress: (name, total bytes) -> function that is called with the bytes read.

  Returns:
    A record, which is also in `jaxmerge_extract.json`: `matrices`, by name with `rank`, `norm` of
    the change, and `error`, relative to it; `saved`, `unchanged` and `skipped`, names of modules,
    with a reason for each skipped one; `error` of all matrices, and `total_error` of all changes;
    `parameters` and `bytes` of the adapter.

  Raises:
    ValueError: naming the option, the file or the tensor that is wrong.
    FileExistsError: if `out` exists and `replace` is not set.
  """
  rule, stored = _rule(rank, energy), _dtype(dtype)
  choice = extract_plan.choice(embeddings, rest, biases, include, exclude, save)
  atomic.check_free(pathlib.Path(out), replace)
  files, find = Files(), hub.Finder(download=download)
  try:
    one, two = inputs.open_all([("the base", base), ("the model", model)], files, find)
    modules = extract_plan.plan(one, two, choice)
    count = (progress or _silent)("extracting", sum(m.size for m in modules))
    with atomic.folder(out, replace=replace) as beside:
      work = _Work(beside, rule, stored)
      for module in modules:
        work.add(module)
        count(module.size)
      record = work.write(two, modules, {"base": _text(base), "model": _text(model)})
  finally:
    files.close()
  return record


def _silent(name: str, size: int) -> Callable[[int], None]:
  return lambda count: None


def _text(reference: Path) -> str:
  return os.fspath(reference)


def _rule(rank: int | None, energy: float | None) -> low_rank.Rank:
  if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
    raise ValueError(f"rank must be a whole number from 1, got {rank!r}.")
  if energy is not None and not 0 < energy <= 1:
    raise ValueError(f"energy must be in (0, 1], got {energy!r}.")
  most = rank if rank is not None else 128 if energy is None else 2**31
  return low_rank.Rank(most, energy)


def _dtype(dtype: str) -> np.dtype:
  known = {d.name: d for d in safetensors.DTYPES.values() if d.itemsize in (2, 4)}
  names = ("float32", "bfloat16", "float16")
  if dtype not in names:
    raise ValueError(f"dtype must be one of {', '.join(names)}, got {dtype!r}.")
  return known[dtype]


class _Spilled(NamedTuple):
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int


class _Work:
  """The factors so far, in a temporary file, and the record of each module."""

  def __init__(self, directory: pathlib.Path, rule: low_rank.Rank, dtype: np.dtype):
    self.directory, self.rule, self.dtype = directory, rule, dtype
    self.matrices: dict[str, Record] = {}
    self.spilled: dict[str, _Spilled] = {}
    self.whole: dict[str, Tensor] = {}
    self.saved: list[str] = []
    self.unchanged: list[str] = []
    self.skipped: dict[str, str] = {}
    self.biased: set[str] = set()
    self._squares = [0.0, 0.0, 0.0]  # Of matrices, their residuals, and changes left out.

  def add(self, module: Module) -> None:
    """Reads a module, and adds it to the adapter as planned."""
    changes = {n: _squares(*pair) for n, pair in module.pairs.items()}
    added = {n for n, (base, _) in module.pairs.items() if base is None}
    if module.pairs and not any(changes.values()) and not added:
      self.unchanged.append(module.name)
    elif module.act == "skip":
      self.skipped[module.name] = module.reason
      self._squares[2] += sum(x for x in changes.values() if math.isfinite(x))
    elif module.act == "save" or (module.biases == "save" and changes.get(f"{module.name}.bias")):
      self.saved.append(module.name)
      self.whole |= {f"{_PREFIX}{n}": t for n, (_, t) in module.pairs.items()}
    else:
      self._factorize(module, changes)

  def _factorize(self, module: Module, changes: Mapping[str, float]) -> None:
    weight = f"{module.name}.weight"
    delta = _delta(*module.pairs[weight])
    delta = delta.T if module.transposed else delta
    factors = low_rank.truncate(delta, self.rule, self.dtype)
    squares, missed = low_rank.residual(delta, factors)
    self._squares[0] += squares
    self._squares[1] += missed
    parts = {"A": factors.a, "B": factors.b}
    # PEFT's names: factors of an embedding are parameters, without `.weight`.
    kind, end = ("lora_embedding", "") if module.is_embedding else ("lora", ".weight")
    for part, x in parts.items():
      self._spill(f"{_PREFIX}{module.name}.{kind}_{part}{end}", x)
    self.matrices[module.name] = {
      "rank": len(factors.a),
      "shape": list(module.pairs[weight][1].shape),
      "norm": math.sqrt(squares),
      "error": math.sqrt(missed / squares) if squares else 0.0,
    }
    bias = f"{module.name}.bias"
    if bias in module.pairs and module.biases == "skip" and changes[bias]:
      self.skipped[bias] = "a bias"
      self._squares[2] += changes[bias]
    elif bias in module.pairs and module.biases == "lora":
      self._spill(f"{_PREFIX}{module.name}.lora_B.bias", _delta(*module.pairs[bias]))
      self.biased |= {module.name} if changes[bias] else set()

  def _spill(self, name: str, x: np.ndarray) -> None:
    x = safetensors.narrow(np.ascontiguousarray(x), self.dtype, f"{name}")
    path = self.directory / _SPILL
    with atomic.room(path), open(path, "ab") as file:
      self.spilled[name] = _Spilled(x.dtype, x.shape, file.tell())
      file.write(x.reshape(-1).view(np.uint8).data)

  def write(self, model: Model, modules: Sequence[Module], names: Mapping[str, str]) -> Record:
    """Writes the adapter's files, and returns its record."""
    if not self.matrices and not self.saved:
      raise ValueError(f"{names['model']}: has no differences from {names['base']}.")
    if not self.biased:  # No bias has changed: leaves them out.
      self.spilled = {n: s for n, s in self.spilled.items() if not n.endswith(".lora_B.bias")}
    kinds = {n: (s.dtype, s.shape) for n, s in self.spilled.items()}
    kinds |= {n: (self.dtype, t.shape) for n, t in self.whole.items()}
    safetensors.write(
      self.directory / adapter.WEIGHTS, kinds, self._tensors(), metadata={"format": "pt"}
    )
    (self.directory / _SPILL).unlink(missing_ok=True)
    transposed = any(m.transposed and not m.is_embedding for m in modules)
    self._write_json(adapter.CONFIG, self._config(names["base"], model.config, transposed))
    record = self._record(names, kinds)
    self._write_json(RECORD, record)
    card = _CARD.format(**names, **{k: record[k] for k in ("error", "parameters")})
    (self.directory / folder.README).write_text(card, encoding="utf-8")
    return record

  def _tensors(self) -> Iterator[tuple[str, np.ndarray]]:
    with contextlib.ExitStack() as stack:
      if self.spilled:
        file = stack.enter_context(open(self.directory / _SPILL, "rb"))
      for name, place in self.spilled.items():
        file.seek(place.start)
        x = np.empty(place.shape, place.dtype)
        file.readinto(x.reshape(-1).view(np.uint8).data)
        yield name, x
    for name, tensor in self.whole.items():
      yield name, safetensors.narrow(pieces.load(tensor), self.dtype, tensor.where)

  def _config(self, base: str, config: Mapping[str, Any], transposed: bool) -> Record:
    """Returns adapter_config.json, with full names, which match no other module."""
    ranks = {name: matrix["rank"] for name, matrix in self.matrices.items()}
    most = max(ranks.values(), default=1)
    # PEFT also matches a pattern with the end of a name, and a dot with any character.
    other = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    return {
      "peft_type": "LORA",
      "base_model_name_or_path": base,
      "task_type": extract_plan.task_type(config),
      "r": most,
      "lora_alpha": most,
      "rank_pattern": other,
      "alpha_pattern": other,
      "target_modules": sorted(ranks),
      "modules_to_save": sorted(self.saved) or None,
      "lora_dropout": 0.0,
      "lora_bias": bool(self.biased),
      "bias": "none",
      "fan_in_fan_out": transposed,
      "use_rslora": False,
      "inference_mode": True,
    }

  def _record(self, names: Mapping[str, str], kinds: Mapping[str, Any]) -> Record:
    squares, missed, left = self._squares
    sizes = {n: math.prod(shape) for n, (_, shape) in kinds.items()}
    return {
      **names,
      "matrices": self.matrices,
      "saved": sorted(self.saved),
      "unchanged": sorted(self.unchanged),
      "skipped": dict(sorted(self.skipped.items())),
      "error": math.sqrt(missed / squares) if squares else 0.0,
      "total_error": math.sqrt((missed + left) / (squares + left)) if squares + left else 0.0,
      "parameters": sum(sizes.values()),
      "bytes": sum(sizes.values()) * self.dtype.itemsize,
    }

  def _write_json(self, name: str, value: Any) -> None:
    text = json.dumps(value, indent=1) + "\n"
    (self.directory / name).write_text(text, encoding="utf-8")


def _delta(base: Tensor | None, model: Tensor) -> np.ndarray:
  """Reads the difference of a model's tensor from the base's, in float32 or wider."""
  if base is None:
    return pieces.load(model, compute_dtype(model))
  dtype = compute_dtype(base, model)
  delta = pieces.load(model, dtype)
  flat = delta.reshape(-1)
  for start in range(0, flat.size, low_rank.BLOCK):
    part = flat[start : start + low_rank.BLOCK]
    values = np.empty(part.shape, base.dtype)
    base.read(start, values)
    part -= values.astype(dtype)
  if not np.isfinite(delta).all():
    raise ValueError(f"{model.where}, minus that of the base, has NaN or infinity.")
  return delta


def _squares(base: Tensor | None, model: Tensor) -> float:
  """Returns the sum of squares of a model's difference from a tensor, block by block."""
  if base is None or base.shape != model.shape:
    return math.inf
  total, size = 0.0, math.prod(model.shape)
  for start in range(0, size, low_rank.BLOCK):
    count = min(low_rank.BLOCK, size - start)
    x, y = np.empty(count, base.dtype), np.empty(count, model.dtype)
    base.read(start, x)
    model.read(start, y)
    with np.errstate(invalid="ignore"):
      total += float(np.sum((y.astype(np.float64) - x.astype(np.float64)) ** 2))
  if math.isnan(total):
    raise ValueError(f"{model.where}, minus that of the base, has NaN or infinity.")
  return total


_CARD = """\
---
library_name: peft
tags: [lora, jaxmerge]
---

# An adapter extracted from a tuned model

What {model} adds to {base}, as LoRA factors of PEFT. Their relative error is {error:.4f};
{parameters:,} parameters. `jaxmerge_extract.json` has the rank and the error of each matrix.
"""
