"""The command line: parses flags, runs a command, returns the exit status.

Help and config errors do not import jax: each command imports what it needs. Exit status: 0 done,
1 failed, 2 wrong usage or config, 130 interrupted, 143 stopped by SIGTERM.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import os
import re
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn  # Any: a config is imported only by commands that have one.

from jaxmerge.cli import (
  bench_command,
  completion,
  configs_command,
  environment,
  experiment_commands,
  extract_command,
  merge_run_command,
  mergekit_flags,
  methods_command,
  model_commands,
  progress,
  transplant_command,
)
from jaxmerge.cli.command import Changes, check_process_flags
from jaxmerge.parallel import preemption

COMMANDS = {
  "atm": experiment_commands.ATM,
  "bench": bench_command.BENCH,
  "merge": model_commands.MERGE,
  "merge-run": merge_run_command.MERGE_RUN,
  "report": experiment_commands.REPORT,
  "inspect": model_commands.INSPECT,
  "diff": model_commands.DIFF,
  "extract": extract_command.EXTRACT,
  "transplant": transplant_command.TRANSPLANT,
  "compile": experiment_commands.COMPILE,
  "methods": methods_command.METHODS,
  "configs": configs_command.CONFIGS,
}
_CHANGES = """\
changes of the config:
  --config.KEY=VALUE    sets one key of the config: --config.rounds=8, --config.local_state=kept,
                        --config.method.name=ties --config.method.density=0.3 (a new method name
                        drops the settings of the method before). Lists and groups are Python
                        literals, in quotes.

examples:
  jaxmerge atm --config=images4 --workdir=runs/images4
  jaxmerge atm --config=images4 --workdir=runs/ties --config.method.name=ties
  jaxmerge atm --config=images4 --help
"""


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line and returns the exit status."""
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  debug = "--debug" in arguments
  if not arguments:
    progress.log(parser().format_help())
    return 2
  try:
    changes, rest = split(arguments)
    if rest[:1] == ["merge"]:
      rest, notes = mergekit_flags.take(rest)
      for note in notes:
        progress.log(note)
    options = parser(rest).parse_args(rest)
    check_process_flags(options, rest)
    config = _load_config(options, changes)
  except ValueError as e:
    return _report_failure(e, 2, debug)
  environment.prepare()
  if getattr(options, "distributed", False):
    from jaxmerge.cli import watchdog

    return watchdog.run(lambda: _run(options, config, arguments))
  return _run(options, config, arguments)


def _run(options: argparse.Namespace, config: Any, arguments: Sequence[str]) -> int:
  """Runs a command, and returns the exit status."""
  debug = options.debug
  try:
    COMMANDS[options.command].run(options, config)
    sys.stdout.flush()
    return 0
  except BrokenPipeError:
    # The reader has closed the pipe (`jaxmerge methods | head`), which is no error.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except ModuleNotFoundError as e:
    if (e.name or "jaxmerge").startswith("jaxmerge"):
      raise
    return _report_failure(f"{e}; it comes with an extra: pip install 'jaxmerge[demo]'.", 1, debug)
  except (ValueError, OSError) as e:
    if getattr(options, "distributed", False):
      from jaxmerge.parallel import processes

      if processes.is_lost(e):
        raise
    return _report_failure(e, 1, debug)
  except preemption.Stopped as e:
    progress.log(f"{e}{_resume_hint(options, arguments)}")
    return preemption.STATUS
  except KeyboardInterrupt:
    progress.log(f"interrupted{_resume_hint(options, arguments)}")
    return 130


def _resume_hint(options: argparse.Namespace, arguments: Sequence[str]) -> str:
  """Returns how to resume what was stopped."""
  saved = COMMANDS[options.command].saved
  if not saved or getattr(options, "resume", "auto") == "never":
    return ""
  return f"; this goes on from {saved}:\n  {shlex.join(['jaxmerge', *arguments])}"


