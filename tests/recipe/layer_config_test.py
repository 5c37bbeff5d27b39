"""What configs say of layers, after layers are stacked anew: lists follow, rules hold or do not."""

import json
import pathlib

import folders
import numpy as np
import pytest
import recipes

from jaxmerge.io.tensors.tensor import Files
from jaxmerge.recipe import RecipeError, layers
from jaxmerge.recipe.layer_config import restack
from jaxmerge.recipe.layer_rules import Layers

DEFAULTS = json.loads(
  (pathlib.Path(__file__).parents[1] / "support/oracles/layer_types.json").read_text()
)
UNEVEN = {"deepseek_v4", "dots3_note_text", "flint", "jamba", "kimi_linear", "lfm3_vl_vision"}
UNEVEN |= {"mimo_v2_flash", "recurrent_gemma", "zamba"}


def of(config, order, height=6):
  """A config of a stack of some layers, after they are stacked anew."""
  own = {"num_hidden_layers": height, **config}
  made = restack(own, "num_hidden_layers", Layers(height, tuple(order)))
  assert made.pop("num_hidden_layers") == len(order)
  return made


@pytest.mark.parametrize("kind", DEFAULTS)
def test_what_a_class_does_by_default_is_written_out(kind):
  """Of 55 classes of transformers: layers 1 to 23, and those from a stack of two halves."""
  for order in (range(1, 24), [*range(16), *range(9, 24)]):
    if kind in UNEVEN:
      with pytest.raises(ValueError, match=f"says model_type: {kind}, a rule over the numbers"):
        of({"model_type": kind}, order, 24)
      continue
    made = of({"model_type": kind}, order, 24)
    for key, each in DEFAULTS[kind].items():
      # Llama 4 has its kinds of attention by which layers have positions.
      if (kind, key) != ("llama4_text", "layer_types"):
        assert made[key] == [each[old] for old in order], key
  assert of({"model_type": kind}, range(24), 24) == {"model_type": kind}
  assert of({"model_type": kind}, range(12), 24) == {"model_type": kind}


