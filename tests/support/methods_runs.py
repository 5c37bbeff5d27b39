"""What the common table of tests runs and compares with: programs of many rows, and tolerances.

Compiling is what takes the time. Columns that need a program of their own run many rows in one
(`GROUPS`); columns that do not, whatever their values, use the program of `eager`.
"""

import functools

import jax
import numpy as np
import pytest
import rounding
import small
from methods_columns import COLUMNS, MAIN
from methods_table import EIGHT, SEED, SLACKS, TABLE, WEIGHT
from reference import basics

import jaxmerge
from jaxmerge.core import stage

ATOL = rounding.FLOOR


def marked(names, fast=None):
  """Names of rows or groups for a test, which runs under several kernels where they decompose.

  Where some are called fast, the others are slow.
  """
  names = list(names)
  kernels = {n: bool(TABLE[n.removesuffix(" and on")].decomposes) for n in names}
  slow = {n: fast is not None and n not in fast for n in names}
  both = (pytest.mark.kernels, kernels), (pytest.mark.slow, slow)
  return [pytest.param(n, marks=[mark for mark, own in both if own[n]]) for n in names]


GROUPS = {
  f"{names[0]} and on": names
  for kind in (False, True)
  if (alike := [n for n in MAIN if bool(TABLE[n].decomposes) == kind])
  for i in range(0, len(alike), 16)
  if (names := alike[i : i + 16])
}


@functools.cache
def eager(name):
  """What most columns compare with: (base, models, merged), whole and on one device."""
  row = TABLE[name]
  base, models = row.trees(small.ALL)
  return base, models, merged(row, base, models)


def merged(row, base, models, **options):
  return jax.tree.map(
    np.asarray, jaxmerge.merge(row.method, models, base, **row.options(**options))
  )


def of(group, column):
  """The rows of a group that a column is about."""
  return [n for n in GROUPS[group] if n in COLUMNS[column]]


@functools.cache
def program(names):
  """One program that merges by many methods: {name: (base, models, numbers)} -> {name: merged}."""

  @jax.jit
  def run(given):
    return {
      n: jaxmerge.merge(TABLE[n].method, models, base, hparams=hparams, **TABLE[n].options())
      for n, (base, models, hparams) in given.items()
    }

  return lambda given: jax.device_get(run({n: given[n] for n in names}))


def numbers(name, height=None):
  """The numbers of a row, as arrays, so that others need no other program."""
  own = {n: v for n, v in stage.hparams(TABLE[name].method).items() if n != "seed"}
  more = {WEIGHT: EIGHT, SLACKS[:4]: SLACKS}
  if height:
    own = {n: more.get(v, v)[:height] if isinstance(v, tuple) else v for n, v in own.items()}
  return {n: np.asarray(v, np.float32) for n, v in own.items()}


@functools.cache
def few(group):
  """A tree of one matrix: (arguments, merged) of all rows of a group."""
  given = {n: (*TABLE[n].trees(small.FEW), numbers(n)) for n in GROUPS[group]}
  return given, program(tuple(GROUPS[group]))(given)


def alike(name, found, out, leaves=small.FEW):
  """Bits, or what is left to sums that are made in another order."""
  if TABLE[name].summed:
    small.close(found, out, apart(name, leaves))
  else:
    small.same(found, out)


def far(row, base, models):
  """How far a merge may be from the transcription, leaf by leaf."""
  if not row.decomposes:
    return dict.fromkeys(base, ATOL)

  def exact(taus):
    return expected(row, base, {n: base[n] + x for n, x in taus.items()})

  whole = {n: x for n, x in base.items() if x.dtype == np.float32}
  taus = {n: np.asarray(models[n], np.float64) - x for n, x in whole.items()}
  over_models = row.decomposes == "products"
  return rounding.bound(exact, taus, sum(x.size for x in whole.values()) if over_models else 1)


@functools.cache
def bounds(name, leaves=small.FEW, height=None):
  """That of the small trees."""
  return far(TABLE[name], *TABLE[name].trees(leaves, height))


def apart(name, leaves=small.FEW):
  """How far two merges of the small trees may be from each other, none of which is exact."""
  return rounding.twice(bounds(name, leaves)) if TABLE[name].decomposes else ATOL


def draw(k, leaf, shape):
  """The random numbers of a model called str(k): a transcription of the hash."""
  return basics.uniform(SEED, leaf, str(k), shape)


def expected(row, base, models):
  """Base plus the transcription's task vector; integers are the base's."""
  tau = row.oracle(basics.deltas(base, models), draw, *([base] if row.based else []))
  return {n: base[n] + tau[n] if n in tau else base[n] for n in base}


def drawn(row, seed, kind):
  """A random tree, and models whose sums and differences are exact, so that no sign hangs by one.

  In float32 as in float64: entries of the base are multiples of 2**-6, task vectors of 2**-16.
  """
  rng = np.random.default_rng(seed)
  base, models = row.trees(small.ALL)
  for n, x in base.items():
    if n == "steps":
      continue
    zero = np.round(x * 64) / 64
    tau = rng.normal(size=models[n].shape) * {"large": 1.0, "small": 2**-6}.get(kind, 0.125)
    if kind == "sparse":
      tau = tau * (rng.random(tau.shape) < 0.2)
    if kind == "one alone":
      tau[1:] = 0
    if row.steep:
      tau = tau / 4 + rng.normal(size=zero.shape) / 8
      tau = (
        tau if zero.shape else np.abs(tau)
      )  # Two numbers that differ in sign have no mean angle.
    tau = np.round(tau * 2**16) / 2**16
    base[n], models[n] = zero.astype(np.float32), (zero + tau).astype(np.float32)
  return base, models
