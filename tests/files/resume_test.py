"""Merges that were interrupted go on, and give the bytes of one that was not."""

import json

import folders
import numpy as np
import pytest
import recipes
import small

from jaxmerge import methods
from jaxmerge.files import estimate, execute
from jaxmerge.files import merge as files_merge
from jaxmerge.io.disk import atomic
from jaxmerge.io.huggingface import shard_writer
from jaxmerge.io.tensors.tensor import Files


def paths(root, count=3):
  return [root / f"m{k}" for k in range(count)]


def stopped(number):
  """A progress that interrupts the merge when it is told something for so many times."""
  told = []

  def progress(count):
    told.append(count)
    if len(told) == number:
      raise KeyboardInterrupt

  return progress


def test_an_interrupted_merge_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch):
  folders.family(tmp_path)
  monkeypatch.setattr(shard_writer, "SYNCED", 1)  # Every tensor is written down as done.
  merge = (methods.average(), paths(tmp_path))
  told = []
  whole = files_merge.merge_files(*merge, tmp_path / "whole", shard_size=500, progress=told.append)
  stop = stopped(6)
  with pytest.raises(KeyboardInterrupt):
    files_merge.merge_files(*merge, tmp_path / "out", shard_size=500, progress=stop)
  part = tmp_path / ".out.merging"
  assert part.exists()
  assert not (tmp_path / "out").exists()
  journal = map(json.loads, (part / shard_writer.NAME).read_text().splitlines())
  finished = {line["tensor"] for line in journal if "tensor" in line}
  assert 5 <= len(finished) < 13
  again, added = [], set()
  add = shard_writer.ShardWriter.add

  def noted(self, name, *rest):
    added.add(name)
    add(self, name, *rest)

  monkeypatch.setattr(shard_writer.ShardWriter, "add", noted)
  files_merge.merge_files(*merge, tmp_path / "out", shard_size=500, progress=again.append)
  # What was done is told at once, and the rest tensor by tensor: none of them again.
  tensors = folders.read(whole)
  assert added == tensors.keys() - finished
  assert again[0] == sum(tensors[n].nbytes for n in finished)
  assert sorted(again[1:]) == sorted(tensors[n].nbytes for n in added)
  assert sum(again) == sum(told)
  for path in sorted(whole.iterdir()):
    assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
  assert not part.exists()


RECIPES = {
  "measured twice": "merge_method: ties\nparameters: {weight: 1.0, density: 0.5}",
  "measured once": "compat: mergekit\nmerge_method: ties\nparameters: {weight: 1.0, density: 0.5}",
  "not measured": "merge_method: task_arithmetic\nparameters: {weight: 1.0}",
}


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("interrupted", [False, True], ids=["in one go", "interrupted"])
def test_progress_is_told_of_all_the_work(tmp_path, monkeypatch, text, interrupted):
  monkeypatch.setattr(shard_writer, "SYNCED", 1)
  folders.family(tmp_path)
  recipe = tmp_path / "recipe.yml"
  models = "".join(f"- model: {p}\n" for p in paths(tmp_path))
  recipe.write_text(f"{text}\nbase_model: {tmp_path / 'base'}\nmodels:\n{models}")
  plan = recipes.plan_of_file(str(recipe), Files())
  counts = []

  def told(count):
    counts.append(count)
    if interrupted and len(counts) > 20:
      raise KeyboardInterrupt

  if interrupted:
    with pytest.raises(KeyboardInterrupt):
      execute.run(plan, tmp_path / "out", progress=told, entries=16)
    counts, interrupted = [], False
  execute.run(plan, tmp_path / "out", progress=told, entries=16)
  assert sum(counts) == estimate.work(plan)
  # The first is what was done before.
  assert max(counts[1:]) < sum(counts) / 2


