"""Evaluating what was merged: after the merge, never instead of it, and never from a recipe."""

import json
import pathlib
import shlex
import sys

import folders
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import methods
from jaxmerge.cli import main
from jaxmerge.evaluation import external
from jaxmerge.files import merge as files_merge

RECIPE = """
merge_method: linear
models: [{model: m0}, {model: m1}]
parameters: {weight: 1}
"""


@pytest.fixture(autouse=True)
def _family(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folders.family(tmp_path, 2)
  pathlib.Path("recipe.yml").write_text(RECIPE)


def python(code):
  """A command that runs a line of Python with the folder as its argument."""
  return shlex.join([sys.executable, "-c", code, "{out}"])


def merge(command, *flags, out="out"):
  return main.main(["merge", "recipe.yml", out, "--evaluate", command, *flags])


def numbers(out="out"):
  return json.loads(pathlib.Path(out, external.NAME).read_text())


COUNT = """
import json, os, sys
print("reading")
print(json.dumps({"files": len(os.listdir(sys.argv[1])), "half": 0.5}))
"""


def test_the_command_sees_the_complete_result(capsys):
  assert merge(python(COUNT)) == 0
  present = {p.name for p in pathlib.Path("out").iterdir()} - {external.NAME}
  assert {"model.safetensors", "README.md", "jaxmerge_provenance.json"} <= present
  assert numbers() == {"files": len(present), "half": 0.5}
  assert f"merged: out\nevaluated: files {len(present)}, half 0.5\n" in capsys.readouterr().out


def test_no_shell_sees_the_command():
  out = "it's $(touch spoilt); `touch spoilt`"
  code = "import json, sys; print(json.dumps({'arguments': len(sys.argv)}))"
  assert merge(python(code) + " '; touch spoilt'", out=out) == 0
  assert numbers(out) == {"arguments": 3}
  assert not pathlib.Path("spoilt").exists()


@pytest.mark.parametrize(
  ("code", "words"),
  [
    ("raise SystemExit(3)", "ended with status 3"),
    ("print('0.5')", "the last line that it prints must be a JSON object, got '0.5'"),
    ("", "must be a JSON object, got ''"),
    ("print('{}')", "must return numbers by name"),
    ("print('{\"a\": NaN}')", "a must be a finite number, got nan"),
    ('print(\'{"a": "high"}\')', "a must be a finite number, got 'high'"),
    ("print('{\"a\": true}')", "a must be a finite number, got True"),
  ],
)
def test_a_failed_evaluation_leaves_the_merge(capsys, code, words):
  assert merge(python(code)) == 1
  err = capsys.readouterr().err
  assert "error: the merge is complete, in out, but its evaluation failed: " in err
  assert words in err
  assert len(folders.read(pathlib.Path("out"))) == 13
  assert not pathlib.Path("out", external.NAME).exists()


@pytest.mark.parametrize(
  ("command", "words"),
  [
    ("no-such-program {out}", "there is no program 'no-such-program'"),
    ("ls", "must have {out}"),
    ("", "must have {out}"),
    ("ls '{out}", "No closing quotation"),
  ],
)
@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_a_command_that_cannot_run_is_told_before_the_merge(capsys, command, words, flags):
  assert merge(command, *flags) == 1
  assert words in capsys.readouterr().err
  assert not pathlib.Path("out").exists()


def test_a_dry_run_says_what_would_be_run_and_does_not(capsys):
  assert merge("touch {out}", "--dry-run") == 0
  assert capsys.readouterr().out.endswith("then: touch {out}\n")
  assert not pathlib.Path("out").exists()


def test_a_recipe_cannot_run_anything(capsys):
  pathlib.Path("recipe.yml").write_text(RECIPE + "evaluate: touch spoilt {out}\n")
  assert main.main(["merge", "recipe.yml", "out"]) == 0
  assert "'evaluate' is no key of the recipe: it is ignored" in capsys.readouterr().out
  assert not pathlib.Path("spoilt").exists()


def test_a_function_evaluates_as_well():
  def norms(folder):
    assert (folder / "config.json").is_file()
    x = folders.read(folder)["model.norm.weight"]
    return {"norm": np.linalg.norm(x), "largest": jnp.abs(x).max(), "entries": x.size}

  out = files_merge.merge_files(methods.average(), ["m0", "m1"], "out", evaluate=norms)
  x = folders.read(out)["model.norm.weight"]
  expected = {"norm": float(np.linalg.norm(x)), "largest": float(abs(x).max()), "entries": 6}
  assert numbers() == expected


def test_a_function_that_fails_leaves_the_merge():
  def fails(folder):
    raise OSError("no space")

  with pytest.raises(ValueError, match=r"the merge is complete, in out, .* failed: no space"):
    files_merge.merge_files(methods.average(), ["m0", "m1"], "out", evaluate=fails)
  assert len(folders.read(pathlib.Path("out"))) == 13
