"""What a merge of files will do: plain records made from headers, free of jax."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple  # Any: a method, which only a driver looks into; plans.

import numpy as np

from jaxmerge import catalog, display, layouts, moments
from jaxmerge.io import codes, folder, safetensors, ties, weights
from jaxmerge.io.stamps import Stamp
from jaxmerge.io.tensor import Files, Tensor
from jaxmerge.precision import Precision

ASIDE = "dropped: only the models are merged"  # What becomes of a base that is not.
LACKED = "copied from the base, as not all models have it"
ENTRIES = 2**22  # In a slice, of base and models together: few calls, and little memory.


class Part(NamedTuple):
  """A tensor of an input, and the model it is of; None where the model lacks it."""

  model: str
  name: str
  tensor: Tensor | None


class Model(NamedTuple):
  """A model on disk.

  Attributes:
    name: as the user calls it; random masks depend on it.
    folder: where it lies.
    tensors: its tensors by name.
    files: of its weights.
    config: what its config.json says.
    tied: names of output heads to the embeddings that they are, by config and bytes: they are no
      tensors of their own, and stand in where another model's head is not tied.
    dropped: tensors of its files that are not among its tensors, and what becomes of them: why they
      are dropped, or what an adapter's are added to.
    home: what its folder is called where the path would tell of this machine.
    texts: files that it has beside those of the folder, or in their place, such as those that an
      adapter brings, or where it is still to be made; None: it does not have that one.
    notes: what is to be known about it, a line each.
  """

  name: str
  folder: pathlib.Path
  tensors: Mapping[str, Tensor]
  files: tuple[pathlib.Path, ...]
  config: Mapping[str, Any] = {}
  tied: Mapping[str, Tensor] = {}
  dropped: Mapping[str, str] = {}
  home: str | None = None
  texts: Mapping[str, str | bytes | None] = {}
  notes: tuple[str, ...] = ()

  def part(self, name: str) -> Part:
    """Returns one of its tensors by name, or that it has none."""
    return Part(self.name, name, self.tensors.get(name, self.tied.get(name)))


class Job(NamedTuple):
  """Tensors that one method merges: statistics over the tree are over these.

  Attributes:
    method: () -> the method; called when there is work to do.
    words: the method and its settings, as plain JSON.
    models: names of the models.
    numbers: the method's numbers by name: for all, or by tensor.
    seed: for random masks.
    layout: matrix views by tensor.
    asked: what a recipe says of it, before it is this library's method: the name, under `method`,
      and parameters: for all, for each model, or by tensor.
  """

  method: Callable[[], Any]
  words: Any
  models: tuple[str, ...]
  numbers: Mapping[str, Any] = {}
  seed: int | None = None
  layout: layouts.Table = layouts.NONE
  asked: Mapping[str, Any] = {}


class Want(NamedTuple):
  """A tensor of the result, before it is known whether its parts are there and fit.

  Attributes:
    name: its name.
    base: what task vectors start from, and what is copied where the models are not merged.
    models: what is merged; none: the base is copied.
    job: which of the jobs merges it.
    raw: the weights are merged themselves; the base only helps out.
  """

  name: str
  base: Part | None
  models: tuple[Part, ...] = ()
  job: int = 0
  raw: bool = False


class Output(NamedTuple):
  """A tensor of the result.

  Attributes:
    name: its name.
    dtype: in which it is stored.
    base: what task vectors start from, or what is copied; None where raw weights are merged.
    models: the models' tensors, as the job lists them; none where it is copied.
    job: which job merges it; None: it is copied from the base.
    precision: what it is merged in; None: float32 or wider.
    same: a tensor of the result whose bytes it gets; None: it has its own.
  """

  name: str
  dtype: np.dtype
  base: Tensor | None
  models: tuple[Tensor, ...]
  job: int | None
  precision: Precision | None = None
  same: str | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the tensor."""
    return (self.base or self.models[0]).shape

  @property
  def size(self) -> int:
    """Bytes of the tensor as it is stored."""
    return math.prod(self.shape) * self.dtype.itemsize


