"""Merges beside what the authors' code, or that of their colleagues, makes of the same inputs.

The outputs are recorded, see `tests/support/oracles/record.py`; `tests/recipe/mergekit_test.py` has
those of mergekit. What differs on purpose is in docs/deviations.md. Recorded in float64, but for
OptMerge: what decomposes is as far from that as float32 has to be (`tests/support/rounding.py`).
"""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import rounding
from reference import descent, spectra, subspaces

import jaxmerge
from jaxmerge import methods, mixtures
from jaxmerge.adapters import combine, lora
from jaxmerge.core import stage

BASE, TAUS = oracles.inputs()
RECORDED = oracles.recorded()
WEIGHT = (1.0, 0.5, 2.0, 1.5)
VIEWS = (("matrix", "oi"), ("square", "oi"))  # As transcriptions look names up.
METHODS = {
  "iso_c": methods.iso_c(),
  "iso_cts": methods.iso_cts(common=0.5),
  "tsv": methods.tsv(),
  "ties, mean": methods.ties(0.3),
  "ties, sum": methods.ties(0.3, reduce="sum"),
  "ties, max": methods.ties(0.3, reduce="max"),
  "optmerge, full": methods.optmerge(1.0, "full", 1e-5, 300),
  "optmerge, lora": methods.optmerge(1.0, "lora", 1e-4, 300),
  "doge": methods.doge(1.0, 0.07, 0.3, 6),
  "wudi": methods.wudi(steps=40),
  "magmax": methods.magmax(1.0),
  "peft, task_arithmetic": methods.task_arithmetic(1.0, WEIGHT),
  "drm, horizontal": methods.drm(1.0, 0.5, "horizontal"),
  "drm, vertical": methods.drm(1.0, 0.5, "vertical"),
  "pcb": methods.pcb(0.1, 1.0),
  "median": methods.median(),
  "trimmed_mean": methods.trimmed_mean(1),
  # Asked for 1: theirs counts as many neighbours as the paper for one outlier less.
  "krum": methods.krum(0, 2),
  "ram": methods.ram(oracles.THRESHOLD),
  "ramplus": methods.ramplus_tl(oracles.THRESHOLD, boost=0.2, limit=1.0, scope="tree"),
}
RULES = {
  "iso_c": spectra.flat,
  "iso_cts": lambda xs: spectra.iso_cts(xs, 0.5),
  "tsv": spectra.tsv,
  "drm, horizontal": lambda xs: subspaces.drm(xs, 0.5, "horizontal"),
  "drm, vertical": lambda xs: subspaces.drm(xs, 0.5, "vertical"),
  "optmerge, full": lambda xs: descent.optmerge(xs, "full", 1e-5, 300),
  "optmerge, lora": lambda xs: descent.optmerge(xs, "lora", 1e-4, 300),
}
DECOMPOSE = (*RULES, "doge", "opcm, before it is scaled", "flag, sum of projections")


def case_of(name):
  """A parameter of a test, which runs under several kernels where its method decomposes."""
  return pytest.param(name, marks=pytest.mark.kernels) if name in DECOMPOSE else name


def bounds(case, exact=None):
  """How far float32 may be from a case, leaf by leaf."""
  exact = exact or (lambda taus: spectra.by_matrix(RULES[case], taus, 1.0, VIEWS))

  def of_stacks(stacks):
    return exact([{n: x[k] for n, x in stacks.items()} for k in range(oracles.HEIGHT)])

  stacks = {n: np.stack([t[n] for t in TAUS]) for n in RECORDED[case]}
  return rounding.bound(of_stacks, stacks)


def stack(leaves):
  """The task vectors as models on a base of zero, in float32."""
  return {n: jnp.asarray(np.stack([t[n] for t in TAUS]), jnp.float32) for n in leaves}


def agree(found, case, limits=None):
  for n, x in RECORDED[case].items():
    far = limits[n] if limits else 1e-5
    np.testing.assert_allclose(np.asarray(found[n]), x, rtol=0, atol=far, err_msg=f"{case}: {n}")


@pytest.mark.parametrize("case", [case_of(name) for name in METHODS])
def test_agrees_with_the_reference(case):
  leaves = RECORDED[case]
  base = {n: jnp.zeros(x.shape) for n, x in leaves.items()}
  limits = bounds(case) if case in RULES else None
  limits = rounding.twice(limits) if case.startswith("optmerge") else limits
  agree(jaxmerge.merge(METHODS[case], stack(leaves), base, layout=oracles.VIEWS), case, limits)


