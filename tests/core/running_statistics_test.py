"""Running statistics are averaged, counters and equal infinities copied, the rest refused."""

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_tasks
from marking import some_fast

import jaxmerge
from jaxmerge import methods
from jaxmerge.core import running_statistics
from jaxmerge.drivers import continual, incremental, streaming
from jaxmerge.files import merge as files_merge
from jaxmerge.parallel import mesh as meshes
from jaxmerge.training import loop

NAMES = {
  "batch_stats/layer_1/bn/mean": (True, False),
  "batch_stats/layer_1/bn/var": (True, True),
  "layer1.0.bn1.running_mean": (True, False),
  "layer1.0.bn1.running_var": (True, True),
  "bn/moving_variance": (True, True),
  "layer1.0.bn1.num_batches_tracked": (True, False),
  "bn/mean/value": (True, False),
  "bn1.running_var/value": (True, True),
  "resnet/~/batch_norm/~/var_ema/average": (True, True),
  "bn._variance": (True, True),
  "bn/moving_variance:0": (True, True),
  "obs.running_std": (True, True),
  "subnet/mean": (False, False),
  "params/layer_1/bn/scale": (False, False),
  "head.mean": (False, False),
  "vae/var": (False, False),
}


def test_names_of_running_statistics():
  assert {
    n: (running_statistics.is_moment(n), running_statistics.is_variance(n)) for n in NAMES
  } == NAMES


def test_what_lies_beside_them_tells_statistics_from_weights():
  own = {"norm/mean/value", "norm/var/value"}
  names = [*own, "norm/scale/value", "vae/mean", "vae/var", "vae/kernel", "head/mean", "x/var"]
  assert running_statistics.of(names) == own
  assert running_statistics.variances(names) == {"norm/var/value"}
  base = {"norm": {"mean": np.ones(1, np.float32), "var": np.ones(1, np.float32)}}
  models = jax.tree.map(lambda x: np.array([[0.25], [0.75]], np.float32), base)
  assert jaxmerge.merge(methods.task_arithmetic(1.0), models, base)["norm"]["var"] == 0.5


@pytest.mark.parametrize(
  ("method", "want"),
  [
    (methods.average((1.0, 0.0)), 2.0),
    (methods.average((3.0, 1.0)), 2.5),
    (methods.checkpoint_average("ema", alpha=0.75), 3.5),
    (methods.slerp(0.0), 2.0),
    (methods.nuslerp((1.0, 3.0)), 3.5),
  ],
)
def test_means_of_models_have_their_own_weights_for_statistics_too(method, want):
  models = {n: np.array([[2.0], [4.0]], np.float32) for n in ("running_var", "w")}
  out = jaxmerge.merge(method, models)
  np.testing.assert_allclose([out["running_var"], out["w"]], want, rtol=1e-6)
  base = {n: np.ones(1, np.float32) for n in models}
  np.testing.assert_allclose(jaxmerge.merge(method, models, base)["running_var"], want, rtol=1e-6)


BASE = {
  "bn.running_mean": np.array([1.0, -1.0], np.float32),
  "bn.running_var": np.array([4.0, 2.0], np.float32),
  "bn.num_batches_tracked": np.array(2**40 + 1),
  "mask": np.array([[-np.inf, 0.0], [0.0, -np.inf]], np.float32),
  "weight": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32),
}
EACH = [
  {
    **BASE,
    "bn.running_mean": BASE["bn.running_mean"] * k,
    "bn.running_var": BASE["bn.running_var"] / 2**k,
    "weight": BASE["weight"] + np.float32(k),
  }
  for k in (1, 2, 3)
]
MODELS = jaxmerge.stack(EACH)
MEANS = {"bn.running_mean": [2.0, -2.0], "bn.running_var": [3.5 / 3, 1.75 / 3]}
METHODS = {
  "task_arithmetic": methods.task_arithmetic(1.0),
  "ties": methods.ties(0.5),
  "model_stock": methods.model_stock(),
  "opcm": methods.opcm(),
}


def check(out):
  for n, mean in MEANS.items():
    np.testing.assert_allclose(out[n], mean, rtol=1e-6, err_msg=n)
  assert out["bn.num_batches_tracked"] == 2**40 + 1
  np.testing.assert_array_equal(out["mask"], BASE["mask"])


@pytest.mark.parametrize("name", some_fast(METHODS, ["task_arithmetic", "ties"]))
def test_statistics_are_averaged_by_every_method_and_equal_infinities_copied(name):
  """Those of the weights, which the method measures, are as if there were no others."""
  given = {"layout": (("weight", "oi"), ("mask", None))}
  out = jaxmerge.merge(METHODS[name], MODELS, BASE, **given)
  check(out)
  alone = [{n: t[n] for n in ("mask", "weight")} for t in (MODELS, BASE)]
  alone = jaxmerge.merge(METHODS[name], *alone, **given)
  np.testing.assert_array_equal(out["weight"], alone["weight"])
  sliced = streaming.merge_slices(METHODS[name], MODELS, BASE, entries=2, **given)
  check(sliced)
  np.testing.assert_allclose(sliced["weight"], out["weight"], rtol=1e-6)