def entries(models: int) -> int:
  """Returns how many entries of each of some models, and of the base, are in a slice.

  >>> entries(1) == entries(3) == 2**20, entries(20) == 2**17
  (True, True)
  """
  return 1 << (ENTRIES // max(models + 1, 4)).bit_length() - 1


class Plan(NamedTuple):
  """A whole merge.

  Attributes:
    outputs: the tensors of the result, in the order in which they are stored.
    jobs: what merges them.
    fates: model to tensor to what becomes of it.
    donor: the folder whose config and tokenizer the result takes over.
    inputs: the files that are read.
    facts: plain JSON about the settings, for the provenance.
    texts: files of the result that are not the donor's, by name; None: the donor's is left out.
    earlier: plans that are done before, whose results this one takes, by name.
    stamps: of files, before the first byte of them was read.
    notes: a line each on what a user should know of the result, for dry run, terminal and card.
  """

  outputs: tuple[Output, ...]
  jobs: tuple[Job, ...]
  fates: Mapping[str, Mapping[str, str]]
  donor: pathlib.Path
  inputs: frozenset[pathlib.Path]
  facts: Mapping[str, Any] = {}
  texts: Mapping[str, str | bytes | None] = {}
  earlier: Mapping[str, Any] = {}
  notes: tuple[str, ...] = ()
  stamps: Mapping[pathlib.Path, Stamp] = {}

  @property
  def read(self) -> int:
    """Bytes of the inputs that one reading takes."""
    parts = [t for o in self.outputs for t in (o.base, *o.models) if t is not None]
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in parts)

  @property
  def written(self) -> int:
    """Bytes of the tensors of the result."""
    return sum(o.size for o in self.outputs)

  def shards(self, limit: int) -> dict[str, list[str]]:
    """Returns the files of the result, of at most `limit` bytes, each with its tensors."""
    sizes = {o.name: o.size for o in self.outputs}
    return folder.shards(sizes, limit, folder.modules(self.donor))


class Problems(ValueError):
  """All that is wrong with a merge, a line each."""

  def __init__(self, lines: Sequence[str]):
    super().__init__("\n".join(lines))
    self.lines = tuple(lines)


def model(
  path: str | os.PathLike[str], files: Files, *, name: str | None = None, home: str | None = None
) -> Model:
  """Opens a Hugging Face folder or a checkpoint: only headers and manifests are read.

  Its tensors say that they are from `home`, where that is given, in place of the folder.
  """
  own = weights.model(path, files, home=home)
  called = name or display.readable(str(pathlib.Path(path)))
  config = weights.config(own.folder)
  return with_ties(Model(called, own.folder, own.tensors, own.files, config, home=home))


def with_ties(opened: Model) -> Model:
  """Takes an output head for the embedding where the config of a model and its bytes say so.

  A head that is stored and differs is a tensor of its own, whatever the config says.
  """
  found = ties.among(opened.tensors, opened.config)
  if found is None or not found.flag:
    return opened
  own = opened.tensors[found.embedding]
  one = [n for n in (*found.heads, *found.stacks) if ties.equal(own, opened.tensors[n])]
  left = found._replace(heads=tuple(n for n in found.heads if n not in one))
  return opened._replace(
    tensors={n: t for n, t in opened.tensors.items() if n not in one},
    tied=dict.fromkeys([*one, *(n for n in left.absent if n not in opened.tensors)], own),
    dropped=dict.fromkeys(one, f"dropped: tied to {found.embedding}"),
  )


def assembled(
  wants: Sequence[Want],
  jobs: Sequence[Job],
  models: Sequence[Model],
  *,
  dtype: np.dtype | None = None,
  missing: str = "error",
  fates: Mapping[str, Mapping[str, str]] | None = None,
  misfits: Sequence[str] = (),
) -> Plan:
  """Makes a plan of what is wanted, or tells all that does not fit.

  Args:
    wants: the tensors of the result.
    jobs: what merges them.
    models: all inputs; config and tokenizer are those of the first.
    dtype: of the result's floating tensors; None: that of the base, or of the first model.
    missing: what becomes of a tensor that some models lack: "error"; "base", copied from there;
      "mean", of the models that have it; "skip", left out of the result.
    fates: what is known already of tensors that are not wanted.
    misfits: what does not fit between the models, as `misfits.lines` says it.

  Raises:
    Problems: naming every tensor and model that do not fit.
  """
  told = {m.name: {**m.dropped, **(fates or {}).get(m.name, {})} for m in models}
  problems = [*_coded(wants, models, dtype), *misfits]
  every, outputs = list(jobs), []
  statistics = moments.of(want.name for want in wants)
  for want in wants:
    if not there(want):
      continue
    found, fate = _settled(want, missing, every, statistics)
    # The base may be one of the models as well.
    for which in dict.fromkeys((*want.models, want.base)):
      if which is not None and which.tensor is not None:
        words = _fate_of(which, want, found, fate)
        words += f" -> {want.name}" if which.name != want.name and found is not None else ""
        known = told[which.model].get(which.name, "dropped")
        if not known.startswith("dropped"):
          words = known if words.startswith("dropped") else f"{known}; {words}"
        told[which.model][which.name] = words
    if found is not None:
      first = found.base or found.models[0]
      own = first.kept or first.dtype
      stored_as = dtype if dtype is not None and safetensors.is_floating(own) else own
      outputs.append(found._replace(dtype=stored_as))
  for m in models:
    problems += [
      f"tensor {name!r} of {m.name} has no place in the result: exclude it."
      for name in sorted(m.tensors.keys() - told[m.name].keys())
    ]
  if problems:
    raise Problems(problems)
  inputs = frozenset(file for m in models for file in m.files)
  facts = {
    "folders": {m.name: m.home or display.readable(str(m.folder)) for m in models if m.files}
  }
  plan = Plan(tuple(outputs), tuple(every), told, models[0].folder, inputs, facts)
  notes = [note for m in models for note in m.notes]
  notes += codes.copied(
    [[(p.name, p.model, p.tensor) for p in there(w)] for w in wants if w.models]
  )
  return plan._replace(texts=models[0].texts, notes=tuple(dict.fromkeys(notes)))


