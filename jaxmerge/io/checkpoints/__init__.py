"""Checkpoints: Orbax's arrays, sealed by a manifest of checksums."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "arrays",
    "band_storage",
    "leaves",
    "like",
    "manifest",
    "metadata",
    "orbax_output",
    "other_programs",
    "places",
    "store",
    "trees",
  ),
)
