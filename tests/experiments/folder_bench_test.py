"""Methods on folders of models: what is searched, recorded, kept, resumed and refused."""

import json
import os
import pathlib
import subprocess
import sys

import folders
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxmerge import merge_files, methods
from jaxmerge.cli import bench_command, main
from jaxmerge.experiments import folder_bench, folder_config
from jaxmerge.io.tensors import safetensors
from jaxmerge.search import box

SCORE = """
import json, os, pathlib, sys
import numpy as np
from safetensors.numpy import load_file

home = pathlib.Path(__file__).parent
calls = home / "calls"
with calls.open("a") as file:
  file.write("called\\n")
if os.environ.get("KILL") == str(len(calls.read_text().splitlines())):
  os.kill(os.getppid(), 9)
model = load_file(pathlib.Path(sys.argv[1]) / "model.safetensors")
scores = {}
for name in ("chat", "code"):
  theirs = load_file(home / name / "model.safetensors")
  floats = [n for n in theirs if theirs[n].dtype == np.float32]
  scores[name] = 1 / (1 + sum(float(((model[n] - theirs[n]) ** 2).sum()) for n in floats))
print(json.dumps(scores | {"rows": 3}))
"""


@pytest.fixture
def home(tmp_path):
  base = folders.tensors(0, layers=1)
  folders.write(tmp_path / "base", base)
  for seed, name in enumerate(("chat", "code")):
    folders.write(tmp_path / name, folders.tensors(seed + 1, layers=1, near=base))
  (tmp_path / "score.py").write_text(SCORE)
  return tmp_path


def bench(home, methods=("average", "ties"), **changes):
  settings = {"trials": 3, "numbers": ("chat", "code")} | changes
  command = f"{sys.executable} {home / 'score.py'} {{out}}"
  models = tuple(str(home / n) for n in ("chat", "code"))
  return folder_config.Bench(str(home / "base"), models, command, methods, **settings)


def in_process(monkeypatch, home, calls, fail=lambda out: False):
  """Evaluates in this process, which is faster; records the folders that are evaluated."""

  def evaluate(out):
    calls.append(out.name)
    if fail(out):
      raise KeyboardInterrupt
    model = folders_of(out)
    return {n: 1 / (1 + far(model, folders_of(home / n))) for n in ("chat", "code")} | {"rows": 3}

  monkeypatch.setattr(folder_bench.external, "command", lambda text: evaluate)


def folders_of(folder):
  return safetensors.load(folder / "model.safetensors")


def far(a, b):
  return sum(float(((a[n] - b[n]) ** 2).sum()) for n in a if a[n].dtype == np.float32)


def test_methods_are_ranked_by_their_best_trial(home, monkeypatch):
  calls = []
  in_process(monkeypatch, home, calls)
  record = folder_bench.run(bench(home), home / "run")
  assert record["tasks"] == ["chat", "code"]
  assert {*record["models"]} == {
    "base", "experts", "experts_chat", "experts_code", "average", "ties",
  }  # fmt: skip
  assert record["models"]["experts"]["per_task"] == {"chat": 1.0, "code": 1.0}
  assert record["models"]["experts_chat"]["per_task"]["chat"] == 1.0
  trials = json.loads((home / "run/trials/ties.json").read_text())["trials"]
  assert trials[0]["settings"] == {"density": 0.2, "scale": 1.0}
  best = max(trials, key=lambda t: t["numbers"]["chat"] + t["numbers"]["code"])
  assert record["methods"]["ties"]["settings"] == best["settings"]
  assert record["budget"]["ties"]["trials"] == len(trials) == 3
  assert calls[:3] == ["base", "chat", "code"]
  left = [p.name for p in (home / "run/merges").iterdir()]
  means = {n: record["models"][n]["mean"] for n in ("average", "ties")}
  assert [n.split("-")[0] for n in left] == [max(means, key=means.get)]
  for name in ("leaderboard.md", "leaderboard.json", "leaderboard.png", "report.html"):
    assert (home / "run" / name).is_file()
  (merged,) = (home / "run/merges").iterdir()
  assert json.loads((merged / "jaxmerge_evaluation.json").read_text())["rows"] == 3
  assert not list(home.glob("*/jaxmerge_evaluation.json"))  # Folders of others are left alone.
  page = (home / "run/report.html").read_text()
  assert "Merges of chat, code" in page
  assert f"density {best['settings']['density']:.4g}" in page
  again = folder_bench.run(bench(home), home / "run")
  assert again == record
  assert len(calls) == 3 + 1 + 3


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_an_interrupted_run_goes_on_with_what_it_has(home, monkeypatch, stop):
  whole, calls, later = [], [], []
  in_process(monkeypatch, home, whole)
  expected = folder_bench.run(bench(home), home / "whole")
  in_process(monkeypatch, home, calls, lambda out: len(calls) == stop)
  with pytest.raises(KeyboardInterrupt):
    folder_bench.run(bench(home), home / "run")
  before = {p: p.read_text() for p in (home / "run").glob("trials/*.json")}
  in_process(monkeypatch, home, later)
  record = folder_bench.run(bench(home), home / "run")
  assert [*calls[:-1], *later] == whole
  for key in ("models", "gap_closed", "validation", "tasks"):
    assert record.get(key) == expected.get(key)
  assert {n: m["settings"] for n, m in record["methods"].items()} == {
    n: m["settings"] for n, m in expected["methods"].items()
  }
  for path, text in before.items():  # What was recorded, times too, stays.
    after = json.loads(path.read_text())["trials"]
    for old, new in zip(json.loads(text)["trials"], after, strict=False):
      assert old.items() <= new.items()


