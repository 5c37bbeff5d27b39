"""What the tables are made of: the type of an entry, and parameters that many methods have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from jaxmerge.catalog.parameter import Parameter


class Entry(NamedTuple):
  """A method: what it computes in one formula, where it comes from, what it needs.

  `on` says what is merged: task vectors, by `jaxmerge.merge` with a base, or the weights
  themselves, without one. `reads` says how often the models are read where they are on disk, with
  the default settings, `ranks` whether it finds entries by their rank, for which they are sampled;
  `models`, how many there are at least and at most, beside the base. `unit`
  is what of all models is held at a time, `lookups` what an entry of a lookup is to a method of
  matrices to which it is one, `svds` the decompositions of each matrix by the number K of
  models, and `uncovered` what becomes of leaves that no matrix view covers, where that matters;
  these too with the default settings.
  """

  formula: str
  paper: str
  parameters: Mapping[str, Parameter]
  needs: str = "weights"
  experimental: bool = False
  on: Literal["task vectors", "weights", "either"] = "task vectors"
  reads: int = 1
  ranks: bool = False
  models: tuple[int, int | None] = (1, None)
  unit: Literal["entry", "row", "matrix"] = "entry"
  lookups: Literal["row", "column"] | None = None
  svds: str = ""
  uncovered: str = ""


WEIGHT = Parameter(1.0, "weight of each model, scalar or one per model", each=True)
SCALE = Parameter(1.0, "factor on the merged task vector")
FLOOR = Parameter(0.0, "", low=0.0)
NORMALIZE = Parameter(False, "divide by the sum of the weights", choices=(True, False))
SEED = Parameter(None, "seed of random masks", low=0, high=2**32 - 1, integer=True)
