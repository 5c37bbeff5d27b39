"""The command line and the config files: what is accepted, what is refused, what is said."""

import ast
import contextlib
import io
import json
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap
import types
from typing import Literal

import hypothesis
import hypothesis.strategies as st
import pytest

import jaxmerge
from jaxmerge.cli import command, main, model_commands, progress
from jaxmerge.experiments import config as configs
from jaxmerge.parallel import preemption

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHIPPED = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*.py"))
# Others are of the bench, or to compile.
OTHERS = ("_methods.py", "/merge_", "/decoder_")
CONFIGS = [p for p in SHIPPED if "_atm_" in p or not any(word in p for word in OTHERS)]
IMAGES = "configs/images4.py"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
  monkeypatch.chdir(ROOT)
  # What cli asks for must not leak into later tests.
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")


def record():
  scores = {"base": 0.6, "experts": 0.9, "average": 0.7, "atm": 0.8}
  return {
    "tasks": ["a", "b"],
    "seed": 0,
    "models": {k: {"mean": v, "per_task": {"a": v, "b": v}} for k, v in scores.items()},
    "rounds": [{"round": 1, "mean": 0.8, "per_task": {"a": 0.8, "b": 0.8}}],
    "gap_closed": {k: (v - 0.6) / 0.3 for k, v in scores.items()},
    "budget": {},
    "config": {"seed": 0},
    "versions": {"jaxmerge": "0.1.0"},
  }


@pytest.fixture
def runs(monkeypatch):
  """Stands in for the experiment; returns the calls of `run`, which does what `script` says."""
  stub = types.ModuleType("jaxmerge.experiments.run")
  stub.calls, stub.script = [], lambda progress: None

  def run(config, workdir, *, resume, progress, stop):
    stub.calls.append((config, workdir, resume))
    stub.script(progress)
    return record()

  stub.run = run
  monkeypatch.setattr("jaxmerge.experiments.run", stub)
  monkeypatch.setitem(sys.modules, "jaxmerge.experiments.run", stub)
  return stub


def config_file(folder, body):
  path = folder / "mine.py"
  path.write_text(textwrap.dedent(body))
  return str(path)


def refused(capsys, *arguments, status=2):
  assert main.main(arguments) == status
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith("error: ")
  assert err.count("\n") == 1, err
  assert "Traceback" not in err
  return err


def atm(*arguments, config=IMAGES, workdir="runs/never"):
  return ("atm", f"--config={config}", f"--workdir={workdir}", *arguments)


# What comes before jax.


def test_help_and_errors_do_not_import_jax():
  commands = [
    ["--help"],
    ["--version"],
    ["methods"],
    ["atm", "--help"],
    ["atm", f"--config={IMAGES}", "--help"],
    list(atm("--config.round=3")),
    list(atm("--config.rounds=eight")),
    list(atm(config="configs/image4.py")),
    ["report", "nowhere"],
    ["inspect", "--help"],
    ["inspect", "nowhere"],
    ["diff", "--help"],
    ["diff", "nowhere", "neither"],
    ["diff", "nowhere", "neither", "--top=0"],
  ]
  code = """
    import contextlib, io, json, sys
    from jaxmerge.cli import main
    for arguments in json.loads(sys.argv[1]):
      with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
          main.main(arguments)
        except SystemExit:
          pass
      loaded = {"jax", "jaxlib", "flax", "optax", "orbax", "matplotlib"} & set(sys.modules)
      print(arguments, sorted(loaded)) if loaded else None
  """
  run = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code), json.dumps(commands)],
    capture_output=True, text=True, check=False, cwd=ROOT,
  )  # fmt: skip
  assert run.returncode == 0, run.stderr
  assert run.stdout == ""


def test_help_shows_the_keys_of_the_config(capsys):
  with pytest.raises(SystemExit) as e:
    main.main(["atm", f"--config={IMAGES}", "--help"])
  assert e.value.code == 0
  out = capsys.readouterr().out
  assert "--config.outer_learning_rate=" in out
  assert "--resume" in out


def test_methods_lists_the_catalog(capsys):
  assert main.main(["methods"]) == 0
  out = capsys.readouterr().out
  for name, entry in jaxmerge.catalog.METHODS.items():
    assert name in out
    assert entry.paper in out


# Config files.


