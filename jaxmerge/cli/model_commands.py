"""Commands on folders of models (`merge`, `inspect`, `diff`), and `methods`."""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any  # Any: a plan is imported only where needed.

from jaxmerge.cli import progress
from jaxmerge.cli.command import (
  Command,
  add_download_flag,
  add_json_flag,
  add_process_flags,
  add_replace_flag,
  start_devices,
)


def _add_merge_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "recipe", metavar="RECIPE.yml", help="YAML file: the models, and how to merge them"
  )
  parser.add_argument("out", metavar="OUT", help="output folder, or FILE.safetensors")
  text = "check everything, print the plan, and write nothing"
  parser.add_argument("--dry-run", action="store_true", help=text)
  add_process_flags(parser)
  add_replace_flag(parser)
  text = "resume an interrupted merge of the same recipe, or start over"
  parser.add_argument("--resume", choices=("auto", "never"), default="auto", help=text)
  text = "output format: safetensors, an Orbax checkpoint in OUT/state, or the layout of the base"
  parser.add_argument(
    "--out-format", choices=("safetensors", "orbax", "like:base"), default="safetensors", help=text
  )
  text = "allow NaN and infinity in the models"
  parser.add_argument("--allow-nonfinite", action="store_true", help=text)
  text = "follow mergekit's rules and arithmetic where they differ, as `compat:` does"
  parser.add_argument("--compat", choices=("mergekit",), help=text)
  text = "refuse keys of the recipe that mergekit ignores, as `strict: true` does"
  parser.add_argument("--strict", action="store_true", help=text)
  text = "then run this, without a shell; {out} is the result, its last line is JSON of scores"
  parser.add_argument("--evaluate", metavar="COMMAND", help=text)
  add_download_flag(parser)
  text = "then upload the result to this repository of the hub, private; its token is checked first"
  parser.add_argument("--push", metavar="OWNER/NAME", help=text)
  parser.add_argument("--public", action="store_true", help="push to a public repository")
  text = "maximum size of a weight file: 5GB, 500MB"
  parser.add_argument("--shard-size", type=parse_size, default="5GB", metavar="SIZE", help=text)


def parse_size(text: str) -> int:
  """Parses a number of bytes.

  >>> parse_size("5GB"), parse_size("500MB")
  (5000000000, 500000000)
  """
  units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
  for unit, factor in units.items():
    if text.upper().endswith(unit) and text[: -len(unit)].replace(".", "", 1).isdigit():
      return int(float(text[: -len(unit)]) * factor)
  raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 5GB or 500MB")


def run_merge(options: argparse.Namespace, config: Any) -> None:
  """Merges the models of a recipe; intermediate models lie beside OUT and are removed."""
  from jaxmerge.evaluation import external
  from jaxmerge.io.huggingface import single_file, upload
  from jaxmerge.io.tensors import tensor
  from jaxmerge.recipe import errors, run

  files, problems = tensor.Files(), list[Exception]()
  with errors.collect(problems):
    evaluate = None if options.evaluate is None else external.command(options.evaluate)
    if single_file.is_output(pathlib.Path(options.out)) and (options.evaluate or options.push):
      raise ValueError(f"{options.out}: --evaluate and --push need a folder; give one.")
  destination = None
  with errors.collect(problems):
    destination = _check_push(options)
  settings = run.Settings(
    replace=options.replace,
    resume=options.resume == "auto",
    download=options.download,
    strict=options.strict,
    compat=options.compat,
    shard_size=options.shard_size,
    nonfinite=options.allow_nonfinite,
    out_format=options.out_format,
  )
  # Problems are reported, and models downloaded, before jax is imported.
  planned = run.plan(options.recipe, options.out, settings, files, problems=problems)
  if options.dry_run:
    _print_dry_run(planned.plan, options, destination)
  errors.raise_all(planned.full)
  if options.dry_run:
    return
  start_devices(options, None)
  from jaxmerge.parallel import processes

  with progress.bars() as show:
    plan = run.execute(planned, files, functools.partial(progress.byte_counter, show))
  if processes.is_first():
    _print_result(plan, planned.out, evaluate)
    if destination is not None:
      progress.output(f"pushed: {upload.send(planned.out, destination)}")


def _check_push(options: argparse.Namespace) -> Any:
  """Checks with the hub where a result may be uploaded to; None if it is not."""
  from jaxmerge.io.huggingface import upload

  if options.push is None:
    if options.public:
      raise ValueError("--public says how to push: it needs --push OWNER/NAME.")
    return None
  return upload.check(options.push, private=not options.public)


def _print_dry_run(plan: Any, options: argparse.Namespace, destination: Any) -> None:
  from jaxmerge.files import describe, estimate
  from jaxmerge.io.huggingface import shard_writer

  size, out_format = options.shard_size, options.out_format
  progress.output("\n".join(describe.dry_run(plan, shard_size=size, out_format=out_format)))
  if (free := shard_writer.free(pathlib.Path(options.out))) is not None:
    progress.output(f"disk: {estimate.size(free)} free")
  if options.evaluate is not None:
    progress.output(f"then: {options.evaluate}")
  if destination is not None:
    from jaxmerge.files import finish
    from jaxmerge.io.huggingface import upload

    names = finish.names(plan, size, out_format)
    lines = upload.describe(destination, names, estimate.size(plan.bytes_written))
    progress.output("\n".join(lines))


