"""Codes of quantized weights are told by what lies beside them, whatever a config says."""

import json

import folders
import jax
import ml_dtypes
import numpy as np
import pytest
import recipes

import jaxmerge
from jaxmerge import errors, methods
from jaxmerge.drivers import incremental, streaming
from jaxmerge.files import merge
from jaxmerge.io.tensors import quantized
from jaxmerge.io.tensors.tensor import Files, Tensor
from jaxmerge.mixtures import masks

FLOAT8 = ml_dtypes.float8_e4m3fn
# Tensors of one module as their formats call them: dtype and shape; the first holds the codes.
FORMATS = {
  "gptq": {
    "up.qweight": (np.int32, (1, 8)),
    "up.qzeros": (np.int32, (1, 1)),
    "up.scales": (np.float16, (1, 8)),
    "up.g_idx": (np.int32, (8,)),
  },
  "awq": {"up.qweight": (np.int32, (8, 1)), "up.scales": (np.float16, (1, 8))},
  "bnb4": {
    "up.weight": (np.uint8, (32, 1)),
    "up.weight.absmax": (np.uint8, (2,)),
    "up.weight.quant_map": (np.float32, (16,)),
    "up.weight.nested_absmax": (np.float32, (1,)),
    "up.weight.quant_state.bitsandbytes__nf4": (np.uint8, (80,)),
  },
  "bnb4 stored as floats": {
    "up.weight": (ml_dtypes.bfloat16, (32, 1)),
    "up.weight.absmax": (np.float32, (2,)),
    "up.weight.quant_map": (np.float32, (16,)),
  },
  "bnb8": {"up.weight": (np.int8, (8, 8)), "up.SCB": (np.float32, (8,))},
  "fp8": {"up.weight": (FLOAT8, (8, 8)), "up.weight_scale_inv": (np.float32, (1, 1))},
  "fp8 of an input": {"up.weight": (FLOAT8, (8, 8)), "up.input_scale": (np.float32, ())},
  "fp8 experts": {"experts.up": (FLOAT8, (2, 8, 8)), "experts.up_scale": (np.float32, (2, 1, 8))},
  "fp8 of images": {"up.weight": (FLOAT8, (8, 8)), "up.scale_weight": (np.float32, ())},
  "trt": {"up.weight": (np.int8, (8, 8)), "up.weights_scaling_factor": (np.float32, (8,))},
  "nvfp4": {
    "up.weight_packed": (np.uint8, (8, 4)),
    "up.weight_scale": (FLOAT8, (8, 1)),
    "up.weight_global_scale": (np.float32, (1,)),
  },
  "mxfp4": {
    "experts.up_blocks": (np.uint8, (2, 8, 1, 16)),
    "experts.up_scales": (np.uint8, (2, 8, 1)),
  },
  "hqq": {"up.W_q": (np.uint8, (4, 8)), "up.zero": (np.float16, (8, 1))},
  "aqlm": {"up.codes": (np.int8, (8, 1, 1)), "up.codebooks": (np.float16, (1, 16, 1, 8))},
  "vptq": {"up.indices": (np.int32, (1, 8)), "up.centroids.weight": (np.float16, (1, 64))},
  "exl2": {"up.q_weight": (np.int32, (1, 8)), "up.q_scale": (np.int32, (1, 1))},
  "exl3": {"up.trellis": (np.int16, (1, 1, 48)), "up.suh": (np.float16, (8,))},
  "quanto": {"up.weight._data": (np.int8, (8, 8)), "up.weight._scale": (np.float16, (8, 1))},
  "torchao": {"up._weight_qdata": (np.int8, (8, 8)), "up._weight_scale": (np.float32, (8,))},
  "mlx": {"up.weight": (np.uint32, (8, 1)), "up.biases": (np.float16, (8, 1))},
  "flax": {"up/kernel": (np.int8, (8, 8)), "up/kernel_scale": (np.float32, (8,))},
  "bitnet": {"up.weight": (np.uint8, (2, 8)), "up.weight_scale": (ml_dtypes.bfloat16, (1,))},
}
# What is beside integers in models that are whole.
WHOLE = {
  "attention.logit_scale": (np.float32, (4, 1, 1)),
  "attention.relative_position_index": (np.int64, (16, 16)),
  "embeddings.position_ids": (np.int64, (1, 8)),
  "attention.bias": (np.bool_, (1, 1, 8, 8)),
  "norm.scale": (np.float32, (8,)),
  "norm.num_batches_tracked": (np.int64, ()),
}