@pytest.mark.parametrize(
  ("before", "after"),
  [
    # Lists with an entry for each layer, under any name.
    ({"any_name": list("abcdef")}, {"any_name": list("bcdea")}),
    ({"hybrid_override_pattern": "M-M*-E"}, {"hybrid_override_pattern": "-M*-M"}),
    ({"block_configs": [{"n": i} for i in range(6)]}, {"block_configs": [{"n": i} for i in (1, 2, 3, 4, 0)]}),  # noqa: E501
    ({"no_rope_layers": [1, 1, 1, 0, 1, 1]}, {"no_rope_layers": [1, 1, 0, 1, 1]}),
    ({"moe_layer_freq": [0, 1, 1, 1, 1, 1]}, {"moe_layer_freq": [1, 1, 1, 1, 0]}),
    ({"sparse": {"attention_freq": [0, 0, 0, 0, 1, 1]}}, {"sparse": {"attention_freq": [0, 0, 0, 1, 0]}}),  # noqa: E501
    ({"attention_types": [[["g", "l"], 3]]}, {"attention_types": [[["l", "g", "l", "g", "g"], 1]]}),
    ({"layer_overrides": {"4": "x", "5": "y"}}, {"layer_overrides": {"3": "x"}}),
    # Lists of numbers of layers.
    ({"mlp_only_layers": [0, 3]}, {"mlp_only_layers": [2, 4]}),
    ({"moe_layers": [0, 1, 2, 3, 4, 5]}, {"moe_layers": [0, 1, 2, 3, 4]}),
    ({"attn_layer_indices": [2, 5]}, {"attn_layer_indices": [1]}),
    ({"full_attn_idxs": [4]}, {"full_attn_idxs": [3]}),
    ({"rope_scaling_layers": [0, 5]}, {"rope_scaling_layers": [4]}),
    ({"block_types": ["r", "r", "a"]}, {"block_types": ["r", "a", "r", "r", "r"]}),
    ({"cross_attention_layers": [0, 5]}, {"cross_attention_layers": [4]}),
    (
      {"linear_attn_config": {"kda_layers": [1, 2, 3, 5, 6], "full_attn_layers": [4], "num": 6}},
      {"linear_attn_config": {"kda_layers": [1, 2, 4, 5], "full_attn_layers": [3], "num": 6}},
    ),
    # Rules that are written out, as a list or as another number.
    (
      {"decoder_sparse_step": 2, "mlp_only_layers": []},
      {"decoder_sparse_step": 1, "mlp_only_layers": [1, 3, 4]},
    ),
    (
      {"full_attention_interval": 2},
      {
        "full_attention_interval": 2,
        "layer_types": [f"{k}_attention" for k in ("full", "linear", "full", "linear", "linear")],
      },
    ),
    (
      {"interleave_moe_layer_step": 3, "moe_layers": None},
      {"interleave_moe_layer_step": 3, "moe_layers": [1]},
    ),
    (
      {"model_type": "exaone_moe", "first_k_dense_replace": 1},
      {
        "model_type": "exaone_moe",
        "first_k_dense_replace": 1,
        "mlp_layer_types": ["sparse"] * 4 + ["dense"],
        "layer_types": [f"{k}_attention" for k in ("sliding", "sliding", "full", "sliding", "sliding")],  # noqa: E501
      },
    ),
    # What has no window, or has a list, does not depend on a rule.
    ({"max_window_layers": 3, "use_sliding_window": False}, None),
    ({"_sliding_window_pattern": 4, "layer_types": list("abcdef")}, {"_sliding_window_pattern": 4, "layer_types": list("bcdea")}),  # noqa: E501
    # What is as long as there are layers, and is not about them.
    ({"eos_token_id": [1, 2, 3, 4, 5, 6], "rope_scaling": {"short_factor": [1.0] * 6}}, None),
    ({"architectures": list("abcdef"), "vision_feature_layer": -2}, None),
  ],
)  # fmt: skip
def test_lists_and_rules_follow_the_layers(before, after):
  """Layers 1 to 4, then layer 0; the last one is left out."""
  assert of(before, [1, 2, 3, 4, 0]) == (before if after is None else after)


@pytest.mark.parametrize(
  ("config", "order", "after"),
  [
    ({"first_k_dense_replace": 2}, [0, 1, 4, 5], {"first_k_dense_replace": 2}),
    ({"first_k_dense_replace": 2}, [0, 3, 4, 5], {"first_k_dense_replace": 1}),
    ({"num_dense_layers": 2}, [3, 4, 5], {"num_dense_layers": 0}),
    ({"num_dense_layers": 2}, [0, 1, 0, 1, 2], {"num_dense_layers": 4}),
    ({"num_kv_shared_layers": 2}, [0, 1, 2, 3, 3, 4, 5], {"num_kv_shared_layers": 2}),
    ({"num_kv_shared_layers": 2}, [0, 1, 2], {"num_kv_shared_layers": 0}),
    (
      {"max_window_layers": 2, "use_sliding_window": True},
      [1, 2, 3],
      {"max_window_layers": 1, "use_sliding_window": True},
    ),
    (
      {"attn_layer_period": 3, "attn_layer_offset": 1},
      [0, 1, 2, 3, 4, 5, 3, 4],
      {"attn_layer_period": 3, "attn_layer_offset": 1},
    ),
    ({"scale_depth": 3.0}, [0] * 24, {"scale_depth": 6.0}),
    (
      {"out_features": ["stage6"], "out_indices": [6], "stage_names": None},
      [0, 1],
      {"out_features": ["stage2"], "out_indices": [2], "stage_names": ["stem", "stage1", "stage2"]},
    ),
    (
      {"model_type": "glm4_moe_lite"},
      [1, 2],
      {"model_type": "glm4_moe_lite", "mlp_layer_types": ["sparse", "sparse"]},
    ),
  ],
)
def test_numbers_of_rules_follow_the_layers(config, order, after):
  assert of(config, order) == after


