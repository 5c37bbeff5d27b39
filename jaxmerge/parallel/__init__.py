"""Meshes of devices, many processes, and machines that are taken away."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "mesh",
    "preemption",
    "processes",
  ),
)
