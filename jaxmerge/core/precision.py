"""The precision of a tensor's merge, if it is not float32: a plain record, without jax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NARROW = ("bfloat16", "float16")


class Precision(NamedTuple):
  """A narrow dtype to merge in, to reproduce programs that compute in the dtype of their files.

  Attributes:
    dtype: inputs, task vectors and the result are rounded to this dtype, one of `NARROW`.
    each: every operation's result is rounded too, except sums over a whole tensor.
    numbers: names of the hyperparameters that are rounded.
    wide: the result is not rounded.
  """

  dtype: str
  each: bool = False
  numbers: tuple[str, ...] = ()
  wide: bool = False


def common(dtypes: Sequence[np.dtype]) -> np.dtype:
  """Returns the dtype that holds the values of all given dtypes exactly.

  Example:
    >>> common([np.dtype(np.float16), np.dtype(np.float32)])
    dtype('float32')
  """
  dtype = max(dtypes, key=lambda d: d.itemsize)
  narrow = any(d != dtype and d.itemsize == dtype.itemsize for d in dtypes)
  return np.dtype(np.float32) if narrow else dtype  # bfloat16 and float16.