def _coded(wants: Sequence[Want], models: Sequence[Model], dtype: np.dtype | None) -> list[str]:
  """Says which models have codes of quantized weights where weights are merged, or are cast."""
  merged: dict[str, set[str]] = {m.name: set() for m in models}
  copied: dict[str, set[str]] = {m.name: set() for m in models}
  for want in wants:
    for p in there(want):
      (merged if want.models else copied)[p.model].add(p.name)
  every = {m.name: m for m in models}.values()
  lines = (codes.problem(m.name, m.tensors, merged[m.name], m.config, m.folder) for m in every)
  casts = (codes.cast(m.name, m.tensors, copied[m.name], dtype) for m in every if dtype)
  return [line for line in (*lines, *casts) if line is not None]


def there(want: Want) -> list[Part]:
  """Returns the parts of a tensor that the models have; that of the base is the first."""
  return [p for p in (want.base, *want.models) if p is not None and p.tensor is not None]


def _settled(
  want: Want, missing: str, jobs: list[Job], statistics: Collection[str]
) -> tuple[Output | None, str]:
  """Decides what becomes of a tensor that is wanted; with words for it."""
  base = None if want.base is None else want.base.tensor
  parts = [p for p in want.models if p.tensor is not None]
  tensors = tuple(p.tensor for p in parts if p.tensor is not None)
  first = base or tensors[0]
  made = Output(want.name, first.dtype, first, (), None)
  whole = len(parts) == len(want.models) and (want.raw or base is not None)
  if not want.models or not safetensors.is_floating(first.dtype):
    whose = want.base.model if base is not None and want.base else parts[0].model
    return made, f"copied from {whose}"
  if whole:
    merged = made._replace(base=None if want.raw else base, models=tensors, job=want.job)
    fate = moments.FATE if want.name in statistics else f"merged by {called(jobs, want.job)}"
    return merged, fate
  if missing == "mean" and tensors:
    names = tuple(p.model for p in parts)
    job = next(
      (i for i, j in enumerate(jobs) if j.words == "mean" and j.models == names), len(jobs)
    )
    if job == len(jobs):
      jobs.append(Job(_mean, "mean", names))
    fate = f"mean of the models that have it, {called(jobs, job)}"
    return made._replace(base=None, models=tensors, job=job), fate
  if missing == "base" and base is not None:
    return made, LACKED
  return None, "dropped: not all models have it"


def _fate_of(which: Part, want: Want, made: Output | None, fate: str) -> str:
  """Says of one of a tensor's parts what it is to the result."""
  if which != want.base or made is None or made.job is None:
    return fate
  if made.base is not None:
    return fate.replace("merged by", "base of", 1)
  return fate if which in want.models else ASIDE


def rounded(plan: Plan) -> tuple[str, ...]:
  """Says which merged tensors are stored in 8-bit floats, or in fewer bits than a model has them.

  It is said of a result whose dtype nobody chose.
  """
  found = []
  for o in plan.outputs:
    widest = max((t.kept or t.dtype for t in o.models), key=lambda own: own.itemsize, default=None)
    if widest is not None and o.dtype.itemsize < max(widest.itemsize, 2):
      found.append((o, widest))
  if not found:
    return ()
  o, widest = found[0]
  count = f", one of {len(found)} such," if len(found) > 1 else ""
  wider = "bfloat16" if widest.itemsize == 1 else widest.name
  remedy = "a base in float64 keeps them" if widest.itemsize > 4 else f"dtype: {wider} keeps more"
  rounding = f"rounded to {o.dtype}, in which the base, or the first model, is stored"
  return (f"tensor {o.name!r}{count} is merged, then {rounding}; {remedy}.",)


def called(jobs: Sequence[Job], index: int) -> str:
  """Names a job by its method, where that has a name, and by its number, from 1.

  >>> called([Job(lambda: None, {"method": "ties", "density": 0.2}, ("chat", "code"))], 0)
  'ties, job 1'
  """
  words = jobs[index].words
  name = words.get("method") if isinstance(words, Mapping) else None
  return f"{name}, job {index + 1}" if name in catalog.METHODS else f"job {index + 1}"


def _mean() -> Any:
  from jaxmerge import methods  # jax comes with it.

  return methods.average()
