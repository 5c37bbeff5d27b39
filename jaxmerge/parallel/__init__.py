"""Meshes of devices, runs of several processes, and preemption."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "mesh",
    "preemption",
    "processes",
  ),
)
