"""Slow transcriptions in NumPy of the methods that descend; see `basics.py`.

They know of no Gram matrices: a gradient is the sum over tasks of that of a squared norm.
"""

import numpy as np

from reference.spectra import first


def adam(gradient, x, rate, steps):
  m = v = np.zeros_like(x)
  for t in range(1, steps + 1):
    g = gradient(x)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    x = x - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
  return x


def momentum(gradient, x, rate, steps):
  trace = np.zeros_like(x)
  for _ in range(steps):
    trace = gradient(x) + 0.9 * trace
    x = x - rate * trace
  return x


def loss(x, targets, rows, taus):
  """The sum over tasks, each as far as it is not zero."""
  parts = zip(targets, rows, taus, strict=True)
  return sum(np.sum(((x - t) @ r.T) ** 2) / np.sum(y * y) for t, r, y in parts if y.any())


def slope(x, targets, rows, taus):
  parts = zip(targets, rows, taus, strict=True)
  return sum(2 * (x - t) @ r.T @ r / np.sum(y * y) for t, r, y in parts if y.any())


def wudi(taus, rate, steps):
  return adam(lambda x: slope(x, taus, taus, taus), sum(taus), rate, steps)


def truncated(x, count):
  u, s, vt = first(x, count)
  return u @ np.diag(s) @ vt


def optmerge(taus, tuned, rate, steps):
  k = max(1, int(min(taus[0].shape) * (1 / len(taus))))
  rows = [np.diag(s) @ vt for _, s, vt in (first(x, k) for x in taus)]
  mean = np.mean(taus, axis=0)
  if tuned == "lora":
    targets = [truncated(x, k) for x in taus]
    return momentum(lambda x: slope(x, targets, rows, taus), mean, rate, steps)
  targets = [mean + truncated(x - mean, k) for x in taus]
  return adam(lambda x: slope(x, targets, rows, taus), sum(taus), rate, steps)
