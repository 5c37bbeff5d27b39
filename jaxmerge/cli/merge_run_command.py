"""`jaxmerge merge-run`: merges the newest checkpoints along a run, and scores each merge."""

from __future__ import annotations

import argparse
import functools
import pathlib
from typing import Any  # A config is imported only by commands that have one.

from jaxmerge.catalog import lookup
from jaxmerge.cli import progress
from jaxmerge.cli.command import Command
from jaxmerge.cli.model_commands import parse_size

_PARAMETERS = ("kind", "decay", "zero_at", "alpha", "start")


def _add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("run", metavar="RUN", help="the run: a folder with one folder per step")
  text = "folder for merge_run.json, .md and .png, and for the merges"
  parser.add_argument("out", metavar="OUT", help=text)
  text = "run this on each merge, without a shell; {out} is its folder, and the last line JSON of "
  text += "numbers"
  parser.add_argument("--evaluate", metavar="COMMAND", required=True, help=text)
  text = "number of checkpoints per merge; default: 8"
  parser.add_argument("--window", metavar="N", type=int, default=8, help=text)
  text = "merge at every N-th checkpoint, and at the newest; default: 4"
  parser.add_argument("--every", metavar="N", type=int, default=4, help=text)
  text = "which checkpoints to use: 1000:9000, 'last 20'; default: all"
  parser.add_argument("--steps", metavar="STEPS", default="all", help=text)
  _add_weight_flags(parser)
  text = "the number that ranks merges; may be omitted if there is only one"
  parser.add_argument("--metric", metavar="NAME", help=text)
  parser.add_argument(
    "--lower-is-better", action="store_true", help="lower values of the metric are better"
  )
  text = "which merges stay on disk; default: best"
  parser.add_argument("--keep", choices=("best", "all", "none"), default="best", help=text)
  text = "also score the newest checkpoint of each window alone"
  parser.add_argument("--alone", action="store_true", help=text)
  text = "format of the weights: safetensors, or an Orbax checkpoint"
  parser.add_argument(
    "--out-format", choices=("safetensors", "orbax"), default="safetensors", help=text
  )
  text = "the largest size of a weight file: 5GB, 500MB"
  parser.add_argument("--shard-size", type=parse_size, default="5GB", metavar="SIZE", help=text)


def _add_weight_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the parameters of `checkpoint_average`, whose kind defaults to decay here."""
  parameters = lookup.entry("checkpoint_average").parameters
  for name in _PARAMETERS:
    p = parameters[name]
    text = f"{p.doc}; default: {'decay' if name == 'kind' else p.default}"
    options: dict[str, Any] = {"choices": p.choices} if p.choices else {"type": float}
    if not p.choices:
      options["metavar"] = "X"
    parser.add_argument(f"--{name.replace('_', '-')}", help=text, **options)


def run_merge_run(options: argparse.Namespace, config: Any) -> None:
  """Merges along a run, and prints the table."""
  from jaxmerge.recipe import merge_curve
  from jaxmerge.report import run_curve, tables

  chosen = {n: value for n in _PARAMETERS if (value := getattr(options, n)) is not None}
  with progress.bars() as show:
    record = merge_curve.merge_run(
      options.run,
      options.out,
      window=options.window,
      every=options.every,
      evaluate=options.evaluate,
      steps=options.steps,
      parameters={"kind": "decay", **chosen},
      metric=options.metric,
      lower_is_better=options.lower_is_better,
      keep=options.keep,
      alone=options.alone,
      out_format=options.out_format,
      shard_size=options.shard_size,
      message=lambda text: show({"message": text}),
      progress=functools.partial(progress.byte_counter, show),
    )
  progress.output(tables.to_text(run_curve.table(record)))
  progress.output(run_curve.sentence(record))
  out = pathlib.Path(options.out)
  progress.output(f"record: {out / 'merge_run.json'}, {out / 'merge_run.png'}")


MERGE_RUN = Command(
  "merge the newest checkpoints along a training run, and score each merge",
  _add_flags,
  run_merge_run,
  saved="the last scored merge",
)
