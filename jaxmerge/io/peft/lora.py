"""LoRA of matrices, kernels, embeddings and experts: checks the parts of a layer."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from jaxmerge.io.peft import formulas, low_rank
from jaxmerge.io.peft.base import Base, Target
from jaxmerge.io.peft.parts import MAGNITUDE
from jaxmerge.io.peft.settings import MERGE, Settings, shown
from jaxmerge.io.tensors import pieces, safetensors
from jaxmerge.io.tensors.tensor import Tensor

_FLOAT = np.dtype(np.float32)


class Rows:
  """LoRA layers, whose matrices are computed row by row."""

  def __init__(self, config: Settings):
    self.config = config
    self.layers: dict[str, low_rank.Layer] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.experts: dict[str, list[str]] = {}
    self.plain: list[low_rank.Layer] = []

  def add(self, base: Base, target: Target, wholes: pieces.Wholes) -> None:
    """Adds a module's matrix; changes its bias immediately.

    Raises:
      ValueError: naming the part that is missing or does not fit.
    """
    pair = self._pair(target)
    a, b = (target.parts[name] for name in pair)
    if "lora_E" in target.parts:
      a = _with_weights(a, target.parts["lora_E"])
    if len(target.tensor.shape) == 3 and len(a.shape) == 2:
      self._add_experts(target, a, b)
      return
    embedding = "embedding" in pair[0]
    matrix, a, b = (_as_matrix(t) for t in (target.tensor, a, b))
    _check(target, matrix, a, b, embedding)
    transposed = embedding or self._is_transposed(matrix, a, b)
    magnitude = self._magnitude(target, b)
    matrix = self._start(target, matrix, transposed, wholes)
    layer = low_rank.Layer(matrix, a, b, magnitude, self._scale(target, a), transposed)
    self.layers[target.name], self.shapes[target.name] = layer, target.tensor.shape
    if not embedding:
      self.plain.append(layer)
    if "lora_B.bias" in target.parts:
      self._add_bias(base, target, layer.scale, wholes)

  def tensors(self) -> dict[str, Tensor]:
    """Returns the changed tensors by name."""
    _check_square(self.plain, self.config)
    matrices = low_rank.add(self.layers)
    tensors = {n: matrices[n]._replace(shape=shape) for n, shape in self.shapes.items()}
    for name, parts in self.experts.items():
      experts = [matrices[part] for part in parts]
      tensors[name] = pieces.concatenate(experts, (len(experts), *experts[0].shape))
    return tensors

  def _pair(self, target: Target) -> list[str]:
    """Returns the names of the factors; raises ValueError for missing or surplus parts."""
    parts, config = target.parts, self.config
    if any("embedding" in part for part in parts):
      pair = ["lora_embedding_A", "lora_embedding_B"]
    else:
      pair = (
        ["lora_A", "lora_B"] if config.kind == "ADALORA" else ["lora_A.weight", "lora_B.weight"]
      )
    wanted = (
      pair + [MAGNITUDE] * config.values["use_dora"] + ["lora_E"] * (config.kind == "ADALORA")
    )
    wanted += ["lora_B.bias"] * (config.values["lora_bias"] and pair[0] == "lora_A.weight")
    if parts.keys() != set(wanted):
      raise ValueError(
        f"{target.where}: module {target.module!r} has {', '.join(parts)}, but needs "
        f"{', '.join(wanted)}, as use_dora is {config.values['use_dora']} and lora_bias "
        f"{config.values['lora_bias']} in {config.path.name}."
      )
    return pair

  def _scale(self, target: Target, a: Tensor) -> float:
    """Returns the factor on B @ A."""
    config = self.config
    if config.kind == "ADALORA":
      numbers = [config.values.get("lora_alpha", 8), config.values.get("init_r", 12)]
      if not all(type(x) in (int, float) and 0 < x < 1e9 for x in numbers):
        raise ValueError(
          f"{config.path}: lora_alpha and init_r must be numbers above 0, got {shown(numbers)}."
        )
      return numbers[0] / (numbers[1] + 1e-5)
    rank = config.rank(target.module)
    if a.shape[0] != rank:
      raise ValueError(f"{a.where}: its rank is {a.shape[0]}, but {rank} by r or rank_pattern.")
    return config.scale(target.module)

  def _is_transposed(self, matrix: Tensor, a: Tensor, b: Tensor) -> bool:
    swapped = (a.shape[1], b.shape[0])
    square = matrix.shape == swapped == swapped[::-1]
    return bool(self.config.values["fan_in_fan_out"]) if square else matrix.shape == swapped

  def _magnitude(self, target: Target, b: Tensor) -> Tensor | None:
    magnitude = target.parts.get(MAGNITUDE)
    if magnitude is None:
      return None
    if math.prod(magnitude.shape) != b.shape[0] or max(magnitude.shape) != b.shape[0]:
      raise ValueError(
        f"{magnitude.where}: must be {list(b.shape[:1])}, is {list(magnitude.shape)}."
      )
    return magnitude._replace(shape=b.shape[:1])

  def _start(
    self, target: Target, matrix: Tensor, transposed: bool, wholes: pieces.Wholes
  ) -> Tensor:
    """Returns the matrix to add the adapter to; for PiSSA and OLoRA minus the initial adapter."""
    start = self.config.values.get("init_lora_weights")
    if start not in ("pissa", "olora"):
      return matrix
    if len(target.tensor.shape) != 2 or self.config.values["use_dora"]:
      raise self.config.refusal("init_lora_weights", "is supported for plain LoRA of matrices")
    if start == "olora" and transposed:
      raise self.config.refusal(
        "init_lora_weights", "is not supported for matrices stored as [in, out]"
      )
    rank, scale = self.config.rank(target.module), self.config.scale(target.module)
    dtype = matrix.stored_dtype

    def subtract_start(x: np.ndarray) -> np.ndarray:
      x = formulas.residual(x.T if transposed else x, rank, scale, start)
      return (x.T if transposed else x).astype(dtype).astype(x.dtype)  # As rounded in training.

    return wholes.tensor(matrix, subtract_start, f"what {start} began with taken off")

  def _add_bias(self, base: Base, target: Target, scale: float, wholes: pieces.Wholes) -> None:
    added = target.parts["lora_B.bias"]
    name = f"{target.name.removesuffix('.weight')}.bias"
    if name not in base.tensors or base.tensor(name).shape != added.shape:
      raise ValueError(f"{added.where}: the base has no {name!r} of shape {list(added.shape)}.")
    add = lambda x: x + np.float32(scale) * pieces.load(added, _FLOAT)  # noqa: E731
    base.changed[name] = wholes.tensor(base.tensor(name), add, added.where)

  def _add_experts(self, target: Target, a: Tensor, b: Tensor) -> None:
    """Adds the experts of a fused tensor, each of which is a matrix with separate factors."""
    (count, *shape), rank = target.tensor.shape, self.config.rank(target.module)
    if a.shape[0] != rank * count or b.shape[1] != rank * count:
      raise ValueError(
        f"{a.where}: A is {list(a.shape)} and B {list(b.shape)}, but the rank is {rank} for each "
        f"of the {count} experts of {target.tensor.where}."
      )
    plain, swapped = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
    fits = [form for form in dict.fromkeys((plain, swapped)) if form == tuple(shape)]
    if not fits or plain == swapped:
      raise ValueError(
        f"{a.where}: A is {list(a.shape)} and B {list(b.shape)}, which does not determine whether "
        f"experts are [out, in] or [in, out] in {target.tensor.where}, which is "
        f"{list(target.tensor.shape)}; {MERGE}."
      )
    whole = functools.lru_cache(1)(lambda: pieces.load(b, _FLOAT).reshape(-1, rank, count))
    size, names = math.prod(shape), []
    for e in range(count):
      left = _lazy(b, (b.shape[0], rank), lambda e=e: whole()[:, :, e])
      matrix = pieces.stretch(target.tensor, e * size, tuple(shape))
      right = pieces.stretch(a, e * rank * a.shape[1], (rank, a.shape[1]))
      names.append(f"{target.name}[{e}]")
      scale = self.config.scale(target.module)
      self.layers[names[-1]] = low_rank.Layer(matrix, right, left, None, scale, fits[0] != plain)
    self.experts[target.name] = names


def _lazy(like: Tensor, shape: tuple[int, ...], compute) -> Tensor:
  def read(start: int, out: np.ndarray) -> None:
    out[...] = np.ascontiguousarray(compute()).reshape(-1)[start : start + out.size]

  return Tensor(like.where, _FLOAT, shape, read)


def _with_weights(a: Tensor, e: Tensor) -> Tensor:
  """Returns AdaLoRA's right factor with scaled rows (Zhang et al. 2023, arXiv:2303.10512)."""
  if e.shape != (a.shape[0], 1):
    raise ValueError(f"{e.where}: must be {[a.shape[0], 1]}, is {list(e.shape)}.")
  return _lazy(a, a.shape, lambda: pieces.load(a, _FLOAT) * pieces.load(e, _FLOAT))


