"""PEFT LoRA adapters: against dense matrices in double precision, in slices; what is refused."""

import json
import math
import re

import ml_dtypes
import numpy as np
import pytest
from adapter_tensors import PREFIX, lora_parts, noise

from jaxmerge.io.peft import adapter, low_rank
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Files, Tensor

Q = "model.layers.0.q_proj"
K = "model.layers.1.k_proj"
WORDS = "model.embed_tokens"


def held(x, where="base.safetensors"):
  """A tensor in memory, and the ranges that were read of it."""
  ranges = []

  def read(start, out):
    ranges.append((start, start + out.size))
    out[...] = x.reshape(-1)[start : start + out.size]

  return Tensor(where, x.dtype, x.shape, read), ranges


def whole(tensor):
  out = np.empty(tensor.shape, tensor.dtype)
  tensor.read(0, out.reshape(-1))
  return out


def embedding_parts(module, rank, shape):
  words, width = shape
  return {
    f"{PREFIX}{module}.lora_embedding_A": noise(0, rank, words),
    f"{PREFIX}{module}.lora_embedding_B": noise(1, width, rank),
  }


@pytest.fixture
def opened(tmp_path):
  """Writes an adapter, and opens it on base arrays: name -> Tensor."""
  files = Files()

  def adapted(base, parts, **config):
    folder = tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
    (folder / adapter.CONFIG).write_text(json.dumps(config))
    safetensors.save(folder / adapter.WEIGHTS, parts, {"format": "pt"})
    tensors = {n: x if isinstance(x, Tensor) else held(x)[0] for n, x in base.items()}
    return adapter.apply(tensors, folder, files).tensors

  yield adapted
  files.close()


def dense(base, a, b, scale, transposed=False, magnitude=None):
  """The adapted matrix in double precision."""
  base, a, b = (x.astype(np.float64) for x in (base, a, b))
  x = (base.T if transposed else base) + scale * (b @ a)
  if magnitude is not None:
    x = x * (magnitude / np.linalg.norm(x, axis=1))[:, None]
  return x.T if transposed else x


def assert_close(found, expected):
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# --- What is computed ---


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_an_adapted_matrix_is_the_base_and_the_scaled_product(opened, dtype):
  base = {f"{Q}.weight": noise(5, 5, 7, dtype=dtype), f"{Q}.bias": noise(6, 5)}
  parts = lora_parts(Q, 2, (5, 7), dtype=dtype)
  found = opened(base, parts)
  a, b = parts.values()
  assert_close(whole(found[f"{Q}.weight"]), dense(base[f"{Q}.weight"], a, b, 3.0))


def test_a_base_of_64_bits_keeps_them(opened):
  base, parts = noise(5, 5, 7, dtype=np.float64), lora_parts(Q, 2, (5, 7))
  found = whole(opened({f"{Q}.weight": base}, parts)[f"{Q}.weight"])
  np.testing.assert_allclose(found, dense(base, *parts.values(), 3.0), rtol=1e-14, atol=1e-14)


def test_other_tensors_are_passed_through(opened):
  norm, ids = held(noise(0, 3))[0], held(np.arange(4))[0]
  base = {f"{Q}.weight": noise(5, 5, 7), "norm.weight": norm, "ids": ids}
  found = opened(base, lora_parts(Q, 2, (5, 7)))
  assert list(found) == list(base)
  assert found["norm.weight"] is norm
  assert found["ids"] is ids


def test_defaults_are_those_of_peft(opened):
  base = noise(5, 5, 7)
  parts = lora_parts(Q, 8, (5, 7))
  found = opened({f"{Q}.weight": base}, parts, r=8, lora_alpha=8)
  assert_close(whole(found[f"{Q}.weight"]), dense(base, *parts.values(), 1.0))


