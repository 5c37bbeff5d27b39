"""The scale of a merge that scores best on validation rows."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.core import layouts
from jaxmerge.core.stage import Array, Method
from jaxmerge.drivers import finiteness, memory
from jaxmerge.evaluation import metrics, scoring
from jaxmerge.tasks import batch


class Chosen(NamedTuple):
  """A one-shot merge with the scale that is best on validation.

  Attributes:
    params: the merged model.
    scale: the scale chosen.
    means: mean validation score of every scale tried.
  """

  params: Any
  scale: float
  means: tuple[float, ...]


def best_scale(
  method: Method,
  base: Any,
  models: Any,
  scales: Sequence[float],
  score: scoring.Scorer,
  rows: batch.Rows,
  counts: Sequence[int],
  *,
  names: Sequence[str],
  seed: int | None = None,
  hparams: Mapping[str, Any] | None = None,
  layout: layouts.Said | None = (),
  metric: metrics.Metric = metrics.ACCURACY,
  at_once: int = 8,
  called: str = "the merge",
) -> Chosen:
  """Merges with every scale, scores all merges in one program, and takes the best.

  A merge, or a score, that is not finite is never the best.

  Args:
    method: a method with the number `scale`.
    base: the base [*s].
    models: the experts [T, *s].
    scales: what to try.
    score: what `scoring.scorer` makes.
    rows: the validation rows.
    counts: number of validation rows of each task.
    names: names of the experts.
    seed: for methods with random masks.
    hparams: other numbers of the method.
    layout: matrix views.
    metric: which of two scores is better.
    at_once: scales that are merged and scored together.
    called: what an error calls the merge.

  Raises:
    ValueError: where no scale gives a finite model with finite scores.
  """
  merged = functools.partial(
    at_scales, method=method, seed=seed, names=tuple(names), layout=layouts.check(layout)
  )
  found: list[float] = []
  best: tuple[Any, float] = (None, 0.0)
  top = -np.inf
  for start in range(0, len(scales), at_once):
    own = jnp.asarray(scales[start : start + at_once], jnp.float32)
    some = merged(base, models, own, dict(hparams or {}))
    means = [float(np.mean(scoring.means(s, counts))) for s in np.asarray(score(some, rows))]
    fine = np.isfinite(means) & np.asarray(_finite(some))
    gains = np.where(fine, metric.gain(np.array(means)), -np.inf)
    if max(gains) > top:
      k, top = int(np.argmax(gains)), max(gains)
      best = (jax.tree.map(lambda x, k=k: x[k], some), float(scales[start + k]))
    found += means
  if top == -np.inf:
    tried = ", ".join(f"{scale:g}" for scale in scales)
    raise ValueError(f"{called}: weights or scores are not finite at any scale tried, {tried}.")
  return Chosen(*best, tuple(found))


_finite = jax.jit(finiteness.finite_models)


@functools.partial(jax.jit, static_argnames=("method", "seed", "names", "layout"))
def at_scales(
  base: Any,
  models: Any,
  scales: Array,
  hparams: Mapping[str, Any],
  *,
  method: Method,
  seed: int | None,
  names: tuple[str, ...],
  layout: layouts.Said,
) -> Any:
  """Merges with every one of some scales: models [T, *s], scales [S] -> [S, *s]."""

  def one(scale: Array) -> Any:
    numbers = {**hparams, "scale": scale}
    return memory.merge(
      method, models, base, hparams=numbers, seed=seed, names=names, layout=layout
    )

  return jax.vmap(one)(scales)