def tensor(dtype, shape):
  return Tensor("", np.dtype(dtype), shape, lambda start, out: None)


@pytest.mark.parametrize("kind", FORMATS)
def test_codes_are_found_by_what_lies_beside_them(kind):
  own = {n: tensor(*what) for n, what in {**FORMATS[kind], **WHOLE}.items()}
  assert quantized.find_codes(own).keys() == {next(iter(FORMATS[kind]))}
  assert quantized.tensors_of_codes(own) == FORMATS[kind].keys()


def test_weights_that_are_whole_are_no_codes(tmp_path):
  own = {n: tensor(*what) for n, what in WHOLE.items()} | {"up.weight": tensor(FLOAT8, (8, 8))}
  assert quantized.problem("m", own, own, {}, tmp_path) is None
  said = quantized.problem(
    "m", own, own, {"text_config": {"quantization_config": {"a": 1}}}, tmp_path
  )
  assert "'up.weight' of m is float8_e4m3fn: codes" in said
  assert "as text_config.quantization_config of its config says" in said
  (tmp_path / "hf_quant_config.json").write_text("{}")
  assert "as hf_quant_config.json says" in quantized.problem("m", own, own, {}, tmp_path)
  bare = {"up.weight": tensor(np.int8, (8, 8))}
  told = quantized.problem("m", bare, bare, {}, tmp_path / "other")
  assert "int8: codes of quantized weights, and their scale is not there" in told


def test_floats_may_hold_codes(tmp_path):
  """Whole numbers beside a scale; bytes of four bits in a column, where the config says so."""

  def read(values):
    return lambda start, out: np.copyto(out, np.resize(values, out.shape))

  own = {"up.weight": tensor(np.float32, (8, 8)), "up.weight_scale": tensor(np.float32, (8, 1))}
  for values, holds in (([5, -127, 0], True), ([0.5, 3], False), ([1], False)):
    own["up.weight"] = own["up.weight"]._replace(read=read(values))
    said = quantized.problem("m", own, own, {}, tmp_path)
    assert (said is not None and "holds whole numbers" in said) == holds
  packed = {"up.weight": tensor(np.float16, (32, 1))}
  assert quantized.problem("m", packed, packed, {}, tmp_path) is None
  said = quantized.problem("m", packed, packed, {"quantization_config": {"a": 1}}, tmp_path)
  assert "'up.weight' of m is float16: codes" in said


@pytest.mark.parametrize("place", [0, 5000, 2**20 + 7])
def test_integers_that_differ_anywhere_are_told(place):
  """They are copied from the first model."""
  values = np.zeros((2, 2**19 + 8), np.int8)
  changed = values.copy()
  changed.flat[place] = 1

  def of(x):
    def read(start, out):
      out[...] = x.reshape(-1)[start : start + out.size]

    return tensor(x.dtype, x.shape)._replace(read=read)

  table, other = of(values), of(changed)
  wide = of(values.astype(np.int32))
  assert quantized.note_copies([[("lut", "a", table), ("lut", "b", wide)], []]) == []
  (note,) = quantized.note_copies([[("lut", "a", table), ("lut", "b", other)]])
  assert "'lut' is int8 and differs between a and b: it is copied from a" in note


@pytest.mark.parametrize("dtype", [FLOAT8, np.int8])
def test_codes_in_memory_are_refused(dtype):
  base = {"up": {"weight": np.ones((4, 4), dtype), "weight_scale_inv": np.ones(1, np.float32)}}
  stack = jax.tree.map(lambda x: np.stack([x, x]), base)
  calls = [
    lambda: jaxmerge.merge(methods.average(), stack, base),
    lambda: jaxmerge.merge(methods.average(), [base, base], base),
    lambda: jaxmerge.merge(methods.average(), stack),
    lambda: masks.emr(base, stack),
    lambda: incremental.of(methods.average()).init(base),
    lambda: streaming.merge_slices(methods.average(), stack, base),
  ]
  for call in calls:
    with pytest.raises(ValueError, match=r"'up/weight' of .* 'up/weight_scale_inv' lies beside"):
      call()