@pytest.mark.parametrize("path", CONFIGS)
def test_shipped_config_is_sound_locked_and_documented(path):
  config = configs.load(path)
  assert config.is_locked
  assert path.endswith(f"/{config.experiment}.py") or f"{config.experiment}_" in path
  source = (ROOT / path).read_text()
  assert f"jaxmerge atm --config={path} --workdir=runs/{pathlib.Path(path).stem}" in source
  assert "Expected: " in source
  assert "Time: " in source


@pytest.mark.parametrize("path", CONFIGS)
def test_setting_every_key_to_its_own_value_changes_nothing(path):
  config = configs.load(path)
  shown = [(key, str(value)) for key, value in configs.flat(config).items()]
  again = configs.load(path, shown)
  assert again == config
  types_ = {key: type(value) for key, value in configs.flat(config).items()}
  assert {key: type(value) for key, value in configs.flat(again).items()} == types_


@pytest.mark.parametrize(
  ("key", "text", "value"),
  [
    ("rounds", "3", 3),
    ("epochs", "3", 3.0),
    ("learning_rate", "2e-4", 2e-4),
    ("final", "false", False),
    ("final", "True", True),
    ("clip_norm", "0", 0.0),
    ("local_state", "kept", "kept"),
    ("freeze", "embed.*|norm", "embed.*|norm"),
    ("freeze", "", ""),
    ("mesh.devices", "2", 2),
    ("mesh.devices", "none", None),
    ("mesh.task", "-1", -1),
    ("baselines.ties.scales", "(0.5, 1)", (0.5, 1)),
    ("baselines.ties.scales", "[0.5]", (0.5,)),
  ],
)
def test_change_is_typed_by_the_key(key, text, value):
  for change in (f"--config.{key}={text}", f"--config.{key} {shlex.quote(text)}"):
    changes, rest = main.split(shlex.split(shlex.join([change]) if "=" in change else change))
    assert rest == []
    found = configs.flat(configs.load(IMAGES, changes))[key]
    assert found == value
    assert type(found) is type(value)


@hypothesis.given(st.floats(allow_nan=False, allow_infinity=False))
def test_printed_number_is_read_back(x):
  assert configs.parse(repr(x), float, "x") == x


@hypothesis.given(st.integers())
def test_whole_number_serves_as_a_number(x):
  assert configs.parse(str(x), int, "x") == x
  hypothesis.assume(abs(x) < 2**53)
  found = configs.parse(str(x), float, "x")
  assert isinstance(found, float)
  assert found == x


@hypothesis.given(st.text(), st.sampled_from([int, float, bool, tuple, dict, Literal["a", "b"]]))
def test_any_text_is_a_value_of_the_kind_or_a_value_error(text, kind):
  with contextlib.suppress(ValueError):
    value = configs.parse(text, kind, "x")
    assert value in ("a", "b") if kind == Literal["a", "b"] else isinstance(value, kind)


def test_new_method_drops_the_settings_of_the_one_before():
  ties = [("method.density", "0.3"), ("method.name", "ties")]
  config = configs.load(IMAGES, ties)
  assert dict(config.method) == {"name": "ties", "density": 0.3}
  with config.unlocked():
    configs.change(config, "method.name", "dare", "here")
  assert dict(config.method) == {"name": "dare"}


def test_further_runs_change_settings_of_the_loop_and_the_method():
  also = "{'atm_ties': {'rounds': 3, 'method': {'name': 'ties', 'density': 0.5}}}"
  config = configs.load(IMAGES, [("also", also)])
  assert config.also.to_dict() == ast.literal_eval(also)
  assert config.rounds == configs.load(IMAGES).rounds


