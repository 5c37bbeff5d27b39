"""Decoders: agreement with transformers, names both ways, shards, what tokens may see, refusals.

`tests/fixtures/record_decoders.py` made the recorded outputs.
"""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from marking import some_fast

from jaxmerge.core import tree
from jaxmerge.io.huggingface import folder
from jaxmerge.io.tensors import safetensors
from jaxmerge.models import decoder_config, llama
from jaxmerge.parallel import mesh as meshes

TINY = pathlib.Path(__file__).parents[1] / "fixtures" / "tiny_decoders"
NAMES = sorted(path.name for path in TINY.iterdir())


@pytest.fixture(scope="module")
def recorded():
  with np.load(TINY.with_suffix(".npz")) as file:
    return dict(file)


def logits(config, params, ids, mask=None, **options):
  return jax.jit(llama.apply(config, **options))(params, ids, None, mask)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("remat", some_fast([False, True], [False]))
def test_agrees_with_transformers(recorded, name, remat):
  config, params = llama.load(TINY / name)
  ids, mask = recorded["ids"], recorded["mask"]
  found = np.asarray(logits(config, params, ids, mask, remat=remat))
  real = mask.astype(bool)
  np.testing.assert_allclose(found[real], recorded[name][real], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", some_fast(NAMES, ["llama"]))
def test_bfloat16_is_near(recorded, name):
  config, params = llama.load(TINY / name)
  ids, mask = recorded["ids"], recorded["mask"]
  found = np.asarray(logits(config, params, ids, mask, dtype=jnp.bfloat16))
  far = np.abs(found - recorded[name])[mask.astype(bool)]
  assert found.dtype == np.float32
  assert far.mean() < 0.04 * np.abs(recorded[name]).mean()


@pytest.mark.parametrize("name", NAMES)
def test_saved_folders_have_the_bytes_of_their_source(tmp_path, name):
  config, params = llama.load(TINY / name)
  out = llama.save(tmp_path / "out", config, params, source=TINY / name)
  assert {p.name for p in out.iterdir()} == {p.name for p in (TINY / name).iterdir()}
  for path in out.iterdir():
    assert path.read_bytes() == (TINY / name / path.name).read_bytes(), path.name


def test_several_files_and_a_head_that_is_the_embedding(tmp_path):
  """Some tied models have the head in their files as well; it is saved as the embedding."""
  tensors, _ = folder.load(TINY / "smollm2")
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  source = tmp_path / "source"
  shutil.copytree(TINY / "smollm2", source)
  (source / folder.WEIGHTS).unlink()
  files = {"model-00001-of-00002.safetensors": list(tensors)[::2]}
  files["model-00002-of-00002.safetensors"] = list(tensors)[1::2]
  for file, own in files.items():
    safetensors.save(source / file, {n: tensors[n] for n in own}, {"format": "pt"})
  (source / folder.INDEX).write_text(folder.index(files, {n: x.nbytes for n, x in tensors.items()}))
  config, params = llama.load(source)
  params["embed"]["embedding"] = params["embed"]["embedding"] + 1
  out = llama.save(tmp_path / "out", config, params, source=source)
  found, _ = folder.load(out)
  assert (out / folder.INDEX).read_bytes() == (source / folder.INDEX).read_bytes()
  np.testing.assert_array_equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
  np.testing.assert_array_equal(found["lm_head.weight"], tensors["lm_head.weight"] + 1)


def test_a_head_that_differs_is_one_of_its_own_though_the_config_ties_it(tmp_path):
  """It is loaded, used and saved, and the config of what is saved says so."""
  tensors, settings = folder.load(TINY / "smollm2")
  embedding = tensors["model.embed_tokens.weight"]
  tensors["lm_head.weight"] = np.flip(embedding, 0)
  source = tmp_path / "source"
  shutil.copytree(TINY / "smollm2", source)
  safetensors.save(source / folder.WEIGHTS, tensors, {"format": "pt"})
  config, params = llama.load(source)
  assert settings["tie_word_embeddings"]
  assert not config.tied
  ids = np.arange(6)[None]
  tied = logits(*llama.load(TINY / "smollm2"), ids)
  np.testing.assert_allclose(logits(config, params, ids), tied[..., ::-1], atol=1e-5)
  found, saved = folder.load(llama.save(tmp_path / "out", config, params, source=source))
  assert saved == settings | {"tie_word_embeddings": False}
  np.testing.assert_array_equal(found["lm_head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize(
  "sides", some_fast([(1, 1, 1), (1, 1, 2), (2, 1, 4), (1, 2, 4), (1, 1, 8)], [(1, 2, 4)])
)
def test_shards_are_read_by_themselves(monkeypatch, recorded, sides):
  """On a mesh the parameters have the same bits, and lie as the rules say."""
  monkeypatch.setattr(llama, "ROWS", 200)  # A few rows at a time.
  whole = tree.named(llama.load(TINY / "llama")[1])
  mesh = meshes.make(*sides, devices=jax.devices()[: int(np.prod(sides))])
  config, params = llama.load(TINY / "llama", mesh=mesh)
  for name, x in tree.named(params).items():
    assert x.sharding.spec == meshes.spec(name, x.shape, llama.SHARDING)
    np.testing.assert_array_equal(x, whole[name], err_msg=name)
  up = params["layers"]["mlp"]["up"]["kernel"]
  assert {s.data.shape for s in up.addressable_shards} == {(2, 16, 24 // sides[2])}
  found = logits(config, params, recorded["ids"], recorded["mask"])
  real = recorded["mask"].astype(bool)
  np.testing.assert_allclose(np.asarray(found)[real], recorded["llama"][real], atol=2e-5)


def test_a_shard_reads_its_rows_alone(monkeypatch):
  """Of a matrix that is split by rows of the file, no device reads more than its rows."""
  read = []
  stored_tensor = llama.tensor.stored_tensor

  def watched(files, path, name, entry):
    tensor = stored_tensor(files, path, name, entry)

    def part(start, out):
      read.append((name, start, out.size))
      tensor.read(start, out)

    return tensor._replace(read=part)

  monkeypatch.setattr(llama.tensor, "stored_tensor", watched)
  mesh = meshes.make(1, 1, 4, devices=jax.devices()[:4])
  llama.load(TINY / "llama", mesh=mesh)
  name = "model.layers.1.mlp.up_proj.weight"  # [24, 16] in the file.
  assert sorted(r for r in read if r[0] == name) == [(name, 96 * i, 96) for i in range(4)]


def test_parameters_may_be_of_another_dtype():
  _, params = llama.load(TINY / "qwen3", dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", some_fast(["llama", "qwen3"], ["qwen3"]))
def test_tokens_do_not_see_what_follows(recorded, name):
  config, params = llama.load(TINY / name)
  ids = recorded["ids"]
  later = ids.copy()
  later[:, 10:] = (later[:, 10:] + 7) % config.vocab_size
  a, b = (np.asarray(logits(config, params, x)) for x in (ids, later))
  np.testing.assert_allclose(a[:, :10], b[:, :10], atol=1e-6)
  assert np.abs(a[:, 10:] - b[:, 10:]).max() > 0.1


@pytest.mark.slow
def test_only_distances_between_positions_matter(recorded):
  config, params = llama.load(TINY / "llama")
  ids = recorded["ids"]
  at = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
  apply = jax.jit(llama.apply(config))
  np.testing.assert_allclose(
    apply(params, ids, at + 30),
    apply(params, ids, at),
    atol=2e-5 * np.abs(params["norm"]["scale"]).max(),
  )


@pytest.mark.slow
def test_gradients_are_finite_and_reach_every_leaf(recorded):
  config, params = llama.load(TINY / "qwen2")
  ids = recorded["ids"]

  def loss(params, remat):
    found = llama.apply(config, remat=remat)(params, ids)
    return -jnp.take_along_axis(jax.nn.log_softmax(found[:, :-1]), ids[:, 1:, None], -1).mean()

  plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(params, r) for r in (False, True))
  for name, g in tree.named(plain).items():
    # A constant added to all keys of a head changes no softmax.
    assert np.isfinite(g).all()
    assert name.endswith("key/bias") or np.abs(g).max() > 1e-6, name
    np.testing.assert_allclose(g, tree.named(again)[name], atol=1e-5, err_msg=name)


def test_drawn_parameters_have_the_names_and_shapes_of_files():
  for name in NAMES:
    config, params = llama.load(TINY / name)
    drawn = jax.eval_shape(lambda: llama.init(config, jax.random.key(0)))
    tree.check_same(drawn, params, left="drawn", right="loaded")


@pytest.mark.parametrize("name", NAMES)
def test_exported_folders_are_read_back(tmp_path, name):
  config, params = llama.load(TINY / name)
  out = llama.export(tmp_path / "out", config, params, readme="Made.")
  found, again = llama.load(out)
  assert found == config
  jax.tree.map(np.testing.assert_array_equal, again, params)
  tensors, theirs = folder.load(out)[0], folder.load(TINY / name)[0]
  assert {n: x.tobytes() for n, x in tensors.items()} == {n: x.tobytes() for n, x in theirs.items()}


def test_what_no_kind_of_decoder_has_is_not_exported(tmp_path):
  config, params = llama.load(TINY / "qwen3")
  odd = config._replace(qkv_bias=True)
  with pytest.raises(ValueError, match="no kind of decoder among llama, qwen2, qwen3 has all opt"):
    llama.export(tmp_path / "out", odd, params)
  with pytest.raises(ValueError, match=r"'head/kernel' is in the parameters but not in the config"):
    llama.export(tmp_path / "out", config._replace(tied=True), params)
  assert not (tmp_path / "out").exists()


FIELDS = {"vocab_size": 8, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
FIELDS |= {"head_size": 4, "intermediate_size": 8}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"hiden_size": 8}, "config.model: unknown field 'hiden_size'; did you mean 'hidden_size'"),
    ({"num_layers": None}, "config.model: missing num_layers"),
    ({"num_layers": 2.0}, "config.model: num_layers must be a positive int, got 2.0"),
    ({"epsilon": 0}, "config.model: epsilon must be a positive number, got 0"),
    ({"tied": 1}, "config.model: tied must be true or false, got 1"),
    ({"rotary": 1e4}, "config.model.rotary must be a group of fields, got 10000.0"),
    ({"rotary": {"low": "1"}}, "config.model.rotary: low must be a positive number, got '1'"),
    ({"num_kv_heads": 3}, "num_heads 2 is no multiple of num_kv_heads 3"),
    ({"head_size": 3}, "rotary positions need heads of even size, got head_size 3"),
    ({"remat": "yes"}, "config.model: remat must be true or false, got 'yes'"),
  ],
)
def test_fields_that_make_no_decoder_are_refused(change, message):
  given = {k: v for k, v in {**FIELDS, **change}.items() if v is not None}
  with pytest.raises(ValueError, match=message):
    llama.from_fields(given)


def changed(tmp_path, **settings):
  """A copy of a model whose config says something else."""
  out = tmp_path / "model"
  shutil.copytree(TINY / "llama", out)
  config = {**folder.config(out), **settings}
  (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
  return out


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"model_type": "gpt2"}, "model_type must be one of llama, qwen2, qwen3, got 'gpt2'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this decoder has 'silu' only"),
    ({"use_sliding_window": True}, "use_sliding_window is True; this decoder has False only"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attent"),
    ({"num_hidden_layers": None}, "missing num_hidden_layers"),
    ({"num_hidden_layers": 2.0}, "num_hidden_layers must be a positive int, got 2.0"),
    ({"num_hidden_layers": 3}, r"9 missing \('model.layers.2.input_layernorm.weight'"),
    ({"num_hidden_layers": 1}, r"9 unknown \('model.layers.1."),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    ({"hidden_size": 18, "head_dim": None}, "hidden_size 18 is no multiple of num_attention_heads"),
    ({"head_dim": 3}, "rotary positions need heads of even size, got 3"),
    ({"intermediate_size": 32}, r"'model.layers.0.mlp.gate_proj.weight' has shape \[24, 16\], but"),
    (
      {"rope_parameters": {"rope_type": "yarn"}},
      "rope_type must be one of default, linear, llama3",
    ),
    (
      {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
      "low_freq_factor must be a positive number, got None",
    ),
    ({"attention_bias": True}, r"8 missing \('model.layers.0.self_attn.q_proj.bias'"),
  ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path, settings, message):
  with pytest.raises(ValueError, match=message):
    llama.load(changed(tmp_path, **settings))


def test_nan_is_named(tmp_path):
  out = changed(tmp_path)
  tensors, _ = folder.load(out)
  tensors["model.norm.weight"][3] = np.nan
  safetensors.save(out / folder.WEIGHTS, tensors, {"format": "pt"})
  with pytest.raises(ValueError, match=r"'model.norm.weight' holds NaN or infinity"):
    llama.load(out)


def test_a_leaf_without_a_rule_or_that_does_not_divide_is_refused():
  mesh = meshes.make(1, 1, 8)
  with pytest.raises(ValueError, match="no sharding rule matches leaf 'embed/embedding'"):
    llama.load(TINY / "llama", mesh=mesh, sharding=llama.SHARDING[:3])
  rules = (("query", P("model")), ("", P()))
  with pytest.raises(ValueError, match=r"query/kernel' of shape \[2, 16, 16\] cannot be sharded"):
    llama.load(TINY / "llama", mesh=mesh, sharding=rules)


def test_older_configs_have_the_positions_elsewhere():
  sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
  old = {"model_type": "llama", "intermediate_size": 8, **sizes, "rope_theta": 5e5}
  old["rope_scaling"] = {"type": "linear", "factor": 2.0}
  new = {k: v for k, v in old.items() if not k.startswith("rope")}
  new["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
  assert decoder_config.from_huggingface(old) == decoder_config.from_huggingface(new)
  assert decoder_config.from_huggingface(old).rotary == decoder_config.Rotary(5e5, 2.0)
