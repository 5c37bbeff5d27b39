"""Task arithmetic: sums on a base, and patches on a newer one."""

import jax.numpy as jnp
from example import TAU, close

import jaxmerge
from jaxmerge import methods

BASE = {"w": jnp.array([1.0, -1.0, 0.5, 0.0, 2.0, -0.5])}


def test_task_arithmetic_adds_to_the_base():
  models = {"w": BASE["w"][None] + TAU}
  out = jaxmerge.merge(methods.task_arithmetic(scale=0.3), models, BASE)
  close(out["w"], [1.33, -1.09, 0.41, 0.24, 1.82, -0.56])


def test_a_patch_is_carried_over_to_a_newer_base():
  old, tuned = TAU[0], TAU[1]
  models = {"w": jnp.stack([jnp.asarray(old), jnp.asarray(tuned)])}
  close(jaxmerge.merge(methods.portllm(), models, BASE)["w"], BASE["w"] + tuned - old)
  same = jaxmerge.merge(methods.portllm(), models, {"w": models["w"][0]})
  close(same["w"], tuned)
