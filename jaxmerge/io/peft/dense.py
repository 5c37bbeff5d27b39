"""Adapters other than LoRA: whole matrices, which `formulas` computes when they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from jaxmerge.io.peft import formulas
from jaxmerge.io.peft.base import Base, Target
from jaxmerge.io.peft.settings import MERGE, Settings, shown
from jaxmerge.io.tensors import pieces, safetensors
from jaxmerge.io.tensors.tensor import Tensor

Compute = Callable[[np.ndarray], np.ndarray]
_FLOAT = np.dtype(np.float32)
_NEEDED = {
  "IA3": [{"ia3_l"}],
  "LOHA": [{f"hada_w{i}_{x}" for i in "12" for x in "ab"}],
  "LOKR": [
    first | second
    for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
    for second in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
  ],
  "OFT": [{"oft_R.weight"}],
  "BOFT": [{"boft_R", "boft_s"}],
  "VERA": [{"vera_lambda_b", "vera_lambda_d"}],
}
_NEEDED["LOHA"].append(_NEEDED["LOHA"][0] | {"hada_t1", "hada_t2"})


def change(
  base: Base, target: Target, shared: Mapping[str, Tensor], config: Settings, wholes: pieces.Wholes
) -> None:
  """Changes a tensor of a base, and with IA3 its bias.

  Raises:
    ValueError: naming the part that is missing or does not fit.
  """
  if target.parts.keys() not in _NEEDED.get(config.kind, []):
    raise ValueError(
      f"{target.where}: module {target.module!r} has {', '.join(target.parts)}, which are not the "
      f"parts of {config.kind}."
    )
  for tensor in (target.tensor, *target.parts.values()):
    if not safetensors.is_floating(tensor.dtype) or 0 in tensor.shape:
      raise ValueError(f"{tensor.where}: is {tensor.dtype}{list(tensor.shape)}, no weights.")
  added = target.where.partition(": tensor")[0]
  compute = _KINDS[config.kind](base, target, shared, config, wholes)
  base.changed[target.name] = wholes.tensor(target.tensor, compute, added)


def _misfit(target: Target, sizes: object) -> ValueError:
  return ValueError(
    f"{target.where}: is for a matrix {sizes}; it is {list(target.tensor.shape)} in "
    f"{target.tensor.where}."
  )


def _load(target: Target) -> dict[str, np.ndarray]:
  return {name: pieces.load(x, _FLOAT) for name, x in target.parts.items()}


def _is_transposed(target: Target, config: Settings, out: int, inner: int) -> bool:
  """Returns whether a matrix is stored as [in, out]; raises ValueError for other sizes."""
  shape = target.tensor.shape
  swapped = bool(config.values["fan_in_fan_out"])
  if shape == (out, inner) == (inner, out):
    return swapped
  if shape not in ((out, inner), (inner, out)):
    raise _misfit(target, [out, inner])
  return shape == (inner, out)


# --- One function per kind: it checks sizes, and returns a function for the whole matrix ---


def _lycoris(
  base: Base, target: Target, shared: object, config: Settings, wholes: pieces.Wholes
) -> Compute:
  shapes = {name: x.shape for name, x in target.parts.items()}
  sizes = _loha_sizes(shapes) if config.kind == "LOHA" else _lokr_sizes(shapes)
  shape = target.tensor.shape
  if len(shape) < 2 or sizes != (shape[0], math.prod(shape[1:])):
    raise _misfit(target, list(sizes))
  scale, formula = np.float32(config.scale(target.module)), getattr(formulas, config.kind.lower())
  return lambda x: x + scale * formula(_load(target)).reshape(x.shape)


def _loha_sizes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
  a, b, core = shapes["hada_w1_a"], shapes["hada_w1_b"], shapes.get("hada_t1")
  return (a[0], b[1]) if core is None else (a[1], b[1] * math.prod(core[2:]))


def _lokr_sizes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
  """Returns the rows and columns of a Kronecker product."""
  sizes = []
  for i in "12":
    whole, a, b = (shapes.get(f"lokr_w{i}{x}") for x in ("", "_a", "_b"))
    core = shapes.get("lokr_t2") if i == "2" else None
    if a is None or b is None:
      assert whole is not None
      sizes.append((whole[0], math.prod(whole[1:])))
    else:
      sizes.append((a[0], b[1]) if core is None else (a[1], b[1] * math.prod(core[2:])))
  return sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1]


def _ia3(
  base: Base, target: Target, shared: object, config: Settings, wholes: pieces.Wholes
) -> Compute:
  """Returns a function that scales outputs, or the inputs of feed-forward layers, by a vector.

  Liu et al. 2022, (IA)^3 (arXiv:2205.05638).
  """
  vector, shape = target.parts["ia3_l"], target.tensor.shape
  inputs = _is_feedforward(target, config)
  count = math.prod(vector.shape)
  axis = 1 if inputs else 0
  if len(shape) == 2 and (shape[0] != shape[1] or config.values["fan_in_fan_out"]):
    swapped = config.values["fan_in_fan_out"] if count == shape[1 - axis] else shape[axis] != count
    axis = 1 - axis if swapped else axis
  if len(shape) < 2 or shape[axis] != count:
    raise _misfit(target, f"of {count} {'inputs' if inputs else 'outputs'}")
  places = [count if i == axis else 1 for i in range(len(shape))]
  name = f"{target.name.removesuffix('.weight')}.bias"
  if not inputs and name in base.tensors:
    times = lambda x: x * pieces.load(vector, _FLOAT).reshape(x.shape)  # noqa: E731
    base.changed[name] = wholes.tensor(base.tensor(name), times, vector.where)
  return lambda x: x * pieces.load(vector, _FLOAT).reshape(places)


def _is_feedforward(target: Target, config: Settings) -> bool:
  """Returns whether a vector scales inputs: by its shape, or for a kernel by the config."""
  shape = target.parts["ia3_l"].shape
  if len(shape) == 2 and 1 in shape and shape != (1, 1):
    return shape[0] == 1
  modules = config.values.get("feedforward_modules") or []
  if not isinstance(modules, list):
    raise config.refusal("feedforward_modules", "must list modules where kernels are adapted")
  return any(target.module == end or target.module.endswith(f".{end}") for end in modules)


def _vera(
  base: Base, target: Target, shared: Mapping[str, Tensor], config: Settings, wholes: pieces.Wholes
) -> Compute:
  if shared.keys() != {"vera_A", "vera_B"}:
    raise config.refusal("save_projection", "left out vera_A and vera_B, which PEFT redraws")
  a, b = shared["vera_A"], shared["vera_B"]
  outer, inner = (target.parts[f"vera_lambda_{x}"].shape for x in "bd")
  shape = target.tensor.shape
  if len(shape) != 2 or outer[0] not in shape:
    raise _misfit(target, f"of {outer[0]} outputs")
  other = shape[1] if shape[0] == outer[0] else shape[0]
  swapped = _is_transposed(target, config, outer[0], other)
  if (
    a.shape[0] != inner[0] or b.shape[1] != inner[0] or a.shape[1] < other or b.shape[0] < outer[0]
  ):
    raise _misfit(target, f"of at most {[b.shape[0], a.shape[1]]}, by {a.where}")

  def compute(x: np.ndarray) -> np.ndarray:
    parts = _load(target) | {n: pieces.load(t, _FLOAT) for n, t in shared.items()}
    delta = formulas.vera(parts, other)
    return x + (delta.T if swapped else delta)

  return compute


def _oft(
  base: Base, target: Target, shared: object, config: Settings, wholes: pieces.Wholes
) -> Compute:
  if config.values["fan_in_fan_out"]:
    raise config.refusal("fan_in_fan_out", f"is not supported for {config.kind}")
  blocks, upper = target.parts["oft_R.weight"].shape
  size, shape = (1 + math.isqrt(1 + 8 * upper)) // 2, target.tensor.shape
  columns = math.prod(shape[1:])
  shared = config.values["block_share"] and blocks == 1 and columns % size == 0
  if size * (size - 1) // 2 != upper or not (shared or blocks * size == columns):
    raise _misfit(target, f"of {blocks * size} inputs")
  terms, eps = _series_terms(config), _limit(config)

  def compute(x: np.ndarray) -> np.ndarray:
    flat = x.reshape(len(x), -1)
    return formulas.oft(flat, _load(target), eps=eps, terms=terms).reshape(x.shape)

  return compute


def _series_terms(config: Settings) -> int | None:
  series = config.values.get("use_cayley_neumann")
  if not isinstance(series, bool):  # Its default has changed.
    raise config.refusal("use_cayley_neumann", "must be true or false")
  terms = config.values.get("num_cayley_neumann_terms", 5)
  if type(terms) is not int or not 1 <= terms <= 100:
    raise config.refusal("num_cayley_neumann_terms", "must be from 1 to 100")
  return terms if series else None


def _limit(config: Settings) -> float | None:
  eps = config.values.get("eps", 6e-5)
  if not config.values["coft"]:
    return None
  if type(eps) not in (int, float) or not 0 <= eps < 1e9:
    raise ValueError(f"{config.path}: eps must be a number, 0 or more, got {shown(eps)}.")
  return float(eps)


def _boft(
  base: Base, target: Target, shared: object, config: Settings, wholes: pieces.Wholes
) -> Compute:
  factors, *blocks = target.parts["boft_R"].shape
  shape = target.tensor.shape
  if factors != 1:
    raise config.refusal("boft_n_butterfly_factor", "is not supported, only 1")
  if config.values["fan_in_fan_out"] or len(shape) != 2:
    raise ValueError(f"{target.where}: BOFT of this layer is not supported; {MERGE}.")
  scales = math.prod(target.parts["boft_s"].shape)
  if len(blocks) != 3 or blocks[1] != blocks[2] or (scales, blocks[0] * blocks[1]) != shape:
    raise _misfit(target, f"of {scales} outputs, and blocks {blocks} of inputs")
  return lambda x: formulas.boft(x, _load(target))


_KINDS = {
  "IA3": _ia3, "LOHA": _lycoris, "LOKR": _lycoris, "VERA": _vera, "OFT": _oft, "BOFT": _boft,
}  # fmt: skip
