"""First mistakes with the loop: refused before anything is trained, or in the round they spoil."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_tasks as small

from jaxmerge import methods
from jaxmerge.core import stage
from jaxmerge.parallel import mesh as meshes
from jaxmerge.search import scales as search_scales
from jaxmerge.tasks import batch, losses
from jaxmerge.tasks.task import Task
from jaxmerge.training import checks, local_steps, loop, settings


def run(tasks=None, *, apply=small.network, method=None, **given):
  chosen = settings.Settings(rounds=1, epochs=1.0, batch_size=4, learning_rate=0.05)
  tasks = small.three() if tasks is None else tasks
  return loop.tune_and_merge(
    apply, small.weights(), tasks, method, chosen, mesh=meshes.make(1), **given
  )


def headless(classes=2):
  """The tasks without heads, as a model has them that gives logits of so many classes."""
  tasks = [
    Task(t.name, *(s._replace(labels=s.labels % classes) for s in t.splits().values()))
    for t in small.three()
  ]
  return tasks


def narrow(params, inputs, head):
  """Logits of two classes."""
  return small.network(params, inputs, np.ones((5, 2), np.float32))


@pytest.mark.parametrize(
  ("given", "words"),
  [
    ({"apply": lambda params, inputs: inputs}, r"apply must take \(params, inputs, head\)"),
    (
      {"tasks": headless(classes=3), "apply": narrow},
      r"the model's outputs are \[\d+, 2\] for labels \[\d+\]; .* \[\d+, 3\] or more",
    ),
    (
      {"apply": lambda params, inputs, head: small.network(params, inputs, np.ones((5, 6)))},
      r"'cat', train split: the model's outputs are \[9, 6\], but the head has 4 classes: apply",
    ),
    (
      {"apply": lambda params, inputs, head: small.network(params, inputs, head).mean(-1)},
      r"'cat', train split: the model's outputs are \[9\] for labels \[9\]",
    ),
  ],
)
def test_is_refused_before_anything_is_trained(given, words):
  with pytest.raises(ValueError, match=words):
    run(**given)


@pytest.mark.parametrize(
  ("tasks", "words"),
  [
    (small.three()[0], "tasks must be a list of jaxmerge.Task, got Task"),
    ({"ant": small.three()[0]}, "tasks must be a list of jaxmerge.Task, got dict"),
    ([(1, 2)], r"tasks\[0\] must be a jaxmerge.Task, got tuple"),
  ],
)
def test_tasks_are_a_list_of_tasks(tasks, words):
  with pytest.raises(ValueError, match=words):
    checks.check(small.network, small.weights(), tasks, losses.cross_entropy)


def changed(**parts):
  """The tasks, the first with parts that the type checks of the tests would not let pass."""
  first, *others = small.three()
  for name, value in parts.items():
    object.__setattr__(first, name, value)
  return [first, *others]


ANT = small.three()[0]


@pytest.mark.parametrize(
  ("tasks", "words"),
  [
    (changed(name=7), "task names must be non-empty strings, got 7"),
    (
      changed(train=ANT.train._replace(labels=ANT.train.labels.tolist())),
      r"'ant', train split: labels must be an array of integers \[rows\], got list",
    ),
    (
      changed(train=ANT.train._replace(inputs=ANT.train.inputs.tolist())),
      r"inputs\[0\]\[0\] is a float; convert it with np.asarray",
    ),
    (
      [
        dataclasses.replace(t, validation=t.validation._replace(inputs=t.validation.inputs[:, :3]))
        for t in small.three()
      ],
      r"'cat', validation split: the model does not take inputs float32\[9, 3\] and head",
    ),
    (
      [dataclasses.replace(t, head=t.head[:3]) for t in small.three()],
      r"'cat', train split: the model does not take inputs .* and head float32\[3, 4\]",
    ),
  ],
)
def test_tasks_that_are_made_wrong_are_named(tasks, words):
  with pytest.raises(ValueError, match=words):
    checks.check(small.network, small.weights(), tasks, losses.cross_entropy)


@pytest.mark.parametrize(
  ("parts", "words"),
  [
    (
      (jax.make_mesh((1,), ("x",), devices=jax.devices()[:1]), None),
      "mesh must have the axes task, data, model",
    ),
    ((None, "runs/x"), r"must be a store, .*Checkpoints\(pathlib.Path\('runs/x'"),
  ],
)
def test_parts_that_are_something_else_are_named(parts, words):
  with pytest.raises(ValueError, match=words):
    checks.check_arguments(*parts)


@pytest.mark.parametrize(
  ("params", "words"),
  [({}, "has no parameters"), ([1.0], "leaf '0' of .* is a float; give arrays")],
)
def test_parameters_are_arrays(params, words):
  with pytest.raises(ValueError, match=words):
    local_steps.master_weights(params)


def test_a_model_as_wide_as_its_labels_is_not_refused():
  assert run(headless(), apply=narrow).rounds[0]["round"] == 1


def test_a_merge_that_overflows_in_the_last_round_is_refused():
  """Nothing would have seen it: the copies are finite, and no round follows."""
  words = "round 1: the tuned copies of all tasks are finite, but . leaves of the merged model"
  with pytest.raises(ValueError, match=words):
    run(method=stage.chain(methods.weighted_sum(), methods.scaled(1e10)), hparams={"weight": 3e38})


def test_a_score_that_is_no_number_is_refused():
  def metric(outputs, labels):
    return jnp.where(labels == 0, jnp.nan, 1.0)

  with pytest.raises(ValueError, match=r"round 1: the score of row \d of task '\w+' is nan"):
    run(metric=metric)


def test_rows_without_a_number_are_not_right():
  logits = jnp.array([[np.nan, 1.0], [2.0, 1.0]], jnp.float32)
  assert losses.accuracy(logits, np.zeros(2, np.int32)).tolist() == [0.0, 1.0]


def test_a_scale_at_which_the_merge_overflows_is_never_the_best():
  base = small.weights()
  models = {"dense": {n: np.stack([x + 9, x]) for n, x in base["dense"].items()}}
  method = methods.task_arithmetic()

  rows = batch.stack(small.three(), "validation")

  def chosen(*scales):
    # The scores alone would have preferred the larger one.
    def score(some, rows):
      return jnp.array([[[0.1]], [[0.9]]])

    given = (method, models, base, scales, score, rows, [1])
    return search_scales.best_scale(*given, names=["a", "b"], label="ties")

  with pytest.warns(UserWarning, match=r"ties: 1 of 2 candidates have NaN as their score"):
    assert chosen(0.5, 3e38).candidate.scale == 0.5
  with pytest.raises(ValueError, match=r"ties: none of 2 candidates has a score that is a number"):
    chosen(2e38, 3e38)
