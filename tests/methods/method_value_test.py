"""A method is a value: what compiles to one program is equal, and compiles once."""

import contextlib
import dataclasses
import functools
import inspect
import json
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marking import some_fast

import jaxmerge
from jaxmerge import methods
from jaxmerge.catalog import lookup
from jaxmerge.core import stage
from jaxmerge.drivers import arguments, incremental
from jaxmerge.methods import factory
from jaxmerge.search import scales

FACTORIES = sorted(lookup.METHODS)
VARYING = [
  (name, parameter)
  for name in FACTORIES
  for parameter, entry in lookup.METHODS[name].parameters.items()
  if entry.number and parameter != "seed"
]
STATIC = [
  (name, parameter)
  for name in FACTORIES
  for parameter, entry in lookup.METHODS[name].parameters.items()
  if not entry.number and entry.choices
]


def another(entry):
  """A value inside the range of a hyperparameter that is not its default."""
  low, high = (max(entry.low, 0.0), min(entry.high, 4.0))
  tried = (0.5, 0.25, 0.75, low + 1, high) if not entry.integer else (1, 2, 3)
  return next(v for v in tried if v != entry.default and low <= v <= high)


def insides(value, seen=()):
  """What a function, a stage or a statistic is made of, in comparable form."""
  if id(value) in seen:
    return "again"
  seen = (*seen, id(value))
  if isinstance(value, functools.partial):
    return insides((value.func, value.args, value.keywords), seen)
  value = inspect.unwrap(value) if callable(value) else value  # Of the checks of types.
  if hasattr(value, "__code__"):
    cells = [insides(c.cell_contents, seen) for c in value.__closure__ or ()]
    return (value.__qualname__, value.__code__, cells, insides(value.__defaults__, seen))
  if isinstance(value, stage.Stage):
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return [insides(v, seen) for n, v in fields.items() if n not in ("hparams", "key")]
  if isinstance(value, dict):
    return [(k, insides(v, seen)) for k, v in value.items()]
  if isinstance(value, (tuple, list, stage.Method)):
    return [insides(v, seen) for v in value]
  return value


@pytest.mark.parametrize(("name", "parameter"), VARYING)
def test_a_hyperparameter_is_no_part_of_a_method(name, parameter):
  """No function of a stage holds its value: programs are shared by all values."""
  make, entry = getattr(methods, name), lookup.METHODS[name].parameters[parameter]
  one, other = make(), make(**{parameter: another(entry)})
  assert one != other
  assert hash(one) == hash(other)
  assert stage.without_hparams(one) == stage.without_hparams(other)
  assert insides(one) == insides(other)
  assert stage.hparams(one) != stage.hparams(other)


@pytest.mark.parametrize(("name", "parameter"), STATIC)
def test_a_setting_is_part_of_a_method(name, parameter):
  make, entry = getattr(methods, name), lookup.METHODS[name].parameters[parameter]
  value = next(v for v in entry.choices if v != entry.default)
  others = dict([entry.only] if entry.only else [])
  changed = make(**{**others, parameter: value})
  assert make(**others) == make(**others)
  assert stage.without_hparams(make(**others)) != stage.without_hparams(changed)
  assert dict(changed.settings)[parameter] == value


OF_PARTS = {  # Whose defaults a part has.
  "band": "breadcrumbs",
  "disjoint_mean": "ties",
  "drop": "dare",
  "elect_sign": "ties",
  "elected": "ties",
  "gate": "lwptv",
  "magprune": "della",
  "weighted_sum": "average",
}


@pytest.mark.parametrize("name", OF_PARTS)
def test_a_part_has_the_defaults_of_its_method(name):
  table = lookup.METHODS[OF_PARTS[name]].parameters
  signature = inspect.signature(getattr(methods, name)).parameters.items()
  defaults = {
    n: p.default
    for n, p in signature
    if n in table and n != "normalize" and p.default is not p.empty
  }
  assert defaults == {n: table[n].default for n in defaults}


