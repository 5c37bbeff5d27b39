"""Slow transcriptions of the papers in NumPy: an independent word on every method.

Everything is float64, sorts, loops over models, and knows nothing of stages. A model is a dict of
arrays; `deltas` is a list of such dicts, one per model. The result is the merged task vector.
"""

import zlib

import numpy as np


def deltas(base, models):
  """The task vectors of a stack: a list of dicts in float64, integer leaves left out."""
  floating = [n for n in base if base[n].dtype.kind not in "iub"]
  height = len(models[floating[0]])
  wide = {n: (np.asarray(base[n], np.float64), np.asarray(models[n], np.float64)) for n in floating}
  return [{n: stack[k] - zero for n, (zero, stack) in wide.items()} for k in range(height)]


def flat(tau):
  """All entries of a task vector, leaves in the order of their names."""
  return np.concatenate([tau[n].reshape(-1) for n in sorted(tau)])


def unflat(vector, like):
  out, start = {}, 0
  for n in sorted(like):
    out[n] = vector[start : start + like[n].size].reshape(like[n].shape)
    start += like[n].size
  return out


def per_leaf(rule, tau):
  """Applies a rule for vectors to each leaf by itself."""
  return {n: rule(x.reshape(-1)).reshape(x.shape) for n, x in tau.items()}


def kth(x, density):
  """Keeps every entry at least as large as the (d - floor(density * d))-th smallest."""
  k = x.size - int(density * x.size)
  if k == 0:
    return x
  return np.where(np.abs(x) >= np.sort(np.abs(x))[k - 1], x, 0)


def exact(x, density):
  """Keeps the floor(density * d) largest, but at least one; ties go to the lower index."""
  keep = np.argsort(-np.abs(x), kind="stable")[: max(1, int(density * x.size))]
  return np.where(np.isin(np.arange(x.size), keep), x, 0)


def band(x, keep, remove, yields="keep"):
  """Zeroes the floor(remove * d) largest, keeps the floor(keep * d) next; ties by index."""
  start, count = int(remove * x.size), int(keep * x.size)
  if yields == "remove":
    start = min(start, x.size - count)
  ranks = np.argsort(-np.abs(x), kind="stable")[start : start + count]
  return np.where(np.isin(np.arange(x.size), ranks), x, 0)


def weighted_sum(taus, weights, scale=1.0, normalize=False):
  weights = np.asarray(weights)[: len(taus)]
  if normalize:
    scale = scale / (weights.sum() if abs(weights.sum()) >= 1e-8 else 1)
  return {n: scale * sum(w * t[n] for w, t in zip(weights, taus, strict=True)) for n in taus[0]}


def average(taus, weights):
  return weighted_sum(taus, weights, 1 / sum(weights))


def checkpoint_average(taus, kind, alpha, start="first"):
  """Goes through the checkpoints."""
  begun = {"first": 1, "zero": 0}[start if kind == "ema" else "first"]
  out, weights = {n: begun * x for n, x in taus[0].items()}, begun
  for i, tau in enumerate(taus[begun:], start=1 + begun):
    share = {"sma": 1 / i, "wma": 2 / (i + 1), "ema": alpha}[kind]
    out = {n: x + share * (tau[n] - x) for n, x in out.items()}
    weights += share * (1 - weights)
  return {n: x / weights for n, x in out.items()}


def decayed(taus, decay, zero_at):
  """Adds the updates between the checkpoints, each times the decay at it."""
  rate = {
    "1-sqrt": lambda u: 1 - u**0.5,
    "linear": lambda u: 1 - u,
    "cosine": lambda u: 0.5 + 0.5 * np.cos(np.pi * u),
  }[decay]
  updates = len(taus) - 1
  last = updates + (zero_at == "after")
  out = {n: np.array(x, np.float64) for n, x in taus[0].items()}
  for i in range(1, updates + 1):
    for n in out:
      step = taus[i][n].astype(np.float64) - taus[i - 1][n]
      out[n] = out[n] + rate(i / last) * step
  return out


def ties(
  taus,
  density,
  scale=1.0,
  weights=None,
  scope="tree",
  rule="kth",
  reduce="mean",
  zero_sum="majority",
  rescale=None,
  votes="sum",
):
  """Trim, elect a sign, disjoint merge."""
  trimmed = {"kth": kth, "exact": exact}[rule]
  if scope == "tree":
    kept = [unflat(trimmed(flat(t), density), t) for t in taus]
  else:
    kept = [per_leaf(lambda x: trimmed(x, density), t) for t in taus]
  if rescale:
    kept = [
      {n: _rescaled(k[n], t[n], 0, rescale) for n in t} for k, t in zip(kept, taus, strict=True)
    ]
  return elected(kept, scale, weights, reduce, zero_sum, votes)


