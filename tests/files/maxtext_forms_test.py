"""Trees of MaxText and models of Hugging Face: against a transcription of MaxText's converter."""

import ml_dtypes
import numpy as np
import program_trees as forms
import pytest

from jaxmerge.files import other_forms
from jaxmerge.io.tensors import pieces

SIZE, WIDTH, LAYERS = forms.SIZE, forms.WIDTH, forms.LAYERS
MLP = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
F32 = np.float32


def kernel(x, shape, to_hf):
  """Reshapes as MaxText's converter does; `shape` is that of the result."""
  return x.reshape(shape[::-1]).T if to_hf else x.T.reshape(shape)


def scale(x, number, to_hf):
  return (x * F32(np.sqrt(number)) if to_hf else x * F32(1 / np.sqrt(number))).astype(x.dtype)


def rope(x, to_hf):
  if to_hf:
    return np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
  half = x.shape[-1] // 2
  return np.stack([x[..., :half], x[..., half:]], axis=-1).reshape(x.shape)


def matrix(x, kind, part, shape, to_hf):
  """Converts a matrix of a layer."""
  if not to_hf:
    x = kernel(x, shape, to_hf)
  if kind == "llama" and part in "qk":
    x = rope(x, to_hf)
  if kind in ("llama", "gemma2") and part == "q":
    x = scale(x, SIZE, to_hf)
  return kernel(x, shape, to_hf) if to_hf else x


def table(kind):
  """Yields MaxText's name of a layer's tensor, Hugging Face's, both shapes, and the conversion."""
  heads = {"q": forms.HEADS, "k": forms.KEYS, "v": forms.KEYS, "o": forms.HEADS}
  for part, name in zip("qkvo", ("query", "key", "value", "out"), strict=True):
    tree = (WIDTH, heads[part], SIZE) if part != "o" else (heads[part], SIZE, WIDTH)
    other = (heads[part] * SIZE, WIDTH) if part != "o" else (WIDTH, heads[part] * SIZE)
    convert = lambda x, shape, to_hf, part=part: matrix(x, kind, part, shape, to_hf)  # noqa: E731
    yield f"self_attention/{name}/kernel", f"self_attn.{part}_proj.weight", tree, other, convert
  for name, part in MLP.items():
    tree = (forms.INNER, WIDTH) if name == "wo" else (WIDTH, forms.INNER)
    yield f"mlp/{name}/kernel", f"mlp.{part}_proj.weight", tree, tree[::-1], kernel
  add = 1.0 if kind.startswith("gemma") else 0.0
  norm = lambda x, shape, to_hf: x - F32(add) if to_hf else x + F32(add)  # noqa: E731
  middle = "" if kind.startswith("gemma") else "_layer"
  names = {f"pre_self_attention{middle}_norm": "input_layernorm"}
  names[f"post_self_attention{middle}_norm"] = "post_attention_layernorm"
  if kind.startswith("gemma"):
    names |= {f"{x}_ffw_norm": f"{x}_feedforward_layernorm" for x in ("pre", "post")}
  sizes = dict.fromkeys(names, WIDTH)
  if kind in ("qwen3", "gemma3_text"):
    for x in ("query", "key"):
      names[f"self_attention/{x}_norm"] = f"self_attn.{x[0]}_norm"
      sizes[f"self_attention/{x}_norm"] = SIZE
  for tree, other in names.items():
    yield f"{tree}/scale", f"{other}.weight", (sizes[tree],), (sizes[tree],), norm
  if kind == "qwen2":
    for x, count in (("query", forms.HEADS), ("key", forms.KEYS)):
      flat = lambda x, shape, to_hf: x.reshape(shape)  # noqa: E731
      shapes = ((count, SIZE), (count * SIZE,))
      yield f"self_attention/{x}/bias", f"self_attn.{x[0]}_proj.bias", *shapes, flat


def root(kind):
  value = WIDTH**0.5
  return F32(value) if kind == "gemma2" else F32(ml_dtypes.bfloat16(value))


