"""What is in a folder of weights: from headers, by checksums, against the provenance."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import xxhash

from jaxmerge import methods
from jaxmerge.cli import main
from jaxmerge.files import inspection, merge
from jaxmerge.io.huggingface import folder
from jaxmerge.io.peft import adapter
from jaxmerge.io.tensors import safetensors
from jaxmerge.report import inspection_text

TENSORS = {
  "layers.10.w": np.arange(6, dtype=np.float32).reshape(2, 3),
  "layers.2.w": np.ones((4, 2), ml_dtypes.bfloat16),
  "layers.2.b": np.zeros((), np.float32),
  "ids": np.arange(3),
}


def model(path, tensors=TENSORS, config=None, metadata=None):
  path.mkdir()
  (path / folder.CONFIG).write_text(json.dumps(config or {}))
  safetensors.save(path / folder.WEIGHTS, tensors, metadata or {"format": "pt"})
  return path


def merged(path, tensors=TENSORS, **changes):
  """A model with the provenance of its tensors, some of them changed in it."""
  model(path, tensors)
  digests = {n: xxhash.xxh3_128(x.tobytes()).hexdigest() for n, x in tensors.items()} | changes
  known = {n: {"xxh3_128": d} for n, d in digests.items() if d}
  facts = {"jaxmerge": "1.2.3", "method": {"name": "ties"}, "tensors": known}
  facts["inputs"] = {"base": {"layers.2.w": "base of the merge", "ids": "copied"}, "chat": {}}
  (path / folder.PROVENANCE).write_text(json.dumps(facts))
  return path


# --- Records ---


def test_headers_say_what_there_is(tmp_path):
  record = inspection.inspect(model(tmp_path / "m"))
  names = ["ids", "layers.2.b", "layers.2.w", "layers.10.w"]
  assert [t["name"] for t in record["tensors"]] == names
  assert record["tensors"][2] == {
    "name": "layers.2.w",
    "dtype": "bfloat16",
    "shape": [4, 2],
    "bytes": 16,
    "file": "model.safetensors",
  }
  assert record["dtypes"] == {
    "int64": {"tensors": 1, "entries": 3, "bytes": 24},
    "float32": {"tensors": 2, "entries": 7, "bytes": 28},
    "bfloat16": {"tensors": 1, "entries": 8, "bytes": 16},
  }
  assert (record["parameters"], record["kind"]) == (15, "model")
  assert not {"adapter", "provenance", "equal", "check"} & record.keys()


def test_files_are_counted(tmp_path):
  path = model(tmp_path / "m")
  (path / folder.WEIGHTS).unlink()
  shards = {"model-1.safetensors": ["layers.2.w"], "model-2.safetensors": ["ids", "layers.2.b"]}
  for file, names in shards.items():
    safetensors.save(path / file, {n: TENSORS[n] for n in names})
  (path / folder.INDEX).write_text(folder.index(shards, dict.fromkeys(TENSORS, 0)))
  record = inspection.inspect(path)
  assert record["files"] == [{"name": f, "bytes": (path / f).stat().st_size} for f in shards]
  assert {t["name"]: t["file"] for t in record["tensors"]}["ids"] == "model-2.safetensors"


@pytest.mark.parametrize(
  ("config", "tied"),
  [
    ({"tie_word_embeddings": True}, True),
    ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
    ({"text_config": {"tie_word_embeddings": True}}, True),
    ({"text_config": None}, None),
  ],
)
def test_ties_that_the_config_declares(tmp_path, config, tied):
  assert inspection.inspect(model(tmp_path / "m", config=config))["tied"] is tied


def test_a_config_is_not_needed(tmp_path):
  path = model(tmp_path / "m")
  (path / folder.CONFIG).unlink()
  assert inspection.inspect(path)["tied"] is None


def test_tensors_that_share_the_bytes_of_another(tmp_path):
  metadata = {"format": "pt", "head": "layers.2.w", "layers.2.b": "layers.2.w", "lost": "nowhere"}
  record = inspection.inspect(model(tmp_path / "m", metadata=metadata))
  assert record["shared"] == {"head": "layers.2.w"}


def test_checksums_are_of_the_bytes_and_find_ties(tmp_path, monkeypatch):
  monkeypatch.setattr(inspection, "PART", 8)
  same = np.arange(8, dtype=np.float32)
  # Equal bytes of another shape or dtype are no tie, neither are tensors without bytes.
  more = {"a": same, "b": same.copy(), "c": same.reshape(2, 4), "d": same.view(np.int32)}
  none = {"e": np.zeros(0, np.float32), "f": np.zeros(0, np.float32)}
  tensors, counts = {**TENSORS, **more, **none}, []
  record = inspection.inspect(model(tmp_path / "m", tensors))
  found = inspection.add_checksums(record, counts.append)
  for tensor in found["tensors"]:
    expected = xxhash.xxh3_128(tensors[tensor["name"]].tobytes()).hexdigest()
    assert tensor["xxh3_128"] == expected
  assert found["equal"] == [["a", "b"]]
  assert sum(counts) == sum(t["bytes"] for t in found["tensors"])
  assert max(counts) == 8
  assert "equal" not in record, "the record that is given stays as it is"


def test_a_merged_model_is_as_recorded(tmp_path):
  record = inspection.inspect(merged(tmp_path / "m"))
  assert record["provenance"]["method"] == {"name": "ties"}
  assert "tensors" not in record["provenance"]
  check = inspection.compare_checksums(record)["check"]
  assert check == {"same": 4, "changed": [], "missing": [], "added": []}


def test_what_is_not_as_recorded_is_named(tmp_path):
  path = merged(tmp_path / "m", **{"layers.2.b": "0" * 32, "gone": "0" * 32, "ids": None})
  check = inspection.compare_checksums(inspection.inspect(path))["check"]
  assert check == {"same": 2, "changed": ["layers.2.b"], "missing": ["gone"], "added": ["ids"]}


def test_what_the_driver_writes_is_as_recorded(tmp_path):
  paths = [model(tmp_path / name) for name in ("base", "one", "two")]
  out = merge.merge_files(methods.average(), paths[1:], tmp_path / "out", base=paths[0])
  record = inspection.compare_checksums(inspection.inspect(out))
  assert record["check"] == {"same": 4, "changed": [], "missing": [], "added": []}
  assert set(record["provenance"]["inputs"]) == {"the base", str(paths[1]), str(paths[2])}
  assert "input the base: 3 base of average, job 1, 1 copied from the base" in inspection_text.text(
    record
  )


@pytest.mark.parametrize("tensors", [None, [], {"w": None}, {"w": {"sha": "0"}}])
def test_a_damaged_provenance_is_named(tmp_path, tensors):
  path = merged(tmp_path / "m")
  (path / folder.PROVENANCE).write_text(json.dumps({"tensors": tensors}))
  with pytest.raises(ValueError, match=r"jaxmerge_provenance\.json: tensors must map names"):
    inspection.inspect(path)


def test_a_model_without_provenance_cannot_be_checked(tmp_path):
  record = inspection.inspect(model(tmp_path / "m"))
  with pytest.raises(FileNotFoundError, match=r"jaxmerge_provenance\.json: no such file; only"):
    inspection.compare_checksums(record)


def lora(path):
  path.mkdir()
  config = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "org/base", "bias": "none"}
  (path / adapter.CONFIG).write_text(json.dumps(config))
  parts = {"base_model.model.q.lora_A.weight": np.ones((2, 7), np.float32)}
  safetensors.save(path / adapter.WEIGHTS, parts)
  return path


def test_adapters(tmp_path):
  record = inspection.add_checksums(inspection.inspect(lora(tmp_path / "a")))
  assert (record["kind"], record["parameters"]) == ("adapter", 14)
  assert record["adapter"]["r"] == 2
  assert len(record["tensors"][0]["xxh3_128"]) == 32
  (tmp_path / "a" / adapter.WEIGHTS).unlink()
  with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
    inspection.inspect(tmp_path / "a")


def test_a_missing_folder_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="none: no such folder"):
    inspection.inspect(tmp_path / "none")


# --- The command ---


def lines(capsys, *arguments, status=0):
  assert main.main(["inspect", *map(str, arguments)]) == status
  out, err = capsys.readouterr()
  assert "Traceback" not in err
  return [" ".join(line.split()) for line in out.splitlines()], err


def test_the_command_shows_tensors_totals_and_facts(capsys, tmp_path):
  config = {"tie_word_embeddings": True}
  metadata = {"head": "layers.2.w"}
  found, err = lines(capsys, model(tmp_path / "m", config=config, metadata=metadata))
  assert "layers.2.w bfloat16 4×2 16" in found
  assert "layers.2.b float32 scalar 4" in found
  assert "float32 2 7 28" in found
  assert "parameters 15" in found
  assert "tied tie_word_embeddings is true in config.json" in found
  assert "shared head is not stored: it has the bytes of layers.2.w" in found
  assert err == ""


def test_the_command_shows_checksums_and_what_is_equal(capsys, tmp_path):
  path = model(tmp_path / "m", {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)})
  found, _ = lines(capsys, path, "--checksums")
  digest = xxhash.xxh3_128(np.ones(3, np.float32).tobytes()).hexdigest()
  assert f"a float32 3 12 {digest}" in found
  assert "equal a, b" in found


def test_the_command_shows_where_a_merged_model_is_from(capsys, tmp_path):
  found, err = lines(capsys, merged(tmp_path / "m"), "--check")
  assert "provenance jaxmerge: 1.2.3" in found
  assert 'provenance method: {"name": "ties"}' in found
  assert "provenance input base: 1 base of the merge, 1 copied" in found
  assert "provenance input chat: no tensors" in found
  assert "check 4 tensors as recorded" in found
  assert err == ""


def test_the_command_fails_where_tensors_are_not_as_recorded(capsys, tmp_path):
  path = merged(tmp_path / "m", **{"layers.2.b": "0" * 32, "ids": None})
  found, err = lines(capsys, path, "--check", status=1)
  assert "check 2 tensors as recorded, 1 changed, 1 added" in found
  assert "2 tensors are not as recorded, 'layers.2.b' the first" in err


def test_the_command_shows_adapters(capsys, tmp_path):
  found, _ = lines(capsys, lora(tmp_path / "a"))
  assert "adapter peft_type LORA, r 2, base_model_name_or_path org/base" in found


def test_json_is_the_record(capsys, tmp_path):
  path = model(tmp_path / "m")
  assert main.main(["inspect", str(path), "--json"]) == 0
  assert json.loads(capsys.readouterr().out) == inspection.inspect(path)


def test_errors_are_one_line(capsys, tmp_path):
  _, err = lines(capsys, tmp_path / "none", status=1)
  assert err == f"error: {tmp_path / 'none'}: no such folder.\n"


def test_no_jax_is_imported(tmp_path):
  path = merged(tmp_path / "m")
  code = (
    "import sys; from jaxmerge.cli import main; main.main(sys.argv[1:]); "
    "print({'jax', 'matplotlib', 'rich'} & set(sys.modules), file=sys.stderr)"
  )
  command = [sys.executable, "-c", code, "inspect", str(path), "--check"]
  run = subprocess.run(command, capture_output=True, text=True, check=True)
  assert run.stderr == "set()\n"
