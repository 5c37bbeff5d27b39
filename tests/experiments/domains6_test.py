"""The experiment on domains of text, small, each copy of the model split over two devices."""

import pathlib

import numpy as np
import pytest

from jaxmerge.experiments import config as configs
from jaxmerge.experiments import run
from jaxmerge.models import llama
from jaxmerge.tasks import domains

CONFIG = pathlib.Path(__file__).resolve().parents[2] / "configs" / "domains6_quick.py"
SIZES = {"length": 32, "pretrain": 24, "train": 16, "validation": 5, "test": 7}
CHANGES = {
  "data.domains": "('english', 'slavic', 'python')",
  **{f"data.{name}": str(size) for name, size in SIZES.items()},
  "model.hidden_size": "16",
  "model.num_layers": "1",
  "model.head_size": "8",
  "model.intermediate_size": "24",
  "mesh.model": "2",
  "pretrain.batch_size": "4",
  "batch_size": "4",
  "baselines": "{'task_arithmetic': {'scales': (0.2, 0.5)}}",
}


@pytest.mark.slow
def test_a_run_reports_bits_per_byte_of_the_models_that_it_leaves(tmp_path):
  config = configs.load(str(CONFIG), list(CHANGES.items()))
  record = run.run(config, tmp_path / "run")
  assert (record["metric"], record["lower_is_better"]) == ("bits per byte", True)
  assert "chance" not in record
  models = record["models"]
  assert models["experts"]["mean"] < models["base"]["mean"] < 8.5
  shots = {n: record["validation"][n] for n in ("average", "task_arithmetic")}
  assert record["differences"][0]["b"] == min(shots, key=shots.get)
  own, params = llama.load(tmp_path / "run" / "merged")
  rows = np.load(tmp_path / "run" / "rows.npz")
  found = domains.load(["english", "slavic", "python"], **SIZES)
  for domain in found:
    inputs, labels = domain.task.test
    logits = np.asarray(llama.apply(own)(params, inputs), np.float64)
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    told = np.take_along_axis(raised, labels[..., None], -1)[..., 0] / raised.sum(-1)
    bits = -np.log2(told).mean(-1)
    np.testing.assert_allclose(rows[f"atm/{domain.task.name}"], bits, rtol=2e-5)
    assert models["atm"]["per_task"][domain.task.name] == pytest.approx(bits.mean(), rel=2e-5)
  page = (tmp_path / "run" / "report.html").read_text()
  assert "less is better" in page
  assert "bits per byte" in (tmp_path / "run" / "merged" / "README.md").read_text()