def made(kind):
  rng = np.random.default_rng(0)
  return {n: rng.integers(0, 9, shape).astype(d) for n, (d, shape) in FORMATS[kind].items()}


@pytest.mark.parametrize("kind", ["gptq", "fp8 of an input", "mxfp4", "nvfp4"])
def test_codes_are_refused_or_copied(tmp_path, monkeypatch, kind):
  """No config says anything. What is excluded is copied, codes and scales, in their own dtypes."""
  monkeypatch.chdir(tmp_path)
  for k, tree in enumerate(folders.family(tmp_path)[1:3]):
    folders.write(tmp_path / f"m{k}", {**tree, **made(kind)})
  first = next(iter(FORMATS[kind]))
  with pytest.raises(errors.Problems, match=f"tensor '{first}' of m0, one of 1 such") as error:
    merge.merge_files(methods.average(), ["m0", "m1"], "out")
  assert len(error.value.lines) == 2
  text = """
merge_method: linear
base_model: m0
models: [{model: m0}, {model: m1}]
parameters: {weight: 1}
exclude: ['^(up|experts)']
"""
  recipe = tmp_path / "recipe.yml"
  recipe.write_text(text)
  plan = recipes.plan_of_file(recipe, Files())
  assert {o.name: o.dtype for o in plan.outputs if o.job is None and o.name != "position_ids"} == {
    n: np.dtype(d) for n, (d, _) in FORMATS[kind].items()
  }
  recipe.write_text(text + "dtype: bfloat16\n")
  if kind == "mxfp4":  # Its scales are bytes.
    assert recipes.plan_of_file(recipe, Files()).outputs
  else:
    with pytest.raises(errors.Problems, match="as bfloat16 it would mean something else"):
      recipes.plan_of_file(recipe, Files())


def test_an_adapter_is_not_added_to_codes(tmp_path):
  own = {"up.weight": np.ones((4, 4), FLOAT8), "up.input_scale": np.ones((), np.float32)}
  folders.write(tmp_path / "m", {**own, "norm.weight": np.ones(4, np.float32)})
  lora = tmp_path / "lora"
  parts = {f"base_model.model.up.lora_{x}.weight": np.ones((4, 4), np.float32) for x in "AB"}
  folders.write(lora, parts)
  (lora / "model.safetensors").rename(lora / "adapter_model.safetensors")
  (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
  job = methods.average(), [f"{tmp_path / 'm'}+{lora}"], tmp_path / "out"
  with pytest.raises(ValueError, match=r"lora is added to tensor 'up.weight' of .* holds codes"):
    merge.merge_files(*job)


@pytest.mark.parametrize(
  ("base", "model", "dtype"),
  [
    (FLOAT8, FLOAT8, "bfloat16"),
    (FLOAT8, np.float32, "float32"),
    (ml_dtypes.bfloat16, np.float32, "float32"),
    (np.float32, ml_dtypes.bfloat16, None),
  ],
)
def test_results_that_lose_bits_of_models_are_told(tmp_path, monkeypatch, base, model, dtype):
  """Unless the dtype is what the recipe says, and as it advises."""
  monkeypatch.chdir(tmp_path)
  for name, own in {"base": base, "m": model}.items():
    folders.write(tmp_path / name, folders.tensors(0, dtype=own))
  recipe = tmp_path / "recipe.yml"
  text = "merge_method: task_arithmetic\nbase_model: base\n"
  text += "models: [{model: m, parameters: {weight: 1}}]\n"

  def told(text):
    recipe.write_text(text)
    return [n for n in recipes.plan_of_file(recipe, Files()).notes if "rounded to" in n]

  found = told(text)
  assert len(found) == (dtype is not None)
  assert all(f"{np.dtype(base)}, in" in n and f"dtype: {dtype} keeps" in n for n in found)
  assert told(f"{text}dtype: {dtype or 'bfloat16'}\n") == []
