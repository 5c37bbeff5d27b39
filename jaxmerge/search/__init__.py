"""Merges that are chosen by a score."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "box",
    "evolution",
    "grid",
    "layerwise",
    "objective",
    "scales",
    "soups",
  ),
  {
    "Objective": "objective",
    "Scored": "objective",
    "SearchResult": "objective",
    "Trial": "objective",
    "exhaustive": "objective",
    "run": "objective",
    "weighted_sums": "objective",
    "best_scale": "scales",
    "greedy_soup": "soups",
    "learned_soup": "soups",
    "soce": "soups",
    "lcsc": "evolution",
    "hi_merging": "layerwise",
  },
)
