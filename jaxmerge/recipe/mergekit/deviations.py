"""Notes on methods of a recipe whose results differ from mergekit's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any  # A setting of a method.

from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Tensor
from jaxmerge.recipe.mergekit import precision
from jaxmerge.recipe.mergekit.methods import MERGEKITS
from jaxmerge.recipe.records import Recipe

# The meaning of settings that differ under `compat: mergekit`.
_HERE = {
  ("scope", "tree"): "entries are ranked over the whole model, not tensor by tensor",
  ("rule", "kth"): "all entries as large as the threshold are kept",
  ("zero_sum", "majority"): "where votes cancel out, the sign of the majority counts, not plus",
  ("rescale", "inverse"): "kept entries are divided by the share that is kept, not brought to the "
  "L1 norm that the tensor had",
  ("yields", "keep"): "the largest entries that are removed are not made up for",
  ("floor", 0.0): "norms and energies below 1e-6 are taken as they are",
}
_SAMPLED = 10**6  # mergekit samples entries of tensors that are larger.


def line(
  recipe: Recipe,
  name: str,
  method: str,
  here: Mapping[str, Any],
  there: Mapping[str, Any],
  parts: Sequence[Tensor],
) -> str | None:
  """Returns a note on what differs from mergekit for a method; None where nothing does.

  Args:
    recipe: the recipe.
    name: the method's name in the recipe.
    method: its name in this library.
    here: the settings in use.
    there: the settings under `compat: mergekit`.
    parts: the input tensors of one merged tensor.
  """
  if recipe.compat is not None or name not in MERGEKITS:
    return None
  words = [_HERE[n, v] for n, v in here.items() if v != there[n]]
  words += _narrow(recipe, method, parts)
  end = " `compat: mergekit` (--compat mergekit) takes its rules." if words else ""
  if MERGEKITS[name].random:
    words.append("random masks are drawn otherwise, with `compat` as well")
  if name == "arcee_fusion" and any(math.prod(t.shape) > _SAMPLED for t in parts):
    words.append("quartiles are those of all entries, not of a random sample")
  return f"{name} is not all as in mergekit: {'; '.join(words)}.{end}" if words else None


def _narrow(recipe: Recipe, method: str, parts: Sequence[Tensor]) -> list[str]:
  """Returns a note where mergekit computes in a narrow dtype, not only rounds its inputs."""
  floats = [t for t in parts if safetensors.is_floating(t.dtype)]
  if not floats or method == "arcee_fusion":  # Its narrow arithmetic is not reproduced.
    return []
  dtype = precision.common_dtype(recipe, floats)
  computed = precision.precision_of(method, dtype)
  if computed is None or not (computed.each or computed.wide):
    return []
  return [f"all is computed in float32 and rounded once, not in {dtype.name}"]
