"""Metrics: the score of a row, and whether a higher one is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple  # Any: parameters are the user's tree.

import numpy as np

from jaxmerge.core.stage import Array
from jaxmerge.tasks import losses


class Metric(NamedTuple):
  """A score of models.

  Attributes:
    name: name in reports.
    rowwise: (outputs, labels) -> score of each row, [B].
    lower_is_better: whether lower scores are better, as for a loss.
    chance: (labels) -> score of a guess that ignores the inputs; None: unknown.
    right_or_wrong: whether the score of a row is either 0 or 1.

  Example:
    >>> round(BITS_PER_BYTE.rowwise(jnp.zeros((1, 2, 256)), jnp.zeros((1, 2), int))[0].item(), 4)
    8.0
  """

  name: str
  rowwise: losses.Rowwise
  lower_is_better: bool = False
  chance: Callable[[np.ndarray], float] | None = None
  right_or_wrong: bool = False

  def gain(self, score: Any) -> Any:
    """Returns the score, or its negative if lower is better."""
    return -score if self.lower_is_better else score

  def to_stored(self, scores: np.ndarray) -> np.ndarray:
    """Returns the scores of rows as they are stored: booleans if rows are right or wrong."""
    return scores > 0.5 if self.right_or_wrong else scores


def metric_of(metric: Metric | losses.Rowwise | Any) -> Metric:
  """Returns a metric; for a function of outputs and labels, higher scores are better."""
  if isinstance(metric, Metric):
    return metric
  if not callable(metric):
    raise ValueError(
      f"metric must be a function (outputs, labels) -> [B] or a Metric, got {metric!r}: give one, "
      "such as jaxmerge.evaluation.metrics.ACCURACY."
    )
  return Metric(getattr(metric, "__name__", "score"), metric)


def most_frequent(labels: np.ndarray) -> float:
  """Returns the share of the most frequent class: the accuracy of always guessing it."""
  return float(np.bincount(labels).max() / len(labels))


def bits_per_byte(outputs: Array, labels: Array | np.ndarray) -> Array:
  """Returns the mean cross entropy of each row in bits: logits [B, T, V], labels [B, T] -> [B]."""
  return losses.cross_entropy(outputs, labels).mean(-1) / np.float32(np.log(2))


ACCURACY = Metric("accuracy", losses.accuracy, chance=most_frequent, right_or_wrong=True)
BITS_PER_BYTE = Metric("bits per byte", bits_per_byte, lower_is_better=True)
