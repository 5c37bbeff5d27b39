"""Checkpoints of the loop with another model, loss, layout or head than the run's."""

import dataclasses
import inspect

import jax
import numpy as np
import pytest
import small_tasks as small

from jaxmerge.io.checkpoints import store as stores
from jaxmerge.parallel import mesh as meshes
from jaxmerge.tasks import losses
from jaxmerge.tasks.task import Task
from jaxmerge.training import loop, saving, settings

SETTINGS = settings.Settings(rounds=2, epochs=2.0, batch_size=4, learning_rate=0.05)


class Stopped(Exception):
  """Ends a run after its first round."""


def run(folder, **changes):
  arguments = dict(apply=small.network, params=small.weights(), tasks=small.three()) | changes
  with stores.Checkpoints(folder) as store:
    return loop.tune_and_merge(
      **arguments, settings=SETTINGS, mesh=meshes.make(1), checkpoints=store
    )


def stop(record):
  raise Stopped


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  """A store that holds one round."""
  directory = tmp_path_factory.mktemp("stored")
  with pytest.raises(Stopped):
    run(directory, on_round=stop)
  return directory


def doubled(params, inputs, head):
  return small.network(params, jax.tree.map(lambda x: 2 * x, inputs), head)


def halved(outputs, labels):
  return losses.cross_entropy(outputs, labels) / 2


def other_head():
  ant, bee, cat = small.three()
  return [ant, dataclasses.replace(bee, head=1 - bee.head), cat]


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (dict(apply=doubled), "apply has other code, or uses other values"),
    (dict(loss=halved), "loss has other code, or uses other values"),
    (dict(layout=[("kernel", None)]), "layout has other code, or uses other values"),
    (dict(tasks=other_head()), "the head of task 'bee' differs"),
  ],
)
def test_another_model_loss_layout_or_head_is_refused(stored, changes, words):
  with pytest.raises(ValueError, match=words):
    run(stored, **changes)


def without_functions(loop_, records, record=saving.record):
  return {k: v for k, v in record(loop_, records).items() if k != "functions"}


def test_checkpoints_without_digests_go_on_with_a_note(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(saving, "record", without_functions)
    with pytest.raises(Stopped):
      run(tmp_path, on_round=stop)
  assert run(tmp_path).messages[-2:] == (
    "resumed after round 1",
    "no digest tells whether the run began with the same apply, loss, layout",
  )


CALL = inspect.unwrap(loop.tune_and_merge)  # Without a check of the types.


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (dict(loss="mse"), "loss must be a function .* got 'mse'"),
    (dict(metric="acc"), "metric must be a function .* got 'acc'"),
    (dict(method=SETTINGS), "give them by name, settings=..."),
  ],
)
def test_what_is_no_function_is_named(tmp_path, changes, words):
  with pytest.raises(ValueError, match=words):
    CALL(small.network, small.weights(), small.three(), **changes)


def test_a_result_is_shown_in_a_line():
  shown = repr(loop.Result(np.zeros(9), [{"mean": 0.5}] * 3, None, ()))
  assert shown.startswith("Result(3 rounds, mean 0.5; has params, rounds, budget")


def test_a_mistyped_part_of_a_task_is_named():
  with pytest.raises(TypeError, match=r"Task has no argument 'val'; Known: .*validation"):
    Task("a", None, val=None)
