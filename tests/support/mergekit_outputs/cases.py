"""What was merged: one table, read by the script that records and by the tests.

Methods and parameters are in mergekit's words. A case is named after its method and what is special
about it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple  # Parameters are numbers, lists of them, or switches.

ONE, TWO, THREE = ("first",), ("first", "second"), ("first", "second", "third")
WIDE = ("first", "second", "far")
EQUAL, UNEQUAL, OPPOSITE = [1.0, 1.0, 1.0], [1.0, 0.5, 2.0], [1.0, -1.0, 0.0]


class Case(NamedTuple):
  """A merge.

  Attributes:
    method: its name in mergekit.
    parameters: what mergekit is given; lists hold a value per model.
    models: names of fine-tuned models.
    base: mergekit is given the base too.
    minilm: recorded for the tensors of MiniLM too, not for the small Llama alone.
    dtype: what mergekit computes in.
  """

  method: str
  parameters: Mapping[str, Any]
  models: tuple[str, ...] = THREE
  base: bool = True
  minilm: bool = False
  dtype: str = "float32"

  @property
  def bases(self):
    return ("llama", "minilm") if self.minilm else ("llama",)


def _averaging():
  yield "linear", Case("linear", {"weight": EQUAL}, base=False, minilm=True)
  yield "linear, weights", Case("linear", {"weight": UNEQUAL}, base=False, minilm=True)
  yield "linear, sum", Case("linear", {"weight": UNEQUAL, "normalize": False}, base=False)
  yield "linear, zero sum", Case("linear", {"weight": OPPOSITE}, base=False)
  yield "passthrough", Case("passthrough", {}, ONE, base=False)
  yield "passthrough, scale", Case("passthrough", {"scale": 0.3}, ONE, base=False)


def _spherical():
  for t in (0.0, 0.25, 0.5, 1.0):
    yield f"slerp, t={t}", Case("slerp", {"t": t}, ("far",), minilm=t == 0.25)
  yield "slerp, straight", Case("slerp", {"t": 0.25}, ONE, minilm=True)
  shapes = {
    "flat": {},
    "rows": {"nuslerp_flatten": False},
    "columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
  }
  for name, shape in shapes.items():
    options = {"weight": [1.0, 3.0], **shape}
    # Columns of two entries point in opposite directions by chance: no method is stable there.
    real = name != "columns"
    yield f"nuslerp, {name}", Case("nuslerp", options, ("first", "far"), False, minilm=real)
    yield f"nuslerp, {name}, base", Case("nuslerp", options, TWO, minilm=name == "flat")
  yield "nuslerp, zero sum", Case("nuslerp", {"weight": [1.0, -1.0]}, TWO, base=False)
  weights = {"weight": UNEQUAL}
  yield "multislerp", Case("multislerp", weights, WIDE, base=False, minilm=True)
  yield "multislerp, base", Case("multislerp", weights, minilm=True)
  sums = {**weights, "normalize_weights": False}
  yield "multislerp, weights as they are", Case("multislerp", sums, WIDE, base=False)
  pair = {"weight": [1.0, 3.0]}
  yield "multislerp, two", Case("multislerp", pair, ("first", "far"), base=False, minilm=True)
  yield "multislerp, one", Case("multislerp", {"weight": [2.0]}, ONE)
  yield "multislerp, zero sum", Case("multislerp", {"weight": OPPOSITE}, WIDE, base=False)
  yield "karcher", Case("karcher", {}, WIDE, base=False, minilm=True)
  yield "karcher, near", Case("karcher", {}, base=False)
  yield "karcher, no step", Case("karcher", {"max_iter": 0}, WIDE, base=False)


def _sums():
  yield "task_arithmetic", Case("task_arithmetic", {"weight": EQUAL, "lambda": 0.3}, minilm=True)
  yield "task_arithmetic, weights", Case("task_arithmetic", {"weight": UNEQUAL})
  mean = {"weight": UNEQUAL, "normalize": True, "lambda": 0.7}
  yield "task_arithmetic, mean", Case("task_arithmetic", mean)
  mean = {"weight": OPPOSITE, "normalize": True}
  yield "task_arithmetic, zero sum", Case("task_arithmetic", mean)
  yield "dare_linear, all kept", Case("dare_linear", {"weight": UNEQUAL, "lambda": 0.3})
  yield "della_linear, all kept", Case("della_linear", {"weight": UNEQUAL, "lambda": 0.3})
  for name, density, gamma in (
    ("breadcrumbs", 0.5, 0.01),
    ("breadcrumbs, wide", 0.3, 0.2),
    ("breadcrumbs, less removed than asked for", 0.9, 0.2),
    ("breadcrumbs, nothing removed", 0.5, 1e-6),
    ("breadcrumbs, all kept", 1.0, 0.1),
  ):
    options = {"weight": UNEQUAL, "density": density, "gamma": gamma, "lambda": 0.5}
    yield name, Case("breadcrumbs", options, minilm=name == "breadcrumbs")
  options = {"weight": UNEQUAL, "density": 0.5, "rescale": True}
  yield "breadcrumbs, rescale", Case("breadcrumbs", options)


def _elections():
  for density in (1.0, 0.5, 0.2):
    options = {"weight": EQUAL, "density": density}
    yield f"ties, density={density}", Case("ties", options, minilm=density == 0.2)
  yield "ties, one entry at least", Case("ties", {"weight": EQUAL, "density": 0.01})
  half = {"weight": UNEQUAL, "density": 0.5}
  yield "ties, weights", Case("ties", half, minilm=True)
  yield "ties, sum", Case("ties", {**half, "normalize": False, "lambda": 0.7}, minilm=True)
  yield "ties, densities", Case("ties", {**half, "density": [0.2, 0.5, 0.8]})
  yield "ties, negative weight", Case("ties", {**half, "weight": [1.0, -0.5, 2.0]})
  # The same task vector twice, with opposite signs: every sum is exactly zero.
  pair = {"weight": OPPOSITE, "density": 1.0, "normalize": False}
  yield "ties, cancelling", Case("ties", pair, ("first", "first", "second"))
  yield "ties, rescale", Case("ties", {**half, "rescale": True})
  yield "dare_ties, all kept", Case("dare_ties", {"weight": UNEQUAL})
  yield "della, all kept", Case("della", {"weight": UNEQUAL})
  crumbs = {"weight": UNEQUAL, "density": 0.5, "gamma": 0.01}
  yield "breadcrumbs_ties", Case("breadcrumbs_ties", crumbs, minilm=True)
  crumbs = {**crumbs, "gamma": 1e-6, "normalize": True, "lambda": 0.5}
  yield "breadcrumbs_ties, nothing removed, mean", Case("breadcrumbs_ties", crumbs)
  for share in (1.0, 0.5, 0.1):
    options = {"select_topk": share}
    yield f"sce, select_topk={share}", Case("sce", options, minilm=share < 1)
  yield "sce, nothing selected", Case("sce", {"select_topk": 1e-6})


def _others():
  for name, options in (("model_stock", {}), ("model_stock, rows", {"filter_wise": True})):
    yield name, Case("model_stock", options, minilm=True)
    yield f"{name}, two", Case("model_stock", options, TWO)
  for model in ("first", "third", "far"):
    yield f"arcee_fusion, {model}", Case("arcee_fusion", {}, (model,), minilm=model == "far")
  yield "nearswap", Case("nearswap", {"t": 1e-3}, ONE, minilm=True)
  yield "nearswap, small t", Case("nearswap", {"t": 1e-5}, ONE)
  yield "nearswap, far", Case("nearswap", {"t": 0.1}, ("far",))
  yield "ram", Case("ram", {}, minilm=True)
  yield "ram, two", Case("ram", {}, TWO)
  yield "ram, epsilon", Case("ram", {"epsilon": 1e-3})
  yield "ramplus_tl", Case("ramplus_tl", {}, minilm=True)
  yield "ramplus_tl, two", Case("ramplus_tl", {"r": 0.5, "alpha": 2.0}, TWO)
  yield "ramplus_tl, epsilon", Case("ramplus_tl", {"epsilon": 1e-3})


def _narrow():
  low, half = {"weight": UNEQUAL, "lambda": 0.3}, {"weight": UNEQUAL, "density": 0.5}
  for name, case in {
    "linear": Case("linear", {"weight": UNEQUAL}, base=False),
    "passthrough, scale": Case("passthrough", {"scale": 0.3}, ONE, base=False),
    "slerp": Case("slerp", {"t": 0.25}, ("far",)),
    "nuslerp": Case("nuslerp", {"weight": [1.0, 3.0]}, ("first", "far"), base=False),
    "nuslerp, rows, base": Case("nuslerp", {"weight": [1.0, 3.0], "nuslerp_flatten": False}, TWO),
    "multislerp": Case("multislerp", {"weight": UNEQUAL}, WIDE, base=False),
    "karcher": Case("karcher", {}, WIDE, base=False),
    "task_arithmetic": Case("task_arithmetic", low),
    "dare_linear, all kept": Case("dare_linear", low),
    "della_linear, all kept": Case("della_linear", low),
    "breadcrumbs": Case("breadcrumbs", {**half, "gamma": 0.2, "rescale": True}),
    "ties": Case("ties", {**half, "lambda": 0.7}),
    "ties, rescale": Case("ties", {**half, "density": [0.2, 0.5, 0.8], "rescale": True}),
    "dare_ties, all kept": Case("dare_ties", {"weight": UNEQUAL}),
    "della, all kept": Case("della", {"weight": UNEQUAL}),
    "breadcrumbs_ties": Case("breadcrumbs_ties", {**half, "gamma": 0.01}),
    "sce": Case("sce", {}),
    "sce, half": Case("sce", {"select_topk": 0.5}),
    "model_stock": Case("model_stock", {}),
    "model_stock, rows": Case("model_stock", {"filter_wise": True}),
    "nearswap": Case("nearswap", {"t": 1e-3}, ONE),
    "ram": Case("ram", {}),
    "ramplus_tl": Case("ramplus_tl", {}),
  }.items():
    yield f"{name}, bfloat16", case._replace(dtype="bfloat16")
    if name in ("task_arithmetic", "ties", "sce"):
      yield f"{name}, float16", case._replace(dtype="float16")


CASES: Mapping[str, Case] = {
  name: case
  for part in (_averaging, _spherical, _sums, _elections, _others, _narrow)
  for name, case in part()
}

# One model, and random masks: only moments are recorded. Elections and means change nothing there.
RANDOM: Mapping[str, Case] = {
  f"{method}, {'rescale' if rescale else 'plain'}": Case(
    method, {"weight": 1.0, "density": density, "rescale": rescale, **more}, ("far",)
  )
  for method, density, more in (
    ("dare_linear", 0.3, {}),
    ("della_linear", 0.5, {"epsilon": 0.15}),
  )
  for rescale in (False, True)
}