@pytest.mark.parametrize(
  ("change", "parts"),
  [
    ("--config.round=3", ["config.round'", "Did you mean config.rounds", "learning_rate"]),
    ("--config.optimiser=sgd", ["config.optimiser'", "Did you mean config.optimizer"]),
    ("--config.mehs.data=1", ["config.mehs'", "config.mesh"]),
    ("--config.mesh.device=8", ["config.mesh.device'", "config.mesh.devices"]),
    ("--config.keep=9", ["or config.checkpoint.keep"]),
    ("--config.rounds.x=3", ["config.rounds"]),
    ("--config.rounds=eight", ["config.rounds", "a whole number", "'eight'", "--config.rounds=8"]),
    ("--config.rounds=8.5", ["a whole number", "'8.5'"]),
    ("--config.rounds=0", ["config.rounds must be", "from 1", "got 0"]),
    ("--config.checkpoint.keep=0", ["config.checkpoint.keep", "at least 1", "got 0"]),
    ("--config.rounds=true", ["a whole number"]),
    ("--config.learning_rate=fast", ["a number", "'fast'", "--config.learning_rate=0.001"]),
    ("--config.learning_rate=nan", ["a number"]),
    ("--config.learning_rate=1e999", ["a number"]),
    ("--config.final=yes", ["true or false", "'yes'"]),
    ("--config.schedule=cosin", ["'constant', 'cosine'", "did you mean 'cosine'"]),
    ("--config.mesh=big", ["a group", "'big'"]),
    ("--config.baselines.ties.scales=0.5", ["a list", "0.5"]),
    ("--config.method.name=tise", ["'tise'", "did you mean 'ties'"]),
    ("--config.method.density=0.3", ["config.method.density", "config.method.weight"]),
    ("--config.method={'name': 'ties', 'densty': 0.3}", ["densty", "'density'"]),
    ("--config.method={'density': 0.3}", ["config.method.name", "missing"]),
    ("--config.baselines.ties.density=3", ["baselines", "ties", "density", "(0, 1]", "3"]),
    ("--config.baselines={'tyes': {}}", ["'tyes'", "'ties'"]),
    ("--config.baselines={'experts': {'epoch': 3}}", ["baselines.experts", "'epoch'", "'epochs'"]),
    ("--config.baselines={'experts_more': {'epoch': 3}}", ["baselines.experts_more", "'epochs'"]),
    ("--config.baselines={'multitask': {'epochs': 0}}", ["baselines.multitask", "epochs", "0"]),
    ("--config.also={'fast': {'rounds': 3}}", ["'fast'", "'atm_'"]),
    ("--config.also={'atm_x': {'rouns': 3}}", ["also.atm_x", "'rouns'", "did you mean 'rounds'"]),
    ("--config.also={'atm_x': {'rounds': 'x'}}", ["also.atm_x", "a whole number", "'x'"]),
    ("--config.also={'atm_x': {'rounds': 0}}", ["also.atm_x", "rounds", "got 0"]),
    ("--config.also={'atm_x': {'data': {}}}", ["also.atm_x", "'data'", "cannot be changed"]),
    ("--config.also={'atm_x': {'method': {'name': 'tise'}}}", ["also.atm_x", "'tise'", "'ties'"]),
    ("--config.also={'atm_x': 3}", ["also.atm_x", "a group", "3"]),
    ("--config.rounds", ["--config.rounds=VALUE"]),
  ],
)
def test_wrong_change_is_named_with_what_is_right(capsys, runs, change, parts):
  err = refused(capsys, *atm(change))
  for part in parts:
    assert part in err
  assert runs.calls == []


@pytest.mark.parametrize(
  ("body", "parts"),
  [
    ("def get_config():\n  return 1 / 0", ["mine.py:2: ZeroDivisionError"]),
    ("def get_config(:\n", ["mine.py:1: SyntaxError"]),
    ("import nothing_like_this\n", ["mine.py:1: ModuleNotFoundError", "nothing_like_this"]),
    ("x = 1\n", ["get_config", "ConfigDict"]),
    ("def get_config():\n  return {'seed': 0}", ["ConfigDict", "{'seed': 0}"]),
  ],
)
def test_broken_config_file_is_told_in_one_line(capsys, runs, tmp_path, body, parts):
  err = refused(capsys, *atm(config=config_file(tmp_path, body)))
  for part in parts:
    assert part in err


@pytest.mark.parametrize(
  ("line", "parts"),
  [
    ("c.round = 3", ["unknown key 'config.round'", "did you mean 'rounds'"]),
    ("del c.experiment", ["'config.experiment' is missing"]),
    ("c.mesh.device = 8", ["config.mesh.device'", "mesh.devices"]),
    ("c.seed = 'x'", ["config.seed", "a whole number", "'x'"]),
    ("c.baselines = 3", ["config.baselines", "a group", "3"]),
  ],
)
def test_wrong_key_in_a_config_file_is_named(capsys, runs, tmp_path, line, parts):
  source = (ROOT / IMAGES).read_text()
  path = tmp_path / "mine.py"
  setting = f"  with c.ignore_type():\n    {line}\n  return c.lock()"
  path.write_text(source.replace("  return c.lock()", setting))
  err = refused(capsys, *atm(config=str(path)))
  assert str(path) in err
  for part in parts:
    assert part in err


def test_missing_config_file_lists_what_there_is(capsys):
  err = refused(capsys, *atm(config="configs/image4.py"))
  assert "Did you mean configs/images4.py?" in err
  for path in CONFIGS:
    assert path in err


