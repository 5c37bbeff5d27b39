"""Merging folders: the bits of memory, whole or not at all, whatever comes between."""

import json
import os
import stat
import subprocess
import sys

import folders
import ml_dtypes
import numpy as np
import pytest
import recipes
import safetensors.numpy
import small
from marking import some_fast

import jaxmerge
from jaxmerge import errors, methods
from jaxmerge.cli import main
from jaxmerge.core import stage
from jaxmerge.drivers import measurement
from jaxmerge.files import execute, inspection
from jaxmerge.files import merge as files_merge
from jaxmerge.io.tensors.tensor import Files

NAMES = ("red", "green", "blue")
METHODS = {
  "average": (methods.average(), {}),
  "task_arithmetic": (methods.task_arithmetic(0.5, (1.0, 0.5, 2.0)), {}),
  "ties": (methods.ties(0.3), {}),
  "ties by leaf, exact": (methods.ties(0.3, scope="leaf", rule="exact"), {}),
  "dare_ties": (methods.dare_ties(0.4, 0.5), {"seed": 7}),
  "breadcrumbs": (methods.breadcrumbs(0.5, 0.1), {}),
}


def paths(root, count=3):
  return [root / f"m{k}" for k in range(count)]


def in_memory(method, models, **options):
  base, *rest = models
  return jaxmerge.merge(method, jaxmerge.stack(rest), base, names=NAMES, **options)


@pytest.mark.kernels
@pytest.mark.parametrize("name", some_fast(METHODS, ["dare_ties"]))
@pytest.mark.parametrize("dtype", some_fast([np.float32, ml_dtypes.bfloat16], [np.float32]))
def test_files_have_the_bits_of_memory(tmp_path, name, dtype):
  method, options = METHODS[name]
  models = folders.family(tmp_path, dtype=dtype)
  out = files_merge.merge_files(
    method, paths(tmp_path), tmp_path / "out", base=tmp_path / "base", names=NAMES, **options
  )
  small.same(folders.read(out), in_memory(method, models, **options))


def test_weights_are_merged_without_a_base(tmp_path):
  _, *models = folders.family(tmp_path)
  out = files_merge.merge_files(methods.average((1.0, 2.0, 3.0)), paths(tmp_path), tmp_path / "out")
  expected = jaxmerge.merge(methods.average((1.0, 2.0, 3.0)), jaxmerge.stack(models))
  small.close(folders.read(out), expected)


def test_a_method_of_ten_lines_works_at_once(tmp_path):
  def clipped_mean(limit):
    def f(x, leaf):
      bound = leaf.hparam("limit", x)
      return x.clip(-bound, bound).mean(axis=0, keepdims=True)

    return stage.leafwise(f, hparams={"limit": limit}, combines=True)

  models = folders.family(tmp_path)
  method = clipped_mean(0.05)
  out = files_merge.merge_files(
    method, paths(tmp_path), tmp_path / "out", base=tmp_path / "base", names=NAMES
  )
  small.close(folders.read(out), in_memory(method, models))


@pytest.mark.kernels
def test_nothing_depends_on_how_it_is_cut(tmp_path):
  """Chunks, shards of the result, and the order in which the models are listed."""
  folders.family(tmp_path)
  method = methods.ties(0.3)
  found = []
  for k, (order, options) in enumerate(
    [
      ((0, 1, 2), {}),
      ((0, 1, 2), {"entries": 7}),
      ((2, 0, 1), {"entries": 50, "shard_size": 200}),
    ]
  ):
    out = files_merge.merge_files(
      method,
      [tmp_path / f"m{i}" for i in order],
      tmp_path / f"out{k}",
      base=tmp_path / "base",
      names=[NAMES[i] for i in order],
      **options,
    )
    found.append(folders.read(out))
  for other in found[1:]:
    small.same(other, found[0])


# What rests on sums of floats over whole tensors; and whether the weights themselves are merged.
SUMS = {
  "slerp": (methods.slerp(0.3), True),
  "nuslerp": (methods.nuslerp((0.3, 0.7)), False),
  "multislerp": (methods.multislerp(), True),
  "karcher": (methods.karcher(), True),
  "model_stock": (methods.model_stock(), False),
  "sce": (methods.sce(0.5), False),
}


