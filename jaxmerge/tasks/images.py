"""Four image tasks of 28x28 pixels and ten classes each."""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Iterable

import numpy as np

from jaxmerge.tasks import data
from jaxmerge.tasks import task as task_lib

_DIGITS = tuple("0123456789")
CLASSES = {
  "mnist": _DIGITS,
  "fashion": (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
  ),
  "animal": ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"),
  "digits": _DIGITS,
}
NAMES = tuple(CLASSES)
ROWS = 2000  # of every shipped file


def load(
  seed: int = 0,
  *,
  train: int = 1200,
  validation: int = 300,
  test: int = 500,
  names: Iterable[str] | None = None,
) -> tuple[task_lib.Task, ...]:
  """Loads image tasks without heads, inputs uint8 [rows, 28, 28]; all four by default.

  MNIST, Fashion-MNIST and Animal-MNIST ship with the package, 2,000 rows each. The digits of
  scikit-learn (8x8, enlarged three times) have 1,797 rows; their split sizes are scaled down in
  proportion. No image occurs twice in a task.

  `seed` assigns rows to splits. Classes alternate in every split, so that its first rows are as
  balanced as all of it.
  """
  sizes = {"train": train, "validation": validation, "test": test}
  if min(sizes.values()) < 1 or sum(sizes.values()) > ROWS:
    raise ValueError(
      f"train={train}, validation={validation}, test={test}: each must be at least 1, "
      f"and together at most {ROWS}."
    )
  return tuple(_task(name, seed, sizes) for name in (NAMES if names is None else names))


def _task(name: str, seed: int, sizes: dict[str, int]) -> task_lib.Task:
  if name not in CLASSES:
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
    raise ValueError(
      f"no image task {name!r}; did you mean {near!r}? There are: {', '.join(NAMES)}."
    )
  x, y = digits() if name == "digits" else _shipped(name)
  order = _alternate_classes(y, np.random.default_rng([seed, zlib.crc32(name.encode())]))
  count = {k: max(1, n * len(y) // ROWS) for k, n in sizes.items()}
  # Test rows come from the front and validation rows from the back, so that the number of training
  # rows changes neither.
  test = order[: count["test"]]
  validation = order[len(y) - count["validation"] :]
  train = order[count["test"] :][: count["train"]]
  a, b, c = (task_lib.Split(x[i], y[i]) for i in (train, validation, test))
  return task_lib.Task(name, a, b, c, classes=CLASSES[name])


def digits() -> tuple[np.ndarray, np.ndarray]:
  """Returns scikit-learn's digits: uint8 [rows, 28, 28], each pixel 3x3, and int32 labels."""
  try:
    from sklearn import datasets
  except ImportError as error:
    raise ImportError("the task 'digits' needs scikit-learn: pip install scikit-learn.") from error
  bunch = datasets.load_digits()
  _, first = np.unique(bunch.images.reshape(-1, 64), axis=0, return_index=True)
  first = np.sort(first)
  large = np.kron(bunch.images[first], np.ones((3, 3))) * (255 / 16)
  x = np.pad(np.rint(large).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
  return x, bunch.target[first].astype(np.int32)


def _shipped(name: str) -> tuple[np.ndarray, np.ndarray]:
  with np.load(data.path(f"{name}.npz"), allow_pickle=False) as arrays:
    return arrays["x"], arrays["y"].astype(np.int32)


def _alternate_classes(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns a random order in which all classes have their n-th row before any its n+1-th."""
  order = rng.permutation(len(labels))
  turn = np.empty(len(labels), np.int64)
  for label in np.unique(labels):
    at = np.flatnonzero(labels[order] == label)
    turn[at] = np.arange(len(at))
  return order[np.argsort(turn, kind="stable")]
