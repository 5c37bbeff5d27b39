"""The benchmark of methods at a small size: what it measures, counts and extrapolates."""

import argparse
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import scripts

PATH = scripts.BENCHMARKS / "methods.py"


@pytest.fixture(scope="module")
def benchmark():
  return scripts.benchmark("methods")


def test_models_have_the_size_that_is_asked_for(benchmark):
  for params in (0.1e9, 1e9):
    every = benchmark.shapes(params)
    size = sum(int(jnp.prod(jnp.asarray(s, jnp.float32))) for s in every.values())
    assert abs(size - params) < 0.15 * params


def test_decompositions_are_counted_in_loops_and_branches(benchmark):
  def run(base, models):
    each = jax.lax.map(lambda x: jnp.linalg.svd(x, full_matrices=False)[1], models)
    return each, jax.lax.cond(base[0, 0] > 0, jnp.linalg.svd, jnp.linalg.svd, base)

  found = benchmark.svds(jax.jit(run), jnp.ones((4, 5)), jnp.ones((3, 6, 2)))
  assert sorted(found) == [(4, 5)] + 3 * [(6, 2)]


@pytest.mark.slow
def test_memory_and_matrices_are_measured(benchmark):
  options = argparse.Namespace(params=2e5, models=3, iterations=0)
  assert set(benchmark.child("memory", "ties", options)) == {"cpu", "compiling", "mb"}
  matrices = benchmark.child("matrices", "iso_c", options)
  assert matrices["svd_cpu"] > 0
  assert [e["number"] for e in matrices["each"]] == [48, 24, 12]


@pytest.mark.slow
def test_a_table_of_two_methods(tmp_path):
  command = [sys.executable, str(PATH), "--params=2e5", "--models=3", "--iterations=1"]
  command += ["--where", "files", "matrices", "--methods", "ties", "wudi"]
  command += [f"--work={tmp_path}", f"--out={tmp_path}/out"]
  subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
  ties, wudi = json.loads((tmp_path / "out.json").read_text())["rows"]
  assert set(ties) == {"method", "models", "files"}  # No matrices.
  assert ties["files"]["passes"] == pytest.approx(3, abs=0.2)
  assert wudi["matrices"]["iterations"] == [1, 2, 300]
  text = (tmp_path / "out.md").read_text()
  names = [line.split("|")[1].strip() for line in text.splitlines()[4:]]
  assert names == ["`ties`", "`wudi`"]
  assert text.count("~") == 2
