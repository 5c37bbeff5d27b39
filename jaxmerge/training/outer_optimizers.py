"""Outer optimisers: what is done with the merged task vector of a round."""

from __future__ import annotations

from typing import Any, NamedTuple  # Any: parameters are the user's tree.

import jax
import jax.numpy as jnp
import optax

from jaxmerge.training import optimizers
from jaxmerge.training.settings import Settings


class DampedState(NamedTuple):
  """Rounds so far, and the last change of the model before the learning rate."""

  rounds: jax.Array
  change: Any


def damped(momentum: float) -> optax.GradientTransformation:
  """Blends the merged task vector u with the last change: (1 - m) * u + m * change.

  That holds from round 2 on; in round 1 it is u itself. This is the momentum of the authors' code,
  unlike a heavy ball.

  Reference: Zhou et al. 2024, ATM (arXiv:2411.03055).
  """

  def init(params: Any) -> DampedState:
    return DampedState(jnp.int32(0), jax.tree.map(jnp.zeros_like, params))

  def update(grads: Any, state: DampedState, params: Any = None) -> tuple[Any, DampedState]:
    m = jnp.where(state.rounds > 0, jnp.float32(momentum), jnp.float32(0))
    blended = jax.tree.map(
      lambda g, c: (1 - m).astype(g.dtype) * g + m.astype(g.dtype) * c, grads, state.change
    )
    return blended, DampedState(state.rounds + 1, blended)

  return optax.GradientTransformation(init, update)


def optimizer(settings: Settings, params: Any) -> optimizers.Optimizer | None:
  """Returns the outer optimiser; None for plain ATM.

  Its gradient is current - (reference + merged task vector). Nesterov is DiLoCo's choice
  (Douillard et al. 2023, arXiv:2311.08105).

  Raises:
    ValueError: if an optax transformation does not fit the parameters.
  """
  momentum = settings.outer_momentum
  if not isinstance(settings.outer, str):
    return optimizers.from_optax(settings.outer, params, "outer")
  if settings.outer == "none":
    return None
  if settings.outer == "adam":
    return optimizers.with_rate(optax.scale_by_adam(b1=momentum or 0.9, b2=0.95))
  if settings.outer == "damped":
    return optimizers.with_rate(damped(momentum))
  if not momentum:
    return optimizers.with_rate(optax.identity())
  return optimizers.with_rate(optax.trace(momentum, nesterov=settings.outer == "nesterov"))


def step(
  optimizer: optimizers.Optimizer | None,
  current: Any,
  target: Any,
  state: Any,
  rate: jax.Array,
  freeze: str = "",
) -> tuple[Any, Any]:
  """Takes the outer step from `current` towards `target`, the merged model.

  Without an outer optimiser the target is the new model, to the bit. With one, frozen leaves and
  running statistics keep their bits, whatever decay it has.
  """
  if optimizer is None:
    return target, state
  gradient = jax.tree.map(jnp.subtract, current, target)
  return optimizers.take(optimizer, current, gradient, state, rate, freeze)