def test_more_trials_use_those_that_are_there(home, monkeypatch):
  calls = []
  in_process(monkeypatch, home, calls)
  folder_bench.run(bench(home, trials=1), home / "run")
  folder_bench.run(bench(home, ("average", "ties", "median"), trials=2), home / "run")
  assert [c.split("-")[0] for c in calls[3:]] == ["average", "ties", "ties", "median"]


def test_final_rows_are_scored_once_a_method(home, monkeypatch):
  calls = []
  in_process(monkeypatch, home, calls)
  record = folder_bench.run(bench(home, final="python test.py {out}", keep="none"), home / "run")
  assert len(calls) == 2 * 3 + (1 + 1) + (3 + 1)
  assert record["split"] == "test"
  assert record["validation"].keys() == record["models"].keys() - {"experts"}
  assert not list((home / "run/merges").iterdir())


def test_all_merges_stay_where_that_is_wanted(home, monkeypatch):
  in_process(monkeypatch, home, [])
  folder_bench.run(bench(home, keep="all"), home / "run")
  names = {p.name for p in (home / "run/merges").iterdir()}
  assert names == {"average-1", "ties-1", "ties-2", "ties-3"}


def test_a_method_that_fails_says_why_and_the_others_go_on(home, monkeypatch):
  in_process(monkeypatch, home, [])
  merge = folder_bench.folder_trials.merge.merge_files

  def broken(method, *arguments, **options):
    if method.name == "ties":
      raise ValueError("no room for thresholds.")
    return merge(method, *arguments, **options)

  monkeypatch.setattr(folder_bench.folder_trials.merge, "merge_files", broken)
  events = []
  record = folder_bench.run(bench(home), home / "run", progress=events.append)
  assert record["failed"] == {"ties": "the merge failed: no room for thresholds."}
  assert "ties" not in record["models"]
  assert "average" in record["models"]
  assert "ties failed: the merge failed" in (home / "run/leaderboard.md").read_text()
  assert any("no room" in str(e.get("message")) for e in events)
  with pytest.raises(ValueError, match="no method could be merged and scored; ties: the merge"):
    folder_bench.run(bench(home, ("ties",)), home / "run")
  monkeypatch.setattr(folder_bench.folder_trials.merge, "merge_files", merge)
  assert "ties" in folder_bench.run(bench(home), home / "run")["models"]


def test_less_is_better_of_a_loss(home, monkeypatch):
  in_process(monkeypatch, home, [])
  record = folder_bench.run(bench(home, ("ties",), lower_is_better=True), home / "run")
  trials = json.loads((home / "run/trials/ties.json").read_text())["trials"]
  means = [(t["numbers"]["chat"] + t["numbers"]["code"]) / 2 for t in trials]
  assert record["models"]["ties"]["mean"] == pytest.approx(min(means))


