"""What mergekit 0.1.5 computes from `synthetic_models`, recorded; see README.md beside this file.

Tests need neither torch nor mergekit: `load` reads what `record.py` wrote.
"""

import functools
import json
import pathlib
from typing import NamedTuple

import numpy as np
import synthetic_models

from mergekit_outputs.cases import CASES, RANDOM

__all__ = [
  "CASES",
  "EPS",
  "HERE",
  "RANDOM",
  "Kept",
  "facts",
  "kept",
  "load",
  "models",
  "moments",
  "positions",
  "read",
]

HERE = pathlib.Path(__file__).parent
SAMPLES = 32
EPS = float(np.finfo(np.float32).eps)


class Kept(NamedTuple):
  """What is kept of a merged tensor; of all tensors of a merge, one after the other, in files.

  Attributes:
    samples: entries at `positions`.
    largest: the largest magnitude.
    moved: how many entries differ from the base by more than 8 units of rounding of the largest.
    total: the sum, in double precision.
  """

  samples: np.ndarray
  largest: np.ndarray
  moved: np.ndarray
  total: np.ndarray


def positions(name, size):
  """Flat positions of the samples of a tensor: by hash, all where there are few."""
  if size <= SAMPLES:
    return np.arange(size)
  return synthetic_models.hashed("samples", name, (SAMPLES,)) % np.uint64(size)


def kept(name, x, base):
  """Reduces a merged tensor to what is recorded; each field is an array, for a file."""
  wide = np.asarray(x, np.float64)
  largest = np.abs(wide).max()
  return Kept(
    np.asarray(x, np.float32).reshape(-1)[positions(name, wide.size)],
    np.float32([largest]),
    np.int32([(np.abs(wide - base) > 8 * EPS * largest).sum()]),
    np.float64([wide.sum()]),
  )


@functools.cache
def read(method):
  """Returns the arrays of a method's file: "base/field" -> array, one row a case."""
  with np.load(HERE / f"{method}.npz") as file:
    return dict(file)


def load(case, base):
  """Returns what is kept of a case: tensor -> Kept.

  Args:
    case: name of a case.
    base: "llama" or "minilm".
  """
  own = read(CASES[case].method)
  at = own[f"{base}/cases"].tolist().index(case)
  rows = Kept(*(own[f"{base}/{field}"][at] for field in Kept._fields))
  out, start = {}, 0
  for i, (name, x) in enumerate(models(base)["base"].items()):
    stop = start + len(positions(name, x.size))
    out[name] = Kept(rows.samples[start:stop], *(float(v[i]) for v in rows[1:]))
    start = stop
  return out


def moments(merged, tau):
  """Measures a randomly thinned task vector by the whole one.

  Returns its mean, its sum of magnitudes by that of tau, the share of entries that are not zero,
  and that share in each quarter of every row, by magnitude from small to large.
  """
  rows = tau.reshape(-1, tau.shape[-1])
  order = np.argsort(np.abs(rows), axis=1, kind="stable")
  ranked = np.take_along_axis(merged.reshape(rows.shape) != 0, order, axis=1)
  quarters = [part.mean() for part in np.array_split(ranked, 4, axis=1)]
  size = np.abs(merged).sum() / np.abs(tau).sum()
  return [float(v) for v in (merged.mean(), size, ranked.mean(), *quarters)]


@functools.cache
def facts():
  """What raised, what is not finite, and moments of random masks."""
  return json.loads((HERE / "facts.json").read_text(encoding="utf-8"))


@functools.cache
def models(base):
  """The base, called "base", and its fine-tuned models: model -> tensor -> array."""
  own = synthetic_models.BASES[base]()
  tuned = {m: synthetic_models.fine_tuned(own, m) for m in synthetic_models.FINE_TUNED}
  return {"base": own, **tuned}
