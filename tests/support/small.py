"""One small tree for the tests of the core, with a leaf of every kind."""

import numpy as np

NAMES = ("red", "green", "blue", "grey")
VIEWS = (("matrix", "io"), ("cube|steps", "boi"))  # Integers have no view; some trees, no cube.
BY_NAME = (("matrix", "io"), ("cube", "boi"))  # For transcriptions, which look leaves up.
SHAPES = {"matrix": (8, 16), "vector": (16,), "cube": (2, 3, 4), "scalar": ()}
ALL = ("matrix", "vector", "cube", "scalar", "steps")
FEW = ("matrix", "steps")


def trees(leaves=ALL, *, height=4, seed=0):
  """A base and a stack of at most eight models near it; a fifth of each task vector is zero."""
  rng, more = (np.random.default_rng(s) for s in (seed, seed + 1000))
  base, models = {}, {}
  for name, shape in SHAPES.items():
    x = rng.normal(size=shape).astype(np.float32)
    halves = []
    for source in (rng, more):
      tau = source.normal(size=(4, *shape)).astype(np.float32) / 8
      halves.append(np.where(source.random(tau.shape) < 0.2, np.float32(0), tau))
    tau = np.concatenate(halves)[:height]
    base[name], models[name] = x, (x[None] + tau).astype(np.float32)
  base["steps"] = np.arange(4, dtype=np.int32)
  models["steps"] = np.stack([base["steps"] + 1] * height)
  return {n: base[n] for n in leaves}, {n: models[n] for n in leaves}


def same(a, b):
  """Equal bits, dtypes and keys."""
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype, name
    np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


def close(a, b, atol=1e-6):
  """Equal up to a number, or to one for each leaf."""
  assert a.keys() == b.keys()
  for name in a:
    x, y = (np.asarray(v[name], np.float64) for v in (a, b))
    far = atol.get(name, 0) if isinstance(atol, dict) else atol
    np.testing.assert_allclose(x, y, rtol=0, atol=far, err_msg=name)
