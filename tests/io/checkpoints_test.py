"""Checkpoints as models and as results: the same bits, in parts, whole or refused."""

import json
import math
import os
import pathlib
import subprocess
import sys

import folders
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small
import small_tasks
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmerge
from jaxmerge import methods
from jaxmerge.analysis import diff
from jaxmerge.files import execute, inputs, inspection
from jaxmerge.files import merge as files_merge
from jaxmerge.io import formats
from jaxmerge.io.checkpoints import arrays, band_storage, metadata
from jaxmerge.io.checkpoints import store as stores
from jaxmerge.io.tensors.tensor import Files, Tensor
from jaxmerge.training import loop, settings

ROOT = pathlib.Path(jaxmerge.__file__).parents[1]


def whole(tensor):
  out = np.empty(math.prod(tensor.shape), tensor.dtype)
  tensor.read(0, out)
  return out.reshape(tensor.shape)


def read(path):
  return {n: whole(t) for n, t in metadata.tensors(metadata.find_checkpoint(path)).items()}


def tree(seed, dtype=np.float32):
  rng = np.random.default_rng(seed)
  made = {"dense_0": {"kernel": rng.normal(size=(6, 4)), "bias": rng.normal(size=4)}}
  made |= {"layers": [{"scale": rng.normal(size=(3,))}, {"scale": rng.normal()}]}
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), made)


def run(path, *steps, seed=0, dtype=np.float32):
  """A store as a run of the loop leaves it; returns the model of its last step."""
  with stores.Checkpoints(path, keep=None) as store:
    for step in steps:
      params = tree(seed + step, dtype)
      state = {"params": params, "outer": (jnp.zeros(3),), "count": jnp.arange(2), "base": params}
      store.save(step, state, {"round": step})
  return jaxmerge.core.tree.named(params)


def array_file(folder):
  return max((folder / "state").glob("**/d/*"), key=lambda p: p.stat().st_size)


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


# Parts of arrays


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (1, 4, 6), (3, 5, 2, 2), (2, 1, 9)])
@pytest.mark.parametrize("limit", [4, 24, 100])
def test_bands_follow_one_another_and_are_made_of_whole_chunks(monkeypatch, shape, limit):
  monkeypatch.setattr(arrays, "CHUNK", limit)
  monkeypatch.setattr(arrays, "BAND", 1)
  chunks = arrays.chunk(shape, 4)
  assert math.prod(chunks) * 4 <= limit
  entries, at = np.arange(math.prod(shape)).reshape(shape), 0
  while at < entries.size:
    band = arrays.band(shape, chunks, at)
    assert band.start == at
    assert np.ravel(entries[band.box]).tolist() == list(range(band.start, band.stop))
    assert all(arrays.band(shape, chunks, i) == band for i in range(band.start, band.stop))
    at = band.stop
  assert at == entries.size


@pytest.mark.parametrize("spec", [P(), P("x"), P(None, "x"), P(None, None, "x")])
def test_any_range_of_what_orbax_saved_is_read(tmp_path, monkeypatch, spec):
  """Whatever the chunks, and with bands much smaller than the leaf."""
  monkeypatch.setattr(arrays, "CHUNK", 64)
  monkeypatch.setattr(arrays, "BAND", 5)
  mesh = Mesh(np.array(jax.devices()), ("x",))
  x = np.random.default_rng(0).normal(size=(8, 16, 24)).astype(ml_dtypes.bfloat16)
  with stores.Checkpoints(tmp_path) as store:
    store.save(1, {"params": {"w": jax.device_put(x, NamedSharding(mesh, spec))}}, {})
  tensor = metadata.tensors(tmp_path / "1")["w"]
  assert (tensor.dtype, tensor.shape) == (x.dtype, x.shape)
  for start, stop in [(0, 1), (5, 5), (3, 100), (380, 390), (3071, 3072), (0, 3072)]:
    out = np.empty(stop - start, x.dtype)
    tensor.read(start, out)
    assert out.tobytes() == x.reshape(-1)[start:stop].tobytes()


def test_a_large_leaf_is_saved_in_chunks(tmp_path):
  """Or none could be read without the rest of it."""
  with stores.Checkpoints(tmp_path) as store:
    store.save(1, {"params": {"w": jnp.zeros((3 * 2**10, 2**10))}}, {})
  with ocp.StandardCheckpointer() as reader:
    found = reader.metadata(tmp_path / "1/state").item_metadata.tree["params/w"]
  assert math.prod(found.storage.chunk_shape) * 4 <= arrays.CHUNK


