"""Tensors of small adapters, as their files have them."""

import numpy as np

PREFIX = "base_model.model."


def noise(seed, *shape, dtype=np.float32):
  return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def lora_parts(module, rank, shape, seed=0, dtype=np.float32):
  """A and B of a module whose weight is [out, in] = shape."""
  out, inner = shape
  return {
    f"{PREFIX}{module}.lora_A.weight": noise(seed, rank, inner, dtype=dtype),
    f"{PREFIX}{module}.lora_B.weight": noise(seed + 1, out, rank, dtype=dtype),
  }
