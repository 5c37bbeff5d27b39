"""The rows of the common table of tests: every method, and what is known of it."""

from typing import NamedTuple

import numpy as np
import small
from reference import basics, descent, entries, robust, spectra, spheres, subspaces

from jaxmerge import methods


class Row(NamedTuple):
  """A method and what is known of it.

  Attributes:
    method: the method.
    oracle: (task vectors, draw) -> merged task vector, by the transcription in NumPy; random
      numbers are draw(k, leaf, shape).
    vary: values of its numbers besides the scale, to vectorise over.
    seeded: it needs a seed.
    summed: it measures sums of floats, whose last bits depend on how leaves are cut.
    homogeneous: a multiple of the task vectors gives that multiple of the result.
    times: by which that is tried; a number in units of weights allows no others.
    height: number of models.
    one: it also takes one model.
    weights: it merges weights, as if the base were zero.
    based: the transcription takes the base as well.
    decomposes: "matrices" or inner "products" of models: results are compared within
      `rounding.bound`.
    adam: Adam descends, whose steps are as long where nothing is left to descend: of one model that
      is changed alone, rounding errors are all that moves it.
    steep: rounding errors grow: which direction is the first, which of two near zero counts, or how
      far a descent has come hangs by them. Random models have something in common then.
  """

  method: tuple
  oracle: object
  vary: dict
  seeded: bool = False
  summed: bool = False
  homogeneous: bool = True
  times: tuple = (8, 2.0**-100, 2.0**120)
  height: int = 4
  one: bool = True
  weights: bool = False
  based: bool = False
  decomposes: str = ""
  adam: bool = False
  steep: bool = False

  def options(self, **more):
    return {**({"seed": SEED} if self.seeded else {}), "layout": small.VIEWS, **more}

  def trees(self, leaves, height=None):
    """A base and a stack of models; weights are task vectors from zero."""
    base, models = small.trees(leaves, height=height or self.height)
    if self.weights:
      base = {n: np.zeros_like(x) if x.dtype == np.float32 else x for n, x in base.items()}
    return base, models


SEED = 11
EIGHT = (1.0, 0.5, 2.0, 1.5, 0.25, 1.0, 3.0, 0.75)  # Of as many models as any test has.
WEIGHT = EIGHT[:4]
SLACKS = (0.0, 0.5, 0.0, 2.0, 0.25, 0.0, 0.0, 1.0)
PAIR = (1.0, 3.0)
RATE = 0.4
WEIGHTS = {"weight": (WEIGHT, (1.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0))}
PAIRS = {"weight": (PAIR, (1.0, 0.0), (1.0, 1.0))}


def _ties(*args, **options):
  density, scale = 0.3, 0.5
  return Row(
    methods.ties(density, scale, *args, **options),
    lambda taus, draw: basics.ties(
      taus, density, scale, *(EIGHT if a is WEIGHT else a for a in args), **options
    ),
    {"density": (0.3, 0.7, 1.0), **(WEIGHTS if args else {})},
    summed=options.get("rescale") in ("l1", "l2"),
  )


def dropped(taus, draw, rescale):
  keep = [
    {n: draw(k, n, x.shape) >= np.float32(RATE) for n, x in t.items()} for k, t in enumerate(taus)
  ]
  return basics.dare(taus, keep, RATE, rescale)


def _dare(rescale, **options):
  return Row(
    methods.dare(RATE, 0.5, WEIGHT, rescale, **options),
    lambda taus, draw: basics.weighted_sum(dropped(taus, draw, rescale), EIGHT, 0.5, **options),
    {"drop_rate": (0.0, 0.3, 1.0), **WEIGHTS},
    seeded=True,
    summed=rescale in ("l1", "l2"),
  )


