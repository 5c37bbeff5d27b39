"""The experiments that are built in, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxmerge.experiments import domains6, images4, minilm8, problem, shapes

# (shapes, how it is made) -> what was trained for the base: made, or what was saved of it.
Keep = Callable[[Any, Callable[[], Any]], Any]


MAKERS: Mapping[str, Callable[[Mapping[str, Any], Keep], problem.Problem]] = {
  "images4": images4.images4,
  "minilm8": minilm8.minilm8,
  "domains6": domains6.domains6,
}


def make(config: Mapping[str, Any], keep: Keep = lambda like, made: made()) -> problem.Problem:
  """Makes the model and tasks that the config names.

  Args:
    config: the plain config.
    keep: is given shapes of what is trained for the base, and what trains it; may have it already.

  Raises:
    ValueError: for an experiment that there is not, or that has shapes alone.
  """
  name = config["experiment"]
  if name in MAKERS:
    return MAKERS[name](config, keep)
  if name in shapes.MAKERS:
    raise ValueError(
      f"the experiment {name!r} has shapes alone, no weights and no rows: `jaxmerge compile` "
      "compiles it, and `jaxmerge.tune_and_merge` runs it from Python on yours, see docs/tpu.md."
    )
  raise ValueError(f"experiment must be one of {', '.join(MAKERS)}, got {name!r}.")
