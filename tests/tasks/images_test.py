"""Facts about the four image tasks: disjoint balanced splits, fixed by the seed."""

import numpy as np
import pytest

from jaxmerge.tasks import data, images
from jaxmerge.tasks import task as task_lib

SPLITS = ("train", "validation", "test")


def pictures(split):
  return [row.tobytes() for row in split.inputs]


@pytest.mark.parametrize("task", images.load(), ids=lambda t: t.name)
def test_splits_are_disjoint_balanced_and_valid(task):
  task_lib.check(task)
  assert task.head is None
  assert task.num_classes == 10
  seen = [p for s in SPLITS for p in pictures(getattr(task, s))]
  assert len(set(seen)) == len(seen)
  for name in SPLITS:
    split = getattr(task, name)
    assert split.inputs.dtype == np.uint8
    assert split.inputs.shape[1:] == (28, 28)
    assert split.labels.dtype == np.int32
    counts = np.bincount(split.labels, minlength=10)
    # Digits runs out of its rarest class (174 of 1,797) a little before the end.
    assert counts.max() - counts.min() <= (12 if task.name == "digits" else 1)


def test_sizes_are_those_asked_for_and_scaled_for_digits():
  for task in images.load(train=100, validation=50, test=200):
    share = 1797 / 2000 if task.name == "digits" else 1
    for name, count in zip(SPLITS, (100, 50, 200), strict=True):
      assert len(getattr(task, name).labels) == int(share * count)


def test_fixed_by_seed_and_by_the_task_alone():
  (a,), (c,) = images.load(names=["animal"]), images.load(1, names=["animal"])
  b = images.load(names=["mnist", "animal"])[1]
  for name in SPLITS:
    assert pictures(getattr(a, name)) == pictures(getattr(b, name))
    assert pictures(getattr(a, name)) != pictures(getattr(c, name))


def test_rows_to_train_on_change_neither_validation_nor_test():
  (a,), (b,) = images.load(names=["mnist"]), images.load(names=["mnist"], train=40)
  assert pictures(a.test) == pictures(b.test)
  assert pictures(a.validation) == pictures(b.validation)
  assert pictures(a.train)[:40] == pictures(b.train)


def test_first_rows_have_every_class_once():
  for task in images.load(names=["fashion", "digits"]):
    np.testing.assert_array_equal(np.sort(task.train.labels[:10]), np.arange(10))


@pytest.mark.parametrize("name", ["mnist", "fashion", "animal"])
def test_shipped_files_hold_two_thousand_rows_without_pickle(name):
  with np.load(data.path(f"{name}.npz"), allow_pickle=False) as arrays:
    x, y = arrays["x"], arrays["y"]
  assert x.shape == (2000, 28, 28)
  assert x.dtype == y.dtype == np.uint8
  np.testing.assert_array_equal(np.bincount(y), 200)
  assert x.max() == 255


def test_digits_are_the_small_pictures_three_times_as_large():
  from sklearn import datasets

  x, y = images.digits()
  small = x[:, 2:26:3, 2:26:3]
  np.testing.assert_array_equal(np.repeat(np.repeat(small, 3, 1), 3, 2), x[:, 2:26, 2:26])
  assert x[:, :2].sum() == x[:, 26:].sum() == x[:, :, :2].sum() == x[:, :, 26:].sum() == 0
  original = datasets.load_digits()
  if len(y) == len(original.target):
    np.testing.assert_allclose(small, original.images * 255 / 16, atol=0.5)
  assert np.bincount(y).min() > 170


def test_errors_name_the_value_and_the_right_one():
  with pytest.raises(ValueError, match="no image task 'fasion'; did you mean 'fashion'"):
    images.load(names=["fasion"])
  with pytest.raises(ValueError, match=r"train=1900, validation=300, test=500.*at most 2000"):
    images.load(train=1900)
  with pytest.raises(ValueError, match="test=0"):
    images.load(test=0)
