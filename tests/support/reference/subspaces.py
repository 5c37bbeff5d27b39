"""Slow transcriptions in NumPy of the methods that share directions; see `basics.py`."""

import numpy as np

from reference.descent import adam
from reference.spectra import first


def matrices_of(x, view):
  """The matrices [out, in] of a leaf, one for each stacked layer, and the way back."""
  order = [a for letter in "boi" for a, own in enumerate(view) if own == letter]
  moved = x.transpose(order)
  columns = int(np.prod([x.shape[a] for a in order if view[a] == "i"]))
  layers = int(np.prod([x.shape[a] for a in order if view[a] == "b"], initial=1))
  stack = moved.reshape(layers, -1, columns)
  return list(stack), lambda out: np.stack(out).reshape(moved.shape).transpose(np.argsort(order))


def by_matrix(rule, rest, taus, views):
  """Applies a rule for lists of matrices, and another to the leaves without a view."""
  views, out = dict(views), {}
  for n in taus[0]:
    if n not in views:
      out[n] = rest([t[n] for t in taus])
      continue
    each = [matrices_of(t[n], views[n]) for t in taus]
    out[n] = each[0][1]([rule(list(group)) for group in zip(*(m for m, _ in each), strict=True)])
  return out


def scaled(tau, scale):
  return {n: scale * x for n, x in tau.items()}


def elected(xs, weight=None):
  """The mean of the entries with the sign of the sum; of a draw, that of most sums."""
  sign = np.sign(sum(xs))
  sign = np.where(sign == 0, np.sign(sign.sum()), sign)
  kept = [np.where(np.sign(x) == sign, x, 0) for x in xs]
  kept = kept if weight is None else [w * x for w, x in zip(weight, kept, strict=True)]
  return sum(kept) / np.maximum(sum((x != 0).astype(int) for x in kept), 1)


def drm(xs, drop_rate, direction, weight=None, tol=1e-2):
  if direction == "vertical":
    return drm([x.T for x in xs], drop_rate, "horizontal", weight, tol).T
  u, s, vt = np.linalg.svd(np.concatenate(xs, axis=1), full_matrices=False)
  kept = s > tol * s[0]
  u, s, vt = u[:, kept], s[kept], vt[kept]
  rows = np.split(vt, len(xs), axis=1)
  norms = [np.linalg.norm(r, axis=1, keepdims=True) for r in rows]
  unit = [r / np.where(n == 0, 1, n) for r, n in zip(rows, norms, strict=True)]
  sizes = np.sort(np.abs(unit).ravel())
  dropped = sizes.size - round(sizes.size * (1 - drop_rate))
  least = sizes[dropped - 1] if dropped else 0
  unit = [np.where(np.abs(r) >= least, r, 0) for r in unit]
  back = [s[:, None] * n * r for n, r in zip(norms, unit, strict=True)]
  return u @ elected(back, weight)


def lore(xs, delta_scale, mu, relative, sweeps, join):
  if relative:
    mu = mu * max(np.linalg.norm(x - np.mean(xs, axis=0), 2) for x in xs)
  common, parts = np.mean(xs, axis=0), [np.zeros_like(x) for x in xs]
  for _ in range(sweeps):
    common, parts = lore_sweep(xs, parts, mu)
  return common + delta_scale * (np.mean(parts, axis=0) if join == "mean" else elected(parts))


def lore_sweep(xs, parts, mu):
  """One sweep of the descent: the common matrix, then the parts."""
  common = np.mean([x - p for x, p in zip(xs, parts, strict=True)], axis=0)
  parts = []
  for x in xs:
    u, s, vt = np.linalg.svd(x - common, full_matrices=False)
    parts.append(u @ np.diag(np.maximum(s - mu, 0)) @ vt)
  return common, parts


def opcm(taus, alpha, views):
  """As the authors, scaled after each model; but directions of value zero are none."""
  views = dict(views)
  merged, last = taus[0], 1.0
  norms = [np.sqrt(sum(np.sum(x * x) for x in t.values())) for t in taus]
  for t in range(1, len(taus)):
    moved = {}
    for n, tau in taus[t].items():
      if n not in views:
        moved[n] = last * merged[n] + tau
        continue
      held, back = matrices_of(merged[n], views[n])
      new, _ = matrices_of(tau, views[n])
      moved[n] = back([last * m + outside(x, m, alpha) for m, x in zip(held, new, strict=True)])
    norm = np.sqrt(sum(np.sum(x * x) for x in moved.values()))
    last = norm / np.mean(norms[: t + 1])
    merged = scaled(moved, 1 / last)
  return merged


