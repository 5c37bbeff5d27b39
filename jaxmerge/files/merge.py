"""A merge of whole models by one method, as Python asks for it: checked, then planned."""

from __future__ import annotations

import collections
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any  # What a config.json holds.

import numpy as np

from jaxmerge import (
  catalog,
  compatibility,
  layouts,
  misfits,
  planning,
  remote_code,
  spelling,
  tying,
)
from jaxmerge.io import folder, safetensors
from jaxmerge.planning import Job, Model, Plan, Want

MISSING = ("error", "base", "mean", "skip")
BASE = "the base"  # What it is called.


def checked(
  names: Sequence[str], models: int, *, base: bool, dtype: Any, missing: str
) -> np.dtype | None:
  """Checks what is said beside the models, before any of them is opened.

  >>> checked(["chat", "code"], 2, base=False, dtype="float16", missing="mean")
  dtype('float16')

  Args:
    names: of the models.
    models: how many they are.
    base: whether there is a base.
    dtype: of the result's floating tensors, as numpy calls it; None: as in the base.
    missing: what becomes of a tensor that some models lack.

  Returns:
    The dtype.

  Raises:
    ValueError: with the value, and what would be right.
  """
  if not models:
    raise ValueError("there is no model to merge: give one or more.")
  if len(names) != models:
    raise ValueError(f"names must be {models}, one for each model, got {list(names)}.")
  counts = collections.Counter([*names, *([BASE] if base else [])])
  if twice := [name for name, count in counts.items() if count > 1]:
    raise ValueError(f"{twice[0]!r} is what two models are called: names tells them apart.")
  if missing not in MISSING:
    raise ValueError(f"missing cannot be {missing!r}{catalog.nearest(str(missing), MISSING)}.")
  if missing == "base" and not base:
    raise ValueError("missing='base' takes tensors from the base, but there is none: give one.")
  return None if dtype is None else _floating(dtype)


def _floating(said: Any) -> np.dtype:
  known = {d.name: d for d in safetensors.DTYPES.values() if safetensors.is_floating(d)}
  try:
    name = np.dtype(said).name
  except TypeError:
    name = str(said)
  if name not in known:
    raise ValueError(f"dtype cannot be {said!r}{catalog.nearest(name, known)}.")
  return known[name]


def planned(
  job: Job,
  base: Model | None,
  models: Sequence[Model],
  *,
  dtype: np.dtype | None = None,
  missing: str = "error",
  allow: Collection[str] = (),
) -> Plan:
  """Plans a merge of whole models by one method: of task vectors with a base, else of weights.

  Args:
    job: what merges them.
    base: the base.
    models: the models to be merged.
    dtype: of the result's floating tensors; None: as in the base, or in the first model.
    missing: as for `planning.assembled`.
    allow: as for `compatibility.compared`.

  Raises:
    planning.Problems: naming every tensor and model that do not fit.
  """
  donor, *rest = spelling.alike([*([] if base is None else [base]), *models])
  models = [donor, *rest] if base is None else rest
  wants = [
    Want(name, donor.part(name), tuple(m.part(name) for m in models), raw=base is None)
    for name in sorted({name for m in (donor, *models) for name in m.tensors})
  ]
  told = misfits.lines(wants, (donor, *models), missing)
  fit = compatibility.compared(wants, (donor, *models), allow=allow, tokens=True)
  told += fit.unless(told)
  plan = planning.assembled(
    wants, [job], (donor, *models), dtype=dtype, missing=missing, misfits=told
  )
  said = () if dtype else planning.rounded(plan)
  plan = plan._replace(notes=(*plan.notes, *fit.notes, *said))
  changed = stated(donor.config, dtype.name) if dtype and donor.config else donor.config
  plan, changed = tying.settled(plan, donor, changed)
  if changed != donor.config:
    text = json.dumps(changed, indent=2) + "\n"
    plan = plan._replace(texts={**plan.texts, folder.CONFIG: text})
  return remote_code.settled(plan, (donor, *models))


def laid_out(plan: Plan, method: Any, layout: layouts.Said | None) -> Plan:
  """Settles how the tensors of a plan's first job lie, which a method merges.

  Raises:
    ValueError: for a layout that does not fit them, or does not suffice for the method.
  """
  shapes = {o.name: o.shape for o in plan.outputs if o.job == 0}
  names = [o.name for o in plan.outputs]
  table = layouts.settled(method, shapes, layout, names=names)
  return plan._replace(jobs=(plan.jobs[0]._replace(layout=table), *plan.jobs[1:]))


def stated(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
  """Returns a config that says in which dtype weights are stored, as its library calls the key.

  >>> stated({"torch_dtype": "float32"}, "bfloat16")
  {'torch_dtype': 'bfloat16'}
  """
  return {**config, "dtype" if "dtype" in config else "torch_dtype": dtype}
