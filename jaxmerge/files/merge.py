"""`merge_files`: merges whole models by one method, from Python."""

from __future__ import annotations

import collections
import inspect
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any  # Any: JSON of a config.

import numpy as np

from jaxmerge import display, errors
from jaxmerge.core import layouts, statistics
from jaxmerge.core.stage import Method
from jaxmerge.drivers import arguments
from jaxmerge.evaluation import external
from jaxmerge.files import (
  assemble,
  compatibility,
  execute,
  inputs,
  misfits,
  name_variants,
  remote_code,
  tied_weights,
)
from jaxmerge.files.plan import Job, Model, Plan, TensorRequest
from jaxmerge.io.huggingface import folder, hub, pipeline
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Files

MISSING = ("error", "base", "mean", "skip")
BASE = "the base"  # Its name in plans and errors.


def check_options(
  names: Sequence[str], models: int, *, base: bool, dtype: Any, missing: str
) -> np.dtype | None:
  """Checks the options of a merge before any model is opened.

  >>> check_options(["chat", "code"], 2, base=False, dtype="float16", missing="mean")
  dtype('float16')

  Args:
    names: names of the models.
    models: their number.
    base: whether there is a base.
    dtype: of the result's floating tensors, by NumPy's name; None: as in the base.
    missing: what to do with a tensor that some models lack.

  Returns:
    The dtype.

  Raises:
    ValueError: with the value and the allowed ones.
  """
  if not models:
    raise ValueError("there is no model to merge: pass at least one.")
  if len(names) != models:
    raise ValueError(f"names must be {models}, one for each model, got {list(names)}.")
  counts = collections.Counter([*names, *([BASE] if base else [])])
  if twice := [name for name, count in counts.items() if count > 1]:
    raise ValueError(f"two models are called {twice[0]!r}: pass different `names`.")
  if missing not in MISSING:
    raise ValueError(f"missing cannot be {missing!r}{errors.nearest(str(missing), MISSING)}.")
  if missing == "base" and not base:
    raise ValueError("missing='base' takes tensors from the base, but there is none: pass `base`.")
  return None if dtype is None else _floating_dtype(dtype)


def _floating_dtype(dtype: Any) -> np.dtype:
  """Returns a floating dtype that safetensors can store, from its name or dtype."""
  known = {d.name: d for d in safetensors.DTYPES.values() if safetensors.is_floating(d)}
  try:
    name = np.dtype(dtype).name
  except TypeError:
    name = str(dtype)
  if name not in known:
    raise ValueError(f"dtype cannot be {dtype!r}{errors.nearest(name, known)}.")
  return known[name]


def plan_merge(
  job: Job,
  base: Model | None,
  models: Sequence[Model],
  *,
  dtype: np.dtype | None = None,
  missing: str = "error",
  allow: Collection[str] = (),
) -> Plan:
  """Plans a merge of whole models by one method, of task vectors with a base, else of weights.

  Args:
    job: the merge job.
    base: the base.
    models: the models to merge.
    dtype: of the result's floating tensors; None: as in the base, or in the first model.
    missing: as for `assemble.make_plan`.
    allow: as for `compatibility.compare`.

  Raises:
    errors.Problems: naming every tensor and model that does not fit.
  """
  donor, *rest = name_variants.align([*([] if base is None else [base]), *models])
  models = [donor, *rest] if base is None else rest
  names = sorted({name for m in (donor, *models) for name in m.tensors})
  parts = ((n, donor.input(n), tuple(m.input(n) for m in models)) for n in names)
  requests = [TensorRequest(*each, of_weights=base is None) for each in parts]
  problems = misfits.lines(requests, (donor, *models), missing)
  comparison = compatibility.compare(requests, (donor, *models), allow=allow, tokens=True)
  problems += comparison.unless(problems)
  plan = assemble.make_plan(
    requests, [job], (donor, *models), dtype=dtype, missing=missing, misfits=problems
  )
  rounding = () if dtype else assemble.note_rounding(plan)
  plan = plan._replace(notes=(*plan.notes, *comparison.notes, *rounding))
  config = folder.state_dtype(donor.config, dtype.name) if dtype and donor.config else donor.config
  plan, config = tied_weights.resolve_ties(plan, donor, config)
  texts = pipeline.config_texts(donor.folder, donor.config, config)
  plan = plan._replace(texts={**plan.texts, **texts})
  return remote_code.refer_to_code(plan, (donor, *models))


