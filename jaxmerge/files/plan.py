"""What a merge of files will do: plain records made from headers, free of jax."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple  # Any: a method, which only a driver looks into; plans.

import numpy as np

from jaxmerge.catalog import lookup
from jaxmerge.catalog.entry import Entry
from jaxmerge.core import layouts
from jaxmerge.core.precision import Precision
from jaxmerge.io.checkpoints import other_programs
from jaxmerge.io.disk.stamps import Stamp
from jaxmerge.io.huggingface import folder, pipeline
from jaxmerge.io.tensors.tensor import Tensor

ENTRIES = 2**22  # In a slice, of base and models together: few calls, and little memory.


class Outcome(NamedTuple):
  """What becomes of an input tensor; `outcomes.describe` writes it in words.

  Attributes:
    kind: "merged"; "base", what the task vectors of a merge start from; "copied" into the result;
      "tied" to a tensor of equal bytes; "dropped"; or "rewritten" before the merge: renamed, put
      into another form, added to a tensor of the model, or with other rows.
    job: the job that merges it, by its place in the plan; None where its method does not.
    target: the tensor that it goes into, where that has another name, or that it is tied to.
    reason: why, or how, for people: no code looks into it.
  """

  kind: Literal["merged", "base", "copied", "tied", "dropped", "rewritten"]
  job: int | None = None
  target: str = ""
  reason: str = ""


# Model to tensor to what becomes of it; a tensor may go into several of the result.
Outcomes = Mapping[str, Mapping[str, tuple[Outcome, ...]]]


class InputTensor(NamedTuple):
  """An input tensor and its model; `tensor` is None if the model has none of that name."""

  model: str
  name: str
  tensor: Tensor | None


class Model(NamedTuple):
  """A model on disk.

  Attributes:
    name: the user's; random masks depend on it.
    folder: its folder.
    tensors: its tensors by name.
    files: of its weights.
    config: its config.json.
    tied: names of output heads to the embeddings that they are, by config and bytes: they are no
      tensors of their own, and stand in where another model's head is not tied.
    outcomes: what becomes of tensors of its files that are not among its tensors: why they are
      dropped, or what an adapter's are added to.
    home: name of its folder in records, where the path is one of this machine.
    texts: files that it has beside those of the folder, or in their place, such as those that an
      adapter brings, or where it is still to be made; None: it does not have that one.
    notes: lines that a user should know.
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
  """A merge of some tensors by one method: statistics over the tree are over these.

  Attributes:
    method: () -> the method; called when there is work to do.
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
    """Name of the method in its spec; None where the spec is no mapping."""
    return str(self.spec["method"]) if isinstance(self.spec, Mapping) else None

  @property
  def entry(self) -> Entry | None:
    """Entry of the method in the catalog; None for one that is not published."""
    return None if self.name is None else lookup.METHODS.get(self.name)


class TensorRequest(NamedTuple):
  """A tensor that the result should have; its input tensors may be missing, or may not fit.

  Attributes:
    name: its name.
    base: what task vectors start from, and what is copied where the models are not merged.
    models: what is merged; none: the base is copied.
    job: which of the jobs merges it.
    of_weights: the weights are merged, not task vectors; the base only helps out.
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
    base: what task vectors start from, or what is copied; None where raw weights are merged.
    models: the models' tensors, as the job lists them; none where it is copied.
    job: which job merges it; None: it is copied from the base.
    precision: what it is merged in; None: float32 or wider.
    copy_of: a tensor of the result whose bytes it gets, if any.
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
    """Bytes of the tensor as it is stored."""
    return math.prod(self.shape) * self.dtype.itemsize


def slice_entries(models: int) -> int:
  """Returns how many entries a slice has of each model, and of the base.

  >>> slice_entries(1) == slice_entries(3) == 2**20, slice_entries(20) == 2**17
  (True, True)
  """
  return 1 << (ENTRIES // max(models + 1, 4)).bit_length() - 1


class Plan(NamedTuple):
  """A whole merge.

  Attributes:
    outputs: the tensors of the result, in the order in which they are stored.
    jobs: what merges them.
    outcomes: what becomes of each input tensor, by model and name.
    donor: the folder whose config and tokenizer the result takes over.
    inputs: the files that are read.
    facts: plain JSON about the settings, for the provenance.
    texts: files of the result that are not the donor's, by name; None: the donor's is left out.
    earlier: plans that are done before, whose results this one takes, by name.
    stamps: of files, before the first byte of them was read.
    notes: a line each on what a user should know of the result, for dry run, terminal and card.
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
    """Bytes of the inputs that one reading takes."""
    parts = [t for o in self.outputs for t in (o.base, *o.models) if t is not None]
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in parts)

  @property
  def bytes_written(self) -> int:
    """Bytes of the tensors of the result."""
    return sum(o.size for o in self.outputs)

  def shards(self, limit: int) -> dict[str, list[str]]:
    """Returns the files of the result, of at most `limit` bytes, each with its tensors."""
    sizes = {o.name: o.size for o in self.outputs}
    if pipeline.is_pipeline(self.donor):
      return pipeline.shards(sizes, limit, {p.name: p.stem for p in pipeline.parts(self.donor)})
    return folder.shards(sizes, limit, folder.modules(self.donor))


def job_name(jobs: Sequence[Job], index: int) -> str:
  """Names a job by its method, where that has a name, and by its number, from 1.

  >>> job_name([Job(lambda: None, {"method": "ties", "density": 0.2}, ("chat", "code"))], 0)
  'ties, job 1'
  """
  job = jobs[index]
  return f"job {index + 1}" if job.entry is None else f"{job.name}, job {index + 1}"
