"""The value of a parameter for a tensor follows from levels, conditions and depth alone."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmerge import recipe
from jaxmerge.recipe import parameters
from jaxmerge.recipe.errors import Place
from jaxmerge.recipe.parameters import Tensor


def one(text):
  (own,) = recipe.parse(text, "r.yml", lambda path: False)
  return own


def slerp(t):
  """A recipe with the given value of t, from line 5 on."""
  head = "merge_method: slerp\nbase_model: a/b\nmodels: [{model: c/d}]\nparameters:\n"
  return one(f"{head}  t: {t}\n")


def t_of(own, name="x", layer=None, depth=None):
  (group,) = recipe.groups(own)
  return recipe.values(own, group, Tensor(name, layer, depth)).shared["t"]


@given(
  st.lists(st.integers(0, 100), min_size=1, max_size=8), st.integers(0, 60), st.integers(1, 60)
)
def test_a_gradient_is_linear_between_its_values(hundredths, index, layers):
  numbers = [n / 100 for n in hundredths]
  depth = parameters.depth(min(index, layers - 1), layers)
  found = t_of(slerp(numbers), layer=index, depth=depth)
  np.testing.assert_allclose(
    found, np.interp(depth, np.linspace(0, 1, len(numbers)), numbers), atol=1e-12
  )


def test_known_gradients():
  """Five values over nine layers: every second layer has a value of its own."""
  own = slerp("[0, 0.5, 0.3, 0.7, 1]")
  found = [t_of(own, layer=i, depth=parameters.depth(i, 9)) for i in range(9)]
  np.testing.assert_allclose(found, [0, 0.25, 0.5, 0.4, 0.3, 0.5, 0.7, 0.85, 1], atol=1e-12)


def test_ends_of_a_gradient():
  own = slerp("[0.25, 0.75]")
  assert t_of(own) == 0.25  # Outside of the layers, before or after them.
  assert t_of(own, layer=0, depth=parameters.depth(0, 1)) == 0.75  # A slice of one layer.
  assert t_of(slerp("[0.5]"), layer=3, depth=0.7) == 0.5


@pytest.mark.parametrize("layers", [2, 7, 50, 80])
def test_truth_values_step(layers):
  """As many values as layers: each layer has its own, whatever its depth is rounded to."""
  flags = [i % 3 == 0 for i in range(layers)]
  for i in range(layers):
    assert parameters.interpolate(tuple(flags), parameters.depth(i, layers)) is flags[i]
  halves = [
    parameters.interpolate((False, True), parameters.depth(i, layers)) for i in range(layers)
  ]
  assert halves == [False] * (layers - 1) + [True]


CONDITIONS = """
    - filter: self_attn
      value: 0.1
    - pattern: "mlp\\\\.(up|down)"
      layers: 0-3, 8
      value: 0.2
    - layers: [8, 10]
      value: 0.3
    - filter: mlp
      value: 0.4
    - filter: "*"
      value: 0.5"""


@pytest.mark.parametrize(
  ("name", "layer", "expected"),
  [
    ("layers.0.self_attn.q", 0, 0.1),
    ("layers.8.self_attn.q", 8, 0.1),
    ("layers.0.mlp.up", 0, 0.2),
    ("layers.3.mlp.down", 3, 0.2),
    ("layers.4.mlp.up", 4, 0.4),
    ("layers.8.mlp.up", 8, 0.2),
    ("layers.8.mlp.gate", 8, 0.3),
    ("layers.9.norm", 9, 0.3),
    ("layers.10.norm", 10, 0.5),
    ("mlp.up", None, 0.4),
    ("embed", None, 0.5),
  ],
)
def test_the_first_condition_that_holds_counts(name, layer, expected):
  assert t_of(slerp(CONDITIONS), name, layer, 0.5) == expected


def test_filters_are_plain_text():
  own = slerp("[{filter: 'a.c', value: 0.1}, {pattern: 'a.c', value: 0.2}, {value: 0.3}]")
  assert [t_of(own, name) for name in ("a.c", "abc", "xa.cx", "b")] == [0.1, 0.2, 0.1, 0.3]


LEVELS = """\
merge_method: ties
base_model: base/b
modules:
  text:
    parameters: {module}
    slices:
      - parameters: {slice}
        sources:
          - {{model: a/b, layer_range: [0, 2], parameters: {source}}}
          - {{model: base/b, layer_range: [0, 2]}}