# Usage.


@pytest.mark.parametrize(
  ("arguments", "parts"),
  [
    (["amt"], ["'amt'", "'atm'", "methods"]),
    (["atm", "--workdr=x", f"--config={IMAGES}"], ["--workdr", "Did you mean --workdir?"]),
    (["atm", f"--config={IMAGES}"], ["--workdir", "required"]),
    (["atm", f"--config={IMAGES}", "--workdir=x", "--resume=maybe"], ["maybe", "never"]),
    (["atm", f"--config={IMAGES}", "--workdir=x", "more"], ["more"]),
    (["methods", "--config.rounds=3"], ["--config.rounds", "no config"]),
    (["report"], ["WORKDIR"]),
    (["atm", "--config=images4_methods", "--workdir=x"], ["is a config for `jaxmerge bench`"]),
    (["bench", "--config=images4_quick", "--workdir=x"], ["is a config for `jaxmerge atm`"]),
    (["atm", f"--config={IMAGES}", "--workdir=x", "--process=1"], ["--process", "--distributed"]),
  ],
)
def test_wrong_usage_is_one_message(capsys, arguments, parts):
  err = refused(capsys, *arguments)
  for part in parts:
    assert part in err


def test_debug_shows_the_traceback(capsys):
  assert main.main(atm("--config.round=3", "--debug")) == 2
  assert "Traceback" in capsys.readouterr().err


# Running.


def test_run_gets_config_workdir_and_resume_and_its_table_is_printed(capsys, runs, tmp_path):
  arguments = atm("--config.rounds=3", "--resume=never", workdir=str(tmp_path))
  assert main.main(arguments) == 0
  ((config, workdir, resume),) = runs.calls
  assert (config.rounds, workdir, resume) == (3, str(tmp_path), "never")
  out, err = capsys.readouterr()
  assert jaxmerge.report.text(record()) in out
  assert str(tmp_path / "report.html") in out
  assert err == ""


@pytest.mark.parametrize("error", [ValueError("rows: NaN"), OSError(28, "No space left on device")])
def test_failed_run_is_one_message(capsys, runs, error):
  def fail(progress):
    raise error

  runs.script = fail
  assert str(error) in refused(capsys, *atm(), status=1)


def test_missing_extra_is_named(capsys, runs):
  def fail(progress):
    raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")

  runs.script = fail
  err = refused(capsys, *atm(), status=1)
  assert "sklearn" in err
  assert "jaxmerge[demo]" in err


def test_bug_is_not_swallowed(runs):
  def fail(progress):
    raise KeyError("oops")

  runs.script = fail
  with pytest.raises(KeyError):
    main.main(atm())


def test_interrupt_says_how_to_go_on(capsys, runs):
  def interrupt(progress):
    raise KeyboardInterrupt

  runs.script = interrupt
  assert main.main(atm("--config.rounds=3")) == 130
  err = capsys.readouterr().err
  assert shlex.join(["jaxmerge", *atm("--config.rounds=3")]) in err
  assert main.main(atm("--resume=never")) == 130
  assert "jaxmerge" not in capsys.readouterr().err


def test_a_run_that_is_asked_to_stop_says_how_to_go_on(capsys, runs):
  def stop(progress):
    raise preemption.Stopped("stopped after round 2 of 3")

  runs.script = stop
  assert main.main(atm("--config.rounds=3")) == 143
  err = capsys.readouterr().err
  assert err.startswith("stopped after round 2 of 3; this goes on from the last saved round:")
  assert shlex.join(["jaxmerge", *atm("--config.rounds=3")]) in err


def test_an_interrupted_merge_says_how_to_go_on(capsys, monkeypatch):
  def interrupt(options, config):
    raise KeyboardInterrupt

  stopped = model_commands.MERGE._replace(run=interrupt)
  monkeypatch.setitem(main.COMMANDS, "merge", stopped)
  assert main.main(["merge", "recipe.yml", "out dir"]) == 130
  assert "finished tensors:\n  jaxmerge merge recipe.yml 'out dir'" in capsys.readouterr().err


def test_bytes_are_counted_with_their_speed(monkeypatch):
  """What an interrupted run has done, which comes first, says nothing of the speed."""
  seconds = iter([10.0, 12.0])
  monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
  events = []
  count = progress.byte_counter(events.append, "merging", 50_000_000)
  count(30_000_000)
  count(8_000_000)
  event = {"phase": "merging", "total": 50, "unit": "MB"}
  assert events == [event | {"done": 30}, event | {"done": 38, "numbers": {"MB/s": 4}}]


