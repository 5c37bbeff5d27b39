"""Slow transcriptions in NumPy of the methods that choose entries; see `basics.py`."""

import numpy as np

from reference import basics


def sce(taus, density=1.0, floor=0.0):
  """Select by variance, weigh by mean squares, erase minorities."""
  out = {}
  for n in taus[0]:
    x = np.stack([t[n].reshape(-1) for t in taus])
    variance = x.var(axis=0)
    variance[x.max(axis=0) == x.min(axis=0)] = 0
    if density < 1:
      count = int(density * np.count_nonzero(variance))
      keep = np.argsort(-variance, kind="stable")[:count]
      x = np.where(np.isin(np.arange(x.shape[1]), keep), x, 0)
    squares = np.array([np.mean(row**2) for row in x])
    usable = squares.sum() > 0 and squares.sum() >= floor
    weights = squares / squares.sum() if usable else np.full(len(x), 1 / len(x))
    merged = np.zeros(x.shape[1])
    for p in range(x.shape[1]):
      sign = 1 if x[:, p].sum() >= 0 else -1
      own = np.where(np.sign(x[:, p]) == sign, weights, 0)
      merged[p] = own @ x[:, p] / max(own.sum(), 1e-6)
    out[n] = merged.reshape(taus[0][n].shape)
  return out


def magmax(taus, scale):
  """Goes through the models, and takes over what is at least as large."""
  out = {n: x.copy() for n, x in taus[0].items()}
  for tau in taus[1:]:
    for n, x in tau.items():
      out[n] = np.where(np.abs(x) >= np.abs(out[n]), x, out[n])
  return {n: scale * x for n, x in out.items()}


def consensus(taus, scale, threshold, least):
  """Counts the TALL masks."""
  total = {n: sum(t[n] for t in taus) for n in taus[0]}
  out = {}
  for n, x in total.items():
    votes = sum((np.abs(t[n]) > threshold * np.abs(x - t[n])).astype(int) for t in taus)
    out[n] = scale * np.where(votes >= least, x, 0)
  return out


def ties_slack(taus, slack, density, scale):
  """TIES with an election of its own, entry by entry."""
  x = np.stack([basics.kth(basics.flat(t), density) for t in taus])
  sign = np.sign((x * (1 + np.asarray(slack)[: len(x), None])).sum(axis=0))
  sign = np.where(sign == 0, np.sign(sign.sum()), sign)
  merged = [
    np.mean(c[c * s > 0]) if (c * s > 0).any() else 0 for c, s in zip(x.T, sign, strict=True)
  ]
  return basics.unflat(scale * np.array(merged), taus[0])


def pcb(taus, ratio, scale, weights, clamp):
  """The first of the authors' variants, on whole models, by sorting."""
  share, clipped = pcb_scores(np.stack([basics.flat(t) for t in taus]), ratio, clamp)
  own = np.asarray(weights)[: len(share), None] * share * clipped
  merged = own.sum(axis=0) / np.maximum(share.sum(axis=0), 1e-12)
  return basics.unflat(scale * merged, taus[0])


def pcb_scores(x, ratio, clamp):
  """Scores from 0 to 1 in each model, and the entries without outliers: both [K, d]."""
  K, d = x.shape

  def clipped(row, low, high):
    ordered = np.sort(row)
    return np.clip(row, ordered[int(d * low)], ordered[int(d * (1 - high) - 1)])

  def unit(row):
    low, high = row.min(), row.max()
    return (row - low) / (high - low) if high > low else np.zeros_like(row)

  size = np.stack([clipped(np.abs(row), clamp, clamp) for row in x])
  scores = np.exp(K * np.stack([unit(row) for row in size]) ** 2) * np.tanh(x * x.sum(axis=0))
  share = np.stack([unit(clipped(row, 1 - ratio, 0)) for row in scores])
  return share, np.sign(x) * size


def lwptv(taus, base, prune_ratio, scale, weights, score, prune):
  """Scores every leaf, each a layer of its own."""
  names = sorted(taus[0])
  kept = []
  for tau in taus:
    scores = []
    for n in names:
      mean = np.mean([t[n] for t in taus], axis=0)
      scores.append(
        {
          "deviation": np.mean(np.abs(tau[n] - mean)),
          "relative_norm": np.linalg.norm(tau[n]) / np.linalg.norm(base[n]),
          "rms": np.sqrt(np.mean(tau[n] ** 2)),
        }[score]
      )
    order = np.argsort(scores, kind="stable")
    count = int(prune_ratio * len(names))
    left = order[count:] if prune == "lowest" else order[: len(names) - count]
    kept.append({n: tau[n] * (i in left) for i, n in enumerate(names)})
  return basics.weighted_sum(kept, weights, scale)


def ram(taus, threshold=1e-5, boost=0.0, limit=0.0, scope="leaf"):
  """Sums what one model changes, amplified, and averages what many do."""
  changed = [{n: np.abs(x) > threshold for n, x in t.items()} for t in taus]
  out = {n: np.zeros(x.shape) for n, x in taus[0].items()}
  counts = {n: sum(c[n].astype(int) for c in changed) for n in out}
  for tau, own in zip(taus, changed, strict=True):
    shared = {n: np.sum(own[n] & (counts[n] > 1)) for n in out}
    unique = {n: np.sum(own[n] & (counts[n] == 1)) for n in out}
    if scope == "tree":
      shared, unique = (dict.fromkeys(out, sum(v.values())) for v in (shared, unique))
    for n in out:
      factor = 1 + boost * min(shared[n] / max(unique[n], 1), limit)
      out[n] += np.where(own[n] & (counts[n] == 1), factor * tau[n], 0)
      out[n] += np.where(own[n] & (counts[n] > 1), tau[n] / np.maximum(counts[n], 1), 0)
  return out


def arcee_fusion(taus, base, views=()):
  """Takes entries over whose importance is far above the median; sorts for the quartiles."""
  (tau,), views, out = taus, dict(views), {}
  for n, x in tau.items():
    importance = np.zeros(x.size)
    for row in basics.rows(x, views.get(n, "i" * x.ndim)):
      old = base[n].reshape(-1)[row].astype(np.float64)
      p, q = (np.exp(w) / np.exp(w).sum() + 1e-8 for w in (old + x.reshape(-1)[row], old))
      importance[row] = np.abs(x.reshape(-1)[row]) * max(np.sum(p * np.log(p / q)), 0)
    low, middle, high = (np.sort(importance)[int(f * (x.size - 1))] for f in (0.25, 0.5, 0.75))
    keep = importance >= middle + 1.5 * (high - low)
    out[n] = np.where(keep.reshape(x.shape), x, 0)
  return out


def nearswap(models, t):
  """As first written: a weight that falls with the distance."""
  a, b = models
  out = {}
  for n in a:
    far = np.abs(a[n] - b[n])
    weight = np.where(far > 0, np.minimum(t / np.where(far > 0, far, 1), 1), 1)
    out[n] = (1 - weight) * a[n] + weight * b[n]
  return out
