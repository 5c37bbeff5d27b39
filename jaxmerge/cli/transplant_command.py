"""The command `transplant`: gives a model the tokenizer of another model."""

from __future__ import annotations

import argparse
import functools
import json
from typing import Any  # A command without a config gets None.

from jaxmerge.cli import progress
from jaxmerge.cli.command import Command, add_download_flag, add_json_flag, add_replace_flag


def _add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("model", metavar="MODEL", help="the model that gets another tokenizer")
  parser.add_argument("donor", metavar="DONOR", help="the model with that tokenizer")
  parser.add_argument("out", metavar="OUT", help="folder for the result")
  text = "embeddings of new tokens: omp, a sparse fit by other tokens; interpolate, of the nearest "
  text += "tokens; mean, of all tokens; zero"
  methods = ("omp", "interpolate", "mean", "zero")
  parser.add_argument("--method", choices=methods, default="omp", help=text)
  text = "the most tokens that a new row combines; default: 64"
  parser.add_argument("-k", type=int, default=64, metavar="N", help=text)
  text = "interpolate: nearest by cosine instead of distance"
  parser.add_argument("--cosine", action="store_true", help=text)
  text = "match byte tokens, such as <0x41>, to their characters"
  parser.add_argument("--match-bytes", action="store_true", help=text)
  text = "new tokens get the row of their longest prefix in the model's vocabulary"
  parser.add_argument("--match-prefixes", action="store_true", help=text)
  text = "new tokens at a time: fewer take less memory; default: 512"
  parser.add_argument("--batch", type=int, default=512, metavar="N", help=text)
  add_replace_flag(parser)
  add_json_flag(parser)
  add_download_flag(parser)


def run(options: argparse.Namespace, config: Any) -> None:
  """Transplants a tokenizer, and prints how its tokens were matched."""
  from jaxmerge.recipe.tokenizer import transplant

  with progress.bars() as show:
    record = transplant.transplant(
      options.model,
      options.donor,
      options.out,
      method=options.method,
      k=options.k,
      cosine=options.cosine,
      match_bytes=options.match_bytes,
      match_prefixes=options.match_prefixes,
      batch=options.batch,
      replace=options.replace,
      download=options.download,
      progress=functools.partial(progress.byte_counter, show),
    )
  if options.json:
    progress.output(json.dumps(record, indent=1))
    return
  counts = ", ".join(f"{count} {how}" for how, count in record["tokens"].items() if count)
  progress.output(f"tokens: {counts}")
  for name, error in record["errors"].items():
    if error is not None:
      progress.output(f"{name}: relative error of the new rows, on average: {error:.4f}")
  progress.output(f"transplanted: {options.out}")


TRANSPLANT = Command("give a model the tokenizer of another one", _add_flags, run)
