"""Merging methods: factories that return a `Method`, one file a family."""

from jaxmerge.methods.arithmetic import analogy, negation, task_arithmetic
from jaxmerge.methods.averaging import (
  average,
  checkpoint_average,
  moving_weights,
  scaled,
  weighted,
  weighted_sum,
)
from jaxmerge.methods.banding import band, breadcrumbs, breadcrumbs_ties
from jaxmerge.methods.descent import optmerge, wudi
from jaxmerge.methods.overlapping import consensus, ram, ramplus_tl
from jaxmerge.methods.pruning import della, della_linear, magprune
from jaxmerge.methods.robust import krum, median, trimmed_mean
from jaxmerge.methods.selecting import arcee_fusion, magmax, most_varied, nearswap, passthrough, sce
from jaxmerge.methods.signs import (
  dare_ties,
  disjoint_max,
  disjoint_mean,
  elect_sign,
  elected,
  ties,
)
from jaxmerge.methods.sparsifying import dare, drop, matched, trim
from jaxmerge.methods.spectral import iso_c, iso_cts, tsv
from jaxmerge.methods.spherical import karcher, multislerp, nuslerp, slerp, spanned
from jaxmerge.methods.stock import model_stock

__all__ = [
  "analogy",
  "arcee_fusion",
  "average",
  "band",
  "checkpoint_average",
  "consensus",
  "breadcrumbs",
  "breadcrumbs_ties",
  "dare",
  "dare_ties",
  "della",
  "della_linear",
  "disjoint_max",
  "disjoint_mean",
  "drop",
  "elect_sign",
  "elected",
  "iso_c",
  "iso_cts",
  "karcher",
  "magmax",
  "krum",
  "magprune",
  "matched",
  "median",
  "model_stock",
  "most_varied",
  "moving_weights",
  "multislerp",
  "nearswap",
  "negation",
  "nuslerp",
  "optmerge",
  "passthrough",
  "ram",
  "ramplus_tl",
  "scaled",
  "sce",
  "slerp",
  "spanned",
  "task_arithmetic",
  "ties",
  "trim",
  "trimmed_mean",
  "tsv",
  "weighted",
  "weighted_sum",
  "wudi",
]
