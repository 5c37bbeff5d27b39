"""What a config says of each of its layers, brought up to date where layers are stacked anew.

Lists with an entry for each layer, and lists of numbers of layers, follow the layers. A rule over
their numbers stays if it says the same of every layer as before, is changed or written out as the
list that its class has for it, or is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: what a config.json holds.

from jaxmerge.recipe import layer_rules

Config = Mapping[str, Any]

# Lists that are none of layers, though they may be as long; and parts with lists of their own.
_OTHERS = re.compile(
  r"architectures|.*token_ids?|.*_token_id|mrope_.*|rope_.*|.*sections?|image_.*|vision_.*|loss_.*"
  r"|.*labels?|id2label|label2id|task.*|auto_map|quantization_config|prefix|out_features|out_indices"
)
# Lists of the numbers of layers; others are known by their names.
_NUMBERS = {
  *("mlp_only_layers", "moe_layers", "cross_attention_layers", "rope_scaling_layers"),
  *("kv_source_layers", "hybrid_layer_ids", "sliding_window_layers", "dense_layers"),
}
_NUMBERED = re.compile(r"(^|_)(idx|idxs|indices|indexe?s|layer_ids|block_ids)$|_layers$")
_FLAGS = {"no_rope_layers", "attention_layers"}  # An entry for each layer, by such names.
# Keys of layers that are stored behind the others, to predict more tokens.
_AHEAD = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


COUNT = "num_hidden_layers"
_EACH = re.compile(r"layers?_(block_)?types?$|block_types?$|block_configs|hybrid_override_pattern")
# Classes that count their layers by this key, whatever a config leaves to its default.
_COUNTED = re.compile(
  r"(llama|mistral|mixtral|qwen[23]|gemma[23]?|phi3?|olmo[23]?|granite|cohere2?|starcoder2|bert"
  r"|roberta|vit|helium|smollm3)(_moe)?(_text)?"
)


class Layers(NamedTuple):
  """Layers that are stacked anew.

  Attributes:
    height: how many there were, as many as are stored.
    order: the old number of each new one.
    said: how many there were by the config.
  """

  height: int
  order: tuple[int, ...]
  said: int | None = None

  def each(self, value: Sequence[Any]) -> bool:
    """Tells whether a list is as long as if it had an entry for each layer."""
    if len(value) not in (self.height, self.said):
      return False
    if len(value) <= max(self.order, default=0):
      raise ValueError(
        f"the config of the base, or first model, has {list(value)!r:.100}, an entry for each of "
        f"{len(value)} layers, but layer {max(self.order)} of a model is stacked: let one that has "
        "as many layers be the first."
      )
    return True


def counts(part: Config, whole: Config) -> bool:
  """Tells whether the class of a part that says no number of layers has COUNT for it."""
  text = "llama" if "llava" in str(whole.get("model_type")) else None  # As LLaVA's classes have it.
  kind = part.get("model_type", text)
  return isinstance(kind, str) and _COUNTED.fullmatch(kind) is not None


def each_layer(config: Config, height: int) -> list[str]:
  """Returns the keys of lists that have an entry for each of some layers, and are called so."""
  return [
    key
    for key, value in config.items()
    if isinstance(value, list | tuple | str) and len(value) == height and _EACH.search(key)
  ]


def stacked(config: Config, count: str | None, layers: Layers) -> dict[str, Any]:
  """Returns the part of a config that is about one stack, as it holds for the new layers.

  >>> own = {"n_layer": 2, "mlp_only_layers": [0], "layer_types": ["a", "b"]}
  >>> stacked(own, "n_layer", Layers(2, (1, 0, 0)))
  {'n_layer': 3, 'mlp_only_layers': [1, 2], 'layer_types': ['b', 'a', 'a']}

  Args:
    config: the part.
    count: its key for the number of layers; None: its lists alone say it.
    layers: the layers.

  Raises:
    ValueError: naming a rule that holds for other layers than before, and has no list.
  """
  said = layers.height if count is None else config.get(count, layers.height)
  made, layers = _ahead(config, said, layers)
  if count is not None:
    made[count] = len(layers.order)
  if layers.order == tuple(range(layers.height)):
    return made
  layers = layers._replace(said=said)
  made = {key: _followed(key, value, layers) for key, value in made.items()}
  for rule in (_sparse, _cycles, _thresholds, _shared, _scaled, _stages, _refused):
    made = rule(config, made, layers)
  return made


def _ahead(config: Config, count: int, layers: Layers) -> tuple[dict[str, Any], Layers]:
  """Counts the layers that predict more tokens apart: they lie behind all others."""
  key = next((k for k in _AHEAD if type(config.get(k)) is int and config[k] > 0), None)
  if key is None or layers.height != count + config[key]:
    return dict(config), layers
  extra = [i for i, old in enumerate(layers.order) if old >= count]
  rest = tuple(old for old in layers.order if old < count)
  if extra != list(range(len(rest), len(layers.order))):
    raise ValueError(
      f"{key} is {config[key]}: the last {config[key]} of the {layers.height} layers predict more "
      "tokens; put them at the end, or leave them out."
    )
  return {**config, key: len(extra)}, Layers(count, rest)


def ahead(config: Config) -> int:
  """Returns how many layers a config says are stored behind those that it counts."""
  return next((config[k] for k in _AHEAD if type(config.get(k)) is int), 0)


# --- Lists ---


def _followed(key: str, value: Any, layers: Layers) -> Any:
  """Returns a value whose entries for layers are in the new order."""
  if _OTHERS.fullmatch(key) and key not in _NUMBERS:
    return value
  if isinstance(value, Mapping):
    return _inside(key, value, layers)
  if isinstance(value, str):
    each = layers.each(value) and "pattern" in key and key != layer_rules.WINDOWS
    return "".join(value[old] for old in layers.order) if each else value
  if not isinstance(value, list | tuple):
    return value
  if key == "attention_types":  # GPT-Neo's, [[kinds, how often], ...].
    kinds = [k for own in value if isinstance(own, list) and len(own) == 2 for k in _repeated(*own)]
    return [[[kinds[old] for old in layers.order], 1]] if layers.each(kinds) else value
  if key == "block_types" and value:  # RecurrentGemma's, which begin anew at their end.
    kinds = [value[old % len(value)] for old in layers.order]
    same = kinds == [value[i % len(value)] for i in range(len(kinds))]
    return value if same and len(value) < layers.height else kinds
  if _is_numbers(key, value, layers.height):
    return [i for i, old in enumerate(layers.order) if old in value]
  return [value[old] for old in layers.order] if layers.each(value) else value


def _repeated(kinds: Any, times: Any) -> list[Any]:
  return kinds * times if isinstance(kinds, list) and type(times) is int else []


def _is_numbers(key: str, value: Sequence[Any], height: int) -> bool:
  """Tells whether a list holds numbers of layers, each once, and not an entry for each layer."""
  if not (key in _NUMBERS or _NUMBERED.search(key)) or key in _FLAGS:
    return False
  whole = all(type(v) is int and 0 <= v < height for v in value)
  return whole and len(set(value)) == len(value)


def _inside(key: str, value: Config, layers: Layers) -> dict[str, Any]:
  """Returns a mapping by number of layer, or with lists of its own, in the new order."""
  if value and all(str(k).isdecimal() and int(k) < layers.height for k in value):
    found = {str(i): value[str(old)] for i, old in enumerate(layers.order) if str(old) in value}
    return found if "layer" in key else dict(value)
  if key == "linear_attn_config":  # Kimi's: its numbers begin with 1.
    return {
      k: [i + 1 for i, old in enumerate(layers.order) if old + 1 in v] if isinstance(v, list) else v
      for k, v in value.items()
    }
  if any("layer" in k and type(v) is int for k, v in value.items()):
    return dict(value)  # A part about another stack.
  return {k: _followed(k, v, layers) for k, v in value.items()}


def entries(config: Config, height: int, rules: bool = False) -> Iterator[tuple[str, list[Any]]]:
  """Yields what lists of a config and its parts, and rules if wanted, say of each of some layers.

  >>> dict(entries({"layer_types": ["a", "b"], "mlp_only_layers": [1]}, 2))
  {'layer_types': ['a', 'b'], 'mlp_only_layers': [False, True]}
  """
  for key, value in config.items():
    if _OTHERS.fullmatch(key) and key not in _NUMBERS:
      continue
    if isinstance(value, Mapping):
      yield from entries(value, height, rules)
    elif key == "block_types" and isinstance(value, list) and value:
      yield key, [value[i % len(value)] for i in range(height)]
    elif isinstance(value, list | tuple) and _is_numbers(key, value, height):
      yield key, [i in value for i in range(height)]
    elif _lists(key, value) and len(value) == height:
      yield key, [*value]
    elif rules and type(value) is int and value > 1 and _every(key):
      yield key, [i % value for i in range(height)]
    elif rules and type(value) is int and layer_rules.EDGE.search(key):
      yield key, [i >= value for i in range(height)]


def _lists(key: str, value: Any) -> bool:
  return isinstance(value, list | tuple) or (isinstance(value, str) and "pattern" in key)


def _every(key: str) -> bool:
  """Tells whether a rule is about every n-th layer."""
  return bool(layer_rules.EVERY.search(key) or key in layer_rules.STEPS)


# --- Rules that are written out ---


def _sparse(config: Config, made: dict[str, Any], layers: Layers) -> dict[str, Any]:
  """Every n-th layer has experts, but for those of a list: Qwen's."""
  step = config.get("decoder_sparse_step")
  listed = config.get("mlp_only_layers") or []
  if type(step) is not int or step <= 1 or "mlp_only_layers" not in config:
    return made
  if not isinstance(listed, list):
    raise ValueError(f"mlp_only_layers of the config must be a list, got {listed!r:.100}.")
  dense = [(old + 1) % step != 0 or old in listed for old in layers.order]
  new = made["mlp_only_layers"] or []
  if dense == [(i + 1) % step != 0 or i in new for i in range(len(dense))]:
    return made
  return {
    **made,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [i for i, d in enumerate(dense) if d],
  }


