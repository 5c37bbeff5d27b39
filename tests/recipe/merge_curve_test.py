"""Merges along a run: the curve of their scores, interrupted and gone on with."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import folders
import numpy as np
import pytest

from jaxmerge.cli import main
from jaxmerge.io.tensors import safetensors
from jaxmerge.recipe import merge_curve

STEPS = range(100, 1100, 100)
NAME = "model.norm.weight"
# Prints the norm of a tensor; the first time that a file is there, it removes that and ends the
# program that has called it, by a signal that cannot be caught.
SCORE = """
import os, pathlib, signal, sys, struct, json
data = (pathlib.Path(sys.argv[1]) / "model.safetensors").read_bytes()
size = int.from_bytes(data[:8], "little")
begin, end = json.loads(data[8:8 + size])["model.norm.weight"]["data_offsets"]
values = struct.unpack(f"<{(end - begin) // 4}f", data[8 + size:][begin:end])
trap = pathlib.Path("trap")
if trap.exists() and len(list(pathlib.Path("calls").iterdir())) == 1:
  trap.unlink()
  os.kill(os.getppid(), signal.SIGKILL)
  sys.exit(1)
pathlib.Path("calls", str(len(list(pathlib.Path("calls").iterdir())))).touch()
print("loading")
print(json.dumps({"loss": sum(x * x for x in values), "first": values[0]}))
"""
COMMAND = f"{sys.executable} score.py {{out}}"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "score.py").write_text(SCORE)
  (tmp_path / "calls").mkdir()
  add(STEPS)


def add(steps):
  for step in steps:
    folders.write(pathlib.Path("run", f"checkpoint-{step}"), weights(step))


def weights(step):
  tensors = folders.tensors(step, layers=1)
  return {n: x for n, x in tensors.items() if n in (NAME, "position_ids")}


CALLS = []


def score(folder):
  CALLS.append(folder)
  if pathlib.Path("trap").exists():
    raise ValueError("no data")
  x = safetensors.load(folder / "model.safetensors")[NAME].astype(np.float64)
  return {"loss": float(x @ x)}


def curve(out="out", **options):
  options = {"window": 4, "every": 2, "evaluate": score, "lower_is_better": True, **options}
  return merge_curve.merge_run("run", out, **options)


def kept(out="out"):
  return sorted(int(p.name) for p in pathlib.Path(out, "merges").iterdir() if p.name.isdecimal())


def test_windows_weights_and_scores():
  record = curve(keep="all", alone=True)
  assert [p["step"] for p in record["points"]] == [400, 600, 800, 1000] == kept()
  for point in record["points"]:
    last = point["step"]
    assert point["steps"] == list(range(last - 300, last + 1, 100))
    expected = np.diff(np.sqrt(range(5))) / 2
    np.testing.assert_allclose(point["weights"], expected)
    of = np.array([weights(step)[NAME] for step in point["steps"]], np.float64)
    assert point["scores"]["loss"] == pytest.approx(((expected @ of) ** 2).sum(), rel=1e-5)
    assert point["alone"]["loss"] == pytest.approx((of[-1] ** 2).sum(), rel=1e-5)
  assert not pathlib.Path("out", "alone").exists()


def test_the_best_merge_stays():
  record = curve()
  losses = {p["step"]: p["scores"]["loss"] for p in record["points"]}
  assert kept() == [min(losses, key=losses.get)]
  highest = curve("other", lower_is_better=False)
  assert kept("other") == [max(losses, key=losses.get)]
  assert highest["points"] == record["points"]


def test_the_command_writes_table_plot_and_record(capsys):
  flags = ["--window=4", "--every=3", "--metric=loss", "--lower-is-better", "--alone"]
  flags += ["--kind=ema", "--alpha=0.5", "--steps=200:"]
  assert main.main(["merge-run", "run", "out", "--evaluate", COMMAND, *flags]) == 0
  record = json.loads(pathlib.Path("out", "merge_run.json").read_text())
  assert [p["steps"][0] for p in record["points"]] == [200, 500, 700]
  assert record["points"][0]["weights"] == [0.125, 0.125, 0.25, 0.5]
  assert pathlib.Path("out", "merge_run.png").read_bytes().startswith(b"\x89PNG")
  page = pathlib.Path("out", "merge_run.md").read_text()
  assert "| Step | Checkpoints | Merged: loss | Checkpoint alone: loss |" in page
  captured = capsys.readouterr()
  assert "best: step" in captured.out
  assert "(lower is better)" in captured.out
  assert "step 500: 4 checkpoints merged, loss" in captured.err


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
  def interrupted(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(merge_curve, "merge_run", interrupted)
  assert main.main(["merge-run", "run", "out", "--evaluate", COMMAND]) == 130
  assert "this goes on from the last scored merge:\n  jaxmerge merge-run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_gives_the_same_record():
  """Killed in the second evaluation: nothing is merged or scored twice but that."""
  flags = ["--window=4", "--every=2", "--metric=loss", "--lower-is-better"]
  program = "import sys; from jaxmerge.cli import main; sys.exit(main.main(sys.argv[1:]))"
  call = [sys.executable, "-c", program, "merge-run", "run"]
  pathlib.Path("trap").touch()
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  killed = subprocess.run([*call, "out", "--evaluate", COMMAND, *flags], env=env, check=False)
  assert killed.returncode == -signal.SIGKILL
  assert len(json.loads(pathlib.Path("out", "merge_run.json").read_text())["points"]) == 1
  assert main.main(["merge-run", "run", "out", "--evaluate", COMMAND, *flags]) == 0
  assert len(os.listdir("calls")) == 4
  assert main.main(["merge-run", "run", "whole", "--evaluate", COMMAND, *flags]) == 0
  for name in ("merge_run.json", "merge_run.md", "merge_run.png"):
    assert pathlib.Path("out", name).read_bytes() == pathlib.Path("whole", name).read_bytes()
  assert kept("out") == kept("whole")


def test_a_run_that_goes_on_is_gone_on_with():
  """Also where the trainer has deleted what is old."""
  first = curve(keep="none")
  for step in (100, 200, 300):
    for path in pathlib.Path("run", f"checkpoint-{step}").iterdir():
      path.unlink()
    pathlib.Path("run", f"checkpoint-{step}").rmdir()
  add(range(1100, 1400, 100))
  CALLS.clear()
  second = curve(keep="none")
  assert kept() == []
  assert second["points"][:4] == first["points"]
  assert [p["steps"][-1] for p in second["points"][4:]] == [1200, 1300]
  assert [path.name for path in CALLS] == ["1200", "1300"]


def test_the_newest_checkpoint_is_merged_and_does_not_move_later_merges():
  first = curve(every=4, keep="none")
  assert [p["step"] for p in first["points"]] == [400, 800, 1000]
  assert [p.get("extra", False) for p in first["points"]] == [False, False, True]
  add((1100, 1200, 1300))
  second = curve(every=4, keep="none")
  assert [p["step"] for p in second["points"]] == [400, 800, 1000, 1200, 1300]
  assert second["points"][:3] == first["points"]
  assert curve(every=4, keep="none") == second


def test_several_numbers_need_a_metric_and_are_not_computed_again():
  both = {"evaluate": lambda out: {"loss": 1.0, "accuracy": 0.5}}
  with pytest.raises(ValueError, match="several numbers: choose the metric among loss, accuracy"):
    curve(**both)
  record = curve(metric="accuracy", evaluate=both["evaluate"])
  assert record["metric"] == "accuracy"


@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({"window": 11}, "a window of 11 checkpoints is more than the 10 of the run"),
    ({"window": 0}, "window must be"),
    ({"every": True}, "every must be"),
    ({"keep": "some"}, "keep must be one of"),
    ({"evaluate": "python score.py"}, "must have {out}"),
    ({"parameters": {"kind": "middle"}}, "kind must be one of .*, got 'middle'"),
    ({"parameters": {"decay": "linear"}}, "decay has no effect with kind 'sma'"),
    ({"steps": "last 20"}, "cannot select the last 20 checkpoints"),
  ],
)
def test_what_is_wrong_is_said_before_anything_is_written(options, text):
  with pytest.raises(ValueError, match=text):
    curve(**options)
  assert not list(pathlib.Path().glob("out/*"))


def test_another_folder_for_other_settings():
  curve(window=8)
  with pytest.raises(ValueError, match="out: its merges have window 8, not 4: use the former, or"):
    curve()
  with pytest.raises(FileExistsError, match=r"run: not empty, and has no merge_run.json"):
    curve("run")


def test_an_evaluation_that_fails_is_tried_again_without_merging():
  pathlib.Path("trap").touch()
  with pytest.raises(ValueError, match=r"the merge is complete, in out/merges/400, but .* no data"):
    curve()
  before = pathlib.Path("out/merges/400/model.safetensors").stat().st_mtime_ns
  pathlib.Path("trap").unlink()
  assert len(curve(keep="all")["points"]) == 4
  assert before == pathlib.Path("out/merges/400/model.safetensors").stat().st_mtime_ns


@pytest.mark.slow
def test_what_other_settings_have_begun_is_not_taken_over():
  pathlib.Path("trap").touch()
  with pytest.raises(ValueError, match="no data"):
    curve(parameters={"kind": "sma"})
  pathlib.Path("trap").unlink()
  assert curve()["points"] == curve("other")["points"]
