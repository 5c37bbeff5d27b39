"""Names of running statistics: means and variances that layers count, and that nobody tunes.

Batch normalisation keeps them beside its weights. They are no directions in which a model was
tuned: a method that adds task vectors up would make a variance negative.
"""

from __future__ import annotations

import re

_MOMENT = re.compile(
  r"(^|[/.])(batch_stats[/.].+|(running|moving)_(mean|var|variance)|num_batches_tracked)$"
)
_VARIANCE = re.compile(r"(^|[/.])(batch_stats[/.](.+[/.])?var|(running|moving)_(var|variance))$")
FATE = "averaged, as running statistics are"


def is_moment(name: str) -> bool:
  """Tells by its name whether a leaf is a running statistic, which is averaged by every method.

  Those are all of Flax's collection `batch_stats`, and what torch and Keras call `running_mean`,
  `running_var`, `moving_mean`, `moving_variance` and `num_batches_tracked`.

  Example:
    >>> is_moment("batch_stats/bn/mean"), is_moment("bn1.running_var"), is_moment("head.mean")
    (True, True, False)
  """
  return _MOMENT.search(name) is not None


def is_variance(name: str) -> bool:
  """Tells by its name whether a leaf is a running variance, which is never negative.

  Example:
    >>> is_variance("batch_stats/bn/var"), is_variance("bn1.running_mean")
    (True, False)
  """
  return _VARIANCE.search(name) is not None
