"""Outer optimisers: what is done with the merged task vector of a round."""

from __future__ import annotations

from typing import Any, NamedTuple  # Any: parameters are the user's tree.

import jax
import jax.numpy as jnp
import optax

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


def direction(settings: Settings) -> optax.GradientTransformation | None:
  """Returns the outer optimiser, without its learning rate; None for plain ATM.

  Its gradient is current - (reference + merged task vector). Nesterov is DiLoCo's choice
  (Douillard et al. 2023, arXiv:2311.08105).
  """
  m = settings.outer_momentum
  if settings.outer == "none":
    return None
  if settings.outer == "adam":
    return optax.scale_by_adam(b1=m or 0.9, b2=0.95)
  if settings.outer == "damped":
    return damped(m)
  if not m:
    return optax.identity()
  return optax.trace(m, nesterov=settings.outer == "nesterov")


def moved(
  outer: optax.GradientTransformation | None, current: Any, target: Any, state: Any, rate: jax.Array
) -> tuple[Any, Any]:
  """Takes the outer step from `current` towards `target`, the merged model.

  Without an outer optimiser the target is the new model, to the bit.
  """
  if outer is None:
    return target, state
  gradient = jax.tree.map(jnp.subtract, current, target)
  updates, state = outer.update(gradient, state, current)
  return jax.tree.map(lambda p, u: p - rate.astype(p.dtype) * u, current, updates), state