@contextlib.contextmanager
def compilations():
  """The names of the programs that are compiled meanwhile."""
  names, logger = [], logging.getLogger("jax._src.interpreters.pxla")

  class Handler(logging.Handler):
    def emit(self, record):
      names.append(record.getMessage())

  handler = Handler(logging.DEBUG)
  with jax.log_compiles():
    logger.addHandler(handler)
    try:
      yield names
    finally:
      logger.removeHandler(handler)


def trees(name):
  """A base and as many models as a method takes."""
  least, most = lookup.METHODS[name].models
  height = min(max(5, least), most or 5)
  draw = np.random.default_rng(0).normal
  base = {"kernel": draw(size=(4, 4)), "bias": draw(size=4)}
  base = {n: jnp.asarray(x, jnp.float32) for n, x in base.items()}
  models = {n: x[None] + 0.1 * draw(size=(height, *x.shape)) for n, x in base.items()}
  return base, {n: jnp.asarray(x, jnp.float32) for n, x in models.items()}


@pytest.mark.parametrize("name", some_fast(FACTORIES, ["ties", "dare", "slerp", "krum", "tsv"]))
def test_a_method_made_again_compiles_nothing(name):
  make, (base, models) = getattr(methods, name), trees(name)
  options = {"seed": 3} if "seed" in stage.hparams(make()) else {}
  first = jaxmerge.merge(make(), models, base, **options)
  with compilations() as names:
    again = jaxmerge.merge(make(), models, base, **options)
    for value in [{"scale": 0.125}] if "scale" in stage.hparams(make()) else []:
      jaxmerge.merge(make(**value), models, base, **options)
  assert names == []
  jax.tree.map(np.testing.assert_array_equal, first, again)


def test_equal_methods_have_their_own_hyperparameters():
  """What is shared is the program."""
  base, models = trees("task_arithmetic")
  own = jax.jit(jaxmerge.merge, static_argnums=0)  # A caller's own program is made for each.
  for scale in (0.5, 2.0):
    expected = base["kernel"] + scale * (models["kernel"] - base["kernel"][None]).sum(0)
    for merge in (jaxmerge.merge, own):
      merged = merge(methods.task_arithmetic(scale), models, base)
      np.testing.assert_allclose(merged["kernel"], expected, rtol=1e-5)
  for weight in ((1.0, 1.0, 1.0, 1.0, 1.0), (5.0, 1.0, 1.0, 1.0, 1.0)):
    found = scales.at_scales(
      base,
      models,
      jnp.ones(1),
      {},
      method=methods.task_arithmetic(1.0, weight),
      seed=None,
      names=tuple("abcde"),
      layout=(),
    )
    tau = models["kernel"] - base["kernel"][None]
    expected = base["kernel"] + jnp.tensordot(jnp.asarray(weight), tau, 1)
    np.testing.assert_allclose(found["kernel"][0], expected, rtol=1e-5)


def test_a_method_of_ones_own_is_equal_to_itself_alone():
  def make(factor):
    return stage.Method((stage.Stage(lambda x, leaf, known: factor * x[:1], combines=True),))

  one = make(2.0)
  assert one == one
  assert one != make(2.0)
  assert stage.pointwise(jnp.abs) == stage.pointwise(jnp.abs) != stage.pointwise(jnp.sign)


def test_a_setting_without_a_hash_keeps_a_method_apart():
  @factory.named
  def shifted(by):
    return stage.leafwise(lambda x, leaf: x + by)

  assert shifted(1.0) == shifted(1.0) != shifted(True)
  assert shifted((1, 0.0)) == shifted((1, 0.0))
  assert shifted((1, 0.0)) != shifted((1.0, 0.0)) != shifted((1.0, -0.0))
  array = np.ones(2)
  assert shifted(array) != shifted(array)


