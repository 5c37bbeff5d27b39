"""The README's code runs, and its numbers are those of the benchmarks."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

import jaxmerge
from jaxmerge.models import llama
from jaxmerge.report import leaderboard
from jaxmerge.report import tables as report_tables

TEXT = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TPU = (pathlib.Path(__file__).parents[1] / "docs" / "tpu.md").read_text(encoding="utf-8")
DESIGN = (pathlib.Path(__file__).parents[1] / "docs" / "design.md").read_text(encoding="utf-8")


def blocks(text):
  return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def runs(code, **scope):
  # The examples are written for JAX as it comes, not for the tests' strict settings.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    exec(compile(code, "README.md", "exec"), scope)
  return scope


def test_ten_line_merge_runs():
  scope = runs(blocks(TEXT)[0])
  assert scope["merged"]["kernel"].shape == (4, 3)
  assert scope["merges"]["kernel"].shape == (10, 4, 3)


def test_own_model_is_tuned_and_merged():
  result = runs(blocks(TEXT)[1])["result"]
  assert len(result.rounds) == 5
  assert result.rounds[-1]["mean"] > 0.8


def test_own_method_runs():
  import jax.numpy as jnp

  clipped_mean = runs(blocks(DESIGN)[1])["clipped_mean"]
  experts = {"w": jnp.array([[1.0], [5.0]])}
  merged = jaxmerge.merge(clipped_mean(2.0), experts, {"w": jnp.zeros(1)})
  assert merged["w"].item() == 1.5


@pytest.mark.slow
def test_a_decoder_is_tuned_in_shards(tmp_path):
  run, base = runs(*blocks(TPU))["run"], pathlib.Path(__file__).parent / "fixtures/tiny_decoders"
  draw = np.random.default_rng(0).integers
  rows = {name: draw(0, 40, (72, 9), dtype=np.int32) for name in ("ant", "bee")}
  settings = jaxmerge.Settings(rounds=2, epochs=2.0, batch_size=4)
  sides = dict(task=2, data=2, model=2)
  result = run(base / "llama", rows, tmp_path, settings, **sides)
  assert len(result.rounds) == 2
  up = result.params["layers"]["mlp"]["up"]["kernel"]
  assert {s.data.shape for s in up.addressable_shards} == {(2, 16, 12)}
  _, saved = llama.load(tmp_path / "merged")
  np.testing.assert_array_equal(saved["layers"]["mlp"]["up"]["kernel"], up)


def test_the_readme_is_short():
  assert len(TEXT.splitlines()) <= 150


@pytest.mark.parametrize(
  ("name", "table"),
  re.findall(r"<!-- results: (\w+) -->\n(.*?)\n<!-- end of results -->", TEXT, re.S),
)
def test_results_are_those_of_the_benchmark(name, table):
  path = pathlib.Path(__file__).parents[1] / "benchmarks" / "results" / f"{name}.md"
  assert f"\n\n{table}\n\n" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
  ("name", "count", "table"),
  re.findall(r"<!-- top: (\w+) (\d+) -->\n(.*?)\n<!-- end of top -->", TEXT, re.S),
)
def test_leaderboards_begin_as_the_readme_says(name, count, table):
  path = pathlib.Path(__file__).parents[1] / "benchmarks" / "results" / f"{name}.json"
  facts = json.loads(path.read_text(encoding="utf-8"))
  assert table == report_tables.to_markdown(leaderboard.top(facts, int(count))).strip()
