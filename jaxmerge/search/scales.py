"""Searches hyperparameters and scales of merges by their score on validation rows."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: trees of arrays.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.core import layouts
from jaxmerge.core.stage import Array, Method
from jaxmerge.drivers import finiteness, memory
from jaxmerge.evaluation import metrics, scoring
from jaxmerge.search import objective
from jaxmerge.tasks import batch


class Scaled(NamedTuple):
  """A merge to try.

  Attributes:
    method: a method with the hyperparameter `scale`.
    hparams: its other hyperparameters.
    scale: the scale.
    static: the method's static settings, for records.
  """

  method: Method
  hparams: Mapping[str, Any]
  scale: float
  static: Mapping[str, Any] = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True, eq=False)
class Validation:
  """The objective of merging given experts: the mean score on the tasks' validation rows.

  The score of a merge that is not finite, or whose score is not, is NaN.

  Attributes:
    base: the base [*s].
    models: the experts [T, *s].
    score: what `scoring.scorer` makes.
    rows: the validation rows.
    counts: number of validation rows of each task.
    names: names of the experts.
    seed: for methods with random masks.
    layout: matrix views.
    metric: which of two scores is better.
    at_once: merges per program, if only their scales differ.
    name: name of the merge in errors.
    statistics: what the method's stages read beside the models, as for `jaxmerge.merge`.
  """

  base: Any
  models: Any
  score: scoring.Scorer
  rows: batch.TaskBatch
  counts: Sequence[int]
  names: Sequence[str]
  seed: int | None = None
  layout: layouts.Layout | None = ()
  metric: metrics.Metric = metrics.ACCURACY
  at_once: int = 8
  name: str = "the merge"
  statistics: Mapping[str, Any] | None = None

  def model(self, candidate: Scaled) -> Any:
    """Merges with one scale."""
    return _take(self._merge([candidate]), 0)

  def evaluate(self, candidates: Sequence[Scaled]) -> Iterator[tuple[float, Any]]:
    """Yields the score of each merge, with the model of the best in each program."""
    for _, equal in itertools.groupby(candidates, key=lambda c: (c.method, c.hparams)):
      group = list(equal)
      for start in range(0, len(group), self.at_once):
        models = self._merge(group[start : start + self.at_once])
        scores = self._scores(models)
        # NaN is never the best.
        best = int(np.argmax(np.where(np.isnan(scores), -np.inf, scores)))
        for k, score in enumerate(scores):
          yield float(score), _take(models, k) if k == best else None

  def _merge(self, candidates: Sequence[Scaled]) -> Any:
    scales = jnp.asarray([c.scale for c in candidates], jnp.float32)
    return at_scales(
      self.base,
      self.models,
      scales,
      dict(candidates[0].hparams),
      self.statistics,
      method=candidates[0].method,
      seed=self.seed,
      names=tuple(self.names),
      layout=layouts.check(self.layout),
    )

  def _scores(self, models: Any) -> np.ndarray:
    by_row = np.asarray(self.score(models, self.rows))
    means = np.array([float(np.mean(scoring.means(s, self.counts))) for s in by_row])
    is_finite = np.isfinite(means) & np.asarray(_finite(models))
    return np.where(is_finite, self.metric.gain(means), np.nan)


def best_scale(
  method: Method,
  models: Any,
  base: Any,
  scales: Sequence[float],
  score: scoring.Scorer,
  rows: batch.TaskBatch,
  counts: Sequence[int],
  *,
  names: Sequence[str],
  seed: int | None = None,
  hparams: Mapping[str, Any] | None = None,
  statistics: Mapping[str, Any] | None = None,
  layout: layouts.Layout | None = (),
  metric: metrics.Metric = metrics.ACCURACY,
  at_once: int = 8,
  label: str = "the merge",
) -> objective.SearchResult:
  """Merges with every scale, scores several merges in one program, and returns the best.

  Args:
    method: a method with the hyperparameter `scale`.
    models: the experts [T, *s].
    base: the base [*s].
    scales: the scales to try.
    score: what `scoring.scorer` makes.
    rows: the validation rows.
    counts: number of validation rows of each task.
    names: names of the experts.
    seed: for methods with random masks.
    hparams: other hyperparameters of the method.
    statistics: as for `jaxmerge.merge`.
    layout: matrix views.
    metric: which of two scores is better.
    at_once: scales that are merged and scored together.
    label: name of the merge in errors.

  Returns:
    The best merge; scores are the larger the better, those of a loss are negative.

  Raises:
    ValueError: where no scale gives a finite model with finite scores.
  """
  validation = Validation(
    base, models, score, rows, counts, names, seed, layout, metric, at_once, label, statistics
  )
  candidates = [Scaled(method, dict(hparams or {}), float(scale)) for scale in scales]
  return objective.run(validation, objective.exhaustive(candidates))


_finite = jax.jit(finiteness.finite_models)


def _take(models: Any, k: int) -> Any:
  return jax.tree.map(lambda x: x[k], models)


@functools.partial(jax.jit, static_argnames=("method", "seed", "names", "layout"))
def at_scales(
  base: Any,
  models: Any,
  scales: Array,
  hparams: Mapping[str, Any],
  statistics: Mapping[str, Any] | None = None,
  *,
  method: Method,
  seed: int | None,
  names: tuple[str, ...],
  layout: layouts.Layout,
) -> Any:
  """Merges with each scale: models [T, *s], scales [S] -> [S, *s]."""

  def one(scale: Array) -> Any:
    return memory.merge(
      method,
      models,
      base,
      hparams={**hparams, "scale": scale},
      statistics=statistics,
      seed=seed,
      names=names,
      layout=layout,
    )

  return jax.vmap(one)(scales)