def test_rank_stabilised_scale(opened):
  base, parts = noise(5, 5, 7), lora_parts(Q, 2, (5, 7))
  found = opened({f"{Q}.weight": base}, parts, use_rslora=True)
  assert_close(whole(found[f"{Q}.weight"]), dense(base, *parts.values(), 6 / math.sqrt(2)))


@pytest.mark.parametrize(
  ("pattern", "holds"),
  [("k_proj", True), (r"layers\.1\..*", True), ("proj", False), (f"^{K}", True), ("layers", False)],
)
def test_patterns_are_names_or_ends_of_names(opened, pattern, holds):
  base = {f"{Q}.weight": noise(5, 5, 7), f"{K}.weight": noise(6, 5, 7)}
  parts = lora_parts(Q, 2, (5, 7)) | lora_parts(K, 4 if holds else 2, (5, 7), seed=8)
  found = opened(base, parts, rank_pattern={pattern: 4}, alpha_pattern={pattern: 20})
  a, b, c, d = parts.values()
  assert_close(whole(found[f"{Q}.weight"]), dense(base[f"{Q}.weight"], a, b, 3.0))
  scale = 5.0 if holds else 3.0
  assert_close(whole(found[f"{K}.weight"]), dense(base[f"{K}.weight"], c, d, scale))


