"""From a config to a run and a report, a leaderboard, or compiled programs."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "bench",
    "bench_config",
    "built_in",
    "compilation",
    "compile_config",
    "config",
    "domains6",
    "images4",
    "minilm8",
    "phase_cache",
    "problem",
    "run",
    "shapes",
    "workdir",
  ),
)