@pytest.mark.parametrize("name", some_fast(SUMS, ["slerp"]))
def test_sums_of_floats_do_not_depend_on_how_they_are_cut(tmp_path, monkeypatch, name):
  """They are those of fixed blocks, of which a tensor has several; and near those of memory."""
  monkeypatch.setattr(measurement, "BLOCK", 64)
  method, raw = SUMS[name]
  rng = np.random.default_rng(0)
  trees = [{"w.weight": rng.normal(size=(17, 8)).astype(np.float32)} for _ in range(3)]
  for folder, tree in zip(("base", "m0", "m1"), trees, strict=True):
    folders.write(tmp_path / folder, tree)
  base, *models = trees
  symmetric = name not in ("slerp", "nuslerp")
  found = []
  for order, options in [
    ((0, 1), {}),
    ((0, 1), {"entries": 9}),
    ((1, 0) if symmetric else (0, 1), {"entries": 128, "shard_size": 100}),
  ]:
    out = files_merge.merge_files(
      method,
      [tmp_path / f"m{i}" for i in order],
      tmp_path / f"out{len(found)}",
      base=None if raw else tmp_path / "base",
      names=[NAMES[i] for i in order],
      **options,
    )
    found.append(folders.read(out))
  for other in found[1:]:
    small.same(other, found[0])
  stack, names = jaxmerge.stack(models), NAMES[:2]
  if raw:
    expected = jaxmerge.merge(method, stack, names=names)
  else:
    expected = jaxmerge.merge(method, stack, base, names=names)
  small.close(found[0], expected, 2e-6)


