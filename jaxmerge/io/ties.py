"""Which output head is the embedding, by a config and the names of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any  # What a config.json holds.

from jaxmerge.io.tensor import Tensor

# Ends of names, the likelier embedding first: T5 has its shared one under its stacks' names too.
_EMBEDDINGS = (
  ".shared.weight", "embed_tokens.weight", "wte.weight", "word_embeddings.weight",
  "embed_in.weight",
)  # fmt: skip
HEADS = (
  "lm_head.weight", "embed_out.weight", "proj_out.weight", "lm_head.decoder.weight",
  "cls.predictions.decoder.weight", "predictions.decoder.weight", "vocab_projector.weight",
)  # fmt: skip


def said(
  tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[str, tuple[str, ...]] | None:
  """Returns the embedding and the heads among the tensors that are it, where a config says so.

  A head has the embedding's shape and lies outside of the layers: projections of such names within
  them are none.

  >>> import numpy as np
  >>> own = Tensor("", np.dtype(np.float32), (9, 2), lambda start, out: None)
  >>> said({"shared.weight": own, "lm_head.weight": own}, {"tie_word_embeddings": True})
  ('shared.weight', ('lm_head.weight',))
  """
  parts = [c for c in (config, config.get("text_config")) if isinstance(c, dict)]
  found = (name for end in _EMBEDDINGS for name in tensors if f".{name}".endswith(end))
  embedding = next(found, None)
  if embedding is None or not any(c.get("tie_word_embeddings") is True for c in parts):
    return None
  shape = tensors[embedding].shape
  heads = [n for n, t in tensors.items() if n.endswith(HEADS) and t.shape == shape]
  return embedding, tuple(n for n in heads if not any(part.isdigit() for part in n.split(".")))
