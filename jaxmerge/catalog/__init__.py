"""The catalog of published methods; free of jax."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "decays",
    "elementwise",
    "entry",
    "geometric",
    "lookup",
    "other_merges",
    "parameter",
    "tables",
  ),
  {
    "METHODS": "lookup",
    "OTHERS": "lookup",
  },
)