EVENTS = [
  {"phase": "experts", "done": 3, "total": 10, "unit": "round", "numbers": {"mean": 0.71234}},
  {"message": "[checkpoint 3] set aside"},
  {"phase": "experts", "done": 4, "total": 10, "unit": "round", "numbers": {"mean": 0.75}},
  {"phase": "atm", "done": 0, "total": 8, "unit": "round"},
]


def test_progress_is_quiet_when_not_a_terminal(capsys, runs):
  runs.script = lambda progress: [progress(event) for event in EVENTS]
  assert main.main(atm()) == 0
  assert capsys.readouterr().err == "[checkpoint 3] set aside\n"


class Terminal(io.StringIO):
  """A terminal that keeps what is written to stderr."""

  def isatty(self):
    return True

  @classmethod
  def of(cls, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    own = cls()
    monkeypatch.setattr(sys, "stderr", own)
    return own


def test_progress_on_a_terminal_shows_numbers_and_messages(monkeypatch, runs):
  terminal = Terminal.of(monkeypatch)
  runs.script = lambda progress: [progress(event) for event in EVENTS]
  assert main.main(atm()) == 0
  shown = terminal.getvalue()
  for part in ("[checkpoint 3] set aside", "experts", "4/10 round", "mean 0.75", "0/8 round"):
    assert part in shown


def test_progress_on_a_terminal_shows_the_time_that_is_left(monkeypatch):
  """Of what is done since the first event: 1 MB a second, and 60 MB to go."""
  from rich import console

  terminal = Terminal.of(monkeypatch)
  now = [1000.0]
  monkeypatch.setattr(console, "monotonic", lambda: now[0])
  with progress.bars() as show:
    for seconds, done in ((0, 30), (5, 35), (10, 40)):
      now[0] = 1000.0 + seconds
      show({"phase": "merging", "done": done, "total": 100, "unit": "MB"})
  last = terminal.getvalue().split("merging")[-1]
  assert "40/100 MB" in last
  assert re.findall(r"\d+:\d\d:\d\d", last) == ["0:00:10", "0:01:00"]


@pytest.mark.parametrize(
  ("before", "count", "after"),
  [
    ("", 8, "--xla_force_host_platform_device_count=8"),
    ("--xla_a=1", 2, "--xla_a=1 --xla_force_host_platform_device_count=2"),
    ("--xla_a=1", None, "--xla_a=1"),
    ("--xla_force_host_platform_device_count=4", 8, "--xla_force_host_platform_device_count=4"),
  ],
)
def test_fake_devices_leave_the_users_flags(monkeypatch, before, count, after):
  monkeypatch.setenv("XLA_FLAGS", before)
  command.request_cpu_devices(count)
  assert main.os.environ["XLA_FLAGS"] == after


# Reports of finished runs.


def test_report_prints_the_table_and_remakes_the_page(capsys, tmp_path):
  (tmp_path / "report.json").write_text(json.dumps(record()))
  assert main.main(["report", str(tmp_path)]) == 0
  assert jaxmerge.report.text(record()) in capsys.readouterr().out
  assert "</html>" in (tmp_path / "report.html").read_text()


def test_report_says_what_is_not_there_and_names_a_config(capsys, tmp_path):
  assert "there is no such folder" in refused(capsys, "report", str(tmp_path / "no"), status=1)
  assert "configs copy images4_quick" in refused(capsys, "configs", "images4_quick", status=1)


def test_report_shows_a_finished_sweep(capsys, tmp_path, monkeypatch):
  from jaxmerge.experiments import sweep
  from jaxmerge.report import tables

  (tmp_path / "sweep.json").write_text('{"combinations": []}')
  monkeypatch.setattr(sweep, "table", lambda facts: tables.Table(["Model"], []))
  monkeypatch.setattr(sweep, "note", lambda facts: f"{len(facts['combinations'])} combinations")
  assert main.main(["report", str(tmp_path)]) == 0
  assert "0 combinations" in capsys.readouterr().out


def test_report_of_an_unfinished_run_is_an_error(capsys, tmp_path):
  assert "report.json" in refused(capsys, "report", str(tmp_path), status=1)
  (tmp_path / "report.json").write_text('{"tasks": [')
  assert "report.json: not JSON" in refused(capsys, "report", str(tmp_path), status=1)
  (tmp_path / "report.json").write_text("{}")
  assert "tasks" in refused(capsys, "report", str(tmp_path), status=1)
