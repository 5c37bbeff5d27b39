"""What goes wrong with merges elsewhere: each an error that names the culprit, and nothing left."""

import errno
import json
import os
import pathlib
import shutil
import struct

import folders
import numpy as np
import pytest
import recipes

from jaxmerge import methods
from jaxmerge.cli import main
from jaxmerge.files import finish, merge
from jaxmerge.io.huggingface import folder, shard_writer
from jaxmerge.io.tensors import safetensors

RECIPE = """
merge_method: task_arithmetic
base_model: base
models:
  - model: m0
    parameters: {weight: 0.5}
  - model: m1
    parameters: {weight: 0.5}
"""
SHARD = pathlib.Path("m1/model-00002-of-00002.safetensors")
INDEX = pathlib.Path("m1/model.safetensors.index.json")


@pytest.fixture
def family(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pathlib.Path("recipe.yml").write_text(RECIPE)
  return folders.family(tmp_path, count=2)


def truncated():
  SHARD.write_bytes(SHARD.read_bytes()[:-100])


def header(change):
  """Rewrites the JSON header of a shard."""
  raw = SHARD.read_bytes()
  (length,) = struct.unpack("<Q", raw[:8])
  content = json.loads(raw[8 : 8 + length])
  change(content)
  text = json.dumps(content).encode()
  SHARD.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def overlapping():
  def change(content):
    names = [n for n in content if n != "__metadata__"]
    content[names[1]]["data_offsets"] = content[names[0]]["data_offsets"]
    content[names[1]]["shape"] = content[names[0]]["shape"]

  header(change)


def index(change):
  content = json.loads(INDEX.read_text())
  change(content["weight_map"])
  INDEX.write_text(json.dumps(content))


def pickled():
  for path in pathlib.Path("m0").glob("*.safetensors"):
    path.rename(path.with_name("pytorch_model.bin"))


def tensor(folder, name, change):
  content = folders.read(pathlib.Path(folder))
  content[name] = change(content[name])
  folders.write(pathlib.Path(folder), content)


def recipe(old, new):
  pathlib.Path("recipe.yml").write_text(RECIPE.replace(old, new))


NORM = "model.norm.weight"
DAMAGE = {
  "truncated shard": (truncated, ["model-00002-of-00002.safetensors", "truncated"]),
  "missing shard": (SHARD.unlink, ["model-00002-of-00002.safetensors", "missing"]),
  "overlapping offsets": (overlapping, ["model-00002-of-00002.safetensors", "overlaps"]),
  "a header that is not JSON": (
    lambda: SHARD.write_bytes(struct.pack("<Q", 40) + b"{" * 48),
    ["model-00002-of-00002.safetensors", "not JSON"],
  ),
  "a huge header": (
    lambda: SHARD.write_bytes(struct.pack("<Q", 2**60) + b"{}"),
    ["model-00002-of-00002.safetensors", "over the limit"],
  ),
  "an index that leaves the folder": (
    lambda: index(lambda m: m.update({NORM: "../base/model.safetensors"})),
    ["model.safetensors.index.json", "'../base/model.safetensors'", "not the name of a file"],
  ),
  "an index with an absolute path": (
    lambda: index(lambda m: m.update({NORM: "/etc/hosts"})),
    ["model.safetensors.index.json", "'/etc/hosts'"],
  ),
  "a pickle": (pickled, ["m0", "pytorch_model.bin is a pickle"]),
  "another shape": (
    lambda: tensor("m0", NORM, lambda x: x[:-1]),
    [repr(NORM), "[5] in m0", "[6]", "base"],
  ),
  "another vocabulary": (
    lambda: tensor("m0", "lm_head.weight", lambda x: np.concatenate([x, x])),
    ["'lm_head.weight'", "[20, 6] in m0", "tokenizer"],
  ),
  "integers for floats": (
    lambda: tensor("m0", NORM, lambda x: x.astype(np.int32)),
    [repr(NORM), "int32 in m0", "float32"],
  ),
  "another number of layers": (
    lambda: folders.write(pathlib.Path("m0"), folders.tensors(5, layers=2)),
    ["'model.layers.2.mlp.up_proj.weight'", "not in m0"],
  ),
  "NaN": (
    lambda: tensor("m0", NORM, lambda x: np.where(np.arange(6) == 3, np.nan, x)),
    [repr(NORM), "model m0", "NaN"],
  ),
  "an unknown key": (lambda: recipe("base_model", "base_modle"), ["recipe.yml:3:1", "base_model"]),
  "an unknown parameter": (lambda: recipe("weight", "wieght"), ["recipe.yml:6:", "'weight'"]),
  "a misspelt method": (
    lambda: recipe("task_arithmetic", "task-arithmetic"),
    ["recipe.yml:2:15", "'task_arithmetic'"],
  ),
  "a misspelt dtype": (
    lambda: recipe("base_model: base", "base_model: base\ndtype: bfloat"),
    ["recipe.yml:4:8", "bfloat16"],
  ),
  "a density out of range": (
    lambda: recipe("task_arithmetic", "ties\nparameters: {density: 1.5}"),
    ["recipe.yml:3:", "density must be in (0, 1], got 1.5"],
  ),
  "weights that add up to zero": (
    lambda: pathlib.Path("recipe.yml").write_text(
      RECIPE.replace("0.5", "0.0") + "parameters: {normalize: true}\n"
    ),
    ["recipe.yml:", "divides by the sum of the weights, which is zero"],
  ),
  "a filter that matches nothing": (
    lambda: recipe("{weight: 0.5}", "{weight: [{filter: mpl, value: 1}, {value: 0.5}]}"),
    ["recipe.yml:6:", "did you mean 'mlp'"],
  ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_it_is_named_and_nothing_is_left(family, capsys, name):
  damage, words = DAMAGE[name]
  damage()
  assert main.main(["merge", "recipe.yml", "out"]) == 1
  err = capsys.readouterr().err
  for word in words:
    assert word in err
  assert "Traceback" not in err
  assert not pathlib.Path("out").exists()
  if name != "NaN":  # That is found while weights are read; what was merged so far is kept.
    assert not pathlib.Path(".out.merging").exists()
    assert main.main(["merge", "recipe.yml", "out", "--dry-run"]) == 1


def test_stale_files_do_not_stay_beside_new_ones(family, capsys):
  stale = pathlib.Path("out/model-00001-of-00009.safetensors")
  stale.parent.mkdir()
  stale.write_text("stale")
  assert main.main(["merge", "recipe.yml", "out"]) == 1
  assert "out exists" in capsys.readouterr().err
  assert main.main(["merge", "recipe.yml", "out", "--replace"]) == 0
  assert not stale.exists()


@pytest.mark.parametrize("out", ["m1", "link"])
def test_models_are_not_replaced_by_what_is_made_of_them(family, capsys, out):
  pathlib.Path("link").symlink_to("m1")
  recipe("m1", "link")
  for more in (["--dry-run"], []):
    assert main.main(["merge", "recipe.yml", out, "--replace", *more]) == 1
    assert "which is merged, lies there and would be removed" in capsys.readouterr().err
  assert folders.read(pathlib.Path("m1")).keys() == family[2].keys()
  assert not list(pathlib.Path().glob(".*"))
  with pytest.raises(ValueError, match="m0: m0, which is merged, lies there"):
    merge.merge_files(methods.average(), ["m0", "m1"], "m0", replace=True)


def test_paths_with_plus_and_at_are_paths(family):
  pathlib.Path("m0").rename("m0+more@home")
  recipe("m0", "m0+more@home")
  assert main.main(["merge", "recipe.yml", "out"]) == 0


def test_a_full_disk_is_an_error_and_nothing_is_lost(family, capsys, monkeypatch):
  def full(handle, start, length):
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patched:
    patched.setattr(os, "posix_fallocate", full)
    assert main.main(["merge", "recipe.yml", "out"]) == 1
  err = capsys.readouterr().err
  assert "No space left on device for its" in err
  assert "free some room, and the same command goes on" in err
  assert ".out.merging/model.safetensors" in err
  assert main.main(["merge", "recipe.yml", "out"]) == 0


def told(capsys, *flags):
  """What is wrong with a merge, in a dry run and in earnest."""
  lines = []
  for more in (["--dry-run"], []):
    assert main.main(["merge", "recipe.yml", "out", *more, *flags]) == 1
    lines.append(capsys.readouterr().err)
  assert lines[0] == lines[1]
  return lines[0]


def test_of_all_models_and_the_place_of_the_result_it_is_told_at_once(family, capsys):
  truncated()
  recipe("m0", "m7")
  pathlib.Path("out").mkdir()
  err = told(capsys)
  assert err.startswith("error: out exists; pass --replace to")
  assert "\nrecipe.yml:5:12: m7: no such folder" in err
  assert "\nrecipe.yml:7:12: m1/model-00002-of-00002.safetensors: " in err
  assert len(err.splitlines()) == 3
  assert list(pathlib.Path("out").iterdir()) == []


def test_of_what_is_misspelt_and_of_models_it_is_told_at_once(family, capsys):
  truncated()
  recipe("weight: 0.5", "wieght: 0.5")
  pathlib.Path("recipe.yml").write_text(
    pathlib.Path("recipe.yml").read_text().replace("model: m0", "model: m0+")
  )
  err = told(capsys)
  assert "recipe.yml:5:12: model has an empty part" in err
  assert err.count("unknown key 'wieght'") == 2
  assert "recipe.yml:7:12: m1/model-00002-of-00002.safetensors: " in err
  assert "m0: " not in err


def test_of_all_recipes_of_a_file_it_is_told_at_once(family, capsys):
  """Also of a model that is merged with what cannot be made."""
  text = RECIPE.replace("base_model: base", "base_model: ./base").replace("m1", "./m1")
  first, second = text.replace("m0", "./m8"), text.replace("m0", "./m9").replace("./m1", "first")
  pathlib.Path("recipe.yml").write_text(f"{first}name: first\n---\n{second}")
  err = told(capsys)
  assert "m8: no such folder" in err
  assert "m9: no such folder" in err


def test_of_tokenizers_filters_parameters_and_shapes_it_is_told_at_once(family, capsys):
  tensor("m0", NORM, lambda x: x[:-1])
  tensor("m1", "lm_head.weight", lambda x: np.concatenate([x, x]))
  first, second = (
    "{weight: [{filter: mpl, value: 1}, {value: 0.5}]}",
    "{weight: [{filter: mlp, value: 1}]}",
  )
  text = RECIPE.replace("{weight: 0.5}", first, 1).replace("{weight: 0.5}", second)
  pathlib.Path("recipe.yml").write_text(text + "tokenizer_source: union\n")
  err = told(capsys)
  for words in [
    "base/tokenizer.json: vocab of model must map",
    "m0/tokenizer.json: vocab of model must map",
    "m1/tokenizer.json: vocab of model must map",
    "did you mean 'mlp'?",
    f"needs weight, but nothing gives it for tensor {NORM!r}",
    f"tensor {NORM!r} is [5] in m0",
  ]:
    assert words in err
  assert "[20, 6]" not in err  # Embeddings would have been brought together.


def test_of_filters_and_shapes_it_is_told_where_a_model_cannot_be_opened(family, capsys):
  """As far as the others tell; not of what only that model may have."""
  tensor("m1", NORM, lambda x: x[:-1])
  folders.write(pathlib.Path("base"), {n: x for n, x in family[0].items() if n != LAYER})
  first = "{weight: [{filter: mpl, value: 1}, {value: 0.5}]}"
  text = RECIPE.replace("{weight: 0.5}", first, 1).replace(
    "{weight: 0.5}", "{weight: [{filter: mlp, value: 1}]}"
  )
  pathlib.Path("recipe.yml").write_text(text.replace("m0", "m7"))
  err = told(capsys)
  for words in [
    "m7: no such folder",
    "did you mean 'mlp'?",
    f"needs weight, but nothing gives it for tensor {NORM!r}",
    f"tensor {NORM!r} is [5] in m1",
    f"tensor {LAYER!r} is in m1 but not in base",
  ]:
    assert words in err
  pathlib.Path("recipe.yml").write_text(text.replace("m0", "m7") + "missing: skip\n")
  assert "did you mean 'mlp'?" not in told(capsys)
  config = json.dumps(folders.CONFIG | {"tie_word_embeddings": True})
  for own in ("base", "m1"):
    pathlib.Path(own, "config.json").write_text(config)
  text = RECIPE.replace("{weight: 0.5}", "{weight: [{filter: lm_head, value: 1}, {value: 0.5}]}")
  pathlib.Path("recipe.yml").write_text(text.replace("m0", "m7"))
  assert "lm_head" not in told(capsys)


def test_a_merge_of_other_inputs_that_is_not_complete_is_told_of(family, capsys):
  journal = pathlib.Path(".out.merging/journal.jsonl")
  journal.parent.mkdir()
  journal.write_text('{"plan": "another"}\n')
  assert "error: .out.merging has an interrupted merge of other inputs or settings" in told(capsys)
  assert main.main(["merge", "recipe.yml", "out", "--dry-run", "--resume=never"]) == 0
  assert journal.exists()


STAGES = (
  recipes.MEAN
  + """\
merge_method: passthrough
models: [{model: mean}]
"""
)


def test_a_merge_of_results_that_is_not_complete_goes_on_or_is_told_of(family, capsys, monkeypatch):
  """As long as those are there it goes on with itself; they are not made again."""
  pathlib.Path("recipe.yml").write_text(STAGES)
  command, real = ["merge", "recipe.yml", "out"], finish.complete

  def interrupted(part, *rest):
    if part.name == ".out.merging":
      raise KeyboardInterrupt
    real(part, *rest)

  with monkeypatch.context() as patched:
    patched.setattr(finish, "complete", interrupted)
    assert main.main(command) == 130
  capsys.readouterr()
  stage = pathlib.Path(".out.mean.stage")
  assert main.main([*command, "--dry-run"]) == 0
  stage.rename("aside")
  assert "error: .out.merging has an interrupted merge of other inputs" in told(capsys)
  pathlib.Path("aside").rename(stage)
  written = []
  monkeypatch.setattr(
    shard_writer.ShardWriter, "add", counted(shard_writer.ShardWriter.add, written)
  )
  assert main.main(command) == 0
  assert written == []
  mean = (family[1][NORM] + family[2][NORM]) / 2
  np.testing.assert_allclose(folders.read(pathlib.Path("out"))[NORM], mean, atol=1e-6)
  # Neither the place nor the time of what is made on the way is in the provenance.
  assert main.main(["merge", "recipe.yml", "again"]) == 0
  assert folder.provenance("out") == folder.provenance("again")


def test_what_is_wrong_with_the_evaluation_is_told_with_the_rest(family, capsys):
  recipe("m0", "m7")
  err = told(capsys, "--evaluate", "no-such-program {out}")
  assert "m7: no such folder" in err
  assert "there is no program 'no-such-program'" in err


def test_a_disk_without_room_is_told_of_before_the_merge(family, capsys, monkeypatch):
  """What an interrupted merge has there already is not needed again."""
  assert main.main(["merge", "recipe.yml", "out", "--dry-run"]) == 0
  assert "\ndisk: " in capsys.readouterr().out
  size = sum(x.nbytes for x in family[0].values())
  usage = shutil.disk_usage(".")._replace(free=size - 1)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  assert main.main(["merge", "recipe.yml", "out", "--dry-run"]) == 1
  plan = capsys.readouterr()
  assert plan.out.startswith("result: 13 tensors, ")  # It is shown all the same.
  assert "are free on the disk" in plan.err
  err = told(capsys)
  assert f"{size:,} bytes are to be written, but {size - 1:,} are free on the disk" in err
  with pytest.raises(OSError, match="are free on the disk"):
    merge.merge_files(methods.average(), ["m0", "m1"], "out")
  assert {p.name for p in pathlib.Path().iterdir()} == {"base", "m0", "m1", "recipe.yml"}
  pathlib.Path("begun").mkdir()
  pathlib.Path("begun/part").write_bytes(bytes(size))
  shard_writer.check_room(pathlib.Path("out"), size, begun=[pathlib.Path("begun")])


def stopped_at(patched, call, file, number):
  """Lets a call of the system say, the n-th time that it is for a file, that the quota is full."""
  real, left = getattr(os, call), [number]

  def full(handle, *given):
    left[0] -= pathlib.Path(os.readlink(f"/proc/self/fd/{handle}")).name == file
    if not left[0]:
      raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    return real(handle, *given)

  patched.setattr(os, call, full)


@pytest.mark.parametrize(
  ("call", "file", "number"),
  [
    ("pwrite", "model-00003-of-00004.safetensors", 3),
    ("fsync", "model-00002-of-00005.safetensors", 2),
    ("fsync", "journal.jsonl", 4),
    ("fsync", "README.md", 1),
  ],
)
def test_a_disk_that_fills_later_is_named_and_nothing_is_lost(
  family, capsys, monkeypatch, call, file, number
):
  monkeypatch.setattr(shard_writer, "SYNCED", 1)
  if call == "fsync":
    pathlib.Path("recipe.yml").write_text(SLICES)  # Nothing is compiled.
  command = ["merge", "recipe.yml", "out", "--shard-size", "500B"]
  assert main.main([*command[:2], "whole", *command[3:]]) == 0
  with monkeypatch.context() as patched:
    stopped_at(patched, call, file, number)
    assert main.main(command) == 1
  err = capsys.readouterr().err
  assert "Disk quota exceeded; what was finished is kept" in err
  assert f".out.merging/{file}:" in err
  assert not pathlib.Path("out").exists()
  written = []
  monkeypatch.setattr(
    shard_writer.ShardWriter, "add", counted(shard_writer.ShardWriter.add, written)
  )
  assert main.main(command) == 0
  assert len(set(written)) < 13 - 2  # Those that were finished are not made again.
  for path in pathlib.Path("whole").iterdir():
    assert path.read_bytes() == pathlib.Path("out", path.name).read_bytes(), path


def counted(add, names):
  def noted(self, name, *rest):
    names.append(name)
    add(self, name, *rest)

  return noted


@pytest.mark.parametrize("file", ["README.md", "model.safetensors.index.json"])
def test_a_small_file_that_has_no_room_is_named(family, capsys, file):
  """Written to a device that is always full."""
  pathlib.Path("recipe.yml").write_text(SLICES)
  part = pathlib.Path(".out.merging")
  part.mkdir()
  (part / file).symlink_to("/dev/full")
  command = ["merge", "recipe.yml", "out", "--shard-size", "500B"]
  assert main.main(command) == 1
  err = capsys.readouterr().err
  assert "No space left on device; what was finished is kept" in err
  assert f".out.merging/{file}:" in err
  (part / file).unlink()
  assert main.main(command) == 0


HEAD = "lm_head.weight"
LAYER = "model.layers.0.input_layernorm.weight"
SLICES = """
merge_method: passthrough
slices:
- sources: [{model: m0, layer_range: [0, 2]}]
- sources: [{model: m1, layer_range: [0, 1]}]
"""
COPIED = {
  "excluded": (RECIPE + "exclude: [norm]\n", "base", NORM, NORM, np.nan),
  "in no other model": (RECIPE + "missing: base\n", "base", HEAD, HEAD, -np.inf),
  "a layer on top": (SLICES, "m1", LAYER, LAYER.replace("0", "2"), np.nan),
}


@pytest.mark.parametrize("name", COPIED)
def test_what_is_copied_is_looked_at_as_well(family, capsys, name):
  text, folder, source, made, value = COPIED[name]
  pathlib.Path("recipe.yml").write_text(text)
  if name == "in no other model":
    folders.write(pathlib.Path("m0"), {n: x for n, x in family[1].items() if n != HEAD})
  tensor(folder, source, lambda x: np.where(np.arange(x.size).reshape(x.shape) == 3, value, x))
  assert main.main(["merge", "recipe.yml", "out"]) == 1
  err = capsys.readouterr().err
  assert f"{folder}/model.safetensors: tensor {source!r}, which is copied, has NaN or" in err
  assert "--allow-nonfinite" in err
  assert not pathlib.Path("out").exists()
  assert main.main(["merge", "recipe.yml", "out", "--allow-nonfinite"]) == 0
  found = folders.read(pathlib.Path("out"))[made].reshape(-1)
  np.testing.assert_array_equal(found[3], np.float32(value))
  assert np.isfinite(np.delete(found, 3)).all()


def test_what_is_copied_to_a_dtype_that_cannot_hold_it_is_refused(family, capsys):
  pathlib.Path("recipe.yml").write_text(SLICES + "out_dtype: float16\n")
  tensor("m0", LAYER, lambda x: x * np.float32(1e6))
  assert main.main(["merge", "recipe.yml", "out"]) == 1
  err = capsys.readouterr().err
  assert f"m0/model.safetensors: tensor {LAYER!r}: float16 cannot hold its values" in err


def test_headers_are_read_as_they_are(family):
  """The control: an untouched family is merged."""
  assert main.main(["merge", "recipe.yml", "out"]) == 0
  assert safetensors.load("out/model.safetensors").keys() == family[0].keys()
