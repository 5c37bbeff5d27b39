"""The dtypes in which a recipe computes and stores; mergekit also computes in narrow dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from jaxmerge.core import precision
from jaxmerge.core.precision import Precision
from jaxmerge.files.plan import Output, Plan
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Tensor
from jaxmerge.recipe.errors import Problem
from jaxmerge.recipe.records import Recipe

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Methods that mergekit computes in the dtype of the inputs, rounding after each operation, weights
# included. It computes the others in float32, or by formulas that round elsewhere.
_EACH = {
  *("task_arithmetic", "ties", "dare", "dare_ties", "della", "della_linear"),
  *("breadcrumbs", "breadcrumbs_ties", "sce", "ram"),
}
_WIDE = {"ramplus_tl"}  # Its factors are float32, and so is mergekit's result.


def precision_of(method: str, dtype: np.dtype) -> Precision | None:
  """Returns the precision at which a method gives mergekit's numbers; None: float32.

  Args:
    method: its name in `jaxmerge.methods`.
    dtype: the dtype that mergekit casts the inputs to.

  Raises:
    ValueError: if mergekit's numbers cannot be reproduced.

  Example:
    >>> precision_of("slerp", np.dtype(np.float16))
    Precision(dtype='float16', each=False, numbers=(), wide=False)
    >>> precision_of("slerp", np.dtype(np.float32)) is None
    True
  """
  if dtype.name not in precision.NARROW:
    return None
  if method == "arcee_fusion":
    raise ValueError(
      f"arcee_fusion with compat: mergekit would compute in {dtype.name}, where the divergences "
      f"that it selects by are rounding errors; write dtype: float32 and out_dtype: {dtype.name}."
    )
  each = method in _EACH
  return Precision(dtype.name, each, ("weight",) if each else (), method in _WIDE)


def result_dtype(recipe: Recipe) -> np.dtype | None:
  """Returns the dtype of the result's floating tensors; None: that of the inputs."""
  return _dtype_of(recipe.out_dtype or recipe.dtype)


def _dtype_of(dtype: str | None) -> np.dtype | None:
  return safetensors.DTYPES[_DTYPES[dtype]] if dtype else None


def problems(recipe: Recipe, method: str, parts: Sequence[Tensor]) -> Iterator[Problem]:
  """Yields a problem where mergekit's numbers cannot be reproduced for these tensors."""
  if all(safetensors.is_floating(t.dtype) for t in parts):
    try:
      precision_of(method, common_dtype(recipe, parts))
    except ValueError as error:
      yield Problem(
        recipe.places.get("dtype", recipe.places.get("compat", recipe.place)), str(error)
      )


def common_dtype(recipe: Recipe, parts: Sequence[Tensor]) -> np.dtype:
  """Returns the dtype that mergekit casts tensors to: the recipe's, else their common dtype."""
  return _dtype_of(recipe.dtype) or precision.common([t.stored_dtype for t in parts])


def compute_as_mergekit(recipe: Recipe, plan: Plan) -> Plan:
  """Returns a plan that computes in the recipe's dtype, else in the inputs' common dtype."""

  def narrow(output: Output) -> Output:
    if not safetensors.is_floating(output.dtype):
      return output
    dtype = common_dtype(recipe, [t for t in (output.base, *output.models) if t is not None])
    words = None if output.job is None else plan.jobs[output.job].spec
    method = words["method"] if isinstance(words, dict) else "passthrough"
    stored_as = result_dtype(recipe) or dtype
    return output._replace(precision=precision_of(method, dtype), dtype=stored_as)

  return plan._replace(outputs=tuple(map(narrow, plan.outputs)))
