"""The command line: flags in, exit status out. `commands.py` does what is asked for.

Help and errors of a config come without importing jax: each command imports what it needs. Exit
status: 0 done, 1 failed, 2 wrong usage or config, 130 interrupted, 143 stopped by SIGTERM.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import os
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn  # Any: a config is imported only by commands that have one.

from jaxmerge.cli import commands, environment, mergekit_flags, progress
from jaxmerge.parallel import preemption

_CHANGES = """\
changes of the config:
  --config.KEY=VALUE    sets one key of the config: --config.rounds=8, --config.local_state=kept,
                        --config.method.name=ties --config.method.density=0.3 (a new method name
                        drops the settings of the method before). Lists and groups are Python
                        literals, in quotes.

examples:
  jaxmerge atm --config=configs/images4.py --workdir=runs/images4
  jaxmerge atm --config=configs/images4.py --workdir=runs/ties --config.method.name=ties
  jaxmerge atm --config=configs/images4.py --help
"""


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line and returns the exit status."""
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  debug = "--debug" in arguments
  if not arguments:
    progress.say(parser().format_help())
    return 2
  try:
    changes, rest = split(arguments)
    if rest[:1] == ["merge"]:
      rest, told = mergekit_flags.taken(rest)
      for line in told:
        progress.say(line)
    options = parser(rest).parse_args(rest)
    _check_many(options, rest)
    config = _config(options, changes)
  except ValueError as e:
    return _failed(e, 2, debug)
  environment.prepare()
  if getattr(options, "distributed", False):
    from jaxmerge.cli import watchdog

    return watchdog.run(lambda: _done(options, config, arguments))
  return _done(options, config, arguments)


def _done(options: argparse.Namespace, config: Any, arguments: Sequence[str]) -> int:
  """Does what a command is for; the exit status."""
  debug = options.debug
  try:
    getattr(commands, options.command)(options, config)
    sys.stdout.flush()
    return 0
  except BrokenPipeError:
    # The reader has left (`jaxmerge methods | head`): nothing is wrong, and nothing is read.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except ModuleNotFoundError as e:
    if (e.name or "jaxmerge").startswith("jaxmerge"):
      raise
    return _failed(f"{e}; it comes with an extra: pip install 'jaxmerge[demo]'.", 1, debug)
  except (ValueError, OSError) as e:
    if getattr(options, "distributed", False):
      from jaxmerge.parallel import processes

      if processes.lost(e):
        raise
    return _failed(e, 1, debug)
  except preemption.Stopped as e:
    progress.say(f"{e}{_again(options, arguments)}")
    return preemption.STATUS
  except KeyboardInterrupt:
    progress.say(f"interrupted{_again(options, arguments)}")
    return 130


