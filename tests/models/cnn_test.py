"""The small CNN: its size, its convolutions against XLA's, its scaling, its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import methods
from jaxmerge.core import layouts, tree
from jaxmerge.models import cnn


@pytest.fixture(scope="module")
def params():
  return jax.jit(cnn.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)


apply = jax.jit(cnn.apply)


def test_parameters_are_a_plain_dict_of_the_stated_size(params):
  assert type(params) is dict
  assert type(params["dense"]) is dict
  assert list(tree.named(params)) == [
    *(f"conv_{k}/{part}" for k in range(3) for part in ("bias", "kernel")),
    "dense/bias",
    "dense/kernel",
  ]
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 121_696
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_features_and_logits_have_their_shapes(params, images):
  features = apply(params, images)
  head = np.random.default_rng(1).normal(size=(96, 7)).astype(np.float32)
  assert features.shape == (5, 96)
  assert float(jnp.abs(features).max()) <= 1
  np.testing.assert_allclose(apply(params, images, head), features @ head, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [7, 14])
def test_patches_times_kernel_is_the_convolution(size):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, size, size, 3)).astype(np.float32)
  kernel = rng.normal(size=(3, 3, 3, 5)).astype(np.float32)

  @jax.jit
  def both(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=layout)
    return cnn.patches(x) @ kernel.reshape(-1, 5), expected

  np.testing.assert_allclose(*both(x, kernel), atol=1e-5)


def test_whole_network_agrees_with_numpy(params, images):
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  h = images[..., None] / 255 - 0.3
  for k in range(3):
    size = h.shape[1]
    out = -(-size // 2)
    before = max(2 * (out - 1) + 3 - size, 0) // 2
    padded = np.zeros((len(h), 2 * out + 1, 2 * out + 1, h.shape[-1]))
    padded[:, before : before + size, before : before + size] = h
    kernel, bias = p[f"conv_{k}"]["kernel"], p[f"conv_{k}"]["bias"]
    rows = [
      np.einsum("bijc,ijcf->bf", padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel)
      for i in range(out)
      for j in range(out)
    ]
    h = np.maximum(np.stack(rows, 1).reshape(len(h), out, out, -1) + bias, 0)
  expected = np.tanh(h.reshape(len(h), -1) @ p["dense"]["kernel"] + p["dense"]["bias"])
  np.testing.assert_allclose(apply(params, images), expected, atol=1e-5)


def test_bytes_and_floats_from_0_to_1_are_the_same_image(params, images):
  as_floats = images.astype(np.float32) / 255
  np.testing.assert_allclose(apply(params, images), apply(params, as_floats), atol=1e-6)


def test_order_of_the_batch_only_orders_the_result(params, images):
  np.testing.assert_allclose(apply(params, images[::-1]), apply(params, images)[::-1], atol=1e-6)


@pytest.mark.slow
def test_gradients_are_finite_and_reach_every_leaf(params, images):
  gradient = jax.jit(jax.grad(lambda p: jnp.sum(cnn.apply(p, images) ** 2)))(params)
  for name, leaf in tree.named(gradient).items():
    assert np.isfinite(leaf).all(), name
    assert np.any(leaf), name


@pytest.mark.slow
def test_stacked_models_give_what_each_gives_alone(params, images):
  other = jax.jit(cnn.init)(jax.random.key(1))
  both = jax.jit(jax.vmap(cnn.apply, in_axes=(0, None)))(tree.stack([params, other]), images)
  for found, alone in zip(both, (params, other), strict=True):
    np.testing.assert_allclose(found, apply(alone, images), atol=1e-6)


def test_views_cover_the_kernels(params):
  """And are those that a Flax tree has without them."""
  found = layouts.of(methods.tsv(), params, layout=cnn.VIEWS)
  assert {n: r.view for n, r in layouts.of(methods.tsv(), params).items()} == {
    n: r.view for n, r in found.items()
  }
  assert all((rule.view is not None) == n.endswith("kernel") for n, rule in found.items())


def test_images_of_another_size_are_refused(params):
  with pytest.raises(ValueError, match=r"\[B, 28, 28\], got \[2, 32, 32\]"):
    cnn.apply(params, np.zeros((2, 32, 32), np.uint8))
