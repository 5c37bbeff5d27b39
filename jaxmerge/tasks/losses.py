"""Losses and accuracy per row."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

Array = jax.Array
Rowwise = Callable[[Array, Array], Array]


def cross_entropy(outputs: Array, labels: Array | np.ndarray) -> Array:
  """Returns the cross entropy of each label in nats: logits [B, ..., C], labels [B, ...]."""
  if outputs.ndim == 2:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
  # Token logits may be sharded over the vocabulary: a masked sum partitions, a gather does not.
  place = lax.broadcasted_iota(jnp.int32, outputs.shape, outputs.ndim - 1)
  at_label = jnp.where(
    place == labels.astype(np.int32)[..., None], outputs, jnp.zeros((), outputs.dtype)
  )
  return jax.nn.logsumexp(outputs, axis=-1) - at_label.sum(-1)


def accuracy(outputs: Array, labels: Array | np.ndarray) -> Array:
  """Returns whether the largest logit of each row is the label's: [B, C], [B] -> float32 [B].

  A row with a NaN logit counts as wrong.
  """
  predicted, is_number = outputs.argmax(-1), ~jnp.isnan(outputs).any(-1)
  return (is_number & (predicted == labels.astype(predicted.dtype))).astype(jnp.float32)
