"""Measures how models differ from their base: norms, cosines, sign conflicts, spectra.

Files are read once, and once more for spectra, slice by slice. Free of jax.
"""

from __future__ import annotations

import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any  # Any: values of a JSON record.

import numpy as np

from jaxmerge.analysis import sums as sum_lib
from jaxmerge.analysis.sums import Count, Sums
from jaxmerge.errors import Problems
from jaxmerge.files import adapter_inputs, inputs, other_forms
from jaxmerge.files.plan import Model
from jaxmerge.io.peft import adapter
from jaxmerge.io.tensors import layer_names, safetensors
from jaxmerge.io.tensors.tensor import Files, Tensor

Record = dict[str, Any]

SHOWN = 20  # Most lines of an error.

# Kinds of tensors, by the first expression that matches their names.
KINDS = {
  "norm": r"norm|(^|[._/])(ln|bn)(_?[0-9f])?[./]",
  "head": r"(^|[./])(lm_head|embed_out|classifier|score)[./]",
  "embedding": r"embed|(^|[./])w[tp]e[./]|^shared[./]",
  "attention": r"attn|attention|(^|[._/])[qkvo]_proj[./]",
  "mlp": r"mlp|ffn|feed_?forward|expert|reludense|intermediate|"
  r"(^|[./])(fc[0-9]|output[./]dense)[./]",
}


def open_models(
  paths: Sequence[str | os.PathLike[str]],
  base: Model,
  files: Files,
  names: Sequence[str] | None = None,
) -> list[Model]:
  """Opens the models to compare with a base; an adapter is applied to the base.

  A tree of another program is read in the form of the base. By default, the names are the ends of
  the paths.
  """
  models = []
  names = names or inputs.short_names(list(map(str, paths)))
  for path, name in zip(paths, names, strict=True):
    if adapter.is_adapter(path):
      model = adapter_inputs.add_adapter(base, path, files)
      # The base does not store a head that the adapter unties from the embedding.
      tensors = {n: t for n, t in model.tensors.items() if n in base.tensors}
      models.append(model._replace(name=name, folder=pathlib.Path(path), tensors=tensors))
    else:
      models.append(inputs.open_model(path, files, name=name))
  return other_forms.align([base, *models])[1:]


def compare(
  base: Model,
  models: Sequence[Model],
  *,
  singular: str | None = None,
  top: int = 16,
  progress: Count = lambda count: None,
) -> Record:
  """Measures task vectors, models minus base: whole, by layer, by kind and by tensor.

  Args:
    base: the base.
    models: K models with the same tensors.
    singular: a regular expression; for matrices whose names match, the share of the energy in the
      largest singular values is measured.
    top: number of these singular values.
    progress: called with the number of bytes read, `size` in total.

  Returns:
    `base`, its folder; `models`, names, and their `folders`; measures of the `whole`, and by name
    of `layers` (the first number in a tensor's name, else "outside"), `kinds` and `tensors`:
    `entries`, `base_norm`, `norms`, `relative` (norms over the base's), `cosines` (in the order of
    `models`) and `sign_conflict` (a share of the entries); `singular`, by tensor and model, with
    `share` and the `top` largest `values`; `uncompared`, names of integer tensors. None replaces a
    division by zero.

  Raises:
    Problems: naming all tensors that do not fit.
    ValueError: naming a tensor with NaN or infinity; for a `singular` that matches no matrix.
  """
  check(base, models)
  chosen = matrices(base, singular)
  sums = {
    n: sum_lib.add_up([t, *(m.tensors[n] for m in models)], progress)
    for n, t in _floating_tensors(base)
  }
  if not sums:
    raise ValueError(f"{base.folder} has no tensors of floating-point numbers.")
  names = [m.name for m in models]
  spectra: Record = {}
  for name in chosen:
    matrix = base.tensors[name]
    squares = [sum_lib.spectrum(matrix, m.tensors[name], progress) for m in models]
    spectra[name] = {m: _share(values, top) for m, values in zip(names, squares, strict=True)}
  return {
    "base": str(base.folder),
    "models": names,
    "folders": {m.name: str(m.folder) for m in models},
    "whole": _stats(functools.reduce(Sums.__add__, sums.values()), names),
    "layers": _group(sums, layer, names),
    "kinds": _group(sums, kind, names),
    "tensors": {name: _stats(total, names) for name, total in sums.items()},
    "top": top,
    "singular": spectra,
    "uncompared": sorted(base.tensors.keys() - sums.keys()),
  }


