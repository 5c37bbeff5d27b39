"""Sums over models: the compiler's reduction of a short first axis against a chain of additions.

  python benchmarks/sums.py --models 2 3 8 --entries 4096 1048576

Times are nanoseconds per entry of the result, the median of several runs in turns.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from jaxmerge.core import rewrites


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--models", type=int, nargs="+", default=[2, 3, 8])
  parser.add_argument("--entries", type=int, nargs="+", default=[2**12, 2**16, 2**20])
  parser.add_argument("--runs", type=int, default=15)
  options = parser.parse_args()
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
  print("| models | entries | reduction, ns | chain, ns | reduction / chain |")
  print("| --: | --: | --: | --: | --: |")
  for models in options.models:
    for entries in options.entries:
      reduction, chain = (1e9 * s / entries for s in seconds(models, entries, options.runs))
      ratio = reduction / chain
      print(f"| {models} | {entries} | {reduction:.2f} | {chain:.2f} | {ratio:.1f} |", flush=True)


def seconds(models, entries, runs):
  """Median seconds of a weighted sum over models, as it is and as a chain."""
  rng = np.random.default_rng(0)
  x = jax.device_put(rng.standard_normal((models, entries), np.float32))
  weights = jax.device_put(np.ones((models, 1), np.float32))

  def merge(x, weights):
    return (weights * x).sum(axis=0)

  programs = [jax.jit(merge), jax.jit(rewrites.unroll(merge))]
  found = [[], []]
  often = max(1, 2**20 // entries)
  for _ in range(runs + 1):
    for program, own in zip(programs, found, strict=True):
      begun = time.perf_counter()
      for _ in range(often):
        out = program(x, weights)
      out.block_until_ready()
      own.append((time.perf_counter() - begun) / often)
  return [statistics.median(own[1:]) for own in found]


if __name__ == "__main__":
  main()