def _again(options: argparse.Namespace, arguments: Sequence[str]) -> str:
  """How to go on with what was stopped."""
  saved = {"atm": "the last saved round", "merge": "the last finished tensors"}
  saved["bench"] = "the last finished method"
  if options.command not in saved or options.resume == "never":
    return ""
  return f"; this goes on from {saved[options.command]}:\n  {shlex.join(['jaxmerge', *arguments])}"


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
  """Returns the parser; its help shows the keys of the config that is among the arguments."""
  top = _Parser(prog="jaxmerge", description="Model merging in JAX.", allow_abbrev=False)
  top.add_argument("--version", action="version", version=importlib.metadata.version("jaxmerge"))
  every = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
  layout = argparse.RawDescriptionHelpFormatter

  about = "tune and merge models as a config says, compare and report"
  atm = every.add_parser(
    "atm", help=about, description=f"{about.capitalize()}.", epilog=_epilog(arguments),
    formatter_class=layout, allow_abbrev=False,
  )  # fmt: skip
  atm.add_argument("--config", required=True, metavar="FILE", help="the experiment")
  workdir = "folder for checkpoints, report and merged model"
  atm.add_argument("--workdir", required=True, metavar="FOLDER", help=workdir)
  resume = "go on with the run in the workdir: if there is one, not at all, or fail without one"
  atm.add_argument("--resume", choices=("auto", "never", "must"), default="auto", help=resume)
  late = "after SIGTERM, end in the middle of a round that takes longer; "
  late += f"{preemption.GRACE:g} if not given"
  atm.add_argument("--grace", metavar="SECONDS", type=float, default=preemption.GRACE, help=late)
  _many(atm)

  about = "merge the experts of an experiment by every method, and rank the methods"
  bench = every.add_parser("bench", help=about, description=f"{about.capitalize()}.")
  bench.add_argument("--config", required=True, metavar="FILE", help="methods and what to try")
  bench.add_argument("--workdir", required=True, metavar="FOLDER", help="folder for the results")
  bench.add_argument("--resume", choices=("auto", "never", "must"), default="auto", help=resume)

  about = "merge the models of a recipe to a new folder"
  merge = every.add_parser("merge", help=about, description=f"{about.capitalize()}.")
  merge.add_argument("recipe", metavar="RECIPE.yml", help="which models, and how")
  merge.add_argument("out", metavar="OUT", help="folder of the result")
  dry = "check everything, say what would be done, and do nothing"
  merge.add_argument("--dry-run", action="store_true", help=dry)
  _many(merge)
  merge.add_argument("--replace", action="store_true", help="replace OUT if it is there")
  again = "go on with an interrupted merge of the same recipe, or start anew"
  merge.add_argument("--resume", choices=("auto", "never"), default="auto", help=again)
  kind = "what weights are written as: safetensors, or a checkpoint of Orbax in OUT/state"
  merge.add_argument(
    "--out-format", choices=("safetensors", "orbax"), default="safetensors", help=kind
  )
  lax = "let NaN and infinity in the models pass"
  merge.add_argument("--allow-nonfinite", action="store_true", help=lax)
  rules = "take mergekit's rules and arithmetic where they differ from ours, as `compat:` does"
  merge.add_argument("--compat", choices=("mergekit",), help=rules)
  hard = "refuse keys of the recipe that mergekit ignores, as `strict: true` does"
  merge.add_argument("--strict", action="store_true", help=hard)
  after = "then run this, without a shell; {out} is the result, and its last line JSON of numbers"
  merge.add_argument("--evaluate", metavar="COMMAND", help=after)
  fetch = "fetch models of the hub that its cache lacks; without it, no network is used"
  merge.add_argument("--download", action="store_true", help=fetch)
  shard = "bytes of a file of weights, at most: 5GB, 500MB"
  merge.add_argument("--shard-size", type=_bytes, default="5GB", metavar="SIZE", help=shard)

  about = "print the table of a finished run, and remake its page and plots"
  report = every.add_parser("report", help=about, description=f"{about.capitalize()}.")
  report.add_argument("workdir", metavar="WORKDIR", help="the folder of the run")

  about = "show what is in a folder: tensors, sizes, ties, how it was merged"
  inspect = every.add_parser("inspect", help=about, description=f"{about.capitalize()}.")
  inspect.add_argument("model", metavar="MODEL", help="a model, a checkpoint, or a PEFT adapter")
  inspect.add_argument("--download", action="store_true", help=fetch)
  checksums = "read the weights: show xxh3_128 of every tensor, and which are equal"
  inspect.add_argument("--checksums", action="store_true", help=checksums)
  check = "read the weights: are they as jaxmerge wrote them? status 1 where not"
  inspect.add_argument("--check", action="store_true", help=check)
  inspect.add_argument("--json", action="store_true", help="print JSON")

  about = "show how models differ from their base: norms, cosines, sign conflicts"
  diff = every.add_parser("diff", help=about, description=f"{about.capitalize()}.")
  diff.add_argument("base", metavar="BASE", help="the model that task vectors start from")
  diff.add_argument("models", metavar="MODEL", nargs="+", help="a model, or a PEFT adapter")
  diff.add_argument("--download", action="store_true", help=fetch)
  singular = "measure the energy in the top singular values of matrices with such names"
  diff.add_argument("--singular", metavar="REGEX", help=singular)
  diff.add_argument("--top", metavar="N", type=int, default=16, help="how many; 16 if not given")
  diff.add_argument("--out", metavar="FOLDER", help="write diff.json and plots into it")

  about = (
    "compile the programs of a config for TPUs, without one: do they fit, how fast can they be"
  )
  compiles = every.add_parser("compile", help=about, description=f"{about.capitalize()}.")
  what = "an experiment, or a merge"
  compiles.add_argument("--config", required=True, metavar="FILE", help=what)
  which = "chips and their shape: v5e:4x4, v5p:4x4x4"
  compiles.add_argument("--topology", required=True, metavar="NAME", help=which)
  many = "so many slices of that shape"
  compiles.add_argument("--slices", type=int, default=1, metavar="N", help=many)
  compiles.add_argument("--json", action="store_true", help="print JSON")

  about = "list the merging methods: formula, settings, paper"
  every.add_parser("methods", help=about, description=f"{about.capitalize()}.")
  for command in (top, *every.choices.values()):
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
  _check_words(top, every.choices, arguments)
  return top


