"""Files on disk: atomic writes, locks, links, and bounded reads."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "atomic",
    "direct",
    "links",
    "locks",
    "shared",
    "stamps",
    "strict_json",
  ),
)