def _cycles(config: Config, made: dict[str, Any], layers: Layers) -> dict[str, Any]:
  known = layer_rules.BY_TYPE.get(str(config.get("model_type")))
  cycles = {} if known is None else {known.key: known}
  for key, own in layer_rules.BY_KEY.items():
    if key in config and not (known and known.list == own.list):
      cycles.setdefault(key, own)
  for cycle in cycles.values():
    every = config.get(cycle.key, config.get(f"_{cycle.key}", cycle.every))
    if type(every) is int and every > 0 and not config.get(cycle.list):
      made = _written(cycle, every, made, layers)
  return made


def _written(
  cycle: layer_rules.Cycle, every: int, made: dict[str, Any], layers: Layers
) -> dict[str, Any]:
  before = [cycle.holds(every, old) for old in layers.order]
  if before == [cycle.holds(every, i) for i in range(len(before))]:
    return made
  if cycle.kinds == (1, 0):
    return {**made, cycle.list: [i for i, own in enumerate(before) if own]}
  return {**made, cycle.list: [cycle.kinds[0 if own else 1] for own in before]}


# --- Rules whose numbers can change ---


def _thresholds(config: Config, made: dict[str, Any], layers: Layers) -> dict[str, Any]:
  kind = str(config.get("model_type"))
  for key, (name, kinds) in layer_rules.FROM.items():
    default = layer_rules.DENSE.get(kind) if name == "mlp_layer_types" else None
    first = config.get(key, default)
    if type(first) is not int or (name and config.get(name)) or _idle(key, config):
      continue
    after = [old >= first for old in layers.order]
    count = len(after) - sum(after)
    if after == [i >= count for i in range(len(after))]:
      # Where the rule says nothing else of the new layers, it stays.
      same = after == [i >= first for i in range(len(after))]
      if same or key in config:
        made = made if same else {**made, key: count}
        continue
    if name and (kind in layer_rules.DENSE or key == "max_window_layers"):
      made = {**made, name: [kinds[int(own)] for own in after]}
    else:
      raise _error(key, first, layers)
  return made


