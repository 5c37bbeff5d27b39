"""jaxmerge beside mergekit 0.1.5: its recorded outputs, case by case, to a few units of rounding.

A unit is the spacing of float32 at the largest value of the merged tensor.
"""

import functools
import importlib.util
import itertools

import mergekit_outputs
import numpy as np
import pytest
import small
import synthetic_models
from mergekit_outputs import CASES, EPS, RANDOM

import jaxmerge
from jaxmerge import methods
from jaxmerge.stage import chain

# A method is built once, and takes its numbers as arrays: another value does not compile again.
built = functools.cache(lambda factory, **options: factory(**options))


@functools.cache
def banded():
  return chain(methods.band(0.5, 0.1), methods.weighted_sum(), methods.scaled(1.0))


@functools.cache
def mean_of_task_vectors():
  return chain(methods.average(), methods.scaled(1.0))


def each(value, weight):
  """A value per model."""
  return value if isinstance(value, list) else [value] * len(weight)


def reduce(p, default):
  return "mean" if p.get("normalize", default) else "sum"


AS_MERGEKIT = {"scope": "leaf", "rule": "exact", "zero_sum": "plus"}
# From mergekit's parameters to a method here, and its numbers.
OURS = {
  "linear": lambda p: (
    built(methods.average, normalize=p.get("normalize", True)),
    {"weight": p["weight"]},
  ),
  "task_arithmetic": lambda p: (
    mean_of_task_vectors() if p.get("normalize") else built(methods.task_arithmetic),
    {"weight": p["weight"], "scale": p.get("lambda", 1.0)},
  ),
  "ties": lambda p: (
    built(methods.ties, reduce=reduce(p, True), **AS_MERGEKIT),
    {
      "density": each(p["density"], p["weight"]),
      "weight": p["weight"],
      "scale": p.get("lambda", 1.0),
    },
  ),
  "breadcrumbs": lambda p: (
    banded(),
    {
      "keep": p["density"],
      "remove": p["gamma"] if p["density"] < 1 else 0.0,
      "weight": p["weight"],
      "scale": p["lambda"],
    },
  ),
  "dare_linear": lambda p: (
    built(methods.dare, rescale="l1" if p.get("rescale", True) else None),
    {
      "drop_rate": 1 - p.get("density", 1.0),
      "weight": p["weight"],
      "scale": p.get("lambda", 1.0),
      "seed": 0,
    },
  ),
  "dare_ties": lambda p: (
    built(methods.dare_ties, density=1.0, rescale="l1", reduce=reduce(p, False), **AS_MERGEKIT),
    {"drop_rate": 0.0, "weight": p["weight"], "scale": 1.0, "seed": 0},
  ),
}

# What mergekit calls the base is here the first of the models that are blended.
BASE_IS_A_MODEL = {"slerp"}

# Methods of mergekit that have no factory here yet. Each will be a line of OURS.
TO_FILL_IN = {
  "arcee_fusion",
  "breadcrumbs_ties",
  "della",
  "della_linear",
  "karcher",
  "model_stock",
  "multislerp",
  "nearswap",
  "nuslerp",
  "passthrough",
  "ram",
  "ramplus_tl",
  "sce",
  "slerp",
}

# Cases of methods that are here, but not in this variant.
WITHOUT = {
  "linear, bfloat16": "computes in bfloat16; here in float32",
  "task_arithmetic, bfloat16": "computes in bfloat16; here in float32",
  "ties, bfloat16": "computes in bfloat16; here in float32",
  "task_arithmetic, zero sum": "divides by 1 where weights add up to zero; here refused",
  "ties, one entry at least": "keeps one entry where floor(density * d) is zero; here none",
  "ties, rescale": "restores the L1 norm after trimming",
  "breadcrumbs, rescale": "restores the L1 norm after trimming",
  "breadcrumbs, less removed than asked for": "keeps its density by removing fewer of the largest",
}

# How far apart results may be, in units; 8 where nothing is said.
UNITS = {
  # Its norms of 10**5 entries, in float32, are off by 10 units, and enter twice.
  "multislerp": 32,
}
# Which share of entries may be selected differently. Elsewhere only entries that tie are.
UNDECIDED = {
  # Divergences of nearly equal rows: differences of numbers near 1, in float32.
  "arcee_fusion": 1e-2,
}
TIED = 1e-5

needs_minilm = pytest.mark.skipif(
  importlib.util.find_spec(synthetic_models.MINILM) is None,
  reason="the weights of all-MiniLM-L6-v2 are not installed",
)
MARKS = {"llama": (), "minilm": (needs_minilm, pytest.mark.slow)}
RUN = [
  pytest.param(name, base, id=f"{base}: {name}", marks=MARKS[base])
  for name, case in CASES.items()
  for base in case.bases
  if case.method in OURS and name not in WITHOUT
]


