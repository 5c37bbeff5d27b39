"""Merging methods: factories that return a `Method`, one file a family."""

from jaxmerge.methods.arithmetic import analogy, negation, task_arithmetic
from jaxmerge.methods.averaging import average, scaled, weighted, weighted_sum
from jaxmerge.methods.banding import band, breadcrumbs
from jaxmerge.methods.signs import dare_ties, disjoint_max, disjoint_mean, elect_sign, ties
from jaxmerge.methods.sparsifying import dare, drop, trim

__all__ = [
  "analogy",
  "average",
  "band",
  "breadcrumbs",
  "dare",
  "dare_ties",
  "disjoint_max",
  "disjoint_mean",
  "drop",
  "elect_sign",
  "negation",
  "scaled",
  "task_arithmetic",
  "ties",
  "trim",
  "weighted",
  "weighted_sum",
]
