"""Averages: weights, checkpoints of one run, models that arrive one by one."""

import jax.numpy as jnp
import numpy as np
import pytest
from example import TAU, blended, close

import jaxmerge
from jaxmerge import methods
from jaxmerge.core import interpreter, stage

MODELS = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)


def test_weights_of_the_models_without_a_base():
  models = {"w": jnp.asarray(TAU), "n": jnp.array([4, 4, 4])}
  out = jaxmerge.merge(methods.average(weight=(0.0, 1.0, 1.0)), models)
  close(out["w"], TAU[1:].mean(axis=0))
  assert out["n"].tolist() == 4


@pytest.mark.parametrize("method", [methods.average((1.0, 2.0, 4.0)), methods.task_arithmetic(0.5)])
def test_folding_one_by_one_is_the_combiner(method):
  assert stage.foldable(method)
  step = next(s for s in method if s.combines)
  ready = interpreter.prepare(method, {"w": (6,)}, 3, {}, None)
  leaf = interpreter.leaf_of("w", ready)
  held = None
  for k in range(3):
    hparams = {n: v[k : k + 1] if np.ndim(v) else v for n, v in leaf.hparams.items()}
    held = step.fold.add(held, jnp.asarray(TAU[k : k + 1]), leaf._replace(hparams=hparams))
  close(step.fold.finish(held, leaf), step.update(jnp.asarray(TAU), leaf, {}))


def test_what_is_not_foldable():
  assert not stage.foldable(methods.ties())
  assert not stage.foldable(stage.join(methods.average(), lambda x, y, leaf: y))
  assert not stage.foldable(stage.masked(methods.average(), lambda name: True))


@pytest.mark.parametrize(
  ("kind", "alpha", "expected"),
  [("sma", 0.5, 1.75), ("wma", 0.5, 2.4), ("ema", 0.1, 0.661), ("ema", 0.2, 1.248)],
)
def test_checkpoints_are_averaged(kind, alpha, expected):
  x = [[0.0], [1.0], [2.0], [4.0]]
  close(blended(methods.checkpoint_average(kind, alpha), x), [expected])
  close(sum(methods.moving_weights(6, alpha)), 1.0)


def test_the_newest_alone():
  close(blended(methods.checkpoint_average("ema", 1.0), MODELS), MODELS[-1], atol=0)


def test_a_moving_average_from_zero_is_divided_by_its_weights():
  x = np.array([[0.0], [1.0], [2.0], [4.0]], np.float32)
  close(blended(methods.checkpoint_average("ema", 0.2, "zero"), x), [1.248 / (1 - 0.8**4)])
  with pytest.raises(ValueError, match="alpha must not be 0 where the average begins at zero"):
    blended(methods.checkpoint_average("ema", 0.0, "zero"), x)


@pytest.mark.parametrize("settings", [("sma",), ("wma",), ("ema",), ("ema", 0.2, "zero")])
def test_an_average_of_equal_checkpoints_is_any_of_them(settings):
  same = np.repeat(MODELS[:1], 4, axis=0)
  close(blended(methods.checkpoint_average(*settings), same), MODELS[0])