def merged(case, trees, numbers=None):
  """What jaxmerge computes of the base and the fine-tuned models: tensor -> array."""
  method, own = OURS[case.method](case.parameters)
  blended = case.method in BASE_IS_A_MODEL
  models = ("base", *case.models) if blended else case.models
  stack = {n: np.stack([trees[m][n] for m in models]) for n in trees["base"]}
  options = {"aux": {**own, **(numbers or {})}, "layout": layout(trees["base"])}
  if case.base and not blended:
    return jaxmerge.merge(method, trees["base"], stack, **options)
  return jaxmerge.blend(method, stack, **options)


def alone(trees, tensor):
  """The trees of one tensor: those of one shape share a program."""
  return {m: {"tensor": tree[tensor]} for m, tree in trees.items()}


def layout(tensors):
  """Files of both models hold matrices as [out, in]."""
  return tuple((f"^{n}$", "oi") for n, x in tensors.items() if x.ndim == 2)


def test_every_method_is_compared_or_listed():
  """Fails where a listed method has a factory by now: it is time for its line."""
  assert OURS.keys() | TO_FILL_IN == {case.method for case in CASES.values()}
  assert not OURS.keys() & TO_FILL_IN
  assert not TO_FILL_IN & set(methods.__all__)
  assert {CASES[name].method for name in WITHOUT} <= OURS.keys()


@pytest.mark.parametrize("method", sorted({case.method for case in CASES.values()}))
def test_every_case_is_recorded(method):
  recorded = mergekit_outputs.read(method)
  for base in synthetic_models.BASES:
    cases = [n for n, case in CASES.items() if case.method == method and base in case.bases]
    assert recorded.get(f"{base}/cases", np.array([])).tolist() == cases


@pytest.mark.parametrize(("name", "base"), RUN)
def test_agrees_with_mergekit(name, base):
  """Merges one tensor after the other, as mergekit does."""
  case, facts = CASES[name], mergekit_outputs.facts()
  models = mergekit_outputs.models(base)
  outside = total = 0
  for tensor, theirs in mergekit_outputs.load(name, base).items():
    trees = alone(models, tensor)
    if tensor in facts["not finite"].get(name, {}).get(base, {}):
      with pytest.raises(ValueError, match="zero"):
        merged(case, trees)
      continue
    x = np.asarray(merged(case, trees)["tensor"], np.float64)
    assert np.isfinite(x).all(), tensor
    if tensor not in facts["raises"].get(name, {}).get(base, {}):
      outside += compare(tensor, x, theirs, models["base"][tensor], case.method)
      total += len(theirs.samples)
  assert outside <= UNDECIDED.get(case.method, TIED) * total


def test_tensors_are_merged_together_as_one_by_one():
  case, models = CASES["ties, weights"], mergekit_outputs.models("llama")
  few = {m: dict(itertools.islice(tree.items(), 3)) for m, tree in models.items()}
  for tensor, x in merged(case, few).items():
    small.same(merged(case, alone(models, tensor)), {"tensor": x})


def compare(tensor, x, theirs, zero, method):
  """Asserts that counts and sums agree; returns how many samples do not."""
  unit, units = EPS * theirs.largest, UNITS.get(method, 8)
  swapped = 2 + UNDECIDED.get(method, TIED) * x.size
  ours = mergekit_outputs.kept(tensor, x, zero)
  moved = np.abs(x - zero)
  # An entry that is just moved there may just not be here.
  least, most = ((moved > (8 + sign * units) * unit).sum() for sign in (1, -1))
  assert least - swapped <= theirs.moved <= most + swapped, tensor
  rounding = units * (unit * np.sqrt(x.size) + EPS * abs(theirs.total))
  assert abs(ours.total[0] - theirs.total) <= rounding + 2 * swapped * moved.max(), tensor
  return int((np.abs(ours.samples - theirs.samples) > units * unit).sum())


@pytest.mark.parametrize("name", [n for n, case in RANDOM.items() if case.method in OURS])
def test_random_masks_have_the_moments_of_mergekits(name):
  """Means over seeds, to five deviations of their difference."""
  case = RANDOM[name]
  recorded = mergekit_outputs.facts()["random"][name]
  models = mergekit_outputs.models("llama")
  tau = {n: models["far"][n].astype(np.float64) - models["base"][n] for n in recorded}
  trees = {m: {n: tree[n] for n in recorded} for m, tree in models.items()}
  outs = [merged(case, trees, {"seed": s}) for s in range(16)]
  for tensor, theirs in recorded.items():
    own = [np.asarray(out[tensor], np.float64) - models["base"][tensor] for out in outs]
    ours = np.mean([mergekit_outputs.moments(x, tau[tensor]) for x in own], axis=0)
    deviation = np.array(theirs["deviation"]) * np.sqrt(1 / theirs["seeds"] + 1 / len(outs))
    assert (np.abs(ours - theirs["mean"]) <= 5 * deviation + 1e-6).all(), tensor
