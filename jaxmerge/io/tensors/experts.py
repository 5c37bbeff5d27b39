"""Experts of a layer as one tensor, [experts, out, in], and as one matrix each: two forms of one.

Files of most mixtures of experts hold a matrix each, and models in memory one tensor; adapters and
merged models come with the names of either.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxmerge.io.tensors import pieces
from jaxmerge.io.tensors.tensor import Tensor, compute_dtype, widen

# Of a fused tensor, the matrices of an expert that lie in it, one below the other.
_PARTS = {
  "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
  "down_proj": (("down_proj",), ("w2",)),
}
_SINGLE = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d{1,6})\.(?P<part>\w+)\.weight")
_FUSED = re.compile(r"(?P<experts>.+\.experts)\.(?P<part>gate_up_proj|down_proj)")


class Stretch(NamedTuple):
  """Neighbouring entries of a stored tensor, and where they lie in the other form.

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
  """A tensor in the form in which it is not stored, and where its entries lie."""

  tensor: Tensor
  stretches: tuple[Stretch, ...]


def forms(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
  """Returns the fused tensors of single experts that are stored, and the single ones of fused."""
  return {**_fused(tensors), **_singles(tensors)}


def _fused(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
  """Fused tensors, where all experts are there and alike."""
  counts: dict[str, int] = {}
  for name in tensors:
    if found := _SINGLE.fullmatch(name):
      counts[found["experts"]] = max(counts.get(found["experts"], 0), int(found["number"]) + 1)
  made = {}
  for experts, count in counts.items():
    for fused, spellings in _PARTS.items():
      for parts in spellings:
        names = [f"{experts}.{e}.{part}.weight" for e in range(count) for part in parts]
        own = [tensors[n] for n in names if n in tensors]
        if len(own) == len(names) and len({(t.shape, t.dtype) for t in own}) == 1:
          made[f"{experts}.{fused}"] = _one(names, own, count)
  return made


def _one(names: list[str], own: list[Tensor], count: int) -> Form:
  (rows, *rest), size = own[0].shape, math.prod(own[0].shape)
  shape = (count, rows * len(own) // count, *rest)
  stretches = (Stretch(n, 0, i * size, own[0].shape) for i, n in enumerate(names))
  return Form(pieces.concatenate(own, shape), tuple(stretches))


def _singles(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
  """Single experts of fused tensors; those that lie [experts, in, out] do not fit what is added."""
  made = {}
  for name, tensor in tensors.items():
    found = _FUSED.fullmatch(name)
    if found is None or len(tensor.shape) != 3:
      continue
    count, rows, columns = tensor.shape
    for parts in _PARTS[found["part"]]:
      height, odd = divmod(rows, len(parts))
      for number in range(0 if odd else count * len(parts)):
        expert, part = divmod(number, len(parts))
        start = number * height * columns
        single = f"{found['experts']}.{expert}.{parts[part]}.weight"
        own = Stretch(name, start, 0, (height, columns))
        made[single] = Form(pieces.stretch(tensor, start, own.shape), (own,))
  return made


def replace(
  tensors: Mapping[str, Tensor], changed: Mapping[str, Tensor], known: Mapping[str, Form]
) -> dict[str, Tensor]:
  """Returns changed tensors in the form in which they are stored.

  Args:
    tensors: as they are stored.
    changed: some of these, or of `known`.
    known: the other forms.
  """
  made = {name: tensor for name, tensor in changed.items() if name in tensors}
  patches: dict[str, list[tuple[Stretch, Tensor]]] = {}
  for name in changed.keys() - made.keys():
    for own in known[name].stretches:
      patches.setdefault(own.name, []).append((own, changed[name]))
  return made | {name: _patched(tensors[name], own) for name, own in patches.items()}


def _patched(tensor: Tensor, patches: Iterable[tuple[Stretch, Tensor]]) -> Tensor:
  """A stored tensor of which some stretches are those of others, in float32 or wider."""
  ordered = sorted(patches, key=lambda patch: patch[0].start)
  parts, done, where = list[Tensor](), 0, tensor.where
  whole = widen(tensor, compute_dtype(tensor, *(source for _, source in ordered)))
  for own, source in ordered:
    if own.start > done:
      parts.append(pieces.stretch(whole, done, (own.start - done,)))
    parts.append(pieces.stretch(widen(source, whole.dtype), own.at, own.shape))
    done, where = own.start + math.prod(own.shape), source.where
  size = math.prod(tensor.shape)
  if done < size:
    parts.append(pieces.stretch(whole, done, (size - done,)))
  made = pieces.concatenate(parts, tensor.shape)
  return made._replace(where=where, store_as=tensor.stored_dtype)