def test_files_average_statistics_and_copy_counters(tmp_path):
  for name, own in zip(("base", "m0", "m1", "m2"), (BASE, *EACH), strict=True):
    folders.write(tmp_path / name, own)
  models = [tmp_path / f"m{k}" for k in range(3)]
  out = files_merge.merge_files(METHODS["ties"], models, tmp_path / "out", base=tmp_path / "base")
  check(folders.read(out))


@pytest.mark.parametrize("base", [BASE, None], ids=["base", "none"])
def test_models_one_after_the_other(base):
  """Without a base the means are those of the weights."""
  own = {n: x for n, x in BASE.items() if n != "mask"}
  method = METHODS["task_arithmetic"] if base else methods.average()
  run = incremental.of(method, own if base else None)
  state = run.init(own)
  for model in EACH:
    state = run.update(state, {n: model[n] for n in own})
  check({**run.finalize(state), "mask": BASE["mask"]})


def test_the_continual_merge_averages_them_too():
  own = {n: x for n, x in BASE.items() if n != "mask"}
  run = continual.opcm(own)
  state = run.init(own)
  for model in EACH:
    state = run.update(state, {n: model[n] for n in own})
  check({**run.finalize(state), "mask": BASE["mask"]})


@pytest.mark.parametrize("at_once", [0, 1])
def test_the_loop_leaves_them_as_they_are(at_once):
  """No step changes them as it does weights, though a gradient says so."""
  tasks = small_tasks.quadratics((np.eye(1), np.ones(1)), (np.eye(1), 3 * np.ones(1)))

  def apply(params, inputs, head):
    own = {"theta": params["batch_stats"]["var"] + 0 * params["weight"]}
    return small_tasks.quadratic(own, inputs, head)

  start = {"batch_stats": {"var": np.ones(1, np.float32)}, "weight": np.ones(1, np.float32)}
  settings = small_tasks.descent(1, 1, 0.5, at_once=at_once)
  given = {"mesh": meshes.make(1), "loss": small_tasks.as_given, "metric": small_tasks.as_given}
  out = loop.tune_and_merge(
    apply, start, tasks, methods.task_arithmetic(1.0), settings, **given
  ).params
  assert out["batch_stats"]["var"].tolist() == [1.0]


@pytest.mark.parametrize(
  "merge", [jaxmerge.merge, streaming.merge_slices], ids=["memory", "slices"]
)
def test_negative_variances_and_other_infinities_are_refused(merge):
  with pytest.raises(ValueError, match=r"'bn.running_var': the result has a variance below zero"):
    merge(methods.average((-1.0, 1.0, 1.0)), MODELS, BASE)
  other = {**BASE, "bn.running_var": np.zeros(2, np.float32)}
  check(merge(METHODS["ties"], MODELS, BASE, reference=other))  # The mean of the models.
  for where in ((2, 0, 1), (1, 0, 0)):
    other = {**MODELS, "mask": np.array(MODELS["mask"])}
    other["mask"][where] = np.inf
    with pytest.raises(
      ValueError, match=f"leaf 'mask' of model {where[0]} has NaN or infinity|the base"
    ):
      merge(METHODS["ties"], other, BASE)


@pytest.mark.parametrize(
  "merge", [jaxmerge.merge, streaming.merge_slices], ids=["memory", "slices"]
)
def test_a_result_that_its_dtype_cannot_hold_is_refused(merge):
  base = {"w": np.array([6e4, 0], np.float16)}
  models = {"w": np.array([[6.1e4, 0], [6.2e4, 0]], np.float16)}
  with pytest.raises(
    ValueError, match=r"'w': the result has NaN or infinity, .* float16 cannot hold"
  ):
    merge(methods.task_arithmetic(2.0), models, base)
  assert merge(methods.average(), models, base)["w"][0] == 61504


def test_complex_numbers_are_copied_where_they_are_equal_and_else_refused():
  z = {"z": np.array([1j, 2**0.5]), "w": np.ones(2, np.float32)}
  same = jaxmerge.stack([z, z])
  for out in (jaxmerge.merge(METHODS["ties"], same, z), jaxmerge.merge(methods.average(), same)):
    assert out["z"].dtype == z["z"].dtype
    np.testing.assert_array_equal(out["z"], z["z"])
  other = {**same, "z": same["z"] * np.array([[1], [1 + 1e-15]])}
  for merge in (
    lambda t: jaxmerge.merge(METHODS["ties"], t, z),
    lambda t: jaxmerge.merge(METHODS["ties"], t, deltas=True),
  ):
    for run in (merge, jax.jit(merge)):
      with pytest.raises(
        ValueError, match=r"leaf 'z' is complex.*, and complex numbers are not merged"
      ):
        run(other)
  parts = {"re": jnp.ones(2), "im": jnp.ones(2)}  # The way that the error shows.
  assert jaxmerge.merge(METHODS["ties"], jaxmerge.stack([parts]), parts) is not None