@pytest.mark.parametrize(("out", "inner"), [(5, 7), (7, 5), (6, 6)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_layouts(opened, out, inner, transposed, dora):
  base = noise(5, inner, out) if transposed else noise(5, out, inner)
  parts = lora_parts(Q, 2, (out, inner))
  a, b = parts.values()
  magnitude = 1 + np.arange(out, dtype=np.float32) if dora else None
  if dora:
    parts[f"{PREFIX}{Q}.lora_magnitude_vector"] = magnitude
  found = opened({f"{Q}.weight": base}, parts, fan_in_fan_out=transposed, use_dora=dora)
  expected = dense(base, a, b, 3.0, transposed, magnitude)
  assert_close(whole(found[f"{Q}.weight"]), expected)


def test_the_shape_tells_the_layout_where_it_can(opened):
  base = {f"{Q}.weight": noise(5, 7, 5), "lm_head.weight": noise(6, 11, 5)}
  parts = lora_parts(Q, 2, (5, 7)) | lora_parts("lm_head", 2, (11, 5), seed=8)
  found = opened(base, parts, fan_in_fan_out=False)
  a, b, c, d = parts.values()
  assert_close(whole(found[f"{Q}.weight"]), dense(base[f"{Q}.weight"], a, b, 3.0, transposed=True))
  assert_close(whole(found["lm_head.weight"]), dense(base["lm_head.weight"], c, d, 3.0))


@pytest.mark.parametrize("shape", [(9, 4), (4, 4)])
@pytest.mark.parametrize("dora", [False, True])
def test_embeddings(opened, shape, dora):
  base, parts = noise(5, *shape), embedding_parts(WORDS, 2, shape)
  a, b = parts.values()
  magnitude = 1 + np.arange(4, dtype=np.float32) if dora else None
  if dora:
    parts[f"{PREFIX}{WORDS}.lora_magnitude_vector"] = magnitude
  found = opened({f"{WORDS}.weight": base}, parts, use_dora=dora)
  expected = dense(base, a, b, 3.0, transposed=True, magnitude=magnitude)
  assert_close(whole(found[f"{WORDS}.weight"]), expected)


def test_whole_tensors_take_the_place_of_the_bases(opened):
  base = {"score.weight": noise(5, 3, 4), "score.bias": noise(6, 3), "w": noise(7, 2)}
  new = {"score.weight": noise(8, 3, 4), "score.bias": noise(9, 3)}
  found = opened(base, {PREFIX + n: x for n, x in new.items()}, modules_to_save=["score"])
  for name, x in (base | new).items():
    np.testing.assert_array_equal(whole(found[name]), x)


def test_whole_tensors_of_another_dtype_are_stored_as_the_bases(opened):
  base, saved = noise(5, 9, 4, dtype=np.float16), noise(8, 9, 4)
  name, parts = f"{WORDS}.weight", {f"{PREFIX}{WORDS}.base_layer.weight": saved}
  for more in ({}, embedding_parts(WORDS, 2, (9, 4))):
    found = opened({name: base}, parts | more)[name]
    assert (found.dtype, found.store_as) == (np.float32, np.float16)


def test_an_adapted_matrix_that_is_saved_as_well_takes_the_place_of_the_bases(opened):
  saved, parts = noise(8, 9, 4), embedding_parts(WORDS, 2, (9, 4))
  a, b = parts.values()
  parts[f"{PREFIX}{WORDS}.base_layer.weight"] = saved
  found = opened({f"{WORDS}.weight": noise(5, 9, 4)}, parts)
  assert_close(whole(found[f"{WORDS}.weight"]), dense(saved, a, b, 3.0, transposed=True))


# --- Slices ---


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("shape", [(700, 1000), (3, 270_000), (200_000, 3)])
def test_slices_have_the_bits_of_the_whole(opened, shape, dora):
  base = {f"{Q}.weight": noise(5, *shape), f"{K}.weight": noise(6, *shape)}
  parts = lora_parts(Q, 2, shape) | lora_parts(K, 2, shape, seed=8)
  if dora:
    parts |= {f"{PREFIX}{m}.lora_magnitude_vector": noise(9, shape[0]) for m in (Q, K)}
  found = opened(base, parts, use_dora=dora)
  expected = {n: whole(t).reshape(-1) for n, t in found.items()}
  generator, size = np.random.default_rng(0), math.prod(shape)
  for start in [0, size - 1, *generator.integers(0, size, 3)]:
    for name, tensor in found.items():
      count = min(size - start, int(generator.integers(1, 2 * low_rank.BLOCK)))
      out = np.empty(count, np.float32)
      tensor.read(int(start), out)
      np.testing.assert_array_equal(out, expected[name][start : start + count])


def test_no_more_is_read_than_the_blocks_of_a_slice(opened):
  shape = (4000, 1000)
  tensor, ranges = held(np.zeros(shape, np.float32))
  found = opened({f"{Q}.weight": tensor}, lora_parts(Q, 2, shape))
  assert not ranges
  step = low_rank.BLOCK // 1000
  out = np.empty(10, np.float32)
  found[f"{Q}.weight"].read(1000 * step - 5, out)
  assert ranges == [(0, 1000 * step), (1000 * step, 2000 * step)]
  found[f"{Q}.weight"].read(1000 * step + 5, out)
  assert len(ranges) == 2, "the last block is kept"


# --- What is refused ---


def test_a_folder_without_an_adapter(tmp_path):
  with pytest.raises(FileNotFoundError, match="none: no such folder"):
    adapter.paths(tmp_path / "none")
  with pytest.raises(FileNotFoundError, match="the folder is empty"):
    adapter.paths(tmp_path)
  (tmp_path / adapter.CONFIG).write_text("{}")
  with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing\.$"):
    adapter.paths(tmp_path)
  (tmp_path / "adapter_model.bin").write_bytes(b"")
  with pytest.raises(FileNotFoundError, match=r"\.bin is a pickle.*save_pretrained writes safe"):
    adapter.paths(tmp_path)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"peft_type": "POLY"}, r"peft_type is 'POLY', not one of LORA, .*; merge it with PEFT"),
    ({"peft_type": None}, "peft_type is None"),
    ({"bias": "some"}, r"bias = 'some' is not known"),
    ({"lora_bias": True}, "but needs lora_A.weight, lora_B.weight, lora_B.bias"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "must be ranges of the base's 1 layers"),
    ({"trainable_token_indices": [1]}, "but no tensor is trainable_tokens_delta"),
    ({"kasa_config": {"beta": 1}}, "kasa_config"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    ({"use_qalora": True}, "use_qalora"),
    ({"a_key_of_tomorrow": 1}, "a_key_of_tomorrow = 1 is not supported; merge it with PEFT"),
    ({"init_lora_weights": "corda"}, "'corda' changed the base .*path_initial_model_for_weight"),
    (
      {"init_lora_weights": "loftq"},
      "'loftq' changed the base .*merge_and_unload.* or give the base",
    ),
    ({"use_dora": 1}, "use_dora must be true or false, got 1"),
    ({"r": 0}, "r must be a whole number, 1 or more, got 0"),
    ({"r": True}, "r must be a whole number, 1 or more, got True"),
    ({"rank_pattern": {"q": 2.5}}, "rank_pattern: 'q' must be a whole number, 1 or more, got 2.5"),
    ({"lora_alpha": "16"}, "lora_alpha must be a number, got '16'"),
    ({"lora_alpha": 10**399}, "lora_alpha must be between .* got a number of about 400 digits"),
    ({"lora_alpha": float("nan")}, "lora_alpha must be between .* got nan"),
    ({"lora_alpha": float("inf")}, "lora_alpha must be between .* got inf"),
    ({"lora_alpha": True}, "lora_alpha must be a number, got True"),
    ({"alpha_pattern": {"q": 1e300}}, "alpha_pattern: 'q' must be between"),
    ({"r": 10**30}, "r must be a whole number, 1 or more, got a number of about 31 digits"),
    ({"alpha_pattern": {"q": None}}, "alpha_pattern: 'q' must be a number, got None"),
    ({"alpha_pattern": ["q"]}, r"alpha_pattern must map modules to numbers, got \['q'\]"),
    ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is no regular expression"),
    ({"alpha_pattern": {r"(a)\1": 2}}, "the escape at 4 is not known; write module names instead"),
    ({"r": 4}, r"q_proj.lora_A.weight': its rank is 2, but 4 by r or rank_pattern"),
    ({"use_dora": True}, "has lora_A.weight, lora_B.weight, but needs .*lora_magnitude_vector"),
  ],
)
def test_a_config_that_is_not_understood(opened, config, message):
  with pytest.raises(ValueError, match=message):
    opened({f"{Q}.weight": noise(5, 5, 7)}, lora_parts(Q, 2, (5, 7)), **config)