def with_kind(tree, kind):
  """Returns the name of a tensor in the local or global half of a layer of Gemma 2."""
  first, *rest = tree.split("/")
  return "/".join([f"{first}_{kind}", *rest])


def maxtext(tensors, kind, scanned):
  """Returns the tree of MaxText."""
  embedding = tensors["model.embed_tokens.weight"]
  shift = F32(1 if kind.startswith("gemma") else 0)
  tree = {"decoder/decoder_norm/scale": tensors["model.norm.weight"] + shift}
  tree["token_embedder/embedding"] = embedding * root(kind) if shift else embedding
  if not shift:
    tree["decoder/logits_dense/kernel"] = tensors["lm_head.weight"].T
  step = 2 if kind == "gemma2" else 1
  for path, name, shape, _, convert in table(kind):
    for first, half in enumerate(("local", "global")[:step]):
      at = with_kind(path, half) if step == 2 else path
      numbers = range(first, LAYERS, step)
      layers = [convert(tensors[f"model.layers.{i}.{name}"], shape, False) for i in numbers]
      if scanned:
        tree[f"decoder/layers/{at}"] = np.stack(layers, axis=1)
      else:
        tree |= {f"decoder/layers_{i}/{at}": x for i, x in enumerate(layers)}
  return tree


def back(tree, kind, scanned):
  """Returns the tensors that MaxText's converter makes of a tree."""
  shift = F32(1 if kind.startswith("gemma") else 0)
  embedding = tree["token_embedder/embedding"]
  tensors = {"model.norm.weight": tree["decoder/decoder_norm/scale"] - shift}
  tensors["model.embed_tokens.weight"] = embedding / root(kind) if shift else embedding
  if not shift:
    tensors["lm_head.weight"] = tree["decoder/logits_dense/kernel"].T
  step = 2 if kind == "gemma2" else 1
  for path, name, _, shape, convert in table(kind):
    for layer in range(LAYERS):
      number, half = divmod(layer, step)
      at = with_kind(path, ("local", "global")[half]) if step == 2 else path
      if scanned:
        x = tree[f"decoder/layers/{at}"].take(number, axis=1)
      else:
        x = tree[f"decoder/layers_{number}/{at}"]
      tensors[f"model.layers.{layer}.{name}"] = convert(x, shape, True)
  return tensors


def float32(kind):
  arrays = forms.hugging_face(kind, head=not kind.startswith("gemma"))
  return {n: x.astype(np.float32) for n, x in arrays.items()}


CASES = [
  *((kind, scanned) for kind in ("llama", "qwen2", "qwen3", "gemma2") for scanned in (True, False)),
  ("gemma3_text", False),
]


@pytest.mark.parametrize(("kind", "scanned"), CASES)
def test_a_tree_of_maxtext_is_read_as_its_converter_writes_it_and_back(kind, scanned):
  arrays, config = float32(kind), {**forms.CONFIG, "model_type": kind}
  config["num_hidden_layers"] = LAYERS
  tree = maxtext(arrays, kind, scanned)
  folder = forms.model("hf", arrays, config)
  _, result = other_forms.align([folder, forms.model("tree", tree)])
  forms.assert_same(result, back(tree, kind, scanned))
  _, result = other_forms.align([forms.model("tree", tree), folder])
  forms.assert_same(result, tree)


@pytest.mark.parametrize("scanned", [True, False])
def test_experts_are_stacked_and_layers_after_them(scanned):
  arrays = float32("qwen3_moe")
  tree = maxtext(float32("qwen3"), "qwen3", scanned)
  names = {n: x for n, x in float32("qwen3").items() if ".mlp." not in n}
  names |= {n: x for n, x in arrays.items() if ".mlp." in n}
  tree = {n: x for n, x in tree.items() if "/mlp/" not in n}
  for name, part in MLP.items():
    experts = [
      [arrays[f"model.layers.{i}.mlp.experts.{e}.{part}_proj.weight"].T for i in range(LAYERS)]
      for e in range(3)
    ]
    single = {f"layers_{i}": np.stack([e[i] for e in experts]) for i in range(LAYERS)}
    blocks = {"layers": np.array(experts)} if scanned else single
    tree |= {f"decoder/{at}/moe_block/{name}": x for at, x in blocks.items()}
  gates = [arrays[f"model.layers.{i}.mlp.gate.weight"].T for i in range(LAYERS)]
  blocks = {f"layers_{i}": x for i, x in enumerate(gates)}
  blocks = {"layers": np.stack(gates, axis=1)} if scanned else blocks
  tree |= {f"decoder/{at}/moe_block/gate/kernel": x for at, x in blocks.items()}
  folder = forms.model("hf", names, {"model_type": "qwen3_moe"})
  _, result = other_forms.align([folder, forms.model("tree", tree)])
  forms.assert_same(result, names)
  _, result = other_forms.align([forms.model("tree", tree), folder])
  forms.assert_same(result, tree)


