"""Weights in 8-bit floats: the numbers that their scales make of them, in any cut."""

import json

import folders
import ml_dtypes
import numpy as np
import pytest

from jaxmerge import methods
from jaxmerge.files import inputs, merge
from jaxmerge.io.huggingface import hub
from jaxmerge.io.tensors import pieces, quantized, safetensors, scaled
from jaxmerge.io.tensors.tensor import Files, Tensor

FLOAT8 = ml_dtypes.float8_e4m3fn
BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 4]}}


def tensor(x):
  flat = x.reshape(-1)
  return Tensor("", x.dtype, x.shape, lambda start, out: np.copyto(out, flat[start:][: out.size]))


def expanded(scale, shape, block):
  """The scale of every entry, by a loop."""
  out = np.empty(shape, np.float32)
  for place in np.ndindex(shape):
    *lead, i, j = place
    out[place] = scale[(*lead, i // block[0], j // block[1])]
  return out


RULES = {
  "a number": ((5, 6), (), lambda s: s),
  "a number in a list": ((5, 6), (1,), lambda s: s),
  "rows": ((5, 6), (5,), lambda s: s[:, None]),
  "rows of a square": ((6, 6), (6,), lambda s: s[:, None]),
  "rows as a matrix": ((5, 6), (5, 1), lambda s: s),
  "columns": ((5, 6), (1, 6), lambda s: s),
  "blocks": ((5, 6), (3, 2), lambda s: expanded(s, (5, 6), (2, 4))),
  "experts": ((3, 5, 6), (3,), lambda s: s[:, None, None]),
  "experts' columns": ((3, 5, 6), (3, 1, 6), lambda s: s),
  "experts' rows": ((3, 5, 6), (3, 5, 1), lambda s: s),
  "experts' blocks": ((3, 5, 6), (3, 3, 2), lambda s: expanded(s, (3, 5, 6), (2, 4))),
  "a vector": ((6,), (1,), lambda s: s),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("end", ["_scale", "_scale_inv"])
def test_scales_multiply_their_entries(rule, end):
  shape, scale_shape, expand = RULES[rule]
  rng = np.random.default_rng(0)
  codes = rng.normal(size=shape).astype(FLOAT8)
  scale = np.asarray(rng.uniform(0.5, 2, size=scale_shape), np.float32)
  of = {"up.weight": tensor(codes), f"up.weight{end}": tensor(scale)}
  result = scaled.dequantize(of, BLOCKS)
  assert result.scales == {f"up.weight{end}": "up.weight"}
  (name,) = result.tensors
  want = codes.astype(np.float32) * expand(scale)
  weight = result.tensors[name]
  assert weight.stored_dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(pieces.load(weight), want)
  for start in range(codes.size):
    for size in (1, 7, 13):
      part = np.empty(min(size, codes.size - start), np.float32)
      weight.read(start, part)
      np.testing.assert_array_equal(part, want.reshape(-1)[start:][: part.size])


def test_what_fits_no_rule_is_named():
  of = {"w": tensor(np.ones((5, 6), FLOAT8)), "w_scale": tensor(np.ones((2, 2), np.float32))}
  of["w_scale"] = of["w_scale"]._replace(where="file: tensor 'w_scale'")
  with pytest.raises(ValueError, match=r"file: tensor 'w_scale': its shape \[2, 2\] does not fit"):
    scaled.dequantize(of, BLOCKS)


def test_other_codes_stay_codes():
  of = {
    "plain.weight": np.ones((4, 4), FLOAT8),
    "int.weight": np.ones((4, 4), np.int8),
    "int.weight_scale": np.ones(4, np.float32),
    "odd.weight": np.ones((4, 4), FLOAT8),
    "odd.weight_scale": np.ones(4, np.float32),
    "odd.weight_zero_point": np.ones(4, FLOAT8),
    "mx.weight": np.ones((4, 4), FLOAT8),
    "mx.weight_scale": np.full((4, 1), 127, np.uint8),  # Exponents.
  }
  result = scaled.dequantize({n: tensor(x) for n, x in of.items()}, {})
  assert result.tensors.keys() == of.keys()
  assert not result.weights
  assert quantized.find_codes(result.tensors).keys() == {"int.weight", "odd.weight", "mx.weight"}


def test_scales_of_activations_are_left_out():
  of = {
    "up.weight": np.ones((4, 4), FLOAT8),
    "up.weight_scale": np.float32(2),
    "up.input_scale": np.float32(2),
    "experts.w13_input_scale": np.ones(2, np.float32),
    "attn.k_scale": np.float32(2),
    "clip.logit_scale": np.float32(2),
  }
  result = scaled.dequantize({n: tensor(np.asarray(x)) for n, x in of.items()}, {})
  assert result.tensors.keys() == {"up.weight", "clip.logit_scale"}


def quantize(x, block):
  """Codes and scales of blocks of a matrix."""
  grid = tuple(-(-n // b) for n, b in zip(x.shape, block, strict=True))
  scale = np.empty(grid, np.float32)
  for i, j in np.ndindex(grid):
    part = x[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
    scale[i, j] = np.abs(part).max() / 448
  return (x / expanded(scale, x.shape, block)).astype(FLOAT8), scale


def test_a_folder_is_merged_as_its_numbers_are(tmp_path):
  """DeepSeek's blocks of 128 x 128: no scale and no quantization_config are left."""
  rng = np.random.default_rng(0)
  names = ["a", "b"]
  numbers = {}
  config = {**folders.CONFIG, "torch_dtype": "bfloat16"}
  quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
  for name in names:
    x = rng.normal(size=(200, 130)).astype(np.float32)
    codes, scale = quantize(x, (128, 128))
    numbers[name] = codes.astype(np.float32) * expanded(scale, x.shape, (128, 128))
    own = {
      "up.weight": codes,
      "up.weight_scale_inv": scale,
      "up.input_scale": np.ones((), np.float32),
      "norm.weight": np.ones(4, ml_dtypes.bfloat16),
    }
    folders.write(tmp_path / name, own, config={**config, "quantization_config": quantization})
  models = [tmp_path / n for n in names]
  out = merge.merge_files(methods.average(), models, tmp_path / "out", entries=1000)
  merged = safetensors.load(out / "model.safetensors")
  assert merged.keys() == {"up.weight", "norm.weight"}
  assert merged["up.weight"].dtype == ml_dtypes.bfloat16
  mean = (numbers["a"] + numbers["b"]) / np.float32(2)
  np.testing.assert_array_equal(merged["up.weight"], mean.astype(ml_dtypes.bfloat16))
  assert json.loads((out / "config.json").read_text()) == config
  facts = json.loads((out / "jaxmerge_provenance.json").read_text())
  assert any(
    "1 weights of " in note and "multiplied by their scales" in note for note in facts["notes"]
  )
  outcomes = facts["inputs"][str(models[0])]
  assert outcomes["up.weight_scale_inv"] == "multiplied into the weight -> up.weight"
  assert outcomes["up.input_scale"] == "dropped: scales of activations"
  assert "multiplied by their scales" in (out / "README.md").read_text()


def test_an_adapter_is_added_to_the_numbers(tmp_path):
  own = {"up.weight": np.ones((4, 4), FLOAT8), "up.weight_scale": np.float32(3)}
  folders.write(tmp_path / "m", {**own, "norm.weight": np.ones(4, np.float32)})
  lora = tmp_path / "lora"
  parts = {f"base_model.model.up.lora_{x}.weight": np.ones((4, 4), np.float32) for x in "AB"}
  folders.write(lora, parts)
  (lora / "model.safetensors").rename(lora / "adapter_model.safetensors")
  settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
  (lora / "adapter_config.json").write_text(json.dumps(settings))
  (model,) = inputs.open_all([("m", f"{tmp_path / 'm'}+{lora}")], Files(), hub.Finder())
  np.testing.assert_array_equal(pieces.load(model.tensors["up.weight"]), np.full((4, 4), 7.0))
