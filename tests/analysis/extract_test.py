"""Adapters from a tuned model and its base: what they add is the nearest of their rank."""

import json
import pathlib

import folders
import mergekit_outputs
import ml_dtypes
import numpy as np
import pytest

from jaxmerge import errors
from jaxmerge.analysis import extract, low_rank
from jaxmerge.cli import main
from jaxmerge.files import inputs
from jaxmerge.io.huggingface import folder, hub
from jaxmerge.io.tensors import pieces, safetensors
from jaxmerge.io.tensors.tensor import Files

RECORDED = pathlib.Path(mergekit_outputs.__file__).with_name("extract.npz")
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def models(tmp_path, monkeypatch):
  """A base, and a model near it of which one matrix is the base's."""
  monkeypatch.chdir(tmp_path)
  base = folders.tensors(0)
  model = folders.tensors(1, near=base)
  model["model.layers.1.self_attn.q_proj.weight"] = base["model.layers.1.self_attn.q_proj.weight"]
  folders.write(tmp_path / "base", base)
  folders.write(tmp_path / "model", model)
  return base, model


def applied(reference="base+out"):
  """The weights of a base with an adapter, as merges read them."""
  (model,) = inputs.open_all([("m", reference)], Files(), hub.Finder())
  return {n: pieces.load(t).astype(np.float64) for n, t in model.tensors.items()}


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 6), (6, 1)])
def test_factors_are_the_nearest_of_their_rank(shape):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  u, s, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
  for rank in range(1, min(shape) + 1):
    factors = low_rank.truncate(x, low_rank.Rank(rank), np.dtype(np.float32))
    np.testing.assert_allclose(
      factors.b @ factors.a, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-5
    )
    np.testing.assert_allclose((factors.a**2).sum(1), s[:rank], rtol=1e-4)  # Roots in both.
    whole, missed = low_rank.residual(x, factors)
    np.testing.assert_allclose(missed / whole, (s[rank:] ** 2).sum() / (s**2).sum(), atol=1e-6)


def test_energy_sets_the_rank_of_each_matrix():
  squares = np.array([6.0, 3.0, 1.0])
  assert [low_rank.Rank(9, e).of(squares) for e in (0.5, 0.6, 0.61, 0.9, 0.91, 1)] == [
    1,
    1,
    2,
    2,
    3,
    3,
  ]
  assert low_rank.Rank(2, 1.0).of(squares) == 2
  assert low_rank.Rank(9).of(np.array([4.0, 1e-16, 0.0])) == 1


def test_a_full_rank_gives_the_model_back(models):
  record = extract.extract_adapter("base", "model", "out", rank=64)
  _, model = models
  for name, x in applied().items():
    np.testing.assert_allclose(x, model[name], atol=1e-6, err_msg=name)
  assert record["error"] < 1e-6
  assert record["unchanged"] == ["model.layers.1.self_attn.q_proj"]
  assert record["matrices"][UP]["rank"] == 6
  assert set(record["saved"]) >= {"lm_head", "model.embed_tokens", "model.norm"}


