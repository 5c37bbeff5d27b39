"""The command line."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "commands",
    "environment",
    "main",
    "mergekit_flags",
    "progress",
    "watchdog",
  ),
)
