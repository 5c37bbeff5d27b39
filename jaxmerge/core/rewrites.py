"""Programs of methods, rewritten: sums over the task axis as chains, operations that round.

A reduction over the task axis is written out: x[2] + (x[1] + x[0]). A compiler for CPUs makes a
scalar loop of a reduction over a short first axis, several times slower than the chain, which it
fuses and vectorises; and how it rounds in that loop depends on how large the array is, so that a
slice would not have the bits of the whole. Methods need not know: a driver rewrites the traced
program where no device holds but some of the models. Inner products of a few models become sums
of products for the same reason: a library's matrix product is meant for larger ones. And where a
driver has whole axes before it, sums along them go by halves, each half added to the other:
such sums are vectors to the end, and more exact than one after the other.

The same rewriting makes a program of float32 compute in a narrower dtype, operation by operation.
A program of that dtype would not: compilers keep float32 inside of what they fuse.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple  # Any: functions and arguments of any kind.

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core


class _Way(NamedTuple):
  """Options of a rewrite: see `unroll`."""

  each: str | None
  halves: bool

  def rounded(self, x: Any) -> Any:
    return x if self.each is None else round_to(x, self.each)


_CHAINS = {
  "reduce_sum": jnp.add,
  "reduce_max": jnp.maximum,
  "reduce_min": jnp.minimum,
  "reduce_prod": jnp.multiply,
  "reduce_and": jnp.logical_and,
  "reduce_or": jnp.logical_or,
}
LONGEST = 64  # A longer first axis is no task axis, and would make a long program.
_WHOLE: dict[str, Callable[..., Any]] = {
  "reduce_sum": jnp.sum,
  "reduce_max": jnp.max,
  "reduce_min": jnp.min,
  "reduce_prod": jnp.prod,
  "reduce_and": jnp.all,
  "reduce_or": jnp.any,
}
SHORTEST = 2**7  # A shorter axis, or remainder of one, is not worth halving.
PAIRS = 16  # Largest number of inner products that are written out.
# Functions that count as one operation: only their result is rounded.
_ONE = {"_var"}
# Random numbers are compared with, and not rounded.
_RANDOM = "uniform_of_bits"
# Operations that move values without changing them.
_EXACT = {"broadcast_in_dim", "concatenate", "reshape", "select_n", "slice", "squeeze", "transpose"}


def unroll(
  f: Callable[..., Any], *, each: str | None = None, halves: bool = False
) -> Callable[..., Any]:
  """Returns f with its reductions over a first axis of at most `LONGEST` as chains.

  Products of at most `PAIRS` pairs of models become sums.

  Args:
    f: a function of arrays.
    each: a dtype to which the result of every operation is rounded, a reduction being one. What f
      returns is not: a sum over a part of a leaf is not complete.
    halves: whether reductions over all last axes go by halves where these are long; no device
      may hold but a part of them.

  Example:
    >>> text = str(jax.make_jaxpr(unroll(lambda x: x.sum(axis=0)))(jnp.ones((3, 4))))
    >>> "reduce_sum" in text, text.count("add")
    (False, 2)
  """

  @functools.wraps(f)
  def run(*arguments: Any) -> Any:
    traced, shapes = jax.make_jaxpr(f, return_shape=True)(*arguments)
    out = _evaluate(traced.jaxpr, traced.consts, jax.tree.leaves(arguments), _Way(each, halves))
    return jax.tree.unflatten(jax.tree.structure(shapes), out)

  return run


def pays(arrays: Iterable[Any]) -> bool | None:
  """Returns whether chains pay off on the arrays' devices: everywhere but on TPUs.

  The TPU compiler would materialise, in float32, the slices that a chain reads. None: the arrays
  are traced, and only the caller that compiles the program knows its target.
  """
  every = list(arrays)
  if any(isinstance(x, jax.core.Tracer) for x in every):
    return None
  platforms = {d.platform for x in every if isinstance(x, jax.Array) for d in x.devices()}
  return "tpu" not in (platforms or {jax.default_backend()})


def with_chains(f: Callable[[bool], Callable[..., Any]], chains: bool | None) -> Callable[..., Any]:
  """Returns f(True) with chains or f(False) without, according to `pays`."""
  if chains is None:
    return lambda *args: lax.platform_dependent(*args, tpu=f(False), default=unroll(f(True)))
  return unroll(f(True)) if chains else f(False)


def round_to(x: Any, dtype: str) -> Any:
  """Rounds floating-point values to the precision of a dtype, without casting them.

  Example:
    >>> round_to(jnp.float32(1.01), "bfloat16").tolist()
    1.0078125
  """
  if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
    return x
  info = jnp.finfo(dtype)
  # Compilers remove a cast there and back.
  out = lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
  if info.nexp == 8:  # The exponent of float32.
    return out
  small = lax.round(x * 2.0**24, lax.RoundingMethod.TO_NEAREST_EVEN) * 2.0**-24
  return jnp.where(jnp.abs(x) < float(info.tiny), small, out)  # It flushes subnormals to zero.


def _evaluate(
  jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], way: _Way
) -> list[Any]:
  """Runs a traced program, its reductions over a first axis as chains.

  What an operation returns is rounded where another one reads it.
  """
  values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
  raw = set()

  def read(atom: Any) -> Any:
    if isinstance(atom, core.Literal):
      return atom.val
    return way.rounded(values[atom]) if atom in raw else values[atom]

  for equation in jaxpr.eqns:
    operands = [read(atom) for atom in equation.invars]
    values.update(zip(equation.outvars, _one(equation, operands, way), strict=True))
    if equation.primitive.name not in _EXACT and _function_name(equation) != _RANDOM:
      raw.update(equation.outvars)
  return [atom.val if isinstance(atom, core.Literal) else values[atom] for atom in jaxpr.outvars]


def _one(equation: Any, operands: list[Any], way: _Way) -> list[Any]:
  name, settings = equation.primitive.name, equation.params
  if name in ("jit", "pjit", "closed_call"):  # The parts of jax.numpy.
    inner = settings["jaxpr"] if "jaxpr" in settings else settings["call_jaxpr"]
    whole = _function_name(equation) in (*_ONE, _RANDOM)
    return _run(inner, way._replace(each=None) if whole else way, *operands)
  if name in _CHAINS and settings["axes"] == (0,) and 0 < operands[0].shape[0] <= LONGEST:
    # The new term on the left: of two products in a sum a compiler fuses the left one's rounding
    # away, and in a reduction that is the newer.
    return [functools.reduce(lambda total, x: _CHAINS[name](x, total), list(operands[0]))]
  if name in _CHAINS and way.halves and _are_last(settings["axes"], operands[0].ndim):
    return [_by_halves(operands[0], len(settings["axes"]), name)]
  if name == "dot_general" and _is_few(operands, settings["dimension_numbers"]):
    return [_products(operands[0], operands[1], way)]
  bound = equation.primitive.get_bind_params(settings)  # A pair in other versions of jax.
  functions, settings = bound if isinstance(bound, tuple) else ((), bound)
  if name in ("while", "scan", "cond"):
    settings = {key: _inner(value, way) for key, value in settings.items()}
  out = equation.primitive.bind(*functions, *operands, **settings)
  return list(out) if equation.primitive.multiple_results else [out]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(program: core.ClosedJaxpr, way: _Way, *arguments: Any) -> list[Any]:
  """Runs a called program rewritten; jit's cache holds it for all its calls."""
  return _evaluate(program.jaxpr, program.consts, arguments, way)