def _as_matrix(tensor: Tensor) -> Tensor:
  """Returns a kernel [out, in, ...], or a factor of one, as a matrix [out, in * ...]."""
  if len(tensor.shape) <= 2:
    return tensor
  return tensor._replace(shape=(tensor.shape[0], math.prod(tensor.shape[1:])))


def _check(target: Target, matrix: Tensor, a: Tensor, b: Tensor, embedding: bool) -> None:
  """Raises ValueError if A, B and the base's matrix do not fit each other."""
  for tensor in (matrix, a, b):
    if not safetensors.is_floating(tensor.dtype):
      raise ValueError(f"{tensor.where}: is {tensor.dtype}; use weights that are not quantized.")
    if len(tensor.shape) != 2:
      raise ValueError(f"{tensor.where}: is {list(tensor.shape)}, not a matrix; {MERGE}.")
  if a.shape[0] != b.shape[1]:
    raise ValueError(f"{a.where}: its rank is {a.shape[0]}, but {b.shape[1]} in {b.where}.")
  plain, transposed = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
  kernel = len(target.tensor.shape) > 2
  fits = [transposed] if embedding else [plain] if kernel else [plain, transposed]
  if matrix.shape in fits:
    return
  if embedding and matrix.shape[1] == b.shape[0]:
    raise ValueError(
      f"{a.where}: adapts {a.shape[1]} rows, but {matrix.where} has {matrix.shape[0]}: the rows "
      "of added tokens are in no file; save the adapter with save_embedding_layers=True, or use "
      "the model with the resized embedding as the base."
    )
  raise ValueError(
    f"{a.where}: A is {list(a.shape)} and B {list(b.shape)}, which is for a matrix "
    f"{' or '.join(str(list(f)) for f in fits)}; it is {list(matrix.shape)} in {matrix.where}."
  )


def _check_square(layers: Sequence[low_rank.Layer], config: Settings) -> None:
  """Raises ValueError if the layout of a square matrix is unknown.

  PEFT sets fan_in_fan_out for each layer in turn and saves the last value. In a model with both
  kinds of layers, it is unreliable for the others.
  """
  square = [layer for layer in layers if layer.base.shape[0] == layer.base.shape[1]]
  wrong = [layer for layer in layers if layer.transposed != config.values["fan_in_fan_out"]]
  if square and wrong:
    raise ValueError(
      f"{square[0].a.where}: the base's matrix is square, and fan_in_fan_out does not determine "
      f"its layout, because it is wrong for {wrong[0].base.where}; {MERGE}."
    )
