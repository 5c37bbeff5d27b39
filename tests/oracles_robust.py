"""Slow transcriptions in NumPy of aggregation against outliers; see `oracles.py`."""

import numpy as np
import oracles


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


def krum(taus, outliers, select, scope="tree"):
  if scope == "leaf":
    every = {n: krum([{n: t[n]} for t in taus], outliers, select)[n] for n in taus[0]}
    return every
  vectors = [oracles.flat(t) for t in taus]
  scores = []
  for i, x in enumerate(vectors):
    far = sorted(np.sum((x - y) ** 2) for j, y in enumerate(vectors) if j != i)
    scores.append(sum(far[: len(vectors) - outliers - 2]))
  best = np.argsort(scores, kind="stable")[:select]
  return oracles.unflat(np.mean([vectors[i] for i in best], axis=0), taus[0])
