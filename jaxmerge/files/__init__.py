"""Merges of folders of models, in bounded memory."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "adapter_inputs",
    "assemble",
    "compatibility",
    "describe",
    "estimate",
    "execute",
    "finish",
    "input_changes",
    "inputs",
    "inspection",
    "merge",
    "misfits",
    "name_variants",
    "out_formats",
    "outcomes",
    "plan",
    "reader",
    "remote_code",
    "resume",
    "runs",
    "tied_weights",
    "write_tensors",
  ),
)
