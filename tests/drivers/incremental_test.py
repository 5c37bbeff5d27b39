"""Models that come one after the other: the merge of all at once, in the memory of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import jaxmerge
from jaxmerge import methods
from jaxmerge.drivers import continual, incremental

BASE, MODELS = small.trees()
SAME = {n: x if n != "steps" else np.stack([BASE["steps"]] * len(x)) for n, x in MODELS.items()}


def one(k):
  return {n: x[k] for n, x in MODELS.items()}


def run(merge, like=BASE, count=4, **options):
  state = merge.init(like)
  for k in range(count):
    state = merge.update(state, one(k), **{n: v(k) for n, v in options.items()})
  return state


@pytest.mark.parametrize(
  ("method", "bits"),
  [
    (methods.average(), True),
    (methods.task_arithmetic(0.5), True),
    (methods.magmax(), True),
    pytest.param(methods.checkpoint_average("sma"), True, marks=pytest.mark.slow),
    pytest.param(methods.checkpoint_average("wma"), False, marks=pytest.mark.slow),
    (methods.checkpoint_average("ema", 0.3), False),
    (methods.checkpoint_average("ema", 0.3, "zero"), False),
  ],
  ids=["average", "task_arithmetic", "magmax", "sma", "wma", "ema", "ema from zero"],
)
def test_is_the_merge_of_the_stack(method, bits):
  merge = incremental.of(method, BASE)
  found = jax.tree.map(np.asarray, merge.finalize(run(merge)))
  expected = jax.tree.map(np.asarray, jaxmerge.merge(method, MODELS, BASE))
  small.same(found, expected) if bits else small.close(found, expected)


def test_without_a_base_the_weights_are_merged():
  method = methods.checkpoint_average("ema", 0.3)
  merge = incremental.of(method)
  expected = jaxmerge.merge(method, SAME)
  found = merge.finalize(run(merge))
  small.close({**found, "steps": expected["steps"]}, expected)
  np.testing.assert_array_equal(found["steps"], MODELS["steps"][0])


def test_a_moving_average_moves():
  """By its definition: m + alpha (x - m), from the first model on."""
  merge, mean = incremental.of(methods.checkpoint_average("ema", 0.3)), MODELS["matrix"][0]
  state = run(merge, count=1)
  for k in range(1, 4):
    state = merge.update(state, one(k))
    mean = mean + np.float32(0.3) * (MODELS["matrix"][k] - mean)
    np.testing.assert_allclose(merge.finalize(state)["matrix"], mean, atol=1e-6)


def test_masks_depend_on_names_alone():
  method = methods.dare(0.5, 0.4)
  merge = incremental.of(method, BASE, seed=3)
  found = merge.finalize(run(merge, name=lambda k: small.NAMES[k]))
  expected = jaxmerge.merge(method, MODELS, BASE, seed=3, names=small.NAMES)
  small.close(found, expected)
  with pytest.raises(ValueError, match="masks depend on the model's name"):
    merge.update(merge.init(BASE), one(0))


@pytest.mark.slow
def test_opcm_is_that_of_the_stack_after_every_model():
  """The state stays as large as one model, and nothing is lost by stopping to look."""
  settings = (0.5, 0.4, 0.3)
  merge = continual.opcm(BASE, *settings, layout=small.VIEWS)
  state = merge.init(BASE)
  shapes = jax.tree.map(jnp.shape, state)
  for k in range(4):
    state = merge.update(state, one(k))
    assert jax.tree.map(jnp.shape, state) == shapes
    if k in (0, 3):
      some = {n: x[: k + 1] for n, x in MODELS.items()}
      expected = jaxmerge.merge(methods.opcm(*settings), some, BASE, layout=small.VIEWS)
      small.close(jax.device_get(merge.finalize(state)), jax.device_get(expected), 2e-6)


@pytest.mark.parametrize("is_opcm", [False, True], ids=["of", "opcm"])
def test_a_trajectory_is_one_program(is_opcm):
  """States keep their structure: they go through scan, and numbers need not compile again."""
  method = methods.checkpoint_average("wma")
  merge = continual.opcm(BASE, layout=small.VIEWS) if is_opcm else incremental.of(method, BASE)
  stack = jax.tree.map(jnp.asarray, MODELS)
  state, _ = jax.lax.scan(lambda s, x: (merge.update(s, x), None), merge.init(BASE), stack)
  small.close(merge.finalize(state), merge.finalize(run(merge)), 1e-6)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: incremental.of(methods.ties()), "needs all models at once"),
    (lambda: incremental.of(methods.opcm()), "continual.opcm"),
    (
      lambda: run(incremental.of(methods.average((1.0, 2.0)))),
      "weight has 2 values, but there are 1",
    ),
    (
      lambda: incremental.of(methods.average(), BASE).init({"w": jnp.ones(2)}),
      "in the base but not",
    ),
    (
      lambda: continual.opcm(BASE, layout=small.VIEWS).update({}, {**one(0), "vector": np.ones(3)}),
      "'vector' is",
    ),
    (lambda: incremental.of(methods.average()).finalize({"count": 0}), "update has seen no model"),
    (lambda: continual.opcm(BASE, alpha=2.0), "alpha must be"),
  ],
)
def test_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_nan_is_named():
  merge, bad = incremental.of(methods.average(), BASE), one(0)
  bad["vector"] = np.full_like(bad["vector"], np.nan)
  with pytest.raises(ValueError, match="leaf 'vector' of model passed to update has NaN"):
    merge.update(merge.init(BASE), bad)


def test_results_that_overflow_are_refused():
  base = {"kernel": np.zeros((2, 2), np.float16)}
  for run in (
    incremental.of(methods.task_arithmetic(1e5), base),
    continual.opcm(base, scale=1e6),
  ):
    state = run.update(run.init(base), {"kernel": np.full((2, 2), 100, np.float16)})
    with pytest.raises(ValueError, match="leaf 'kernel': the result has NaN or infinity"):
      run.finalize(state)
