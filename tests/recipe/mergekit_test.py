"""jaxmerge beside mergekit 0.1.5: its recorded outputs, case by case, to a few units of rounding.

A unit is the spacing of float32, or of the narrower dtype in which mergekit computed, at the
largest value of the merged tensor.
"""

import functools
import itertools

import jax
import mergekit_outputs
import ml_dtypes
import numpy as np
import pytest
import small
import synthetic_models
from marking import some_fast
from mergekit_outputs import CASES, EPS, RANDOM
from reference import spheres

import jaxmerge
from jaxmerge import methods
from jaxmerge.core import layouts
from jaxmerge.core.interpreter import Slice
from jaxmerge.drivers import streaming
from jaxmerge.recipe.mergekit import methods as recipe_methods
from jaxmerge.recipe.mergekit import precision as mergekit_precision
from jaxmerge.recipe.mergekit import translate

# A method is built once, and takes its numbers as arrays: another value does not compile again.
built = functools.cache(lambda name, settings: getattr(methods, name)(**dict(settings)))


def ours(case):
  """The method that a recipe with `compat: mergekit` would run, its numbers, and its inputs."""
  known = recipe_methods.METHODS[case.method]
  defaults = {n: p.default for n, p in known.parameters.items()}
  given = {**defaults, **case.parameters}
  each = {n: given[n] for n in known.each}
  each = {n: tuple(v if isinstance(v, list) else [v] * len(case.models)) for n, v in each.items()}
  shared = {n: given[n] for n in known.shared}
  own = translate.translate(case.method, shared, base=case.base, compat=True)
  numbers = {n: np.array(of({**shared, **each}), np.float64) for n, of in own.hparams.items()}
  numbers |= {"seed": 0} if known.random else {}
  return built(own.method, tuple(own.settings.items())), numbers, own


# Cases in a variant that is not here.
WITHOUT = {
  "task_arithmetic, zero sum": "divides by 1 where weights add up to zero; a recipe is refused",
}

# How far apart results may be, in units; 8 where nothing is said.
UNITS = {
  # As far as it is from its own formula in double precision; see `test_multislerp_is_its_formula`.
  "multislerp": 16,
}
# Which share of entries may be selected differently. Elsewhere only entries that tie are.
UNDECIDED = {
  # Divergences of nearly equal rows: differences of numbers near 1, in float32.
  "arcee_fusion": 1e-2,
}
TIED = 1e-5
# Which share of the samples has mergekit's bits where it computed in a narrow dtype.
EQUAL = {
  **dict.fromkeys(("passthrough", "task_arithmetic", "dare_linear", "dare_ties"), 1.0),
  **dict.fromkeys(("della", "della_linear"), 1.0),
  **dict.fromkeys(("linear", "slerp", "ties", "breadcrumbs_ties", "ram"), 0.98),
  **dict.fromkeys(("breadcrumbs", "sce", "ramplus_tl"), 0.9),
}
# Of the samples, how many may be selected otherwise because they tie.
TIED_NARROW = 0.02

# The first case of each of these runs always.
FAST = ("linear", "ties")
FIRST = {case.method: name for name, case in reversed(CASES.items()) if case.method in FAST}
MARKS = {"llama": (), "minilm": (pytest.mark.minilm, pytest.mark.slow)}
RUN = [
  pytest.param(
    name,
    base,
    id=f"{base}: {name}",
    marks=MARKS[base] if name in FIRST.values() else (*MARKS[base], pytest.mark.slow),
  )
  for name, case in CASES.items()
  for base in case.bases
  if name not in WITHOUT and case.dtype == "float32"
]
NARROW = [name for name, case in CASES.items() if case.dtype != "float32"]


def merged(case, trees, numbers=None):
  """What jaxmerge computes of the base and the fine-tuned models: tensor -> array."""
  method, own, translation = ours(case)
  models = ("base", *case.models) if translation.pair else case.models
  stack = {n: np.stack([trees[m][n] for m in models]) for n in trees["base"]}
  options = {"hparams": {**own, **(numbers or {})}, "layout": layout(trees["base"])}
  if translation.of_weights:
    return jaxmerge.merge(method, stack, **options)
  return jaxmerge.merge(method, stack, trees["base"], **options)


def alone(trees, tensor):
  """The trees of one tensor: those of one shape share a program."""
  return {m: {"tensor": tree[tensor]} for m, tree in trees.items()}


def layout(tensors):
  """Files of both models hold matrices as [out, in]; of a model that has some, vectors are none."""
  views = {n: "oi" if x.ndim == 2 else None for n, x in tensors.items()}
  return layouts.table({n: layouts.Rule(view, "as the files have it") for n, view in views.items()})


def test_every_method_that_mergekit_has_is_compared():
  assert {case.method for case in CASES.values()} == recipe_methods.MERGEKITS.keys()


@pytest.mark.parametrize("method", sorted({case.method for case in CASES.values()}))
def test_every_case_is_recorded(method):
  recorded = mergekit_outputs.read(method)
  for base in synthetic_models.BASES:
    cases = [n for n, case in CASES.items() if case.method == method and base in case.bases]
    assert recorded.get(f"{base}/cases", np.array([])).tolist() == cases


