"""Which leaves are matrices and how they lie: conventions, layouts of callers, what is refused."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmerge
from jaxmerge import methods
from jaxmerge.core import conventions, layouts, stage, tree

SPECTRAL = {
  "tsv": methods.tsv(),
  "iso_c": methods.iso_c(),
  "wudi": methods.wudi(steps=2, learning_rate=0.1),
  "optmerge": methods.optmerge(steps=2, learning_rate=0.1),
}


def viewed(shapes):
  return {name: rule.view for name, rule in conventions.rules(shapes).items()}


class Linen(nn.Module):
  """A layer of each kind that Flax has."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(5, 8)(tokens)
    x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
    x = nn.Conv(6, (3,))(x)
    kernel = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    return nn.LayerNorm()(nn.Dense(7, kernel_init=kernel)(x))


def test_layers_of_linen():
  params = jax.eval_shape(Linen().init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
  found = viewed({n: x.shape for n, x in tree.named(params).items()})
  found = {n.removeprefix("params/"): v for n, v in found.items() if v is not None}
  heads = "MultiHeadDotProductAttention_0"
  assert found == {
    "Conv_0/kernel": "iio",
    "Dense_0/kernel/value": "io",
    "Embed_0/embedding": "li",
    f"{heads}/key/kernel": "ioo",
    f"{heads}/out/kernel": "iio",
    f"{heads}/query/kernel": "ioo",
    f"{heads}/value/kernel": "ioo",
  }


def test_layers_of_nnx():
  def made():
    rngs = nnx.Rngs(0)
    parts = (nnx.Linear(3, 4, rngs=rngs), nnx.Embed(5, 3, rngs=rngs))
    parts += (nnx.Conv(1, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    names = ("linear", "embed", "conv", "norm")
    return {n: nnx.state(part, nnx.Param) for n, part in zip(names, parts, strict=True)}

  found = viewed({n: x.shape for n, x in tree.named(jax.eval_shape(made)).items()})
  assert {n: v for n, v in found.items() if v} == {
    "linear/kernel/value": "io",
    "embed/embedding/value": "li",
    "conv/kernel/value": "iiio",
  }


E_, D, F = 4, 8, 12  # Experts, width, inner width.


@pytest.mark.parametrize(
  ("shapes", "views"),
  [
    # Mixtral, Qwen3-MoE: [E, out, in]; the biases are vectors.
    (
      {"experts.gate_up_proj": (E_, 2 * F, D), "experts.down_proj": (E_, D, F)}
      | {"experts.gate_up_proj_bias": (E_, 2 * F), "gate.weight": (E_, D)},
      ("boi", "boi", "li", "oi"),
    ),
    # Llama 4: [E, in, out].
    (
      {"experts.gate_up_proj": (E_, D, 2 * F), "experts.down_proj": (E_, F, D)},
      ("bio", "bio"),
    ),
    # gpt-oss, of which the inner width is the width.
    (
      {"experts.gate_up_proj": (E_, D, 2 * D), "experts.down_proj": (E_, D, D)},
      ("bio", "bio"),
    ),
    # Granite.
    (
      {"moe.input_linear.weight": (E_, 2 * F, D), "moe.output_linear.weight": (E_, D, F)},
      ("boi", "boi"),
    ),
    # Alone, either order would do: the width decides, or nothing.
    (
      {"MoeBlock_0/wi_0": (E_, D, F), "MoeBlock_0/wo": (E_, F, D), "t/embedding": (9, D)},
      ("bio", "bio", "li"),
    ),
    ({"MoeBlock_0/wi_0": (E_, D, F), "MoeBlock_0/wo": (E_, F, D)}, ("open", "open")),
    ({"experts/wi/kernel": (E_, D, F), "experts/wo/kernel": (E_, F, D)}, ("bio", "bio")),
    ({"experts.w1": (E_ * F, D)}, ("open",)),
    # GPT-2's Conv1D; the same names where they are [out, in].
    (
      {"h.0.attn.c_attn.weight": (D, 3 * D), "h.0.attn.c_proj.weight": (D, D)}
      | {"h.0.mlp.c_fc.weight": (D, 4 * D), "h.0.mlp.c_proj.weight": (4 * D, D)}
      | {"wte.weight": (9, D), "wpe.weight": (5, D), "lm_head.weight": (9, D)},
      ("io", "io", "io", "io", "li", "li", "oi"),
    ),
    (
      {"h.0.attn.c_attn.weight": (3 * D, D), "h.0.attn.c_proj.weight": (D, D)}
      | {"h.0.mlp.c_fc.weight": (4 * D, D), "h.0.mlp.c_proj.weight": (D, 4 * D)},
      ("oi", "oi", "oi", "oi"),
    ),
    # Llama, BERT, T5.
    (
      {"model.embed_tokens.weight": (9, D), "model.layers.0.mlp.up_proj.weight": (F, D)}
      | {"model.norm.weight": (D,), "embeddings.word_embeddings.weight": (9, D)}
      | {"relative_attention_bias.weight": (9, 2), "shared.weight": (9, D)},
      ("li", "oi", None, "li", "li", "li"),
    ),
    # Scanned layers of Flax along axis 0, of MaxText along axis 1.
    (
      {"layers/up/kernel": (3, D, F), "layers/down/kernel": (3, F, D)}
      | {"layers/norm/scale": (3, D), "head/kernel": (D, 9)},
      ("bio", "bio", "li", "io"),
    ),
    (
      {"layers/query/kernel": (D, 3, 2, 4), "layers/out/kernel": (2, 3, 4, D)}
      | {"layers/mlp/wi_0/kernel": (D, 3, F), "layers/norm/scale": (D, 3)},
      ("iboo", "ibio", "ibo", "il"),
    ),
    ({"layers/query/kernel": (3, D, D)}, ("open",)),
    # Convolutions of PyTorch, Mamba's, transposed ones; images of one channel.
    ({"conv1.weight": (D, 3, 3, 3), "conv1.bias": (D,)}, ("oiii", None)),
    ({"mixer.conv1d.weight": (F, 1, 4), "mixer.A_log": (F, 4)}, ("lii", "li")),
    ({"up.weight": (D, F, 2, 2), "up.bias": (F,)}, ("ioii", None)),
    ({"conv_0/kernel": (3, 3, 1, D), "conv_1/kernel": (3, 3, D, F)}, ("iiio", "iiio")),
    ({"a.weight": (D, 1, 3, 3), "b.weight": (F, 1, 3, 3)}, ("open", "open")),
    ({"odd.weight": (3, 4, 5)}, ("open",)),
    # One block of convolutions, or of attention, is no stack of layers.
    (
      {"block.conv1.weight": (16, 8, 3, 3), "block.bn1.weight": (16,)}
      | {"block.conv2.weight": (16, 16, 3, 3)},
      ("oiii", None, "oiii"),
    ),
    (
      {
        "block.conv1.weight": (16, 8, 3),
        "block.bn.weight": (16,),
        "block.conv2.weight": (16, 16, 5),
      },
      ("oii", None, "oii"),
    ),
    (
      {"conv_block/conv1/kernel": (3, 8, 16), "conv_block/conv2/kernel": (3, 16, 9)},
      ("iio", "iio"),
    ),
    (
      {"attention_block/query/kernel": (16, 4, 4), "attention_block/out/kernel": (4, 4, 16)},
      ("ioo", "iio"),
    ),
    ({"block/query/kernel": (4, 4, 8), "block/query/bias": (4, 8)}, ("open", "li")),
    # Scanned, with vectors that say so, and without.
    (
      {"ScanBlock_0/q_proj/kernel": (3, D, D), "ScanBlock_0/down_proj/kernel": (3, F, D)}
      | {"ScanBlock_0/RMSNorm_0/scale": (3, D)},
      ("bio", "bio", "li"),
    ),
    ({f"ScanBlock_0/{n}_proj/kernel": (3, D, D) for n in "qkv"}, ("open",) * 3),
    ({f"encoder/{n}_proj/kernel": (3, D, D) for n in "qo"}, ("open",) * 2),
    (
      {"body/query/kernel": (3, D, 4, 2), "body/out/kernel": (3, 4, 2, D)},
      ("open", "open"),
    ),
    ({"layers/up/kernel": (3, D, F), "layers/down/kernel": (3, F, D)}, ("open", "open")),
    # Attention beside experts.
    (
      {"moe_layer_0/attn/query/kernel": (D, 2, 4), "moe_layer_0/attn/query/bias": (2, 4)}
      | {"action_expert/attn/query/kernel": (D, 2, 4), "action_expert/attn/out/kernel": (2, 4, D)},
      ("ioo", None, "ioo", "iio"),
    ),
    # Heads are matrices; what makes embeddings may be one.
    ({"unembedding.weight": (9, D), "output_embedding.weight": (9, D)}, ("oi", "oi")),
    ({"unembed.weight": (9, D), "embed_to_logits.weight": (9, D)}, ("oi", "oi")),
    ({f"{n}.weight": (F, D) for n in ("time_embed", "embed_fc")}, ("open", "open")),
    ({"decoder_embed.weight": (D, D), "decoder_embed.bias": (D,)}, ("oi", None)),
    (
      {f"{n}.weight": (9, D) for n in ("query_embed", "wte", "embed_in", "embed_out")},
      ("li", "li", "li", "oi"),
    ),
    # Haiku; names that say nothing; tokens and positions of a vision transformer.
    ({"linear/w": (D, F), "linear/b": (F,), "other/w": (D, F)}, ("io", None, "open")),
    ({"cls_token": (1, 1, D), "pos_embed": (1, 9, D)}, (None, "lli")),
  ],
)
def test_names_and_shapes(shapes, views):
  found = conventions.rules(shapes).values()
  assert tuple("open" if rule.open else rule.view for rule in found) == views


def flax(draw=lambda shape: np.zeros(shape, np.float32)):
  shapes = {"dense": {"kernel": (4, 3), "bias": (3,)}, "embed": {"embedding": (6, 4)}}
  return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def experts(seed=0):
  rng = np.random.default_rng(seed)
  return jaxmerge.stack(
    [flax(lambda shape: rng.normal(size=shape).astype(np.float32)) for _ in range(3)]
  )


@pytest.mark.parametrize("name", SPECTRAL)
def test_a_flax_tree_needs_no_layout(name):
  """The kernel is a matrix [in, out]; the embedding is averaged, as the bias is."""
  base, models = flax(), experts()
  found = jaxmerge.merge(SPECTRAL[name], models, base)
  kernel = {"w": models["dense"]["kernel"]}
  expected = jaxmerge.merge(SPECTRAL[name], kernel, {"w": base["dense"]["kernel"]}, layout=IO)
  np.testing.assert_array_equal(found["dense"]["kernel"], expected["w"])
  assert np.abs(found["dense"]["kernel"] - np.mean(kernel["w"], axis=0)).max() > 0.1
  mean = np.mean(models["embed"]["embedding"], axis=0)
  np.testing.assert_allclose(found["embed"]["embedding"], mean, atol=1e-6)


IO = [("w", "io")]


def test_what_a_caller_says_comes_first():
  base, models, method = flax(), experts(), methods.tsv()
  table = [("embedding", "oi"), ("kernel", None)]
  found = jaxmerge.merge(method, models, base, layout=table)
  alone = {"w": models["embed"]["embedding"]}
  expected = jaxmerge.merge(method, alone, {"w": base["embed"]["embedding"]}, layout=[("w", "oi")])
  np.testing.assert_array_equal(found["embed"]["embedding"], expected["w"])
  mean = np.mean(models["dense"]["kernel"], axis=0)
  np.testing.assert_allclose(found["dense"]["kernel"], mean, atol=1e-6)
  rules = layouts.of(method, base, layout=table)
  assert {n: (r.view, r.reason) for n, r in rules.items()} == {
    "dense/bias": (None, "vector"),
    "dense/kernel": (None, "layout 'kernel'"),
    "embed/embedding": ("oi", "layout 'embedding'"),
  }


@pytest.mark.slow
def test_each_fused_expert_is_a_matrix():
  rng = np.random.default_rng(0)
  shapes = {"experts.gate_up_proj": (2, 12, 5), "experts.down_proj": (2, 5, 6)}
  base = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
  models = {n: rng.normal(size=(3, *s)).astype(np.float32) for n, s in shapes.items()}
  found = jaxmerge.merge(methods.tsv(), models, base)
  for n, x in models.items():
    for e in range(2):
      one = {"w": x[:, e]}
      alone = jaxmerge.merge(methods.tsv(), one, {"w": base[n][e]}, layout=[("w", "oi")])
      np.testing.assert_allclose(found[n][e], alone["w"], atol=1e-5)


def test_rows_of_lookups_are_entries_and_widen_takes_them_for_inputs():
  base = flax()
  for method, view in ((methods.model_stock("row"), "oi"), (methods.widen(), "io")):
    seen = layouts.of(method, base)["embed/embedding"]
    assert layouts.view_for(seen.view, layouts.units_of(method)[0]) == view


@pytest.mark.parametrize(
  ("base", "layout", "message"),
  [
    ({"bias": (3,)}, (), "none of the leaves is one .*; use one that works on entries"),
    ({"e": {"embedding": (3, 4)}}, (), r"none .* is one.*\n  \(r'\^e/embedding\$', 'io' \| 'oi'"),
    (
      {"layers": {"0": {"w1": (3, 4)}, "1": {"w1": (3, 4)}}},
      (),
      r"how these leaves lie.*\n  \(r'\^layers/\\d\+/w1\$', 'io' \| 'oi' \| None\): .*1 more",
    ),
    ({"a": {"w": (3, 4)}, "kernel": (3, 4)}, (), r"'\^a/w\$', 'io'"),
    ({"kernel": (3, 4)}, [("kernl", "io")], "'kernl' is found in no leaf's name; .* 'kernel'"),
    ({"kernel": (3, 4)}, [("kernel", "iio")], r"view 'iio' of 'kernel' .* 'kernel' is \[3, 4\]"),
    ({"kernel": (3, 4)}, [("kernel", None)], "none of the leaves is one"),
    ({"kernel": (3, 4)}, [("kernel", "ix")], "view 'ix' of 'kernel' must consist of the letters"),
    ({"kernel": (3, 4)}, [("kernel", "")], "view '' of 'kernel' must consist of the letters"),
    ({"kernel": (3, 4)}, [("kernel", "ii")], r"(?s)view 'ii' of 'kernel' has no o; .*'io' \| 'oi'"),
    ({"kernel": (3, 4)}, [("kernel", "bb")], "view 'bb' of 'kernel' has no o"),
    ({"kernel": (3, 4)}, [("kernel", "oo")], "view 'oo' of 'kernel' has no i"),
    ({"query": {"kernel": (8, 2, 4)}}, (), r"'ioo' \| 'iio' \| 'bio' \| 'boi' \| None"),
    ({"experts": {"w1": (48, 8)}}, (), r"\(r'\^experts/w1\$', None\): .*no view tells apart"),
    ({"kernel": (3, 4)}, [("(", "io")], r"'\(', of 'io', is no regular expression"),
  ],
)
def test_what_does_not_suffice_is_refused(base, layout, message):
  base = jax.tree.map(np.zeros, base, is_leaf=lambda x: isinstance(x, tuple))
  models = jax.tree.map(lambda x: x[None], base)
  with pytest.raises(ValueError, match=message):
    jaxmerge.merge(methods.tsv(), models, base, layout=layout)


@pytest.mark.parametrize("pair", [None, (None, "io"), (b"kernel", "io"), 3, ("kernel",)])
def test_what_is_no_pair_is_shown(pair):
  with pytest.raises(
    ValueError, match=re.escape(f"list of pairs, such as [('kernel$', 'io')]: {pair!r}")
  ):
    layouts.check([pair])


def test_a_stage_of_matrices_acts_on_some():
  base, models = {"kernel": np.zeros((3, 4))}, {"kernel": np.ones((2, 3, 4))}
  masked = stage.masked(methods.tsv(), lambda name: "kernl" in name)
  with pytest.raises(ValueError, match="restricted to leaves of which there are none"):
    jaxmerge.merge(stage.chain(masked, methods.average()), models, base)


def test_the_advice_works():
  base, models = {"w": np.zeros((3, 4))}, {"w": np.ones((2, 3, 4))}
  with pytest.raises(ValueError, match=r"\(r'\^w\$', 'io' \| 'oi' \| None\)"):
    jaxmerge.merge(methods.iso_c(), models, base)
  jaxmerge.merge(methods.iso_c(), models, base, layout=[(r"^w$", "io")])


def test_none_is_written_in_a_layout_as_in_recipes():
  assert layouts.check([("a", "none"), ("b", "io")]) == (("a", None), ("b", "io"))