def _breadcrumbs(scope, yields="keep"):
  keep, remove = (0.5, 0.2) if yields == "keep" else (0.7, 0.4)
  return Row(
    methods.breadcrumbs(keep, remove, 0.5, scope=scope, yields=yields),
    lambda taus, draw: basics.breadcrumbs(taus, keep, remove, 0.5, scope, small.BY_NAME, yields),
    {"keep": (0.5, 0.3, 1.0), "remove": (0.1, 0.0, 0.7)},
  )


def _della(rescale):
  density, epsilon = 0.5, 0.2
  return Row(
    methods.della(density, epsilon, 0.5, WEIGHT, rescale),
    lambda taus, draw: basics.elected(
      basics.della(taus, draw, density, epsilon, rescale, small.BY_NAME),
      0.5,
      EIGHT,
      "mean",
      "plus",
    ),
    {"density": (0.5, 0.3, 1.0), "epsilon": (0.2, 0.0, 0.1), **WEIGHTS},
    seeded=True,
    summed=rescale == "l1",
  )


def _spherical(method, oracle, vary, **options):
  return Row(method, lambda taus, draw: oracle(taus), vary, summed=True, **options)


def _nuslerp(scope):
  return _spherical(
    methods.nuslerp(PAIR, scope),
    lambda taus: spheres.nuslerp(taus, PAIR, scope, small.BY_NAME),
    PAIRS,
    height=2,
    one=False,
  )


def _stock(scope, clip):
  return _spherical(
    methods.model_stock(scope, clip),
    lambda taus: spheres.model_stock(taus, scope, small.BY_NAME, clip),
    {"floor": (0.0, 1e-6, 0.1)},
    height=3,
    one=False,
  )


def _krum(scope):
  return Row(
    methods.krum(0, 2, scope),
    lambda taus, draw: robust.krum(taus, 0, 2, scope),
    {},
    summed=True,
    one=False,
  )


def _matrices(method, rule, vary, homogeneous, decomposes="matrices"):
  return Row(
    method,
    lambda taus, draw: spectra.by_matrix(rule, taus, 0.5, small.BY_NAME),
    vary,
    summed=True,
    homogeneous=homogeneous,
    decomposes=decomposes,
  )


def _spectral(method, rule):
  return _matrices(method, rule, {"rank_tol": (1e-6, 0.0, 1e-3)}, homogeneous=True)


def _descent(method, rule, adam=True, **options):
  vary = {"learning_rate": (1e-4, 0.0, 1e-3)}
  return _matrices(method, rule, vary, homogeneous=not adam, **options)._replace(adam=adam)


def _doge(taus, draw):
  return subspaces.doge(taus, 0.5, 0.5, 0.3, 3, 1e-3, 20, small.BY_NAME)


def _drm(direction):
  def rule(xs):
    return subspaces.drm(xs, 0.5, direction, EIGHT[: len(xs)])

  def rest(xs):
    return subspaces.elected(xs, EIGHT[: len(xs)])

  def merged(taus, draw):
    found = subspaces.by_matrix(rule, rest, taus, small.BY_NAME)
    return subspaces.scaled(found, 0.5)

  method = methods.drm(0.5, 0.5, direction, WEIGHT)
  return Row(method, merged, WEIGHTS, summed=True, decomposes="matrices", steep=True)


def _lore(*settings):
  def rule(xs):
    return subspaces.lore(xs, 1.5, *settings)

  def rest(xs):
    return np.mean(xs, axis=0)

  return Row(
    methods.lore(1.5, *settings),
    lambda taus, draw: subspaces.by_matrix(rule, rest, taus, small.BY_NAME),
    {"mu": (0.3, 0.0, 0.5), "delta_scale": (1.0, 0.0, 1.5)},
    summed=True,
    decomposes="matrices",
  )


def _opcm(taus, draw):
  return subspaces.scaled(subspaces.opcm(taus, 0.5, small.BY_NAME), 0.5)


def _widen(taus, draw, base):
  return subspaces.widen(taus, base, 0.5, 1.2, 0.8, small.BY_NAME)


