"""Which rows a step sees, and what that costs."""

import dataclasses
import itertools

import hypothesis
import numpy as np
import pytest
import small_tasks as small
from hypothesis import strategies as st

from jaxmerge.experiments import problem
from jaxmerge.training import budget, schedule, settings

NAMES = ("ant", "bee", "cat")


def chosen(**changes):
  return settings.Settings(**dict(rounds=4, epochs=3.0, batch_size=5, learning_rate=0.5) | changes)


@hypothesis.given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_every_epoch_is_a_permutation(rows, seed):
  seen = schedule.stream("ant", rows, seed, 0, 3 * rows).reshape(3, rows)
  assert (np.sort(seen, axis=1) == np.arange(rows)).all()


def test_epochs_tasks_and_seeds_differ():
  def first(name, seed, epoch):
    return schedule.stream(name, 50, seed, epoch * 50, epoch * 50 + 50).tolist()

  orders = [first("ant", 0, 0), first("ant", 0, 1), first("bee", 0, 0), first("ant", 1, 0)]
  assert len({tuple(o) for o in orders}) == 4


@hypothesis.given(st.integers(1, 30), st.integers(0, 99), st.integers(0, 99))
def test_a_stream_can_be_entered_anywhere(rows, start, length):
  whole = schedule.stream("ant", rows, 7, 0, start + length)
  part = schedule.stream("ant", rows, 7, start, start + length)
  assert part.dtype == np.int32
  np.testing.assert_array_equal(part, whole[start:])


@hypothesis.given(st.integers(1, 1000), st.integers(1, 50))
def test_rounds_share_out_all_steps_evenly(total, rounds):
  ends = [schedule.bounds(total, rounds, k) for k in range(rounds)]
  assert ends[0][0] == 0
  assert ends[-1][1] == total
  assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
  widths = [b - a for a, b in ends]
  assert max(widths) - min(widths) <= 1
  assert max(widths) == schedule.longest([total], rounds)


def test_equal_epochs_and_equal_steps():
  rows = (10, 20, 60)
  # 3 epochs of 10, 20 and 60 rows in batches of 5; their mean is 18.
  assert schedule.totals(rows, chosen()) == (6, 12, 36)
  assert schedule.totals(rows, chosen(steps="equal")) == (18, 18, 18)
  assert schedule.totals((1, 2), chosen(epochs=0.1)) == (1, 1)


@pytest.mark.parametrize("rounds", [1, 3, 4, 7])
def test_the_plans_of_all_rounds_are_the_stream(rounds):
  rows, s = (12, 20, 9), chosen(rounds=rounds, schedule="cosine")
  plans = [schedule.plan(NAMES, rows, s, k, rounds=rounds) for k in range(rounds)]
  assert len({p.rows.shape for p in plans}) == 1
  for t, (name, n, total) in enumerate(zip(NAMES, rows, schedule.totals(rows, s), strict=True)):
    seen = np.concatenate([p.rows[t][: p.steps[t]] for p in plans])
    np.testing.assert_array_equal(seen.ravel(), schedule.stream(name, n, s.seed, 0, 5 * total))
    rates = np.concatenate([p.learning_rate[t][: p.steps[t]] for p in plans])
    expected = 0.25 * (1 + np.cos(np.pi * np.arange(total) / total))
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
  for p in plans:
    padding = np.arange(p.rows.shape[1]) >= p.steps[:, None]
    assert not p.rows[padding].any()
    assert not p.learning_rate[padding].any()


def test_a_tasks_plan_does_not_depend_on_the_other_tasks():
  s = chosen()
  alone = schedule.plan(["bee"], [20], s, 2, rounds=4)
  among = schedule.plan(NAMES, (12, 20, 9), s, 2, rounds=4)
  assert among.steps[1] == alone.steps[0]
  for a, b in zip(alone[:2], among[:2], strict=True):
    np.testing.assert_array_equal(a[0], b[1][: a.shape[1]])


def test_warmups():
  s = chosen(epochs=10.0, batch_size=1, rounds=2, warmup=0.5)
  rate = schedule.learning_rate(np.array([0.0, 0.25, 0.5, 0.9]), s)
  np.testing.assert_allclose(rate, [0.001, 0.25, 0.5, 0.5])
  s = dataclasses.replace(s, warmup=0.0, round_warmup=0.4)
  # Rounds of ten steps, of which four warm up.
  for k in (0, 1):
    rate = schedule.plan(["ant"], [2], s, k, rounds=2).learning_rate[0]
    np.testing.assert_allclose(rate, [0.125, 0.25, 0.375] + [0.5] * 7)


def test_outer_schedule():
  assert [schedule.factor("constant", k, 4) for k in range(4)] == [1.0] * 4
  found = [schedule.factor("cosine", k, 4) for k in range(4)]
  np.testing.assert_allclose(found, [1, 0.5 + 0.5 / 2**0.5, 0.5, 0.5 - 0.5 / 2**0.5])


def test_budget_of_tuning_by_hand():
  # 3 epochs of 10 and 20 rows, batches of 5: 6 and 12 steps, side by side 12.
  found = budget.of_tuning([6, 12], [10, 20], 5, exchanges=4)
  assert found == budget.Budget(3.0, 18, 12, 90, 4, 1)
  # 2 steps of 5 rows are one epoch of 10, and half an epoch of 20.
  assert budget.of_tuning([2, 2], [10, 20], 5, exchanges=0).epochs_per_task == 0.75


def test_budgets_add_up():
  experts = budget.Budget(3.0, 18, 12, 90, 1, 7)
  after = budget.of_tuning([2, 4], [5, 10], 5, exchanges=2)
  assert experts.plus(after) == budget.Budget(5.0, 24, 16, 120, 3, 8)


def test_post_hoc_halves_the_validation_rows():
  tasks = small.three()
  halves = problem.post_hoc(tasks)
  for before, after in zip(tasks, halves, strict=True):
    assert (len(after.train.labels), len(after.validation.labels)) == (5, 4)
    both = np.concatenate([after.train.inputs, after.validation.inputs])
    rows = {row.tobytes() for row in before.validation.inputs}
    assert {row.tobytes() for row in both} == rows
    assert len(both) == len(rows)