def test_the_error_is_that_of_what_is_written(models):
  record = extract.extract_adapter("base", "model", "out", rank=2, dtype="bfloat16")
  base, model = models
  name = f"{UP}.weight"
  delta = (model[name] - base[name]).astype(np.float64)
  missed = np.linalg.norm(applied()[name] - model[name]) / np.linalg.norm(delta)
  assert record["matrices"][UP]["error"] == pytest.approx(missed, rel=1e-4)
  squares = np.linalg.svd(delta, compute_uv=False) ** 2
  assert missed > np.sqrt(squares[2:].sum() / squares.sum())  # And a little for bfloat16.
  parts = safetensors.load("out/adapter_model.safetensors")
  assert {x.dtype for x in parts.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_embeddings_as_factors_and_what_is_left_out(models, capsys):
  flags = ["--embeddings=lora", "--rest=skip", "--exclude=layers.2", "--energy=0.8", "--json"]
  assert main.main(["extract", "base", "model", "out", *flags]) == 0
  record = json.loads(capsys.readouterr().out)
  assert record == folder.read_json(pathlib.Path("out/jaxmerge_extract.json"))
  parts = safetensors.load("out/adapter_model.safetensors")
  a = parts["base_model.model.model.embed_tokens.lora_embedding_A"]
  b = parts["base_model.model.model.embed_tokens.lora_embedding_B"]
  rank = record["matrices"]["model.embed_tokens"]["rank"]
  assert (a.shape, b.shape) == ((rank, 10), (6, rank))
  assert record["saved"] == []
  assert record["skipped"]["model.layers.2.mlp.up_proj"] == "excluded"
  assert record["skipped"]["model.norm"] == "no matrix of the base's shape"
  base, model = models
  near = applied()
  for name in ("model.embed_tokens", "lm_head", UP):
    name = f"{name}.weight"
    missed = ((near[name] - model[name]) ** 2).sum() / ((model[name] - base[name]) ** 2).sum()
    assert missed <= 0.2 + 1e-6
  assert record["total_error"] > record["error"]


def test_modules_are_saved_by_name(models):
  record = extract.extract_adapter("base", "model", "out", include=["up_proj"], save=["q_proj"])
  q = "model.layers.0.self_attn.q_proj"
  assert q in record["saved"]
  assert set(record["matrices"]) == {f"model.layers.{i}.mlp.up_proj" for i in range(3)}
  config = folder.read_json(pathlib.Path("out/adapter_config.json"))
  assert q in config["modules_to_save"]
  assert config["target_modules"] == sorted(record["matrices"])
  np.testing.assert_array_equal(applied()[f"{q}.weight"], models[1][f"{q}.weight"])


def test_biases_of_matrices_are_added(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  rng = np.random.default_rng(0)
  base = {"up.weight": rng.normal(size=(4, 3)), "up.bias": rng.normal(size=4)}
  base = {n: x.astype(np.float32) for n, x in base.items()}
  folders.write(tmp_path / "base", base)
  folders.write(tmp_path / "model", {n: 2 * x for n, x in base.items()})
  extract.extract_adapter("base", "model", "out")
  assert folder.read_json(pathlib.Path("out/adapter_config.json"))["lora_bias"] is True
  for name, x in applied().items():
    np.testing.assert_allclose(x, 2 * base[name], rtol=1e-6)
  for name, size in {"base": 1, "model": 2}.items():  # PEFT cannot merge a bias into `down`.
    tree = {n: size * x for n, x in base.items()} | {"down.weight": size * np.eye(4, dtype="f4")}
    folders.write(tmp_path / name, tree)
  assert extract.extract_adapter("base", "model", "out", replace=True)["saved"] == ["up"]
  np.testing.assert_allclose(applied()["up.bias"], 2 * base["up.bias"], rtol=1e-6)
  record = extract.extract_adapter("base", "model", "out", replace=True, biases="skip")
  assert record["skipped"] == {"up.bias": "a bias"}
  np.testing.assert_array_equal(applied()["up.bias"], base["up.bias"])


def test_a_tied_head_stays_the_embedding(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = {**folders.CONFIG, "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
  trees = [folders.tensors(0), folders.tensors(1)]
  for name, tree in zip(("base", "model"), trees, strict=True):
    del tree["lm_head.weight"]
    folders.write(tmp_path / name, tree, config=config)
  for embeddings in ("lora", "save"):
    record = extract.extract_adapter("base", "model", "out", embeddings=embeddings, replace=True)
    assert {"lm_head", "model.embed_tokens"} <= set(record["saved"])
  np.testing.assert_array_equal(
    applied()["model.embed_tokens.weight"], trees[1]["model.embed_tokens.weight"]
  )


@pytest.mark.parametrize("embeddings", ["save", "lora"])
def test_adapters_are_those_of_mergekit(tmp_path, monkeypatch, embeddings):
  """Up to the sign of a pair of singular vectors; `--embed-lora --skip-undecomposable` as well."""
  monkeypatch.chdir(tmp_path)
  with np.load(RECORDED) as file:
    arrays = {n: file[n] for n in file.files}

  def part(start):
    return {n[len(start) :]: x for n, x in arrays.items() if n.startswith(start)}

  for name in ("base", "model"):
    folders.write(tmp_path / name, part(f"{name}:"), config={"model_type": "llama"})
  rest = "save" if embeddings == "save" else "skip"
  extract.extract_adapter("base", "model", "out", rank=3, embeddings=embeddings, rest=rest)
  ours, theirs = safetensors.load("out/adapter_model.safetensors"), part(f"{embeddings}:")
  assert ours.keys() == theirs.keys()
  for name, x in theirs.items():
    np.testing.assert_allclose(np.abs(ours[name]), np.abs(x), atol=1e-5, err_msg=name)
    if "lora_A" in name:
      b = name.replace("lora_A", "lora_B")
      np.testing.assert_allclose(ours[b] @ ours[name], theirs[b] @ x, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"rank": 0}, "rank must be a whole number from 1, got 0"),
    ({"energy": 1.5}, r"energy must be in \(0, 1\], got 1.5"),
    ({"embeddings": "drop"}, "embeddings must be one of save, lora, skip, got 'drop'"),
    ({"include": ["("]}, r"include: '\(' is no regular expression"),
    ({"exclude": ["none"]}, "exclude: 'none' matches no module"),
    ({"save": ["none"]}, "save: there is no module 'none'"),
    ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
  ],
)
def test_wrong_options_are_named(models, tmp_path, options, words):
  with pytest.raises(ValueError, match=words):
    extract.extract_adapter("base", "model", "out", **options)
  assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_are_named(models, tmp_path):
  _, model = models
  with pytest.raises(ValueError, match="base: has no differences from base"):
    extract.extract_adapter("base", "base", "out")
  folders.write(tmp_path / "less", {n: x for n, x in model.items() if n != f"{UP}.weight"})
  with pytest.raises(errors.Problems, match=f"'{UP}.weight' is in the base but not in the model"):
    extract.extract_adapter("base", "less", "out")
  folders.write(tmp_path / "nan", {**model, f"{UP}.weight": np.full((12, 6), np.nan, np.float32)})
  with pytest.raises(ValueError, match=f"'{UP}.weight', minus that of the base, has NaN"):
    extract.extract_adapter("base", "nan", "out")
  assert not (tmp_path / "out").exists()
