"""The plan of a merge of files: plain records from headers, free of jax."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple  # Any: a method, opaque here; plans.

import numpy as np

from jaxmerge.catalog import lookup
from jaxmerge.catalog.entry import Entry
from jaxmerge.core import layouts
from jaxmerge.core.precision import Precision
from jaxmerge.io.checkpoints import other_programs
from jaxmerge.io.disk.stamps import Stamp
from jaxmerge.io.huggingface import folder, pipeline
from jaxmerge.io.tensors.tensor import Tensor

ENTRIES = 2**22  # Per slice, over base and models: few calls and little memory.


class Outcome(NamedTuple):
  """The outcome of an input tensor; `outcomes.describe` formats it as text.

  Attributes:
    kind: "merged"; "base", what the task vectors of a merge start from; "copied" into the result;
      "tied" to a tensor of equal bytes; "dropped"; or "rewritten" before the merge: renamed, put
      into another form, added to a tensor of the model, or with other rows.
    job: the job that merges it, by its place in the plan; None where its method does not.
    target: the output tensor, if its name differs, or the tensor that it is tied to.
    reason: why or how, for people; no code reads it.
  """

  kind: Literal["merged", "base", "copied", "tied", "dropped", "rewritten"]
  job: int | None = None
  target: str = ""
  reason: str = ""


# Model -> tensor -> outcomes; a tensor may go into several output tensors.
Outcomes = Mapping[str, Mapping[str, tuple[Outcome, ...]]]


class InputTensor(NamedTuple):
  """An input tensor and its model; `tensor` is None if the model has none of that name."""

  model: str
  name: str
  tensor: Tensor | None


class Model(NamedTuple):
  """A model on disk.

  Attributes:
    name: chosen by the user; random masks depend on it.
    folder: its folder.
    tensors: its tensors by name.
    files: its weight files.
    config: its config.json.
    tied: names of output heads to the embeddings that they are, by config and bytes: they are no
      tensors of their own, and stand in where another model's head is not tied.
    outcomes: what becomes of tensors of its files that are not among its tensors: why they are
      dropped, or what an adapter's are added to.
    home: name of its folder in records, where the path is one of this machine.
    texts: files that it has beside those of the folder, or in their place, such as those that an
      adapter brings, or where it is still to be made; None: it does not have that one.
    notes: lines for the user.
    orbax: the checkpoint, where its weights are one of Orbax that another program wrote.
  """

  name: str
  folder: pathlib.Path
  tensors: Mapping[str, Tensor]
  files: tuple[pathlib.Path, ...]
  config: Mapping[str, Any] = {}
  tied: Mapping[str, Tensor] = {}
  outcomes: Mapping[str, Outcome] = {}
  home: str | None = None
  texts: Mapping[str, str | bytes | None] = {}
  notes: tuple[str, ...] = ()
  orbax: other_programs.Checkpoint | None = None

  def input(self, name: str) -> InputTensor:
    """Returns the input tensor of a name; its `tensor` is None if the model has none."""
    return InputTensor(self.name, name, self.tensors.get(name, self.tied.get(name)))


class Job(NamedTuple):
  """A merge of some tensors by one method; whole-model statistics cover only these.

  Attributes:
    method: () -> the method; called only if there is work to do.
    spec: the method and its settings, as plain JSON.
    models: names of the models.
    hparams: the method's hyperparameters by name: for all tensors, or by tensor.
    seed: for random masks.
    layout: matrix views by tensor.
    recipe: method and parameters as a recipe names them, before they are this library's: the name
      under `method`, and values for all, for each model, or by tensor.
  """

  method: Callable[[], Any]
  spec: Any
  models: tuple[str, ...]
  hparams: Mapping[str, Any] = {}
  seed: int | None = None
  layout: layouts.Table = layouts.NONE
  recipe: Mapping[str, Any] = {}

  @property
  def name(self) -> str | None:
    """Name of the method in its spec; None if the spec is not a mapping."""
    return str(self.spec["method"]) if isinstance(self.spec, Mapping) else None

  @property
  def entry(self) -> Entry | None:
    """The method's catalog entry; None for an unpublished method."""
    return None if self.name is None else lookup.METHODS.get(self.name)


