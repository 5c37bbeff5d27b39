"""The command `extract`: a PEFT adapter from a fine-tuned model and its base."""

from __future__ import annotations

import argparse
import functools
import json
from typing import Any  # A command without a config gets None.

from jaxmerge.cli import progress
from jaxmerge.cli.command import Command, add_download_flag, add_json_flag, add_replace_flag


def _add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("base", metavar="BASE", help="the base of the fine-tuned model")
  parser.add_argument("model", metavar="MODEL", help="the fine-tuned model")
  parser.add_argument("out", metavar="OUT", help="folder for the adapter")
  text = "rank of the factors; 128 if neither this nor --energy is given"
  parser.add_argument("--rank", type=int, metavar="N", help=text)
  text = "share of squared singular values to keep of each matrix, such as 0.9; --rank limits it"
  parser.add_argument("--energy", type=float, metavar="SHARE", help=text)
  text = "embeddings and heads that changed: saved whole, as factors, or left out"
  parser.add_argument("--embeddings", choices=("save", "lora", "skip"), default="save", help=text)
  text = "norms and other tensors that are not matrices: saved whole, or left out"
  parser.add_argument("--rest", choices=("save", "skip"), default="save", help=text)
  text = "biases that changed, unless all matrices have one: the module saved whole, or left out"
  parser.add_argument("--biases", choices=("save", "skip"), default="save", help=text)
  text = "only modules whose names match; may be repeated"
  parser.add_argument("--include", action="append", default=[], metavar="REGEX", help=text)
  text = "leave out modules whose names match; may be repeated"
  parser.add_argument("--exclude", action="append", default=[], metavar="REGEX", help=text)
  text = "save a module whole, by its name or the end of it; may be repeated"
  parser.add_argument("--save", action="append", default=[], metavar="MODULE", help=text)
  dtypes = ("float32", "bfloat16", "float16")
  parser.add_argument("--dtype", choices=dtypes, default="float32", help="dtype of the adapter")
  add_replace_flag(parser)
  add_json_flag(parser)
  add_download_flag(parser)


def run(options: argparse.Namespace, config: Any) -> None:
  """Extracts an adapter, and prints ranks and errors."""
  from jaxmerge.analysis import extract
  from jaxmerge.report import extract_text

  with progress.bars() as show:
    record = extract.extract_adapter(
      options.base,
      options.model,
      options.out,
      rank=options.rank,
      energy=options.energy,
      embeddings=options.embeddings,
      rest=options.rest,
      biases=options.biases,
      include=options.include,
      exclude=options.exclude,
      save=options.save,
      dtype=options.dtype,
      replace=options.replace,
      download=options.download,
      progress=functools.partial(progress.byte_counter, show),
    )
  progress.output(json.dumps(record, indent=1) if options.json else extract_text.text(record))
  if not options.json:
    progress.output(f"adapter: {options.out}")


EXTRACT = Command("write what a model adds to its base as a LoRA adapter", _add_flags, run)