def test_keys_without_an_effect_are_none(opened):
  config = {"use_qalora": False, "layer_replication": None, "a_key_of_tomorrow": {}}
  config |= {"modules_to_save": ["classifier", "score"], "target_modules": "all-linear"}
  opened({f"{Q}.weight": noise(5, 5, 7)}, lora_parts(Q, 2, (5, 7)), **config)


def changed(changes):
  """The parts of a plain adapter of layer 0, with some of them replaced; None leaves one out."""
  changes = {f"{PREFIX}model.layers.0.{n}": x for n, x in changes.items()}
  return {n: x for n, x in (lora_parts(Q, 2, (5, 7)) | changes).items() if x is not None}


A, B, MAGNITUDE = "q_proj.lora_A.weight", "q_proj.lora_B.weight", "q_proj.lora_magnitude_vector"


@pytest.mark.parametrize(
  ("parts", "message"),
  [
    (changed({A: None}), "q_proj' has lora_B.weight, but needs lora_A.weight, lora_B.weight"),
    (changed({B: None}), "q_proj' has lora_A.weight, but needs lora_A.weight, lora_B.weight"),
    (
      changed({MAGNITUDE: noise(0, 5)}),
      "but needs lora_A.weight, lora_B.weight, as use_dora is False and lora_bias False in",
    ),
    (
      changed({"q_proj.lora_embedding_A": noise(0, 2, 5)}),
      "but needs lora_embedding_A, lora_embedding_B",
    ),
    (
      changed({A: noise(0, 2, 8)}),
      r"A is \[2, 8\] and B \[5, 2\], .* \[5, 8\] or \[8, 5\]; it is",
    ),
    (changed({A: noise(0, 3, 7)}), r"lora_A.weight': its rank is 3, but 2 in .*lora_B.weight'"),
    (changed({A: noise(0, 2, 7, 3, 3)}), r"A is \[2, 63\] and B \[5, 2\]"),
    (
      changed({B: np.ones((5, 2), np.int8)}),
      "lora_B.weight': is int8; use weights that are not",
    ),
    (changed({"q_prj.weight": noise(0, 5, 7)}), "nor in the base, whose nearest is"),
    (changed({"lm_head.weight": noise(0, 5, 7)}), r"nor in the base.*, untied \(tie_word_emb"),
    (changed({"q_proj.lora_C": noise(0, 5, 7)}), "lora_C': is neither a part of LORA"),
    (changed({"q_proj.lora_A.default.weight": noise(0, 5)}), "is neither a part"),
    (changed({"q_proj.weight": noise(0, 6, 7)}), r"is \[6, 7\], but \[5, 7\] in the"),
    (
      {"model.layers.0.q_proj.lora_A.weight": noise(0, 2, 7)},
      "names of an adapter's tensors must begin with 'base_model.model.'",
    ),
    (
      lora_parts("block.0.q_proj", 2, (5, 7)),
      f"the base has no tensor 'block.0.q_proj.weight', whose nearest is '{Q}.weight'; give the",
    ),
    (lora_parts("lm_head", 2, (5, 7)), r"no tensor 'lm_head.weight'; .*untied \("),
  ],
)
def test_tensors_that_are_not_understood(opened, parts, message):
  with pytest.raises(ValueError, match=message):
    opened({f"{Q}.weight": noise(5, 5, 7)}, parts)


