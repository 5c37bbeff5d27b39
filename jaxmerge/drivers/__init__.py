"""Runs methods: in memory, model by model, slice by slice, or over many devices."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "accumulator",
    "arguments",
    "continual",
    "distributed_matrices",
    "external_selection",
    "finiteness",
    "incremental",
    "measurement",
    "memory",
    "row_ranks",
    "sliding_window",
    "slice_programs",
    "slices",
    "streaming",
  ),
)