def resolve_layout(plan: Plan, method: Any, layout: layouts.Layout | None) -> Plan:
  """Resolves the layout of a plan's first job: the matrix view of each tensor.

  Raises:
    ValueError: for a layout that does not fit the tensors, or lacks what the method needs.
  """
  shapes = {o.name: o.shape for o in plan.outputs if o.job == 0}
  names = [o.name for o in plan.outputs]
  table = layouts.resolve(method, shapes, layout, names=names)
  return plan._replace(jobs=(plan.jobs[0]._replace(layout=table), *plan.jobs[1:]))


Path = str | os.PathLike[str]


def merge_files(
  method: Method | Any,
  models: Sequence[Path] | Any,
  out: Path,
  *,
  base: Path | None = None,
  download: bool = False,
  hparams: Mapping[str, Any] | None = None,
  seed: int | None = None,
  names: Sequence[str] | None = None,
  words: str | None = None,
  layout: layouts.Layout | None = (),
  dtype: str | None = None,
  missing: str = "error",
  allow: Sequence[str] = (),
  rename: Mapping[str, str] | None = None,
  evaluate: external.Evaluate | None = None,
  **options: Any,  # Of `run`: where, how much at once, whether to replace.
) -> pathlib.Path:
  """Merges model folders on disk into a new one, one slice of one tensor at a time.

  With a base, task vectors are merged and added to it; without one, the weights themselves.

  Args:
    method: what `jaxmerge.methods` makes, or a method of your own.
    models: a list, or a dict by name, of Hugging Face folders with safetensors, or checkpoints: of
      a run, its newest step; or, as texts, ids of the hub: `org/name`, or `org/name@revision`; or,
      as texts, either of them with adapters of PEFT: `model+adapter`, `model+adapter+adapter`.
    out: folder of the result.
    base: the base, likewise.
    download: whether models that the hub's cache lacks are fetched; else no network is used.
    hparams: the method's numbers: scalar, one per model, or by tensor.
    seed: for methods with random masks.
    names: of the models; by default those of their folders.
    words: name of the method in the model card, such as "TIES, density 0.2".
    layout: matrix views, as for `jaxmerge.merge`.
    dtype: of the result's floating tensors, by NumPy's name; None: as in the base.
    missing: what becomes of a tensor that some models lack: "error", "base", "mean" or "skip".
    allow: settings in which models may differ though weights mean something else then, such as
      "rope_theta", or "tokens", the order of the vocabulary; the result goes by the base.
    rename: beginnings of names of tensors, in models and adapters, to others: where their names do
      not fit, and the prefix is none that is known.
    evaluate: folder -> scores by name, called on the complete result; they are written to its
      `jaxmerge_evaluation.json`.
    options: as for `run`.

  Returns:
    The folder of the result.

  Raises:
    ValueError: naming file, tensor and value, for inputs that do not fit or are damaged.
    FileExistsError: where `out` exists and `replace` is not set.
  """
  method = _check_method(method, options, with_base=base is not None)
  models, names = arguments.paths(models, names)
  paths = [display.readable(str(pathlib.Path(m))) for m in models]
  names = paths if names is None else [*names]
  result_dtype = check_options(
    names, len(models), base=base is not None, dtype=dtype, missing=missing
  )
  files, find = Files(), hub.Finder(download=download)
  try:
    references = [*zip(names, models, strict=True)] + ([] if base is None else [(BASE, base)])
    opened = inputs.open_all(references, files, find, rename)
    base_model = None if base is None else opened.pop()
    spec, values = arguments.describe_method(method, arguments.hparams(hparams, None), words)
    job = Job(lambda: method, spec, tuple(names), values, seed)
    plan = plan_merge(job, base_model, opened, dtype=result_dtype, missing=missing, allow=allow)
    plan = resolve_layout(plan, method, layout)
    plan = plan._replace(facts={**plan.facts, **find.facts}, stamps=dict(files.stamps))
    folder = execute.run(plan, out, **options)
  finally:
    files.close()
  if evaluate is not None:
    external.run(folder, evaluate)
  return folder


def _check_method(method: Any, options: Mapping[str, Any], *, with_base: bool) -> Method:
  """Returns a method that can merge files; raises for others, and for unknown options of `run`."""
  method = arguments.method(method)
  known = {*inspect.signature(merge_files).parameters, *inspect.signature(execute.run).parameters}
  if unknown := [n for n in options if n not in known]:
    near = errors.nearest(unknown[0], known - {"plan", "locked", "options"})
    raise TypeError(f"merge_files has no option {unknown[0]!r}{near}.")
  if not with_base:
    zeros = "a base of zeros subtracts nothing"
    arguments.refuse_weights(method, "merge_files(method, models, out, base=...)", zeros)
  statistics.refuse(method, "merge_files")
  return method
