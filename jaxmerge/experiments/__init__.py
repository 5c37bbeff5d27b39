"""Runs configs: an experiment with its report, a leaderboard, or compiled programs."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "bench",
    "bench_config",
    "compilation",
    "compile_config",
    "config",
    "decoder",
    "domains6",
    "events",
    "images4",
    "merges",
    "minilm8",
    "phase_cache",
    "phases",
    "problem",
    "registry",
    "results",
    "run",
    "schema",
    "setup",
    "shipped_configs",
    "user_functions",
    "workdir",
  ),
)
