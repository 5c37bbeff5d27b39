"""Weights for checkpoints of one run: averages, and learning-rate decays applied afterwards."""

from __future__ import annotations

import math

DECAYS = {
  "1-sqrt": lambda u: 1 - math.sqrt(u),
  "linear": lambda u: 1 - u,
  "cosine": lambda u: (1 + math.cos(math.pi * u)) / 2,
}


def decay_weights(
  num_models: int, decay: str = "1-sqrt", zero_at: str = "after"
) -> tuple[float, ...]:
  """Returns the checkpoint weights, oldest first, whose merge emulates a learning-rate decay.

  The merge of θ₀, ..., θₖ is θ₀ + Σ dᵢ (θᵢ - θᵢ₋₁), where dᵢ = d(i/n) is the decay at update i. It
  scales the updates of a run at constant learning rate as the decay would have.

  Args:
    num_models: k + 1.
    decay: d(u) is 1 - √u, 1 - u or (1 + cos πu)/2; all go from 1 to 0.
    zero_at: "after": the rate is zero one interval after the last checkpoint, n = k + 1; "last": it
      is zero at the last checkpoint, n = k, whose weight is then zero.

  Reference: Tian et al. 2025, WSM: Decay-free learning rate schedule (arXiv:2507.17634).

  Example:
    >>> decay_weights(4, "linear"), decay_weights(3, "cosine", "last")
    ((0.25, 0.25, 0.25, 0.25), (0.5, 0.5, 0.0))
  """
  steps = num_models if zero_at == "after" else num_models - 1
  if steps < 1:  # A single checkpoint has weight 1.
    return (1.0,)
  rates = [DECAYS[decay](i / steps) for i in range(num_models)]
  return tuple(a - b for a, b in zip(rates, [*rates[1:], 0.0], strict=True))


def checkpoint_weights(
  num_models: int,
  kind: str = "sma",
  *,
  alpha: float = 0.2,
  start: str = "first",
  decay: str = "1-sqrt",
  zero_at: str = "after",
) -> tuple[float, ...]:
  """Returns the weights of `checkpoint_average`, the oldest checkpoint first; their sum is 1.

  Example:
    >>> checkpoint_weights(3, "ema", alpha=0.5)
    (0.25, 0.25, 0.5)
  """
  if kind == "decay":
    return decay_weights(num_models, decay, zero_at)
  each = [1.0] * num_models if kind == "sma" else [1.0 + i for i in range(num_models)]
  if kind == "ema":
    each = [alpha * (1 - alpha) ** i for i in reversed(range(num_models))]
    each[0] = each[0] if start == "zero" else (1 - alpha) ** (num_models - 1)
  return tuple(x / sum(each) for x in each)
