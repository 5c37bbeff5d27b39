"""Files and folders that appear whole or not at all, locked, linked, read within bounds."""

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
