"""Detects the codes of quantized weights, by names and dtypes of neighbouring tensors.

Codes are no weights: a mean of codes, or of scales without their codes, is no model. A config only
adds to the evidence of the tensors.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any  # What a config.json holds.

import numpy as np

from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import NotYetMade, Tensor

# Scales, zero points and tables of GPTQ, AWQ, bitsandbytes, fp8 and fp4 of several kinds, HQQ,
# AQLM, VPTQ, EXL, quanto, torchao and MLX: suffixes of the name of the codes.
_SCALE = re.compile(
  r"[._:/]+(?:(?:input|activation|act|output|weight|pre|per_tensor|global|nested|dq|zp)_)*"
  r"(?:q?scales?|scales?_inv(?:erse)?|(?:weight_|input_)?scales?_(?:2|ub|max)|absmax|quant_map"
  r"|q?zeros?|zero_points?|zeropoints?|scb|code_?books?|scales?_and_zeros?|q?biases|g_idx"
  r"|quant_state[.]\w+|smooth_factor|scale_(?:weight|input)"
  r"|(?:weights?|activation|prequant)_scaling_factor|s[uv]h|(?:res_)?centroids[.]weight)$",
  re.IGNORECASE,
)
_STATE = re.compile(r"(?:absmax|quant_map|quant_state[.]\w+)$", re.IGNORECASE)
_CODES = re.compile(
  r"[._:/]+(?:q?weight|w_q|kernel|codes|packed|packed_weight|blocks|q?data|int_data|quantized"
  r"|embedding|trellis|(?:res_)?indices)$",
  re.IGNORECASE,
)
_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_KEYS = ("quantization_config", "compression_config", "quantization")
_WEIGHT = re.compile(r"(?:^|[._:/])(?:q?weight|kernel)$")
_BUFFER = re.compile(r"(?:_ids?|_index|mask|bias)$")  # Integer tensors that are no codes.
_FIRST = 4096  # Entries that are sampled.
_SLICE = 2**20  # Entries that are compared at a time.
_REMEDY = "use the model as it was before, or dequantize it"


def find_codes(tensors: Mapping[str, Any]) -> dict[str, str]:
  """Returns the name of each tensor of codes, mapped to the name of its scales.

  >>> import numpy as np
  >>> codes = Tensor("", np.dtype(np.int32), (8, 64), lambda start, out: None)
  >>> scales = codes._replace(dtype=np.dtype(np.float16))
  >>> find_codes({"up.qweight": codes, "up.scales": scales, "norm.weight": scales})
  {'up.qweight': 'up.scales'}
  """
  scales: dict[str, str] = {}
  states = set()  # bitsandbytes may store codes as bytes of a float dtype, which says nothing.
  for name in tensors:
    if match := _SCALE.search(name):
      scales.setdefault(name[: match.start()], name)
      states |= {name[: match.start()]} if _STATE.search(name) else set()
  some = ((n, t) for n, t in tensors.items() if scales and not _SCALE.search(n))
  narrow = [n for n, t in some if n in states or _is_narrow(t)]
  pairs = ((n, next((scales[s] for s in _stems(n) if s in scales), None)) for n in narrow)
  return {name: scale for name, scale in pairs if scale is not None}


def _is_narrow(tensor: Any) -> bool:
  integers = not safetensors.is_floating(tensor.dtype) and tensor.dtype.kind != "b"
  return (integers or tensor.dtype.itemsize == 1) and math.prod(tensor.shape) > 1


def _stems(name: str) -> Iterator[str]:
  """Yields a name, and the same without suffixes for codes."""
  yield name
  while match := _CODES.search(name):
    name = name[: match.start()]
    yield name


def refuse(leaves: Mapping[str, Any], whose: str) -> None:
  """Raises ValueError, naming a leaf of a tree in memory, for codes as `find_codes` finds them."""
  known = {n: x for n, x in leaves.items() if isinstance(getattr(x, "dtype", None), np.dtype)}
  if scales := find_codes(known):
    name = min(scales)
    raise ValueError(
      f"leaf {name!r} of {whose}, one of {len(scales)} such, is {leaves[name].dtype} and "
      f"{scales[name]!r} lies beside it: codes of quantized weights and their scale, neither of "
      f"which can be merged; {_REMEDY}."
    )


def tensors_of_codes(tensors: Mapping[str, Tensor]) -> frozenset[str]:
  """Returns the codes and all tensors that belong to them; results copy these unchanged."""
  codes = find_codes(tensors)
  stems = {stem for name in codes for stem in _stems(name)}
  others = (n for n in tensors if (at := _SCALE.search(n)) and n[: at.start()] in stems)
  return frozenset({*codes, *others})


def problem(
  model: str,
  tensors: Mapping[str, Tensor],
  merged: Collection[str],
  config: Mapping[str, Any],
  folder: pathlib.Path,
) -> str | None:
  """Returns why tensors of a model cannot be merged; None where none of them holds codes.

  Weights in 8-bit floats without a scale are plain values, and can be merged.

  Args:
    model: its name.
    tensors: its tensors.
    merged: names of those that are merged.
    config: its config.
    folder: with other files that may declare quantization.
  """
  scales = find_codes(tensors)
  if every := tensors_of_codes(tensors) & set(merged):
    name = min(every & scales.keys(), default=min(scales))
    return (
      f"tensor {name!r} of {model}, one of {len(scales)} such, holds codes of quantized weights, "
      f"which {scales[name]!r} belongs to: neither can be merged. {_REMEDY.capitalize()}; or "
      "exclude all of both, which copies them from the base."
    )
  if whole := next((n for n in sorted(merged) if _is_whole(n, tensors)), None):
    return (
      f"tensor {whole!r} of {model} is {tensors[whole].dtype}, but holds whole numbers, and has a "
      f"scale: codes of quantized weights. They cannot be merged: {_REMEDY}."
    )
  source = _source(config, folder)
  wide = [n for n in sorted(merged) if n in tensors and len(tensors[n].shape) > 1]
  bare = [n for n in wide if _is_bare(n, tensors[n], source is not None)]
  if not bare:
    return None
  why = "and their scale is not there" if source is None else f"as {source} says"
  what = f"tensor {bare[0]!r} of {model} is {tensors[bare[0]].dtype}"
  return f"{what}: codes of quantized weights, {why}. They cannot be merged: {_REMEDY}."


def cast(
  model: str, tensors: Mapping[str, Tensor], copied: Collection[str], dtype: np.dtype
) -> str | None:
  """Returns an error for codes or scales that another dtype would change; None without any."""
  for name in sorted(tensors_of_codes(tensors) & set(copied)):
    if safetensors.is_floating(tensors[name].dtype) and tensors[name].dtype != dtype:
      return (
        f"tensor {name!r} of {model} belongs to quantized weights and is {tensors[name].dtype}: as "
        f"{dtype} it would mean something else; leave the dtype of the result out."
      )
  return None


def note_copies(parts: Iterable[Sequence[tuple[str, str, Tensor | None]]]) -> list[str]:
  """Returns a note if integer matrices differ between models and are copied from the first.

  Args:
    parts: of tensors with several models: name, model, and tensor of each.
  """
  lines = [line for each in parts if each and (line := _difference(*each))]
  if not lines:
    return []
  count = f", one of {len(lines)} such" if len(lines) > 1 else ""
  return [f"{lines[0]}, not merged{count}; if it holds codes of quantized weights, {_REMEDY}."]


def _difference(first: tuple[str, str, Tensor | None], *others: Any) -> str | None:
  name, model, tensor = first
  if tensor is None or tensor.dtype.kind not in "iu" or len(tensor.shape) < 2:
    return None
  for _, other, theirs in others:
    if theirs is not None and not _alike(tensor, theirs):
      what = f"tensor {name!r} is {tensor.dtype} and differs between {model} and {other}"
      return f"{what}: it is copied from {model}"
  return None


def _alike(a: Tensor, b: Tensor) -> bool:
  """Returns whether two tensors have equal entries; true for one that does not exist yet."""
  size = math.prod(a.shape)
  try:
    for start in range(0, size if a.shape == b.shape else 0, _SLICE):
      x, y = (np.empty(min(_SLICE, size - start), t.dtype) for t in (a, b))
      a.read(start, x)
      b.read(start, y)
      if not np.array_equal(x, y):
        return False
  except NotYetMade:
    return True
  return a.shape == b.shape


def _is_bare(name: str, tensor: Tensor, is_declared: bool) -> bool:
  """Returns whether a matrix holds codes although no other tensor belongs to it."""
  if tensor.dtype.kind == "b":
    return False
  if safetensors.is_floating(tensor.dtype):
    packed = tensor.shape[1:] == (1,) and _WEIGHT.search(name) is not None
    return is_declared and (tensor.dtype.itemsize == 1 or packed)
  return _BUFFER.search(name) is None if is_declared else _WEIGHT.search(name) is not None


def _is_whole(name: str, tensors: Mapping[str, Tensor]) -> bool:
  """Returns whether the first entries of a scaled float matrix are integers, as codes are."""
  scaled = any(f"{name}{end}" in tensors for end in ("_scale", "_scale_inv"))
  if not scaled or name not in tensors or len(tensors[name].shape) < 2:
    return False
  first = first_entries(tensors[name]).astype(np.float64)
  return bool((first == np.rint(first)).all() and (np.abs(first) > 1).any())


def first_entries(tensor: Tensor) -> np.ndarray:
  """Returns the first entries of a tensor; empty for a model that does not exist yet."""
  first = np.zeros(min(_FIRST, math.prod(tensor.shape)), tensor.dtype)
  try:
    tensor.read(0, first)
  except NotYetMade:
    return first[:0]
  return first


def _source(config: Mapping[str, Any], folder: pathlib.Path) -> str | None:
  """Returns the config key or file that declares a model quantized."""
  parts = {"": config, **{f"{k}.": v for k, v in config.items() if isinstance(v, Mapping)}}
  keys = (f"{part}{key}" for part, values in parts.items() for key in _KEYS if values.get(key))
  files = (name for name in _FILES if (folder / name).is_file())
  return next(iter((*(f"{key} of its config" for key in keys), *files)), None)
