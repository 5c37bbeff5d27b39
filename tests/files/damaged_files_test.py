"""Files of our own that were tampered with end in one line that names the file."""

import json
import pathlib

import folders
import pytest

from jaxmerge import methods
from jaxmerge.cli import main
from jaxmerge.files import merge as files_merge
from jaxmerge.io.checkpoints import manifest, metadata
from jaxmerge.io.huggingface import shard_writer

DAMAGE = {
  "nested": b"[" * 100_000,
  "nested objects": b'{"a":' * 100_000,
  "no text": b'{"plan": "\xff"}',
  "another type": b"[1]",
  "a key twice": b'{"plan": 1, "plan": 2}',
  "a number": b'{"plan": 1e999}',
  "empty object": b"{}",
  "cut": b'{"plan": ',
}


@pytest.fixture
def place(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folders.family(tmp_path, count=2)
  text = "merge_method: linear\nmodels: [{model: m0}, {model: m1}]\nparameters: {weight: 0.5}\n"
  pathlib.Path("r.yml").write_text(text)
  return tmp_path


def one_line(capsys, arguments, name):
  assert main.main(arguments) == 1
  err = capsys.readouterr().err
  assert err.count("\n") == 1, err
  assert name in err


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_journal_is_named(place, capsys, damage):
  part = shard_writer.unfinished_folder(pathlib.Path("out"))
  part.mkdir()
  (part / "journal.jsonl").write_bytes(DAMAGE[damage] + b"\n")
  for flags in ([], ["--dry-run"]):
    one_line(capsys, ["merge", "r.yml", "out", *flags], "out.merging")
  assert main.main(["merge", "r.yml", "out", "--resume=never"]) == 0


def test_lines_of_a_journal_have_their_types(place, capsys, monkeypatch):
  def stop(count):
    raise KeyboardInterrupt

  monkeypatch.setattr(shard_writer, "SYNCED", 1)
  merge = (methods.average(), ["m0", "m1"], "out")
  with pytest.raises(KeyboardInterrupt):
    files_merge.merge_files(*merge, progress=stop)
  path = pathlib.Path(".out.merging/journal.jsonl")
  first, second, *_ = path.read_text().splitlines()
  for line in (
    '{"tensor": 1}',
    '{"tensor": "w", "xxh3_128": "0"}',
    '{"job": "1"}',
    '{"stamps": []}',
  ):
    path.write_text("\n".join([first, second, line, ""]))
    with pytest.raises(ValueError, match=r"journal\.jsonl: line 3: .*--resume=never"):
      files_merge.merge_files(*merge)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_manifest_is_named(place, capsys, damage):
  assert main.main(["merge", "r.yml", "out", "--out-format=orbax"]) == 0
  pathlib.Path("out/manifest.json").write_bytes(DAMAGE[damage])
  capsys.readouterr()
  one_line(capsys, ["inspect", "out"], "manifest.json")


@pytest.mark.parametrize("leaves", [None, [], {"params/w": 1}, {"params/w": ["x", [2]]}])
def test_a_manifest_that_was_sealed_again_is_named(place, leaves):
  folder = pathlib.Path("sealed")
  (folder / "state").mkdir(parents=True)
  manifest.seal(folder, {"leaves": leaves})
  with pytest.raises(ValueError, match=r"manifest\.json: leaves must map"):
    metadata.tensors(folder)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_report_is_named(tmp_path, capsys, damage):
  path = tmp_path / "report.json"
  path.write_bytes(DAMAGE[damage])
  one_line(capsys, ["report", str(tmp_path)], "report.json")


@pytest.mark.parametrize("damage", ["nested", "another type", "empty object"])
def test_a_damaged_provenance_is_named(place, capsys, damage):
  assert main.main(["merge", "r.yml", "out"]) == 0
  path = pathlib.Path("out/jaxmerge_provenance.json")
  path.write_bytes(DAMAGE[damage])
  capsys.readouterr()
  one_line(capsys, ["inspect", "out", "--check"], "jaxmerge_provenance.json")
  path.write_text(json.dumps({"tensors": {"w": 1}}))
  one_line(capsys, ["inspect", "out", "--check"], "jaxmerge_provenance.json")


def test_what_appears_beside_a_model_meanwhile_is_not_taken_over(place):
  """Added tokens would be of another vocabulary than the one that was looked at."""

  def add(count):
    pathlib.Path("m0/added_tokens.json").write_text('{"zzz": 91}')

  files_merge.merge_files(methods.average(), ["m0", "m1"], "out", progress=add)
  assert not pathlib.Path("out/added_tokens.json").exists()
  assert pathlib.Path("out/tokenizer.json").exists()
  files_merge.merge_files(methods.average(), ["m0", "m1"], "again")
  assert pathlib.Path("again/added_tokens.json").exists()