def _is_few(operands: Sequence[Any], axes: Any) -> bool:
  """Returns whether a product is a Gram product of a few models."""
  (left, right), batch = axes
  rest = tuple(range(1, operands[0].ndim))
  pairs = operands[0].shape[0] * operands[1].shape[0]
  whole = tuple(left) == tuple(right) == rest and operands[0].ndim == operands[1].ndim
  return whole and batch == ((), ()) and 0 < pairs <= PAIRS


def _are_last(axes: Sequence[Any], rank: int) -> bool:
  return sorted(map(int, axes)) == list(range(rank - len(axes), rank))


def _by_halves(x: Any, axes: int = 1, name: str = "reduce_sum") -> Any:
  """Reduces the last axes by halves, each added to the other, down to `SHORTEST`."""
  join, short = _CHAINS[name], x.shape[: x.ndim - axes]
  length = math.prod(x.shape[x.ndim - axes :])
  x, odd = x.reshape(*short, length), []
  while length >= SHORTEST:
    if length % 2:
      odd.append(x[..., -1])
    length //= 2
    x = join(x[..., :length], x[..., length : 2 * length])
  dtype = {"dtype": x.dtype} if name in ("reduce_sum", "reduce_prod") else {}
  return functools.reduce(join, odd, _WHOLE[name](x, axis=-1, **dtype))


def _add_quarters(parts: Callable[[slice], list[Any]], size: int) -> Any:
  """Adds the quarters of vectors [size] up as they come: parts(places) -> [P, size / 4]."""
  step = size // 4
  quarters = [parts(slice(q * step, (q + 1) * step)) for q in range(4)]
  sums = [functools.reduce(jnp.add, same) for same in zip(*quarters, strict=True)]
  return lax.optimization_barrier(jnp.stack(sums))


def _products(x: Any, y: Any, way: _Way) -> Any:
  """Returns all inner products of two stacks: [K, *s], [M, *s] -> [K, M]."""
  n, m = x.shape[0], y.shape[0]
  pairs = [(i, j) for i in range(n) for j in range(m) if not (x is y and j < i)]
  size = math.prod(x.shape[1:])
  if way.halves and size % 4 == 0 and size >= SHORTEST:
    # All at once, and the first sums where the products are: a compiler fuses no more.
    left, right = (v.reshape(v.shape[0], size) for v in (x, y))
    sums = _by_halves(
      _add_quarters(lambda at: [left[i, at] * right[j, at] for i, j in pairs], size)
    )
  else:
    sums = [jnp.sum(x[i] * y[j]) for i, j in pairs]
  products = dict(zip(pairs, sums, strict=True))
  products |= {(j, i): each for (i, j), each in products.items() if x is y}
  return jnp.stack([jnp.stack([products[i, j] for j in range(m)]) for i in range(n)])


def _function_name(equation: Any) -> str | None:
  """Returns the name of the function that an equation calls."""
  return equation.params.get("name")


def _inner(setting: Any, way: _Way) -> Any:
  """Rewrites the programs of a loop or a branch."""
  if isinstance(setting, tuple):
    return tuple(_inner(part, way) for part in setting)
  if not isinstance(setting, core.ClosedJaxpr):
    return setting

  def run(*arguments: Any) -> list[Any]:
    return _evaluate(setting.jaxpr, setting.consts, arguments, way)

  return jax.make_jaxpr(run)(*setting.in_avals)
