"""What reference code makes of inputs that are drawn here; see `record.py`."""

import pathlib

import numpy as np

HEIGHT = 4
SHAPES = {"matrix": (12, 20), "square": (16, 16), "vector": (20,)}  # [out, in], as in files.
THRESHOLD = 0.2  # Of RAM: more entries change in one model alone than in several.
OUTPUTS = pathlib.Path(__file__).parent / "outputs.npz"
VIEWS = (("matrix|square", "oi"),)


def inputs():
  """A base, and task vectors with something in common, float64: ({leaf: x}, [{leaf: tau}])."""
  rng = np.random.default_rng(7)
  base = {n: rng.normal(size=s) for n, s in SHAPES.items()}
  common = {n: rng.normal(size=s) / 16 for n, s in SHAPES.items()}
  taus = [{n: common[n] + rng.normal(size=s) / 8 for n, s in SHAPES.items()} for _ in range(HEIGHT)]
  return base, taus


def adapters():
  """Low-rank factors of one matrix, float64: [(a [rank, in], b [out, rank], scale)]."""
  rng = np.random.default_rng(8)
  ranks, scales = (2, 1, 4, 3), (1.0, 2.0, 0.5, 1.5)
  return [
    (rng.normal(size=(r, 9)), rng.normal(size=(5, r)), s)
    for r, s in zip(ranks, scales, strict=True)
  ]


def recorded():
  """Returns {case: {leaf: array}}."""
  found = {}
  with np.load(OUTPUTS) as file:
    for key in file.files:
      case, leaf = key.split("/")
      found.setdefault(case, {})[leaf] = file[key]
  return found