def test_peft_prunes_by_magnitude():
  """A trim by leaf, and a weighted sum: a chain of stages."""
  trimmed = methods.trim(0.3, scope="leaf", rule="exact")
  case = "peft, magnitude_prune"
  method = stage.chain(trimmed, methods.weighted_sum(WEIGHT))
  agree(jaxmerge.merge(method, stack(RECORDED[case]), deltas=True), case)


def test_peft_votes_without_weights_and_counts():
  """Its signs are those of the plain sum, and its mean divides by the number that agree."""
  case = "peft, ties"
  trimmed = methods.trim(0.3, scope="leaf", rule="exact")
  joined = methods.weighted(WEIGHT), methods.disjoint_mean(None)
  method = stage.chain(trimmed, methods.elect_sign("plus"), *joined)
  agree(jaxmerge.merge(method, stack(RECORDED[case]), deltas=True), case)


def test_peft_stacks_adapters():
  each = [
    {"w": lora.Lora(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), scale)}
    for a, b, scale in oracles.adapters()
  ]
  found = combine.flora(each, WEIGHT)["w"]
  agree({"a": found.a, "b": found.b}, "peft, cat")


@pytest.mark.slow
@pytest.mark.kernels
def test_opcm_before_it_is_scaled():
  """The reference scales after each model; the directions do not depend on it."""
  case = "opcm, before it is scaled"
  models = stack(RECORDED[case])
  found = jaxmerge.merge(methods.opcm(), models, layout=oracles.VIEWS, deltas=True)
  norms = [np.sqrt(sum(np.sum(x[k] ** 2) for x in models.values())) for k in range(oracles.HEIGHT)]
  whole = np.sqrt(sum(np.sum(np.asarray(x) ** 2) for x in found.values()))
  np.testing.assert_allclose(whole, np.mean(norms), rtol=1e-5)
  size = np.sqrt(sum(np.sum(x**2) for x in RECORDED[case].values()))
  limits = bounds(case, lambda taus: subspaces.opcm(taus, 0.5, VIEWS))
  scaled = {n: x * size / whole for n, x in limits.items()}
  agree({n: x * size / whole for n, x in found.items()}, case, scaled)


@pytest.mark.kernels
def test_flag_before_it_has_a_norm():
  """The reference adds the projections of directions up, and leaves the norm to the caller."""
  case = "flag, sum of projections"
  found = jaxmerge.merge(methods.flag(rank=2, steps=10), stack(RECORDED[case]), deltas=True)
  norms = [np.sqrt(sum(np.sum(x**2) for x in t.values())) for t in TAUS]
  factor = oracles.HEIGHT / np.sort(norms)[1]  # Of the median, the lower one of two.
  # The descent ends where a sum of float32 grows, which is near its end, but not at it.
  agree({n: x * factor for n, x in found.items()}, case, dict.fromkeys(found, 5e-5))


def test_widen_compares_with_a_base():
  base = {n: jnp.asarray(x, jnp.float32) for n, x in BASE.items()}
  models = {n: base[n][None] + x for n, x in stack(BASE).items()}
  merged = jaxmerge.merge(methods.widen(), models, base, layout=oracles.VIEWS)
  agree({n: merged[n] - x for n, x in base.items()}, "widen")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["emr", "tall_masks"])
def test_bundles_agree_task_by_task(kind):
  leaves = RECORDED[f"{kind}, task 0"]
  base = {n: jnp.zeros(x.shape) for n, x in leaves.items()}
  names = [f"task {k}" for k in range(oracles.HEIGHT)]
  made = getattr(mixtures, kind)(base, stack(leaves), names=names)
  for name in names:
    agree(made.for_task(name), f"{kind}, {name}")


def test_consensus_counts_the_masks_of_the_reference():
  leaves = RECORDED["tall_masks, task 0"]
  masks = [RECORDED[f"tall_masks, task {k}"] for k in range(oracles.HEIGHT)]
  found = jaxmerge.merge(methods.consensus(1.0, 0.4, 2), stack(leaves), deltas=True)
  for n in leaves:
    used = np.sum([m[n] != 0 for m in masks], axis=0) >= 2
    np.testing.assert_array_equal(np.asarray(found[n]) != 0, used, err_msg=n)


def test_every_case_is_compared():
  every = {*METHODS, "peft, magnitude_prune", "peft, ties", "opcm, before it is scaled"}
  every |= {"peft, cat", "flag, sum of projections", "widen"}
  every |= {f"{kind}, task {k}" for kind in ("emr", "tall_masks") for k in range(oracles.HEIGHT)}
  assert every == RECORDED.keys()
