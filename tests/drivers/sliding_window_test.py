"""Windows that slide over a run: the merge of the newest checkpoints, saved and resumed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import jaxmerge
from jaxmerge import methods
from jaxmerge.io.checkpoints import store

BASE, MODELS = small.trees()
STEPS = np.random.default_rng(0).normal(size=(20, 3, 5)).astype(np.float32)
DECAY = methods.checkpoint_average("decay", decay="cosine")


def one(k):
  return {"w": jnp.asarray(STEPS[k]), "step": jnp.asarray(k)}


def run(merge, first, last, state=None):
  state = merge.init(one(0)) if state is None else state
  for k in range(first, last):
    state = merge.update(state, one(k))
  return state


@pytest.mark.parametrize("method", [methods.average(), DECAY, methods.checkpoint_average("wma")])
def test_is_the_merge_of_the_newest(method):
  """To the last bit, after any number of steps; before the window is full, that of all."""
  merge = jaxmerge.online(method, window=4)
  for count in (1, 3, 4, 5, 20):
    out = merge.finalize(run(merge, 0, count))
    expected = jaxmerge.merge(method, {"w": jnp.asarray(STEPS[max(0, count - 4) : count])})
    np.testing.assert_array_equal(out["w"], expected["w"])
    assert int(out["step"]) == count - 1


def test_with_a_base_task_vectors_are_merged():
  method = methods.ties(0.5)
  merge = jaxmerge.online(method, BASE, window=2)
  state = merge.init(BASE)
  for k in range(4):
    state = merge.update(state, {n: x[k] for n, x in MODELS.items()})
  newest = {n: x[2:] for n, x in MODELS.items()}
  small.same(
    jax.device_get(merge.finalize(state)), jax.device_get(jaxmerge.merge(method, newest, BASE))
  )


def test_the_callers_checkpoint_may_be_donated():
  merge, params = jaxmerge.online(methods.average(), window=2), one(3)
  state = merge.update(merge.init(params), params)
  params["w"].delete()
  np.testing.assert_array_equal(merge.finalize(state)["w"], STEPS[3])


def test_an_update_copies_one_checkpoint():
  """All other members are the same arrays."""
  merge = jaxmerge.online(methods.average(), window=4)
  before = run(merge, 0, 6)
  after = merge.update(before, one(6))
  assert all(
    a["w"] is b["w"] for a, b in zip(before["members"][1:], after["members"], strict=False)
  )


def test_members_keep_their_dtype_and_sums_are_float32():
  """bfloat16 alone would lose what a small member adds to a large one."""
  members = [jnp.full(3, x, jnp.bfloat16) for x in (256.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)]
  merge = jaxmerge.online(methods.average(), window=8)
  state = merge.init({"w": members[0]})
  for x in members:
    state = merge.update(state, {"w": x})
  assert state["members"][0]["w"].dtype == jnp.bfloat16
  expected = jnp.full(3, 263 / 8, jnp.bfloat16)
  np.testing.assert_array_equal(merge.finalize(state)["w"], expected)


def test_a_window_does_not_drift():
  """A running sum in float32, which subtracts what leaves the window, does."""
  rng, mean = np.random.default_rng(1), jaxmerge.online(methods.average(), window=4)
  steps = (100 * rng.normal(size=(400, 256))).astype(np.float32)
  steps[200:] /= 1e4  # A large beginning is long gone.
  state, total = mean.init({"w": steps[0]}), np.zeros(256, np.float32)
  for k, x in enumerate(steps):
    state = mean.update(state, {"w": x})
    total += x - (steps[k - 4] if k >= 4 else np.float32(0))
  exact = steps[-4:].astype(np.float64).mean(axis=0)
  scale = np.abs(exact).max()
  assert np.abs(mean.finalize(state)["w"] - exact).max() < 1e-6 * scale
  assert np.abs(total / 4 - exact).max() > 1e-3 * scale


def test_is_saved_and_resumed(tmp_path):
  merge = jaxmerge.online(DECAY, window=3)
  whole = merge.finalize(run(merge, 0, 9))
  with store.Checkpoints(tmp_path) as saved:
    saved.save(5, run(merge, 0, 5), {})
  with store.Checkpoints(tmp_path) as saved:
    restored = saved.restore(like=merge.init(one(0)))
  resumed = merge.finalize(run(merge, 5, 9, restored.state))
  small.same(jax.device_get(resumed), jax.device_get(whole))


def test_without_a_window_all_count():
  merge = jaxmerge.online(methods.checkpoint_average("decay"))
  expected = jaxmerge.merge(methods.checkpoint_average("decay"), {"w": jnp.asarray(STEPS)})["w"]
  np.testing.assert_allclose(merge.finalize(run(merge, 0, 20))["w"], expected, atol=1e-6)


def test_what_is_wrong_is_said():
  with pytest.raises(ValueError, match="window must be a number of checkpoints, 1 or more, got 0"):
    jaxmerge.online(methods.average(), window=0)
  with pytest.raises(ValueError, match="does not support methods with random masks"):
    jaxmerge.online(methods.dare(), BASE, window=2)
  with pytest.raises(ValueError, match="there is no base"):
    jaxmerge.online(methods.ties(), window=2)
  merge = jaxmerge.online(methods.average(), window=2)
  with pytest.raises(ValueError, match="update has seen no model"):
    merge.finalize(merge.init(one(0)))
  with pytest.raises(ValueError, match=r"leaf 'w' is .* in the tree passed to init but"):
    merge.update(merge.init(one(0)), {"w": jnp.ones(2), "step": jnp.asarray(0)})