def test_small_tensors_are_written_together(tmp_path):
  """Not one file, and one change of the database's tree, for each."""

  def ones(start, out):
    out[...] = 1

  one = Tensor("ones", np.dtype(np.float32), (300, 2), ones)
  metadata.write(tmp_path, {f"layers.{i}.weight": one for i in range(100)})
  assert len(list((tmp_path / "state/d").iterdir())) < 5
  assert all((x == 1).all() for x in read(tmp_path).values())


DTYPES = ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"]
DTYPES += ["int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_by_bit(tmp_path, dtype):
  x = np.random.default_rng(0).integers(0, 2, size=(5, 7)).astype(dtype)
  x = x if dtype == "bool" else (x.view(np.uint8) * 113).view(dtype)

  def entries(start, out):
    out[...] = x.reshape(-1)[start : start + out.size]

  model = {"a/b.c": Tensor("x", x.dtype, x.shape, entries)}
  model["none"] = model["a/b.c"]._replace(shape=(0, 3))
  metadata.write(tmp_path, model)
  found = read(tmp_path)
  assert found["a/b.c"].tobytes() == x.tobytes()
  assert (found["none"].shape, found["none"].dtype) == ((0, 3), x.dtype)


# Which checkpoint a path means


@pytest.mark.parametrize("path", ["", "checkpoints", "checkpoints/atm", "checkpoints/atm/4"])
def test_a_workdir_means_the_newest_step_of_its_loop(tmp_path, path):
  expected = run(tmp_path / "checkpoints/atm", 2, 4)
  run(tmp_path / "checkpoints/longer", 7)
  (tmp_path / "checkpoints/atm/unfinished/5").mkdir(parents=True)
  assert metadata.find_checkpoint(tmp_path / path) == tmp_path / "checkpoints/atm/4"
  small.same(read(tmp_path / path), expected)


def test_a_run_of_the_loop_is_the_model_that_it_made(tmp_path):
  chosen = settings.Settings(rounds=2, epochs=2.0, batch_size=4, outer="nesterov")
  with stores.Checkpoints(tmp_path / "checkpoints/atm") as store:
    made = loop.tune_and_merge(
      small_tasks.network,
      small_tasks.weights(),
      small_tasks.three(),
      methods.average(),
      chosen,
      checkpoints=store,
    )
  small.same(read(tmp_path), jaxmerge.core.tree.named(made.params))


def test_a_store_of_its_own_is_a_workdir_too(tmp_path):
  expected = run(tmp_path / "checkpoints", 1, 3)
  small.same(read(tmp_path), expected)
  small.same(read(tmp_path / "checkpoints"), expected)


def test_several_runs_without_the_loop_are_refused(tmp_path):
  run(tmp_path / "checkpoints/experts", 1)
  run(tmp_path / "checkpoints/multitask", 1)
  with pytest.raises(ValueError, match=r"several runs, experts, multitask: use the folder of one"):
    formats.open_model(tmp_path, Files())


def test_a_folder_that_is_none_is_told_as_before(tmp_path):
  (tmp_path / "12").mkdir()
  for path in (tmp_path, tmp_path / "none"):
    with pytest.raises(FileNotFoundError):
      inputs.open_model(path, Files())


def test_a_state_without_a_model_is_refused(tmp_path):
  with stores.Checkpoints(tmp_path) as store:
    store.save(1, {"w": jnp.ones(2), "more": {"b": jnp.ones(2)}}, {})
  with pytest.raises(
    ValueError, match=r"1: there is no model under 'params' .* has more, w; save a mod"
  ):
    metadata.tensors(tmp_path / "1")


# Damage


@pytest.mark.parametrize(
  ("harm", "problem"),
  [
    (lambda s: array_file(s).unlink(), "is missing"),
    (lambda s: array_file(s).write_bytes(b"short"), "has 5 bytes, not"),
    (lambda s: (s / "state/_METADATA").unlink(), "file state/_METADATA is missing"),
    (lambda s: (s / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda s: flip(s / "manifest.json"), "manifest.json is damaged"),
    (lambda s: (s / "state/link").symlink_to("/"), "file state/link is not in manifest.json"),
  ],
)
def test_what_is_missing_or_cut_is_told_before_any_work(tmp_path, harm, problem):
  run(tmp_path, 3, 4)
  harm(tmp_path / "4")
  hint = r".*; its store also has steps 3: use one of them"
  with pytest.raises(ValueError, match=f"4: the checkpoint is damaged: .*{problem}{hint}"):
    inputs.open_model(tmp_path, Files())
  inputs.open_model(tmp_path / "3", Files())


def test_a_flipped_bit_is_found_before_an_entry_is_used(tmp_path):
  run(tmp_path / "a", 1)
  run(tmp_path / "b", 1, seed=5)
  flip(array_file(tmp_path / "b/1"))
  with pytest.raises(ValueError, match=r"b/1: the checkpoint is damaged: file state/.* fails its"):
    files_merge.merge_files(methods.average(), [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[]", "{", '{"tree_metadata": {}}'])
def test_metadata_that_is_not_orbax_s_is_named(tmp_path, text):
  (tmp_path / "_METADATA").write_text(text)
  with pytest.raises(ValueError, match=r"_METADATA: not the metadata of an Orbax checkpoint"):
    arrays.keys(tmp_path)


# Merging them


def test_runs_are_merged_as_their_trees_are(tmp_path):
  models = [run(tmp_path / f"r{k}/checkpoints/atm", 1, 2, seed=k) for k in range(3)]
  base, *tuned = [tree(k + 2) for k in range(3)]
  paths = [tmp_path / f"r{k}" for k in (1, 2)]
  method = methods.ties(0.5)
  merge = {"base": tmp_path / "r0", "names": ("a", "b"), "entries": 7}
  out = files_merge.merge_files(method, paths, tmp_path / "out", **merge)
  expected = jaxmerge.merge(method, jaxmerge.stack(tuned), base, names=("a", "b"))
  small.same(folders.read(out), jaxmerge.core.tree.named(expected))
  assert models[0].keys() == folders.read(out).keys()
  told = json.loads((out / execute.PROVENANCE).read_text())
  assert told["folders"]["a"] == str(tmp_path / "r1/checkpoints/atm/2")
  assert told["inputs"]["a"].keys() == models[0].keys()
  again = files_merge.merge_files(methods.average(), [out, paths[0]], tmp_path / "again")
  assert folders.read(again).keys() == models[0].keys()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_safetensors_to_orbax_and_back_has_the_same_bits(tmp_path, dtype):
  base, *_ = folders.family(tmp_path, count=1, dtype=dtype)
  one = methods.passthrough(1.0)
  there = files_merge.merge_files(one, [tmp_path / "base"], tmp_path / "there", out_format="orbax")
  small.same(read(there), base)
  back = files_merge.merge_files(one, [there], tmp_path / "back")
  small.same(folders.read(back), base)
  assert {p.name for p in there.iterdir()} == {
    "README.md", "config.json", "generation_config.json", "tokenizer.json", "manifest.json",
    "state", execute.PROVENANCE,
  }  # fmt: skip
  for name in ("config.json", "tokenizer.json"):
    assert (back / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def test_a_checkpoint_has_the_bits_of_safetensors(tmp_path):
  folders.family(tmp_path)
  merge = (methods.ties(0.3), [tmp_path / f"m{k}" for k in range(3)])
  plain = files_merge.merge_files(*merge, tmp_path / "a", base=tmp_path / "base")
  made = files_merge.merge_files(
    *merge, tmp_path / "b", base=tmp_path / "base", out_format="orbax", shard_size=500
  )
  small.same(read(made), folders.read(plain))
  facts = [json.loads((p / execute.PROVENANCE).read_text()) for p in (plain, made)]
  assert facts[0]["tensors"] == facts[1]["tensors"]


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_orbax_restores_it_on_eight_devices(tmp_path, monkeypatch, axis):
  monkeypatch.setattr(arrays, "CHUNK", 128)
  rng = np.random.default_rng(0)
  base = {"w": rng.normal(size=(16, 24)).astype(np.float32), "b": np.float16(rng.normal(size=8))}
  base["big.e.weight"] = rng.normal(size=(8, 8)).astype(ml_dtypes.bfloat16)
  folders.write(tmp_path / "base", base)
  one = methods.passthrough(1.0)
  out = files_merge.merge_files(one, [tmp_path / "base"], tmp_path / "out", out_format="orbax")
  mesh = Mesh(np.array(jax.devices()), ("x",))
  spec = {None: P(), 0: P("x"), 1: P(None, "x")}[axis]

  def wanted(x):
    own = NamedSharding(mesh, spec if x.ndim == 2 else P())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)

  like = {"params": jax.tree.map(wanted, base)}
  with ocp.StandardCheckpointer() as reader:
    got = reader.restore(out / "state", like)["params"]
    plain = reader.restore(out / "state")["params"]
  with ocp.PyTreeCheckpointer() as reader:
    other = reader.restore(out / "state")["params"]
  assert got.keys() == base.keys()
  for name, x in base.items():
    assert got[name].sharding == like["params"][name].sharding
    for found in (got, plain, other):
      assert found[name].dtype == x.dtype
      assert np.asarray(found[name]).tobytes() == x.tobytes()


def test_the_config_may_change_and_the_weights_may_not(tmp_path):
  folders.family(tmp_path, count=1)
  one = methods.passthrough(1.0)
  out = files_merge.merge_files(one, [tmp_path / "base"], tmp_path / "out", out_format="orbax")
  (out / "config.json").write_text("{}")
  (out / "README.md").write_text("A model.")
  record = inspection.compare_checksums(inspection.inspect(out))
  assert record["kind"] == "checkpoint"
  assert record["check"]["same"] == len(record["tensors"])
  flip(array_file(out))
  with pytest.raises(ValueError, match="fails its checksum"):
    inspection.add_checksums(record)


def test_inspect_and_diff_take_checkpoints(tmp_path):
  named = run(tmp_path / "w/checkpoints/atm", 1, 2)
  run(tmp_path / "v", 1)
  record = inspection.add_checksums(inspection.inspect(tmp_path / "w"))
  assert record["folder"] == str(tmp_path / "w/checkpoints/atm/2")
  assert {t["name"]: t["shape"] for t in record["tensors"]} == {
    n: list(x.shape) for n, x in named.items()
  }
  opened = Files()
  base = inputs.open_model(tmp_path / "w", opened)
  found = diff.compare(base, diff.open_models([str(tmp_path / "v")], base, opened))
  assert found["whole"]["entries"] == sum(x.size for x in named.values())
  assert found["whole"]["norms"]["v"] > 0


def test_an_unknown_format_is_refused(tmp_path):
  folders.family(tmp_path, count=1)
  with pytest.raises(ValueError, match="one of safetensors, orbax, like:base, got 'zarr'"):
    files_merge.merge_files(methods.average(), [tmp_path / "m0"], tmp_path / "o", out_format="zarr")


# Interruptions


def test_an_interrupted_copy_is_made_again_from_what_was_merged(tmp_path, monkeypatch):
  folders.family(tmp_path)
  merge = (methods.average(), [tmp_path / f"m{k}" for k in range(3)], tmp_path / "out")
  monkeypatch.setattr(arrays, "WRITTEN", 1)
  tensors, seen = len(folders.tensors(0)), []

  def stop(count):
    seen.append(count)
    if len(seen) == 1 + tensors + 4:  # What was done before, all tensors, a part of the copy.
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    files_merge.merge_files(*merge, out_format="orbax", progress=stop)
  assert (tmp_path / ".out.merging/state").exists()
  with pytest.raises(ValueError, match="an interrupted merge of other inputs or settings"):
    files_merge.merge_files(*merge)
  again = []
  files_merge.merge_files(*merge, out_format="orbax", progress=again.append)
  assert again[0] == sum(x.nbytes for x in folders.tensors(0).values())
  assert len(again) == 1 + tensors
  assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m0", "m1", "m2", "out"]
  plain = files_merge.merge_files(*merge[:2], tmp_path / "plain")
  small.same(read(tmp_path / "out"), folders.read(plain))


def test_a_full_disk_is_an_error_of_the_disk(tmp_path):
  import resource

  x = np.random.default_rng(0).normal(size=2**16)

  def entries(start, out):
    out[...] = x[start : start + out.size]

  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
  try:
    with pytest.raises(OSError, match=r"not copied into the checkpoint.*File too large") as error:
      metadata.write(tmp_path, {"w": Tensor("of x", x.dtype, x.shape, entries)})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert error.value.filename == "of x"


# The command line


def recipe(path, *models):
  listed = "".join(f"  - model: {m}\n    parameters: {{weight: 1}}\n" for m in models)
  path.write_text(f"merge_method: linear\nmodels:\n{listed}")
  return path


def command(*arguments):
  code = "import sys; from jaxmerge.cli import main; code = main.main(sys.argv[1:]); "
  code += "sys.exit(code or 7 * bool({'jax', 'orbax', 'tensorstore'} & set(sys.modules)))"
  run = [sys.executable, "-c", code, *map(str, arguments)]
  return subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=os.environ)


def test_a_dry_run_and_errors_are_free_of_jax(tmp_path):
  for name in ("a", "b"):
    run(tmp_path / name / "checkpoints/atm", 1, 2)
  own = recipe(tmp_path / "r.yml", tmp_path / "a", tmp_path / "b")
  done = command("merge", own, tmp_path / "out", "--dry-run", "--out-format=orbax")
  assert done.returncode == 0, done.stderr
  assert f"{tmp_path / 'a'}: checkpoint {tmp_path / 'a/checkpoints/atm/2'}" in done.stdout
  assert "a checkpoint; while it is made" in done.stdout
  array_file(tmp_path / "b/checkpoints/atm/2").unlink()
  failed = command("merge", own, tmp_path / "out")
  assert failed.returncode == 1
  assert "the checkpoint is damaged" in failed.stderr
  assert command("inspect", tmp_path / "a").returncode == 0


def test_rows_of_a_kernel_are_its_outputs(tmp_path):
  from jaxmerge.cli import main

  for seed, name in enumerate("abc"):
    run(tmp_path / name, 1, seed=seed)
  text = f"merge_method: model_stock\nbase_model: {tmp_path / 'a'}\n"
  text += f"models: [{{model: {tmp_path / 'b'}}}, {{model: {tmp_path / 'c'}}}]\n"
  own = tmp_path / "r.yml"
  own.write_text(text + "parameters: {filter_wise: true}\n")
  assert main.main(["merge", str(own), str(tmp_path / "out")]) == 0
  base, *tuned = [tree(seed + 1) for seed in range(3)]
  method, kernels = methods.model_stock(scope="row"), (("kernel$", "io"),)
  expected = jaxmerge.merge(method, jaxmerge.stack(tuned), base, layout=kernels)
  small.close(folders.read(tmp_path / "out"), jaxmerge.core.tree.named(expected))
  other = jaxmerge.merge(method, jaxmerge.stack(tuned), base, layout=(("kernel$", "oi"),))
  assert not np.allclose(other["dense_0"]["kernel"], expected["dense_0"]["kernel"])


def test_a_recipe_merges_runs_to_a_checkpoint(tmp_path):
  from jaxmerge.cli import main

  models = [run(tmp_path / name, 1, seed=seed) for seed, name in enumerate("ab")]
  own = recipe(tmp_path / "r.yml", tmp_path / "a", tmp_path / "b")
  own.write_text(own.read_text() + "dtype: bfloat16\n")
  assert main.main(["merge", str(own), str(tmp_path / "out"), "--out-format", "orbax"]) == 0
  found = read(tmp_path / "out")
  for name, x in models[0].items():
    mean = np.asarray((x + models[1][name]) / 2)
    np.testing.assert_array_equal(found[name], mean.astype(ml_dtypes.bfloat16))
  names = {"README.md", "manifest.json", "state", execute.PROVENANCE, "jaxmerge_recipe.yml"}
  assert {p.name for p in (tmp_path / "out").iterdir()} == names
  again = recipe(tmp_path / "s.yml", tmp_path / "out", tmp_path / "out/../a")
  assert main.main(["merge", str(again), str(tmp_path / "more")]) == 0


def test_bands_of_many_checkpoints_are_on_the_disk(tmp_path, monkeypatch):
  """Parts of all checkpoints are read in turn: each band is decoded once, and one is in memory."""
  monkeypatch.setattr(band_storage, "IN_MEMORY", 0)
  values = [np.random.default_rng(k).normal(size=(64, 8)).astype(np.float32) for k in range(4)]
  opened = []
  for k, x in enumerate(values):
    (tmp_path / str(k)).mkdir()
    metadata.write(tmp_path / str(k), {"w": Tensor("w", x.dtype, x.shape, _reader(x))})
    opened.append(metadata.tensors(tmp_path / str(k))["w"])
  before = set(band_storage._STORAGES)
  for start in range(0, 512, 128):
    for x, tensor in zip(values, opened, strict=True):
      out = np.empty(128, np.float32)
      tensor.read(start, out)
      np.testing.assert_array_equal(out, x.reshape(-1)[start : start + 128])
  used = [s for s in before if s.entries.nbytes or s.is_on_disk]
  assert sum(s.is_on_disk for s in used) >= 3
  assert sum(bool(s.entries.nbytes) for s in used) <= 1


def _reader(x):
  def read(start, out):
    out[:] = x.reshape(-1)[start : start + out.size]

  return read
