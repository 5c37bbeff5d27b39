"""Slow transcriptions in NumPy of what is done with low-rank factors.

The adapters of one matrix are a list of (a [rank, in], b [out, rank], scale).
"""

import numpy as np


def flora(adapters, weights):
  """Stacks the factors, of which the first has weight and scale."""
  a = np.concatenate(
    [w * s * np.float64(a) for w, (a, _, s) in zip(weights, adapters, strict=True)]
  )
  return a, np.concatenate([np.float64(b) for _, b, _ in adapters], axis=1)


def averaged(adapters, weights):
  """Averages the factors, the smaller ones filled up with zeros."""
  most = max(len(a) for a, _, _ in adapters)
  a, b = 0, 0
  for w, (own_a, own_b, scale) in zip(weights, adapters, strict=True):
    more = most - len(own_a)
    a = a + w * np.concatenate([own_a, np.zeros((more, own_a.shape[1]))])
    b = b + w * scale * np.concatenate([own_b, np.zeros((len(own_b), more))], axis=1)
  return a, b
