"""What names may hide is shown as escapes, wherever they are shown; paths may be any bytes."""

import json
import os
import pathlib

import folders
import numpy as np
import pytest

from jaxmerge import display, methods
from jaxmerge.cli import main, progress
from jaxmerge.files import merge
from jaxmerge.io.huggingface import folder
from jaxmerge.io.tensors import safetensors
from jaxmerge.report import card, tables

HOSTILE = "w\x1b[2J\u202etxt.\x9b31m\u2028[red]\r"


def test_what_can_be_seen_stays_and_the_rest_is_escaped():
  seen = "né 模型 🤗 \u05e9\u05dc\u05d5\u05dd a\u200db\tc\n"
  assert display.shown(seen) == seen
  shown = display.shown(HOSTILE)
  assert shown == "w\\x1b[2J\\u202etxt.\\x9b31m\\u2028[red]\\r"
  assert display.name("a\nb") == "a\\nb"
  assert display.readable(os.fsdecode(b"m\xff")) == "m\\xff"


def test_names_of_tensors_do_not_reach_the_terminal_as_they_are(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folders.write(pathlib.Path("m0"), {HOSTILE + "\nerror: none": np.ones(2, np.float32)})
  folders.write(pathlib.Path("m1"), {"v": np.ones(2, np.float32)})
  pathlib.Path("r.yml").write_text("merge_method: linear\nmodels: [{model: m0}, {model: m1}]\n")
  assert main.main(["inspect", "m0", "--checksums"]) == 0
  main.main(["diff", "m0", "m0"])
  assert main.main(["merge", "r.yml", "out", "--dry-run"]) == 1
  assert main.main(["merge", "\x1b[31mno.yml", "out"]) == 1
  said = capsys.readouterr()
  for text in (said.out, said.err):
    assert not set(text) & set("\x1b\u202e\x9b\u2028\r")
    assert "\nerror: none" not in text
  assert "w\\x1b[2J\\u202etxt" in said.out


def test_messages_and_cells_are_escaped(capsys):
  progress.log(HOSTILE)
  progress.output(HOSTILE)
  said = capsys.readouterr()
  assert said.out == said.err == display.shown(HOSTILE) + "\n"
  assert tables.escape(HOSTILE).startswith("w\\\\x1b") or "\x1b" not in tables.escape(HOSTILE)
  assert "<script>" not in tables.escape("<script>")
  assert card.display is display


def test_paths_that_are_no_text_are_merged_and_recorded(tmp_path, capsys):
  folders.family(tmp_path, count=2)
  odd = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff"))
  try:
    (tmp_path / "m0").rename(odd)
  except OSError:
    pytest.skip("this disk takes no such names.")
  out = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/out\xe9"))
  merge.merge_files(methods.average(), [odd, tmp_path / "m1"], out)
  facts = folder.provenance(out)
  assert any(name.endswith("m\\xff") for name in facts["folders"])
  assert "m\\\\xff" in (out / "README.md").read_text(encoding="utf-8")
  assert main.main(["inspect", str(out), "--check"]) == 0
  with pytest.raises(ValueError, match="which checkpoints require; rename it"):
    merge.merge_files(methods.average(), [odd], out, replace=True, out_format="orbax")
  assert json.dumps(facts, ensure_ascii=False).encode()
  capsys.readouterr()


def test_what_overflows_its_dtype_is_not_written():
  x = np.array([1.0, 1e6], np.float32)
  with pytest.raises(ValueError, match=r"m: tensor 'w': float16 cannot hold its values"):
    safetensors.narrow(x, np.dtype(np.float16), "m: tensor 'w'")
  assert np.isinf(safetensors.narrow(x * np.inf, np.dtype(np.float16), "w")).all()
