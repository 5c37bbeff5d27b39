"""Shell completion of commands and flags, generated from the parser by shtab."""

from __future__ import annotations

import argparse
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any  # What argparse passes to an action.

# Where each shell looks for completion files, relative to the home folder.
_PLACES = {
  "bash": ".local/share/bash-completion/completions/jaxmerge",
  "zsh": ".zfunc/_jaxmerge",
}
_THEN = {
  "bash": "It works in new shells, where the package bash-completion is installed.",
  "zsh": "In ~/.zshrc, before compinit: fpath+=~/.zfunc",
}


def add_flag(parser: argparse.ArgumentParser) -> None:
  """Adds `--install-completion`."""
  text = "install completion of commands and flags for this shell (bash or zsh), and exit"
  name = "--install-completion"
  parser.add_argument(name, nargs="?", metavar="SHELL", action=_Install, help=text)


class _Install(argparse.Action):
  """Writes the completion file, prints its path, and exits."""

  def __call__(
    self,
    parser: argparse.ArgumentParser,
    namespace: argparse.Namespace,
    values: str | Sequence[Any] | None,
    option: str | None = None,
  ) -> None:
    from jaxmerge.cli import progress

    shell = values if isinstance(values, str) else detect(os.environ)
    path = install(parser, shell, pathlib.Path.home())
    progress.output(f"wrote {path}. {_THEN[shell]}")
    parser.exit()


def detect(environment: Mapping[str, str]) -> str:
  """Returns the name of the user's shell.

  >>> detect({"SHELL": "/usr/bin/zsh"})
  'zsh'
  """
  return pathlib.PurePath(environment.get("SHELL", "")).name


def install(parser: argparse.ArgumentParser, shell: str, home: pathlib.Path) -> pathlib.Path:
  """Writes the completion file of a shell under the home folder, and returns its path.

  Raises:
    ValueError: for shells other than bash and zsh, or if shtab is not installed.
  """
  if shell not in _PLACES:
    what = f"there is no completion for {shell!r}" if shell else "the shell is unknown"
    raise ValueError(f"{what}: --install-completion=bash or --install-completion=zsh.")
  try:
    import shtab
  except ModuleNotFoundError as e:
    raise ValueError("completion needs shtab: pip install 'jaxmerge[completion]'.") from e
  _complete_paths(parser, shtab.FILE)
  path = home / _PLACES[shell]
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(shtab.complete(parser, shell=shell), encoding="utf-8")
  return path


def _complete_paths(parser: argparse.ArgumentParser, file: Any) -> None:
  """Completes paths wherever a flag or argument has no choices and is not a number."""
  for action in parser._actions:
    if isinstance(action, argparse._SubParsersAction):
      for each in action.choices.values():
        _complete_paths(each, file)
    elif action.nargs != 0 and not action.choices and action.type is None:
      action.complete = file  # type: ignore[attr-defined]
