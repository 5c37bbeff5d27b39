"""Converts between fused experts, one tensor [experts, out, in], and one matrix per expert.

Most mixture-of-experts files store one matrix per expert, and models in memory one fused tensor.
Adapters and merged models use the names of either.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxmerge.io.tensors import pieces
from jaxmerge.io.tensors.tensor import Tensor, compute_dtype, widen

# Matrices of an expert that a fused tensor stacks, in this order.
_PARTS = {
  "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
  "down_proj": (("down_proj",), ("w2",)),
}
_SINGLE = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d{1,6})\.(?P<part>\w+)\.weight")
_FUSED = re.compile(r"(?P<experts>.+\.experts)\.(?P<part>gate_up_proj|down_proj)")


class Stretch(NamedTuple):
  """A contiguous range of a stored tensor, and its place in the other form.

  Attributes:
    name: the stored tensor.
    start: entries of it before.
    at: entries of the other form before.
    shape: of these.
  """

  name: str
  start: int
  at: int
  shape: tuple[int, ...]


class Form(NamedTuple):
  """A tensor in the form that is not stored, and where its entries are stored."""

  tensor: Tensor
  stretches: tuple[Stretch, ...]


def forms(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
  """Returns fused views of experts that are stored singly, and single views of fused ones."""
  return {**_fused_forms(tensors), **_single_forms(tensors)}


def _fused_forms(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
  """Returns a fused view of single experts, where all exist and have one shape and dtype."""
  counts: dict[str, int] = {}
  for name in tensors:
    if match := _SINGLE.fullmatch(name):
      counts[match["experts"]] = max(counts.get(match["experts"], 0), int(match["number"]) + 1)
  forms = {}
  for experts, count in counts.items():
    for fused, spellings in _PARTS.items():
      for parts in spellings:
        names = [f"{experts}.{e}.{part}.weight" for e in range(count) for part in parts]
        matrices = [tensors[n] for n in names if n in tensors]
        is_complete = len(matrices) == len(names)
        if is_complete and len({(t.shape, t.dtype) for t in matrices}) == 1:
          forms[f"{experts}.{fused}"] = _fuse(names, matrices, count)
  return forms


def _fuse(names: list[str], matrices: list[Tensor], count: int) -> Form:
  (rows, *rest), size = matrices[0].shape, math.prod(matrices[0].shape)
  shape = (count, rows * len(matrices) // count, *rest)
  stretches = (Stretch(n, 0, i * size, matrices[0].shape) for i, n in enumerate(names))
  return Form(pieces.concatenate(matrices, shape), tuple(stretches))


def _single_forms(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
  """Returns single experts of fused tensors; those [experts, in, out] do not fit."""
  forms = {}
  for name, tensor in tensors.items():
    match = _FUSED.fullmatch(name)
    if match is None or len(tensor.shape) != 3:
      continue
    count, rows, columns = tensor.shape
    for parts in _PARTS[match["part"]]:
      height, odd = divmod(rows, len(parts))
      for number in range(0 if odd else count * len(parts)):
        expert, part = divmod(number, len(parts))
        start = number * height * columns
        single = f"{match['experts']}.{expert}.{parts[part]}.weight"
        stretch = Stretch(name, start, 0, (height, columns))
        forms[single] = Form(pieces.stretch(tensor, start, stretch.shape), (stretch,))
  return forms


def replace(
  tensors: Mapping[str, Tensor], changed: Mapping[str, Tensor], known: Mapping[str, Form]
) -> dict[str, Tensor]:
  """Returns changed tensors in their stored form.

  Args:
    tensors: as they are stored.
    changed: some of these, or of `known`.
    known: the other forms.
  """
  stored = {name: tensor for name, tensor in changed.items() if name in tensors}
  patches: dict[str, list[tuple[Stretch, Tensor]]] = {}
  for name in changed.keys() - stored.keys():
    for stretch in known[name].stretches:
      patches.setdefault(stretch.name, []).append((stretch, changed[name]))
  return stored | {name: _patch(tensors[name], each) for name, each in patches.items()}


def _patch(tensor: Tensor, patches: Iterable[tuple[Stretch, Tensor]]) -> Tensor:
  """Replaces ranges of a stored tensor, in float32 or wider."""
  ordered = sorted(patches, key=lambda patch: patch[0].start)
  parts, done, where = list[Tensor](), 0, tensor.where
  whole = widen(tensor, compute_dtype(tensor, *(source for _, source in ordered)))
  for stretch, source in ordered:
    if stretch.start > done:
      parts.append(pieces.stretch(whole, done, (stretch.start - done,)))
    parts.append(pieces.stretch(widen(source, whole.dtype), stretch.at, stretch.shape))
    done, where = stretch.start + math.prod(stretch.shape), source.where
  size = math.prod(tensor.shape)
  if done < size:
    parts.append(pieces.stretch(whole, done, (size - done,)))
  patched = pieces.concatenate(parts, tensor.shape)
  return patched._replace(where=where, store_as=tensor.stored_dtype)
