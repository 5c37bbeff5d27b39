"""Exact ranks from slices: against sorting, whatever the sample says."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmerge.core import order_statistics
from jaxmerge.drivers import external_selection, row_ranks

TOP = 2**31 - 1


def numbers(rows, sample, cuts, log=None, run=1, kind=np.uint32):
  """Numbers in slices, with the codes that a driver would make; so many sampled ones are a run."""
  rows = np.asarray(rows, kind)
  ends = sorted({0, *cuts, rows.shape[1]})
  ranges = list(itertools.pairwise(ends))

  def part(start, stop, low, high):
    bits = part_of(start, stop)
    brackets = [x.reshape(-1, len(rows), 1) for x in (low, high)]
    return external_selection.NumberSlice(
      start, external_selection.sides(bits, *brackets), lambda at: bits[:, at]
    )

  def part_of(start, stop):
    if log is not None:
      log.append((start, stop))
    return rows[:, start:stop]

  return external_selection.Numbers(
    rows.shape[1],
    lambda: (np.asarray(sample, kind), *weighed(np.shape(sample)[1], run)),
    lambda low, high: (part(*ends, low, high) for ends in ranges),
    lambda which: (ranges[which][0], part_of(*ranges[which])),
    np.dtype(kind),
  )


def weighed(size, run):
  """Weights of sampled numbers, and where each run of them begins."""
  return np.ones(size), np.arange(0, size, run)


def expected(row, n, top=TOP):
  """The value, and which entries are inside, by a stable sort."""
  order = np.argsort(-np.asarray(row, np.int64), kind="stable")[:n]
  return (row[order[-1]] if n else top), set(order.tolist())


@pytest.mark.slow
@settings(max_examples=100)
@given(st.data())
def test_a_cut_is_the_head_of_a_stable_sort(data):
  size, models = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 3))
  kind, top = data.draw(st.sampled_from([(np.uint32, TOP), (np.uint64, 2**63 - 1)]))
  values = st.one_of(st.integers(0, 5), st.integers(0, top - 1), st.integers(2**30, 2**30 + 9))
  row = st.lists(values, min_size=size, max_size=size)
  rows = np.array([data.draw(row) for _ in range(models)], kind)
  sampled = data.draw(st.integers(1, 8))
  # A sample that has nothing to do with the numbers costs more scans, and nothing else.
  sample = [data.draw(st.lists(values, min_size=sampled, max_size=sampled)) for _ in rows]
  ranks = [data.draw(st.integers(0, size)) for _ in rows]
  cuts = data.draw(st.lists(st.integers(1, size), max_size=6))
  with pytest.MonkeyPatch.context() as patch:  # Room for a few, or for all.
    patch.setattr(external_selection, "CAPACITY", data.draw(st.sampled_from([3, 12, 2**22])))
    patch.setattr(external_selection, "FINE", data.draw(st.sampled_from([1, 16])))
    given_ = functools.partial(numbers, rows, sample, cuts, kind=kind)
    found, lasts = external_selection.cut(given_(), ranks, exact=True)
    again, every = external_selection.cut(given_(), ranks, exact=False)
  assert (found == again).all()
  assert (every == order_statistics.EVERY).all()
  at = np.arange(size)
  for row, n, value, last in zip(rows, ranks, found, lasts, strict=True):
    wanted, inside = expected(row, n, top)
    assert value == wanted
    assert set(np.flatnonzero((row > value) | ((row == value) & (at <= last))).tolist()) == inside


@pytest.mark.parametrize(
  ("different", "capacity", "scans"),
  [(None, 2**22, 1), (100, 4000, 1), (None, 2000, 2)],
  ids=["much room", "equal ones together", "too many are different"],
)
def test_a_good_sample_needs_one_scan_where_there_is_room(monkeypatch, different, capacity, scans):
  monkeypatch.setattr(external_selection, "CAPACITY", capacity)
  monkeypatch.setattr(external_selection, "FINE", 8)
  rng = np.random.default_rng(0)
  x = np.abs(rng.normal(size=(2, 200_000)))
  x = x if different is None else np.round(x * different) / different
  rows = x.astype(np.float32).view(np.uint32)
  cuts, log = range(10_000, 200_000, 10_000), []
  ranks = [40_000, 199_000]
  found, _ = external_selection.cut(numbers(rows, rows[:, ::50], cuts, log), ranks, exact=False)
  assert found.tolist() == [expected(row, n)[0] for row, n in zip(rows, ranks, strict=True)]
  assert len(log) == 20 * scans


def test_a_sample_of_rows_that_differ_needs_one_scan_too():
  """Each row has a scale of its own, so that its entries tell little that is new."""
  rng = np.random.default_rng(0)
  scans = []
  for _ in range(20):
    x = np.abs(rng.normal(size=(500, 200))) * np.exp(0.5 * rng.normal(size=(500, 1)))
    rows, picked = (v.astype(np.float32).view(np.uint32).reshape(1, -1) for v in (x, x[::10]))
    log = []
    found, _ = external_selection.cut(
      numbers(rows, picked, [], log, run=200), [50_000], exact=False
    )
    assert found[0] == np.sort(rows[0])[-50_000]
    scans.append(len(log))
  assert sum(scans) <= 22  # More than half of the samples would need a second scan.


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_many_zeros_are_counted_not_kept(share):
  """Frozen weights: the wanted value is zero, and nearly all numbers tie with it."""
  rng = np.random.default_rng(0)
  rows = np.where(rng.random((1, 50_000)) < share, 0, rng.integers(1, 100, (1, 50_000)))
  ends, log = range(5_000, 50_000, 5_000), []
  n = 49_000
  found, last = external_selection.cut(numbers(rows, rows[:, ::10], ends, log), [n], exact=True)
  value, inside = expected(rows[0], n)
  assert (found[0], last[0]) == (value, max(i for i in inside if rows[0, i] == value))
  assert len(log) == 10 + 1  # One scan, and one slice again, where the last one inside lies.


@pytest.mark.parametrize("columns", [1, 2, 64, 3000])
def test_places_in_rows_are_those_of_the_device(columns):
  """Ties stand in order of their columns; a zero with a sign is a zero."""
  rng = np.random.default_rng(columns)
  x = np.round(rng.normal(size=(2, 5, columns)), 1).astype(np.float32)
  x[:, :, 0] = -0.0
  found = row_ranks.ranks(np.abs(x).view(np.uint32))
  np.testing.assert_array_equal(found, order_statistics.ranks(jnp.asarray(x)))
