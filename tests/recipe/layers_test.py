"""Where the layers of a model are, by names and config."""

import pytest

from jaxmerge.recipe import layers


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("transformer.h.11.attn.c_attn.weight", ("transformer.h.", 11, "attn.c_attn.weight")),
    ("encoder.block.0.layer.1.wi.weight", ("encoder.block.", 0, "layer.1.wi.weight")),
    ("0.auto_model.x", ("", 0, "auto_model.x")),
    ("lm_head.weight", None),
    ("layers/3/mlp/experts/7/kernel", ("layers/", 3, "mlp/experts/7/kernel")),
    ("encoder/encoderblock_2/Dense_0/kernel", ("encoder/encoderblock_", 2, "Dense_0/kernel")),
    ("decoder/layers/mlp/kernel", None),
    ("LayerNorm_0/scale", None),
  ],
)
def test_places_of_names(name, expected):
  found = layers.place(name)
  assert found == expected


def test_the_stack_of_a_model_with_two_towers():
  names = [f"vision.layers.{i}.w" for i in range(2)] + [f"text.layers.{i}.w" for i in range(3)]
  assert layers.main(names, {"text_config": {"num_hidden_layers": 3}}) == "text.layers."
  with pytest.raises(ValueError, match=r"text.layers.\* \(3\), vision.layers.\* \(2\)"):
    layers.main(names, {})


def test_configs_count_the_layers_in_the_right_place():
  both = {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 3}}
  order = {0: 0, 1: 2}
  found = layers.resize(both, 3, order, "vision_model", {"text_model"})
  assert found == {**both, "vision_config": {"num_hidden_layers": 2}}
  found = layers.resize(both, 3, order)  # Those of the text, where no module is named.
  assert found == {**both, "text_config": {"num_hidden_layers": 2}}
  pair = {"encoder": {"num_hidden_layers": 3}, "decoder": {"num_hidden_layers": 3}}
  with pytest.raises(ValueError, match=r"says encoder.num_hidden_layers: 3 and decoder.num"):
    layers.resize(pair, 3, order)
  t5 = {"num_layers": 3, "num_decoder_layers": 3}
  assert layers.resize(t5, 3, order, "encoder", {"decoder"}) == {**t5, "num_layers": 2}
  assert layers.resize(t5, 3, order, "decoder", {"encoder"}) == {**t5, "num_decoder_layers": 2}
  kinds = {"n_layer": 3, "layer_types": ["full", "sliding", "full"], "eos_token_id": [1, 2, 3]}
  found = layers.resize(kinds, 3, {0: 1, 1: 0})
  assert found == {**kinds, "n_layer": 2, "layer_types": ["sliding", "full"]}
  assert layers.resize({"num_hidden_layers": 9}, None, order) == {"num_hidden_layers": 2}
  with pytest.raises(ValueError, match="no count of the 3 layers, such as num_hidden_layers"):
    layers.resize({"model_type": "mine"}, 3, order)
