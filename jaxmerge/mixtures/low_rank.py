"""RMM: adapters of several tasks as a mean, shared directions, and coefficients per task."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple  # Any: arrays of jax, or of NumPy where loaded.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import errors
from jaxmerge.adapters.lora import Adapter, Lora, Swapped
from jaxmerge.adapters.peft import Path
from jaxmerge.core import double_precision, tree
from jaxmerge.drivers import arguments
from jaxmerge.io.disk import atomic
from jaxmerge.io.huggingface import folder
from jaxmerge.io.tensors import safetensors
from jaxmerge.methods import spectral

ABOUT = "bundle.json"
METHOD = "rmm"
_FILES = ("means", "bases", "coefficients")  # Each is a file NAME.safetensors.


class Reversible(NamedTuple):
  """Low-rank factors of n tasks, approximated at each position in an affine space of dimension p.

  A position is a column of a, or a row of b; both are vectors of length r, the rank.

  Attributes:
    names: names of the tasks.
    means: [positions, r] by factor, `MATRIX/a` or `MATRIX/b`.
    bases: [positions, r, p] by factor.
    coefficients: [n, positions, p] by factor.
    scales: scales of the adapters, [n] by matrix.
    swapped: the matrices that models store as [in, out], see `adapters.Swapped`.
  """

  names: tuple[str, ...]
  means: dict[str, Any]
  bases: dict[str, Any]
  coefficients: dict[str, Any]
  scales: dict[str, Any]
  swapped: frozenset[str] = frozenset()

  @double_precision.aware
  def for_task(self, name: str) -> dict[str, Lora]:
    """Returns the adapter of a task.

    Raises:
      ValueError: for a task that the bundle does not have.
    """
    if name not in self.names:
      raise ValueError(f"the bundle has no task {name!r}{errors.nearest(name, self.names)}.")
    k = self.names.index(name)

    def factor(key: str) -> Any:
      moved = jnp.einsum("xrp,xp->xr", self.bases[key], self.coefficients[key][k])
      return self.means[key] + moved

    return {
      matrix: (Swapped if matrix in self.swapped else Lora)(
        factor(f"{matrix}/a").T, factor(f"{matrix}/b"), scale[k]
      )
      for matrix, scale in self.scales.items()
    }


@double_precision.aware
def rmm(
  adapters: Sequence[Adapter] | Any, names: Sequence[str], *, components: int = 1
) -> Reversible:
  """Fits an affine space of dimension p to the tasks' vectors at each position of each factor.

  With `components` = min(rank, n - 1) the adapters are reproduced exactly. With fewer, the squared
  error is minimal and (p(r + n) + r) / (rn) of the factors' memory is needed.

  Experimental: the paper was read in part. Factors are compared entry by entry, though b @ a equals
  (b @ g) @ (inverse(g) @ a), so tasks should be tuned from the same initial a.

  Args:
    adapters: adapters of n tasks, with the same matrices and ranks.
    names: names of the tasks.
    components: directions p, from 0 (the mean alone) to min(rank, n - 1).

  Reference: Alipour and Amiri 2025, Towards reversible model merging (arXiv:2510.14163).

  Raises:
    ValueError: naming the matrix that adapters do not have in common, or a number out of range.

  Example:
    >>> a = jnp.eye(2)
    >>> tasks = [{"w": Lora(a, jnp.array([[1.0, 0.0]]))}, {"w": Lora(a, jnp.array([[3.0, 2.0]]))}]
    >>> print(np.asarray(rmm(tasks, ("cat", "dog")).for_task("dog")["w"].delta()).round(5))
    [[3. 2.]]
  """
  adapters, _ = arguments.adapters(adapters, None)
  n = len(adapters)
  if len(names) != n or len(set(names)) != n or not n:
    raise ValueError(f"{n} adapters need as many different names, got {list(names)}.")
  _check_same(dict(zip(names, adapters, strict=True)))
  rank = min((x.rank for x in adapters[0].values()), default=0)
  if not 0 <= components <= min(rank, n - 1):
    raise ValueError(
      f"components must be from 0 to {min(rank, n - 1)}, for {n} adapters of rank {rank}, got "
      f"{components}."
    )
  means, bases, coefficients, scales = {}, {}, {}, {}
  for m in adapters[0]:
    scales[m] = jnp.stack([jnp.asarray(each[m].scale, jnp.float32) for each in adapters])
    for key, x in (
      (f"{m}/a", jnp.stack([jnp.asarray(each[m].a).T for each in adapters], axis=2)),
      (f"{m}/b", jnp.stack([jnp.asarray(each[m].b) for each in adapters], axis=2)),
    ):
      means[key], bases[key], coefficients[key] = _plane(x, components)
  swapped = frozenset(m for m, x in adapters[0].items() if isinstance(x, Swapped))
  return Reversible(tuple(names), means, bases, coefficients, scales, swapped)


def _check_same(adapters: Mapping[str, Adapter]) -> None:
  """Raises ValueError, naming the matrix, for adapters without the same matrices and ranks."""
  (first_name, first), *others = adapters.items()
  for name, adapter in others:
    for m in sorted(adapter.keys() | first.keys()):
      here, there = ((x[m].a.shape, x[m].b.shape) if m in x else None for x in (adapter, first))
      if here != there:
        raise ValueError(
          f"matrix {m!r}: its factors are {here} in {name!r}, but {there} in {first_name!r}; all "
          "adapters need the same ones."
        )
      if type(adapter[m]) is not type(first[m]):
        raise ValueError(
          f"{m!r} lies [in, out] in {name!r} or {first_name!r}, [out, in] in the other."
        )


@functools.partial(jax.jit, static_argnames="components")
def _plane(x: Any, components: int) -> tuple[Any, Any, Any]:
  """Returns mean, directions and coefficients of vectors [positions, r, n]."""
  x = x.astype(tree.compute_dtype(x.dtype))
  mean = jnp.mean(x, axis=2)
  apart = x - mean[..., None]
  basis = spectral.svd(apart)[0][..., :components]
  return mean, basis, jnp.einsum("xrp,xrn->nxp", basis, apart)


def save(path: Path, bundle: Reversible, *, replace: bool = False) -> pathlib.Path:
  """Writes a bundle to a folder atomically."""
  scales = {m: np.asarray(s).tolist() for m, s in bundle.scales.items()}
  about = {"method": METHOD, "names": bundle.names, "scales": scales}
  about["swapped"] = sorted(bundle.swapped)
  parts = (bundle.means, bundle.bases, bundle.coefficients)
  with atomic.folder(path, replace=replace) as beside:
    for file, part in zip(_FILES, parts, strict=True):
      safetensors.save(beside / f"{file}.safetensors", {n: np.asarray(x) for n, x in part.items()})
    (beside / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
  return pathlib.Path(path)


def load(path: Path) -> Reversible:
  """Reads a bundle from a folder.

  Raises:
    FileNotFoundError: where the folder or a file of it is missing.
    ValueError: naming the file that is damaged, or does not fit the others.
  """
  path = pathlib.Path(path)
  about = folder.read_json(path / ABOUT)
  means, bases, coefficients = (safetensors.load(path / f"{file}.safetensors") for file in _FILES)
  try:
    names = tuple(about["names"])
    scales = {m: np.array(s, np.float32) for m, s in about["scales"].items()}
    swapped = frozenset(map(str, about.get("swapped", ())))
    keys = {f"{m}/{x}" for m in scales for x in "ab"}
    for key in keys | means.keys() | bases.keys() | coefficients.keys():
      positions, rank = means[key].shape
      count = bases[key].shape[2]
      if bases[key].shape[:2] != (positions, rank):
        raise ValueError(f"the directions of {key!r} do not fit its mean")
      if coefficients[key].shape != (len(names), positions, count):
        raise ValueError(f"the coefficients of {key!r} do not fit its directions")
    if swapped - scales.keys():
      raise ValueError("what lies [in, out] is no matrix of it")
    if any(s.shape != (len(names),) for s in scales.values()):
      raise ValueError("a scale is needed for each task")
  except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
    raise ValueError(f"{path / ABOUT}: no description of a bundle ({error}).") from error

  means, bases, coefficients, scales = (
    {n: double_precision.copy_leaf(x) for n, x in part.items()}
    for part in (means, bases, coefficients, scales)
  )
  return Reversible(names, means, bases, coefficients, scales, swapped)
