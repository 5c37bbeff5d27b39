"""The settings of a run of tuning and merging, validated on construction."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from jaxmerge.core import fingerprint
from jaxmerge.errors import suggest_keywords

if TYPE_CHECKING:
  from optax import GradientTransformation
else:
  GradientTransformation = Any  # Configs are read without jax, which optax imports.


@suggest_keywords
@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of local tuning, of rounds, and of the outer step.

  Attributes:
    rounds: number of merges; also the number of exchanges per task.
    epochs: passes over each task's rows in the whole run: the budget.
    batch_size: rows per local step.
    learning_rate: learning rate of the local steps.
    schedule: schedule of the learning rate over the run.
    warmup: fraction of the run in which the learning rate rises from zero.
    round_warmup: fraction of every round in which it rises, for optimisers that are reset.
    optimizer: local optimiser: a name, or an optax transformation. A transformation includes
      learning rate, schedule, decay and clipping, so that `learning_rate`, `schedule`, `warmup`,
      `round_warmup`, `weight_decay` and `clip_norm` must have their defaults. Its schedule counts
      local steps, and restarts in every round if `local_state` is "fresh".
    weight_decay: decoupled weight decay, not applied to embeddings, norms and biases.
    clip_norm: global norm at which local gradients are clipped; 0: no clipping.
    local_state: "fresh" resets the local optimisers in every round, "kept" carries them over.
    freeze: regular expression; leaves with a match in their names are frozen.
    steps: "epochs": the same number of epochs for every task; "equal": the same number of steps,
      the mean over tasks.
    reference: the model that task vectors are differences to: the current one, or the base.
    outer: optimiser of the merged task vectors: a name, or an optax transformation, to which
      `outer_learning_rate`, `outer_momentum` and `outer_schedule` do not apply; "none" is plain
      ATM.
    outer_learning_rate: learning rate of the outer optimiser.
    outer_momentum: momentum of the outer optimiser.
    outer_schedule: schedule of the outer learning rate over rounds.
    at_once: tasks tuned in parallel; 0: all. With fewer, tasks run in waves.
    compute_dtype: dtype of the forward and backward pass; parameters stay float32.
    early_stopping: whether to return the best round on validation instead of the last.
    seed: seed of the order of rows, and of methods with random masks.
  """

  rounds: int = 10
  epochs: float = 10.0
  batch_size: int = 32
  learning_rate: float = 1e-5
  schedule: Literal["constant", "cosine"] = "constant"
  warmup: float = 0.0
  round_warmup: float = 0.0
  optimizer: Literal["adamw", "sgd"] | GradientTransformation = "adamw"
  weight_decay: float = 0.0
  clip_norm: float = 10.0
  local_state: Literal["fresh", "kept"] = "fresh"
  freeze: str = ""
  steps: Literal["epochs", "equal"] = "epochs"
  reference: Literal["current", "base"] = "current"
  outer: Literal["none", "sgd", "nesterov", "adam", "damped"] | GradientTransformation = "none"
  outer_learning_rate: float = 1.0
  outer_momentum: float = 0.0
  outer_schedule: Literal["constant", "cosine"] = "constant"
  at_once: int = 0
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  early_stopping: bool = False
  seed: int = 0

  def __post_init__(self) -> None:
    """Raises ValueError for a value out of range."""
    for name, choices in _CHOICES.items():
      value = getattr(self, name)
      if name in REPLACES and is_transformation(value):
        _refuse_conflicts(self, name)
      elif value not in choices:
        optax = " or an optax transformation" if name in REPLACES else ""
        near = _call(value) if optax and callable(value) else _near(value, choices)
        raise ValueError(f"{name} must be one of {choices}{optax}, got {value!r:.60}{near}.")
    for name, (low, high, words) in _RANGES.items():
      value, kind = getattr(self, name), int if name in _WHOLE else (int, float)
      fits = isinstance(value, kind) and not isinstance(value, bool)
      if not (fits and math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} must be {words}, got {value!r}.")
    if not isinstance(self.early_stopping, bool):
      raise ValueError(f"early_stopping must be True or False, got {self.early_stopping!r}.")
    try:
      re.compile(self.freeze)
    except (re.error, TypeError) as error:
      raise ValueError(
        f"freeze is not a valid regular expression: {self.freeze!r}: {error}."
      ) from error