def _idle(key: str, config: Config) -> bool:
  """Tells whether no layer has a window, from whatever number on."""
  kind = str(config.get("model_type"))
  if key != "max_window_layers":
    return False
  if "model_type" in config and not layer_rules.WINDOWED.fullmatch(kind):
    return True
  windows = config.get("sliding_window") is not None and not kind.startswith("qwen")
  return not config.get("use_sliding_window", windows)


def _shared(config: Config, made: dict[str, Any], layers: Layers) -> dict[str, Any]:
  """The last layers use keys and values of those before: Gemma's."""
  count = config.get("num_kv_shared_layers")
  if type(count) is not int or count == 0:
    return made
  shared = [old >= layers.height - count for old in layers.order]
  if shared != sorted(shared):
    raise _error("num_kv_shared_layers", count, layers)
  return {**made, "num_kv_shared_layers": sum(shared)}


def _scaled(config: Config, made: dict[str, Any], layers: Layers) -> dict[str, Any]:
  """MiniCPM divides what a layer adds by the root of their number."""
  scale = config.get("scale_depth")
  if not isinstance(scale, int | float) or not layers.order:
    return made
  return {**made, "scale_depth": scale * math.sqrt(len(layers.order) / layers.height)}


# --- Rules that hold or are refused ---


def _refused(config: Config, made: dict[str, Any], layers: Layers) -> dict[str, Any]:
  """Raises ValueError for rules that have no list, and hold for other layers than before."""
  if config.get("hidden_size_per_layer_input"):
    raise ValueError(
      "the config says hidden_size_per_layer_input: tensors outside of the layers hold a part for "
      f"each of the {layers.height} layers, so that these cannot be stacked anew."
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
    and (made.get("layer_types") or ["full_attention"])[-1] != "full_attention"
  ):
    raise _error("model_type", kind, layers)
  for key, value in config.items():
    wrong = type(value) is int and key not in known and not _holds(key, value, config, layers)
    if wrong or (key == "max_window_layers" and moved and _alternates(config)):
      raise _error(key, value, layers)
  return made


def _stages(config: Config, made: dict[str, Any], layers: Layers) -> dict[str, Any]:
  """Names the outputs of a backbone, which are called by their layers."""
  names = ["stem", *(f"stage{i + 1}" for i in range(layers.height))]
  if config.get("stage_names") not in (None, names) or not config.get("out_features"):
    return made
  new = {"stem": 0, names[-1]: len(layers.order)}
  if not set(config["out_features"]) <= new.keys():
    raise _error("out_features", config["out_features"], layers)
  places = [new[name] for name in config["out_features"]]
  every = [*names[:1], *(f"stage{i + 1}" for i in range(len(layers.order)))]
  own = {"out_features": [every[i] for i in places], "out_indices": places, "stage_names": every}
  return {k: own.get(k, v) for k, v in made.items()}


def _alternates(config: Config) -> bool:
  """Tells whether every second layer before a number has a window: Qwen 2's with experts."""
  kind = config.get("model_type") == "qwen2_moe" and not config.get("layer_types")
  return kind and bool(config.get("use_sliding_window"))


def _holds(key: str, value: int, config: Config, layers: Layers) -> bool:
  """Tells whether a rule says of each new layer what it said of the old one."""
  pairs = list(enumerate(layers.order))
  if _every(key) and value > 1:
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
