"""Slow transcriptions in NumPy of soups that are searched or learned.

A model is a dict of arrays, and `models` a list of them; a score is a function of a model.
"""

import itertools

import numpy as np

from reference import basics


def combined(models, coefficients):
  """From the last model, the differences of all others from it."""
  last = models[-1]
  return {
    n: x + sum(c * (m[n] - x) for c, m in zip(coefficients, models, strict=True))
    for n, x in last.items()
  }


def greedy_soup(models, score, accept_ties=False):
  """Goes from the best to the worst; of equal ones the later comes first."""
  order = sorted(range(len(models)), key=lambda i: (score(models[i]), i), reverse=True)
  chosen, soup = order[:1], models[order[0]]
  best = score(soup)
  for i in order[1:]:
    n = len(chosen)
    tried = {k: x * n / (n + 1) + models[i][k] / (n + 1) for k, x in soup.items()}
    found = score(tried)
    if found > best or (accept_ties and found == best):
      chosen, soup, best = [*chosen, i], tried, found
  return soup, chosen


def soce(models, scores, score, correlation, step):
  """Experts of categories that are unlike some other, and a grid of their weights.

  Where all categories are alike there is no soup.
  """
  columns, experts = scores.T, set()
  for a, b in itertools.permutations(range(len(columns)), 2):
    constant = np.ptp(columns[a]) == 0 or np.ptp(columns[b]) == 0
    like = 0 if constant else np.corrcoef(columns[a], columns[b])[0, 1]
    if abs(like) < correlation:
      experts.add(int(np.argmax(columns[a])))
  experts, parts = sorted(experts), round(1 / step)
  grid = [[1 / len(experts)] * len(experts)] if experts else []
  for own in itertools.product(range(1, parts), repeat=len(experts)):
    if sum(own) == parts:
      grid.append([n * step for n in own])
  made = [basics.weighted_sum([models[e] for e in experts], own) for own in grid]
  return max(made, key=score, default=None)


def moving_average(models, decay):
  """What a moving average has after the last checkpoint, from the first one on."""
  out = models[0]
  for m in models[1:]:
    out = {n: (1 - decay) * m[n] + decay * x for n, x in out.items()}
  return out


def learned_soup(models, slopes, steps, rate):
  """A row of logits for each leaf, and Adam; `slopes(model, temperature)` are those of the loss."""
  held = {n: np.zeros(len(models)) for n in models[0]} | {"temperature": np.ones(1)}
  first, second = ({n: np.zeros_like(x) for n, x in held.items()} for _ in range(2))

  def mixed():
    shares = {n: np.exp(held[n]) / np.exp(held[n]).sum() for n in models[0]}
    each = {n: np.stack([m[n] for m in models]) for n in shares}
    return shares, {n: np.tensordot(shares[n], x, 1) for n, x in each.items()}

  for step in range(1, steps + 1):
    shares, model = mixed()
    of_model, of_temperature = slopes(model, held["temperature"][0])
    slope = {"temperature": np.array([of_temperature])}
    for n, share in shares.items():
      of_share = np.array([np.sum(of_model[n] * m[n]) for m in models])
      slope[n] = share * (of_share - share @ of_share)
    for n, g in slope.items():
      first[n] = 0.9 * first[n] + 0.1 * g
      second[n] = 0.999 * second[n] + 0.001 * g**2
      size = np.sqrt(second[n] / (1 - 0.999**step)) + 1e-8
      held[n] = held[n] - rate * first[n] / (1 - 0.9**step) / size
  return mixed()[1], held["temperature"][0]


def hi_merging(base, taus, score, grid):
  """Fractions and factors of each model by a grid, then of the layers that are in the way.

  Every leaf is a layer; `score(model, k)` is that of task k.
  """
  K, names = len(taus), sorted(base)
  every = [(n, k) for n in names for k in range(K)]

  def made(table):
    """Of {(leaf, model): (fraction, factor)}."""
    kept = [
      {
        n: table[n, k][1]
        * basics.per_leaf(lambda x, n=n, k=k: basics.exact(x, table[n, k][0]), {n: t[n]})[n]
        for n in names
      }
      for k, t in enumerate(taus)
    ]
    merged = basics.elected(kept, reduce="sum", zero_sum="plus")
    return {n: base[n] + merged[n] for n in names}

  def mean(table):
    model = made(table)
    return np.mean([score(model, k) for k in range(K)])

  def alone(k, p, s, leaves=names):
    return made({(n, i): (p, s if i == k and n in leaves else 0.0) for n, i in every})

  best = []
  for k in range(K):
    tried = [(score(alone(k, p, s), k), p, s) for p in grid for s in grid]
    best.append(max(tried)[1:])
  table = {(n, k): best[k] for n, k in every}
  helps = {(n, k): score(alone(k, *best[k], [n]), k) - score(base, k) for n, k in every}
  gives = {
    (n, k): score(made(table), k) - score(made(table | {(n, k): (1.0, 0.0)}), k) for n, k in every
  }
  conflicts = [n for n in names if any(helps[n, k] > 0 and gives[n, k] < 0 for k in range(K))]
  worst = lambda n: -sum(helps[n, k] - gives[n, k] for k in range(K))  # noqa: E731
  for n in sorted(conflicts, key=worst):
    k = min((k for k in range(K) if helps[n, k] > 0), key=lambda k, n=n: gives[n, k])
    p, s = table[n, k]
    tried = [table] + [table | {(n, k): pair} for pair in ((p / 2, s), (p, s / 2), (p, 0.0))]
    table = max(tried, key=mean)
  return made(table), mean(table)
