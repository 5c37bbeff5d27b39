"""What has 64 bits is merged in them, in memory, over files and in the loop; copies are copies."""

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import small_tasks
from marking import some_fast

import jaxmerge
from jaxmerge import methods
from jaxmerge.adapters import lora as adapters_lora
from jaxmerge.drivers import incremental, streaming
from jaxmerge.files import merge
from jaxmerge.mixtures import masks
from jaxmerge.parallel import mesh as meshes
from jaxmerge.training import loop

TINY = 2.0**-40  # What float32 cannot tell from nothing beside 1.
COUNT = np.array([2**40 + 7, -1])
BASE = {"w": np.ones((2, 3)), "v": np.ones(3, np.float32), "n": COUNT}
MODELS = jaxmerge.stack(
  [{**BASE, "w": BASE["w"] + k * TINY, "v": BASE["v"] + k} for k in (1, 2, 6)]
)


def moved(factor):
  return {"w": 1 + factor * TINY, "v": np.float32(1 + factor), "n": COUNT}


def same(found, expected):
  for n, x in BASE.items():
    assert found[n].dtype == x.dtype, n
    np.testing.assert_array_equal(found[n], np.broadcast_to(expected[n], x.shape), err_msg=n)


@pytest.mark.parametrize(
  ("method", "factor"),
  [
    (methods.average(), 3),
    (methods.task_arithmetic(1.0), 9),
    (methods.ties(1.0), 3),
    (methods.magmax(1.0), 6),
    (methods.krum(0, 1), 1),
  ],
)
def test_numpys_doubles_and_long_integers_come_back_whole(method, factor):
  same(jaxmerge.merge(method, MODELS, BASE), moved(factor))
  same(streaming.merge_slices(method, MODELS, BASE, entries=48), moved(factor))


def test_weights_without_a_base_and_what_is_made_of_them():
  same(jaxmerge.merge(methods.average(), MODELS), moved(3))
  assert {n: x.dtype for n, x in MODELS.items()} == {n: x.dtype for n, x in BASE.items()}
  longs = {**MODELS, "n": np.stack([COUNT, COUNT, COUNT + 2**33])}
  with pytest.raises(ValueError, match="leaf 'n' is int64 and differs between models"):
    jaxmerge.merge(methods.average(), longs)


def test_models_one_after_the_other():
  each = jaxmerge.unstack(MODELS)
  for base, factor in ((BASE, 9), (None, None)):
    run = incremental.of(methods.task_arithmetic(1.0) if base else methods.average(), base)
    state = run.init(each[0])
    for model in each:
      state = run.update(state, model)
    same(run.finalize(state), moved(factor or 3))


def test_entries_are_ranked_by_all_their_bits():
  """Four entries that are one number in float32: the two largest are kept, not all."""
  x = {"w": np.array([[1.0, 1 + 1e-12, 1 + 3e-12, 1 + 2e-12]])}
  expected = [0.0, 0.0, *x["w"][0, 2:]]
  for method in (methods.trim(0.5, rule="exact"), methods.band(0.5, 0.0)):
    assert jaxmerge.merge(method, x)["w"].tolist() == expected
  zero = {"w": np.zeros(4)}
  out = streaming.merge_slices(methods.trim(0.5, rule="exact"), x, zero, entries=64)
  assert out["w"].tolist() == expected


def test_adapters_and_bundles():
  lora = adapters_lora.Lora(np.array([[1.0, 1.0, 1.0]]), np.full((2, 1), TINY))
  out = adapters_lora.apply({"w": BASE["w"]}, {"w": lora})["w"]
  assert out.dtype == np.float64
  assert (out == 1 + TINY).all()
  bundle = masks.emr({"w": BASE["w"]}, {"w": MODELS["w"]})
  assert bundle.for_task("2")["w"].dtype == np.float64
  np.testing.assert_allclose(bundle.for_task("2")["w"] - 1, 6 * TINY, rtol=1e-9)