def _print_result(plan: Any, out: pathlib.Path, evaluate: Callable[..., Any] | None) -> None:
  """Prints counts and notes of a merge, and evaluates the result."""
  from jaxmerge.evaluation import external
  from jaxmerge.files import outcomes
  from jaxmerge.io.huggingface import folder, single_file

  facts = folder.provenance(out)
  for name, provenance in {**facts.get("earlier", {}), "": facts}.items():
    which = f" of {name}" if name else ""
    progress.output(f"tensors{which}: {outcomes.line(provenance['counts'])}")
  for line in dict.fromkeys(n for p in (*plan.earlier.values(), plan) for n in p.notes):
    progress.output(f"note: {line}")
  if single_file.is_output(out):
    progress.output("note: a file has the weights alone, without config, tokenizer and model card.")
  progress.output(f"merged: {out}")
  if evaluate is not None:
    progress.output(f"evaluated: {progress.numbers(external.run(out, evaluate))}")


def _add_inspect_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("model", metavar="MODEL", help="a model, a checkpoint, or a PEFT adapter")
  add_download_flag(parser)
  text = "read the weights; show each tensor's xxh3_128, and equal tensors"
  parser.add_argument("--checksums", action="store_true", help=text)
  text = "read the weights; fail if they are not as jaxmerge wrote them"
  parser.add_argument("--check", action="store_true", help=text)
  add_json_flag(parser)


def run_inspect(options: argparse.Namespace, config: Any) -> None:
  """Shows the contents of a folder of weights."""
  from jaxmerge.files import inspection
  from jaxmerge.io.huggingface import hub
  from jaxmerge.report import inspection_text

  location = hub.locate(*hub.split(options.model), download=options.download)
  record = inspection.inspect(location.folder)
  size = sum(tensor["bytes"] for tensor in record["tensors"])
  with progress.bars() as show:
    if options.check:
      record = inspection.compare_checksums(record, progress.byte_counter(show, "read", size))
    elif options.checksums:
      record = inspection.add_checksums(record, progress.byte_counter(show, "read", size))
  progress.output(json.dumps(record, indent=1) if options.json else inspection_text.text(record))
  wrong = [
    n for key in ("changed", "missing", "added") for n in record.get("check", {}).get(key, [])
  ]
  if wrong:
    raise ValueError(
      f"{options.model}: {len(wrong)} tensors are not as recorded, {wrong[0]!r} the first."
    )


def _add_diff_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("base", metavar="BASE", help="the model that task vectors start from")
  parser.add_argument("models", metavar="MODEL", nargs="+", help="a model, or a PEFT adapter")
  add_download_flag(parser)
  text = "measure the energy in the top singular values of matching matrices"
  parser.add_argument("--singular", metavar="REGEX", help=text)
  parser.add_argument(
    "--top", metavar="N", type=int, default=16, help="how many singular values; default: 16"
  )
  parser.add_argument("--out", metavar="FOLDER", help="write diff.json and plots into it")
  text = "write a page with figures, spectra of a dozen matrices (or of --singular) among them"
  parser.add_argument("--page", metavar="FILE", help=text)


def run_diff(options: argparse.Namespace, config: Any) -> None:
  """Shows how models differ from their base."""
  if options.top < 1:
    raise ValueError(f"--top must be 1 or more, got {options.top}.")
  from jaxmerge.analysis import diff, spectra
  from jaxmerge.files import inputs
  from jaxmerge.io.huggingface import hub
  from jaxmerge.io.tensors.tensor import Files
  from jaxmerge.report import diff_page, diff_text
  from jaxmerge.report import figure_elements as figures

  if options.out is not None or options.page is not None:
    try:
      figures.figure(1.0)  # A missing Matplotlib is reported now, not after minutes.
    except ImportError as e:
      raise ValueError(str(e)) from e
  files = Files()
  try:
    references = [options.base, *options.models]
    names = inputs.short_names(options.models)
    folders = [hub.locate(*hub.split(r), download=options.download).folder for r in references]
    base = inputs.open_model(folders[0], files)
    models = diff.open_models(folders[1:], base, files, names)
    size = diff.size(base, models, options.singular)
    matrices: list[str] = []
    if options.page is not None:
      matrices = diff.matrices(base, options.singular) or spectra.choose(base)
      size += spectra.size(base, models, matrices)
    with progress.bars() as show:
      count = progress.byte_counter(show, "read", size)
      record = diff.compare(
        base, models, singular=options.singular, top=options.top, progress=count
      )
      spectra_by_matrix = spectra.measure(base, models, matrices, count)
  finally:
    files.close()
  progress.output(diff_text.text(record))
  for path in [] if options.out is None else diff_text.write(record, options.out):
    progress.output(f"wrote {path}")
  if options.page is not None:
    diff_page.write(record, spectra_by_matrix, options.page)
    progress.output(f"wrote {options.page}")


MERGE = Command(
  "merge the models of a recipe into a new folder",
  _add_merge_flags,
  run_merge,
  saved="the last finished tensors",
)
INSPECT = Command(
  "show a model's tensors, sizes, ties, and how it was merged",
  _add_inspect_flags,
  run_inspect,
)
DIFF = Command(
  "show how models differ from their base: norms, cosines, sign conflicts",
  _add_diff_flags,
  run_diff,
)