def test_changed_models_and_other_runs_are_refused(home, monkeypatch):
  in_process(monkeypatch, home, [])
  folder_bench.run(bench(home, ("average",)), home / "run")
  with pytest.raises(ValueError, match="another config: seed is 0 there and 1 here"):
    folder_bench.run(bench(home, ("average",), seed=1), home / "run")
  folders.write(home / "chat", folders.tensors(7, layers=1))
  with pytest.raises(ValueError, match="chat has changed since"):
    folder_bench.run(bench(home, ("average",)), home / "run")


def test_an_evaluation_that_lacks_a_number_fails_its_method(home, monkeypatch):
  calls = []
  in_process(monkeypatch, home, calls)
  evaluate = folder_bench.external.command("")

  def forgetful(out):
    numbers = evaluate(out)
    return {"chat": numbers["chat"]} if out.name.startswith("ties") else numbers

  monkeypatch.setattr(folder_bench.external, "command", lambda text: forgetful)
  record = folder_bench.run(bench(home, numbers=()), home / "run")
  assert record["tasks"] == ["chat", "code", "rows"]
  assert "has no number 'code', it has chat" in record["failed"]["ties"]


def test_a_checkpoint_is_evaluated_as_a_merge_would_write_it(home, monkeypatch):
  """Without a trace of the copy."""
  calls = []
  in_process(monkeypatch, home, calls)
  merge_files(methods.average(), [home / "chat"], home / "orbax" / "chat", out_format="orbax")
  models = (str(home / "orbax" / "chat"), str(home / "code"))
  record = folder_bench.run(bench(home, ("average",))._replace(models=models), home / "run")
  assert record["models"]["experts_chat"]["per_task"]["chat"] == 1.0
  assert calls[:3] == ["base", "experts_chat", "code"]
  assert [p.name for p in (home / "run/alone").iterdir() if p.is_dir()] == []


