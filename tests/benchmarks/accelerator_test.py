"""The benchmark of accelerators in its CPU form, and the operations that it counts."""

import json

import jax
import pytest
import scripts

from jaxmerge.models import decoder_config


@pytest.fixture(scope="module")
def benchmark():
  return scripts.benchmark("accelerator")


def test_operations_by_hand(benchmark):
  """Two a weight and token forward, twice that backward; of attention half, as it is causal."""
  config = decoder_config.Config(7, 8, 3, 2, 1, 4, 16)
  layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
  products = 2 * (3 * layer + 7 * 8)  # With the head; the embedding is looked up.
  attention = 3 * 2 * (2 * 4 + 2 * 4) * (10 / 2)  # Layers, heads; scores, values; tokens seen.
  assert benchmark.operations(config, 5, 10) == 3 * (5 * 10) * (products + attention)
  tied = config._replace(tied=True)
  assert benchmark.operations(tied, 5, 10) == benchmark.operations(config, 5, 10)


@pytest.mark.slow
def test_everything_is_measured_and_the_numbers_are_those_of_the_cpu(
  benchmark, tmp_path, capsys, monkeypatch
):
  """Two of its methods: one of entries, one with thresholds over the whole model."""
  own = {name: benchmark.METHODS[name] for name in ("linear", "TIES")}
  monkeypatch.setattr(benchmark, "METHODS", own)
  out = tmp_path / "found.json"
  given = ["--parameters=50000", "--tasks", "2", "--runs=1", f"--out={out}"]
  # Attention in bfloat16 names its dtypes, but jax promotes some where it lowers them.
  with jax.numpy_dtype_promotion("standard"):
    found = benchmark.main(given)
  assert json.loads(out.read_text())["merges"] == found["merges"]
  shown = capsys.readouterr().out
  for name in benchmark.METHODS:
    assert found["merges"][name]["bytes_per_second"] > 0
    assert found["numbers"][name]["units"] <= 1
    assert f"| {name} |" in shown
  assert found["numbers"]["decoder"] < 0.03
  assert list(found["rounds"]) == [2]
  assert 0 < found["save"]["wait"] <= found["save"]["total"]
  assert found["step"]["utilisation"] is None  # Nobody knows the peak of this CPU.
  assert found["step"]["flops"] > 0
