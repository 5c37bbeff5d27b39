"""Reductions over the task axis, written out as chains: x[2] + (x[1] + x[0]).

A compiler for CPUs makes a scalar loop of a reduction over a short first axis, up to a hundred
times slower than the chain, which it fuses and vectorises; and how it rounds in that loop depends
on how large the array is, so that a slice would not have the bits of the whole. Methods need not
know: a driver rewrites the traced program where no device holds but some of the models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any  # Any: functions and arguments of any kind.

import jax
import jax.numpy as jnp
from jax.extend import core

_CHAINS = {
  "reduce_sum": jnp.add,
  "reduce_max": jnp.maximum,
  "reduce_min": jnp.minimum,
  "reduce_prod": jnp.multiply,
  "reduce_and": jnp.logical_and,
  "reduce_or": jnp.logical_or,
}
LONGEST = 64  # A longer first axis is no task axis, and would make a long program.


def unrolled(f: Callable[..., Any]) -> Callable[..., Any]:
  """Returns f with its reductions over a first axis, of at most `LONGEST`, as chains.

  Example:
    >>> text = str(jax.make_jaxpr(unrolled(lambda x: x.sum(axis=0)))(jnp.ones((3, 4))))
    >>> "reduce_sum" in text, text.count("add")
    (False, 2)
  """

  @functools.wraps(f)
  def run(*arguments: Any) -> Any:
    traced, shapes = jax.make_jaxpr(f, return_shape=True)(*arguments)
    out = _evaluated(traced.jaxpr, traced.consts, jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(shapes), out)

  return run


def _evaluated(jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
  """Runs a traced program, its reductions over a first axis as chains."""
  values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

  def read(atom: Any) -> Any:
    return atom.val if isinstance(atom, core.Literal) else values[atom]

  for equation in jaxpr.eqns:
    given = [read(atom) for atom in equation.invars]
    values.update(zip(equation.outvars, _one(equation, given), strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _one(equation: Any, given: list[Any]) -> list[Any]:
  name, settings = equation.primitive.name, equation.params
  if name in ("jit", "pjit", "closed_call"):  # What jax.numpy is made of.
    inner = settings["jaxpr"] if "jaxpr" in settings else settings["call_jaxpr"]
    return _evaluated(inner.jaxpr, inner.consts, given)
  if name in _CHAINS and settings["axes"] == (0,) and 0 < given[0].shape[0] <= LONGEST:
    # The new term on the left: of two products in a sum a compiler fuses the left one's rounding
    # away, and in a reduction that is the newer.
    return [functools.reduce(lambda held, x: _CHAINS[name](x, held), list(given[0]))]
  bound = equation.primitive.get_bind_params(settings)  # A pair in other versions of jax.
  functions, settings = bound if isinstance(bound, tuple) else ((), bound)
  if name in ("while", "scan", "cond"):
    settings = {key: _inner(value) for key, value in settings.items()}
  out = equation.primitive.bind(*functions, *given, **settings)
  return out if equation.primitive.multiple_results else [out]


def _inner(setting: Any) -> Any:
  """Rewrites the programs of a loop or a branch."""
  if isinstance(setting, tuple):
    return tuple(_inner(part) for part in setting)
  if not isinstance(setting, core.ClosedJaxpr):
    return setting

  def run(*arguments: Any) -> list[Any]:
    return _evaluated(setting.jaxpr, setting.consts, arguments)

  return jax.make_jaxpr(run)(*setting.in_avals)
