"""What each command does; the only place that prints results. A command takes its options."""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
from typing import Any  # A config, and a plan, are imported only by commands that have one.

from jaxmerge.cli import progress
from jaxmerge.parallel import preemption


def atm(options: argparse.Namespace, config: Any) -> None:
  """Tunes and merges as a config says, and prints the table; of many processes the first prints."""
  from jaxmerge import report as reports
  from jaxmerge.experiments import workdir as workdirs

  folder, plain = pathlib.Path(options.workdir), json.loads(config.to_json())
  workdirs.check(folder, plain, options.resume)
  if (record := workdirs.finished(folder, plain)) is not None and not options.distributed:
    progress.say("this run has finished: nothing is run again")
    progress.tell(reports.text(record))
    progress.tell(f"report: {folder / 'report.html'}")
    return
  joined(options, config.mesh.devices)
  from jaxmerge.experiments import run

  with progress.bars() as show, preemption.asked(options.grace) as stop:
    record = run.run(config, options.workdir, resume=options.resume, progress=show, stop=stop)
  progress.tell(reports.text(record))
  progress.tell(f"report: {folder / 'report.html'}")


def joined(options: argparse.Namespace, devices: int | None) -> None:
  """Asks for fake devices, and joins the other processes where there are some."""
  own = (options.coordinator, options.processes, options.process)
  if not options.distributed:
    fake_devices(devices)
    return
  if devices is not None and options.processes:
    fake_devices(max(1, devices // options.processes))  # They are those of the whole run.
  from jaxmerge.cli import watchdog
  from jaxmerge.parallel import processes

  processes.start(*own)
  if not processes.first():
    watchdog.quiet()


def bench(options: argparse.Namespace, config: Any) -> None:
  """Merges the experts of an experiment by every method, and prints the leaderboard."""
  from jaxmerge.experiments import bench_config

  fake_devices(bench_config.of_bench(config, options.config, 0).mesh.devices)
  from jaxmerge.experiments import bench
  from jaxmerge.report import leaderboard, tables

  with progress.bars() as show:
    facts = bench.run(config, options.config, options.workdir, resume=options.resume, progress=show)
  own = leaderboard.table(facts)
  short = own._replace(head=own.head[:7], rows=[row[:7] for row in own.rows])
  progress.tell(tables.to_text(short))
  progress.tell(f"leaderboard: {pathlib.Path(options.workdir) / 'leaderboard.md'}")


def compile(options: argparse.Namespace, config: Any) -> None:
  """Compiles the programs of a config for TPUs, and prints what they need and how fast they can be.

  Raises:
    ValueError: with the reason, where one of them does not fit.
  """
  from jaxmerge.xla import chips

  chips.set_environment()
  from jaxmerge.experiments import compilation
  from jaxmerge.report import compile_tables, tables

  place = chips.parse_topology(options.topology, options.slices)
  plain = json.loads(config.to_json())
  record = compilation.run(plain, place, lambda own: progress.say(compile_tables.line(own)))
  if options.json:
    progress.tell(json.dumps(record, indent=2))
  else:
    progress.tell(compile_tables.heading(record))
    progress.tell(tables.to_text(compile_tables.memory(record)))
    progress.tell(tables.to_text(compile_tables.traffic(record)))
  if bad := [own for own in record["programs"] if not own["fits"]]:
    raise ValueError(f"{bad[0]['name']} does not fit {options.topology}: {bad[0]['reason']}")


def fake_devices(count: int | None) -> None:
  """Asks for `count` devices on the CPU, before jax starts; the user's own flags stay.

  It has no effect where jax finds an accelerator.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  name = "--xla_force_host_platform_device_count"
  if count is not None and name not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {name}={count}".strip()


def merge(options: argparse.Namespace, config: Any) -> None:
  """Merges the models of a recipe; recipes that others build on are merged beside, and removed."""
  from jaxmerge.evaluation import external
  from jaxmerge.files import describe, estimate, outcomes
  from jaxmerge.io.huggingface import folder, shard_writer
  from jaxmerge.io.tensors import tensor
  from jaxmerge.recipe import errors, run

  out, files, wrong = pathlib.Path(options.out), tensor.Files(), list[Exception]()
  with errors.noted(wrong):
    evaluate = None if options.evaluate is None else external.command(options.evaluate)
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
  # All that is wrong is told before jax is imported, and all that is lacking fetched.
  planned = run.plan(options.recipe, out, settings, files, noted=wrong)
  if options.dry_run:
    size, kind = options.shard_size, options.out_format
    progress.tell("\n".join(describe.dry_run(planned.plan, shard_size=size, out_format=kind)))
    if (free := shard_writer.free(out)) is not None:
      progress.tell(f"disk: {estimate.size(free)} free")
    if evaluate is not None:
      progress.tell(f"then: {options.evaluate}")
  errors.check(planned.full)
  if options.dry_run:
    return
  joined(options, None)
  from jaxmerge.parallel import processes

  with progress.bars() as show:
    plan = run.execute(planned, files, functools.partial(progress.counted, show))
  if not processes.first():
    return
  facts = folder.provenance(out)
  for name, own in {**facts.get("earlier", {}), "": facts}.items():
    which = f" of {name}" if name else ""
    progress.tell(f"tensors{which}: {outcomes.line(own['counts'])}")
  for line in dict.fromkeys(n for own in (*plan.earlier.values(), plan) for n in own.notes):
    progress.tell(f"note: {line}")
  progress.tell(f"merged: {out}")
  if evaluate is not None:
    progress.tell(f"evaluated: {progress.numbers(external.run(out, evaluate))}")


def report(options: argparse.Namespace, config: Any) -> None:
  """Prints the table of a finished run, and remakes its page and plots."""
  from jaxmerge import report as reports
  from jaxmerge.experiments import workdir as workdirs

  folder = pathlib.Path(options.workdir)
  record = workdirs.record_of(folder)
  progress.tell(reports.text(record))
  reports.write(record, folder)
  progress.tell(f"report: {folder / 'report.html'}")


def inspect(options: argparse.Namespace, config: Any) -> None:
  """Shows what is in a folder of weights."""
  from jaxmerge.files import inspection
  from jaxmerge.io.huggingface import hub
  from jaxmerge.report import inspection_text

  found = hub.locate(*hub.split(options.model), download=options.download)
  record = inspection.inspect(found.folder)
  size = sum(tensor["bytes"] for tensor in record["tensors"])
  with progress.bars() as show:
    if options.check:
      record = inspection.compare_checksums(record, progress.counted(show, "read", size))
    elif options.checksums:
      record = inspection.add_checksums(record, progress.counted(show, "read", size))
  progress.tell(json.dumps(record, indent=1) if options.json else inspection_text.text(record))
  wrong = [
    n for key in ("changed", "missing", "added") for n in record.get("check", {}).get(key, [])
  ]
  if wrong:
    raise ValueError(
      f"{options.model}: {len(wrong)} tensors are not as recorded, {wrong[0]!r} the first."
    )


def diff(options: argparse.Namespace, config: Any) -> None:
  """Shows how models differ from their base."""
  if options.top < 1:
    raise ValueError(f"--top must be 1 or more, got {options.top}.")
  from jaxmerge.analysis import diff
  from jaxmerge.files import inputs
  from jaxmerge.io.huggingface import hub
  from jaxmerge.io.tensors.tensor import Files
  from jaxmerge.report import diff_text
  from jaxmerge.report import figure_elements as figures

  if options.out is not None:
    try:
      figures.figure(1.0)  # Matplotlib is missed now, and not after minutes.
    except ImportError as e:
      raise ValueError(str(e)) from e
  files = Files()
  try:
    given = [options.base, *options.models]
    called = inputs.short_names(options.models)
    folders = [hub.locate(*hub.split(m), download=options.download).folder for m in given]
    base = inputs.open_model(folders[0], files)
    models = diff.opened(folders[1:], base, files, called)
    size = diff.size(base, models, options.singular)
    with progress.bars() as show:
      record = diff.compare(
        base,
        models,
        singular=options.singular,
        top=options.top,
        progress=progress.counted(show, "read", size),
      )
  finally:
    files.close()
  progress.tell(diff_text.text(record))
  for path in [] if options.out is None else diff_text.write(record, options.out):
    progress.tell(f"wrote {path}")


def methods(options: argparse.Namespace, config: Any) -> None:
  """Lists the methods."""
  from jaxmerge.catalog import lookup, tables

  width = max(map(len, lookup.METHODS))
  for name, entry in lookup.METHODS.items():
    rest = f"; leaves without a matrix view: {entry.fallback}" if entry.fallback else ""
    progress.tell(f"{name:{width}}  {entry.formula}{tables.mark(entry)}")
    progress.tell(f"{'':{width}}  {entry.paper}; needs {tables.needs(name)}")
    progress.tell(f"{'':{width}}  {tables.cost(name)}{rest}")
    for parameter, p in entry.parameters.items():
      progress.tell(f"{'':{width}}    {parameter}={p.default!r}: {p.doc}, {p.range}")
  progress.tell("\nIn Python alone, on arrays in memory:")
  for name, other in lookup.OTHERS.items():
    progress.tell(f"jaxmerge.{name}  {other.formula}{tables.mark(other)}")
    progress.tell(f"{'':{width}}  {other.paper}; needs {other.needs}; gives {other.gives}")
