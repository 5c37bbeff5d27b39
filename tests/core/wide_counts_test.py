"""Counts past what one integer holds, and shares of them."""

import fractions
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmerge.core import wide_counts

HEIGHT = 2


def limbs(counts):
  return np.stack([wide_counts.limbs(n) for n in counts], axis=1)


def integers(pair):
  return [(int(high) << wide_counts.LIMB) + int(low) for high, low in np.asarray(pair).T]


# --- Counts ---


@given(st.integers(0, 2**47 - 1), st.integers(0, 2**47 - 1))
def test_arithmetic_of_limbs_is_that_of_integers(a, b):
  a, b = max(a, b), min(a, b)
  x, y = limbs([a, b]), limbs([b, b])
  assert integers(wide_counts.minus(jnp.asarray(x), jnp.asarray(y))) == [a - b, 0]
  assert wide_counts.at_least(x, y).tolist() == [True, True]
  assert wide_counts.at_least(y, x).tolist() == [a == b, True]
  assert integers(wide_counts.plus(x, y)) == [a + b, 2 * b]
  assert integers(wide_counts.at_most(jnp.asarray(x), b)) == [b, b]


def test_many_partial_counts_do_not_overflow():
  """2**17 slices with full low limbs: a sum without carries would pass 2**32."""
  part = jnp.asarray(limbs([2**16 - 1]))
  total = jax.lax.fori_loop(
    0, 2**17, lambda _, n: wide_counts.plus(n, part), jnp.asarray(limbs([0]))
  )
  assert integers(total) == [2**17 * (2**16 - 1)]


@pytest.mark.parametrize("shape", [(40,), (9, 33), (33, 9), (7, 5, 31), (1, 64), (16, 1, 1)])
def test_counting_in_limbs(shape, monkeypatch):
  """The path for leaves past 2**32 entries, at a scale where it can be run."""
  mask = np.random.default_rng(0).random((HEIGHT, *shape)) < 0.9
  expected = mask.reshape(HEIGHT, -1).sum(axis=1).tolist()
  assert integers(wide_counts.count(jnp.asarray(mask))) == expected
  monkeypatch.setattr(wide_counts, "LIMB", 4)
  monkeypatch.setattr(wide_counts, "ROOM", 2**4)
  found, others = wide_counts.counts([jnp.asarray(mask), jnp.asarray(~mask)])
  assert integers(found) == expected
  assert integers(others) == [math.prod(shape) - n for n in expected]
  assert (np.asarray(found[1]) < 2**4).all()


def test_the_limb_path_takes_leaves_past_one_integer():
  found = jax.eval_shape(wide_counts.count, jax.ShapeDtypeStruct((3, 2**17, 2**17), bool))
  assert (found.shape, found.dtype) == ((2, 3), jnp.uint32)


@pytest.mark.slow
def test_counting_past_one_integer():
  """A mask that is never in memory: the compiler counts it as it makes it."""

  @jax.jit
  def counted(n):
    column = jnp.broadcast_to(
      jax.lax.broadcasted_iota(jnp.int32, (2**16,), 0), (1, 2**16 + 1, 2**16)
    )
    return wide_counts.count(column < n)

  assert integers(counted(2**16 - 1)) == [(2**16 - 1) * (2**16 + 1)]


# --- Shares ---

fractions_of = st.one_of(
  st.floats(0, 1), st.integers(0, 1000).map(lambda n: n / 1000), st.sampled_from([1e-7, 1 - 2**-24])
)
sizes = st.one_of(st.integers(1, 10**4), st.integers(1, 2**47 - 1))


@settings(max_examples=200)
@given(fractions_of, sizes, st.integers(0, 1))
def test_shares_on_the_host_are_those_of_python(fraction, size, more):
  expected = min(int(fraction * size) + more, size)
  assert integers(wide_counts.share(fraction, size, 2, more=more)) == [expected] * 2
  assert integers(wide_counts.share((fraction, 1.0), size, 2, more=more)) == [expected, size]


def test_a_short_float_means_its_decimal():
  assert integers(wide_counts.share(np.float32(0.7), 10, 1)) == [7]
  assert integers(wide_counts.share(np.array([0.7, 0.29], np.float32), 1000, 2)) == [700, 290]


SIZES = (1, 7, 10, 1000, 12345, 10**6, 2**24 + 1, 2**31 + 7, 10**11, 2**47 - 1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def traced(fraction, size, more):
  return wide_counts.share(fraction, size, fraction.shape[0], more=more)


@pytest.mark.parametrize("size", SIZES)
def test_traced_shares_round_as_documented(size):
  """floor((f + half a unit in f's last place) * size), and never more than all."""
  rng = np.random.default_rng(0)
  some = np.concatenate([rng.random(100), 10 ** -rng.uniform(0, 6, 100), [0, 1, 1 - 2**-24, 0.5]])
  some = some.astype(np.float32)
  for more in (0, 1):
    for f, n in zip(some, integers(traced(some, size, more)), strict=True):
      exponent = np.frexp(f)[1]
      half = fractions.Fraction(2) ** int(exponent - 25) if f else fractions.Fraction(0)
      exact = size if f == 1 else int((fractions.Fraction(float(f)) + half) * size)
      assert n == min(exact + more, size), f


@pytest.mark.parametrize("size", [10, 1000, 2000, 10**5])
def test_traced_shares_of_decimals_are_exact(size):
  """Where Python's product falls short of a whole number, as 0.29 * 100 does, by one more."""
  steps = np.arange(1001)
  decimal = steps * size // 1000
  assert integers(traced((steps / 1000).astype(np.float32), size, 0)) == decimal.tolist()


@pytest.mark.parametrize("size", [0, 1, 10, 2**31 + 7])
def test_shares_of_at_least_some(size):
  for fraction in (0.001, jnp.float32(0.001)):
    found = integers(wide_counts.share(fraction, size, 2, least=1))
    assert found == [min(max(size // 1000, 1), size)] * 2


@given(st.integers(0, 2**47 - 1), st.floats(0, 1, width=32))
def test_parts_of_counts_that_are_measured(size, fraction):
  """As shares of a size that is known before."""
  part = wide_counts.part(jnp.array([fraction], jnp.float32), jnp.asarray(limbs([size])))
  assert integers(part) == integers(wide_counts.share(jnp.float32(fraction), size, 1))
