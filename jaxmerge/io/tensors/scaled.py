"""Dequantizes weights in 8-bit floats with scales while their rows are read.

Scales are per tensor, per row, or per block, as stored by compressed-tensors, fbgemm, ModelOpt,
DeepSeek and ComfyUI. All of these multiply by the scale, even where its name says inverse.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple  # Any: values of a config.json.

import ml_dtypes
import numpy as np

from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Tensor

FLOAT8 = tuple(np.dtype(d) for d in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))
BLOCK = (128, 128)  # DeepSeek's block size, the default.
KEYS = ("quantization_config", "compression_config")
_ENDS = ("_scale", "_scale_inv")  # Suffixes to the name of a weight.
_BESIDE = ("scale_weight", "qscale_weight")  # Replace `weight` in its name.
# Scales of activations and of the key-value cache, which do not affect weights.
_ACTIVATIONS = re.compile(
  r"(?:^|[._])(?:input|activation|output)_scale(?:_ub)?$"
  r"|(?:^|[.])(?:(?:[kvq]|kv|prob|softmax)_scale|scale_input|qscale_act|scaled_fp8)$"
)
_STORED = ("bfloat16", "float16", "float32")


class Dequantized(NamedTuple):
  """A model with dequantized weights.

  Attributes:
    tensors: all tensors but the scales.
    scales: by name of a scale, the name of its weight; "" for a scale of activations.
    weights: names of the weights with a scale.
  """

  tensors: dict[str, Tensor]
  scales: dict[str, str]
  weights: tuple[str, ...]


class _Grid(NamedTuple):
  """The blocks of a weight; its scale is [lead, rows, columns], with an entry per block."""

  height: int  # Rows of a matrix.
  width: int  # Entries of a row.
  block: tuple[int, int]
  rows: int  # Rows of the scale, per matrix.
  columns: int

  def scale_row(self, row: int) -> int:
    """Returns the row of the scale for a row of all matrices."""
    matrix, inner = divmod(row, self.height)
    return matrix * self.rows + inner // self.block[0]


def dequantize(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Dequantized:
  """Multiplies weights in 8-bit floats by their scales, lazily.

  Weights without a scale, and weights in other quantized formats, are unchanged.

  Args:
    tensors: tensors of a model.
    config: its config.json, for the block size and the dtype of the result.

  Raises:
    ValueError: naming a scale whose shape does not fit its weight.
  """
  pairs = {name: scale for name, t in tensors.items() if (scale := _scale_of(name, t, tensors))}
  if not pairs:
    return Dequantized(dict(tensors), {}, ())
  dtype, block = stored_dtype(config), _block(config)
  scales = {scale: name for name, scale in pairs.items()}
  scales |= {name: "" for name in tensors if _ACTIVATIONS.search(name)}
  changed = {
    name: _product(t, tensors[pairs[name]], block, dtype) if name in pairs else t
    for name, t in tensors.items()
    if name not in scales
  }
  return Dequantized(changed, scales, tuple(pairs))


def stored_dtype(config: Mapping[str, Any]) -> np.dtype:
  """Returns the dtype in which a result stores dequantized weights: the config's, or bfloat16.

  >>> stored_dtype({"torch_dtype": "float16"}).name, stored_dtype({"dtype": "float8"}).name
  ('float16', 'bfloat16')
  """
  inner = [x for key in ("text_config", "llm_config") if isinstance(x := config.get(key), Mapping)]
  named = [part.get(key) for part in (config, *inner) for key in ("dtype", "torch_dtype")]
  name = next((str(x) for x in named if x in _STORED), "bfloat16")
  return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def strip(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a config without its quantization settings."""
  stripped: dict[str, Any] = {}
  for key, value in config.items():
    if key not in KEYS:
      stripped[key] = strip(value) if isinstance(value, Mapping) else value
  for key in ("dtype", "torch_dtype"):
    if str(stripped.get(key, "")).startswith("float8"):
      stripped[key] = "bfloat16"
  return stripped


