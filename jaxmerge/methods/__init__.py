"""Merging methods: factories that return a `Method`, one file a family."""

from typing import Any  # An attribute that is not there has no type.

from jaxmerge import errors
from jaxmerge.methods.arithmetic import analogy, negate, portllm, task_arithmetic
from jaxmerge.methods.averages import (
  average,
  checkpoint_average,
  moving_weights,
  scaled,
  weighted,
  weighted_sum,
)
from jaxmerge.methods.competition import pcb, widen
from jaxmerge.methods.consensus_merging import consensus, ram, ramplus_tl
from jaxmerge.methods.della_merging import della, della_linear, magprune
from jaxmerge.methods.descent import doge, optmerge, wudi
from jaxmerge.methods.drop_and_rescale import dare, dare_ties, drop
from jaxmerge.methods.layer_gates import gate, layer_of, lwptv
from jaxmerge.methods.model_breadcrumbs import band, breadcrumbs, breadcrumbs_ties
from jaxmerge.methods.robust import flag, krum, meamed, median, phocas, trimmed_mean
from jaxmerge.methods.selection import arcee_fusion, magmax, most_varied, nearswap, passthrough, sce
from jaxmerge.methods.sparsify import matched, trim
from jaxmerge.methods.spectral import iso_c, iso_cts, tsv
from jaxmerge.methods.spherical import karcher, multislerp, nuslerp, slerp, spanned
from jaxmerge.methods.stock import model_stock
from jaxmerge.methods.subspaces import drm, lore, opcm
from jaxmerge.methods.ties_merging import (
  disjoint_max,
  disjoint_mean,
  elect_sign,
  elected,
  ties,
  ties_slack,
)

__all__ = [
  "analogy",
  "arcee_fusion",
  "average",
  "band",
  "breadcrumbs",
  "breadcrumbs_ties",
  "checkpoint_average",
  "consensus",
  "dare",
  "dare_ties",
  "della",
  "della_linear",
  "disjoint_max",
  "disjoint_mean",
  "doge",
  "drm",
  "drop",
  "elect_sign",
  "elected",
  "flag",
  "gate",
  "iso_c",
  "iso_cts",
  "karcher",
  "krum",
  "layer_of",
  "lore",
  "lwptv",
  "magmax",
  "magprune",
  "matched",
  "meamed",
  "median",
  "model_stock",
  "most_varied",
  "moving_weights",
  "multislerp",
  "nearswap",
  "negate",
  "nuslerp",
  "opcm",
  "optmerge",
  "passthrough",
  "pcb",
  "phocas",
  "portllm",
  "ram",
  "ramplus_tl",
  "scaled",
  "sce",
  "slerp",
  "spanned",
  "task_arithmetic",
  "ties",
  "ties_slack",
  "trim",
  "trimmed_mean",
  "tsv",
  "weighted",
  "weighted_sum",
  "widen",
  "wudi",
]

_CALLED = {"linear": "average(weight=...)", "dare_linear": "dare(...)"}


def __getattr__(name: str) -> Any:
  if name.startswith("_"):
    raise AttributeError(f"module 'jaxmerge.methods' has no attribute {name!r}.")
  if name in _CALLED:
    raise AttributeError(
      f"no method is called {name!r}: what mergekit calls so is {_CALLED[name]}."
    )
  raise AttributeError(f"no method is called {name!r}{errors.nearest(name, __all__)}.")
