"""The type of a catalog entry, and parameters that many methods have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from jaxmerge.catalog.parameter import Parameter


class Entry(NamedTuple):
  """A method: formula, paper, parameters, inputs and cost at the default settings.

  Attributes:
    formula: what it computes.
    paper: where it was published.
    parameters: its parameters by name.
    needs: its arguments beside the parameters.
    experimental: whether a detail that the paper leaves open was reconstructed.
    on: what it merges: task vectors, which need a base, or weights.
    passes: how often the models are read from disk.
    ranks: whether it has thresholds by rank, for which drivers sample entries.
    models: the least and the largest number of models, beside the base; None: no limit.
    unit: the part of all models that is in memory at a time.
    lookups: for a matrix method, the vectors of a lookup table such as an embedding.
    svds: number of decompositions per matrix, in terms of the number of models K.
    fallback: how leaves without a matrix view are merged.
  """

  formula: str
  paper: str
  parameters: Mapping[str, Parameter]
  needs: str = "weights"
  experimental: bool = False
  on: Literal["task vectors", "weights", "either"] = "task vectors"
  passes: int = 1
  ranks: bool = False
  models: tuple[int, int | None] = (1, None)
  unit: Literal["entry", "row", "matrix"] = "entry"
  lookups: Literal["row", "column"] | None = None
  svds: str = ""
  fallback: str = ""


WEIGHT = Parameter(1.0, "weight of each model, scalar or one per model", each=True)
SCALE = Parameter(1.0, "factor on the merged task vector")
FLOOR = Parameter(0.0, "", low=0.0)
NORMALIZE = Parameter(False, "divide by the sum of the weights", choices=(True, False))
SEED = Parameter(None, "seed of random masks", low=0, high=2**32 - 1, integer=True)
