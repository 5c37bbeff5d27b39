"""Hugging Face model folders, and models of the hub."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "flax_weights",
    "folder",
    "hub",
    "pipeline",
    "raw",
    "reference",
    "shard_writer",
    "shards",
    "single_file",
    "tied_embeddings",
    "upload",
    "vocabulary",
  ),
)