parameters: {recipe}
overrides: [{{filter: special, parameters: {override}}}]
"""


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=4)))
def test_the_narrowest_level_that_gives_a_value_counts(given):
  names = ("source", "slice", "module", "recipe")
  density = {"source": 0.1, "slice": 0.2, "module": 0.3, "recipe": 0.4}
  parts = {
    n: f"{{density: [{{filter: common, value: {density[n]}}}]}}" if there else "{}"
    for n, there in zip(names, given, strict=True)
  }
  parts["recipe"] = (
    parts["recipe"].replace("{density", "{weight: 1, density").replace("{}", "{weight: 1}")
  )
  own = one(LEVELS.format(**parts, override="{density: 0.05}"))
  (group,) = recipe.groups(own)
  expected = next((density[n] for n, g in zip(names, given, strict=True) if g), 1.0)
  for name, value in (("common", expected), ("other", 1.0), ("special common", 0.05)):
    found = recipe.values(own, group, Tensor(name, 0, 0.0))
    assert found.each == ({"weight": 1, "density": value}, {}), name
    assert found.shared == {"rescale": False, "normalize": True, "lambda": 1.0, "int8_mask": False}


def test_names_of_sources_decide_what_is_per_model():
  """In a stack of layers a tensor has other names in the sources; shared is what the result has."""
  own = one("""\
merge_method: linear
slices:
  - sources:
      - {model: a/b, layer_range: [0, 1], parameters: {weight: [{filter: layers.0, value: 2}]}}
      - {model: c/d, layer_range: [5, 6]}
parameters:
  weight: [{filter: layers.5, value: 7}, {value: 1}]
  normalize: [{filter: layers.9, value: false}]
""")
  (group,) = recipe.groups(own)
  found = recipe.values(own, group, Tensor("layers.9.w", 9, 1.0), ["layers.0.w", "layers.5.w"])
  assert found == ("linear", {"normalize": False}, ({"weight": 2}, {"weight": 7}))


OWN = """\
merge_method: della
base_model: b/b
models:
  - model: a/b
    parameters: {weight: 1}
  - model: b/b
  - model: c/d
parameters:
  density: 0.6
  weight: 3
exclude: [lm_head, '^embed']
overrides:
  - {pattern: "norm.*weight$", merge_method: linear, parameters: {normalize: false}}
  - {layers: "0-3, 8", parameters: {density: 1, weight: 2}}
"""


def test_overrides_and_exclusions():
  own = one(OWN)
  (group,) = recipe.groups(own)
  plain = recipe.values(own, group, Tensor("mlp", 5, 0.5))
  assert (plain.method, plain.each[0]) == ("della", {"weight": 1, "density": 0.6, "epsilon": 0.15})
  assert (plain.each[1], plain.each[2]["weight"]) == ({}, 3)
  norm = recipe.values(own, group, Tensor("norm.a.weight", 2, 0.5))
  # linear ignores the base: it is one of the models.
  assert norm == ("linear", {"normalize": False}, ({"weight": 1}, {"weight": 3}, {"weight": 3}))
  layer = recipe.values(own, group, Tensor("mlp", 8, 0.5))
  assert layer.each[0] == {"weight": 2, "density": 1, "epsilon": 0.15}
  names = ("lm_head", "x.lm_head.y", "embed", "x.embed")
  assert [parameters.is_excluded(own, Tensor(n)) for n in names] == [True, True, True, False]


def test_a_copied_slice_is_a_passthrough():
  own = one("""\
merge_method: slerp
base_model: a/b
parameters: {t: 0.5}
slices:
  - sources: [{model: a/b, layer_range: [0, 2]}, {model: c/d, layer_range: [0, 2]}]
  - sources: [{model: c/d, layer_range: [2, 3]}]
""")
  first, second = (recipe.values(own, g, Tensor("x", 0, 0.0)) for g in recipe.groups(own))
  assert first == ("slerp", {"t": 0.5}, ({}, {}))
  assert second == ("passthrough", {}, ({"scale": 1.0},))


def told(own, tensor):
  (group,) = recipe.groups(own)
  with pytest.raises(recipe.RecipeError) as caught:
    recipe.values(own, group, tensor)
  return str(caught.value)


def test_a_required_parameter_that_no_item_gives():
  own = slerp("[{filter: mlp, value: 0.5}]")
  assert told(own, Tensor("norm")) == (
    "r.yml:5:28: slerp needs t, but nothing gives it for tensor 'norm'; add an item without a "
    "condition."
  )


WEIGHTS = """\
merge_method: {method}
base_model: b/b
models:
  - model: a/b
    parameters: {{weight: [1, 0]}}
  - model: c/d
    parameters: {{weight: [{{filter: mlp, value: -0.5}}, {{value: 1}}]}}
