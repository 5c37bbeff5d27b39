"""Merging the checkpoints of a run: peak memory by their number, and drift of sliding windows.

  python benchmarks/run_checkpoints.py --work=runs/checkpoints

Writes a run of Orbax checkpoints, 33 million parameters in float32 each, merges the last 2 to 32 of
them by a decay, each in a process of its own, with programs compiled before, and prints its peak
memory and the largest error against the mean in float64 of the same checkpoints. Then it slides a
window over a longer series, and prints the error of `jaxmerge.online` and of a running sum in
float32 from which the oldest is subtracted.
"""

import argparse
import functools
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import numpy as np

import jaxmerge
from jaxmerge import methods
from jaxmerge.catalog import decays
from jaxmerge.files import runs
from jaxmerge.io import formats
from jaxmerge.io.checkpoints import metadata
from jaxmerge.io.tensors.tensor import Files, Tensor

SHAPES = {f"layers_{i}/kernel": (2048, 4096) for i in range(4)}
COUNTS = (2, 4, 8, 16, 32)
SLIDES = (100, 1000, 10_000)  # Steps of a run over which a window slides.


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for the run")
  parser.add_argument("--merge", type=int, help="merge so many in this process; for itself")
  options = parser.parse_args()
  if options.merge:
    print(merged(options.work, options.merge))
    return
  make_run(options.work / "run", max(COUNTS))
  print("| checkpoints | GB read | peak MB | largest error |\n| --: | --: | --: | --: |")
  size = 4 * sum(np.prod(shape) for shape in SHAPES.values())
  cache = {"JAX_COMPILATION_CACHE_DIR": str(options.work / "programs")}
  cache |= {f"JAX_PERSISTENT_CACHE_MIN_{n}": "0" for n in ("COMPILE_TIME_SECS", "ENTRY_SIZE_BYTES")}
  env = {**os.environ, **cache}
  for count in COUNTS:
    command = [sys.executable, __file__, f"--work={options.work}", f"--merge={count}"]
    # The first compiles, as the first merge of so many does; the command line keeps programs, too.
    peak = [float(subprocess.check_output(command, text=True, env=env).split()[-1]) for _ in "12"]
    print(
      f"| {count} | {count * size / 1e9:.2f} | {peak[1]:.0f} | {error(options.work, count):.1e} |"
    )
  print("\n| steps | error of the window | error of a running sum |\n| --: | --: | --: |")
  for steps in SLIDES:
    print("| {} | {:.1e} | {:.1e} |".format(steps, *drift(steps)))
  shutil.rmtree(options.work / "run")


def make_run(run, count):
  """Writes checkpoints of random weights near each other."""
  for step in range(1, count + 1):
    if (folder := run / str(step)).is_dir():
      continue
    folder.mkdir(parents=True)
    tensors = {
      n: noise(f"{step}: {n}", shape, (step, i)) for i, (n, shape) in enumerate(SHAPES.items())
    }
    metadata.write(folder, tensors)


def noise(where, shape, seed):
  """A tensor of normal numbers, drawn when it is read."""

  @functools.cache
  def values():
    return np.random.default_rng(seed).standard_normal(np.prod(shape), np.float32)

  def read(start, out):
    out[:] = values()[start : start + out.size]

  return Tensor(where, np.dtype(np.float32), shape, read)


def merged(work, count):
  """Merges the last checkpoints; the peak memory of this process in MB."""
  chosen = runs.checkpoints(work / "run", f"last {count}")
  method = methods.checkpoint_average("decay")
  folders = [str(c.folder) for c in chosen]
  jaxmerge.merge_files(method, folders, work / f"merged_{count}", replace=True)
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def error(work, count):
  """The largest difference of a merge from the sum in float64."""
  files, weights = Files(), decays.decay_weights(count)
  found = formats.open_model(work / f"merged_{count}", files).tensors
  chosen = runs.checkpoints(work / "run", f"last {count}")
  each = [formats.open_model(c.folder, files).tensors for c in chosen]
  worst = 0.0
  for name in found:
    total = sum(w * entries(t[name]).astype(np.float64) for w, t in zip(weights, each, strict=True))
    worst = max(worst, float(np.abs(entries(found[name]) - total).max()))
  files.close()
  shutil.rmtree(work / f"merged_{count}")
  return worst


def entries(tensor):
  out = np.empty(2**20, tensor.dtype)  # The beginning is enough.
  tensor.read(0, out)
  return out


def drift(steps, window=8, size=4096):
  """Errors relative to the mean in float64, after a series whose steps grow smaller."""
  rng = np.random.default_rng(0)
  mean = jaxmerge.online(methods.average(), window=window)
  state, total, members = mean.init(np.zeros(size, np.float32)), np.zeros(size, np.float32), []
  for k in range(steps):
    x = (rng.standard_normal(size) / (1 + k)).astype(np.float32) + np.float32(0.01)
    state = mean.update(state, x)
    members.append(x)
    total += x
    if len(members) > window:
      total -= members.pop(0)
  exact = np.mean(members, axis=0, dtype=np.float64)
  found = np.asarray(jax.device_get(mean.finalize(state)), np.float64)
  scale = np.abs(exact).max()
  return [float(np.abs(x - exact).max() / scale) for x in (found, total / window)]


if __name__ == "__main__":
  main()
