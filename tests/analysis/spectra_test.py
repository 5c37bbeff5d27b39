"""Singular values of task vectors: against NumPy's of the dense matrices."""

import numpy as np
import pytest

from jaxmerge.analysis import spectra, sums
from jaxmerge.files import inputs
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Files


@pytest.fixture
def opened(tmp_path):
  files = Files()

  def open_folder(name, tensors):
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    safetensors.save(tmp_path / name / "model.safetensors", tensors, {"format": "pt"})
    return inputs.open_model(str(tmp_path / name), files, name=name)

  yield open_folder
  files.close()


def pair(opened, delta):
  base = np.random.default_rng(0).standard_normal(delta.shape)
  return opened("base", {"w": base}), opened("chat", {"w": base + delta})


def decaying(rows, columns, rate, rank):
  draw = np.random.default_rng(1).standard_normal
  left, right = (np.linalg.qr(draw((n, rank)))[0] for n in (rows, columns))
  return (left * rate ** np.arange(rank)) @ right.T


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_a_small_matrix_is_exact(opened, shape):
  delta = np.random.default_rng(2).standard_normal(shape)
  base, model = pair(opened, delta)
  found = spectra.measure(base, [model], ["w"])["w"]
  assert found["exact"]
  np.testing.assert_allclose(
    found["models"]["chat"]["values"], np.linalg.svd(delta, compute_uv=False), atol=1e-6
  )
  assert found["models"]["chat"]["energy"] == pytest.approx((delta**2).sum())


@pytest.mark.parametrize("shape", [(300, 170), (170, 300)])
def test_a_low_rank_is_exact_whatever_the_size(opened, monkeypatch, shape):
  monkeypatch.setattr(spectra, "EXACT", 10)
  monkeypatch.setattr(sums, "CHUNK", 1000)
  delta = decaying(*shape, 0.7, 12)
  base, model = pair(opened, delta)
  counts = []
  found = spectra.measure(base, [model], ["w"], counts.append)["w"]
  assert not found["exact"]
  values = found["models"]["chat"]["values"]
  assert len(values) == spectra.TOP
  np.testing.assert_allclose(values[:12], 0.7 ** np.arange(12), rtol=1e-9)
  assert max(values[12:]) < 1e-9
  assert sum(counts) == spectra.size(base, [model], ["w"]) == 4 * 2 * 8 * delta.size


def test_the_largest_values_are_never_too_large_and_close(opened, monkeypatch):
  monkeypatch.setattr(spectra, "EXACT", 10)
  delta = decaying(200, 150, 0.95, 150)
  base, model = pair(opened, delta)
  found = spectra.measure(base, [model], ["w"])["w"]["models"]["chat"]
  dense = np.linalg.svd(delta, compute_uv=False)[: spectra.TOP]
  assert (np.array(found["values"]) <= dense * (1 + 1e-9)).all()
  np.testing.assert_allclose(found["values"][:32], dense[:32], rtol=1e-3)
  assert found["energy"] == pytest.approx((delta**2).sum())


def test_matrices_are_chosen_evenly_and_none_is_too_long(opened, monkeypatch):
  monkeypatch.setattr(spectra, "LONGEST", 50)
  tensors = {f"model.layers.{i}.mlp.weight": np.ones((3, 2), np.float32) for i in range(11)}
  tensors |= {"norm.weight": np.ones(3, np.float32), "embed.weight": np.ones((60, 2), np.float32)}
  base = opened("base", tensors)
  chosen = [n.split(".")[2] for n in spectra.choose(base, 3)]
  assert chosen == ["0", "5", "10"]
  assert len(spectra.choose(base, 100)) == 11
