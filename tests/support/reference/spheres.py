"""Slow transcriptions in NumPy of the methods that work with angles; see `basics.py`.

They work on the vectors themselves, in float64, and know of no Gram matrix. A vector is a leaf, or
one row or column of its matrix view.
"""

import numpy as np

from reference import basics


def per_vector(rule, taus, scope="leaf", views=()):
  """Applies a rule for a list of vectors to each leaf, or to each row or column of its view."""
  views, out = dict(views), {}
  for n, x in taus[0].items():
    index = np.arange(x.size)[None]
    if scope != "leaf" and n in views:
      index = basics.rows(x, views[n])
      if scope == "column":  # Of each of the stacked matrices.
        count = int(
          np.prod([d for d, letter in zip(x.shape, views[n], strict=True) if letter == "b"])
        )
        index = index.reshape(count, -1, index.shape[1]).transpose(0, 2, 1)
        index = index.reshape(-1, index.shape[2])
    merged = np.zeros(x.size)
    for vector in index:
      merged[vector] = rule([t[n].reshape(-1)[vector] for t in taus])
    out[n] = merged.reshape(x.shape)
  return out


def arc(a, b, t, straight):
  """Interpolates along the arc, or straight where `straight(cosine)`."""
  norms = np.linalg.norm(a) * np.linalg.norm(b)
  cosine = np.clip(a @ b / norms, -1, 1) if norms > 0 else 0.0
  if straight(cosine):
    return (1 - t) * a + t * b
  angle = np.arccos(cosine)
  return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def slerp(taus, t):
  return per_vector(lambda x: arc(*x, t, lambda c: abs(c) > 0.9995), taus)


def nuslerp(taus, weights, scope="leaf", views=()):
  t = weights[1] / (weights[0] + weights[1])
  rule = lambda x: arc(*x, t, lambda c: 1 - c * c < 1e-14)  # noqa: E731
  return per_vector(rule, taus, scope, views)


def multislerp(taus, weights):
  """With the step in the tangent space at the mean, as it was first written."""
  weights = np.asarray(weights[: len(taus)]) / sum(weights[: len(taus)])

  def rule(x):
    norms = np.array([np.linalg.norm(v) for v in x])
    units = [v / n if n > 0 else v for v, n in zip(x, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    if np.linalg.norm(mean) < 1e-6:
      return sum(w * v for w, v in zip(weights, x, strict=True))
    mean = mean / np.linalg.norm(mean)
    step = sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, units, strict=True))
    far = np.linalg.norm(step) + 1e-30
    return (np.cos(far) * mean + np.sin(far) / far * step) * (weights @ norms)

  return per_vector(rule, taus)


def karcher(taus, weights, steps=200):
  """Runs to convergence."""
  weights = np.asarray(weights[: len(taus)]) / sum(weights[: len(taus)])

  def rule(x):
    norms = np.array([np.linalg.norm(v) for v in x])
    if not norms.any():
      return x[0]
    units = [v / n for v, n in zip(x, norms, strict=True) if n > 0]
    own = weights[norms > 0] / weights[norms > 0].sum()
    mean = sum(w * u for w, u in zip(own, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(steps):
      angles = [np.arccos(np.clip(u @ mean, -1, 1)) for u in units]
      pulls = [
        w * (a / np.sin(a) if a > 1e-8 else 1) * (u - np.cos(a) * mean)
        for w, a, u in zip(own, angles, units, strict=True)
      ]
      length = np.linalg.norm(sum(pulls)) + 1e-30
      mean = np.cos(length) * mean + np.sin(length) / length * sum(pulls)
      mean = mean / np.linalg.norm(mean)
    return (weights @ norms) * mean

  return per_vector(rule, taus)


def model_stock(taus, scope="leaf", views=(), clip=False, floor=0.0):
  def rule(x):
    N, cosines = len(x), []
    for i in range(N):
      for j in range(i + 1, N):
        norms = max(np.linalg.norm(x[i]) * np.linalg.norm(x[j]), floor)
        cosines.append(np.clip(x[i] @ x[j] / norms, -1, 1) if norms > 0 else 0.0)
    under = 1 + (N - 1) * np.mean(cosines)
    t = N * np.mean(cosines) / under if abs(under) >= 1e-6 else 0.0
    return (np.clip(t, 0, 1) if clip else t) * np.mean(x, axis=0)

  return per_vector(rule, taus, scope, views)
