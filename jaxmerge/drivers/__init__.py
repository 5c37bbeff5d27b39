"""How a method runs: in memory, model after model, slice by slice, over many devices."""

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
    "slice_programs",
    "slices",
    "streaming",
  ),
)
