"""Recipes for tests: good ones of many kinds, and what reads them."""

import functools

import pytest

from jaxmerge import recipe
from jaxmerge.io.tensors.tensor import Files
from jaxmerge.recipe.plan import steps
from jaxmerge.recipe.syntax import schema


def parsed(text, *folders):
  return recipe.parse(text, "r.yml", lambda path: path in folders)


def one(text, *folders):
  (own,) = parsed(text, *folders)
  return own


def problems(text, *folders):
  """The lines of the error that a text gives."""
  with pytest.raises(recipe.RecipeError) as caught:
    parsed(text, *folders)
  return str(caught.value).splitlines()


def plain(parameters):
  """Parameters of one level as bare values; conditions as (words, value)."""
  return {
    name: cases[0].value
    if len(cases) == 1 and cases[0].where.everywhere
    else [(str(c.where), c.value) for c in cases]
    for name, cases in parameters.items()
  }


# The first of two documents; the second builds on what it makes.
MEAN = """
name: mean
merge_method: linear
models: [{model: m0}, {model: m1}]
parameters: {weight: 1}
---
"""

LINEAR = """\
models:
  - model: psm/orca_v3_13b
    parameters:
      weight: 1.0
  - model: wiz/WizardLM-13B@v1.2
    parameters:
      weight: 0.3
  - model: gar/Platypus2-13B+some/adapter@main
    parameters:
      weight: 5e-1
merge_method: linear
dtype: torch.float16
"""
SLERP = """\
slices:
  - sources:
      - model: psm/orca_v3_13b
        layer_range: [0, 40]
      - model: gar/Platypus2-13B
        layer_range: [0, 40]
merge_method: slerp
base_model: psm/orca_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # the rest
dtype: float16
out_dtype: bfloat16
"""
TIES = """\
models:
  - model: psm/orca_v3_13b
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: gar/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: wiz/WizardMath-13B
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: llama/Llama-2-13B
parameters:
  normalize: true
  int8_mask: yes
"""
DARE = """\
merge_method: dare_ties
base_model: mis/Mistral-7B
models:
  - model: mis/Mistral-7B
  - model: a/b
    parameters: &half {density: 0.53, weight: 0.4}
  - model: c/d
    parameters: *half
parameters: {rescale: false, lambda: 0.9}
seed: 7
compat: mergekit
missing: mean
tokenizer_source: union
chat_template: chatml
"""
STACK = """\
slices:
  - sources:
    - model: psm/orca_v3_13b
      layer_range: [0, 24]
  - sources:
    - model: gar/Platypus2-13B
      layer_range: [20, 40]
      parameters:
        scale:
          - filter: o_proj
            value: 0.0
          - filter: down_proj
            value: 0.0
          - value: 1.0
merge_method: passthrough
"""
STOCK = """\
merge_method: model_stock
base_model: llama/base
models: [{model: a/b}, {model: c/d}, {model: llama/base}]
parameters: {filter_wise: true}
tokenizer:
  source: base
  tokens:
    <|im_start|>: {source: a/b}
    <|special|>: {source: c/d, force: true}
    <|renamed|>: {source: {kind: model_token, model: a/b, token: "<|old|>"}}
    <|number|>: {source: {kind: model_token, model: a/b, token_id: 1234}}
    <|unused|>: {source: {kind: zero}}
  pad_to_multiple_of: 64
"""
MODULES = """\
merge_method: linear
modules:
  text_decoder:
    models:
      - model: a/b
      - model: c/d
        parameters: {weight: 2}
    parameters: {weight: 1}
  vision_tower:
    slices:
      - sources: [{model: a/b, layer_range: [0, 4]}]
        base_model: e/f
        parameters: {weight: 3}
        residual_weight: null
parameters:
"""
STAGES = """\
name: first
merge_method: linear
models: [{model: a/b}, {model: c/d}]
parameters: {weight: 0.5}
---
name: second
merge_method: slerp
base_model: first
models: [{model: e/f}]
parameters: {t: 0.5}
---
merge_method: dare_ties
base_model: a/b
models: [{model: second}, {model: g/h}]
parameters: {weight: 0.5, density: 0.6}
"""
OWN = """\
merge_method: della
base_model: b/b
models:
  - model: a/b
    parameters: {weight: 1}
parameters: {density: 0.6, epsilon: 0.1}
exclude: ["lm_head", 'embed_(in|out)']
overrides:
  - {pattern: "norm.*weight$", merge_method: linear}
  - {layers: "0-3, 8", filter: mlp, parameters: {density: 0.5}}
layout: [{pattern: 'c_attn\\.weight', view: io}, {filter: experts, view: boi}]
"""
GOOD = [LINEAR, SLERP, TIES, DARE, STACK, STOCK, MODULES, STAGES, OWN]


def head(keys, method="linear", models="[{model: a/b}, {model: c/d}]", parameters="{weight: 1}"):
  return f"merge_method: {method}\nmodels: {models}\nparameters: {parameters}\n{keys}"


def slices(*sources, method="slerp", base="base_model: a/b\n", parameters="{t: 0.5}"):
  rows = "\n".join(f"      - {{model: {m}, layer_range: {r}}}" for m, r in sources)
  return f"merge_method: {method}\n{base}parameters: {parameters}\nslices:\n  - sources:\n{rows}\n"


def plan_of_file(path, files=None, *, shard_size=5_000_000_000, **options):
  """The plan of the last recipe of a file; the options are those of `steps.plan_steps`."""
  files = Files() if files is None else files
  text = schema.text_of(path)
  text = steps.Text(text, functools.partial(schema.parse, text, str(path)))
  return steps.plan_steps(text, files, shard_size=shard_size, **options)[-1].plan
