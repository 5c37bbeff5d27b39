"""Programs of configs, compiled for TPUs on this machine. Needs libtpu: pip install '.[tpu]'."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the extra tpu."
  ),
]


def compiled(name, topology, *flags, status=0):
  """What the command prints: in a process of its own, since jax is imported here already."""
  command = [sys.executable, "-m", "jaxmerge", "compile", "--json", f"--config=configs/{name}.py"]
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    [*command, f"--topology={topology}", *flags],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
  )
  assert done.returncode == status, done.stderr
  record = json.loads(done.stdout)
  return {own["name"]: own for own in record["programs"]}, done.stderr


def axes(record):
  return {axis for one in record["collectives"] for axis in one["axes"]}


def test_the_merge_of_eight_experts_of_7_b_fits_sixteen_chips():
  found, _ = compiled("merge_7b", "v5e:4x4")
  own = found["merge in memory"]
  assert own["fits"]
  # Base and eight experts, 6.74 B parameters of two bytes each, over 16 devices.
  assert own["memory"]["arguments"] == pytest.approx(9 * 6.74e9 * 2 / 16, rel=0.01)
  assert own["collectives"] == []
  assert own["times"]["by"] == "memory"
  assert found["streamed merged"]["fits"]


def test_what_does_not_fit_says_so():
  found, error = compiled("merge_7b", "v5e:2x2", status=1)
  assert not found["merge in memory"]["fits"]
  assert "error: merge in memory does not fit v5e:2x2: RESOURCE_EXHAUSTED" in error


@pytest.mark.parametrize(("topology", "slices"), [("v5p:2x2x2", 1), ("v5e:2x2", 2)])
def test_a_round_of_a_decoder_talks_over_tasks_only_when_it_merges(topology, slices):
  """Of two slices each has a task: nothing goes between them before the merge."""
  sizes = "{'vocab_size': 256, 'hidden_size': 128, 'num_layers': 2, 'num_heads': 2, "
  sizes += "'num_kv_heads': 1, 'head_size': 64, 'intermediate_size': 256, 'remat': True}"
  data = "{'domains': ('a', 'b'), 'length': 128, 'train': 64}"
  flags = ["--config.mesh.task=2", "--config.mesh.model=2", f"--slices={slices}"]
  found, _ = compiled(
    "decoder_1b", topology, f"--config.model={sizes}", f"--config.data={data}", *flags
  )
  assert axes(found["tune"]) == {"data", "model"}
  assert "task" in axes(found["tune and merge"])
  outside = {
    n: {a for c in own["collectives"] if c["outside"] for a in c["axes"]}
    for n, own in found.items()
  }
  assert outside["tune"] == set()
  assert ("task" in outside["tune and merge"]) == (slices > 1)
  assert all(own["fits"] for own in found.values())
  assert found["tune"]["work"]["open_loops"] == 1
