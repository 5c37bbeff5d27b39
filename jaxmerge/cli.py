"""The command line: the only place that parses flags, prints, and draws progress.

Help and errors of a config come without importing jax: each command imports what it needs. Exit
status: 0 done, 1 failed, 2 wrong usage or config, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.metadata
import json
import os
import pathlib
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn  # Any: a progress event and a record are plain JSON.

Event = Mapping[str, Any]

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
    _say(parser().format_help())
    return 2
  try:
    changes, rest = split(arguments)
    options = parser(rest).parse_args(rest)
    config = _config(options, changes)
  except ValueError as e:
    return _failed(e, 2, debug)
  try:
    if options.command == "atm":
      _tune_and_merge(config, options.workdir, options.resume)
    elif options.command == "report":
      _report(options.workdir)
    elif options.command == "inspect":
      _inspect(options.model, options.checksums, options.check, options.json)
    elif options.command == "diff":
      _diff(options)
    else:
      _methods()
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
    return _failed(e, 1, debug)
  except KeyboardInterrupt:
    resumes = options.command == "atm" and options.resume != "never"
    again = shlex.join(["jaxmerge", *arguments])
    _say("interrupted" + (f"; this goes on from the last saved round:\n  {again}" * resumes))
    return 130


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
  commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
  layout = argparse.RawDescriptionHelpFormatter

  about = "tune and merge models as a config says, compare and report"
  atm = commands.add_parser(
    "atm", help=about, description=f"{about.capitalize()}.", epilog=_epilog(arguments),
    formatter_class=layout, allow_abbrev=False,
  )  # fmt: skip
  atm.add_argument("--config", required=True, metavar="FILE", help="the experiment")
  workdir = "folder for checkpoints, report and merged model"
  atm.add_argument("--workdir", required=True, metavar="FOLDER", help=workdir)
  resume = "go on with the run in the workdir: if there is one, not at all, or fail without one"
  atm.add_argument("--resume", choices=("auto", "never", "must"), default="auto", help=resume)

  about = "print the table of a finished run, and remake its page and plots"
  report = commands.add_parser("report", help=about, description=f"{about.capitalize()}.")
  report.add_argument("workdir", metavar="WORKDIR", help="the folder of the run")

  about = "show what is in a folder: tensors, sizes, ties, how it was merged"
  inspect = commands.add_parser("inspect", help=about, description=f"{about.capitalize()}.")
  inspect.add_argument("model", metavar="MODEL", help="a model, or a PEFT adapter")
  checksums = "read the weights: show xxh3_128 of every tensor, and which are equal"
  inspect.add_argument("--checksums", action="store_true", help=checksums)
  check = "read the weights: are they as jaxmerge wrote them? status 1 where not"
  inspect.add_argument("--check", action="store_true", help=check)
  inspect.add_argument("--json", action="store_true", help="print JSON")

  about = "show how models differ from their base: norms, cosines, sign conflicts"
  diff = commands.add_parser("diff", help=about, description=f"{about.capitalize()}.")
  diff.add_argument("base", metavar="BASE", help="the model that task vectors start from")
  diff.add_argument("models", metavar="MODEL", nargs="+", help="a model, or a PEFT adapter")
  singular = "measure the energy in the top singular values of matrices with such names"
  diff.add_argument("--singular", metavar="REGEX", help=singular)
  diff.add_argument("--top", metavar="N", type=int, default=16, help="how many; 16 if not given")
  diff.add_argument("--out", metavar="FOLDER", help="write diff.json and plots into it")

  about = "list the merging methods: formula, settings, paper"
  commands.add_parser("methods", help=about, description=f"{about.capitalize()}.")
  for command in (top, *commands.choices.values()):
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
  _check_words(top, commands.choices, arguments)
  return top


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
  from jaxmerge import configuring

  values = configuring.flat(configuring.load(path))
  lines = ["  " + shlex.quote(f"--config.{key}={value}") for key, value in values.items()]
  return "\n".join([_CHANGES, f"keys of {path} and their values:", *lines])


def _config(options: argparse.Namespace, changes: Sequence[tuple[str, str]]) -> Any:
  """The config of a command that has one. `Any`: ml_collections is imported only by those."""
  if options.command == "atm":
    from jaxmerge import configuring

    return configuring.load(options.config, changes)
  if changes:
    raise ValueError(f"--config.{changes[0][0]}: the command {options.command!r} has no config.")
  return None


def _tune_and_merge(config: Any, workdir: str, resume: str) -> None:
  fake_devices(config.mesh.devices)
  from jaxmerge import experiment, report

  with progress_bars() as progress:
    record = experiment.run(config, workdir, resume=resume, progress=progress)
  print(report.text(record))
  print(f"report: {pathlib.Path(workdir) / 'report.html'}")


def fake_devices(count: int | None) -> None:
  """Asks for `count` devices on the CPU, before jax starts; the user's own flags stay.

  It has no effect where jax finds an accelerator.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  name = "--xla_force_host_platform_device_count"
  if count is not None and name not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {name}={count}".strip()


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[Event], None]]:
  """Yields what takes progress events: bars on a terminal, else only the messages, on stderr.

  An event is {"phase", "done", "total", "unit", "numbers"} or {"message"}.
  """
  if not sys.stderr.isatty():
    yield lambda event: _say(event["message"]) if "message" in event else None
    return
  from rich import console, progress

  columns = (
    progress.TextColumn("{task.description}", markup=False),
    progress.BarColumn(bar_width=24),
    progress.TextColumn("{task.completed:g}/{task.total:g} {task.fields[unit]}", markup=False),
    progress.TimeElapsedColumn(),
    # Rounds may take minutes: the speed is taken from all of them.
    progress.TimeRemainingColumn(elapsed_when_finished=False),
    progress.TextColumn("{task.fields[numbers]}", markup=False),
  )
  bars: dict[str, progress.TaskID] = {}
  to = console.Console(stderr=True)
  with progress.Progress(*columns, console=to, speed_estimate_period=3600.0) as drawn:

    def show(event: Event) -> None:
      if "message" in event:
        to.print(event["message"], markup=False, highlight=False)
        return
      phase, done, total = event["phase"], event["done"], event["total"]
      text = numbers(event.get("numbers", {}))
      if phase not in bars:
        # A resumed run begins in the middle; what was done before says nothing of the speed.
        unit = event.get("unit", "")
        bars[phase] = drawn.add_task(phase, total=total, completed=done, unit=unit, numbers=text)
      else:
        drawn.update(bars[phase], completed=done, total=total, numbers=text)

    yield show


