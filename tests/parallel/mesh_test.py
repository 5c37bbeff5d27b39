"""Laying devices out."""

import jax
import numpy as np
import pytest

from jaxmerge.parallel import mesh as meshes


@pytest.mark.parametrize(
  ("sizes", "tasks", "shape"),
  [
    ((-1, 1, 1), None, (8, 1, 1)),
    ((-1, 1, 1), 3, (3, 1, 1)),
    ((-1, 1, 1), 20, (8, 1, 1)),
    ((-1, 2, 1), 3, (3, 2, 1)),
    ((-1, 2, 1), 9, (4, 2, 1)),
    ((-1, 3, 1), None, (2, 3, 1)),
    ((2, -1, 1), 3, (2, 4, 1)),
    ((2, 2, 2), None, (2, 2, 2)),
    ((1, 1, 1), 5, (1, 1, 1)),
  ],
)
def test_sizes(sizes, tasks, shape):
  mesh = meshes.make(*sizes, tasks=tasks)
  assert mesh.axis_names == ("task", "data", "model")
  assert mesh.devices.shape == shape


def test_devices_are_used_in_order_and_the_rest_stays_idle():
  devices = jax.devices()[2:7]
  mesh = meshes.make(2, 2, devices=devices)
  assert mesh.devices.ravel().tolist() == devices[:4]


@pytest.mark.parametrize(
  ("sizes", "words"),
  [
    ((0, 1, 1), "must be positive"),
    ((-2, 1, 1), "must be positive"),
    ((-1, -1, 1), "at most one -1"),
    ((4, 4, 1), "needs 16 devices, but there are 8"),
    ((-1, 16, 1), "needs 16 devices, but there are 8"),
  ],
)
def test_bad_sizes_are_refused(sizes, words):
  with pytest.raises(ValueError, match=words):
    meshes.make(*sizes)


def test_placing():
  mesh = meshes.make(4, 2)
  stack = {"w": np.arange(8.0, dtype=np.float32).reshape(4, 2)}
  placed = meshes.put(stack, meshes.task_sharding(mesh))["w"]
  assert [s.data.shape for s in placed.addressable_shards] == [(1, 2)] * 8
  whole = meshes.put(stack, meshes.replicated(mesh))["w"]
  assert {s.data.shape for s in whole.addressable_shards} == {(4, 2)}