@pytest.mark.parametrize(
  ("config", "order"),
  [
    ({"first_k_dense_replace": 2}, [0, 1, 4, 0]),
    ({"num_kv_shared_layers": 2}, [4, 5, 0]),
    ({"attn_layer_period": 3, "attn_layer_offset": 1}, [1, 2, 3]),
    ({"expert_layer_period": 2, "expert_layer_offset": 1}, [0, 2, 4]),
    ({"moe_layer_interval": 2}, [1, 2, 3]),
    ({"moe_layer_start_index": 1}, [2, 0]),
    ({"any_layer_every_n": 2}, [0, 0, 1]),
    ({"global_attention_every_n": 2}, [0, 0, 1]),
    ({"n_dense_layers": 1}, [1, 2]),
    ({"out_features": ["stage3"]}, [1, 2]),
    (
      {"model_type": "gemma4_text", "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
      [0, 1],
    ),
    ({"encoder_sparse_step": 4}, [1, 2, 3]),
    ({"scale_attn_by_inverse_layer_idx": True}, [1, 2]),
    ({"hidden_size_per_layer_input": 256}, [0, 1]),
    ({"model_type": "qwen2_moe", "max_window_layers": 6, "use_sliding_window": True}, [1, 2]),
  ],
)
def test_rules_that_hold_no_more_and_have_no_list_are_refused(config, order):
  with pytest.raises(ValueError, match=f"the config says {'|'.join(config)}"):
    of(config, order)


def test_layers_that_predict_more_tokens_lie_behind_those_that_are_counted():
  config = {"text_config": {"num_hidden_layers": 4, "num_nextn_predict_layers": 2}}
  every = dict(enumerate(range(6)))
  assert layers.resize(config, 6, every) == config
  found = layers.resize(config, 6, {0: 0, 1: 2, 2: 3, 3: 5})["text_config"]
  assert found == {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}
  with pytest.raises(ValueError, match="the last 2 of the 6 layers predict more tokens"):
    layers.resize(config, 6, {0: 5, 1: 0})


def test_the_part_of_a_part_is_found():
  own = {"thinker": {"text_config": {"num_hidden_layers": 3}, "audio": {"layers": 2}}}
  found = layers.resize(own, 3, {0: 0, 1: 2})
  assert found == {"thinker": {"text_config": {"num_hidden_layers": 2}, "audio": {"layers": 2}}}
  names = ["thinker.model.layers.2.w", "thinker.audio.layers.0.w"]
  assert layers.main(names, own) == "thinker.model.layers."


def test_layers_are_counted_as_they_are_stored():
  """The config says 9 of 3, somewhere within; of two stacks it is asked which is meant."""
  own = {"num_hidden_layers": 9, "layer_types": list("abcdefghi")}
  expected = {"num_hidden_layers": 2, "layer_types": list("ac")}
  assert layers.resize({"text_config": own}, 3, {0: 0, 1: 2}) == {"text_config": expected}
  with pytest.raises(ValueError, match=r"which of them are the 3 layers of the files\?"):
    layers.resize({"a": own, "b": own}, 3, {0: 0, 1: 2})


def test_lists_of_a_model_with_fewer_layers_are_not_taken():
  assert of({"any": [7]}, [0, 8]) == {"any": [7]}
  with pytest.raises(ValueError, match=r"an entry for each of 6 layers, but layer 8 of a model"):
    of({"layer_types": list("abcdef")}, [0, 8])


def test_layers_of_two_kinds_are_not_merged_with_each_other(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  trees = folders.family(tmp_path, 2)
  own = folders.CONFIG | {"layer_types": ["full", "slides", "full"]}
  for name, tree in zip(("base", "m0", "m1"), trees, strict=True):
    folders.write(tmp_path / name, tree, config=own)
  text = """
merge_method: slerp
base_model: m0
parameters: {t: 0.5}
slices:
  - sources: [{model: m0, layer_range: [0, 1]}, {model: m1, layer_range: [%d, %d]}]
"""
  recipe = tmp_path / "recipe.yml"
  recipe.write_text(text % (2, 3))
  plan = recipes.plan_of_file(recipe, Files())
  assert json.loads(plan.texts["config.json"])["layer_types"] == ["full"]
  recipe.write_text(text % (1, 2))
  with pytest.raises(RecipeError, match=r"layer_types: \['full'\] and \['slides'\]"):
    recipes.plan_of_file(recipe, Files())


def test_layers_that_no_key_counts_are_known_by_their_lists_or_their_class():
  order = {0: 0, 1: 2}
  own = {"model_type": "nemotron_h", "layers_block_type": list("abc"), "n_groups": 3}
  assert layers.resize(own, 3, order) == own | {"layers_block_type": list("ac")}
  sees = {"model_type": "llava", "vision_config": {"num_hidden_layers": 3}, "text_config": {"a": 1}}
  text = {"a": 1, "num_hidden_layers": 2}
  assert layers.resize(sees, 3, order) == sees | {"text_config": text}
  assert layers.resize({"model_type": "llama"}, 3, order)["num_hidden_layers"] == 2
  assert layers.resize({"model_type": "mine"}, 3, {0: 0, 1: 1, 2: 2}) == {"model_type": "mine"}
  with pytest.raises(ValueError, match="no count of the 3 layers, such as num_hidden_layers"):
    layers.resize({"model_type": "mine"}, 3, order)


def sliced(folder, config, rests, *ranges, outside=()):
  """The plan of some ranges of layers of a model, of which each has some tensors."""
  tensors = {f"layers.{i}.{rest}": (2, 2) for i, own in enumerate(rests) for rest in own}
  tensors |= dict(outside)
  folders.write(folder, {n: np.ones(s, np.float32) for n, s in tensors.items()}, config=config)
  text = "merge_method: passthrough\nslices:\n"
  for i, j in ranges:
    text += f"  - sources: [{{model: {folder}, layer_range: [{i}, {j}]}}]\n"
  (folder / "recipe.yml").write_text(text)
  return recipes.plan_of_file(folder / "recipe.yml", Files())


def test_layers_that_are_unlike_others_keep_their_place(tmp_path):
  """ModernBERT's first has one norm less, RWKV's one more; of lists and rules the kinds follow."""
  five = {"model_type": "mine", "num_hidden_layers": 5}
  first = [["w"], *[["norm", "w"]] * 4]
  for kinds in ({}, {"layer_types": list("fssfs")}):
    sliced(tmp_path, five | kinds, first, (0, 2), (3, 5))
    for ranges in ([(3, 5)], [(1, 2), (0, 1)], [(0, 5), (0, 1)]):
      with pytest.raises(RecipeError, match="'norm', unlike the layer that was layer"):
        sliced(tmp_path, five | kinds, first, *ranges)
  experts = [["w"], ["e"], ["w"], ["e"], ["w"]]
  with pytest.raises(
    RecipeError, match=r"layer 1 of .* has 'e', unlike the layer that was layer 0"
  ):
    sliced(tmp_path, five, experts, (1, 5))
  sliced(tmp_path, five | {"kinds_of_layers": list("wewew")}, experts, (1, 5))
  sliced(tmp_path, five | {"moe_layers": [1, 3]}, experts, (1, 2), (0, 1), (3, 5))


def test_columns_for_each_head_of_each_layer_keep_their_number(tmp_path):
  """ESM predicts contacts from all of them."""
  own = {"num_hidden_layers": 3, "num_attention_heads": 4}
  for width in (11, 12):
    outside = [("contact_head.regression.weight", (1, width))]
    if width == 11:
      sliced(tmp_path, own, [["w"]] * 3, (0, 2), outside=outside)
  with pytest.raises(RecipeError, match="has 12 columns, one for each of 4 heads of 3 layers"):
    sliced(tmp_path, own, [["w"]] * 3, (0, 2), outside=outside)