def elected(taus, scale=1.0, weights=None, reduce="mean", zero_sum="majority", votes="sum"):
  """Elect a sign by the weighted task vectors, disjoint merge."""
  weights = np.ones(len(taus)) if weights is None else np.asarray(weights)[: len(taus)]
  x = np.stack([flat(t) for t in taus]) * weights[:, None]
  sign = np.sign((np.sign(x) if votes == "count" else x).sum(axis=0))
  sign = np.where(sign == 0, 1 if zero_sum == "plus" else np.sign(sign.sum()), sign)
  merged = np.zeros(x.shape[1])
  for p in range(x.shape[1]):
    agreeing = [k for k in range(len(taus)) if x[k, p] * sign[p] > 0]
    if not agreeing:
      continue
    if reduce == "mean":
      merged[p] = x[agreeing, p].sum() / weights[agreeing].sum()
    elif reduce == "sum":
      merged[p] = x[agreeing, p].sum()
    else:
      merged[p] = sign[p] * np.abs(x[agreeing, p]).max()
  return unflat(scale * merged, taus[0])


def rows(x, view):
  """A leaf as a list of index arrays, one for each row of its matrix view."""
  index = np.arange(x.size).reshape(x.shape)
  inputs = [a for a, letter in enumerate(view) if letter == "i"]
  outputs = [a for a, letter in enumerate(view) if letter != "i"]
  columns = int(np.prod([x.shape[a] for a in inputs]))
  return index.transpose(outputs + inputs).reshape(-1, columns)


def breadcrumbs(taus, keep, remove, scale=1.0, scope="leaf", views=(), yields="keep"):
  return weighted_sum(banded(taus, keep, remove, scope, views, yields), np.ones(len(taus)), scale)


def banded(taus, keep, remove, scope="leaf", views=(), yields="keep"):
  """Bands per leaf, per row, or over the tree; scalar leaves are kept as they are."""
  views = dict(views)

  def one(tau):
    ranked = {n: x for n, x in tau.items() if x.ndim}
    if scope == "tree":
      cut = unflat(band(flat(ranked), keep, remove, yields), ranked)
    elif scope == "leaf":
      cut = per_leaf(lambda x: band(x, keep, remove, yields), ranked)
    else:
      cut = {}
      for n, x in ranked.items():
        out = np.zeros(x.size)
        for row in rows(x, views.get(n, "i" * x.ndim)):
          out[row] = band(x.reshape(-1)[row], keep, remove, yields)
        cut[n] = out.reshape(x.shape)
    return {**tau, **cut}

  return [one(t) for t in taus]


def della(taus, draw, density, epsilon, rescale, views=()):
  """Keeps an entry with a probability that rises with its rank in the row, and makes up for it.

  `draw(k, leaf, shape)` gives the random numbers of model k.
  """
  views, out = dict(views), []
  for k, tau in enumerate(taus):
    own = {}
    for n, x in tau.items():
      thin, index = np.zeros(x.size), rows(x, views.get(n, "i" * x.ndim))
      uniform = draw(k, n, index.shape)
      for row, numbers in zip(index, uniform, strict=True):
        values, size = x.reshape(-1)[row], len(row)
        rank = np.argsort(np.argsort(np.abs(values), kind="stable"))
        q = density - epsilon + 2 * epsilon * rank / (size - 1) if size > 1 else density
        thin[row] = np.where(numbers >= 1 - q, values / (q if rescale == "inverse" else 1), 0)
      own[n] = thin.reshape(x.shape)
    if rescale not in ("inverse", None):
      own = {n: _rescaled(own[n], tau[n], 0, rescale) for n in tau}
    out.append(own)
  return out


def dare(taus, kept, drop_rate, rescale):
  """Zeroes where `kept` (a list of dicts of booleans) is false, and makes up for it."""
  out = []
  for tau, mask in zip(taus, kept, strict=True):
    thin = {n: np.where(mask[n], tau[n], 0) for n in tau}
    out.append({n: _rescaled(thin[n], tau[n], drop_rate, rescale) for n in tau})
  return out


def _rescaled(thin, whole, drop_rate, rescale):
  if rescale is None or drop_rate == 1:
    return thin
  if rescale == "inverse":
    return thin / (1 - drop_rate)
  norm = {"l1": 1, "l2": 2, "linf": np.inf}[rescale]
  before, after = (np.linalg.norm(x.reshape(-1), norm) for x in (whole, thin))
  return thin if min(before, after) < 1e-7 else thin * before / after


def uniform(seed, leaf, model, shape):
  """The hash that masks are made from, one entry after the other, in Python's integers."""
  mask = 2**32 - 1

  def mixed(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D & mask
    h = (h ^ (h >> 15)) * 0x846CA68B & mask
    return h ^ (h >> 16)

  key = mixed(seed ^ zlib.crc32(leaf.encode()))
  own = mixed((zlib.crc32(model.encode()) * 0x9E3779B1 + 1) & mask)
  out = np.zeros(shape, np.float32)
  for flat, index in enumerate(np.ndindex(*shape)):
    h = mixed(mixed((flat * 0x85EBCA77 & mask) ^ key) ^ own)
    out[index] = (h >> 8) / 2**24
  return out