def _scale_of(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> str | None:
  """Returns the name of the scale of a weight in 8-bit floats, if there is one."""
  if tensor.dtype not in FLOAT8 or f"{name}_zero_point" in tensors or f"{name}_scale_2" in tensors:
    return None
  stem = name.removesuffix("weight")
  beside = [f"{stem}{word}" for word in _BESIDE if stem != name]
  names = (*(name + end for end in _ENDS), *beside)
  # Scales of one byte are exponents (MX formats) or scaled themselves, so they are no factors.
  return next((n for n in names if n in tensors and _is_factor(tensors[n])), None)


def _is_factor(scale: Tensor) -> bool:
  return safetensors.is_floating(scale.dtype) and scale.dtype.itemsize > 1


def _block(config: Mapping[str, Any]) -> tuple[int, int]:
  """Returns the block size from a config, or the default."""
  for settings in _settings(config):
    size = settings.get("weight_block_size") or settings.get("block_structure")
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
      return size[0], size[1]
  return BLOCK


def _settings(value: Any) -> Iterator[Mapping[str, Any]]:
  """Yields the mappings in a config, outer ones first."""
  if isinstance(value, Mapping):
    yield value
    for inner in value.values():
      yield from _settings(inner)


def _grid(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> _Grid:
  """Returns the blocks of a weight, inferred from its shape and that of the scale."""
  *lead, height, width = (1, 1, *weight.shape)[-max(2, len(weight.shape)) :]
  shape, count = scale.shape, math.prod(scale.shape)
  whole = (height, width)
  if count == 1:
    return _Grid(math.prod(lead) * height, width, (math.prod(lead) * height, width), 1, 1)
  if not lead and shape in ((height,), (height, 1)):
    return _Grid(height, width, (1, width), height, 1)
  if lead and count == math.prod(lead) and shape[: len(lead)] == tuple(lead):
    return _Grid(height, width, whole, 1, 1)
  if len(shape) == len(lead) + 2 and shape[:-2] == tuple(lead):
    rows, columns = shape[-2:]
    step = tuple(
      1 if n == size else size if n == 1 else b
      for n, size, b in zip((rows, columns), whole, block, strict=True)
    )
    if (rows, columns) == tuple(-(-size // b) for size, b in zip(whole, step, strict=True)):
      return _Grid(height, width, (step[0], step[1]), rows, columns)
  raise ValueError(
    f"{scale.where}: its shape {list(shape)} does not fit a weight {list(weight.shape)}: not one "
    f"scale per tensor, row or column, nor per block of {block[0]} x {block[1]}; set "
    "weight_block_size in quantization_config of config.json."
  )


def _product(weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: np.dtype) -> Tensor:
  """Returns a weight times its scale, as a lazy float32 tensor."""
  grid = _grid(weight, scale, block)

  def read(start: int, out: np.ndarray) -> None:
    codes = np.empty(out.shape, weight.dtype)
    weight.read(start, codes)
    out[...] = codes
    done = 0
    while done < out.size:
      row, offset = divmod(start + done, grid.width)
      part = out[done : min(out.size, done + _run(grid, row, offset))]
      part *= _scales(scale, grid, row, offset, part.size)
      done += part.size

  where = f"{weight.where}, dequantized"
  return Tensor(where, np.dtype(np.float32), weight.shape, read, dtype)


def _run(grid: _Grid, row: int, offset: int) -> int:
  """Returns the number of entries from this position on that are multiplied at once."""
  if grid.columns == 1:  # A block is as wide as a row.
    left = grid.block[0] - row % grid.height % grid.block[0]
    left = min(left, grid.height - row % grid.height)
    return left * grid.width - offset
  return grid.width - offset


def _scales(scale: Tensor, grid: _Grid, row: int, offset: int, size: int) -> np.ndarray:
  """Returns the scales of entries of a row, or a single scale for all of them."""
  values = np.empty(grid.columns, scale.dtype)
  scale.read(grid.scale_row(row) * grid.columns, values)
  wide = values.astype(np.float32)
  if grid.columns == 1:
    return wide
  return np.repeat(wide, grid.block[1])[offset : offset + size]
