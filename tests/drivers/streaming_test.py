"""Merging slice by slice: the same bits, one slice at a time, everything read and written once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from marking import some_fast

import jaxmerge
from jaxmerge import methods
from jaxmerge.catalog import lookup
from jaxmerge.core import interpreter, stage
from jaxmerge.core.records import Rank
from jaxmerge.drivers import measurement, slice_programs, slices, streaming

TIES = methods.ties(0.3, rule="exact")


def source(base, models, log):
  """Hands out entries, and writes down what it was asked for."""
  leaves = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in base.items()}
  height = len(models["steps"])

  def read(name, start, stop, order, on_chunk):
    log.append((name, start, stop))
    own = base[name].reshape(-1)[start:stop]
    parts = interpreter.Slice(own, None, models[name].reshape(height, -1)[order, start:stop])
    if on_chunk is not None:
      slices.show(on_chunk, parts)
    return parts

  return streaming.Source(leaves, height, read)


def collected(method, base, models, **options):
  reads, writes = [], []
  streaming.stream(
    method,
    source(base, models, reads),
    lambda name, start, part: writes.append((name, start, np.asarray(part))),
    **options,
  )
  return reads, writes


@pytest.mark.parametrize("entries", [1, 50, 10**9])
def test_every_entry_is_written_once_and_in_order(entries):
  base, models = small.trees()
  reads, writes = collected(methods.task_arithmetic(), base, models, entries=entries)
  for name, x in base.items():
    parts = [(start, part) for n, start, part in writes if n == name]
    assert [s for s, _ in parts] == np.cumsum([0] + [len(p) for _, p in parts])[:-1].tolist()
    assert np.concatenate([p for _, p in parts]).shape == (x.size,)
  assert max(stop - start for _, start, stop in reads) <= entries


def test_a_statistic_reads_the_source_once():
  """But for the sample of a rank, here the whole leaf, and the slice in which ties are cut."""
  base, models = small.trees(("matrix", "steps"))
  tied = {"matrix": np.broadcast_to(base["matrix"] + 1, models["matrix"].shape)}
  for method, stack, reads in [
    (methods.task_arithmetic(), models, 3),
    (methods.trim(0.3), models, 1 + 3 + 3),
    (methods.trim(0.3, rule="exact"), models, 1 + 3 + 3),
    (methods.trim(0.3, rule="exact"), models | tied, 1 + 3 + 1 + 3),
  ]:
    method = stage.chain(method, methods.weighted_sum())
    log, _ = collected(method, base, stack, entries=48)
    assert len([r for r in log if r[0] == "matrix"]) == reads


@pytest.mark.kernels
def test_the_whole_tree_gives_the_bits_of_memory():
  """With ranks over all leaves, names, a reference, numbers per model, and another seed."""
  base, models = small.trees(("matrix", "scalar", "steps"))
  reference = {n: x * np.float32(0.99) if x.dtype == np.float32 else x for n, x in base.items()}
  method = methods.dare_ties(0.3, 0.4)
  options = {
    "seed": 2**31,
    "names": small.NAMES,
    "reference": reference,
    "hparams": {"drop_rate": (0.1, 0.2, 0.3, 0.4), "density": 0.6},
  }
  out = jaxmerge.merge(method, models, base, **options)
  small.same(streaming.merge_slices(method, models, base, entries=50, **options), out)


def test_hyperparameters_per_leaf():
  base, models = small.trees()
  rng = np.random.default_rng(3)
  weight = {n: rng.random(4).astype(np.float32) for n in models}
  scale = {n: np.float32(k) for k, n in enumerate(base)}
  for hparams in ({"weight": weight}, {"scale": scale}, {"weight": weight, "scale": scale}):
    out = jaxmerge.merge(methods.task_arithmetic(0.5), models, base, hparams=hparams)
    found = streaming.merge_slices(
      methods.task_arithmetic(0.5), models, base, hparams=hparams, entries=50
    )
    small.same(found, out)


def test_joins_and_masks_stream():
  base, models = small.trees()
  inner = stage.chain(methods.trim(0.5), methods.weighted_sum())
  agreeing = stage.join(inner, lambda x, y, leaf: jnp.where(x * y > 0, x, 0))
  method = stage.chain(
    stage.masked(agreeing, lambda name: name in ("matrix", "cube")), methods.average()
  )
  out = jaxmerge.merge(method, models, base)
  small.same(streaming.merge_slices(method, models, base, entries=50), out)


def test_rows_get_whole_leaves():
  base, models = small.trees(("matrix", "scalar", "steps"))
  method = methods.breadcrumbs(0.5, 0.1, scope="row")
  reads, _ = collected(method, base, models, entries=1, layout=small.VIEWS)
  assert {("matrix", 0, 128), ("scalar", 0, 1)} == {r for r in reads if r[0] != "steps"}


def test_another_value_or_seed_does_not_compile_again():
  base, models = small.trees()
  method = methods.dare(0.5)
  programs = (slice_programs.merged,)
  streaming.merge_slices(method, models, base, seed=1, entries=50)
  sizes = [p._cache_size() for p in programs]
  streaming.merge_slices(method, models, base, seed=2, hparams={"drop_rate": 0.9}, entries=50)
  assert [p._cache_size() for p in programs] == sizes


def test_bfloat16_leaves_stay_so():
  base, models = jax.tree.map(
    lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16)) if x.dtype == np.float32 else x,
    small.trees(),
  )
  out = jaxmerge.merge(methods.average(), models, base)
  small.same(streaming.merge_slices(methods.average(), models, base, entries=50), out)


def test_empty_leaves_come_back_empty():
  base = {"w": np.zeros((0, 3), np.float32), "v": np.ones(2, np.float32)}
  models = {n: np.stack([x, x]) for n, x in base.items()}
  for method in (methods.average(), methods.ties(0.5)):
    small.same(streaming.merge_slices(method, models, base), base)
    small.same(jaxmerge.merge(method, models, base), base)


def test_a_leaf_that_no_combiner_touched_is_named_before_anything_is_read():
  base, models = small.trees()
  reads = []
  method = stage.masked(methods.average(), lambda name: name != "vector")
  with pytest.raises(ValueError, match="no combiner touched leaf 'vector': 4 models are left"):
    streaming.stream(method, source(base, models, reads), lambda *part: None)
  assert reads == []
  apart = stage.join(methods.average(), lambda x, y, leaf: x)
  with pytest.raises(ValueError, match="no combiner touched leaf 'cube': 4 models are left"):
    streaming.merge_slices(apart, models, base)


@pytest.mark.parametrize("whose", ["the base", "model green"])
def test_nan_is_named_before_its_slice_is_written(whose):
  base, models = jax.tree.map(np.copy, small.trees())
  if whose == "the base":
    base["matrix"][5, 1] = np.nan
  else:
    models["matrix"][1, 5, 1] = np.inf
  writes = []
  with pytest.raises(ValueError, match=f"leaf 'matrix' of {whose} has NaN or infinity"):
    streaming.stream(
      methods.average(),
      source(base, models, []),
      lambda name, start, part: writes.append((name, start)),
      names=small.NAMES,
      entries=16,
    )
  assert [start for name, start in writes if name == "matrix"] == [0, 16, 32, 48, 64]


@pytest.mark.slow
@pytest.mark.parametrize(
  "method",
  [methods.ties(0.5, scope="leaf"), methods.sce(0.5)],
  ids=["ties", "sce"],
)
def test_a_leaf_without_entries_stays_as_it_is(method):
  base, models = small.trees(("matrix", "steps"))
  base["empty"], models["empty"] = np.zeros((0, 3), np.float32), np.zeros((4, 0, 3), np.float32)
  out = jaxmerge.merge(method, models, base)
  small.close(streaming.merge_slices(method, models, base), out)


@pytest.mark.kernels
@pytest.mark.parametrize("scope", ["row", "column"])
@pytest.mark.parametrize("layout", ["oi", "io"])
def test_what_columns_need_is_not_cut_by_rows(scope, layout):
  base, models = small.trees(("matrix", "steps"), height=2)
  method, options = methods.nuslerp((0.3, 0.7), scope), {"layout": (("matrix", layout),)}
  out = jaxmerge.merge(method, models, base, **options)
  small.same(streaming.merge_slices(method, models, base, entries=32, **options), out)


def test_prepared_numbers_take_the_place_of_aux():
  base, models = small.trees()
  shapes = {n: x.shape for n, x in base.items() if x.dtype == np.float32}
  method = methods.task_arithmetic(0.5)
  ready = interpreter.prepare(method, shapes, 4, {"scale": 0.25}, small.NAMES)
  found = streaming.merge_slices(method, models, base, ready=ready)
  small.same(
    found, jaxmerge.merge(method, models, base, hparams={"scale": 0.25}, names=small.NAMES)
  )


@pytest.mark.kernels
@pytest.mark.parametrize(
  "name", some_fast(["average", "task_arithmetic", "dare", "ties"], ["average", "dare"])
)
def test_large_leaves_have_the_same_bits_however_they_are_cut(name):
  """Where compilers begin to treat sums over models in other ways: a quarter million entries."""
  rng = np.random.default_rng(0)
  base = {"w": rng.normal(size=(64, 4096)).astype(np.float32)}
  models = {"w": base["w"][None] + rng.normal(size=(3, 64, 4096)).astype(np.float32)}
  weight = {} if name == "dare" else {"weight": (0.3, 0.7, 1.1)}
  method = getattr(methods, name)(**weight)
  options = {"seed": 5} if name == "dare" else {}
  out = jaxmerge.merge(method, models, base, **options)
  for entries in (1000, 70_000):
    small.same(streaming.merge_slices(method, models, base, entries=entries, **options), out)


@pytest.mark.parametrize("name", lookup.METHODS)
def test_the_catalog_says_how_often_models_are_read(name):
  method = getattr(methods, name)()
  measured = sum(len(list(measurement.batches(step))) for step in method)
  assert lookup.METHODS[name].passes == 1 + measured
  ranks = any(isinstance(s, Rank) for step in method for s in step.reductions)
  assert lookup.METHODS[name].ranks == ranks


def test_leaves_that_are_measured_alone_are_merged_before_the_next_is_read():
  base, models = small.trees(("matrix", "vector"))
  stack = models | {"steps": np.zeros((4, 1), np.int32)}
  reads, _ = collected(methods.ties(scope="leaf", zero_sum="plus"), base, stack, entries=10**6)
  names = [name for name, _, _ in reads]
  assert names == sorted(names)
  reads, _ = collected(methods.ties(zero_sum="plus"), base, stack, entries=10**6)
  names = [name for name, _, _ in reads]
  assert names != sorted(names)


def test_entries_are_ranked_in_slices_though_matrices_are_updated_whole():
  """But for the sample, here the whole leaf, and the update itself."""
  base, models = small.trees(("matrix", "steps"))
  reads, _ = collected(methods.doge(steps=1), base, models, entries=10, layout=small.VIEWS)
  size = base["matrix"].size
  sizes = [stop - start for name, start, stop in reads if name == "matrix"]
  assert sizes.count(size) == 2
  assert sizes.count(10) == size // 10


@pytest.mark.parametrize("at", [0, 40, 300, 900])
def test_nan_is_found_beyond_what_a_sample_has_seen(at, monkeypatch):
  """A sample looks at the first entries of a leaf, before its slices come in order."""
  monkeypatch.setattr(slices, "FEW", 32)
  monkeypatch.setattr(slices, "PIECE", 8)
  rng = np.random.default_rng(0)
  base = {"steps": rng.normal(size=1000).astype(np.float32)}
  models = {"steps": rng.normal(size=(2, 1000)).astype(np.float32)}
  models["steps"][1, at] = np.nan
  with pytest.raises(ValueError, match="leaf 'steps' of model 1 has NaN or infinity"):
    collected(stage.chain(methods.trim(0.3), methods.weighted_sum()), base, models, entries=256)


def test_a_result_that_its_dtype_cannot_hold_is_refused():
  base = {"steps": np.full(9, 60000, np.float16)}
  models = {"steps": np.full((2, 9), 65000, np.float16)}
  method = methods.task_arithmetic(1.0)
  with pytest.raises(ValueError, match="leaf 'steps': the result has NaN or infinity, though no "):
    collected(method, base, models)
  _, ((_, _, written),) = collected(method, base, models, nonfinite=True)
  assert np.isinf(written).all()


@pytest.mark.parametrize(("tied", "readings"), [(False, 1), (True, 3)])
def test_a_majority_is_counted_only_where_it_decides(tied, readings):
  """Nothing cancels out in random numbers; where something does, its slice is read again."""
  rng = np.random.default_rng(0)
  base = {"steps": np.zeros(96, np.float32)}
  models = {"steps": rng.normal(size=(2, 96)).astype(np.float32) + 0.3}
  if tied:
    models["steps"][:, 70] = 1.0, -1.0
  method = methods.elected()
  reads, writes = collected(method, base, models, entries=96)
  assert len(reads) == readings
  merged = jaxmerge.merge(method, models, base)["steps"]
  np.testing.assert_array_equal(writes[0][2], merged)
  assert (merged[70] == 1.0) == tied  # Most entries are positive.
