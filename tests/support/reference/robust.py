"""Slow transcriptions in NumPy of aggregation against outliers; see `basics.py`."""

import numpy as np

from reference import basics


def by_entry(rule, taus):
  """Applies a rule for the sorted values of one entry to all entries."""
  out = {}
  for n, x in taus[0].items():
    columns = np.stack([t[n].reshape(-1) for t in taus], axis=1)
    out[n] = np.array([rule(np.sort(row)) for row in columns]).reshape(x.shape)
  return out


def median(taus):
  return by_entry(lambda row: row[(len(row) - 1) // 2], taus)


def trimmed_mean(taus, trim):
  return by_entry(lambda row: np.mean(row[trim : len(row) - trim]), taus)


def around(center):
  """The mean of the values nearest to a center; of two that are as far, the lower one."""

  def merged(taus, outliers):
    def rule(row):
      order = np.argsort(np.abs(row - center(row, outliers)), kind="stable")
      return np.mean(row[order[: len(row) - outliers]])

    return by_entry(rule, taus)

  return merged


meamed = around(lambda row, f: row[(len(row) - 1) // 2])
phocas = around(lambda row, f: np.mean(row[f : len(row) - f]))


def krum(taus, outliers, select, scope="tree"):
  if scope == "leaf":
    every = {n: krum([{n: t[n]} for t in taus], outliers, select)[n] for n in taus[0]}
    return every
  vectors = [basics.flat(t) for t in taus]
  best = np.argsort(krum_scores(vectors, outliers), kind="stable")[:select]
  return basics.unflat(np.mean([vectors[i] for i in best], axis=0), taus[0])


def krum_scores(vectors, outliers):
  """The sum of the smallest squared distances of each to the others."""
  scores = []
  for i, x in enumerate(vectors):
    far = sorted(np.sum((x - y) ** 2) for j, y in enumerate(vectors) if j != i)
    scores.append(sum(far[: len(vectors) - outliers - 2]))
  return scores


def flag(taus, rank, steps, pairs, start=None):
  """With whole models as vectors, by singular values, as the authors; from equal weights."""
  g = np.stack([basics.flat(t) for t in taus], axis=1)
  norms = np.linalg.norm(g, axis=0)
  h = g / np.where(norms == 0, 1, norms)
  K = h.shape[1]
  y, value = start, np.inf
  for _ in range(steps + (start is None)):

    def weight(v, y=y):
      return 1.0 if y is None else (abs(1 - np.sum((y.T @ v) ** 2)) + 1e-7) ** -0.25

    columns = [weight(h[:, i]) * h[:, i] for i in range(K)]
    if pairs:
      apart = [h[:, i] - h[:, j] for i in range(K) for j in range(K) if i != j]
      columns += [pairs / (K * (K - 1)) * weight(v) * v for v in apart]
    tried = np.linalg.svd(np.stack(columns, axis=1), full_matrices=False)[0][:, :rank]
    left = np.sum(np.sqrt(np.maximum(1 - np.sum((tried.T @ h) ** 2, axis=0), 0)))
    if left >= value:
      break
    y, value = tried, left
  merged = (y @ y.T @ h).sum(axis=1) / K * np.sort(norms)[(K - 1) // 2]
  return basics.unflat(merged, taus[0])