def _lwptv(score, prune):
  return Row(
    methods.lwptv(0.5, 0.5, WEIGHT, score, prune),
    lambda taus, draw, base: entries.lwptv(taus, base, 0.5, 0.5, EIGHT, score, prune),
    {"prune_ratio": (0.5, 0.0, 1.0), **WEIGHTS},
    summed=True,
    homogeneous=True,
    based=True,
  )


def _flag(rank, pairs):
  return Row(
    methods.flag(rank, 5, pairs),
    lambda taus, draw: robust.flag(taus, rank, 5, pairs),
    {"pairs": (pairs, 0.0, 1.0)},
    summed=True,
    decomposes="products",
    steep=True,
  )


def _fused(taus, draw, base):
  return entries.arcee_fusion(taus, base, small.BY_NAME)


TABLE = {
  "average": Row(
    methods.average(WEIGHT),
    lambda taus, draw: basics.average(taus, EIGHT[: len(taus)]),
    WEIGHTS,
  ),
  **{
    f"checkpoint_average, {kind}": Row(
      methods.checkpoint_average(kind),
      lambda taus, draw, kind=kind: basics.checkpoint_average(taus, kind, 0.2),
      {"alpha": (0.2, 0.0, 1.0)},
    )
    for kind in ("sma", "wma", "ema")
  },
  **{
    f"checkpoint_average, {name}": Row(
      methods.checkpoint_average("decay", decay=decay, zero_at=zero_at),
      lambda taus, draw, pair=(decay, zero_at): basics.decayed(taus, *pair),
      {},
    )
    for name, decay, zero_at in (("decay", "1-sqrt", "after"), ("cosine", "cosine", "last"))
  },
  "checkpoint_average, ema from zero": Row(
    methods.checkpoint_average("ema", start="zero"),
    lambda taus, draw: basics.checkpoint_average(taus, "ema", 0.2, "zero"),
    {"alpha": (0.2, 0.01, 1.0)},
  ),
  "task_arithmetic": Row(
    methods.task_arithmetic(0.5, WEIGHT),
    lambda taus, draw: basics.weighted_sum(taus, EIGHT, 0.5),
    {"weight": (WEIGHT, (1.0, 0.0, 0.0, 0.0), (-1.0, 1.0, 1.0, 2.0))},
  ),
  "task_arithmetic, normalized": Row(
    methods.task_arithmetic(0.5, WEIGHT, normalize=True),
    lambda taus, draw: basics.weighted_sum(taus, EIGHT, 0.5, normalize=True),
    {"weight": (WEIGHT, (1.0, 0.0, 0.0, 0.0), (-1.0, 1.0, 1.0, -1.0))},
  ),
  "negate": Row(
    methods.negate(0.5),
    lambda taus, draw: basics.weighted_sum(taus, [-1] * len(taus), 0.5),
    {},
  ),
  "analogy": Row(
    methods.analogy(0.5),
    lambda taus, draw: basics.weighted_sum(taus, (-1, 1, 1), 0.5),
    {},
    height=3,
    one=False,
  ),
  "portllm": Row(
    methods.portllm(0.5),
    lambda taus, draw: basics.weighted_sum(taus, (-1, 1), 0.5),
    {},
    height=2,
    one=False,
  ),
  "ties": _ties(),
  "ties by leaf, exact": _ties(scope="leaf", rule="exact"),
  "ties by leaf, exact, l1": _ties(WEIGHT, "leaf", "exact", zero_sum="plus", rescale="l1"),
  "ties by count, sum": _ties(reduce="sum", votes="count"),
  "ties, max": _ties(reduce="max", zero_sum="plus"),
  "ties_slack": Row(
    methods.ties_slack(SLACKS[:4], 0.3, 0.5),
    lambda taus, draw: entries.ties_slack(taus, SLACKS, 0.3, 0.5),
    {"slack": (0.0, 0.5, 2.0), "density": (0.3, 0.7, 1.0)},
  ),
  **{f"dare, {rescale}": _dare(rescale) for rescale in ("inverse", "l1", "l2", "linf", None)},
  "dare, normalized": _dare("inverse", normalize=True),
  "dare_ties": Row(
    methods.dare_ties(RATE, 0.3, 0.5),
    lambda taus, draw: basics.ties(dropped(taus, draw, "inverse"), 0.3, 0.5),
    {"drop_rate": (0.0, 0.3, 0.8), "density": (0.3, 0.7, 1.0)},
    seeded=True,
  ),
  **{f"breadcrumbs by {scope}": _breadcrumbs(scope) for scope in ("tree", "leaf", "row")},
  **{f"breadcrumbs by {s}, remove": _breadcrumbs(s, "remove") for s in ("leaf", "row")},
  "breadcrumbs_ties": Row(
    methods.breadcrumbs_ties(0.5, 0.2, 0.5, WEIGHT),
    lambda taus, draw: basics.elected(basics.banded(taus, 0.5, 0.2), 0.5, EIGHT, "sum"),
    WEIGHTS,
  ),
  "della": _della("inverse"),
  "della, l1": _della("l1"),
  "della_linear": Row(
    methods.della_linear(0.5, 0.2, 0.5, WEIGHT, normalize=True),
    lambda taus, draw: basics.weighted_sum(
      basics.della(taus, draw, 0.5, 0.2, "inverse", small.BY_NAME),
      EIGHT,
      0.5,
      normalize=True,
    ),
    WEIGHTS,
    seeded=True,
  ),
  "magmax": Row(methods.magmax(), lambda taus, draw: entries.magmax(taus, 0.5), {}),
  "consensus": Row(
    methods.consensus(0.5),
    lambda taus, draw: entries.consensus(taus, 0.5, 0.4, 2),
    {"threshold": (0.4, 0.0, 1.0), "least": (2.0, 0.0, 5.0)},
  ),
  "pcb": Row(
    methods.pcb(0.3, 0.5, WEIGHT, 0.05),
    lambda taus, draw: entries.pcb(taus, 0.3, 0.5, EIGHT, 0.05),
    {"ratio": (0.3, 0.1, 1.0), "clamp": (0.05, 0.0, 0.2), **WEIGHTS},
    homogeneous=False,
  ),
  "lwptv": _lwptv("deviation", "lowest"),
  "lwptv by norm": _lwptv("relative_norm", "highest"),
  "lwptv by size": _lwptv("rms", "lowest"),
  "iso_c": _spectral(methods.iso_c(0.5), spectra.flat),
  "iso_cts": _spectral(methods.iso_cts(0.5, 0.4), lambda matrices: spectra.iso_cts(matrices, 0.4)),
  "tsv": _spectral(methods.tsv(0.5), spectra.tsv),
  "wudi": _descent(
    methods.wudi(0.5, 1e-4, 20), lambda taus: descent.wudi(taus, 1e-4, 20), decomposes=""
  ),
  **{
    f"optmerge, {tuned}": _descent(
      methods.optmerge(0.5, tuned, 1e-4, 20),
      lambda taus, tuned=tuned: descent.optmerge(taus, tuned, 1e-4, 20),
      adam=tuned == "full",  # The steps of adapters are as long as the gradient.
    )
    for tuned in ("full", "lora")
  },
  "doge": Row(
    methods.doge(0.5, 0.5, 0.3, 3, 1e-3, 20),
    _doge,
    {
      "eta": (0.5, 0.0, 1.0),
      "density": (0.3, 0.7, 1.0),
      "learning_rate": (1e-3, 0.0, 1e-4),
      "rank_tol": (1e-6, 0.0, 1e-3),
    },
    summed=True,
    decomposes="matrices",
    adam=True,
    homogeneous=False,
    one=False,  # The directions of one task are all shared: which are the first is arbitrary.
  ),
  **{f"drm, {direction}": _drm(direction) for direction in ("vertical", "horizontal")},
  "lore": _lore(0.3, True, 5, "mean"),
  "lore, elected": _lore(0.3, True, 5, "elected"),
  "opcm": Row(
    methods.opcm(0.5),
    _opcm,
    {"alpha": (0.5, 0.0, 1.0), "rank_tol": (1e-6, 0.0, 1e-3)},
    summed=True,
    decomposes="matrices",
  ),
  "widen": Row(
    methods.widen(0.5, 1.2, 0.8),
    _widen,
    {"threshold": (1.2, 0.0, 3.0), "calibrated": (0.8, 0.0, 1.0)},
    summed=True,
    homogeneous=False,
    based=True,
  ),
  "flag": _flag(1, 0.0),
  "flag of two, pairs": _flag(2, 0.5),
  "median": Row(methods.median(), lambda taus, draw: robust.median(taus), {}),
  "trimmed_mean": Row(
    methods.trimmed_mean(), lambda taus, draw: robust.trimmed_mean(taus, 1), {}, one=False
  ),
  "meamed": Row(methods.meamed(), lambda taus, draw: robust.meamed(taus, 1), {}, one=False),
  "phocas": Row(methods.phocas(), lambda taus, draw: robust.phocas(taus, 1), {}, one=False),
  **{f"krum by {scope}": _krum(scope) for scope in ("tree", "leaf")},
  "slerp": _spherical(
    methods.slerp(0.3),
    lambda taus: spheres.slerp(taus, 0.3),
    {"t": (0.3, 0.0, 1.0)},
    height=2,
    one=False,
    weights=True,
  ),
  **{f"nuslerp by {scope}": _nuslerp(scope) for scope in ("leaf", "row", "column")},
  "multislerp": _spherical(
    methods.multislerp(WEIGHT), lambda taus: spheres.multislerp(taus, EIGHT), WEIGHTS
  ),
  "karcher": _spherical(
    methods.karcher(WEIGHT, max_iter=100),
    lambda taus: spheres.karcher(taus, EIGHT),
    WEIGHTS,
    weights=True,
    steep=True,
  ),
  "model_stock": _stock("leaf", clip=False),
  "model_stock by row": _stock("row", clip=True),
  "sce": Row(
    methods.sce(),
    lambda taus, draw: entries.sce(taus),
    {"density": (0.3, 0.7, 1.0), "floor": (0.0, 1e-6, 1.0)},
    summed=True,
  ),
  "sce of a third": Row(
    methods.sce(0.3),
    lambda taus, draw: entries.sce(taus, 0.3),
    {},
    summed=True,
    one=False,
  ),
  "ram": Row(
    methods.ram(), lambda taus, draw: entries.ram(taus), {"threshold": (0.0, 1e-5, 0.1)}, times=(8,)
  ),
  "ramplus_tl": Row(
    methods.ramplus_tl(0.1, 0.5, 3.0),
    lambda taus, draw: entries.ram(taus, 0.1, 0.5, 3.0),
    {"boost": (0.5, 0.0, 1.0), "limit": (3.0, 0.0, 0.2)},
    homogeneous=False,
  ),
  "ramplus_tl by tree": Row(
    methods.ramplus_tl(0.1, 0.5, 3.0, "tree"),
    lambda taus, draw: entries.ram(taus, 0.1, 0.5, 3.0, "tree"),
    {},
    homogeneous=False,
  ),
  "arcee_fusion": Row(methods.arcee_fusion(), _fused, {}, homogeneous=False, height=1, based=True),
  "nearswap": Row(
    methods.nearswap(0.1),
    lambda taus, draw: entries.nearswap(taus, 0.1),
    {"t": (0.1, 0.0, 1e-4)},
    homogeneous=False,
    height=2,
    one=False,
    weights=True,
  ),
  "passthrough": Row(
    methods.passthrough(0.5),
    lambda taus, draw: basics.weighted_sum(taus, [1.0], 0.5),
    {},
    height=1,
    weights=True,
  ),
}
