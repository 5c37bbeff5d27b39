"""The local and outer optimisers: built-in ones by name, and any optax transformation.

Updates are added to the parameters, as in optax. A built-in optimiser gets its learning rate from
the caller at every step; an optax transformation has its schedule inside.
"""

from __future__ import annotations

from typing import Any, TypeAlias  # Any: parameters and states are the user's trees.

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxmerge.core import running_statistics, tree
from jaxmerge.training.settings import Settings

Array = jax.Array
Optimizer: TypeAlias = optax.GradientTransformationExtraArgs


def local(settings: Settings, params: Any) -> Optimizer:
  """Returns the optimiser of the local steps; its `update` takes the learning rate as `rate`.

  Raises:
    ValueError: if `freeze` matches no leaf, or leaves none to tune, or if an optax transformation
      does not fit the parameters.
  """
  frozen = [settings.freeze != "" and tree.matching(settings.freeze)(n) for n in tree.named(params)]
  if settings.freeze and len(set(frozen)) == 1:
    matches = "every leaf, so that nothing is tuned" if frozen[0] else "no leaf"
    raise ValueError(
      f"freeze {settings.freeze!r} matches {matches}; leaves: {', '.join(tree.named(params))}."
    )
  if not isinstance(settings.optimizer, str):
    return from_optax(settings.optimizer, params, "optimizer")
  parts = [_clip(settings.clip_norm)] if settings.clip_norm else []
  if settings.optimizer == "adamw":
    parts.append(optax.scale_by_adam())
  if settings.weight_decay:
    decayed = {n: _decays(n, v) for n, v in tree.named(params).items()}
    parts.append(optax.add_decayed_weights(settings.weight_decay, tree.rebuild(params, decayed)))
  return with_rate(optax.chain(*parts) if parts else optax.identity())


def with_rate(direction: optax.GradientTransformation) -> Optimizer:
  """Returns an optimiser with the updates -rate * direction, and the states of `direction`."""

  def update(grads: Any, state: Any, params: Any = None, *, rate: Array) -> tuple[Any, Any]:
    directions, state = direction.update(grads, state, params)
    return jax.tree.map(lambda p, d: -rate.astype(p.dtype) * d, params, directions), state

  return Optimizer(direction.init, update)


def from_optax(transformation: optax.GradientTransformation, params: Any, name: str) -> Optimizer:
  """Returns an optax transformation as an optimiser that ignores the rate.

  Args:
    transformation: the transformation in the settings.
    params: tree of the parameters, or of their shapes.
    name: name of the setting, for errors.

  Raises:
    ValueError: if the transformation cannot update these parameters, changes the shapes of its
      state, or has a random key in it.
  """
  optimizer = optax.with_extra_args_support(transformation)

  def update(grads: Any, state: Any, params: Any = None, *, rate: Array) -> tuple[Any, Any]:
    del rate
    return optimizer.update(grads, state, params)

  def once(params: Any) -> Any:
    state = optimizer.init(params)
    return state, optimizer.update(params, state, params)

  try:
    before, (updates, after) = jax.eval_shape(once, params)
  except (TypeError, ValueError, KeyError, AttributeError) as error:
    raise ValueError(
      f"{name}: the optax transformation cannot update the model's parameters: "
      f"{' '.join(str(error).split())}"
    ) from error
  if any(jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(before)):
    raise ValueError(
      f"{name}: the optax transformation keeps a random key in its state, as add_noise and "
      "noisy_sgd do: all tasks would draw the same noise, and no checkpoint holds keys. Leave the "
      "noise out, or draw it in a transformation of yours by jax.random.fold_in(key, count)."
    )
  for part, left, right in (("updates", params, updates), ("state", before, after)):
    if _shapes(left) != _shapes(right):
      raise ValueError(f"{name}: an update of the optax transformation has {part} of other shapes.")
  return Optimizer(optimizer.init, update)


def take(
  optimizer: Optimizer, params: Any, grads: Any, state: Any, rate: Array, freeze: str
) -> tuple[Any, Any]:
  """Takes a step; frozen leaves and running statistics are unchanged, bit for bit.

  Args:
    optimizer: the optimiser, local or outer.
    params: tree of arrays.
    grads: tree of gradients.
    state: state of the optimiser.
    rate: the learning rate.
    freeze: pattern of the names of frozen leaves; "": none.

  Returns:
    The new parameters and the new state.
  """
  names = tree.named(params)
  fixed = running_statistics.of(names) | set(filter(tree.matching(freeze), names) if freeze else ())
  free = tree.rebuild(params, {n: n not in fixed for n in names})
  grads = jax.tree.map(lambda g, f: g if f else jnp.zeros_like(g), grads, free)
  updates, state = optimizer.update(grads, state, params, rate=rate)
  moved = apply_updates(params, updates)
  return jax.tree.map(lambda p, m, f: m if f else p, params, moved, free), state


def apply_updates(params: Any, updates: Any) -> Any:
  """Returns params + updates, each leaf in the dtype of its parameter."""
  return jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)


def _clip(limit: float) -> optax.GradientTransformation:
  """Scales gradients to a global norm of at most `limit`, as `optax.clip_by_global_norm` does.

  The norm is computed from inner products. XLA splits a sum of squares differently in different
  programs, so that the same step would differ in its last bits.
  """

  def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    norm = jnp.sqrt(sum(_square(g) for g in jax.tree.leaves(grads)))
    scale = jnp.where(norm < limit, 1, limit / norm)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _shapes(tree_: Any) -> Any:
  return jax.tree.structure(tree_), [x.shape for x in jax.tree.leaves(tree_)]


def _square(x: Any) -> Array:
  """Returns the inner product of an array with itself; partial sums if it is sharded."""
  axes = tuple(range(x.ndim))
  return lax.dot_general(x, x, ((axes, axes), ((), ())), precision="highest")


def _decays(name: str, leaf: Any) -> bool:
  return leaf.ndim > 1 and not tree.matching(r"(?i)embed|norm|bias|scale")(name)
