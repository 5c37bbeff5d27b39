"""Task arithmetic: adding, negating and combining task vectors."""

from __future__ import annotations

from jaxmerge.catalog import lookup
from jaxmerge.core.stage import Method, Stage, chain, for_models
from jaxmerge.methods import averages
from jaxmerge.methods.factory import named


@named
def task_arithmetic(
  scale: float = 0.3,
  weight: float | tuple[float, ...] = 1.0,
  normalize: bool = False,
) -> Method:
  """Adds up the task vectors, times `scale`: base + scale * sum_i weight_i * tau_i.

  Args:
    scale: factor on the sum; 1/K gives the average.
    weight: weight of each task vector, scalar or one per model.
    normalize: divide by the sum of the weights, see `weighted_sum`.

  Reference: Ilharco et al. 2023, Editing models with task arithmetic (arXiv:2212.04089).

  Example:
    >>> import jax.numpy as jnp, jaxmerge
    >>> base, experts = {"w": jnp.array([1.0])}, {"w": jnp.array([[2.0], [4.0]])}
    >>> jaxmerge.merge(task_arithmetic(scale=0.5), experts, base)["w"].tolist()
    [3.0]
  """
  lookup.check("task_arithmetic", {"scale": scale, "weight": weight, "normalize": normalize})
  return chain(averages.weighted_sum(weight, normalize=normalize), averages.scaled(scale))


@named
def negate(scale: float = 0.3) -> Method:
  """Subtracts the task vectors, to make the model forget: base - scale * sum_i tau_i.

  Reference: Ilharco et al. 2023 (arXiv:2212.04089).

  Example:
    >>> import jax.numpy as jnp, jaxmerge
    >>> base, experts = {"w": jnp.array([1.0])}, {"w": jnp.array([[2.0]])}
    >>> jaxmerge.merge(negate(scale=0.5), experts, base)["w"].tolist()
    [0.5]
  """
  lookup.check("negate", {"scale": scale})
  return chain(averages.weighted_sum(-1.0), averages.scaled(scale))


@named
def analogy(scale: float = 0.3) -> Method:
  """Combines three task vectors A, B, C, as in "A is to B as C is to D".

  The result is base + scale * (C + B - A); the stack is the models A, B and C in this order.

  Reference: Ilharco et al. 2023 (arXiv:2212.04089).

  Example:
    >>> import jax.numpy as jnp, jaxmerge
    >>> base, experts = {"w": jnp.array([0.0])}, {"w": jnp.array([[1.0], [5.0], [10.0]])}
    >>> jaxmerge.merge(analogy(scale=1.0), experts, base)["w"].tolist()
    [14.0]
  """
  lookup.check("analogy", {"scale": scale})
  return chain(averages.weighted_sum((-1.0, 1.0, 1.0)), averages.scaled(scale))


@named
def portllm(scale: float = 1.0) -> Method:
  """Carries a fine-tuning of an older base over to a newer one: base + scale * (tuned - old).

  The stack is the older base and the model tuned from it, in this order.

  Args:
    scale: factor on the older model's task vector.

  Reference: Khan et al. 2024, PortLLM (arXiv:2410.10870).

  Example:
    >>> import jax.numpy as jnp, jaxmerge
    >>> newer, old_and_tuned = {"w": jnp.array([10.0])}, {"w": jnp.array([[1.0], [3.0]])}
    >>> jaxmerge.merge(portllm(), old_and_tuned, newer)["w"].tolist()
    [12.0]
  """
  lookup.check("portllm", {"scale": scale})
  two = Stage(lambda x, leaf, known: x, init=for_models("portllm", 2, 2))
  return chain((two,), averages.weighted_sum((-1.0, 1.0)), averages.scaled(scale))
