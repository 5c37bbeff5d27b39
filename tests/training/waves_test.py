"""More tasks than fit side by side: waves of them give what all at once give."""

import jax
import numpy as np
import pytest
import small_tasks as small

from jaxmerge import methods
from jaxmerge.core import stage
from jaxmerge.parallel import mesh as meshes
from jaxmerge.training import loop, settings


def run(method, devices, rounds=1, **changes):
  """The loop on five tasks of one size."""
  tasks = [small.classified(n, 8) for n in ("ant", "bee", "cat", "dog", "eel")]
  plain = dict(rounds=rounds, epochs=2.0 * rounds, batch_size=4, learning_rate=0.05)
  chosen = settings.Settings(**plain | changes)
  return loop.tune_and_merge(
    small.network, small.weights(), tasks, method, chosen, mesh=meshes.make(devices)
  )


@pytest.fixture(scope="module")
def mean():
  return run(methods.average(), 1)


@pytest.mark.parametrize(
  ("devices", "at_once"),
  [
    (2, 3),
    pytest.param(1, 2, marks=pytest.mark.slow),
    pytest.param(2, 2, marks=pytest.mark.slow),
    pytest.param(1, 1, marks=pytest.mark.slow),
  ],
)
def test_a_fold_takes_waves_one_after_another(mean, devices, at_once):
  # Waves of 2, 2 and 1 tasks; of 4 and 1; of one. Sums over tasks are added up in another order.
  assert stage.foldable(methods.average())
  found = run(methods.average(), devices, at_once=at_once)
  small.assert_close(found.params, mean.params, rtol=2e-6, atol=2e-7)
  assert found.rounds[0]["loss"] == mean.rounds[0]["loss"]
  assert found.rounds[0]["per_task"] == mean.rounds[0]["per_task"]
  assert found.budget == mean.budget
  assert "cosines" in mean.rounds[0]
  assert "cosines" not in found.rounds[0]


@pytest.mark.slow
def test_a_fold_knows_which_model_is_which():
  # Weights per model, and masks that depend on the model's name.
  method = methods.dare(drop_rate=0.5, scale=0.5, weight=(1.0, 0.0, 2.0, 0.5, 3.0))
  assert stage.foldable(method)
  expected = run(method, 1)
  small.assert_close(run(method, 1, at_once=2).params, expected.params, rtol=2e-6, atol=2e-7)


@pytest.mark.slow
def test_held_copies_are_merged_with_the_same_bits():
  method = methods.ties(density=0.3, scale=1.0)
  assert not stage.foldable(method)
  expected = run(method, 1)
  small.assert_same_bits(run(method, 2, at_once=2).params, expected.params)


@pytest.mark.slow
@pytest.mark.parametrize("method", [methods.average(), methods.ties(density=0.5)])
def test_several_rounds_with_kept_state_and_an_outer_optimiser(method):
  both = dict(rounds=3, local_state="kept", outer="nesterov", outer_momentum=0.5)
  expected = run(method, 1, **both)
  found = run(method, 2, at_once=2, **both)
  # Rounding of the mean is amplified by Adam, and may move an entry across the threshold.
  if stage.foldable(method):
    small.assert_close(found.params, expected.params, rtol=1e-4, atol=1e-5)
  else:
    apart = [
      (np.asarray(a) - np.asarray(b)).ravel() for a, b in _pairs(found.params, expected.params)
    ]
    assert np.linalg.norm(np.concatenate(apart)) < 1e-4


def _pairs(a, b):
  return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


@pytest.mark.parametrize("method", [methods.average(), methods.ties(density=0.5)])
def test_divergence_names_the_task(method):
  with pytest.raises(ValueError, match=r"'(ant|bee|cat|dog|eel)' diverged in round 1"):
    run(method, 1, epochs=8.0, at_once=2, learning_rate=1e3, weight_decay=1e3)
