import functools
import importlib
import inspect
import re
import subprocess
import sys

import jax
import jax.extend
import jax.numpy as jnp
import pytest

import jaxmerge
from jaxmerge import methods
from jaxmerge.catalog import lookup, tables
from jaxmerge.core import stage


def test_the_table_is_free_of_jax():
  code = "import sys, jaxmerge.catalog; print('jax' in sys.modules)"
  assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


@pytest.mark.parametrize("name", lookup.METHODS)
def test_factories_and_table_agree(name):
  """A factory has the parameters of its entry, in order, with their defaults."""
  signature = inspect.signature(getattr(methods, name)).parameters
  parameters = lookup.METHODS[name].parameters
  assert list(signature) == list(parameters)
  for n, parameter in parameters.items():
    assert signature[n].default == parameter.default, n


@pytest.mark.parametrize("name", lookup.METHODS)
def test_numbers_of_a_method_are_in_its_entry(name):
  found = stage.hparams(getattr(methods, name)())
  entry = lookup.METHODS[name]
  assert ("seed" in found) == ("seed" in entry.needs)
  own = {n for n, p in entry.parameters.items() if p.number}
  # Some methods fix a number that their stages have, as `negate` does its weight.
  assert own <= found.keys() <= own | {"seed", "weight"}


@pytest.mark.parametrize("name", lookup.METHODS)
def test_docstring_names_the_papers(name):
  paper, text = lookup.METHODS[name].paper, inspect.getdoc(getattr(methods, name))
  # An entry has an arXiv id per paper; without one, authors and year stand in the docstring.
  citations = re.findall(r"arXiv:\d{4}\.\d{5}", paper) or [paper.split(" (")[0]]
  assert [c for c in citations if c not in text] == []


def test_every_default_is_allowed():
  for name, entry in lookup.METHODS.items():
    lookup.check(name, {n: p.default for n, p in entry.parameters.items()})


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"density": 0.0}, r"ties: density must be in \(0, 1\], got 0.0"),
    ({"density": 1.5}, r"ties: density must be in \(0, 1\], got 1.5"),
    ({"density": float("nan")}, r"ties: density must be in \(0, 1\], got nan"),
    ({"density": "0.2"}, r"ties: density must be a number in \(0, 1\], got '0.2'"),
    ({"density": None}, r"ties: density must be a number in \(0, 1\], got None"),
    ({"weight": (1.0, float("inf"))}, r"ties: weight must be in \(-infinity, infinity\), got inf"),
    ({"scope": "layer"}, "ties: scope must be one of 'tree', 'leaf', got 'layer'"),
    ({"densty": 0.2}, "ties has no parameter 'densty'; did you mean 'density'\\? Known: density, "),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    lookup.check("ties", settings)


@pytest.mark.parametrize(
  ("name", "settings", "message"),
  [
    ("ties", {"density": 0.0}, "ties: density must be in"),
    ("ties", {"scope": "row"}, "ties: scope must be one of 'tree', 'leaf', got 'row'"),
    ("ties", {"rule": "top"}, "ties: rule must be one of 'kth', 'exact', got 'top'"),
    (
      "ties",
      {"reduce": "median"},
      "ties: reduce must be one of 'mean', 'sum', 'max', got 'median'",
    ),
    (
      "ties",
      {"zero_sum": "minus"},
      "ties: zero_sum must be one of 'majority', 'plus', got 'minus'",
    ),
    ("dare", {"drop_rate": 1.1}, r"dare: drop_rate must be in \[0, 1\], got 1.1"),
    ("dare", {"rescale": "l3"}, "dare: rescale must be one of 'inverse', 'l1', 'l2', 'linf', None"),
    ("breadcrumbs", {"keep": 0}, r"breadcrumbs: keep must be in \(0, 1\], got 0"),
    ("breadcrumbs", {"remove": -0.1}, r"breadcrumbs: remove must be in \[0, 1\], got -0.1"),
    ("breadcrumbs", {"scope": "column"}, "breadcrumbs: scope must be one of 'tree', 'leaf', 'row'"),
    ("average", {"normalize": "yes"}, "average: normalize must be one of True, False, got 'yes'"),
    ("breadcrumbs", {"yields": "both"}, "breadcrumbs: yields must be one of 'keep', 'remove'"),
    ("ties", {"rescale": "inverse"}, "ties: rescale must be one of 'l1', 'l2', 'linf', None"),
    ("della", {"epsilon": 0.6}, r"della: epsilon must be in \[0, 0.5\], got 0.6"),
    ("slerp", {"t": 1.5}, r"slerp: t must be in \[0, 1\], got 1.5"),
    ("nuslerp", {"scope": "tree"}, "nuslerp: scope must be one of 'leaf', 'row', 'column'"),
    (
      "karcher",
      {"max_iter": 2.5},
      r"karcher: max_iter must be a whole number in \[0, infinity\), got 2.5",
    ),
    ("model_stock", {"floor": -1.0}, r"model_stock: floor must be in \[0, infinity\), got -1.0"),
    ("ramplus_tl", {"scope": "row"}, "ramplus_tl: scope must be one of 'leaf', 'tree'"),
  ],
)
def test_factories_check_their_settings(name, settings, message):
  # Without the checks of annotations, which only the tests turn on.
  factory = inspect.unwrap(getattr(methods, name))
  with pytest.raises(ValueError, match=message):
    factory(**settings)


