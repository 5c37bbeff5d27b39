"""An experiment is a function: a user's runs by the command as those that are built in."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxmerge.experiments import config as configs
from jaxmerge.experiments import problem as problems
from jaxmerge.experiments import registry

MODULE = """
import functools

import numpy as np

import jaxmerge
from jaxmerge.experiments.problem import Problem


def apply(params, inputs, head):
  return inputs @ params["w"]


def split(seed, rows):
  r = np.random.default_rng(seed)
  inputs = r.standard_normal((rows, 3)).astype(np.float32)
  return jaxmerge.Split(inputs, (inputs[:, 0] > 0).astype(np.int32))


def problem(config, cache):
  rows = config["data"]["train"]
  start = np.full((3, 2), 0.5, np.float32)
  params = {"w": cache(start, lambda: start + 1)}
  splits = {"train": rows, "validation": 8, "test": 8}
  tasks = []
  for k, name in enumerate(("left", "right")):
    named = {n: split(10 * k + j, size) for j, (n, size) in enumerate(splits.items())}
    tasks.append(jaxmerge.Task(name, **named, classes=("no", "yes")))
  return Problem(apply, params, tasks, title="Mine")


def none(config):
  return None


def many(config, cache, more):
  return None


def by_name(*, config):
  return None


def keyword(config, *, cache):
  return problem(config, cache)


def defaults(config, rows=100):
  assert rows == 100
  return problem(config, lambda like, make: make())


partial = functools.partial(problem)
"""
CONFIG = """
from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.experiment = "my_tasks:problem"
  c.rounds, c.epochs, c.batch_size, c.learning_rate = 2, 2.0, 4, 0.05
  c.data = dict(train=16)
  c.baselines = dict(multitask=dict(), ties=dict(density=0.5, scales=(0.5, 1.0)))
  return c.lock()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  (tmp_path / "my_tasks.py").write_text(MODULE)
  (tmp_path / "broken.py").write_text("import no_such_package\n")
  (tmp_path / "failing.py").write_text("1 / 0\n")
  (tmp_path / "ending.py").write_text("raise SystemExit(3)\n")
  (tmp_path / "time.py").write_text(MODULE)
  (tmp_path / "bare").mkdir()
  (tmp_path / "config.py").write_text(CONFIG)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", list(sys.path))
  yield tmp_path
  for name in ("my_tasks", "bare", "facade"):
    sys.modules.pop(name, None)


def test_a_module_in_the_working_directory_runs_by_the_command(folder):
  code = "import sys; from jaxmerge.cli import main; sys.exit(main.main())"  # As the script does.
  command = [sys.executable, "-P", "-c", code, "atm", "--config=config.py", "--workdir=run"]
  done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  record = json.loads((folder / "run" / "report.json").read_text())
  assert record["title"] == "Mine"
  assert {"base", "experts", "multitask", "average", "ties", "atm"} <= set(record["models"])
  merged = folder / "run" / "merged"
  assert sorted(p.name for p in merged.iterdir()) == ["README.md", "model.safetensors"]
  stored = json.loads((folder / "run" / "config.json").read_text())
  assert stored["experiment"] == "my_tasks:problem"


def test_shapes_are_those_of_what_the_function_makes(folder):
  shapes = registry.make_shapes({"experiment": "my_tasks:problem", "data": {"train": 16}})
  assert problems.is_abstract(shapes)
  assert shapes.params["w"] == jax.ShapeDtypeStruct((3, 2), np.float32)
  assert [t.train.labels.shape for t in shapes.tasks] == [(16,), (16,)]


@pytest.mark.parametrize("name", ["keyword", "defaults", "partial"])
def test_any_callable_of_a_config_makes_a_problem(folder, name):
  made = registry.make({"experiment": f"my_tasks:{name}", "data": {"train": 16}})
  assert [t.train.labels.shape for t in made.tasks] == [(16,), (16,)]


def test_shapes_are_looked_for_in_the_module_that_the_config_names(folder):
  code = "import my_tasks\nproblem, problem_shapes = my_tasks.none, my_tasks.defaults\n"
  (folder / "facade.py").write_text(code)
  shapes = registry.make_shapes({"experiment": "facade:problem", "data": {"train": 16}})
  assert [t.train.labels.shape for t in shapes.tasks] == [(16,), (16,)]


