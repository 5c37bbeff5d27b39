"""Reads communication, products and memory traffic from the text of a compiled program."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "chips",
    "communication",
    "cost",
    "hlo_text",
    "program",
    "replica_groups",
    "roofline",
  ),
)
