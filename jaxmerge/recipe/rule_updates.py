"""Updates a config's rules over layer numbers for restacked layers.

A rule stays if it gives each layer the same kind as before; otherwise it is changed, replaced by
the list that its class has for it, or refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any  # Any: JSON of a config.

from jaxmerge.recipe import layer_rules
from jaxmerge.recipe.layer_rules import Layers

Config = Mapping[str, Any]


def update_rules(config: Config, changed: dict[str, Any], layers: Layers) -> dict[str, Any]:
  """Returns a config whose rules hold for the new layers.

  Args:
    config: as it was.
    changed: the config with its lists reordered.
    layers: the new layers.

  Raises:
    ValueError: naming a rule that no longer holds and has no list.
  """
  for update in (
    _update_sparse,
    _update_cycles,
    _update_thresholds,
    _update_shared,
    _update_scale,
    _update_stages,
    _refuse_others,
  ):
    changed = update(config, changed, layers)
  return changed


# --- Rules that are written out ---


def _update_sparse(config: Config, changed: dict[str, Any], layers: Layers) -> dict[str, Any]:
  """Updates Qwen's rule: every n-th layer has experts, except those in a list."""
  step = config.get("decoder_sparse_step")
  listed = config.get("mlp_only_layers") or []
  if type(step) is not int or step <= 1 or "mlp_only_layers" not in config:
    return changed
  if not isinstance(listed, list):
    raise ValueError(f"mlp_only_layers of the config must be a list, got {listed!r:.100}.")
  dense = [(old + 1) % step != 0 or old in listed for old in layers.order]
  new = changed["mlp_only_layers"] or []
  if dense == [(i + 1) % step != 0 or i in new for i in range(len(dense))]:
    return changed
  return {
    **changed,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [i for i, d in enumerate(dense) if d],
  }


def _update_cycles(config: Config, changed: dict[str, Any], layers: Layers) -> dict[str, Any]:
  known = layer_rules.BY_TYPE.get(str(config.get("model_type")))
  cycles = {} if known is None else {known.key: known}
  for key, cycle in layer_rules.BY_KEY.items():
    if key in config and not (known and known.list == cycle.list):
      cycles.setdefault(key, cycle)
  for cycle in cycles.values():
    every = config.get(cycle.key, config.get(f"_{cycle.key}", cycle.every))
    if type(every) is int and every > 0 and not config.get(cycle.list):
      changed = _write_out(cycle, every, changed, layers)
  return changed


def _write_out(
  cycle: layer_rules.Cycle, every: int, changed: dict[str, Any], layers: Layers
) -> dict[str, Any]:
  before = [cycle.holds(every, old) for old in layers.order]
  if before == [cycle.holds(every, i) for i in range(len(before))]:
    return changed
  if cycle.kinds == (1, 0):
    return {**changed, cycle.list: [i for i, is_kind in enumerate(before) if is_kind]}
  return {**changed, cycle.list: [cycle.kinds[0 if is_kind else 1] for is_kind in before]}


# --- Rules whose numbers can change ---


def _update_thresholds(config: Config, changed: dict[str, Any], layers: Layers) -> dict[str, Any]:
  kind = str(config.get("model_type"))
  for key, (name, kinds) in layer_rules.FROM.items():
    default = layer_rules.DENSE.get(kind) if name == "mlp_layer_types" else None
    first = config.get(key, default)
    if type(first) is not int or (name and config.get(name)) or _idle(key, config):
      continue
    after = [old >= first for old in layers.order]
    count = len(after) - sum(after)
    if after == [i >= count for i in range(len(after))]:
      # A rule that gives the new layers the same kinds stays.
      same = after == [i >= first for i in range(len(after))]
      if same or key in config:
        changed = changed if same else {**changed, key: count}
        continue
    if name and (kind in layer_rules.DENSE or key == "max_window_layers"):
      changed = {**changed, name: [kinds[int(is_later)] for is_later in after]}
    else:
      raise _error(key, first, layers)
  return changed


def _idle(key: str, config: Config) -> bool:
  """Returns whether no layer has a window, from whatever number on."""
  kind = str(config.get("model_type"))
  if key != "max_window_layers":
    return False
  if "model_type" in config and not layer_rules.WINDOWED.fullmatch(kind):
    return True
  windows = config.get("sliding_window") is not None and not kind.startswith("qwen")
  return not config.get("use_sliding_window", windows)


