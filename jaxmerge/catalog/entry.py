"""The type of a catalog entry, and parameters that many methods have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from jaxmerge.catalog.parameter import Parameter


class Entry(NamedTuple):
  """A method: its formula, its paper, its parameters and its needs, with the default settings.

  Attributes:
    formula: what it computes.
    paper: where it was published.
    parameters: by name.
    needs: its arguments beside the parameters.
    experimental: whether the paper left something open that was reconstructed.
    on: what is merged: task vectors, of models and a base, or the weights themselves.
    passes: how often the models are read from disk.
    ranks: whether thresholds are found by rank, for which entries are sampled.
    models: the least and the largest number of models, beside the base; None: no limit.
    unit: how much of all models is in memory at a time.
    lookups: the vectors of a lookup table, such as an embedding, for a method of matrices.
    svds: decompositions of each matrix, by the number K of models.
    fallback: what happens to leaves that no matrix view covers.
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
