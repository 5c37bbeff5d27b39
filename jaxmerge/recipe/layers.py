"""Locates the layers of a model from its tensor names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple  # Any: JSON of a config.

from jaxmerge.io.tensors import layer_names
from jaxmerge.recipe.layer_config import COUNT, ahead, each_layer, has_default_count, restack
from jaxmerge.recipe.layer_rules import Layers

_FIRST_NUMBER = re.compile(r"^((?:[^.]*[^.\d][^.]*\.)*)(\d+)\.(.+)$")
_COUNTS = (
  *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers"),
  *("encoder_layers", "decoder_layers", "depth", "num_encoder_layers", "layers", "num_blocks"),
  *("encoder_num_hidden_layers", "decoder_num_hidden_layers"),
)
_PLAIN = {"num", "n", "hidden", "layers", "layer", "config", "model"}  # Prefixes without meaning.
_INPUTS = re.compile(r"(^|[._/])(embed\w*|\w*embeddings?|wte|wpe|shared|patch_embed\w*)([./]|$)")
_SIGHT = {"vision_config", "audio_config", "speech_config", "visual"}
_TOWER = re.compile(r"(^|[._/])(vision|visual|vit|image|img|audio|speech|video)(_\w+)?([./]|$)")


class Place(NamedTuple):
  """The place of a tensor in its model: `model.layers.` 3 `mlp.up_proj.weight`."""

  stack: str
  layer: int
  rest: str


def place(name: str) -> Place | None:
  """Splits a tensor's name at its first number, of a layer if it has slashes; None without one.

  >>> place("model.layers.3.experts.7.w1.weight")
  Place(stack='model.layers.', layer=3, rest='experts.7.w1.weight')
  >>> place("decoder/layers_3/mlp/kernel")
  Place(stack='decoder/layers_', layer=3, rest='mlp/kernel')
  >>> place("model.norm.weight")
  """
  if at := layer_names.layer_of_path(name):
    return Place(*at) if at[2] else None
  match = _FIRST_NUMBER.match(name)
  return Place(match[1], int(match[2]), match[3]) if match else None


def stacks(names: Iterable[str]) -> dict[str, int]:
  """Returns the layer stacks of a model, with their numbers of layers.

  >>> stacks(["h.0.w", "h.1.w", "norm.w"])
  {'h.': 2}
  """
  numbers: dict[str, set[int]] = {}
  for name in names:
    if at := place(name):
      numbers.setdefault(at.stack, set()).add(at.layer)
  return {stack: max(layers) + 1 for stack, layers in sorted(numbers.items())}


def main(names: Iterable[str], config: Mapping[str, Any]) -> str:
  """Returns the stack that `layer_range` refers to: the one with the config's number of layers.

  For a model with vision or audio it is the text stack, by `text_config` if there is one.

  >>> text = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 2}}
  >>> main(["vision_tower.layers.1.w", "language_model.layers.1.w"], text)
  'language_model.layers.'

  Raises:
    Unclear: if there is none, or more than one.
  """
  layer_counts = stacks(names)
  parts = _parts(config)
  if of_text := _of_text(parts):
    layer_counts = {
      stack: n for stack, n in layer_counts.items() if not is_tower(stack)
    } or layer_counts
  counted = [parts[part].get(key) for part in of_text or parts for key in _COUNTS]
  counts = {count for count in counted if type(count) is int}
  fits = [stack for stack, num_layers in layer_counts.items() if num_layers in counts] or list(
    layer_counts
  )
  if len(fits) != 1:
    raise Unclear({stack: layer_counts[stack] for stack in fits})
  return fits[0]


def _of_text(parts: Collection[str]) -> list[str]:
  """Returns the text parts of a config; none where the config has no other modality."""
  named = [part for part in parts if part.split(".")[-1] == "text_config"]
  others = [part for part in parts if not set(part.split(".")) & _SIGHT]
  return named or (others if len(others) < len(parts) else [])


class Unclear(ValueError):
  """A model whose layers lie in several stacks of which none is the one that is meant.

  Attributes:
    stacks: what their names begin with, and how many layers they have.
  """

  def __init__(self, stacks: Mapping[str, int]):
    words = ", ".join(f"{stack}* ({num_layers})" for stack, num_layers in stacks.items()) or "none"
    super().__init__(f"slices need one stack of layers; this model's are: {words}.")
    self.stacks = stacks


def is_tower(name: str) -> bool:
  """Returns whether a tensor or a stack is part of a vision or audio tower.

  >>> is_tower("model.visual.blocks.0.norm1.weight"), is_tower("model.layers.0.mlp.weight")
  (True, False)
  """
  return _TOWER.search(name) is not None


def resize(
  config: Mapping[str, Any],
  num_layers: int | None,
  order: Mapping[int, int],
  module: str = "",
  others: Collection[str] = (),
) -> dict[str, Any]:
  """Returns the config of a model with restacked layers.

  >>> resize({"num_hidden_layers": 2, "layer_types": ["full", "slide"]}, 2, {0: 0, 1: 1, 2: 1})
  {'num_hidden_layers': 3, 'layer_types': ['full', 'slide', 'slide']}

  Args:
    config: what it says of the old stack; of a model of several towers, in a part for each.
    num_layers: of the old stack; None: unknown.
    order: new layer -> old layer.
    module: the part of the model that the stack is of.
    others: the model's other parts.

  Raises:
    ValueError: where the config's counts are ambiguous, or a rule does not hold.
  """
  parts = _parts(config)
  every = [(n, k) for n, part in parts.items() for k in _COUNTS if type(part.get(k)) is int]
  if not module:  # As `main` takes the stack of the text, though only another one is counted.
    texts = _of_text(parts)
    every = [p for p in every if p[0] in texts or not set(p[0].split(".")) & _SIGHT]
  if not every and config and num_layers and [*order.values()] != [*range(num_layers)]:
    return _resize_uncounted(
      config, parts, Layers(num_layers, tuple(order[i] for i in range(len(order))))
    )
  fits = [(n, k) for n, k in every if num_layers in (parts[n][k], parts[n][k] + ahead(parts[n]))]
  mine, theirs = _words(module), set().union(*map(_words, others)) - _words(module)
  # Where the files hold another number of layers, the first key of a part is meant.
  fits = fits or list({n: (n, k) for n, k in reversed(every)}.values())[::-1]
  called = [p for p in fits if _words("_".join(p)) & mine]
  places = called or [p for p in fits if not _words("_".join(p)) & theirs]
  if not module:  # As `main` takes the stack of the text.
    places = [p for p in places if p[0] in _of_text(parts)] or places
  if len({part for part, _ in places}) > 1:
    keys = " and ".join(f"{'.'.join(filter(None, p))}: {parts[p[0]][p[1]]}" for p in places)
    raise ValueError(
      f"the config says {keys}; which of them are the {num_layers} layers of the files?"
    )
  for part, key in places[:1]:
    layers = Layers(num_layers or parts[part][key], tuple(order[i] for i in range(len(order))))
    changed = restack(parts[part], key, layers)
    changed |= {k: changed[key] for _, k in places}
    return _replace(config, part.split(".") if part else [], changed)
  return dict(config)


def _resize_uncounted(
  config: Mapping[str, Any], parts: Mapping[str, Any], layers: Layers
) -> dict[str, Any]:
  """Resizes a config that counts no layers: its lists say how many, or its class has a default."""
  meant = [p for p in parts if p.split(".")[-1] == "text_config"] or [""]
  listed = [p for p in meant if each_layer(parts[p], layers.num_layers)]
  known = [p for p in meant if has_default_count(parts[p], config if p else {})]
  if len(listed or known) != 1:
    raise ValueError(
      f"the config has no count of the {layers.num_layers} layers, such as num_hidden_layers, and "
      "no list of them: it is not known what its class makes of another number. Write the count "
      "into the config.json of the base, or first model."
    )
  (part,) = listed or known
  changed = restack(parts[part], None if listed else COUNT, layers)
  return _replace(config, part.split(".") if part else [], changed)


def _parts(config: Mapping[str, Any], prefix: str = "", depth: int = 3) -> dict[str, Any]:
  """Returns the nested parts of a config by dotted name."""
  parts = {prefix: config}
  for key, value in config.items() if depth else ():
    if isinstance(value, Mapping):
      parts |= _parts(value, f"{prefix}.{key}".removeprefix("."), depth - 1)
  return parts


def _replace(config: Mapping[str, Any], path: Sequence[str], part: Any) -> dict[str, Any]:
  """Returns a config with another part at a path; with an empty path the part itself."""
  if not path:
    return dict(part)
  return {**config, path[0]: _replace(config[path[0]], path[1:], part)}


def _words(name: str) -> set[str]:
  return set(re.split(r"[_.]", name)) - _PLAIN - {""}


def is_input(name: str) -> bool:
  """Returns whether a tensor comes before the layers, as an embedding does.

  >>> is_input("model.embed_tokens.weight"), is_input("lm_head.weight")
  (True, False)
  """
  return _INPUTS.search(name) is not None