def test_changed_values_of_narrow_weights_are_float32_and_stored_as_they_were():
  arrays = forms.hugging_face("llama")
  tree = {n: x.astype(ml_dtypes.bfloat16) for n, x in maxtext(arrays, "llama", True).items()}
  folder = forms.model("hf", arrays, {"model_type": "llama"})
  _, result = other_forms.align([folder, forms.model("tree", tree)])
  query = result.tensors["model.layers.0.self_attn.q_proj.weight"]
  key = result.tensors["model.layers.0.self_attn.k_proj.weight"]
  assert query.dtype == np.float32
  assert query.stored_dtype == key.dtype == ml_dtypes.bfloat16
  expected = back({n: x.astype(np.float32) for n, x in tree.items()}, "llama", True)
  np.testing.assert_array_equal(
    pieces.load(query), expected["model.layers.0.self_attn.q_proj.weight"]
  )


def test_rows_that_pad_an_embedding_are_cut_and_added():
  arrays, config = float32("gemma2"), {"model_type": "gemma2"}
  tree = maxtext(arrays, "gemma2", True)
  embedding = tree["token_embedder/embedding"]
  padded = {**tree, "token_embedder/embedding": np.pad(embedding, ((0, 4), (0, 0)))}
  folder, other = forms.model("hf", arrays, config), forms.model("tree", padded)
  _, result = other_forms.align([folder, other])
  forms.assert_same(result, back(tree, "gemma2", True))
  assert any("rows from 20 are padding and left out" in note for note in result.notes)
  _, result = other_forms.align([other, folder])
  forms.assert_same(result, padded)
  assert any("rows from 20 are zeros, as padding" in note for note in result.notes)


def test_a_tree_of_maxtext_needs_a_config_that_says_whose_it_is():
  arrays = float32("llama")
  tree = forms.model("tree", maxtext(arrays, "llama", True))

  def refuse(config, text, tree=tree):
    with pytest.raises(ValueError, match=text):
      other_forms.align([forms.model("hf", arrays, config), tree])

  refuse({}, r"tree of MaxText \(Llama\) or MaxText \(Qwen\), and no config.json says which")
  refuse({"model_type": "mistral"}, r"model_type is mistral: there is no name map")
  layers = {"model_type": "llama", "num_hidden_layers": 3}
  refuse(layers, r"of MaxText \(Llama\) has 2 layers, and num_hidden_layers of hf is 3")
  blocks = {"decoder/layers/layers_0/pre_ffw_norm/scale": np.ones((WIDTH, 2), np.float32)}
  refuse(
    {"model_type": "gemma3"},
    r"'decoder/layers/layers_0/pre_ffw_norm/scale': no rules of MaxText \(Gemma 3, layers not",
    forms.model("tree", blocks),
  )


def test_trees_of_two_programs_meet_where_a_config_says_the_family():
  arrays = float32("llama")
  folder = forms.model("hf", arrays, {"model_type": "llama"})
  first = forms.model("tunix", forms.tunix(arrays))
  tree = maxtext(arrays, "llama", True)
  _, middle, last = other_forms.align([first, folder, forms.model("maxtext", tree)])
  forms.assert_same(middle, forms.tunix(arrays))
  forms.assert_same(last, forms.tunix(back(tree, "llama", True)))