# The types of the values in a config file.
KINDS: Mapping[str, Any] = {
  name: get_args(kind)[0] if Any in get_args(kind) else kind
  for name, kind in get_type_hints(Settings).items()
}
# An optax transformation in one of these replaces the settings beside it.
REPLACES: Mapping[str, tuple[str, ...]] = {
  "optimizer": (
    "learning_rate",
    "schedule",
    "warmup",
    "round_warmup",
    "weight_decay",
    "clip_norm",
  ),
  "outer": ("outer_learning_rate", "outer_momentum", "outer_schedule"),
}
_CHOICES: dict[str, tuple[str, ...]] = {
  name: get_args(kind) for name, kind in KINDS.items() if get_origin(kind) is Literal
}
_TINY = 1e-300  # Stands for "greater than zero".
_WHOLE = ("rounds", "batch_size", "at_once", "seed")
_RANGES: dict[str, tuple[float, float, str]] = {
  "rounds": (1, 10**6, "a whole number from 1 to a million"),
  "epochs": (_TINY, 10**6, "positive, at most a million"),
  "batch_size": (1, 10**7, "a whole number from 1 to ten million"),
  "learning_rate": (_TINY, 1e3, "positive, at most 1000"),
  "warmup": (0, 1, "in [0, 1]"),
  "round_warmup": (0, 1, "in [0, 1]"),
  "weight_decay": (0, 1e3, "0 to 1000"),
  "clip_norm": (0, 1e9, "0 (off) or positive, at most 1e9"),
  "outer_learning_rate": (_TINY, 1e3, "positive, at most 1000"),
  "outer_momentum": (0, 1, "in [0, 1]"),
  "at_once": (0, 10**6, "a whole number from 1, or 0 (all)"),
  "seed": (0, 2**32 - 1, "a whole number from 0 to 2**32 - 1"),
}


def _near(value: object, choices: tuple[str, ...]) -> str:
  close = difflib.get_close_matches(str(value), choices, n=1)
  return f"; did you mean {close[0]!r}?" if close else ""


def _call(value: Any) -> str:
  """Returns a hint to call a function that returns an optax transformation."""
  name = getattr(value, "__name__", "it")
  in_optax = getattr(value, "__module__", "").startswith("optax")
  return f": call it, {f'optax.{name}(1e-3)' if in_optax else f'{name}(...)'}"


def is_transformation(value: object) -> bool:
  """Returns whether a value is an optax transformation, by its functions `init` and `update`."""
  functions = getattr(value, "init", None), getattr(value, "update", None)
  return isinstance(value, tuple) and all(map(callable, functions))


def _refuse_conflicts(settings: Settings, name: str) -> None:
  """Raises ValueError for a setting that an optax transformation would leave without effect."""
  for other in REPLACES[name]:
    if (value := getattr(settings, other)) != getattr(Settings, other):
      raise ValueError(
        f"{other} is {value!r}, but {name} is an optax transformation, which does not use it: "
        f"leave {other} out, and set it in the transformation."
      )


def record(settings: Settings) -> dict[str, Any]:
  """Returns the settings as plain JSON; an optax transformation as a digest of its functions."""
  values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
  for name in REPLACES:
    if not isinstance(values[name], str):
      values[name] = f"an optax transformation, digest {fingerprint.fingerprint(values[name])}"
  return values


def from_config(config: Mapping[str, Any]) -> Settings:
  """Returns the loop's settings: the config's keys of the same names."""
  return Settings(**{f.name: config[f.name] for f in dataclasses.fields(Settings)})