def outside(tau, held, alpha):
  u, s, vt = first(held, len(held))
  if not s.size:
    return tau
  k = int(np.argmax(np.cumsum(s) / s.sum() > alpha))
  q = u.T @ tau @ vt.T
  left = q - np.diag(np.diag(q))
  left[:k, :k] = 0
  return tau - u @ (q - left) @ vt


def doge_shared(xs, subspace):
  """The projector on the directions of outputs that the tasks share."""
  r = min(xs[0].shape)
  lefts = np.concatenate([first(x, r // len(xs))[0] for x in xs], axis=1)
  u = first(lefts, r // subspace)[0] if lefts.size else lefts
  return u @ u.T


def doge_slope(moved, xs, rates):
  """The gradient of the loss, in all directions."""
  total = sum(c * (x + moved) for c, x in zip(rates, xs, strict=True))
  g = np.zeros_like(moved)
  for x in xs:
    for row in range(len(x)):
      g[row] += 2 * (x[row] @ (x[row] - total[row])) * -sum(rates) * x[row]
  return g


def doge(taus, scale, eta, density, subspace, rate, steps, views):
  """The gradient of the loss by its definition, row by row."""
  flat = [np.concatenate([t[n].ravel() for n in sorted(t)]) for t in taus]
  least = []
  for x in flat:
    kept = int(density * x.size)
    least.append(np.sort(np.abs(x))[x.size - kept - 1] if kept < x.size else 0)

  def rule(xs):
    rates = [eta / np.linalg.norm(x) if x.any() else 0.0 for x in xs]
    free = np.eye(len(xs[0])) - doge_shared(xs, subspace)
    slope = lambda moved: free @ doge_slope(moved, xs, rates)  # noqa: E731
    moved = adam(slope, np.zeros_like(xs[0]), rate, steps)
    parts = zip(rates, xs, least, strict=True)
    return sum(c * (x + moved) * (np.abs(x) >= low) for c, x, low in parts)

  return scaled(by_matrix(rule, lambda xs: np.zeros_like(xs[0]), taus, views), scale)


def shares(scores, threshold, calibrated):
  """Softmax over the models, or a fixed share far above the mean of a model's scores."""
  scores = np.array(scores)
  own = np.exp(scores) / np.exp(scores).sum(axis=0)
  mean = scores.mean(axis=tuple(range(1, scores.ndim)), keepdims=True)
  return np.where(scores > threshold * mean, calibrated, own)


def widen_ranks(start, tau):
  """Ranks of the columns of one model, by change of norm and by change of direction."""

  def places(change):
    return np.argsort(np.argsort(change, kind="stable")) / len(change)

  old, new = (np.linalg.norm(w, axis=0) for w in (start, start + tau))
  # 1 - cosine, twice: zero where nothing changed, which 1 - cosine is up to rounding only.
  units = [w / np.where(n == 0, 1, n) for w, n in ((start, old), (start + tau, new))]
  turned = np.sum((units[1] - units[0]) ** 2, axis=0)
  return places(np.abs(new - old)), places(np.where(old * new == 0, 0, turned))


def widen_columns(ranks, threshold, calibrated):
  """The weights of the columns of each model: the mean of the shares by either rank."""
  return sum(shares([own[i] for own in ranks], threshold, calibrated) for i in (0, 1)) / 2


def widen(taus, base, scale, threshold, calibrated, views):
  """Weighs columns of matrices by their ranks, and other entries by their size."""

  def rule(xs):
    start, *deltas = xs
    weight = widen_columns([widen_ranks(start, tau) for tau in deltas], threshold, calibrated)
    return sum(w * x for w, x in zip(weight, deltas, strict=True))

  def rest(xs):
    weight = shares([np.abs(x) for x in xs[1:]], threshold, calibrated)
    return sum(w * x for w, x in zip(weight, xs[1:], strict=True))

  wide = {n: np.asarray(base[n], np.float64) for n in taus[0]}
  return scaled(by_matrix(rule, rest, [wide, *taus], views), scale)