def test_steps_of_a_run_are_compared_and_changes_of_them_are_refused(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with ocp.CheckpointManager(tmp_path / "run") as manager:
    for step in (1, 2, 3):
      tree = {"w": np.full((2, 2), step, np.float32)}
      manager.save(step, args=ocp.args.PyTreeSave(tree))

  def evaluate(out):
    return {"w": float(folders_of(out)["w"].sum())}

  monkeypatch.setattr(folder_bench.external, "command", lambda text: evaluate)
  config = folder_config.Bench("run@1", ("run@2", "run@3"), "x {out}", ("average",), trials=1)
  record = folder_bench.run(config, tmp_path / "bench")
  assert record["models"]["base"]["mean"] == 4.0
  assert record["models"]["experts_run@3"]["mean"] == 12.0
  assert record["models"]["average"]["mean"] == 10.0
  next(p for p in (tmp_path / "run/3/default").rglob("*") if p.is_file()).touch()
  with pytest.raises(ValueError, match="run@3 has changed since"):
    folder_bench.run(config, tmp_path / "bench")
  with pytest.raises(ValueError, match="run@7"):
    folder_bench.run(config._replace(models=("run@7",)), tmp_path / "other")


def test_a_folder_without_scores_is_taken_over(home, monkeypatch):
  (home / "broken.py").write_text("raise SystemExit(3)")
  config = bench(home, ("average",))
  with pytest.raises(ValueError, match="ended with status 3"):
    folder_bench.run(
      config._replace(evaluate=f"{sys.executable} {home}/broken.py {{out}}"), home / "run"
    )
  in_process(monkeypatch, home, [])
  assert folder_bench.run(config, home / "run")["models"]["average"]["per_task"]
  with pytest.raises(ValueError, match="another config: evaluate is"):
    folder_bench.run(config._replace(evaluate="other {out}"), home / "run")


def test_numbers_of_unlike_scale_are_not_averaged(home, monkeypatch):
  calls = []

  def evaluate(out):
    calls.append(out.name)
    return {"accuracy": 0.5, "samples": 1000}

  monkeypatch.setattr(folder_bench.external, "command", lambda text: evaluate)
  config = bench(home, ("average",), numbers=())
  with pytest.raises(
    ValueError, match="mean is no score: choose numbers by --score, such as --score acc"
  ):
    folder_bench.run(config, home / "run")
  assert len(calls) == 3
  record = folder_bench.run(config._replace(numbers=("accuracy",)), home / "run")
  assert record["models"]["average"]["mean"] == 0.5
  assert calls[3:] == ["average-1"]


def test_a_broken_command_ends_the_run_at_once(home):
  (home / "score.py").write_text("raise SystemExit(3)")
  with pytest.raises(ValueError, match=r"base could not be evaluated: .* ended with status 3"):
    folder_bench.run(bench(home), home / "run")


@pytest.mark.slow
def test_a_killed_run_goes_on(home):
  """The command kills its parent at its sixth call, in the middle of a trial."""
  arguments = ["--base", "base", "--models", "chat", "code", "--methods", "average,ties"]
  arguments += ["--trials", "3", "--score", "chat,code", "--workdir", "run"]
  command = [sys.executable, "-m", "jaxmerge", "bench", *arguments]
  command += ["--evaluate", f"{sys.executable} score.py {{out}}"]
  root = str(pathlib.Path(__file__).resolve().parents[2])
  environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
  killed = subprocess.run(command, cwd=home, env=environment | {"KILL": "5"}, check=False)
  assert killed.returncode == -9
  before = json.loads((home / "run/trials/ties.json").read_text())["trials"]
  subprocess.run(command, cwd=home, env=environment, check=True)
  after = json.loads((home / "run/trials/ties.json").read_text())["trials"]
  assert len(after) == 3
  for old, new in zip(before, after, strict=False):
    assert old.items() <= new.items()
  report = (home / "run/report.json").read_bytes()
  subprocess.run(command, cwd=home, env=environment, check=True)
  assert (home / "run/report.json").read_bytes() == report


@pytest.mark.parametrize("words", [["ties,dare"], ["ties", "dare"]])
def test_methods_are_separated_by_commas_or_spaces(words, monkeypatch):
  benches = []
  monkeypatch.setattr(bench_command, "_run_folders", lambda options, bench: benches.append(bench))
  flags = ["--base", "b", "--models", "x", "y", "--evaluate", "python score.py {out}"]
  assert main.main(["bench", *flags, "--methods", *words]) == 0
  assert benches[0].methods == ("ties", "dare")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "bench needs --base, or --config=FILE"),
    (["--base", "base"], "bench needs --models"),
    (["--config=x.py", "--base", "base"], "--base is for models of your own"),
    (["--config=x.py"], "bench --config needs --workdir"),
  ],
)
def test_flags_of_one_form_or_the_other(arguments, message, capsys):
  assert main.main(["bench", *arguments]) == 2
  assert message in capsys.readouterr().err


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"methods": "tie"}, "no method is called 'tie'; did you mean 'ties'"),
    ({"methods": "slerp"}, "slerp does not merge the task vectors of any number of models"),
    ({"methods": "krum"}, "krum needs 5 models, got 2"),
    ({"trials": "0"}, "trials must be 1 or more, got 0"),
    ({"try": "ties.density=1.5"}, "ties: density must be in (0, 1], got 1.5"),
    ({"try": "tsv.scale=1..2"}, "search space of 'tsv': it is not among the methods"),
    ({"try": "ties.scale=2..1"}, "the range must rise; write 1..2"),
    ({"evaluate": "python score.py"}, "must have {out} in place of the folder's path"),
  ],
)
def test_what_cannot_be_run_is_refused_before_jax(changes, message, capsys):
  flags = {"base": "base", "evaluate": "python score.py {out}", "methods": "ties"} | changes
  words = [w for n, value in flags.items() for w in (f"--{n}", value)]
  assert main.main(["bench", "--models", "chat", "code", *words]) == 2
  told = capsys.readouterr().err
  assert message in told
  assert told.count("\n") == 1


def test_all_methods_are_those_that_merge_two_task_vectors(home):
  names = folder_config.check(bench(home, ("all",), trials=1)).methods
  assert {"ties", "tsv", "average", "model_stock"} <= {*names}
  assert not {"slerp", "krum", "analogy"} & {*names}


def test_ranges_are_parsed():
  from jaxmerge.cli.bench_command import parse_box

  parsed = parse_box(["ties.density=0.2", "ties.rule=kth,exact", "tsv.scale=1..2"])
  assert parsed == {
    "ties": {"density": box.Axis(values=(0.2,)), "rule": box.Axis(values=("kth", "exact"))},
    "tsv": {"scale": box.Axis(1.0, 2.0)},
  }
