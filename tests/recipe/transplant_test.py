"""Tokenizers of donors: rows of tokens that both have stay, others are those of mergekit."""

import json
import pathlib

import folders
import jax.numpy as jnp
import mergekit_outputs
import numpy as np
import pytest

from jaxmerge.cli import main
from jaxmerge.io.tensors import safetensors
from jaxmerge.recipe.tokenizer import approximation, transplant

RECORDED = pathlib.Path(mergekit_outputs.__file__).with_name("transplant.npz")
# As they were for the recording, with two more rows in the model than tokens.
OURS = ["<s>", "</s>", "<unk>", "▁a", "▁b", "▁c", "d", "e", "▁of", "▁the", "x", "<0x41>"]
OURS += ["▁new", "▁ant"]
THEIRS = ["<pad>", "<bos>", "Ġthe", "Ġof", "Ġa", "Ġb", "d", "e", "Ġantler", "A", "Ġq", "Ġc", "zz"]
THEIRS += ["x", "<end>", "Ġr", "Ġnewer"]
ROLES = {
  "m": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": {"content": "<unk>"}},
  "d": {"bos_token": "<bos>", "eos_token": "<end>", "pad_token": "<pad>"},
}
NUMBERS = {
  "m": {"bos_token_id": 0, "eos_token_id": 1},
  "d": {"bos_token_id": 1, "eos_token_id": 14},
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write(name, tokens, tensors, roles=None, numbers=None, **config):
  config = {"model_type": "llama", "vocab_size": len(tokens), **(numbers or {}), **config}
  folders.write(pathlib.Path(name), tensors, config=config)
  model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []}
  pathlib.Path(name, "tokenizer.json").write_text(json.dumps({"model": model}))
  pathlib.Path(name, "tokenizer_config.json").write_text(json.dumps(roles or {}))
  (pathlib.Path(name) / "generation_config.json").write_text(json.dumps(numbers or {}))


@pytest.fixture
def recorded(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with np.load(RECORDED) as file:
    arrays = {n: file[n] for n in file.files}
  for name, tokens in {"m": OURS, "d": THEIRS}.items():
    own = {n: arrays[f"{name}:{n}"] for n in (EMBEDDING, HEAD)}
    own["model.norm.weight"] = np.ones(own[EMBEDDING].shape[1], np.float32)
    write(name, tokens, own, ROLES[name], NUMBERS[name])
  return arrays


CASES = {
  "omp": {"method": "omp", "k": 3},
  "common_interpolation": {"method": "interpolate", "k": 2},
  "mean": {"method": "mean"},
  "match": {"method": "omp", "k": 3, "match_bytes": True, "match_prefixes": True},
}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_mergekit(recorded, case):
  record = transplant.transplant("m", "d", "out", batch=3, **CASES[case])
  merged = safetensors.load("out/model.safetensors")
  for name in (EMBEDDING, HEAD):
    np.testing.assert_allclose(merged[name], recorded[f"{case}:{name}"], atol=2e-6, err_msg=name)
  np.testing.assert_array_equal(merged["model.norm.weight"], np.ones(8))
  counts = {"same": 10, "byte": 1, "prefix": 2, "new": 4} if case == "match" else {}
  assert {k: n for k, n in record["tokens"].items() if n} == (counts or {"same": 10, "new": 7})


def test_files_and_config_are_those_of_the_donor(recorded, capsys):
  assert main.main(["transplant", "m", "d", "out", "-k=3"]) == 0
  said = capsys.readouterr().out
  assert said.startswith("tokens: 10 same, 7 new\nmodel.embed_tokens.weight: relative error of")
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert pathlib.Path("out", name).read_bytes() == pathlib.Path("d", name).read_bytes()
  config = json.loads(pathlib.Path("out/config.json").read_text())
  assert config == {"model_type": "llama", "vocab_size": 17, **NUMBERS["d"]}
  assert json.loads(pathlib.Path("out/generation_config.json").read_text()) == NUMBERS["d"]
  facts = json.loads(pathlib.Path("out/jaxmerge_provenance.json").read_text())
  assert facts["transplant"]["tokens"]["same"] == 10
  assert main.main(["inspect", "out", "--check"]) == 0
  assert main.main(["transplant", "m", "d", "out"]) == 1
  assert "out exists; pass --replace" in capsys.readouterr().err


def test_the_same_tokenizer_changes_no_row(recorded):
  transplant.transplant("m", "m", "out")
  merged = safetensors.load("out/model.safetensors")
  for name in (EMBEDDING, HEAD):
    np.testing.assert_array_equal(merged[name], recorded[f"m:{name}"][: len(OURS)])


def test_a_rotated_donor_gives_rows_back(tmp_path, monkeypatch):
  """Where the donor's rows are the model's, turned, and few tokens span a new one."""
  monkeypatch.chdir(tmp_path)
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(6, 5)).astype(np.float32)
  rows[5] = 2 * rows[1] - rows[3]
  turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
  names = [f"t{i}" for i in range(6)]
  write("m", names[:5], {EMBEDDING: rows[:5]}, tie_word_embeddings=True)
  write("d", names, {EMBEDDING: (rows @ turn).astype(np.float32)}, tie_word_embeddings=True)
  record = transplant.transplant("m", "d", "out", k=5)
  merged = safetensors.load("out/model.safetensors")
  assert merged.keys() == {EMBEDDING}
  np.testing.assert_allclose(merged[EMBEDDING], rows, atol=1e-5)
  assert record["errors"][EMBEDDING] < 1e-5


