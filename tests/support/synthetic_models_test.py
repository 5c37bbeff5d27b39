"""Models made of names: the bits that recorded outputs rest on, and what is in them."""

import numpy as np
import pytest
import synthetic_models

CHECKSUMS = {
  "llama": {
    "base": 4019308538,
    "first": 3483116011,
    "second": 1454771312,
    "third": 3417492973,
    "far": 4204030489,
  },
  "minilm": {
    "base": 2206699186,
    "first": 640958751,
    "second": 3034813059,
    "third": 2739783757,
    "far": 2443535332,
  },
}


@pytest.mark.parametrize("name", ["llama", pytest.param("minilm", marks=pytest.mark.minilm)])
def test_bits_are_those_recorded(name):
  base = synthetic_models.BASES[name]()
  models = {m: synthetic_models.fine_tuned(base, m) for m in synthetic_models.FINE_TUNED}
  models["base"] = base
  assert {x.dtype for tensors in models.values() for x in tensors.values()} == {
    np.dtype(np.float32)
  }
  assert {m: synthetic_models.checksum(x) for m, x in models.items()} == CHECKSUMS[name]


def test_a_tensor_depends_on_names_alone():
  base = synthetic_models.llama()
  whole = synthetic_models.fine_tuned(base, "third")
  part = synthetic_models.fine_tuned({"lm_head.weight": base["lm_head.weight"]}, "third")
  np.testing.assert_array_equal(part["lm_head.weight"], whole["lm_head.weight"])


def test_task_vectors_are_small_sparse_and_partly_shared():
  base = synthetic_models.llama()
  x = base["lm_head.weight"].astype(np.float64)
  taus = {
    m: synthetic_models.fine_tuned(base, m)["lm_head.weight"] - x
    for m in synthetic_models.FINE_TUNED
  }
  sizes = {m: np.linalg.norm(tau) / np.linalg.norm(x) for m, tau in taus.items()}
  assert all(0.019 < sizes[m] < 0.021 for m in ("first", "second", "third"))
  assert 0.78 < sizes["far"] < 0.82
  shares = [(tau != 0).mean() for tau in taus.values()]
  np.testing.assert_allclose(shares, [12 / 16, 8 / 16, 2 / 16, 1], atol=0.01)
  first, second, third, _ = (tau / np.linalg.norm(tau) for tau in taus.values())
  assert 0.28 < (first * second).sum() < 0.34
  assert abs((first * third).sum()) < 0.02
  assert np.abs(third).max() > 20 * third.std()


def test_one_tensor_is_the_same_in_all_models():
  base = synthetic_models.llama()
  for model in synthetic_models.FINE_TUNED:
    own = synthetic_models.fine_tuned(base, model)
    assert [n for n in base if np.array_equal(own[n], base[n])] == [synthetic_models.FROZEN]


def test_noise_has_mean_zero_and_deviation_one():
  x = synthetic_models.normal("some model", "some tensor", (200, 500)).astype(np.float64)
  assert abs(x.mean()) < 0.01
  assert abs(x.std() - 1) < 0.01
  assert 2.5 < (x**4).mean() / x.var() ** 2 < 3  # A sum of four uniform numbers: 2.7.
