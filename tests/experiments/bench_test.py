"""The leaderboard of methods: what is tried, what is kept, what is refused."""

import json
import pathlib
import shutil

import pytest

from jaxmerge.cli import main
from jaxmerge.experiments import bench, bench_config
from jaxmerge.report import leaderboard
from jaxmerge.search import grid

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """
from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.run = {run!r}
  c.experts = {experts!r}
  c.seeds = {seeds}
  c.final = {final}
  c.changes = dict(
    epochs=1.0,
    rounds=1,
    data=dict(train=64, validation=40, test=40),
    pretrain=dict(steps=30),
  )
  c.methods = dict({methods})
  return c.lock()
"""
METHODS = """
  average=dict(),
  task_arithmetic=dict(scale=(0.25,)),
  ties=dict(density=0.2, rule=("kth", "exact"), scale=(0.5, 1.0)),
  flattened=dict(name="iso_c", scale=0.5),
  median=dict(),
"""


def written(folder, methods=METHODS, seeds=2, final=True, experts=""):
  path = folder / "methods.py"
  run = str(ROOT / "configs" / "images4.py")
  path.write_text(
    CONFIG.format(run=run, seeds=seeds, final=final, methods=methods, experts=experts)
  )
  return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A leaderboard of little data: its config, folder, and what was told."""
  folder = tmp_path_factory.mktemp("bench")
  path = written(folder)
  facts = bench.run(bench_config.load(path), path, folder / "run")
  return path, folder / "run", facts


@pytest.mark.slow
def test_every_method_is_there_with_its_trials(made):
  _, folder, facts = made
  own = json.loads((folder / "leaderboard.json").read_text())
  assert own == json.loads(json.dumps(facts))
  trials = {n: [r["trials"] for r in runs] for n, runs in own["methods"].items()}
  expected = {"average": 1, "task_arithmetic": 1, "ties": 4, "flattened": 1, "median": 1}
  assert trials == {n: [t] * 2 for n, t in expected.items()}
  chosen = own["methods"]["ties"][0]["settings"]
  assert chosen["rule"] in ("kth", "exact")
  assert chosen["scale"] in (0.5, 1.0)


@pytest.mark.slow
def test_a_mean_is_a_quarter_of_the_sum(made):
  """Two rows of the same merge have the same scores."""
  both = (made[2]["methods"][n] for n in ("average", "task_arithmetic"))
  for mean, quarter in zip(*both, strict=True):
    assert mean["per_task"] == pytest.approx(quarter["per_task"], abs=0.03)
    assert mean["validation"] == pytest.approx(quarter["validation"], abs=0.02)


@pytest.mark.slow
def test_costs_are_those_of_a_merge(made):
  runs = made[2]["methods"]["ties"]
  assert runs[0]["seconds"] > 0
  assert runs[0]["bytes"] > 0
  assert "seconds" not in runs[1]


@pytest.mark.slow
def test_the_page_ranks_the_methods(made):
  _, folder, facts = made
  models = facts["summary"]["models"]
  means = [models[n]["mean"]["mean"] for n in leaderboard.rank(facts)]
  assert means == sorted(means, reverse=True)
  page = (folder / "leaderboard.md").read_text()
  order = [line.split(" | ")[0].strip("| ") for line in page.splitlines() if line.startswith("| ")]
  own = [n.replace("_", "\\_") for n in leaderboard.rank(facts)]
  assert order == ["Method", ":--", "Experts", *own, "Base"]
  assert (folder / "leaderboard.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_finished_run_is_not_made_again(made):
  path, folder, _ = made
  files = sorted(folder.glob("seed*/methods/*.json"))
  assert len(files) == 10
  before = [f.stat().st_mtime_ns for f in files]
  files[3].unlink()
  again = bench.run(bench_config.load(path), path, folder)
  after = [f.stat().st_mtime_ns for f in files]
  assert [a == b for a, b in zip(before, after, strict=True)] == [True] * 3 + [False] + [True] * 6
  same = again["summary"]["models"], made[2]["summary"]["models"]
  assert same[0] == same[1]


@pytest.mark.slow
def test_methods_and_seeds_are_added_to_a_run(made, tmp_path):
  """What is new or has other settings is made, the rest is what it was."""
  folder = tmp_path / "run"
  shutil.copytree(made[1], folder)
  marked = folder / "seed0" / "methods" / "ties.json"
  marked.write_text(marked.read_text().replace('"trials": 4', '"trials": 99'))
  changed = METHODS.replace("scale=(0.25,)", "scale=(0.1, 0.25)") + "  sce=dict(),\n"
  path = written(tmp_path, methods=changed, seeds=3)
  events = []
  facts = bench.run(bench_config.load(path), path, folder, progress=events.append)
  trials = {n: [r["trials"] for r in runs] for n, runs in facts["methods"].items()}
  assert trials["ties"] == [99, 4, 4]
  assert trials["task_arithmetic"] == [2, 2, 2]
  assert trials["sce"] == [1, 1, 1]
  told = [e["message"] for e in events if "computed again" in str(e.get("message"))]
  assert [t.split(":")[0] for t in told] == [f"task_arithmetic, seed {i}" for i in (0, 1)]
  other = written(tmp_path, methods=changed, seeds=3, final=False)
  with pytest.raises(ValueError, match="another config: final is True there"):
    bench.run(bench_config.load(other), other, folder)


@pytest.mark.slow
def test_experts_of_a_run_are_taken(made, tmp_path):
  """Those of another seed are refused, and so is a folder without any."""
  _, folder, facts = made
  path = written(tmp_path, "average=dict()", 1, experts=str(folder / "seed{seed}"))
  again = bench.run(bench_config.load(path), path, tmp_path / "run")
  own, theirs = (f["summary"]["models"]["experts"]["mean"]["values"][0] for f in (again, facts))
  assert own == theirs
  assert not (tmp_path / "run" / "seed0" / "checkpoints" / "experts").exists()
  # ATM and joint training of that run stand beside the methods, where they have the same rows.
  report = folder / "seed0" / "report.json"
  scores = dict.fromkeys(
    ("atm", "multitask", "ties"), facts["summary"]["models"]["base"]["per_task"]
  )
  models = {
    n: {"mean": 0.5, "per_task": {t: x["values"][0] for t, x in scores[n].items()}} for n in scores
  }
  for k, split in enumerate(("validation", "test")):
    whole = {"tasks": facts["summary"]["tasks"], "split": split, "models": models}
    report.write_text(json.dumps(whole))
    beside = bench.run(bench_config.load(path), path, tmp_path / f"beside{k}")
    expected = ["atm", "multitask"] if split == facts["summary"]["split"] else []
    assert leaderboard.references(beside) == expected
  report.unlink()
  for experts, message in (("seed1", "seed is 1 there and 0 here"), ("none", "holds no experts")):
    path = written(tmp_path, "average=dict()", 1, experts=str(folder / experts))
    with pytest.raises(ValueError, match=message):
      bench.run(bench_config.load(path), path, tmp_path / experts)


@pytest.mark.parametrize(
  ("methods", "changes", "message"),
  [
    ("tie=dict()", (), r"config.methods.tie: no method is called 'tie'; did you mean 'ties'"),
    ("ties=dict(densty=0.2)", (), r"config.methods.ties: .*no parameter 'densty'"),
    ("ties=dict(density=(0.2, 1.5))", (), r"config.methods.ties: .*density must be in \(0, 1\]"),
    ("slerp=dict()", (), "slerp does not merge the task vectors of any number of models"),
    ("average=dict()", (("seeds", "0"),), "config.seeds must be at least 1, got 0"),
    ("average=dict()", (("seed", "1"),), r"unknown key 'config.seed'; did you mean 'seeds'"),
    ("average=dict()", (("changes", "{'epoch': 1}"),), "has no key 'epoch'; did you mean 'epochs'"),
  ],
)
def test_is_refused(tmp_path, methods, changes, message):
  with pytest.raises(ValueError, match=message):
    bench_config.load(written(tmp_path, methods), changes)


def test_the_command_line_tells_errors_in_one_line(tmp_path, capsys):
  path = written(tmp_path, "tie=dict()")
  assert main.main(["bench", f"--config={path}", f"--workdir={tmp_path / 'run'}"]) == 2
  told = capsys.readouterr().err
  assert told.count("\n") == 1
  assert "did you mean 'ties'" in told


BENCHES = [p for p in sorted((ROOT / "configs").glob("*_methods.py")) if "_atm_" not in p.name]


@pytest.mark.parametrize("path", BENCHES, ids=str)
def test_configs_are_sound_and_try_at_most_twelve(path):
  config = bench_config.load(str(path))
  for name, own in config.methods.items():
    trials = len(list(grid.candidates(name, dict(own))))
    assert trials <= 12, name