def split(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
  """Separates `--config.KEY=VALUE` (or `--config.KEY VALUE`) from the other arguments.

  >>> split(["atm", "--config.rounds=8", "--config.outer", "sgd", "--debug"])
  ([('rounds', '8'), ('outer', 'sgd')], ['atm', '--debug'])
  """
  changes, rest, queue = [], [], list(arguments)
  while queue:
    argument = queue.pop(0)
    if not argument.startswith("--config."):
      rest.append(argument)
      continue
    key, equals, value = argument.removeprefix("--config.").partition("=")
    if not equals:
      if not queue or queue[0].startswith("--"):
        raise ValueError(f"{argument} needs a value: {argument}=VALUE.")
      value = queue.pop(0)
    changes.append((key, value))
  return changes, rest


class _Parser(argparse.ArgumentParser):
  """A parser whose errors are ValueErrors; argparse would print the usage and exit."""

  def error(self, message: str) -> NoReturn:
    raise ValueError(f"{message.rstrip('.')}. `{self.prog} --help` shows what there is.")


def parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
  """Returns the parser; its help lists the keys of the config among the arguments."""
  top = _Parser(prog="jaxmerge", description="Model merging in JAX.", allow_abbrev=False)
  top.add_argument("--version", action="version", version=importlib.metadata.version("jaxmerge"))
  completion.add_flag(top)
  parsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
  for name, command in COMMANDS.items():
    about = command.about
    subparser = parsers.add_parser(
      name,
      help=about,
      description=f"{about[0].upper()}{about[1:]}.",
      epilog=_epilog(arguments) if command is experiment_commands.ATM else None,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    command.add_flags(subparser)
  for each in (top, *parsers.choices.values()):
    each.add_argument("--debug", action="store_true", help="show the traceback of an error")
  _check_words(top, parsers.choices, arguments)
  return top


def _check_words(
  top: argparse.ArgumentParser,
  commands: Mapping[str, argparse.ArgumentParser],
  arguments: Sequence[str],
) -> None:
  """Raises ValueError, with the closest match, for an unknown command or flag."""
  words = [a for a in arguments if not a.startswith("-")]
  if words and words[0] not in commands and arguments[0] == words[0]:
    near = difflib.get_close_matches(words[0], commands, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"there is no command {words[0]!r}.{hint} Commands: {', '.join(commands)}.")
  command = commands.get(arguments[0], top) if arguments else top
  for argument in arguments:
    flag = argument.split("=")[0]
    known = command._option_string_actions
    if flag.startswith("--") and flag not in known:
      near = difflib.get_close_matches(flag, known, n=1)
      hint = f" Did you mean {near[0]}?" if near else ""
      raise ValueError(f"there is no flag {flag}.{hint} Flags: {', '.join(sorted(known))}.")


def _epilog(arguments: Sequence[str]) -> str:
  peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
  peek.add_argument("--config")
  try:
    path = peek.parse_known_args(list(arguments))[0].config
  except argparse.ArgumentError:
    return _CHANGES
  if path is None or not {"-h", "--help"} & set(arguments):
    return _CHANGES
  from jaxmerge.experiments import config

  values = config.flat(config.load(path))
  lines = ["  " + shlex.quote(f"--config.{key}={value}") for key, value in values.items()]
  return "\n".join([_CHANGES, f"keys of {path} and their values:", *lines])


def _load_config(options: argparse.Namespace, changes: Changes) -> Any:
  """Loads the config of a command that has one."""
  load = COMMANDS[options.command].load_config
  if load is None and changes:
    raise ValueError(f"--config.{changes[0][0]}: the command {options.command!r} has no config.")
  return None if load is None else load(options, changes)


def _error_text(error: BaseException | str) -> str:
  """Returns the text of an error, naming the flag in place of the Python argument.

  Errors of the operating system name the file first, as all others do.

  >>> _error_text("out exists; pass replace=True (--replace) to replace it.")
  'out exists; pass --replace to replace it.'
  """
  if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
    return f"{error.filename}: {error.strerror}."
  return re.sub(r"\b\w+=(?:True|False) \((--[\w=-]+)\)", r"\1", str(error))


def _report_failure(error: BaseException | str, status: int, debug: bool) -> int:
  if debug and isinstance(error, BaseException):
    traceback.print_exception(error)
  else:
    progress.log(f"error: {_error_text(error)}")
  return status


if __name__ == "__main__":
  sys.exit(main())
