"""Settings of an adapter: adapter_config.json read strictly, for files and in memory."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple  # Any: unchecked JSON.

from jaxmerge.io.huggingface import folder as folders
from jaxmerge.io.peft import patterns

MERGE = "merge it with PEFT (merge_and_unload) and give the result in place of base and adapter"
_LARGEST = 1e30  # Of a scale, so that products with it stay finite in float32.
_LONGEST_RANK = 2**24

# Keys that are only about training, or follow from the names of the tensors.
_TRAINING = (
  "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
  "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
  "modules_to_save", "ensure_weight_tying", "runtime_config",
)  # fmt: skip
_OF_LORA = (
  "r", "lora_alpha", "rank_pattern", "fan_in_fan_out", "bias", "init_lora_weights", "lora_dropout",
  "loftq_config", "megatron_config", "megatron_core", "eva_config", "corda_config",
  "lora_ga_config", "velora_config", "qalora_group_size", "trainable_token_indices",
)  # fmt: skip
_OF_LYCORIS = (
  "r", "alpha", "rank_pattern", "alpha_pattern", "init_weights", "rank_dropout", "module_dropout",
  "use_effective_conv2d",
)  # fmt: skip
# By kind of adapter, the keys that are read, or have no effect on its sum: others must be empty.
_KNOWN: Mapping[str, tuple[str, ...]] = {
  "LORA": (
    *_OF_LORA, "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "layer_replication",
    "target_parameters",
  ),
  "ADALORA": (
    *_OF_LORA, "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2",
    "orth_reg_weight", "total_step",
  ),
  "IA3": ("feedforward_modules", "fan_in_fan_out", "init_ia3_weights"),
  "LOHA": _OF_LYCORIS,
  "LOKR": (*_OF_LYCORIS, "decompose_both", "decompose_factor", "rank_dropout_scale"),
  "OFT": (
    "r", "oft_block_size", "module_dropout", "fan_in_fan_out", "bias", "init_weights", "coft",
    "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms",
  ),
  "BOFT": (
    "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout",
    "fan_in_fan_out", "bias", "init_weights",
  ),
  "VERA": (
    "r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "fan_in_fan_out",
    "bias", "init_weights",
  ),
  "LN_TUNING": (),
  "TRAINABLE_TOKENS": ("token_indices", "init_weights"),
}  # fmt: skip
# Others (corda, loftq, lora_ga, pissa_niter_4) change the base in a way that is not on the disk.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "pissa", "olora")
_FLAGS = (
  "use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "coft", "block_share",
)  # fmt: skip
_BIASES = ("none", "all")


class Settings(NamedTuple):
  """The config of an adapter, checked.

  Attributes:
    path: its file.
    kind: PEFT's name of what kind of adapter it is, such as "LORA".
    values: the config; keys that are missing have the values that PEFT gives them.
  """

  path: pathlib.Path
  kind: str
  values: Mapping[str, Any]

  def rank(self, module: str) -> int:
    """Returns the rank of a module's factors."""
    return int(self._number("rank_pattern", module, self.values["r"]))

  def scale(self, module: str) -> float:
    """Returns the factor on the product of a module's factors."""
    key = "lora_alpha" if self.kind == "LORA" else "alpha"
    rank, alpha = self.rank(module), self._number("alpha_pattern", module, self.values[key])
    return float(alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank))

  def saves(self, name: str) -> bool:
    """Returns whether a tensor belongs to a module trained as a copy (modules_to_save)."""
    value = self.values.get("modules_to_save")
    modules = [m for m in value if isinstance(m, str)] if isinstance(value, list) else []
    return any(f".{name.rpartition('.')[0]}".endswith(f".{m}") for m in modules)

  def _number(self, key: str, module: str, default: Any) -> Any:
    values = self.values[key]
    try:
      pattern = patterns.first(tuple(values), module)
    except ValueError as error:
      raise ValueError(f"{self.path}: {key}: {error}") from error
    return default if pattern is None else values[pattern]

  def refusal(self, key: str, why: str = "is not supported") -> ValueError:
    """Returns the error for a key of the config."""
    return ValueError(f"{self.path}: {key} = {shown(self.values.get(key))} {why}; {MERGE}.")