def test_what_was_damaged_meanwhile_is_made_again(tmp_path, monkeypatch):
  folders.family(tmp_path)
  monkeypatch.setattr(shard_writer, "SYNCED", 1)
  merge = (methods.average(), paths(tmp_path))
  whole = files_merge.merge_files(*merge, tmp_path / "whole")
  with pytest.raises(KeyboardInterrupt):
    files_merge.merge_files(
      *merge,
      tmp_path / "out",
      progress=lambda n: (_ for _ in ()).throw(KeyboardInterrupt) if n else None,
    )
  part = tmp_path / ".out.merging" / "model.safetensors"
  content = bytearray(part.read_bytes())
  content[-40:] = bytes(40)
  part.write_bytes(content)
  files_merge.merge_files(*merge, tmp_path / "out")
  name = "model.safetensors"
  assert (whole / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_torn_line_of_the_journal_is_dropped(tmp_path, monkeypatch):
  """And what is written after it stands in lines of its own."""
  folders.family(tmp_path)
  monkeypatch.setattr(shard_writer, "SYNCED", 1)
  merge = (methods.average(), paths(tmp_path))
  whole = files_merge.merge_files(*merge, tmp_path / "whole")
  for number in (4, 3, 3):
    with pytest.raises(KeyboardInterrupt):
      files_merge.merge_files(*merge, tmp_path / "out", progress=stopped(number))
    with open(tmp_path / ".out.merging" / shard_writer.NAME, "a") as journal:
      journal.write('{"tensor": "lm_he')
  again = []
  out = files_merge.merge_files(*merge, tmp_path / "out", progress=again.append)
  assert len(again) == 1 + 13 - (3 + 2 + 2)
  small.same(folders.read(out), folders.read(whole))


@pytest.mark.parametrize("moment", ["in its midst", "before its renaming"])
def test_what_passed_with_nan_does_not_count_where_that_is_refused(tmp_path, monkeypatch, moment):
  """A merge that let NaN pass and was interrupted, gone on with by one that does not."""
  name = "model.embed_tokens.weight"  # One of the first.
  base, first, *_ = folders.family(tmp_path)
  folders.write(tmp_path / "m0", {**first, name: np.full_like(first[name], np.nan)})
  monkeypatch.setattr(shard_writer, "SYNCED", 1)
  merge = (methods.average(), paths(tmp_path), tmp_path / "out")

  def killed(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(atomic, "move", killed)
    with pytest.raises(KeyboardInterrupt):
      files_merge.merge_files(
        *merge, nonfinite=True, progress=stopped(6 if moment == "in its midst" else 99)
      )
  with pytest.raises(ValueError, match=rf"leaf '{name}' of model .*m0 has NaN"):
    files_merge.merge_files(*merge)
  assert not (tmp_path / "out").exists()
  # What let NaN pass goes on with either, and says so of what it did.
  out = files_merge.merge_files(*merge, nonfinite=True)
  told = json.loads((out / execute.PROVENANCE).read_text())["tensors"]
  assert told[name]["nonfinite"] == "allowed"
  assert np.isnan(folders.read(out)[name]).all()
  assert base.keys() == told.keys()


def test_a_complete_folder_that_was_damaged_before_its_renaming(tmp_path, monkeypatch):
  """Killed right before that, and a byte changed since: the checksums tell."""
  folders.family(tmp_path)
  merge = (methods.average(), paths(tmp_path))
  whole = files_merge.merge_files(*merge, tmp_path / "whole")

  def killed(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(atomic, "move", killed)
    with pytest.raises(KeyboardInterrupt):
      files_merge.merge_files(*merge, tmp_path / "out")
  part = tmp_path / ".out.merging"
  assert not list(part.glob("journal*"))
  with pytest.raises(ValueError, match=r"out\.merging has an interrupted merge of other inputs"):
    files_merge.merge_files(methods.average(), paths(tmp_path, 2), tmp_path / "out")
  content = bytearray((part / "model.safetensors").read_bytes())
  content[-3] ^= 1
  (part / "model.safetensors").write_bytes(content)
  out = files_merge.merge_files(*merge, tmp_path / "out")
  small.same(folders.read(out), folders.read(whole))


def test_another_merge_is_not_gone_on_with(tmp_path):
  folders.family(tmp_path)

  def stop(count):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    files_merge.merge_files(methods.average(), paths(tmp_path), tmp_path / "out", progress=stop)
  for method, models in [
    (methods.average(), paths(tmp_path, 2)),
    (methods.weighted_sum(), paths(tmp_path)),
  ]:
    with pytest.raises(ValueError, match=r"out\.merging has an interrupted merge of other inputs"):
      files_merge.merge_files(method, models, tmp_path / "out")
  files_merge.merge_files(methods.average(), paths(tmp_path, 2), tmp_path / "out", resume=False)
