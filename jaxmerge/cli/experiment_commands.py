"""Commands that run a config (`atm`, `compile`), and `report`, which shows runs."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any  # A config is imported only by commands that have one.

from jaxmerge.cli import progress
from jaxmerge.cli.command import (
  Changes,
  Command,
  add_json_flag,
  add_process_flags,
  add_run_flags,
  start_devices,
)
from jaxmerge.parallel import preemption

COMPARISON = "runs/comparison"


def _add_atm_flags(parser: argparse.ArgumentParser) -> None:
  add_run_flags(parser, "the experiment", "folder for checkpoints, report and merged model")
  text = "after SIGTERM, abandon a round that takes longer than this; "
  text += f"default: {preemption.GRACE:g}"
  parser.add_argument("--grace", metavar="SECONDS", type=float, default=preemption.GRACE, help=text)
  text = "run with each of these seeds, such as 0,1,2 or 0:3, in folders below the workdir"
  parser.add_argument("--seeds", metavar="SEEDS", help=text)
  text = "run with each of these values of a key; repeat it for all pairs of two keys"
  parser.add_argument("--sweep", metavar="KEY=VALUE,VALUE", action="append", default=[], help=text)
  text = "log the numbers of each round there; default: config.tracker"
  parser.add_argument("--tracker", choices=("none", "tensorboard", "wandb"), help=text)
  add_process_flags(parser)


def _load_experiment(options: argparse.Namespace, changes: Changes) -> Any:
  from jaxmerge.experiments import config

  if options.tracker is not None:
    changes = [*changes, ("tracker", options.tracker)]
  if not (options.seeds or options.sweep):
    return config.load(options.config, changes)
  from jaxmerge.experiments import sweep

  seeds = sweep.parse_seeds(options.seeds) if options.seeds else ()
  cells = sweep.combinations(seeds, [sweep.parse_sweep(text) for text in options.sweep])
  return sweep.load(cells, lambda more: config.load(options.config, [*changes, *more]))


def run_atm(options: argparse.Namespace, config: Any) -> None:
  """Tunes and merges as a config says, and prints the table, on the first process."""
  from jaxmerge import report as reports

  folder = pathlib.Path(options.workdir)
  if options.seeds or options.sweep:
    _run_sweep(options, config, folder)
    return
  record = _run_once(options, config, folder)
  progress.output(reports.text(record))
  progress.output(f"report: {folder / 'report.html'}")


def _run_once(
  options: argparse.Namespace, config: Any, folder: pathlib.Path, *, is_first: bool = True
) -> dict[str, Any]:
  """Runs a config in a folder, unless it has finished there, and returns its record."""
  from jaxmerge.experiments import workdir as workdirs

  plain = json.loads(config.to_json())
  workdirs.check(folder, plain, options.resume)
  if (record := workdirs.read_finished(folder, plain)) is not None and not options.distributed:
    progress.log("this run has finished; showing its results")
    return record
  if is_first or not options.distributed:  # Processes join the run once.
    start_devices(options, config.mesh.devices)
  from jaxmerge.experiments import run

  with progress.bars() as show, preemption.watch_sigterm(options.grace) as stop:
    return run.run(config, str(folder), resume=options.resume, progress=show, stop=stop)


def _run_sweep(options: argparse.Namespace, loaded: Any, folder: pathlib.Path) -> None:
  """Runs all configs of a sweep sequentially, and prints one table."""
  from jaxmerge.experiments import sweep

  done: list[pathlib.Path] = []

  def start(config: Any, place: pathlib.Path, message: str) -> dict[str, Any]:
    progress.log(message)
    done.append(place)
    return _run_once(options, config, place, is_first=len(done) == 1)

  sweep.run(loaded, folder, start)
  _print_sweep(folder)


def _print_sweep(folder: pathlib.Path) -> None:
  """Prints the table of a finished sweep."""
  from jaxmerge.experiments import sweep
  from jaxmerge.io.huggingface import folder as files
  from jaxmerge.report import tables

  facts = files.read_json(folder / "sweep.json")
  progress.output(tables.to_text(sweep.table(facts)))
  progress.output(sweep.note(facts))
  progress.output(f"sweep: {folder / 'sweep.md'}")


def _add_compile_flags(parser: argparse.ArgumentParser) -> None:
  text = "an experiment, or a merge: a file, or the name of one of `jaxmerge configs`"
  parser.add_argument("--config", required=True, metavar="FILE", help=text)
  text = "chips and topology: v5e:4x4, v5p:4x4x4"
  parser.add_argument("--topology", required=True, metavar="NAME", help=text)
  text = "number of slices of that topology"
  parser.add_argument("--slices", type=int, default=1, metavar="N", help=text)
  add_json_flag(parser)


def _load_compile_config(options: argparse.Namespace, changes: Changes) -> Any:
  from jaxmerge.experiments import compile_config
  from jaxmerge.xla import chips

  chips.parse_topology(options.topology, options.slices)  # Report a wrong topology first.
  return compile_config.load(options.config, changes)


def run_compile(options: argparse.Namespace, config: Any) -> None:
  """Compiles the programs of a config for TPUs, and prints memory, traffic and least time.

  Raises:
    ValueError: with the reason, if a program does not fit.
  """
  from jaxmerge.xla import chips

  chips.set_environment()
  from jaxmerge.experiments import compilation
  from jaxmerge.report import compile_tables, tables

  topology = chips.parse_topology(options.topology, options.slices)
  plain = json.loads(config.to_json())
  record = compilation.run(plain, topology, lambda done: progress.log(compile_tables.line(done)))
  if options.json:
    progress.output(json.dumps(record, indent=2))
  else:
    progress.output(compile_tables.heading(record))
    progress.output(tables.to_text(compile_tables.memory(record)))
    progress.output(tables.to_text(compile_tables.traffic(record)))
  if unfit := [program for program in record["programs"] if not program["fits"]]:
    first = unfit[0]
    raise ValueError(f"{first['name']} does not fit {options.topology}: {first['reason']}")


def _add_report_flags(parser: argparse.ArgumentParser) -> None:
  text = "the folder of a run; several are compared with each other"
  parser.add_argument("workdirs", metavar="WORKDIR", nargs="+", help=text)
  text = f"for the page that compares several; default: {COMPARISON}"
  parser.add_argument("--out", metavar="FOLDER", help=text)


def run_report(options: argparse.Namespace, config: Any) -> None:
  """Prints the table of a finished run, and redraws its page and plots; or compares several."""
  from jaxmerge import report as reports
  from jaxmerge.experiments import workdir as workdirs

  folder = pathlib.Path(options.workdirs[0])
  if missing := [w for w in options.workdirs if not pathlib.Path(w).exists()]:
    raise ValueError(f"{missing[0]}: there is no such folder; name the workdir of a finished run.")
  if len(options.workdirs) > 1:
    from jaxmerge.experiments import joined

    record = joined.record(joined.read(options.workdirs))
    folder = pathlib.Path(options.out or COMPARISON)
    if options.out is None and (folder / "report.json").exists():
      progress.log(f"note: this replaces the comparison in {folder}; --out=FOLDER keeps both")
  elif options.out is not None:
    raise ValueError("--out is for the comparison of several runs; name two workdirs or more.")
  elif (folder / "sweep.json").is_file() and not (folder / "report.json").exists():
    _print_sweep(folder)
    return
  else:
    record = workdirs.read_record(folder)
  progress.output(reports.text(record))
  for note in record.get("notes", []) if len(options.workdirs) > 1 else []:
    progress.output(f"note: {note}")
  reports.write(record, folder)
  progress.output(f"report: {folder / 'report.html'}")


ATM = Command(
  "tune and merge models as a config says, compare them and write a report",
  _add_atm_flags,
  run_atm,
  _load_experiment,
  saved="the last saved round",
)
COMPILE = Command(
  "compile the programs of a config for TPUs, without a TPU: memory, traffic, least time",
  _add_compile_flags,
  run_compile,
  _load_compile_config,
)
REPORT = Command(
  "show a finished run again, or compare several: tables, curves, differences",
  _add_report_flags,
  run_report,
)
