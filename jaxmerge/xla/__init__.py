"""What a compiled program does, read from its text: who talks to whom, products, bytes."""

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