@pytest.mark.parametrize(("name", "base"), RUN)
def test_agrees_with_mergekit(name, base, request):
  """Merges one tensor after the other, as mergekit does; records how many samples differ."""
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
      apart = compare(tensor, x, theirs, models["base"][tensor], case.method)
      if case.method in UNDECIDED:
        at = mergekit_outputs.positions(tensor, x.size)
        assert not (apart & ~undecided(case, trees).reshape(-1)[at]).any(), tensor
      outside += int(apart.sum())
      total += len(theirs.samples)
  request.node.user_properties.append(("samples selected otherwise", f"{outside} of {total}"))
  assert outside <= UNDECIDED.get(case.method, TIED) * total


NEAR = 2  # Units.


def undecided(case, trees):
  """Entries that are as near to arcee_fusion's threshold as rounding in float32.

  Of a row's divergence, the sum of terms of both signs whose weights add up to 1, rounding leaves
  `NEAR` units of float32 at 1, however small it is; the quartiles are of what comes of that.
  """
  base, tuned = (trees[m]["tensor"].astype(np.float64) for m in ("base", *case.models))
  p, q = (np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) + 1e-8 for x in (tuned, base))
  divergence = np.sum(p * np.log(p / q), axis=-1, keepdims=True)
  sides = [np.abs(tuned - base) * (divergence + sign * NEAR * EPS) for sign in (-1, 1)]
  places = [int(share * (base.size - 1)) for share in (0.25, 0.5, 0.75)]
  low, high = (np.sort(side, axis=None)[places] for side in sides)
  least, most = low[1] + 1.5 * (low[2] - high[0]), high[1] + 1.5 * (high[2] - low[0])
  return (sides[1] >= least) & (sides[0] <= most)


@pytest.mark.parametrize(("model", "most"), [("first", 0.1), ("far", 1e-3)])
def test_few_entries_are_undecided(model, most):
  """So that to be one of them says something; of a model that is hardly changed nearly all are."""
  case, models = CASES[f"arcee_fusion, {model}"], mergekit_outputs.models("llama")
  names = models["base"].keys() - {synthetic_models.FROZEN}
  assert np.mean([undecided(case, alone(models, n)).mean() for n in names]) <= most


MULTISLERP = [p for p in RUN if CASES[p.values[0]].method == "multislerp"]


@pytest.mark.parametrize(("name", "base"), MULTISLERP)
def test_multislerp_is_its_formula(name, base, request):
  """In double precision, with its step in the tangent space: to 4 units, for every entry.

  Records how far mergekit's samples are from it, and all entries of jaxmerge.
  """
  case, models = CASES[name], mergekit_outputs.models(base)
  theirs, apart = mergekit_outputs.load(name, base), {"mergekit": 0.0, "jaxmerge": 0.0}
  weights = np.array(case.parameters["weight"])
  factor = 1.0 if case.parameters.get("normalize_weights", True) else weights.sum()
  for tensor in models["base"]:
    if tensor in mergekit_outputs.facts()["not finite"].get(name, {}).get(base, {}):
      continue
    trees = alone(models, tensor)
    wide = {m: tree["tensor"].astype(np.float64) for m, tree in trees.items()}
    zero = wide["base"] if case.base else 0.0
    taus = [{"tensor": wide[m] - zero} for m in case.models]
    right = zero + factor * spheres.multislerp(taus, weights)["tensor"]
    x = np.asarray(merged(case, trees)["tensor"], np.float64)
    unit = EPS * np.abs(right).max()
    assert np.abs(x - right).max() <= 4 * unit, tensor
    if unit and tensor not in mergekit_outputs.facts()["raises"].get(name, {}).get(base, {}):
      samples = right.reshape(-1)[mergekit_outputs.positions(tensor, right.size)]
      own = np.abs(theirs[tensor].samples - samples).max(), np.abs(x - right).max()
      apart = {n: max(a, float(b / unit)) for (n, a), b in zip(apart.items(), own, strict=True)}
  request.node.user_properties.append(("units from the formula", apart))


@pytest.mark.slow
def test_tensors_are_merged_together_as_one_by_one():
  case, models = CASES["ties, weights"], mergekit_outputs.models("llama")
  few = {m: dict(itertools.islice(tree.items(), 3)) for m, tree in models.items()}
  for tensor, x in merged(case, few).items():
    small.same(merged(case, alone(models, tensor)), {"tensor": x})


def compare(tensor, x, theirs, zero, method):
  """Asserts that counts and sums agree; returns which samples do not."""
  unit, units = EPS * theirs.largest, UNITS.get(method, 8)
  swapped = 2 + UNDECIDED.get(method, TIED) * x.size
  ours = mergekit_outputs.kept(tensor, x, zero)
  moved = np.abs(x - zero)
  # An entry that is just moved there may just not be here.
  least, most = ((moved > (8 + sign * units) * unit).sum() for sign in (1, -1))
  assert least - swapped <= theirs.moved <= most + swapped, tensor
  rounding = units * (unit * np.sqrt(x.size) + EPS * abs(theirs.total))
  assert abs(ours.total[0] - theirs.total) <= rounding + 2 * swapped * moved.max(), tensor
  return np.abs(ours.samples - theirs.samples) > units * unit