parameters: {{normalize: {normalize}}}
"""


@pytest.mark.parametrize("method", ["linear", "ties", "task_arithmetic", "della"])
def test_weights_that_cancel_out_for_one_tensor(method):
  own = one(WEIGHTS.format(method=method, normalize="true"))
  assert told(own, Tensor("mlp", 4, 0.5)) == (
    f"r.yml:5:26: {method} divides by the sum of the weights, which is zero (0.5, -0.5) for tensor "
    "'mlp'; change them, or set normalize: false."
  )
  (group,) = recipe.groups(own)
  assert recipe.values(own, group, Tensor("mlp", 4, 0.25)).each[0]["weight"] == 0.75
  assert recipe.values(own, group, Tensor("norm", 4, 0.5)).each[1]["weight"] == 1
  free = one(WEIGHTS.format(method=method, normalize="false"))
  assert (
    recipe.values(free, recipe.groups(free)[0], Tensor("mlp", 4, 0.5)).each[1]["weight"] == -0.5
  )


def test_della_needs_room_around_the_density():
  text = "merge_method: della\nbase_model: b/b\nmodels: [{model: a/b}]\n"
  own = one(text + "parameters: {weight: 1, density: [0.5, 0.9], epsilon: 0.2}")
  (group,) = recipe.groups(own)
  assert recipe.values(own, group, Tensor("x", 0, 0.5)).each[0]["density"] == 0.7
  assert (
    "r.yml:4:34: della: density - epsilon and density + epsilon must be in (0, 1), got 0.9"
    in (told(own, Tensor("x", 1, 1.0)))
  )
  # A density of 1 keeps everything.
  assert one(text + "parameters: {weight: 1, density: 1}")
  assert one(text + "parameters: {weight: 1, density: 0.9, epsilon: 0}")


TENSORS = {
  f"model.layers.{i}.{part}": i
  for i in range(4)
  for part in ("self_attn.q_proj.weight", "mlp.up_proj.weight", "norm.weight")
} | {"model.embed.weight": None, "lm_head.weight": None}


def test_conditions_that_hold_for_some_tensor_are_fine():
  own = slerp("[{filter: self_attn, value: 0}, {pattern: 'mlp|norm', value: 1}, {value: 0.5}]")
  assert recipe.unmatched_conditions(own, TENSORS) == ()
  everything = slerp("[{pattern: '.', value: 0}, {value: 0.5}]")
  assert recipe.unmatched_conditions(everything, TENSORS) == ()


@pytest.mark.parametrize(
  ("item", "column", "words"),
  [
    (
      "filter: self_atn",
      16,
      "filter 'self_atn' holds for none of the 14 tensors; did you mean 'self_attn'?",
    ),
    ("filter: mlp.donw_proj", 16, "did you mean 'mlp.up_proj'?"),
    (
      "pattern: '^self_atn'",
      17,
      "pattern '^self_atn' holds for none of the 14 tensors; did you mean 'self_attn'?",
    ),
    (
      "filter: expert",
      16,
      "tensors, whose names have embed, layers, lm_head, mlp, model, norm, q_proj, self_attn and 2 "
      "more in them; else remove it.",
    ),
    ("layers: 7", 16, "layers 7 holds for none of the 14 tensors; their layers are 0 to 3."),
    (
      "filter: embed, layers: 0-3",
      16,
      "layers 0-3 holds for none of the 14 tensors: those whose names fit are in no such layer.",
    ),
  ],
)
def test_conditions_that_hold_for_no_tensor(item, column, words):
  ((place, text, _),) = recipe.unmatched_conditions(
    slerp(f"[{{{item}, value: 0}}, {{value: 1}}]"), TENSORS
  )
  assert words in text
  assert place == Place("r.yml", 5, column)


def test_a_condition_behind_a_wider_one_is_told():
  own = slerp("[{filter: mlp, value: 0}, {filter: mlp.up_proj, value: 1}, {value: 0}]")
  ((place, text, _),) = recipe.unmatched_conditions(own, TENSORS)
  assert (place.column, text) == (
    41,
    "items before it take all tensors of filter 'mlp.up_proj'; put the narrower one first.",
  )


def test_a_gradient_that_is_for_no_layer_is_told():
  """Of which all would take the first value; names of checkpoints show no layers."""
  own = slerp("[{filter: embed, value: [0, 0.5]}, {value: [0, 1]}]")
  (problem,) = recipe.unmatched_conditions(own, TENSORS)
  assert problem.text == (
    "t is a gradient over the depth of layers, but none of the tensors that it is for is in a "
    "layer; give one value."
  )
  flat = {"dense_0/kernel": None, "embed/kernel": None}
  assert len(recipe.unmatched_conditions(own, flat)) == 2
  assert recipe.unmatched_conditions(slerp("[0.5, 0.5]"), flat) == ()


def test_exclusions_and_overrides_are_looked_at_as_well():
  found = recipe.unmatched_conditions(one(OWN.replace("lm_head", "head_lm")), TENSORS)
  assert [(p.place.line, p.text.split(" holds")[0]) for p in found] == [
    (11, "pattern 'head_lm'"),
    (11, "pattern '^embed'"),
  ]


def test_nothing_is_changed_and_the_same_comes_again():
  own = one(OWN)
  (group,) = recipe.groups(own)
  before = repr(own)
  first = recipe.values(own, group, Tensor("mlp", 1, 0.3))
  assert recipe.values(own, group, Tensor("mlp", 1, 0.3)) == first
  assert repr(own) == before
