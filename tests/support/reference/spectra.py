"""Slow transcriptions in NumPy of the methods that work with singular values; see `basics.py`."""

import numpy as np


def by_matrix(rule, taus, scale, views):
  """Applies a rule for a list of matrices to those of the views; other leaves are averaged."""
  views, out = dict(views), {}
  for n in taus[0]:
    if n not in views:
      out[n] = scale * np.mean([t[n] for t in taus], axis=0)
      continue
    order = [views[n].index("b")] if "b" in views[n] else []
    order += [a for a, letter in enumerate(views[n]) if letter == "o"]
    order += [a for a, letter in enumerate(views[n]) if letter == "i"]
    moved = [t[n].transpose(order) for t in taus]
    stacked = [m.reshape(-1, *m.shape[-2:]) for m in moved]
    made = np.stack([rule([m[b] for m in stacked]) for b in range(len(stacked[0]))])
    out[n] = scale * made.reshape(moved[0].shape).transpose(np.argsort(order))
  return out


def orthogonal(x):
  """The polar factor, of what is not zero."""
  u, s, vt = np.linalg.svd(x, full_matrices=False)
  kept = s > 1e-6 * s.max(initial=1e-300)
  return u[:, kept] @ vt[kept]


def flat(matrices):
  u, s, vt = np.linalg.svd(sum(matrices), full_matrices=False)
  kept = s > 1e-6 * s[0]
  return s[kept].mean() * u[:, kept] @ vt[kept] if kept.any() else np.zeros(matrices[0].shape)


def first(x, count, size=None):
  """The first directions that are not zero, beside a norm or the largest."""
  u, s, vt = np.linalg.svd(x, full_matrices=False)
  count = min(count, int(np.sum(s > 1e-6 * (s[0] if size is None else size))))
  return u[:, :count], s[:count], vt[:count]


def iso_cts(matrices, common):
  K, r = len(matrices), min(matrices[0].shape)
  own = min(round((r - int(r * common)) / K), r // K)
  if not own:
    return flat(matrices)
  u, s, vt = first(sum(matrices), r - K * own)
  parts = [first(x - u @ u.T @ x, own, np.linalg.norm(x)) for x in matrices] + [(u, s, vt)]
  left = orthogonal(np.concatenate([p[0] for p in parts], axis=1))
  right = orthogonal(np.concatenate([p[2] for p in parts], axis=0))
  return np.concatenate([p[1] for p in parts]).mean() * left @ right


def tsv(matrices):
  r = min(matrices[0].shape)
  parts = [first(x, max(1, int(r * (1 / len(matrices))))) for x in matrices]
  left = orthogonal(np.concatenate([p[0] for p in parts], axis=1))
  right = orthogonal(np.concatenate([p[2] for p in parts], axis=0))
  return left @ np.diag(np.concatenate([p[1] for p in parts])) @ right