def test_arrays_pass_by():
  lookup.check("ties", {"density": jnp.float32(7)})


def test_unknown_method_is_named_with_the_nearest():
  with pytest.raises(ValueError, match=r"no method is called 'tie'; did you mean 'ties'\? Known: "):
    lookup.entry("tie")


def test_seed_range():
  lookup.check_number("seed", 2**32 - 1)
  for value in (-1, 2**32, 0.5):
    with pytest.raises(ValueError, match=r"seed must be a whole number in \[0, 4294967295\], got"):
      lookup.check_number("seed", value)


def test_a_number_of_many_methods_has_the_widest_range():
  """The t of slerp ends at 1, that of nearswap does not; no density is 0."""
  lookup.check_number("t", 7.0)
  for name, value in (("t", -0.1), ("density", 0.0), ("epsilon", 0.6), ("scale", float("nan"))):
    with pytest.raises(ValueError, match=f"{name} must be in"):
      lookup.check_number(name, value)


def test_lengths_are_static_and_whole():
  assert not lookup.METHODS["karcher"].parameters["max_iter"].number
  for value in (-1, 2.5, jnp.float32(3)):
    with pytest.raises(ValueError, match=r"karcher: max_iter must be a (whole )?number in"):
      lookup.check("karcher", {"max_iter": value})


PARTS = {  # Of which methods are made.
  "band",
  "disjoint_max",
  "disjoint_mean",
  "drop",
  "elect_sign",
  "elected",
  "gate",
  "layer_of",
  "magprune",
  "matched",
  "most_varied",
  "moving_weights",
  "scaled",
  "spanned",
  "trim",
  "weighted",
  "weighted_sum",
}


def test_every_factory_is_in_the_table():
  assert set(methods.__all__) == lookup.METHODS.keys() | PARTS


@pytest.mark.parametrize("name", lookup.OTHERS)
def test_what_is_no_method_is_told_as_its_docstring_does(name):
  module, function = name.split(".")
  text = inspect.getdoc(getattr(importlib.import_module(f"jaxmerge.{module}"), function))
  other = lookup.OTHERS[name]
  assert other.paper.split(" (")[1].rstrip(")") in text
  assert ("Experimental" in text) == other.experimental


def test_markdown_has_a_row_per_method():
  lines = tables.markdown().splitlines()
  assert len(lines) == 2 + len(lookup.METHODS)
  assert all(line.count(" | ") == 5 for line in lines)


@pytest.mark.parametrize("name", lookup.METHODS)
def test_costs_in_the_table_are_those_of_the_stages(name):
  """What is held at a time, and how many decompositions a matrix takes, counted as traced."""
  entry, method = lookup.METHODS[name], getattr(methods, name)()
  order = ("entry", "row", "matrix")
  assert entry.unit == max((s.unit for s in method), key=order.index)
  assert bool(entry.fallback) == any(s.unit != "entry" for s in method)
  if entry.unit == "matrix":
    counts = [decompositions(method, height) for height in (2, 5)]
    assert counts == [eval(entry.svds.replace(" K", " * K") or "0", {"K": k}) for k in (2, 5)]


def decompositions(method, height):
  """How many singular value decompositions run for one matrix of so many models."""
  models = {"w": jnp.ones((height, 40, 50))}
  merge = functools.partial(jaxmerge.merge, method, layout=(("w", "oi"),))

  def count(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
      name = equation.primitive.name
      times = equation.params["length"] if name == "scan" else 1
      # Of branches, such as those for platforms, one runs.
      each = list(map(count, jax.extend.core.jaxprs_in_params(equation.params)))
      inner = max(each, default=0) if name == "cond" else sum(each)
      total += times * (inner + (name == "svd"))
    return total

  return count(jax.make_jaxpr(merge)(models, {"w": models["w"][0]}).jaxpr)
