"""Reorders per-layer lists of a config for restacked layers.

Lists with an entry per layer, and lists of layer numbers, follow the layers. A rule over layer
numbers stays if it gives each layer the same kind as before; otherwise it is changed, replaced by
the list that its class has for it, or refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any  # Any: JSON of a config.

from jaxmerge.recipe import layer_rules, rule_updates
from jaxmerge.recipe.layer_rules import Layers

Config = Mapping[str, Any]

# Lists that are not per layer, though they may be as long; and parts with separate lists.
_OTHERS = re.compile(
  r"architectures|.*token_ids?|.*_token_id|mrope_.*|rope_.*|.*sections?|image_.*|vision_.*|loss_.*"
  r"|.*labels?|id2label|label2id|task.*|auto_map|quantization_config|prefix|out_features|out_indices"
)
# Lists of layer numbers; others are recognised by their names.
_NUMBERS = {
  *("mlp_only_layers", "moe_layers", "cross_attention_layers", "rope_scaling_layers"),
  *("kv_source_layers", "hybrid_layer_ids", "sliding_window_layers", "dense_layers"),
}
_NUMBERED = re.compile(r"(^|_)(idx|idxs|indices|indexe?s|layer_ids|block_ids)$|_layers$")
_FLAGS = {"no_rope_layers", "attention_layers"}  # Names of lists with an entry per layer.
# Keys of layers for multi-token prediction, stored after the others.
_AHEAD = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


COUNT = "num_hidden_layers"
_EACH = re.compile(r"layers?_(block_)?types?$|block_types?$|block_configs|hybrid_override_pattern")
# Classes that count layers by this key, even where the config leaves it to the default.
_COUNTED = re.compile(
  r"(llama|mistral|mixtral|qwen[23]|gemma[23]?|phi3?|olmo[23]?|granite|cohere2?|starcoder2|bert"
  r"|roberta|vit|helium|smollm3)(_moe)?(_text)?"
)


def has_default_count(part: Config, whole: Config) -> bool:
  """Returns whether the class of a config counts layers by COUNT, though the config does not."""
  text = "llama" if "llava" in str(whole.get("model_type")) else None  # As LLaVA's classes have it.
  kind = part.get("model_type", text)
  return isinstance(kind, str) and _COUNTED.fullmatch(kind) is not None


def each_layer(config: Config, num_layers: int) -> list[str]:
  """Returns the keys of lists with an entry per layer, by name and length."""
  return [
    key
    for key, value in config.items()
    if isinstance(value, list | tuple | str) and len(value) == num_layers and _EACH.search(key)
  ]


def restack(config: Config, count: str | None, layers: Layers) -> dict[str, Any]:
  """Returns the part of a config about one stack, for the new layers.

  >>> config = {"n_layer": 2, "mlp_only_layers": [0], "layer_types": ["a", "b"]}
  >>> restack(config, "n_layer", Layers(2, (1, 0, 0)))
  {'n_layer': 3, 'mlp_only_layers': [1, 2], 'layer_types': ['b', 'a', 'a']}

  Args:
    config: the part.
    count: its key for the number of layers; None: only lists imply it.
    layers: the layers.

  Raises:
    ValueError: naming a rule that no longer holds and has no list.
  """
  counted = layers.num_layers if count is None else config.get(count, layers.num_layers)
  changed, layers = _count_ahead(config, counted, layers)
  if count is not None:
    changed[count] = len(layers.order)
  if layers.order == tuple(range(layers.num_layers)):
    return changed
  layers = layers._replace(counted=counted)
  changed = {key: _reorder(key, value, layers) for key, value in changed.items()}
  return rule_updates.update_rules(config, changed, layers)


def _count_ahead(config: Config, count: int, layers: Layers) -> tuple[dict[str, Any], Layers]:
  """Counts layers for multi-token prediction separately, as they follow all others."""
  key = next((k for k in _AHEAD if type(config.get(k)) is int and config[k] > 0), None)
  if key is None or layers.num_layers != count + config[key]:
    return dict(config), layers
  extra = [i for i, old in enumerate(layers.order) if old >= count]
  rest = tuple(old for old in layers.order if old < count)
  if extra != list(range(len(rest), len(layers.order))):
    raise ValueError(
      f"{key} is {config[key]}: the last {config[key]} of the {layers.num_layers} layers predict "
      "more tokens; put them at the end, or leave them out."
    )
  return {**config, key: len(extra)}, Layers(count, rest)


def ahead(config: Config) -> int:
  """Returns how many layers are stored beyond those that a config counts."""
  return next((config[k] for k in _AHEAD if type(config.get(k)) is int), 0)


# --- Lists ---


def _reorder(key: str, value: Any, layers: Layers) -> Any:
  """Returns a value with its per-layer entries in the new order."""
  if _OTHERS.fullmatch(key) and key not in _NUMBERS:
    return value
  if isinstance(value, Mapping):
    return _inside(key, value, layers)
  if isinstance(value, str):
    each = layers.is_list_of(value) and "pattern" in key and key != layer_rules.WINDOWS
    return "".join(value[old] for old in layers.order) if each else value
  if not isinstance(value, list | tuple):
    return value
  if key == "attention_types":  # GPT-Neo's, [[kinds, how often], ...].
    pairs = [pair for pair in value if isinstance(pair, list) and len(pair) == 2]
    kinds = [k for pair in pairs for k in _repeat(*pair)]
    return [[[kinds[old] for old in layers.order], 1]] if layers.is_list_of(kinds) else value
  if key == "block_types" and value:  # RecurrentGemma's, which begin anew at their end.
    kinds = [value[old % len(value)] for old in layers.order]
    same = kinds == [value[i % len(value)] for i in range(len(kinds))]
    return value if same and len(value) < layers.num_layers else kinds
  if _is_numbers(key, value, layers.num_layers):
    return [i for i, old in enumerate(layers.order) if old in value]
  return [value[old] for old in layers.order] if layers.is_list_of(value) else value


def _repeat(kinds: Any, times: Any) -> list[Any]:
  return kinds * times if isinstance(kinds, list) and type(times) is int else []


def _is_numbers(key: str, value: Sequence[Any], num_layers: int) -> bool:
  """Returns whether a list holds distinct layer numbers, not an entry per layer."""
  if not (key in _NUMBERS or _NUMBERED.search(key)) or key in _FLAGS:
    return False
  whole = all(type(v) is int and 0 <= v < num_layers for v in value)
  return whole and len(set(value)) == len(value)


def _inside(key: str, value: Config, layers: Layers) -> dict[str, Any]:
  """Returns a mapping by layer number, or one with lists, in the new order."""
  if value and all(str(k).isdecimal() and int(k) < layers.num_layers for k in value):
    reordered = {str(i): value[str(old)] for i, old in enumerate(layers.order) if str(old) in value}
    return reordered if "layer" in key else dict(value)
  if key == "linear_attn_config":  # Kimi's, which counts from 1.
    return {
      k: [i + 1 for i, old in enumerate(layers.order) if old + 1 in v] if isinstance(v, list) else v
      for k, v in value.items()
    }
  if any("layer" in k and type(v) is int for k, v in value.items()):
    return dict(value)  # A part about another stack.
  return {k: _reorder(k, v, layers) for k, v in value.items()}


def entries(
  config: Config, num_layers: int, rules: bool = False
) -> Iterator[tuple[str, list[Any]]]:
  """Yields per-layer entries of a config's lists, and of its rules if `rules` is set.

  >>> dict(entries({"layer_types": ["a", "b"], "mlp_only_layers": [1]}, 2))
  {'layer_types': ['a', 'b'], 'mlp_only_layers': [False, True]}
  """
  for key, value in config.items():
    if _OTHERS.fullmatch(key) and key not in _NUMBERS:
      continue
    if isinstance(value, Mapping):
      yield from entries(value, num_layers, rules)
    elif key == "block_types" and isinstance(value, list) and value:
      yield key, [value[i % len(value)] for i in range(num_layers)]
    elif isinstance(value, list | tuple) and _is_numbers(key, value, num_layers):
      yield key, [i in value for i in range(num_layers)]
    elif _lists(key, value) and len(value) == num_layers:
      yield key, [*value]
    elif rules and type(value) is int and value > 1 and layer_rules.is_period(key):
      yield key, [i % value for i in range(num_layers)]
    elif rules and type(value) is int and layer_rules.EDGE.search(key):
      yield key, [i >= value for i in range(num_layers)]


def _lists(key: str, value: Any) -> bool:
  return isinstance(value, list | tuple) or (isinstance(value, str) and "pattern" in key)
