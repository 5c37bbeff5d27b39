"""A search in a box: its ranges, its order, its limits."""

import math

import pytest

from jaxmerge.catalog import lookup
from jaxmerge.search import box


def trials(axes, count, default, score):
  """Returns all candidates that a search proposes."""
  strategy, candidates = box.search(axes, count, default), []
  scores = None
  while True:
    try:
      (candidate,) = strategy.send(scores)
    except StopIteration:
      return candidates
    candidates.append(candidate)
    scores = [score(candidate)]


def distance(candidate):
  """A score that is highest at scale 0.6."""
  return -abs(math.log(candidate["scale"] / 0.6))


@pytest.mark.parametrize("method", sorted(lookup.METHODS))
def test_usual_ranges_hold_allowed_values_and_the_default(method):
  entry = lookup.METHODS[method]
  for name, axis in box.axes(method).items():
    for share in (0.0, 0.3, 1.0):
      entry.parameters[name].check(name, axis.at(share))
    assert axis.low <= entry.parameters[name].default <= axis.high


def test_a_share_is_that_of_its_value():
  for axis in (box.Axis(0.25, 4.0, is_log=True), box.Axis(0.1, 0.9), box.Axis(values=(1, 2, 3))):
    value = axis.at(0.7)
    assert axis.at(axis.share(value)) == value


def test_the_default_comes_first_and_no_candidate_twice():
  axes = box.axes("iso_c")
  candidates = trials(axes, 8, {"scale": 1.0}, distance)
  assert candidates[0] == {"scale": 1.0}
  assert len(candidates) == 8
  assert len({tuple(c.items()) for c in candidates}) == 8
  assert max(map(distance, candidates[4:])) > max(map(distance, candidates[:4]))


def test_lists_that_fit_are_tried_in_full():
  axes = {"density": box.Axis(values=(0.2, 0.5)), "rule": box.Axis(values=("kth", "exact"))}
  candidates = trials(axes, 4, {"density": 0.2, "rule": "kth"}, lambda c: 0.0)
  assert sorted(map(str, candidates)) == sorted(
    str({"density": d, "rule": r}) for d in (0.2, 0.5) for r in ("kth", "exact")
  )
  assert len(trials(axes, 3, {"density": 0.2, "rule": "kth"}, lambda c: 0.0)) == 3


def test_a_method_without_numbers_has_one_trial():
  assert trials(box.axes("average"), 8, {}, lambda c: 0.0) == [{}]


def test_scores_below_all_do_not_end_the_search():
  assert len(trials(box.axes("ties"), 6, {"density": 0.2, "scale": 1.0}, lambda c: -math.inf)) == 6


def test_later_candidates_lie_near_the_best_also_where_the_first_failed():
  """The default, whose evaluation fails, is scored NaN."""
  axes, default = {"scale": box.Axis(0.25, 4.0, is_log=True)}, {"scale": 1.0}

  def late(score):
    return [abs(math.log(c["scale"] / 4)) for c in trials(axes, 8, default, score)[4:]]

  failing = late(lambda c: math.nan if c == default else c["scale"])
  assert failing == late(lambda c: c["scale"])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"densty": box.Axis(0.1, 0.2)}, "ties has no parameter 'densty'; did you mean 'density'"),
    ({"density": box.Axis(0.1, 1.2)}, r"ties: density must be in \(0, 1\], got 1.2"),
    ({"rule": box.Axis(values=("most",))}, "ties: rule must be one of 'kth', 'exact'"),
  ],
)
def test_changes_that_do_not_fit_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    box.axes("ties", changes)
