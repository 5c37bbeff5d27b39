"""Facts about the record of a task and its check."""

import dataclasses

import numpy as np
import pytest

from jaxmerge.tasks import task as task_lib


def made(**changes):
  split = task_lib.Split(np.ones((3, 2), np.float32), np.array([0, 1, 1]))
  whole = task_lib.Task("t", split, split, head=np.ones((2, 2), np.float32))
  return dataclasses.replace(whole, **changes)


def test_a_sound_task_passes_and_names_its_splits():
  task_lib.check(made())
  assert list(made().splits()) == ["train", "validation"]
  assert list(made(test=made().train).splits()) == ["train", "validation", "test"]


def test_number_of_classes_from_head_then_names_then_labels():
  assert made(head=np.ones((2, 5))).num_classes == 5
  assert made(head=None, classes=("a", "b", "c")).num_classes == 3
  assert made(head=None).num_classes == 2


def test_inputs_may_be_a_tree():
  tree = {"ids": np.ones((3, 4), np.int32), "mask": np.ones((3, 4), np.int32)}
  task_lib.check(made(train=task_lib.Split(tree, np.array([0, 1, 0]))))
  tree["mask"] = tree["mask"][:2]
  with pytest.raises(ValueError, match=r"'t', train split, inputs\['mask'\]: 2 rows, but 3 labels"):
    task_lib.check(made(train=task_lib.Split(tree, np.array([0, 1, 0]))))


@pytest.mark.parametrize(
  ("split", "message"),
  [
    ((np.ones((0, 2)), np.zeros(0, int)), "task 't', validation split: no rows"),
    ((np.ones((2, 2)), np.array([0.0, 1.0])), r"labels must be integers \[rows\], got float64"),
    ((np.ones((2, 2)), np.array([0, 2])), "row 1: label 2 is out of range; 2 classes allow 0 to 1"),
    ((np.ones((2, 2)), np.array([-1, 0])), "row 0: label -1 is out of range"),
    ((np.array([[1, 1], [1, np.nan]]), np.array([0, 1])), "row 1: NaN or infinity"),
    ((np.float32(1), np.array([0, 1])), "0 rows, but 2 labels"),
  ],
)
def test_check_names_task_split_and_row(split, message):
  with pytest.raises(ValueError, match=message):
    task_lib.check(made(validation=task_lib.Split(*split)))


def test_check_refuses_a_head_with_nan():
  with pytest.raises(ValueError, match="task 't': the head has NaN"):
    task_lib.check(made(head=np.array([[1.0, np.inf]] * 2)))
