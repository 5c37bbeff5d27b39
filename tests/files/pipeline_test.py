"""Pipelines of diffusers: each part of weights is merged, the rest copied."""

import fnmatch
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import recipes

import jaxmerge
from jaxmerge import errors, methods
from jaxmerge.cli import main
from jaxmerge.io import formats
from jaxmerge.io.huggingface import hub, pipeline
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Files

SHAPES = {
  "unet/diffusion_pytorch_model": {"conv_in.weight": (4, 3, 3, 3), "mid.weight": (8, 4)},
  "vae/diffusion_pytorch_model": {"decoder.weight": (4, 4)},
  "text_encoder/model": {"text_model.embeddings.weight": (6, 4)},
}
REST = {
  "model_index.json": {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet"]},
  "scheduler/scheduler_config.json": {"beta_end": 0.012},
  "tokenizer/vocab.json": {"a": 0},
  "unet/config.json": {"_class_name": "UNet", "attention_head_dim": 8},
  "text_encoder/config.json": {"model_type": "clip_text_model", "num_attention_heads": 2},
}


def write(path, seed, *, variant="", dtype=np.float32, shapes=SHAPES, rest=REST):
  rng = np.random.default_rng(seed)
  weights = {}
  for stem, each in shapes.items():
    own = {n: rng.normal(size=s).astype(dtype) for n, s in each.items()}
    safetensors.save(path / f"{stem}{variant}.safetensors", own, {"format": "pt"})
    weights |= {f"{stem.split('/')[0]}/{n}": x for n, x in own.items()}
  for name, content in rest.items():
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text(json.dumps(content))
  (path / "tokenizer/merges.txt").write_text("a b")
  return weights


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


def files(path):
  return {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}


def test_parts_are_merged_and_the_rest_is_copied(home, capsys):
  a, b = write(home / "a", 0), write(home / "b", 1, variant=".fp16")
  (home / "recipe.yml").write_text(
    "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: a}, {model: b}]\n"
  )
  assert main.main(["merge", "recipe.yml", "out", "--dry-run"]) == 0
  said = capsys.readouterr().out
  assert "a: is a pipeline of diffusers: its parts text_encoder, unet, vae are merged." in said
  assert "b: has text_encoder, unet, vae only as the variant fp16, which is read." in said
  assert main.main(["merge", "recipe.yml", "out"]) == 0
  written = {"README.md", "jaxmerge_provenance.json", "jaxmerge_recipe.yml"}
  assert files(home / "out") == files(home / "a") | written
  for stem, each in SHAPES.items():
    merged = safetensors.load(home / "out" / f"{stem}.safetensors")
    assert merged.keys() == each.keys()
    for name, x in merged.items():
      whole = f"{stem.split('/')[0]}/{name}"
      np.testing.assert_allclose(x, (a[whole] + b[whole]) / 2, atol=1e-6)
  for name in (*REST, "tokenizer/merges.txt"):
    assert (home / "out" / name).read_bytes() == (home / "a" / name).read_bytes()
  assert 'library_name: "diffusers"' in (home / "out/README.md").read_text()
  assert main.main(["inspect", "out", "--check"]) == 0
  assert main.main(["merge", "recipe.yml", "out", "--replace"]) == 0


def test_large_parts_are_in_shards_with_an_index(home):
  write(home / "a", 0)
  write(home / "b", 1)
  out = jaxmerge.merge_files(methods.average(), ["a", "b"], "out", shard_size=250, dtype="float16")
  index = json.loads((out / "unet/diffusion_pytorch_model.safetensors.index.json").read_text())
  assert set(index["weight_map"]) == {"conv_in.weight", "mid.weight"}
  assert (out / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").is_file()
  assert (out / "vae/diffusion_pytorch_model.safetensors").is_file()
  assert (
    formats.open_model(out, Files()).tensors.keys()
    == formats.open_model("a", Files()).tensors.keys()
  )
  assert not (out / "config.json").exists()


def test_the_plain_files_are_taken_and_others_named(home):
  write(home / "a", 0, variant=".fp16", dtype=ml_dtypes.bfloat16)
  write(home / "a", 0)
  weights = formats.open_model("a", Files())
  assert {t.dtype for t in weights.tensors.values()} == {np.dtype(np.float32)}
  assert any("also has the variant fp16 of text_encoder, unet, vae" in n for n in weights.notes)
  for path in (home / "a").glob("*/*l.safetensors"):
    path.rename(path.with_suffix(".ema.safetensors"))
  with pytest.raises(ValueError, match="text_encoder: has the variants ema, fp16: remove"):
    formats.open_model("a", Files())


def test_parts_that_differ_are_named(home):
  write(home / "a", 0)
  write(home / "b", 1, shapes={**SHAPES, "vae/diffusion_pytorch_model": {"decoder.weight": (4, 5)}})
  heads = {**REST, "text_encoder/config.json": {**REST["text_encoder/config.json"]}}
  heads["text_encoder/config.json"]["num_attention_heads"] = 4
  write(home / "c", 1, rest=heads)
  with pytest.raises(errors.Problems, match=r"'vae/decoder.weight' is \[4, 5\] in b"):
    jaxmerge.merge_files(methods.average(), ["a", "b"], "out")
  with pytest.raises(errors.Problems, match=r"text_encoder_config.num_attention_heads is 2 in a"):
    jaxmerge.merge_files(methods.average(), ["a", "c"], "out")
  del (less := dict(SHAPES))["vae/diffusion_pytorch_model"]
  write(home / "d", 1, shapes=less)
  with pytest.raises(errors.Problems, match=r"tensor 'vae/decoder.weight' is in a but not in d"):
    jaxmerge.merge_files(methods.average(), ["a", "d"], "out")
  text = "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: a}, {model: d}]\n"
  (home / "recipe.yml").write_text(f"{text}missing: mean\n")
  assert len(recipes.plan_of_file(home / "recipe.yml", Files()).outputs) == 4


def test_scaled_weights_of_a_part_leave_its_config(home):
  write(home / "a", 0)
  codes = {
    "mid.weight": np.ones((8, 4), ml_dtypes.float8_e4m3fn),
    "mid.weight_scale": np.float32(2),
  }
  codes["conv_in.weight"] = np.ones((4, 3, 3, 3), np.float32)
  safetensors.save(home / "a/unet/diffusion_pytorch_model.safetensors", codes)
  config = {**REST["unet/config.json"], "quantization_config": {"quant_method": "fp8"}}
  (home / "a/unet/config.json").write_text(json.dumps(config))
  write(home / "b", 1)
  out = jaxmerge.merge_files(methods.average(), ["a", "b"], "out")
  assert json.loads((out / "unet/config.json").read_text()) == REST["unet/config.json"]
  assert not (out / "config.json").exists()


def test_no_weights_and_missing_shards_are_named(home):
  write(home / "a", 0, shapes={})
  with pytest.raises(FileNotFoundError, match=r"a: has model_index.json, but no part"):
    formats.open_model("a", Files())
  (home / "a/unet/model.safetensors.index.json").write_text(
    '{"weight_map": {"w": "x.safetensors"}}'
  )
  (home / "a/unet/other.safetensors").write_bytes(b"")
  with pytest.raises(FileNotFoundError, match=r"a/unet/x.safetensors: no such file, but the index"):
    pipeline.parts(home / "a")


@pytest.mark.parametrize("variants", [("", ".fp16"), (".fp16",)])
def test_parts_are_fetched_without_other_variants(home, monkeypatch, variants):
  huggingface_hub = pytest.importorskip("huggingface_hub")
  for variant in variants:
    write(home / "remote", 0, variant=variant)
  (home / "remote/unet/model.bin").write_bytes(b"")

  def snapshot_download(name, *, revision, allow_patterns, local_files_only):
    for file in files(home / "remote"):
      if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
        target = home / "snapshots" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(home / "remote" / file, target)
    return str(home / "snapshots")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  place = hub.locate("org/pipe", "main", download=True).folder
  stems = {f"{stem}{variants[0]}.safetensors" for stem in SHAPES}
  assert files(place) == {*REST, "tokenizer/merges.txt", *stems}
