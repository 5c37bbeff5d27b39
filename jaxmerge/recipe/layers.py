"""Where the layers of a model are, by the names of its tensors alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple  # Any: what a config.json holds.

_FIRST_NUMBER = re.compile(r"^((?:[^.]*[^.\d][^.]*\.)*)(\d+)\.(.+)$")
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers")
_INPUTS = re.compile(r"(^|[._])(embed\w*|\w*embeddings?|wte|wpe|shared|patch_embed\w*)(\.|$)")


class Place(NamedTuple):
  """Where a tensor stands in its model: `model.layers.` 3 `mlp.up_proj.weight`."""

  stack: str
  layer: int
  rest: str


def place(name: str) -> Place | None:
  """Takes a tensor's name apart at the first number in it; None without one.

  >>> place("model.layers.3.experts.7.w1.weight")
  Place(stack='model.layers.', layer=3, rest='experts.7.w1.weight')
  >>> place("model.norm.weight")
  """
  found = _FIRST_NUMBER.match(name)
  return Place(found[1], int(found[2]), found[3]) if found else None


def stacks(names: Iterable[str]) -> dict[str, int]:
  """Returns the stacks of layers of a model, and how many layers each has.

  >>> stacks(["h.0.w", "h.1.w", "norm.w"])
  {'h.': 2}
  """
  found: dict[str, set[int]] = {}
  for name in names:
    if at := place(name):
      found.setdefault(at.stack, set()).add(at.layer)
  return {stack: max(layers) + 1 for stack, layers in sorted(found.items())}


def main(names: Iterable[str], config: Mapping[str, Any]) -> str:
  """Returns the stack that `layer_range` counts: the one as high as the config says.

  Raises:
    ValueError: if there is none, or more than one.
  """
  found = stacks(names)
  heights = {config.get(key) for key in _COUNTS}
  heights |= {v.get(key) for v in config.values() if isinstance(v, dict) for key in _COUNTS}
  fits = [stack for stack, height in found.items() if height in heights] or list(found)
  if len(fits) != 1:
    words = ", ".join(f"{stack}* ({found[stack]})" for stack in fits) or "none"
    raise ValueError(f"slices need one stack of layers; this model's are: {words}.")
  return fits[0]


def count_key(config: Mapping[str, Any]) -> str | None:
  """Returns the key under which a config says how many layers there are."""
  return next((key for key in _COUNTS if key in config), None)


def is_input(name: str) -> bool:
  """Tells whether a tensor outside of the layers comes before them: an embedding.

  >>> is_input("model.embed_tokens.weight"), is_input("lm_head.weight")
  (True, False)
  """
  return _INPUTS.search(name) is not None