@pytest.mark.parametrize("name", list(registry.ALIASES))
def test_what_is_built_in_goes_through_the_same_door(name):
  assert registry.find(name) is registry.find(registry.ALIASES[name])


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("images5", "must be one of images4, .*or a function of yours as 'module:function'"),
    ("my tasks:problem", "must be one of images4"),
    ("my_task:problem", "no module 'my_task' in .*PYTHONPATH"),
    (
      "my_tasks:problm",
      r"no function 'problm'; did you mean 'problem'\? Known: apply, .*, problem, split\.$",
    ),
    ("my_tasks:none", "my_tasks:none must return a jaxmerge.*Problem, it returned NoneType"),
    ("my_tasks:many", r"must take \(config\) or \(config, cache\), but it also requires more;"),
    ("my_tasks:by_name", r"my_tasks:by_name must take .*, the config by position"),
    ("my_tasks:Problem", r"my_tasks\.py has no function 'Problem'"),
    ("sys:problem", "sys is a module of Python itself, which hides a sys.py of yours"),
    (
      "time:problem",
      r"time is .* of yours \(rename it\): it has no function 'problem'",
    ),
    (
      "bare:problem",
      "bare is a folder without __init__.py, .*bare: it has no function 'problem'",
    ),
    ("ending:problem", "importing ending exits the program, SystemExit: 3; put"),
    ("broken:problem", "its module broken needs 'no_such_package'"),
    ("failing:problem", "importing failing failed: ZeroDivisionError"),
  ],
)
def test_what_is_wrong_is_an_error_of_one_line(folder, name, words):
  with pytest.raises(ValueError, match=words) as error:
    registry.make({"experiment": name})
  assert "\n" not in str(error.value)


def test_a_config_has_names_in_place_of_transformations(folder):
  text = CONFIG.replace(
    "  return c.lock()", "  import optax\n  c.optimizer = optax.lion(1e-3)\n  return c"
  )
  pathlib.Path("config.py").write_text(text)
  with pytest.raises(
    ValueError, match=r"or a function of yours as 'module:function'; got .*; name the function that"
  ) as error:
    configs.load("config.py")
  assert len(str(error.value)) < 300


def test_a_config_with_no_such_experiment_is_refused_before_jax(folder):
  pathlib.Path("config.py").write_text(CONFIG.replace("my_tasks:problem", "images5"))
  with pytest.raises(ValueError, match=r"config\.experiment must be one of images4"):
    configs.load("config.py")


@pytest.mark.slow
def test_a_sweep_runs_each_seed_and_value_and_is_tracked(folder, monkeypatch, capsys):
  """Then nothing is run again; and two of its runs are compared."""
  from jaxmerge.cli import main
  from jaxmerge.training import trackers

  lines = []

  class Memory:
    where = "memory"

    def write(self, group, step, numbers):
      lines.append((group, step))

    def close(self):
      lines.append("closed")

  monkeypatch.setattr(trackers, "open_tracker", lambda *arguments: Memory())
  arguments = ["atm", "--config=config.py", "--workdir=sweep", "--seeds=0:2"]
  arguments += ["--sweep", "learning_rate=0.05,0.1", "--tracker=tensorboard"]
  assert main.main(arguments) == 0
  assert lines == [("atm", 1), ("atm", 2), ("final", 0), "closed"] * 4
  assert "ATM" in capsys.readouterr().out
  facts = json.loads((folder / "sweep" / "sweep.json").read_text())
  assert [c["values"] for c in facts["combinations"]] == [
    {"learning_rate": "0.05"}, {"learning_rate": "0.1"}
  ]  # fmt: skip
  assert main.main([*arguments[:-1], "--tracker=none"]) == 0
  assert json.loads((folder / "sweep" / "sweep.json").read_text()) == facts
  assert len(lines) == 16
  places = [f"sweep/learning_rate={x}/seed0" for x in ("0.05", "0.1")]
  assert main.main(["report", *places, "--out=both"]) == 0
  record = json.loads((folder / "both" / "report.json").read_text())
  names = {n for n in record["models"] if n.startswith("atm")}
  assert len(names) == 2
  assert record["differences"][0]["low"] <= record["differences"][0]["high"]
