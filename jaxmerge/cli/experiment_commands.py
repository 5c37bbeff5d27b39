"""Commands that run a config (`atm`, `bench`, `compile`), and `report`, which shows a run."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any  # A config is imported only by commands that have one.

from jaxmerge.cli import progress
from jaxmerge.cli.command import (
  Changes,
  Command,
  add_process_flags,
  add_run_flags,
  request_cpu_devices,
  start_devices,
)
from jaxmerge.parallel import preemption


def _add_atm_flags(parser: argparse.ArgumentParser) -> None:
  add_run_flags(parser, "the experiment", "folder for checkpoints, report and merged model")
  text = "after SIGTERM, abandon a round that takes longer than this; "
  text += f"default: {preemption.GRACE:g}"
  parser.add_argument("--grace", metavar="SECONDS", type=float, default=preemption.GRACE, help=text)
  add_process_flags(parser)


def _load_experiment(options: argparse.Namespace, changes: Changes) -> Any:
  from jaxmerge.experiments import config

  return config.load(options.config, changes)


def run_atm(options: argparse.Namespace, config: Any) -> None:
  """Tunes and merges as a config says, and prints the table, on the first process."""
  from jaxmerge import report as reports
  from jaxmerge.experiments import workdir as workdirs

  folder, plain = pathlib.Path(options.workdir), json.loads(config.to_json())
  workdirs.check(folder, plain, options.resume)
  if (record := workdirs.read_finished(folder, plain)) is not None and not options.distributed:
    progress.log("this run has finished; showing its results")
  else:
    start_devices(options, config.mesh.devices)
    from jaxmerge.experiments import run

    with progress.bars() as show, preemption.watch_sigterm(options.grace) as stop:
      record = run.run(config, options.workdir, resume=options.resume, progress=show, stop=stop)
  progress.output(reports.text(record))
  progress.output(f"report: {folder / 'report.html'}")


def _add_bench_flags(parser: argparse.ArgumentParser) -> None:
  add_run_flags(parser, "methods and what to try", "folder for the results")


def _load_bench(options: argparse.Namespace, changes: Changes) -> Any:
  from jaxmerge.experiments import bench_config

  return bench_config.load(options.config, changes)


def run_bench(options: argparse.Namespace, config: Any) -> None:
  """Merges the experts of an experiment by every method, and prints the leaderboard."""
  from jaxmerge.experiments import bench_config

  request_cpu_devices(bench_config.experiment_config(config, options.config, 0).mesh.devices)
  from jaxmerge.experiments import bench
  from jaxmerge.report import leaderboard, tables

  with progress.bars() as show:
    facts = bench.run(config, options.config, options.workdir, resume=options.resume, progress=show)
  table = leaderboard.table(facts)
  short = table._replace(head=table.head[:7], rows=[row[:7] for row in table.rows])
  progress.output(tables.to_text(short))
  progress.output(f"leaderboard: {pathlib.Path(options.workdir) / 'leaderboard.md'}")


def _add_compile_flags(parser: argparse.ArgumentParser) -> None:
  text = "an experiment, or a merge: a file, or the name of one of `jaxmerge configs`"
  parser.add_argument("--config", required=True, metavar="FILE", help=text)
  text = "chips and topology: v5e:4x4, v5p:4x4x4"
  parser.add_argument("--topology", required=True, metavar="NAME", help=text)
  text = "number of slices of that topology"
  parser.add_argument("--slices", type=int, default=1, metavar="N", help=text)
  parser.add_argument("--json", action="store_true", help="print JSON")


def _load_compile_config(options: argparse.Namespace, changes: Changes) -> Any:
  from jaxmerge.experiments import compile_config
  from jaxmerge.xla import chips

  chips.parse_topology(options.topology, options.slices)  # A wrong topology is reported first.
  return compile_config.load(options.config, changes)


def run_compile(options: argparse.Namespace, config: Any) -> None:
  """Compiles the programs of a config for TPUs, and prints memory, traffic and least time.

  Raises:
    ValueError: with the reason, where one of them does not fit.
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
  parser.add_argument("workdir", metavar="WORKDIR", help="the folder of the run")


def run_report(options: argparse.Namespace, config: Any) -> None:
  """Prints the table of a finished run, and redraws its page and plots."""
  from jaxmerge import report as reports
  from jaxmerge.experiments import workdir as workdirs

  folder = pathlib.Path(options.workdir)
  record = workdirs.read_record(folder)
  progress.output(reports.text(record))
  reports.write(record, folder)
  progress.output(f"report: {folder / 'report.html'}")


ATM = Command(
  "tune and merge models as a config says, compare them and write a report",
  _add_atm_flags,
  run_atm,
  _load_experiment,
  saved="the last saved round",
)
BENCH = Command(
  "merge the experts of an experiment by every method, and rank the methods",
  _add_bench_flags,
  run_bench,
  _load_bench,
  saved="the last finished method",
)
COMPILE = Command(
  "compile the programs of a config for TPUs, without a TPU: memory, traffic, least time",
  _add_compile_flags,
  run_compile,
  _load_compile_config,
)
REPORT = Command(
  "print the table of a finished run, and redraw its page and plots", _add_report_flags, run_report
)