def numbers(values: Mapping[str, Any]) -> str:
  """Returns current numbers as a short text.

  >>> numbers({"mean": 0.71234, "round": 3})
  'mean 0.7123, round 3'
  """
  shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
  return ", ".join(shown)


def _report(workdir: str) -> None:
  from jaxmerge import report

  path = pathlib.Path(workdir) / "report.json"
  if not path.is_file():
    raise ValueError(f"there is no {path}: the run has not finished, or this is no workdir.")
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as e:
    raise ValueError(f"{path} is not a JSON file: {e}") from e
  report.check(record)
  print(report.text(record))
  report.write(record, workdir)
  print(f"report: {path.with_suffix('.html')}")


def _inspect(path: str, checksums: bool, check: bool, as_json: bool) -> None:
  from jaxmerge import inspecting
  from jaxmerge.report import listing

  record = inspecting.described(path)
  size = sum(tensor["bytes"] for tensor in record["tensors"])
  with progress_bars() as show:
    if check:
      record = inspecting.checked(record, _counted(show, "read", size))
    elif checksums:
      record = inspecting.hashed(record, _counted(show, "read", size))
  print(json.dumps(record, indent=1) if as_json else listing.text(record))
  wrong = [
    n for key in ("changed", "missing", "added") for n in record.get("check", {}).get(key, [])
  ]
  if wrong:
    raise ValueError(f"{path}: {len(wrong)} tensors are not as recorded, {wrong[0]!r} the first.")


def _diff(options: argparse.Namespace) -> None:
  if options.top < 1:
    raise ValueError(f"--top must be 1 or more, got {options.top}.")
  from jaxmerge import differing, planning
  from jaxmerge.io.tensor import Files
  from jaxmerge.report import differences, drawing

  if options.out is not None:
    try:
      drawing.figure(1.0)  # Matplotlib is missed now, and not after minutes.
    except ImportError as e:
      raise ValueError(str(e)) from e
  files = Files()
  try:
    base = planning.model(options.base, files)
    models = differing.opened(options.models, base, files)
    size = differing.size(base, models, options.singular)
    with progress_bars() as show:
      record = differing.compare(
        base,
        models,
        singular=options.singular,
        top=options.top,
        progress=_counted(show, "read", size),
      )
  finally:
    files.close()
  print(differences.text(record))
  for path in [] if options.out is None else differences.write(record, options.out):
    print(f"wrote {path}")


def _counted(show: Callable[[Event], None], phase: str, size: int) -> Callable[[int], None]:
  """Returns what takes numbers of bytes and shows their sum, of `size` bytes, as progress."""
  done = 0

  def count(more: int) -> None:
    nonlocal done
    done += more
    show({"phase": phase, "done": done // 10**6, "total": size // 10**6, "unit": "MB"})

  return count


def _methods() -> None:
  from jaxmerge import catalog

  width = max(map(len, catalog.METHODS))
  for name, entry in catalog.METHODS.items():
    mark = " (experimental)" if entry.experimental else ""
    print(
      f"{name:{width}}  {entry.formula}{mark}\n{'':{width}}  {entry.paper}; needs {entry.needs}"
    )
    for parameter, p in entry.parameters.items():
      print(f"{'':{width}}    {parameter}={p.default!r}: {p.doc}, {p.range}")


def _failed(error: BaseException | str, status: int, debug: bool) -> int:
  if debug and isinstance(error, BaseException):
    traceback.print_exception(error)
  else:
    _say(f"error: {error}")
  return status


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
  sys.exit(main())