def narrow(case, trees):
  """What a recipe with `compat: mergekit` and a narrow `dtype` computes, in float32."""
  method, own, translation = ours(case)
  models = ("base", *case.models) if translation.pair else case.models
  base = None if translation.of_weights else {n: x.reshape(-1) for n, x in trees["base"].items()}
  stack = {n: np.stack([trees[m][n].reshape(-1) for m in models]) for n in trees["base"]}
  out = {n: np.empty(x.shape, np.float32) for n, x in trees["base"].items()}

  def read(name, start, stop, order, on_chunk):
    zero = None if base is None else base[name][start:stop]
    return Slice(zero, zero, stack[name][order, start:stop])

  def write(name, start, part):
    out[name].reshape(-1)[start : start + len(part)] = part

  precision = mergekit_precision.precision_of(translation.method, np.dtype(case.dtype))
  leaves = {n: jax.ShapeDtypeStruct(x.shape, np.float32) for n, x in out.items()}
  source = streaming.Source(leaves, len(models), read, dict.fromkeys(out, precision))
  streaming.stream(method, source, write, hparams=own, layout=layout(trees["base"]))
  return out


def tied(case, trees, tensor):
  """Entries at a threshold, which mergekit's sort selects or not.

  Task vectors tie exactly; variances count as tied within 8 units.
  """
  low = {m: tree[tensor].reshape(-1).astype(case.dtype) for m, tree in trees.items()}
  deltas = [np.abs(low[m] - low["base"]).astype(np.float32) for m in case.models]
  found = np.zeros(deltas[0].size, bool)
  if "select_topk" in case.parameters:
    signed = np.stack([low[m] - low["base"] for m in case.models]).astype(np.float32)
    size = signed.var(axis=0)
    at = np.sort(size)[-max(int(case.parameters["select_topk"] * (size > 0).sum()), 1)]
    return np.abs(size - at) <= 8 * ml_dtypes.finfo(case.dtype).eps * at
  density = case.parameters.get("density", 1.0)
  each = density if isinstance(density, list) else [density] * len(deltas)
  for size, share in zip(deltas, each, strict=True):
    kept = max(1, int(share * size.size))
    removed = min(int(case.parameters.get("gamma", 0) * size.size), size.size - kept)
    ordered = np.sort(size)[::-1]
    for rank in (removed, removed + kept):
      if 0 < rank < size.size and ordered[rank - 1] == ordered[rank]:
        found |= size == ordered[rank]
  return found


@pytest.mark.parametrize("name", some_fast(NARROW, []))
def test_agrees_with_mergekit_in_a_narrow_dtype(name, request):
  """To 8 units, but for entries that tie at a threshold; and mostly to the bit."""
  case, models = CASES[name], mergekit_outputs.models("llama")
  eps = float(ml_dtypes.finfo(case.dtype).eps)
  equal = swapped = total = 0
  for tensor, theirs in mergekit_outputs.load(name, "llama").items():
    trees = alone(models, tensor)
    x = narrow(case, trees)["tensor"]
    at = mergekit_outputs.positions(tensor, x.size)
    own, unit = x.reshape(-1)[at], eps * theirs.largest
    apart = np.abs(own - theirs.samples) > 8 * unit
    assert not (apart & ~tied(case, trees, "tensor")[at]).any(), tensor
    swapped += apart.sum()
    equal += (own == theirs.samples).sum()
    total += at.size
  request.node.user_properties.append(("samples selected otherwise", f"{swapped} of {total}"))
  assert equal >= EQUAL.get(case.method, 0) * total
  assert swapped <= TIED_NARROW * total


def test_a_narrow_dtype_is_another_result():
  """The tests above would not pass without rounding: in float32 task vectors differ visibly."""
  case, models = CASES["task_arithmetic, bfloat16"], mergekit_outputs.models("llama")
  tensor = "lm_head.weight"
  trees = alone(models, tensor)
  theirs = mergekit_outputs.load("task_arithmetic, bfloat16", "llama")[tensor]
  once = np.asarray(merged(case, trees)["tensor"]).astype("bfloat16").astype(np.float32)
  own = once.reshape(-1)[mergekit_outputs.positions(tensor, once.size)]
  assert (own != theirs.samples).mean() > 0.05


def test_what_selects_by_rounding_errors_is_refused():
  with pytest.raises(ValueError, match=r"arcee_fusion .* write dtype: float32 and out_dtype"):
    mergekit_precision.precision_of("arcee_fusion", np.dtype("bfloat16"))


@pytest.mark.parametrize("name", some_fast(RANDOM, ["dare_linear, plain"]))
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
