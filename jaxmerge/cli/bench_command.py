"""The command `bench`: methods on the experts of an experiment, or on folders of models."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any  # A config is imported only by the form that has one.

from jaxmerge.cli import progress
from jaxmerge.cli.command import Changes, Command, add_download_flag, request_cpu_devices

WORKDIR = "runs/bench"
# Optional flags of the form for folders, with their defaults.
_OF_FOLDERS: dict[str, Any] = {
  "trials": 8,
  "keep": "best",
  "try": [],
  "score": "",
  "lower_is_better": False,
  "final": "",
  "seed": 0,
}
_NEEDED = ("base", "models", "evaluate", "methods")


def _add_flags(parser: argparse.ArgumentParser) -> None:
  text = "methods and settings to try, on the experts of an experiment; without it:"
  parser.add_argument("--config", metavar="FILE", help=text)
  text = "a folder, a checkpoint or a hub id; also model+adapter"
  parser.add_argument("--base", metavar="MODEL", help=text)
  parser.add_argument("--models", metavar="MODEL", nargs="+", help="the models to merge")
  text = "prints JSON of numbers for the folder {out}; run without a shell; their mean is the score"
  parser.add_argument("--evaluate", metavar="COMMAND", help=text)
  parser.add_argument(
    "--methods", metavar="NAMES", nargs="+", help="such as ties,tsv,iso_c; or all"
  )
  text = "the most settings to try per method; default: 8"
  parser.add_argument("--trials", type=int, metavar="N", help=text)
  text = "a fixed value, values, or a range: ties.density=0.2, ties.rule=kth,exact, tsv.scale=1..2"
  parser.add_argument("--try", action="append", metavar="METHOD.NAME=VALUES", help=text)
  text = "which of the numbers enter the score, such as gsm8k,mmlu; default: all"
  parser.add_argument("--score", metavar="NAMES", help=text)
  text = "lower scores are better, as for a loss"
  parser.add_argument("--lower-is-better", action="store_true", default=None, help=text)
  text = "like --evaluate on held-out rows, run once on the best merge of each method; reported"
  parser.add_argument("--final", metavar="COMMAND", help=text)
  text = "which merges stay on disk; default: best"
  parser.add_argument("--keep", choices=("best", "all", "none"), help=text)
  parser.add_argument("--seed", type=int, metavar="N", help="seed of random masks; default: 0")
  add_download_flag(parser)
  text = f"folder for the results; default: {WORKDIR}; required with --config"
  parser.add_argument("--workdir", metavar="FOLDER", help=text)
  resume = "resume the run in the workdir: if there is one; never; or fail if there is none"
  parser.add_argument("--resume", choices=("auto", "never", "must"), default="auto", help=resume)


def _load(options: argparse.Namespace, changes: Changes) -> Any:
  """Returns the config with --config, else the bench on folders."""
  flags = {n: getattr(options, n) for n in (*_NEEDED, *_OF_FOLDERS)}
  if options.config is None:
    if missing := [n for n in _NEEDED if not flags[n]]:
      raise ValueError(
        f"bench needs --{missing[0]}, or --config=FILE. For models of your own: jaxmerge bench "
        '--base MODEL --models MODEL MODEL --methods ties,tsv --evaluate "python score.py {out}".'
      )
    if changes:
      raise ValueError(f"--config.{changes[0][0]}: there is no config; give --config=FILE.")
    options.workdir = options.workdir or WORKDIR
    return _bench(flags, options.download)
  if extra := [n for n, value in flags.items() if value is not None]:
    name = extra[0].replace("_", "-")
    raise ValueError(f"--{name} is for models of your own: it does not go with --config.")
  if options.workdir is None:
    raise ValueError("bench --config needs --workdir=FOLDER, for the results.")
  from jaxmerge.experiments import bench_config

  return bench_config.load(options.config, changes)


def _bench(flags: Mapping[str, Any], download: bool) -> Any:
  from jaxmerge.evaluation import external
  from jaxmerge.experiments import folder_config

  values = {n: _OF_FOLDERS[n] if flags[n] is None else flags[n] for n in _OF_FOLDERS}
  for text in (flags["evaluate"], values["final"]):
    if text:
      external.command(text)  # A command that cannot be run is refused now.
  return folder_config.check(
    folder_config.Bench(
      flags["base"],
      tuple(flags["models"]),
      flags["evaluate"],
      _names(",".join(flags["methods"])),
      final=values["final"],
      trials=values["trials"],
      changes=parse_box(values["try"]),
      numbers=_names(values["score"]),
      lower_is_better=values["lower_is_better"],
      keep=values["keep"],
      seed=values["seed"],
      download=download,
    )
  )


def _names(text: str) -> tuple[str, ...]:
  return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_box(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Parses the search space of parameters.

  >>> parse_box(["tsv.scale=0.5..2", "ties.rule=kth,exact"])["tsv"]["scale"].high
  2.0
  """
  from jaxmerge.search.box import Axis

  result: dict[str, dict[str, Any]] = {}
  for text in texts:
    place, equals, words = text.partition("=")
    method, dot, name = place.partition(".")
    low, dots, high = words.partition("..")
    if not (equals and dot and name and words):
      raise ValueError(f"--try must be METHOD.NAME=VALUES, such as ties.density=0.2, got {text!r}.")
    if dots:
      try:
        axis = Axis(float(low), float(high))
      except ValueError as error:
        raise ValueError(f"--try {text}: {words} is not a range; write 0.5..2.") from error
      if axis.high <= axis.low:
        raise ValueError(f"--try {text}: the range must rise; write {high}..{low}.")
    else:
      axis = Axis(values=tuple(map(_value, words.split(","))))
    result.setdefault(method, {})[name] = axis
  return result


def _value(text: str) -> Any:
  words = {"true": True, "false": False, "none": None}
  if text.lower() in words:
    return words[text.lower()]
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      continue
  return text


def run(options: argparse.Namespace, config: Any) -> None:
  """Merges with every method, and prints the leaderboard."""
  if options.config is None:
    _run_folders(options, config)
    return
  from jaxmerge.experiments import bench_config

  request_cpu_devices(bench_config.experiment_config(config, options.config, 0).mesh.devices)
  from jaxmerge.experiments import bench

  with progress.bars() as show:
    facts = bench.run(config, options.config, options.workdir, resume=options.resume, progress=show)
  _print(facts, options.workdir)


def _run_folders(options: argparse.Namespace, bench: Any) -> None:
  from jaxmerge.experiments import folder_bench
  from jaxmerge.report import leaderboard

  folder = pathlib.Path(options.workdir)
  with progress.bars() as show:
    record = folder_bench.run(bench, folder, resume=options.resume, progress=show)
  _print(leaderboard.from_records([record]), folder)
  for name, reason in record["failed"].items():
    progress.output(f"{name} failed: {reason}")
  for path in sorted((folder / "merges").glob("*")) if bench.keep == "best" else []:
    progress.output(f"best merge: {path}")
  progress.output(f"report: {folder / 'report.html'}")


def _print(facts: Mapping[str, Any], folder: str | pathlib.Path) -> None:
  from jaxmerge.report import leaderboard, tables

  progress.output(tables.to_text(leaderboard.short(facts)))
  progress.output(f"leaderboard: {pathlib.Path(folder) / 'leaderboard.md'}")


BENCH = Command(
  "merge models by many methods, score each, and rank the methods",
  _add_flags,
  run,
  _load,
  saved="the last finished trial",
)