def size(base: Model, models: Sequence[Model], singular: str | None = None) -> int:
  """Returns the number of bytes that `compare` reads; raises the same errors."""
  check(base, models)
  total = sum(_bytes([t, *(m.tensors[n] for m in models)]) for n, t in _floating_tensors(base))
  chosen = [[base.tensors[n], m.tensors[n]] for n in matrices(base, singular) for m in models]
  return total + sum(map(_bytes, chosen))


def layer(name: str) -> str:
  """Returns the layer of a tensor: the first number in its name.

  >>> layer("model.layers.12.mlp.experts.3.w1.weight"), layer("lm_head.weight")
  ('12', 'outside')
  >>> layer("layers/12/attn/kernel"), layer("decoder/layers_3/mlp/kernel")
  ('12', '3')
  """
  if at := layer_names.layer_of_path(name):
    return str(at[1])
  return next((part for part in name.split(".") if part.isdecimal()), "outside")


def kind(name: str) -> str:
  """Returns the kind of a tensor, from its name.

  >>> kind("model.layers.0.post_attention_layernorm.weight"), kind("h.0.attn.c_proj.weight")
  ('norm', 'attention')
  """
  kinds = (k for k, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
  return next(kinds, "other")


def matrices(base: Model, singular: str | None) -> list[str]:
  """Returns the names of the matrices that a regular expression matches.

  Raises:
    ValueError: for an invalid expression, or one that matches no matrix.
  """
  if singular is None:
    return []
  try:
    names = [n for n, t in _floating_tensors(base) if re.search(singular, n) and len(t.shape) == 2]
  except re.error as error:
    raise ValueError(f"singular: {singular!r} is no regular expression ({error}).") from error
  if not names:
    raise ValueError(f"singular: {singular!r} matches no matrix of {base.folder}.")
  return names


def check(base: Model, models: Sequence[Model]) -> None:
  """Raises Problems with the tensors that differ between models and base in name, shape or kind."""
  lines = []
  for model in models:
    for name in sorted(base.tensors.keys() | model.tensors.keys()):
      ours, theirs = base.tensors.get(name), model.tensors.get(name)
      if ours is None or theirs is None:
        having, lacking = (model, base) if ours is None else (base, model)
        lines.append(f"tensor {name!r} is in {having.folder} but not in {lacking.folder}.")
      elif ours.shape != theirs.shape:
        lines.append(
          f"tensor {name!r} is {list(ours.shape)} in {base.folder} but {list(theirs.shape)} in "
          f"{model.folder}."
        )
      elif safetensors.is_floating(ours.dtype) != safetensors.is_floating(theirs.dtype):
        lines.append(
          f"tensor {name!r} is {ours.dtype} in {base.folder} but {theirs.dtype} in {model.folder}."
        )
  if len(lines) > SHOWN:
    lines = [*lines[:SHOWN], f"and {len(lines) - SHOWN} more tensors do not fit."]
  if lines:
    raise Problems(lines)


def _floating_tensors(base: Model) -> Iterator[tuple[str, Tensor]]:
  return ((n, t) for n, t in base.tensors.items() if safetensors.is_floating(t.dtype))


def _bytes(tensors: Sequence[Tensor]) -> int:
  return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)


# --- Records ---


def _group(sums: Mapping[str, Sums], group: Callable[[str], str], names: list[str]) -> Record:
  """Sums over the tensors of each group; layers are in order, tensors outside come last."""
  totals: dict[str, Sums] = {}
  for name, each in sums.items():
    key = group(name)
    totals[key] = totals[key] + each if key in totals else each
  order = sorted(totals, key=lambda key: (not key.isdecimal(), int(key) if key.isdecimal() else 0))
  return {key: _stats(totals[key], names) for key in order}


def _stats(sums: Sums, names: Sequence[str]) -> Record:
  norms, base = np.sqrt(sums.gram.diagonal()), math.sqrt(sums.base)
  products = np.outer(norms, norms)
  return {
    "entries": sums.entries,
    "base_norm": base,
    "norms": dict(zip(names, norms.tolist(), strict=True)),
    "relative": {model: _ratio(x, base) for model, x in zip(names, norms, strict=True)},
    "cosines": [list(map(_ratio, *rows)) for rows in zip(sums.gram, products, strict=True)],
    "sign_conflict": _ratio(sums.conflicts, sums.entries),
  }


def _share(squares: np.ndarray, top: int) -> Record:
  values = np.sqrt(squares[:top]).tolist()
  return {"share": _ratio(squares[:top].sum(), squares.sum()), "values": values}


def _ratio(x: float, y: float) -> float | None:
  return float(x / y) if y else None
