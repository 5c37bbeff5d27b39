"""Names of running statistics: means and variances that layers accumulate and no optimizer tunes.

Batch normalisation stores them with its weights. Their changes are not task vectors: a method that
adds task vectors could make a variance negative.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_BOX = re.compile(r"([/.](raw_)?value|:\d+)+$")  # What Flax and Keras write behind a name.
_NORM = r"([^/.]*_|sync)?(bn|batch_?norm(ali[sz]ation)?)(_?\d+d?|_[^/.]*)?"


def _pattern(which: str, more: str = "") -> re.Pattern[str]:
  """Returns a pattern of names that end in a word, as Flax, torch, Keras, Paddle and Haiku do."""
  flax = rf"(batch_stats([/.].+)?|{_NORM})[/.]({which})"
  others = rf"(running|moving)?_({which})|({which})_ema[/.](average|hidden)"
  return re.compile(rf"(^|[/.])({flax}|{others}{more})$", re.IGNORECASE)


_VARIANCE = _pattern("var|variance|std")
_MOMENT = _pattern("mean|var|variance|std", r"|batch_stats[/.].+|num_batches_tracked")
_PAIR = {"mean", "var"}
_BESIDE = _PAIR | {"scale", "bias"}
FATE = "averaged, as running statistics are"


def is_moment(name: str) -> bool:
  """Returns whether a leaf is a running statistic, by its name alone.

  Those are all of Flax's collection `batch_stats`, `mean` and `var` of a module that is called
  after batch normalisation, what torch and Keras call `running_mean`, `running_var`, `moving_mean`,
  `moving_variance` and `num_batches_tracked`, and Haiku's `mean_ema/average`.

  Example:
    >>> is_moment("batch_stats/bn/mean"), is_moment("bn1.running_var"), is_moment("head.mean")
    (True, True, False)
  """
  return _MOMENT.search(_BOX.sub("", name)) is not None


def is_variance(name: str) -> bool:
  """Returns whether a leaf is a running variance (never negative), by its name alone.

  Example:
    >>> is_variance("batch_stats/bn/var"), is_variance("bn1.running_mean")
    (True, False)
  """
  return _VARIANCE.search(_BOX.sub("", name)) is not None


def of(names: Iterable[str]) -> frozenset[str]:
  """Returns the running statistics among the leaves of a model, which every method averages.

  A `mean` and a `var` in one module count if it holds nothing else but a `scale` and a `bias`.

  Example:
    >>> sorted(of(["norm/mean", "norm/var", "norm/scale", "head/mean"]))
    ['norm/mean', 'norm/var']
  """
  names = list(names)
  return frozenset(n for n in names if is_moment(n)) | _pairs(names)


def variances(names: Iterable[str]) -> frozenset[str]:
  """Returns the running variances among the leaves of a model.

  Example:
    >>> sorted(variances(["norm/mean", "norm/var", "vae/var"]))
    ['norm/var']
  """
  names = list(names)
  paired = {n for n in _pairs(names) if _split_name(n)[1] == "var"}
  return frozenset(n for n in names if is_variance(n)) | paired


def _pairs(names: Iterable[str]) -> frozenset[str]:
  """Returns means and variances that only their neighbours distinguish from weights."""
  folders: dict[str, dict[str, str]] = {}
  for name in names:
    folder, leaf = _split_name(name)
    folders.setdefault(folder, {})[leaf] = name
  pairs = [r for r in folders.values() if r.keys() >= _PAIR and r.keys() <= _BESIDE]
  return frozenset(pair[leaf] for pair in pairs for leaf in _PAIR)


def _split_name(name: str) -> tuple[str, str]:
  folder, _, leaf = _BOX.sub("", name).replace(".", "/").rpartition("/")
  return folder, leaf
