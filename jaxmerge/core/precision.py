"""In which numbers a tensor is merged, where these are not float32: a plain record, free of jax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NARROW = ("bfloat16", "float16")


class Precision(NamedTuple):
  """Narrow numbers to merge in, as programs do that compute in the dtype of their files.

  Attributes:
    dtype: what inputs, task vectors and the result are rounded to, one of `NARROW`.
    each: so is what every operation returns; sums over a whole tensor are not.
    numbers: names of the method's numbers that are rounded.
    wide: the result is not rounded.
  """

  dtype: str
  each: bool = False
  numbers: tuple[str, ...] = ()
  wide: bool = False


def common(dtypes: Sequence[np.dtype]) -> np.dtype:
  """Returns the dtype that holds values of all of some dtypes without a loss.

  Example:
    >>> common([np.dtype(np.float16), np.dtype(np.float32)])
    dtype('float32')
  """
  dtype = max(dtypes, key=lambda d: d.itemsize)
  narrow = any(d != dtype and d.itemsize == dtype.itemsize for d in dtypes)
  return np.dtype(np.float32) if narrow else dtype  # bfloat16 and float16.