def test_a_magnitude_of_another_length(opened):
  parts = changed({MAGNITUDE: noise(0, 4)})
  with pytest.raises(ValueError, match=r"lora_magnitude_vector': must be \[5\], is \[4\]"):
    opened({f"{Q}.weight": noise(5, 5, 7)}, parts, use_dora=True)


def test_an_output_without_a_norm(opened):
  parts = changed({MAGNITUDE: noise(0, 5)})
  parts[f"{PREFIX}{Q}.lora_B.weight"][:] = 0
  base = noise(5, 5, 7)
  base[3] = 0
  found = opened({f"{Q}.weight": base}, parts, use_dora=True)
  with pytest.raises(ValueError, match="an output is all zero, and DoRA divides by its norm"):
    whole(found[f"{Q}.weight"])


def test_an_embedding_fits_in_one_layout_only(opened):
  with pytest.raises(ValueError, match=re.escape("for a matrix [9, 4]; it is [4, 9]")):
    opened({f"{WORDS}.weight": noise(5, 4, 9)}, embedding_parts(WORDS, 2, (9, 4)))


def test_quantized_weights_are_refused(opened):
  with pytest.raises(ValueError, match=r"base\.safetensors: is uint8; use weights that are not"):
    opened({f"{Q}.weight": np.ones((5, 7), np.uint8)}, lora_parts(Q, 2, (5, 7)))


def test_a_square_matrix_beside_others_that_contradict_the_config(opened):
  base = {f"{Q}.weight": noise(5, 5, 5), "lm_head.weight": noise(6, 11, 5)}
  parts = lora_parts(Q, 2, (5, 5)) | lora_parts("lm_head", 2, (11, 5))
  with pytest.raises(ValueError, match=r"q_proj.*is square, and fan_in_fan_out does not determine"):
    opened(base, parts, fan_in_fan_out=True)
  opened(base, parts, fan_in_fan_out=False)
  words = {f"{WORDS}.weight": noise(7, 9, 4)}, embedding_parts(WORDS, 2, (9, 4))
  opened(base | words[0], parts | words[1], fan_in_fan_out=False)
