"""The command line."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "command",
    "completion",
    "configs_command",
    "environment",
    "experiment_commands",
    "extract_command",
    "main",
    "merge_run_command",
    "mergekit_flags",
    "methods_command",
    "model_commands",
    "progress",
    "transplant_command",
    "watchdog",
  ),
)