class TensorRequest(NamedTuple):
  """A requested tensor of the result; its input tensors may be missing or may not fit.

  Attributes:
    name: its name.
    base: the origin of task vectors, copied where the models are not merged.
    models: the inputs to merge; empty: the base is copied.
    job: index of the job that merges it.
    of_weights: weights are merged, not task vectors; the base is only a fallback.
  """

  name: str
  base: InputTensor | None
  models: tuple[InputTensor, ...] = ()
  job: int = 0
  of_weights: bool = False


class Output(NamedTuple):
  """A tensor of the result.

  Attributes:
    name: its name.
    dtype: in which it is stored.
    base: the origin of task vectors, or the tensor to copy; None where weights are merged.
    models: the models' tensors, in the job's order; empty where it is copied.
    job: index of the job that merges it; None: it is copied from the base.
    precision: of the merge; None: float32 or wider.
    copy_of: the tensor of the result that it duplicates, if any.
  """

  name: str
  dtype: np.dtype
  base: Tensor | None
  models: tuple[Tensor, ...]
  job: int | None
  precision: Precision | None = None
  copy_of: str | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the tensor."""
    return (self.base or self.models[0]).shape

  @property
  def size(self) -> int:
    """Bytes of the stored tensor."""
    return math.prod(self.shape) * self.dtype.itemsize


def slice_entries(models: int) -> int:
  """Returns the number of entries of a slice, per model and base.

  >>> slice_entries(1) == slice_entries(3) == 2**20, slice_entries(20) == 2**17
  (True, True)
  """
  return 1 << (ENTRIES // max(models + 1, 4)).bit_length() - 1


class Plan(NamedTuple):
  """A whole merge.

  Attributes:
    outputs: the tensors of the result, in stored order.
    jobs: the merge jobs.
    outcomes: the outcome of each input tensor, by model and name.
    donor: the folder that provides config and tokenizer.
    inputs: the files that are read.
    facts: the settings as plain JSON, for the provenance.
    texts: files of the result that are not the donor's, by name; None: the donor's is left out.
    earlier: plans of intermediate models, which are merged first, by name.
    stamps: of files, taken before their first byte was read.
    notes: lines for the user, shown in dry run, terminal and model card.
    orbax: the donor's checkpoint, where another program wrote it: a layout to write.
  """

  outputs: tuple[Output, ...]
  jobs: tuple[Job, ...]
  outcomes: Outcomes
  donor: pathlib.Path
  inputs: frozenset[pathlib.Path]
  facts: Mapping[str, Any] = {}
  texts: Mapping[str, str | bytes | None] = {}
  earlier: Mapping[str, Any] = {}
  notes: tuple[str, ...] = ()
  stamps: Mapping[pathlib.Path, Stamp] = {}
  orbax: other_programs.Checkpoint | None = None

  @property
  def bytes_read(self) -> int:
    """Bytes of the inputs that one pass reads."""
    parts = [t for o in self.outputs for t in (o.base, *o.models) if t is not None]
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in parts)

  @property
  def bytes_written(self) -> int:
    """Bytes of the tensors of the result."""
    return sum(o.size for o in self.outputs)

  def shards(self, limit: int) -> dict[str, list[str]]:
    """Splits the result into files of at most `limit` bytes, each with its tensors."""
    sizes = {o.name: o.size for o in self.outputs}
    if pipeline.is_pipeline(self.donor):
      return pipeline.shards(sizes, limit, {p.name: p.stem for p in pipeline.parts(self.donor)})
    return folder.shards(sizes, limit, folder.modules(self.donor))


def job_name(jobs: Sequence[Job], index: int) -> str:
  """Names a job by its method, if that has a name, and by its number, from 1.

  >>> job_name([Job(lambda: None, {"method": "ties", "density": 0.2}, ("chat", "code"))], 0)
  'ties, job 1'
  """
  job = jobs[index]
  return f"job {index + 1}" if job.entry is None else f"{job.name}, job {index + 1}"
