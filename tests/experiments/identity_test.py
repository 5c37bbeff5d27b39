"""A run is resumed with the experiment that it began with, or refused."""

import numpy as np
import pytest

import jaxmerge
from jaxmerge.experiments import identity
from jaxmerge.experiments.problem import Problem


def rows(seed):
  inputs = np.random.default_rng(seed).standard_normal((4, 3)).astype(np.float32)
  return jaxmerge.Split(inputs, np.zeros(4, np.int32))


def problem(apply=lambda params, inputs, head: inputs @ params["w"], seed=0, **changes):
  task = jaxmerge.Task("left", rows(seed), rows(1), rows(2))
  return Problem(apply, {"w": np.ones((3, 2), np.float32)}, [task], **changes)


def test_the_same_code_and_rows_go_on(tmp_path):
  identity.check(tmp_path, "mine:problem", problem())  # A new run.
  identity.write(tmp_path, "mine:problem", problem())
  identity.check(tmp_path, "mine:problem", problem())


@pytest.mark.parametrize(
  ("changes", "what"),
  [
    ({"apply": lambda params, inputs, head: inputs @ params["w"] + 1}, "apply"),
    ({"loss": lambda outputs, labels: outputs[:, 0]}, "loss"),
    ({"metric": jaxmerge.evaluation.metrics.Metric("other", lambda o, y: o[:, 0])}, "metric"),
    ({"seed": 5}, "task 'left'"),
  ],
  ids=["apply", "loss", "metric", "rows"],
)
def test_a_change_is_named(tmp_path, changes, what):
  identity.write(tmp_path, "mine:problem", problem())
  with pytest.raises(ValueError, match=f"before a change of its {what}: .* another workdir"):
    identity.check(tmp_path, "mine:problem", problem(**changes))


def test_what_no_other_process_would_know_again_does_not_count(tmp_path):
  lock = object()

  def apply(params, inputs, head):
    return inputs @ params["w"] if lock else None

  assert "apply" not in identity.describe(problem(apply))
  assert "loss" in identity.describe(problem(apply))


def test_what_is_built_in_has_no_record(tmp_path):
  identity.write(tmp_path, "images4", problem())
  assert not list(tmp_path.iterdir())