@pytest.mark.slow
def test_the_loop_tunes_and_merges_in_doubles():
  params = small_tasks.weights(dtype=np.float64)
  with jax.enable_x64():
    wide = jax.tree.map(jnp.asarray, params)
  found = []
  tasks = [small_tasks.classified(n, 6, dtype=np.float64) for n in ("cat", "dog")]
  for start in (params, wide):
    settings = small_tasks.descent(1, 1, 2.0**-20)
    given = {"mesh": meshes.make(1), "settings": settings}
    found.append(loop.tune_and_merge(small_tasks.network, start, tasks, **given).params["dense"])
  assert found[0]["kernel"].dtype == np.float64
  small.same(*found)
  change = found[0]["kernel"] - params["dense"]["kernel"]
  assert (change != 0).all()
  assert np.abs(change).max() < 1e-5


@pytest.mark.parametrize(
  "kind", some_fast(["all", "one buffer", "result"], ["one buffer", "result"])
)
@pytest.mark.parametrize("method", [methods.average(), methods.ties(0.5)], ids=["average", "ties"])
def test_files_have_the_bytes_of_doubles(tmp_path, kind, method):
  base, *models = folders.family(tmp_path, 2)
  rng = np.random.default_rng(5)
  wides = {n for n, x in base.items() if x.dtype == np.float32 and (kind == "all" or "norm" in n)}
  for name, own in zip(("base", "m0", "m1"), (base, *models), strict=True):
    if kind != "result":
      own |= {n: own[n] + 1e-10 * rng.normal(size=own[n].shape) for n in wides}
    folders.write(tmp_path / name, own)
  out = merge.merge_files(
    method,
    [tmp_path / "m0", tmp_path / "m1"],
    tmp_path / "out",
    base=tmp_path / "base",
    dtype="float64" if kind == "result" else None,
  )
  double = lambda t: {n: x.astype(np.float64) if x.dtype.kind == "f" else x for n, x in t.items()}  # noqa: E731
  expected = jaxmerge.merge(method, jaxmerge.stack([double(m) for m in models]), double(base))
  for n, x in folders.read(out).items():
    wide = x.dtype.kind == "f" and (kind == "result" or n in wides)
    assert x.dtype == (np.float64 if wide else base[n].dtype)
    np.testing.assert_allclose(x, expected[n], rtol=0, atol=1e-15 if wide else 1e-6, err_msg=n)


@pytest.mark.parametrize("leaf", [np.array([2**40 + 7]), np.array([1 / 3])], ids=["int", "float"])
def test_a_program_of_the_callers_that_would_narrow_a_leaf_is_refused(leaf):
  """As `vmap` over a number does, of leaves that it closes over; in 64 bits they are whole."""
  base = {"w": np.zeros(1, np.float32), "x": leaf}
  models = jaxmerge.stack([base, base])

  def merged(scale):
    return jaxmerge.merge(methods.task_arithmetic(), models, base, hparams={"scale": scale})

  with pytest.raises(ValueError, match=r"leaf 'x' is .*64, which your jit.* drop the leaf first"):
    jax.vmap(merged)(jnp.ones(1))
  with pytest.raises(ValueError, match=r"leaf 'x' is .*64"):
    jax.jit(lambda: merged(1.0))()
  with jax.enable_x64(True):
    assert jax.vmap(merged)(jnp.ones(1))["x"][0] == leaf


@pytest.mark.parametrize("leaf", [np.array([2**40 + 7]), np.array([1 / 3])], ids=["int", "float"])
def test_a_running_merge_in_a_program_that_narrows_a_leaf_is_refused(leaf):
  """What is an argument of the program is narrow before it is seen; the base tells."""
  base = {"w": np.zeros(1, np.float32), "x": leaf}
  run = incremental.of(methods.task_arithmetic(1.0), base)
  state = run.init(base)
  with pytest.raises(ValueError, match=r"leaf 'x' is .*64, which your jit.* jax.enable_x64"):
    jax.jit(run.update)(state, base)
  with jax.enable_x64(True):
    state = jax.jit(run.update)(state, base)
  assert run.finalize(state)["x"][0] == leaf
