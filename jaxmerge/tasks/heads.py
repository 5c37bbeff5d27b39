"""Zero-shot heads from the embeddings of a base model."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np


def zero_shot(
  embed: Callable[[np.ndarray, np.ndarray], jax.Array],
  prompts_ids: np.ndarray,
  prompts_mask: np.ndarray,
  scale: float = 20.0,
) -> np.ndarray:
  """Returns a head [D, classes] whose columns are the scaled unit embeddings of class prompts.

  For features of unit length the logits are `scale` times cosines, as in CLIP.

  Args:
    embed: the base model, (ids, mask) -> [classes, D]; its output is normalised here.
    prompts_ids: int32 [classes, length], one prompt per class in the order of the labels.
    prompts_mask: int32 [classes, length], 1 for tokens, 0 for padding.
    scale: norm of every column.

  Reference: Radford et al. 2021, CLIP (arXiv:2103.00020), section 3.1.4.
  """
  if prompts_ids.ndim != 2 or prompts_ids.shape != prompts_mask.shape:
    raise ValueError(
      f"prompts_ids {prompts_ids.shape} and prompts_mask {prompts_mask.shape} must "
      "have the same shape [classes, length]."
    )
  rows = np.asarray(embed(prompts_ids, prompts_mask), np.float32)
  if rows.ndim != 2 or len(rows) != len(prompts_ids):
    raise ValueError(f"embed must return [{len(prompts_ids)}, D], got {rows.shape}.")
  norms = np.linalg.norm(rows, axis=1, keepdims=True)
  wrong = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
  if wrong.size:
    raise ValueError(
      f"prompt {wrong[0]}: its embedding has norm {norms[wrong[0], 0]}; "
      "it must be finite and not zero."
    )
  return np.ascontiguousarray((scale * rows / norms).T)
