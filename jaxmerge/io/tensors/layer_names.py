"""Parses the layer in a tensor's name with slashes, as trees of Flax have them."""

from __future__ import annotations

import re

_LAYER_OF_PATH = re.compile(  # A number is a part, or ends one such as `layers_0`.
  r"(?P<stack>(?:[^/]+/)*?(?:(?:[^/]*_)?(?:layers?|[a-z]*blocks?|h)_)?)(?P<layer>[0-9]+)"
  r"(?:/(?P<rest>.+))?",
  re.IGNORECASE,
)


def layer_of_path(name: str) -> tuple[str, int, str] | None:
  """Splits a name with slashes at the number of its layer; None without one.

  >>> layer_of_path("decoder/layers_3/mlp/kernel"), layer_of_path("blocks/0/attn/kernel")
  (('decoder/layers_', 3, 'mlp/kernel'), ('blocks/', 0, 'attn/kernel'))
  >>> layer_of_path("LayerNorm_0/scale"), layer_of_path("model.layers.0.w")
  (None, None)
  """
  match = _LAYER_OF_PATH.fullmatch(name) if "/" in name else None
  return (match["stack"], int(match["layer"]), match["rest"] or "") if match else None