def test_pursuit_is_that_of_least_squares():
  rng = np.random.default_rng(0)
  atoms, targets = (rng.normal(size=(n, 6)).astype(np.float32) for n in (9, 4))
  errors = []
  for k in (1, 3, 6, 8):  # More atoms than dimensions: those that add nothing count nothing.
    indices, coefficients = approximation.matching_pursuit(jnp.array(targets), jnp.array(atoms), k)
    for x, chosen, c in zip(targets, np.asarray(indices), np.asarray(coefficients), strict=True):
      assert len(set(chosen.tolist())) == k
      best = np.linalg.lstsq(atoms[chosen].T, x, rcond=None)[0]
      np.testing.assert_allclose(atoms[chosen].T @ c, atoms[chosen].T @ best, atol=1e-4)
    near = np.einsum("nk,nkd->nd", coefficients, atoms[np.asarray(indices)])
    errors.append(np.linalg.norm(near - targets))
  assert errors == sorted(errors, reverse=True)
  assert errors[2] < 1e-4
  atoms = jnp.array([[5.0, 0.0], [0.0, 1.0]])
  assert approximation.matching_pursuit(jnp.array([[1.0, 3.0]]), atoms, 1)[0].tolist() == [[0]]


def test_cosines_are_weights():
  atoms = jnp.array([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
  indices, weights = approximation.nearest(jnp.array([[1.0, 1.0]]), atoms, 2, cosine=True)
  assert indices.tolist() == [[0, 1]]
  np.testing.assert_allclose(weights, [[0.5, 0.5]], rtol=1e-6)


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"method": "subword"}, "method must be one of omp, interpolate, mean, zero, got 'subword'"),
    ({"k": 0}, "k must be a whole number from 1, got 0"),
  ],
)
def test_wrong_options_are_named(recorded, options, words):
  with pytest.raises(ValueError, match=words):
    transplant.transplant("m", "d", "out", **options)


def test_what_cannot_be_transplanted_is_named(recorded, tmp_path):
  x = np.ones((2, 3), np.float32)
  write("other", ["q1", "q2"], {EMBEDDING: x, HEAD: x})
  with pytest.raises(ValueError, match="the two tokenizers have no token in common"):
    transplant.transplant("m", "other", "out")
  write("two", ["a", "b"], {EMBEDDING: x, "encoder.embed_tokens.weight": 2 * x})
  with pytest.raises(ValueError, match="the donor has two tensors of kind embedding: 'encoder"):
    transplant.transplant("m", "two", "out")
  write("none", ["a", "b"], {"norm.weight": x[0]})
  with pytest.raises(ValueError, match=r"the model, none, has no token embedding"):
    transplant.transplant("none", "d", "out")
  assert not (tmp_path / "out").exists()
