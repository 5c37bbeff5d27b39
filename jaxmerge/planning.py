"""What a merge of files will do: plain records made from headers, free of jax."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple  # Any: a method, which only a driver looks into.

import numpy as np

from jaxmerge.io import folder, safetensors
from jaxmerge.io.tensor import Files, Tensor, stored


class Model(NamedTuple):
  """A model on disk.

  Attributes:
    name: as the user calls it; random masks depend on it.
    folder: where it lies.
    tensors: its tensors by name.
    files: of its weights.
  """

  name: str
  folder: pathlib.Path
  tensors: Mapping[str, Tensor]
  files: tuple[pathlib.Path, ...]


class Job(NamedTuple):
  """Tensors that one method merges: statistics over the tree are over these.

  Attributes:
    method: () -> the method; called when there is work to do.
    models: names of the models.
    numbers: the method's numbers by name: for all, or by tensor.
    seed: for random masks.
    layout: matrix views.
  """

  method: Callable[[], Any]
  models: tuple[str, ...]
  numbers: Mapping[str, Any] = {}
  seed: int | None = None
  layout: Sequence[tuple[str, str]] = ()


class Output(NamedTuple):
  """A tensor of the result.

  Attributes:
    name: its name.
    dtype: in which it is stored.
    base: what task vectors start from, or what is copied; None where raw weights are merged.
    models: the models' tensors, as the job lists them; none where it is copied.
    job: which job merges it; None: it is copied from the base.
  """

  name: str
  dtype: np.dtype
  base: Tensor | None
  models: tuple[Tensor, ...]
  job: int | None

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the tensor."""
    return (self.base or self.models[0]).shape

  @property
  def size(self) -> int:
    """Bytes of the tensor as it is stored."""
    return math.prod(self.shape) * self.dtype.itemsize


class Plan(NamedTuple):
  """A whole merge.

  Attributes:
    outputs: the tensors of the result, in the order in which they are stored.
    jobs: what merges them.
    fates: model to tensor to what becomes of it.
    donor: the folder whose config and tokenizer the result takes over.
    facts: plain JSON about inputs and settings, for the provenance.
    inputs: the files that are read.
  """

  outputs: tuple[Output, ...]
  jobs: tuple[Job, ...]
  fates: Mapping[str, Mapping[str, str]]
  donor: pathlib.Path
  facts: Mapping[str, Any]
  inputs: frozenset[pathlib.Path]

  @property
  def read(self) -> int:
    """Bytes of the inputs that one reading takes."""
    parts = [t for o in self.outputs for t in (o.base, *o.models) if t is not None]
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in parts)

  @property
  def written(self) -> int:
    """Bytes of the tensors of the result."""
    return sum(o.size for o in self.outputs)


class Problems(ValueError):
  """All that is wrong with a merge, a line each."""

  def __init__(self, lines: Sequence[str]):
    super().__init__("\n".join(lines))
    self.lines = tuple(lines)


def model(path: str | os.PathLike[str], files: Files, *, name: str | None = None) -> Model:
  """Opens a Hugging Face folder: only the headers of its files are read."""
  path = pathlib.Path(path)
  places = folder.entries(path)
  tensors = {n: stored(files, file, n, entry) for n, (file, entry) in sorted(places.items())}
  return Model(name or str(path), path, tensors, tuple({file for file, _ in places.values()}))


def simple(
  method: Callable[[], Any],
  base: Model | None,
  models: Sequence[Model],
  *,
  on: str,
  numbers: Mapping[str, Any] | None = None,
  seed: int | None = None,
  layout: Sequence[tuple[str, str]] = (),
  dtype: np.dtype | None = None,
  missing: str = "error",
  facts: Mapping[str, Any] | None = None,
) -> Plan:
  """Plans a merge of whole models by one method.

  Args:
    method: () -> the method.
    base: the base; None where raw weights are merged.
    models: the models to be merged.
    on: what the method acts on, "task vectors" or "weights".
    numbers: the method's numbers.
    seed: for random masks.
    layout: matrix views.
    dtype: of the result's floating tensors; None: as in the base, or the first model.
    missing: what becomes of a tensor that some models lack: "error", or "base": copied from there.
    facts: for the provenance.

  Raises:
    Problems: naming every tensor and model that do not fit.
  """
  donor = base or models[0]
  problems = [p for m in models if m is not donor for p in _differences(donor, m, missing)]
  if problems:
    raise Problems(problems)
  fates: dict[str, dict[str, str]] = {m.name: {} for m in (donor, *models)}
  outputs = []
  for name, own in donor.tensors.items():
    parts = tuple(m.tensors[name] for m in models if name in m.tensors)
    merged = safetensors.is_floating(own.dtype) and len(parts) == len(models)
    stored_as = dtype if dtype is not None and safetensors.is_floating(own.dtype) else own.dtype
    start = own if on == "task vectors" or not merged else None
    outputs.append(Output(name, stored_as, start, parts if merged else (), 0 if merged else None))
    for m in (donor, *models):
      if name in m.tensors:
        fates[m.name][name] = _fate(m is donor, merged, on)
  job = Job(method, tuple(m.name for m in models), numbers or {}, seed, layout)
  inputs = frozenset(file for m in (donor, *models) for file in m.files)
  return Plan(tuple(outputs), (job,), fates, donor.folder, facts or {}, inputs)


def _fate(donor: bool, merged: bool, on: str) -> str:
  if merged:
    return "base of the merge" if donor and on == "task vectors" else "merged"
  return "copied" if donor else "dropped: the base's is copied"


def _differences(donor: Model, other: Model, missing: str) -> list[str]:
  """Says, tensor by tensor, where a model does not fit the one whose layout the result takes."""
  lines = []
  for name in sorted(donor.tensors.keys() | other.tensors.keys()):
    ours, theirs = donor.tensors.get(name), other.tensors.get(name)
    if theirs is None and missing == "error":
      lines.append(
        f"tensor {name!r} is in {donor.name} but not in {other.name}; missing: base copies it."
      )
    elif ours is None:
      lines.append(f"tensor {name!r} is in {other.name} but not in {donor.name}; exclude it.")
    elif theirs is not None and ours.shape != theirs.shape:
      lines.append(
        f"tensor {name!r} is {list(ours.shape)} in {donor.name} but {list(theirs.shape)} in "
        f"{other.name}{_vocabulary(ours.shape, theirs.shape)}."
      )
    elif theirs is not None and safetensors.is_floating(ours.dtype) != safetensors.is_floating(
      theirs.dtype
    ):
      lines.append(
        f"tensor {name!r} is {ours.dtype} in {donor.name} but {theirs.dtype} in {other.name}."
      )
  return lines


def _vocabulary(ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
  if len(ours) == len(theirs) == 2 and ours[1:] == theirs[1:]:
    return "; if these are vocabularies, the recipe's tokenizer key brings them together"
  return ""
