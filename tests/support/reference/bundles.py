"""Slow transcriptions in NumPy of merges that keep the tasks apart; see `basics.py`.

The result is a list of what each task gets.
"""

import numpy as np

from reference import basics


def emr(taus, ratio="leaf"):
  """Elect, mask, rescale."""
  shared, taken = {}, [{} for _ in taus]
  for n in taus[0]:
    sign = np.where(sum(t[n] for t in taus) > 0, 1, -1)
    shared[n] = sign * np.max([np.where(t[n] * sign > 0, np.abs(t[n]), 0) for t in taus], axis=0)
    for own, t in zip(taken, taus, strict=True):
      own[n] = np.where(t[n] * sign > 0, shared[n], 0)

  def magnitude(tau):
    return sum(np.mean(np.abs(x)) if ratio == "leaf" else np.sum(np.abs(x)) for x in tau.values())

  scales = [
    magnitude(t) / magnitude(own) if magnitude(own) else 1
    for t, own in zip(taus, taken, strict=True)
  ]
  return [{n: s * x for n, x in own.items()} for s, own in zip(scales, taken, strict=True)]


def tall_masks(taus, thresholds):
  """Of the sum, the entries where a task vector is large beside what the others add to it."""
  total = basics.weighted_sum(taus, np.ones(len(taus)))
  return [
    {n: np.where(np.abs(t[n]) > limit * np.abs(x - t[n]), x, 0) for n, x in total.items()}
    for t, limit in zip(taus, thresholds, strict=True)
  ]


def rmm(factors, components):
  """Principal components, position by position: of factors [positions, rank], one a task."""
  out = [np.zeros(x.shape) for x in factors]
  for p in range(len(factors[0])):
    x = np.stack([f[p] for f in factors], axis=1).astype(np.float64)  # [rank, tasks]
    mean = x.mean(axis=1)
    basis = np.linalg.svd(x - mean[:, None])[0][:, :components]
    for k, own in enumerate(out):
      own[p] = mean + basis @ (basis.T @ (x[:, k] - mean))
  return out
