"""Completion of commands and flags is written where the shell looks for it."""

import subprocess

import pytest

from jaxmerge.cli import completion, main

shtab = pytest.importorskip("shtab")


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))


def test_bash_completes_commands_and_flags(monkeypatch, capsys, tmp_path):
  monkeypatch.setenv("SHELL", "/bin/bash")
  with pytest.raises(SystemExit) as done:
    main.main(["--install-completion"])
  assert done.value.code in (0, None)
  file = tmp_path / ".local/share/bash-completion/completions/jaxmerge"
  assert str(file) in capsys.readouterr().out
  script = (
    f"source {file}; COMP_WORDS=(jaxmerge $1); COMP_CWORD=1; "
    'f=$(complete -p jaxmerge | sed "s/.*-F \\([^ ]*\\).*/\\1/"); $f; echo "${COMPREPLY[@]}"'
  )
  for start, word in (("ins", "inspect"), ("--v", "--version")):
    run = ["bash", "-c", script, "bash", start]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert word in done.stdout.split()


def test_zsh_has_a_file_of_its_own(tmp_path):
  path = completion.install(main.parser(), "zsh", tmp_path)
  assert path == tmp_path / ".zfunc/_jaxmerge"
  assert path.read_text().startswith("#compdef jaxmerge")


def test_another_shell_is_an_error(capsys):
  assert main.main(["--install-completion", "fish"]) == 2
  assert "--install-completion=bash" in capsys.readouterr().err