def _update_shared(config: Config, changed: dict[str, Any], layers: Layers) -> dict[str, Any]:
  """Updates Gemma's rule: the last layers share keys and values of earlier ones."""
  count = config.get("num_kv_shared_layers")
  if type(count) is not int or count == 0:
    return changed
  shared = [old >= layers.num_layers - count for old in layers.order]
  if shared != sorted(shared):
    raise _error("num_kv_shared_layers", count, layers)
  return {**changed, "num_kv_shared_layers": sum(shared)}


def _update_scale(config: Config, changed: dict[str, Any], layers: Layers) -> dict[str, Any]:
  """Updates MiniCPM's factor, which is divided by the root of the number of layers."""
  scale = config.get("scale_depth")
  if not isinstance(scale, int | float) or not layers.order:
    return changed
  return {**changed, "scale_depth": scale * math.sqrt(len(layers.order) / layers.num_layers)}


# --- Rules that hold or are refused ---


def _refuse_others(config: Config, changed: dict[str, Any], layers: Layers) -> dict[str, Any]:
  """Raises ValueError for rules that no longer hold and have no list."""
  if config.get("hidden_size_per_layer_input"):
    raise ValueError(
      "the config says hidden_size_per_layer_input: tensors outside of the layers hold a part for "
      f"each of the {layers.num_layers} layers, so that these cannot be stacked anew."
    )
  moved = [(i, old) for i, old in enumerate(layers.order) if i != old]
  if moved and config.get("scale_attn_by_inverse_layer_idx") is True:
    raise _error("scale_attn_by_inverse_layer_idx", True, layers)
  kind = str(config.get("model_type"))
  if (
    moved
    and kind in layer_rules.UNEVEN
    and not any(config.get(key) for key in layer_rules.UNEVEN[kind])
  ):
    raise _error("model_type", kind, layers)
  cycle = layer_rules.BY_TYPE.get(kind)
  known = {*layer_rules.WRITTEN, cycle.key if cycle else ""}
  known |= {"decoder_sparse_step"} if "mlp_only_layers" in config else set()
  known |= {"attn_layer_period"} if config.get("layers_block_type") else set()
  if (
    layer_rules.LAST.fullmatch(kind)
    and (changed.get("layer_types") or ["full_attention"])[-1] != "full_attention"
  ):
    raise _error("model_type", kind, layers)
  for key, value in config.items():
    wrong = type(value) is int and key not in known and not _holds(key, value, config, layers)
    if wrong or (key == "max_window_layers" and moved and _alternates(config)):
      raise _error(key, value, layers)
  return changed


def _update_stages(config: Config, changed: dict[str, Any], layers: Layers) -> dict[str, Any]:
  """Renames the outputs of a backbone, which are named by layer."""
  names = ["stem", *(f"stage{i + 1}" for i in range(layers.num_layers))]
  if config.get("stage_names") not in (None, names) or not config.get("out_features"):
    return changed
  new = {"stem": 0, names[-1]: len(layers.order)}
  if not set(config["out_features"]) <= new.keys():
    raise _error("out_features", config["out_features"], layers)
  places = [new[name] for name in config["out_features"]]
  every = [*names[:1], *(f"stage{i + 1}" for i in range(len(layers.order)))]
  new_names = {
    "out_features": [every[i] for i in places],
    "out_indices": places,
    "stage_names": every,
  }
  return {k: new_names.get(k, v) for k, v in changed.items()}


def _alternates(config: Config) -> bool:
  """Returns whether every second layer before a number has a window: Qwen 2's with experts."""
  kind = config.get("model_type") == "qwen2_moe" and not config.get("layer_types")
  return kind and bool(config.get("use_sliding_window"))


def _holds(key: str, value: int, config: Config, layers: Layers) -> bool:
  """Returns whether a rule treats each new layer as it treated the old one."""
  pairs = list(enumerate(layers.order))
  if layer_rules.is_period(key) and value > 1:
    offset = config.get(key.replace("period", "offset")) if "period" in key else None
    if type(offset) is int:
      return all((i % value == offset) == (old % value == offset) for i, old in pairs)
    return all(i % value == old % value for i, old in pairs)
  if layer_rules.EDGE.search(key) and value > 0:
    return all((i >= value, i > value) == (old >= value, old > value) for i, old in pairs)
  return True


def _error(key: str, value: Any, layers: Layers) -> ValueError:
  i, old = next(((i, old) for i, old in enumerate(layers.order) if i != old), (0, 0))
  return ValueError(
    f"the config says {key}: {value}, a rule over the numbers of layers, which does not hold once "
    f"layer {old} is layer {i}; its class has no list in place of it. Choose slices that keep the "
    "rule, such as whole periods of it."
  )
