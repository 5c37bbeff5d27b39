"""Programs of methods, rewritten: sums over the task axis as chains, operations that round.

A reduction over the task axis is written out: x[2] + (x[1] + x[0]). A compiler for CPUs makes a
scalar loop of a reduction over a short first axis, several times slower than the chain, which it
fuses and vectorises; and how it rounds in that loop depends on how large the array is, so that a
slice would not have the bits of the whole. Methods need not know: a driver rewrites the traced
program where no device holds but some of the models. Inner products of a few models become sums
of products for the same reason: a library's matrix product is made for larger ones.

The same rewriting makes a program of float32 compute in a narrower dtype, operation by operation.
A program of that dtype would not: compilers keep float32 inside of what they fuse.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any  # Any: functions and arguments of any kind.

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

Round = Callable[[Any], Any]
_CHAINS = {
  "reduce_sum": jnp.add,
  "reduce_max": jnp.maximum,
  "reduce_min": jnp.minimum,
  "reduce_prod": jnp.multiply,
  "reduce_and": jnp.logical_and,
  "reduce_or": jnp.logical_or,
}
LONGEST = 64  # A longer first axis is no task axis, and would make a long program.
PAIRS = 16  # As many inner products are written out, at most.
# Functions that are one operation: they round their result alone.
_ONE = {"_var"}
# Random numbers are compared with, and not rounded.
_RANDOM = "uniform_of_bits"
# What moves values, and leaves them as they are.
_EXACT = {"broadcast_in_dim", "concatenate", "reshape", "select_n", "slice", "squeeze", "transpose"}


def unrolled(f: Callable[..., Any], *, each: str | None = None) -> Callable[..., Any]:
  """Returns f with its reductions over a first axis, of at most `LONGEST`, as chains.

  Products of at most `PAIRS` pairs of models become sums.

  Args:
    f: a function of arrays.
    each: a dtype to which the result of every operation is rounded, a reduction being one. What f
      returns is not: a sum over a part of a leaf is not complete.

  Example:
    >>> text = str(jax.make_jaxpr(unrolled(lambda x: x.sum(axis=0)))(jnp.ones((3, 4))))
    >>> "reduce_sum" in text, text.count("add")
    (False, 2)
  """

  @functools.wraps(f)
  def run(*arguments: Any) -> Any:
    traced, shapes = jax.make_jaxpr(f, return_shape=True)(*arguments)
    to = (lambda x: x) if each is None else functools.partial(rounded, dtype=each)
    out = _evaluated(traced.jaxpr, traced.consts, jax.tree.leaves(arguments), to)
    return jax.tree.unflatten(jax.tree.structure(shapes), out)

  return run


def rounded(x: Any, dtype: str) -> Any:
  """Rounds floating values to a dtype, and leaves them in the one they have.

  Example:
    >>> rounded(jnp.float32(1.01), "bfloat16").tolist()
    1.0078125
  """
  if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
    return x
  info = jnp.finfo(dtype)
  # A cast there and back is what compilers leave out.
  out = lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
  if info.nexp == 8:  # That of float32.
    return out
  small = lax.round(x * 2.0**24, lax.RoundingMethod.TO_NEAREST_EVEN) * 2.0**-24
  return jnp.where(jnp.abs(x) < float(info.tiny), small, out)  # It makes zeros of subnormals.


def _evaluated(
  jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], to: Round
) -> list[Any]:
  """Runs a traced program, its reductions over a first axis as chains.

  What an operation returns is rounded by `to` where another one reads it.
  """
  values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
  raw = set()

  def read(atom: Any) -> Any:
    if isinstance(atom, core.Literal):
      return atom.val
    return to(values[atom]) if atom in raw else values[atom]

  for equation in jaxpr.eqns:
    given = [read(atom) for atom in equation.invars]
    values.update(zip(equation.outvars, _one(equation, given, to), strict=True))
    if equation.primitive.name not in _EXACT and _called(equation) != _RANDOM:
      raw.update(equation.outvars)
  return [atom.val if isinstance(atom, core.Literal) else values[atom] for atom in jaxpr.outvars]


def _one(equation: Any, given: list[Any], to: Round) -> list[Any]:
  name, settings = equation.primitive.name, equation.params
  if name in ("jit", "pjit", "closed_call"):  # What jax.numpy is made of.
    inner = settings["jaxpr"] if "jaxpr" in settings else settings["call_jaxpr"]
    own = (lambda x: x) if _called(equation) in (*_ONE, _RANDOM) else to
    return _evaluated(inner.jaxpr, inner.consts, given, own)
  if name in _CHAINS and settings["axes"] == (0,) and 0 < given[0].shape[0] <= LONGEST:
    # The new term on the left: of two products in a sum a compiler fuses the left one's rounding
    # away, and in a reduction that is the newer.
    return [functools.reduce(lambda held, x: _CHAINS[name](x, held), list(given[0]))]
  if name == "dot_general" and _is_few(given, settings["dimension_numbers"]):
    return [_products(*given)]
  bound = equation.primitive.get_bind_params(settings)  # A pair in other versions of jax.
  functions, settings = bound if isinstance(bound, tuple) else ((), bound)
  if name in ("while", "scan", "cond"):
    settings = {key: _inner(value, to) for key, value in settings.items()}
  out = equation.primitive.bind(*functions, *given, **settings)
  return out if equation.primitive.multiple_results else [out]


def _is_few(given: Sequence[Any], axes: Any) -> bool:
  """Tells whether a product is that of each of a few models with each."""
  (left, right), batch = axes
  rest = tuple(range(1, given[0].ndim))
  pairs = given[0].shape[0] * given[1].shape[0]
  whole = tuple(left) == tuple(right) == rest and given[0].ndim == given[1].ndim
  return whole and batch == ((), ()) and 0 < pairs <= PAIRS


def _products(x: Any, y: Any) -> Any:
  """The inner product of each of some models with each of others, [K, *s], [M, *s] -> [K, M]."""
  same = x is y
  found: dict[tuple[int, int], Any] = {}
  for i in range(x.shape[0]):
    for j in range(y.shape[0]):
      found[i, j] = found[j, i] if same and j < i else jnp.sum(x[i] * y[j])
  return jnp.stack([jnp.stack([found[i, j] for j in range(y.shape[0])]) for i in range(len(x))])


def _called(equation: Any) -> str | None:
  """The name of a function that is called as a whole."""
  return equation.params.get("name")


def _inner(setting: Any, to: Round) -> Any:
  """Rewrites the programs of a loop or a branch."""
  if isinstance(setting, tuple):
    return tuple(_inner(part, to) for part in setting)
  if not isinstance(setting, core.ClosedJaxpr):
    return setting

  def run(*arguments: Any) -> list[Any]:
    return _evaluated(setting.jaxpr, setting.consts, arguments, to)

  return jax.make_jaxpr(run)(*setting.in_avals)