# Runs on some of the cores, which count when jax is imported, and prints digests of the results.
ON_CORES = """
import hashlib, os, pathlib, sys
count, root = int(sys.argv[1]), pathlib.Path(sys.argv[2])
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
from jaxmerge import methods
from jaxmerge.files import merge
for name, method, raw in (
  ("slerp", methods.slerp(0.3), True),
  ("sce", methods.sce(0.5), False),
):
  out = root / f"{name}{count}"
  merge.merge_files(method, [root / "m0", root / "m1"], out, base=None if raw else root / "base")
  print(name, hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here.")
def test_one_thread_and_two_give_the_same_bytes(tmp_path):
  """With a tensor so large that a compiler shares it out over threads, and sums of two blocks."""
  cores = len(os.sched_getaffinity(0))
  if cores < 2:
    pytest.skip("there is one core only.")
  rng = np.random.default_rng(0)
  for name in ("base", "m0", "m1"):
    large = rng.normal(size=(1025, 1100)).astype(np.float32)
    folders.write(tmp_path / name, {"large.weight": large, "small.bias": large[0, :7]})
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  told = [
    subprocess.run(
      [sys.executable, "-c", ON_CORES, str(count), str(tmp_path)],
      env=env,
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for count in (1, 2)
  ]
  assert len(told[0].splitlines()) == 2
  assert told[0] == told[1]


def test_the_result_is_a_folder_that_other_tools_open(tmp_path):
  folders.family(tmp_path)
  out = files_merge.merge_files(
    methods.average(), paths(tmp_path), tmp_path / "out", shard_size=500
  )
  index = json.loads((out / "model.safetensors.index.json").read_text())
  assert len(set(index["weight_map"].values())) > 3
  for name, file in index["weight_map"].items():
    assert name in safetensors.numpy.load_file(out / file)
  for name in ("config.json", "generation_config.json", "tokenizer.json"):
    assert (out / name).read_bytes() == (tmp_path / "m0" / name).read_bytes()
  umask = os.umask(0)
  os.umask(umask)
  assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()} == {0o666 & ~umask}
  assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m0", "m1", "m2", "out"]


def test_weights_of_modules_are_merged_in_files_of_their_own(tmp_path):
  """As sentence-transformers lays them out; by way of a checkpoint as well."""
  folders.family(tmp_path, count=2)
  for name, x in (("base", 1), ("m0", 2), ("m1", 4)):
    (tmp_path / name / "modules.json").write_text("[]")
    (tmp_path / name / "2_Dense").mkdir()
    dense = {"linear.weight": np.full((2, 3), x, np.float32)}
    safetensors.numpy.save_file(dense, tmp_path / name / "2_Dense" / "model.safetensors")
    (tmp_path / name / "2_Dense" / "config.json").write_text(f'{{"from": "{name}"}}')
  merge = methods.task_arithmetic(0.5), paths(tmp_path, 2)
  out = files_merge.merge_files(*merge, tmp_path / "out", base=tmp_path / "base", shard_size=400)
  made = safetensors.numpy.load_file(out / "2_Dense" / "model.safetensors")
  assert list(made) == ["linear.weight"]
  np.testing.assert_array_equal(made["linear.weight"], np.full((2, 3), 1 + 0.5 * (1 + 3)))
  assert (out / "2_Dense" / "config.json").read_text() == '{"from": "base"}'
  assert "2_Dense/linear.weight" not in folders.read(out)
  index = json.loads((out / "model.safetensors.index.json").read_text())
  assert set(index["weight_map"]) == set(folders.read(out))
  facts = json.loads((out / execute.PROVENANCE).read_text())
  assert facts["tensors"].keys() == set(folders.read(out)) | {"2_Dense/linear.weight"}
  found = inspection.compare_checksums(inspection.inspect(out))
  assert not any(found["check"][k] for k in ("changed", "missing", "added"))
  place = {t["name"]: t["file"] for t in found["tensors"]}
  assert place["2_Dense/linear.weight"] == "2_Dense/model.safetensors"

  kept = tmp_path / "kept"
  files_merge.merge_files(*merge, kept, base=tmp_path / "base", out_format="orbax")
  again = files_merge.merge_files(methods.average(), [kept], tmp_path / "again", shard_size=400)
  small.same(folders.read(again), folders.read(out))
  file = "2_Dense/model.safetensors"
  assert (again / file).read_bytes() == (out / file).read_bytes()


def test_every_tensor_of_every_input_is_accounted_for(tmp_path):
  models = folders.family(tmp_path)
  out = files_merge.merge_files(
    methods.average(), paths(tmp_path), tmp_path / "out", base=tmp_path / "base", names=NAMES
  )
  told = json.loads((out / execute.PROVENANCE).read_text())
  assert told["inputs"].keys() == {"the base", *NAMES}
  for own, model in zip(("the base", *NAMES), models, strict=True):
    assert told["inputs"][own].keys() == model.keys()
  assert told["inputs"]["red"]["model.norm.weight"] == "merged by average, job 1"
  assert told["inputs"]["the base"]["model.norm.weight"] == "base of average, job 1"
  assert told["tensors"]["model.norm.weight"]["job"] == 1
  assert "job" not in told["tensors"]["position_ids"]
  assert told["inputs"]["red"]["position_ids"] == "copied from the base"


@pytest.mark.parametrize(
  ("missing", "expected"),
  [("base", lambda b, a: b), ("mean", lambda b, a: a), ("skip", None)],
)
def test_what_becomes_of_a_tensor_that_a_model_lacks(tmp_path, missing, expected):
  base, first, second, third = folders.family(tmp_path)
  lacking = "lm_head.weight"
  folders.write(tmp_path / "m0", {n: x for n, x in first.items() if n != lacking})
  merge = (methods.average(), paths(tmp_path), tmp_path / "out")
  with pytest.raises(errors.Problems, match=r"'lm_head.weight' is in the base but not in red"):
    files_merge.merge_files(*merge, base=tmp_path / "base", names=NAMES)
  out = files_merge.merge_files(*merge, base=tmp_path / "base", names=NAMES, missing=missing)
  found = folders.read(out)
  if expected is None:
    assert lacking not in found
  else:
    mean = (second[lacking] + third[lacking]) / 2
    np.testing.assert_allclose(found[lacking], expected(base[lacking], mean), atol=1e-6)


def test_all_problems_are_told_at_once(tmp_path):
  _, first, second, _ = folders.family(tmp_path)
  folders.write(tmp_path / "m0", first | {"model.norm.weight": np.zeros(7, np.float32)})
  folders.write(tmp_path / "m1", second | {"score.weight": np.zeros(2, np.float32)}, shards=2)
  with pytest.raises(errors.Problems) as error:
    files_merge.merge_files(
      methods.average(), paths(tmp_path), tmp_path / "out", base=tmp_path / "base", names=NAMES
    )
  assert len(error.value.lines) == 2
  text = str(error.value)
  assert "'model.norm.weight' is [7] in red but 'model.norm.weight' is [6] in the base" in text
  assert "'score.weight' is in green but not in the base" in text
  assert not (tmp_path / "out").exists()


def test_codes_of_quantized_models_are_not_merged(tmp_path, monkeypatch):
  """They may be stacked and copied; and where only the config says so, weights are whole."""
  monkeypatch.chdir(tmp_path)
  config = folders.CONFIG | {"quantization_config": {"quant_method": "gptq"}}
  trees = folders.family(tmp_path)
  for k, own in enumerate(trees[1:]):
    codes = {n: x.astype(np.int32) for n, x in own.items() if "up_proj" in n}
    folders.write(tmp_path / f"m{k}", own if k == 2 else own | codes, config=config)
  with pytest.raises(
    errors.Problems, match=r"of red is int32: codes .*, as quantization_config"
  ) as error:
    files_merge.merge_files(methods.average(), ["m0", "m1"], "out", names=NAMES[:2])
  assert len(error.value.lines) == 2
  assert files_merge.merge_files(methods.average(), ["m2"], "whole").is_dir()
  recipe = tmp_path / "recipe.yml"
  recipe.write_text("merge_method: passthrough\nmodels: [{model: m0}]\n")
  assert recipes.plan_of_file(recipe, Files()).outputs


def test_all_models_that_cannot_be_opened_are_told_at_once(tmp_path):
  folders.family(tmp_path)
  (tmp_path / "m1" / "config.json").write_text("{")
  with pytest.raises(errors.Problems) as error:
    files_merge.merge_files(
      methods.average(), paths(tmp_path), tmp_path / "out", base=tmp_path / "none"
    )
  damaged, missing = error.value.lines
  assert "m1/config.json: not JSON" in damaged
  assert missing == f"{tmp_path / 'none'}: no such folder."


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_and_nothing_appears(tmp_path, value, dtype):
  _, first, *_ = folders.family(tmp_path, dtype=dtype)
  first["model.layers.1.mlp.up_proj.weight"][3, 2] = value
  folders.write(tmp_path / "m0", first)
  with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj.weight' of model red has NaN"):
    files_merge.merge_files(
      methods.average(), paths(tmp_path), tmp_path / "out", base=tmp_path / "base", names=NAMES
    )
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_passes_where_it_is_allowed(tmp_path, value):
  """As NaN, whichever it is; all other entries are what they are without it."""
  name = "model.norm.weight"
  _, first, second, third = folders.family(tmp_path)
  mean = (first[name] + second[name] + third[name]) / 3
  mean[2] = np.nan
  first[name][2] = value
  folders.write(tmp_path / "m0", first)
  out = files_merge.merge_files(
    methods.average(), paths(tmp_path), tmp_path / "out", nonfinite=True
  )
  found = folders.read(out)
  np.testing.assert_allclose(found[name], mean, 1e-6)
  assert all(np.isfinite(x).all() for n, x in found.items() if n != name)


def test_a_folder_that_is_there_is_not_touched(tmp_path):
  folders.family(tmp_path)
  kept = tmp_path / "out" / "model.safetensors.index.json"
  kept.parent.mkdir()
  kept.write_text("stale")
  merge = (methods.average(), paths(tmp_path), tmp_path / "out")
  with pytest.raises(FileExistsError, match=r"out exists; pass replace=True"):
    files_merge.merge_files(*merge)
  assert kept.read_text() == "stale"
  files_merge.merge_files(*merge, replace=True)
  assert not kept.exists()


@pytest.mark.parametrize("out", [".", "..", "m0/..", "/"])
def test_a_result_needs_a_folder_of_its_own(tmp_path, monkeypatch, capsys, out):
  folders.family(tmp_path, count=1)
  (tmp_path / "r.yml").write_text("merge_method: passthrough\nmodels: [{model: m0}]\n")
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=r"give the result a folder of its own, such as .*merged\.$"):
    files_merge.merge_files(methods.average(), ["m0"], out, replace=True)
  for flags in (["--replace"], ["--dry-run"]):
    assert main.main(["merge", "r.yml", out, *flags]) == 1
    assert "give the result a folder of its own" in capsys.readouterr().err