def read(path: pathlib.Path) -> Settings:
  """Reads and checks the config of an adapter.

  Raises:
    FileNotFoundError: where there is no file.
    ValueError: naming the key whose value is none, or is not supported.
  """
  config = folders.read_json(path)
  kind = config.get("peft_type")
  if not isinstance(kind, str) or kind not in _KNOWN:
    raise ValueError(
      f"{path}: peft_type is {shown(kind)}, not one of {', '.join(_KNOWN)}; {MERGE}."
    )
  settings = Settings(path, kind, config)
  for key, value in config.items():
    if key not in (*_TRAINING, *_KNOWN[kind]) and value not in (None, False, [], {}):
      raise settings.refusal(key)
  for key in _FLAGS:
    if not isinstance(config.setdefault(key, False), bool):
      raise ValueError(f"{path}: {key} must be true or false, got {shown(config[key])}.")
  _check_start(settings)
  bias = config.get("bias", "none")
  if bias not in _BIASES and not (isinstance(bias, str) and bias.endswith("_only")):
    raise settings.refusal("bias", "is not known")
  if kind in ("LORA", "LOHA", "LOKR"):
    _check_numbers(path, config, "r", "rank_pattern")
    _check_numbers(path, config, "lora_alpha" if kind == "LORA" else "alpha", "alpha_pattern")
  return settings


def shown(value: Any) -> str:
  """Formats a value for errors, shortening numbers of thousands of digits."""
  if isinstance(value, int) and abs(value) > 10**20:
    return f"a number of about {int(math.log10(abs(value))) + 1} digits"
  return f"{value!r:.100}"


def _check_start(settings: Settings) -> None:
  """Raises ValueError for an adapter trained from another base than that on disk."""
  start = settings.values.get("init_lora_weights")
  if isinstance(start, int) and not isinstance(start, bool):
    raise settings.refusal("init_lora_weights", "is not known")
  if start in _STARTS or settings.kind not in ("LORA", "ADALORA"):
    return
  remedy = MERGE
  if str(start).startswith(("pissa", "corda", "lora_ga")):
    remedy = (
      "in the program that trained it, PEFT's save_pretrained(OUT, "
      "path_initial_model_for_weight_conversion=INIT) makes plain LoRA of it, where INIT is the "
      "adapter as it was saved before the training"
    )
  raise ValueError(
    f"{settings.path}: init_lora_weights = {shown(start)} changed the base before the training; "
    f"{remedy}; or give the base as it was changed, and set init_lora_weights to true."
  )


def _check_numbers(path: pathlib.Path, config: dict[str, Any], key: str, pattern: str) -> None:
  """Completes a number and the pattern of its exceptions, and raises ValueError for other types."""
  config.setdefault(key, 8)
  config[pattern] = config.get(pattern) or {}
  if not isinstance(config[pattern], dict):
    raise ValueError(
      f"{path}: {pattern} must map modules to numbers, got {shown(config[pattern])}."
    )
  values = {key: config[key], **{f"{pattern}: {k!r:.200}": v for k, v in config[pattern].items()}}
  for place, value in values.items():
    if type(value) not in (int, float) and key != "r":
      raise ValueError(f"{path}: {place} must be a number, got {shown(value)}.")
    if key == "r" and (type(value) is not int or not 1 <= value <= _LONGEST_RANK):
      raise ValueError(f"{path}: {place} must be a whole number, 1 or more, got {shown(value)}.")
    if not abs(value) <= _LARGEST:  # NaN as well.
      raise ValueError(
        f"{path}: {place} must be between {-_LARGEST:.0e} and {_LARGEST:.0e}, got {shown(value)}."
      )