def test_an_argument_counts_as_a_hyperparameter_only_where_a_stage_has_it():
  """Not where a stage within has a number of the same name."""

  @factory.named
  def twice(scale):
    first = stage.pointwise(lambda x: x * scale)
    return stage.chain(first, methods.task_arithmetic())

  assert stage.without_hparams(twice(2.0)) != stage.without_hparams(twice(5.0))
  (one,) = methods.average()
  other = dataclasses.replace(one, update=lambda x, leaf, known: x[:1])
  assert stage.without_hparams(stage.Method((one,))) != stage.without_hparams(
    stage.Method((other,))
  )


def test_names_and_settings_go_through_chains_and_masks():
  ties = methods.ties(density=0.3, zero_sum="plus")
  assert ties.name == "ties"
  assert dict(ties.settings)["zero_sum"] == "plus"
  assert "density" not in dict(ties.settings)
  both = stage.chain(methods.gate(0.3), ties)
  assert both.name == "gate + ties"
  assert dict(both.settings)["ties.zero_sum"] == "plus"
  masks = [stage.masked(ties, where) for where in (str.isupper, str.isupper, str.islower)]
  assert masks[0] == masks[1] != masks[2]
  assert masks[0].name == "ties"


@pytest.mark.parametrize(
  ("wrong", "words"),
  {
    "typo": (lambda: methods.ties(densty=0.2), "ties has no parameter 'densty'; did you mean"),
    "many": (lambda: methods.median(1), "median: too many positional arguments"),
    "none": (methods.trim, "trim: missing a required argument: 'density'"),
  }.values(),
)
def test_wrong_arguments_are_named(wrong, words):
  with pytest.raises(TypeError, match=words):
    wrong()


def test_task_vectors_need_a_base(tmp_path):
  """Without one a method of task vectors would trim and elect the weights themselves."""
  _, models = trees("ties")
  for method in (methods.ties(), stage.chain(methods.gate(0.3), methods.ties())):
    with pytest.raises(ValueError, match="ties merges task vectors"):
      jaxmerge.merge(method, models)
    with pytest.raises(ValueError, match="ties merges task vectors"):
      jaxmerge.merge_files(method, [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
  for method in (stage.chain(stage.pointwise(jnp.abs), methods.ties()), methods.ties()[:]):
    with pytest.raises(ValueError, match="ties merges task vectors"):
      jaxmerge.merge(method, models)
  with pytest.raises(ValueError, match="task_arithmetic merges task vectors"):
    incremental.of(methods.task_arithmetic())
  base = {n: x[0] for n, x in models.items()}
  with pytest.raises(ValueError, match="nothing is subtracted from task vectors"):
    jaxmerge.merge(methods.ties(), models, base, deltas=True, reference=base)
  jaxmerge.merge(methods.ties(), models, deltas=True)
  jaxmerge.merge(stage.chain(methods.trim(0.5), methods.average()), models)


def told(method, **numbers):
  said, every = arguments.describe_method(method, numbers)
  return json.dumps([said, {n: repr(v) for n, v in every.items()}], sort_keys=True)


def test_what_a_plan_says_of_methods_tells_them_apart():
  """By which an interrupted merge knows whether it goes on."""

  def median():
    return stage.pointwise(lambda x: 100 * x.max(0, keepdims=True), combines=True)

  each = [
    methods.negate(),
    methods.negate(0.5),
    stage.masked(methods.negate(), re.compile("q_proj").search),
    stage.masked(methods.negate(), re.compile("k_proj").search),
    methods.median(),
    factory.named(median)(),
    stage.chain(methods.trim(0.5), methods.average()),
    stage.chain(methods.trim(0.6), methods.average()),
  ]
  assert len({told(m) for m in each}) == len(each)
  assert told(methods.ties(0.3)) == told(methods.ties(0.3))
  assert json.loads(told(each[2]))[0]["method"] == "negate"
  assert json.loads(told(each[-1]))[0]["words"] == "trim + average"
