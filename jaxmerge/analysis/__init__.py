"""Differences between models and their base."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "diff",
    "extract",
    "extract_plan",
    "low_rank",
    "spectra",
    "sums",
  ),
)