def _many(command: argparse.ArgumentParser) -> None:
  """Adds the flags of a command that many processes can share."""
  many = "run as one of many processes; Cloud TPU and Slurm tell which, elsewhere say so:"
  command.add_argument("--distributed", action="store_true", help=many)
  known = os.environ.get
  told, number, index = (
    known(f"JAX_{name}") for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
  )
  where = "where process 0 is; $JAX_COORDINATOR_ADDRESS if not given"
  command.add_argument("--coordinator", metavar="HOST:PORT", default=told, help=where)
  count = "number of processes; $JAX_NUM_PROCESSES if not given"
  command.add_argument("--processes", metavar="N", type=int, default=number, help=count)
  own = "which of them this is, from 0; $JAX_PROCESS_ID if not given"
  command.add_argument("--process", metavar="I", type=int, default=index, help=own)


def _check_many(options: argparse.Namespace, arguments: Sequence[str]) -> None:
  """Raises ValueError for flags of many processes where this is to be the only one."""
  flags = [a.split("=")[0] for a in arguments]
  for flag in ("--coordinator", "--processes", "--process"):
    if flag in flags and not options.distributed:
      raise ValueError(f"{flag} says which of many processes this is: it needs --distributed.")


def _check_words(
  top: argparse.ArgumentParser,
  commands: Mapping[str, argparse.ArgumentParser],
  arguments: Sequence[str],
) -> None:
  """Raises ValueError, with the nearest right word, for an unknown command or flag."""
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


def _config(options: argparse.Namespace, changes: Sequence[tuple[str, str]]) -> Any:
  """The config of a command that has one. `Any`: ml_collections is imported only by those."""
  if options.command == "atm":
    from jaxmerge.experiments import config

    return config.load(options.config, changes)
  if options.command == "bench":
    from jaxmerge.experiments import bench_config

    return bench_config.bench(options.config, changes)
  if options.command == "compile":
    from jaxmerge.experiments import compile_config
    from jaxmerge.xla import chips

    chips.parse_topology(options.topology, options.slices)  # A wrong name is told first.
    return compile_config.load(options.config, changes)
  if changes:
    raise ValueError(f"--config.{changes[0][0]}: the command {options.command!r} has no config.")
  return None


def _bytes(text: str) -> int:
  """Reads a size.

  >>> _bytes("5GB"), _bytes("500MB")
  (5000000000, 500000000)
  """
  units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
  for unit, factor in units.items():
    if text.upper().endswith(unit) and text[: -len(unit)].replace(".", "", 1).isdigit():
      return int(float(text[: -len(unit)]) * factor)
  raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB or 500MB")


def _words(error: BaseException | str) -> str:
  """What an error says; that of the system in the order of others, the file first."""
  if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
    return f"{error.filename}: {error.strerror}."
  return str(error)


def _failed(error: BaseException | str, status: int, debug: bool) -> int:
  if debug and isinstance(error, BaseException):
    traceback.print_exception(error)
  else:
    progress.say(f"error: {_words(error)}")
  return status


if __name__ == "__main__":
  sys.exit(main())
