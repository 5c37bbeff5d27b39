"""The record of a command, and flags that several commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple  # Any: a config is imported only by commands that have one.

Changes = Sequence[tuple[str, str]]  # Config keys and their new values as text.


class Command(NamedTuple):
  """A command of the command line.

  Attributes:
    about: one line for the help.
    add_flags: adds its arguments to its parser.
    run: (options, config) -> None: runs it and prints the results.
    load_config: (options, changes) -> the checked config; None for commands without one.
    saved: what an interrupted command resumes from; empty: it starts over.
  """

  about: str
  add_flags: Callable[[argparse.ArgumentParser], None]
  run: Callable[[argparse.Namespace, Any], None]
  load_config: Callable[[argparse.Namespace, Changes], Any] | None = None
  saved: str = ""


def add_run_flags(parser: argparse.ArgumentParser, config: str, workdir: str) -> None:
  """Adds the flags of commands that run a config in a folder, with their help texts."""
  text = f"{config}: a file, or the name of one of `jaxmerge configs`"
  parser.add_argument("--config", required=True, metavar="FILE", help=text)
  parser.add_argument("--workdir", required=True, metavar="FOLDER", help=workdir)
  resume = "resume the run in the workdir: if there is one, never, or fail without one"
  parser.add_argument("--resume", choices=("auto", "never", "must"), default="auto", help=resume)


def add_download_flag(parser: argparse.ArgumentParser) -> None:
  """Adds `--download`."""
  text = "download hub models that are not in the cache; without this, no network is used"
  parser.add_argument("--download", action="store_true", help=text)


def add_replace_flag(parser: argparse.ArgumentParser) -> None:
  """Adds `--replace`."""
  parser.add_argument("--replace", action="store_true", help="replace OUT if it exists")


def add_json_flag(parser: argparse.ArgumentParser) -> None:
  """Adds `--json`."""
  parser.add_argument("--json", action="store_true", help="print JSON")


def add_process_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of a command that many processes can share."""
  text = "run as one of many processes; discovered on Cloud TPU and Slurm, elsewhere pass:"
  parser.add_argument("--distributed", action="store_true", help=text)
  address, count, index = (
    os.environ.get(f"JAX_{name}") for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
  )
  text = "address of process 0; default: $JAX_COORDINATOR_ADDRESS"
  parser.add_argument("--coordinator", metavar="HOST:PORT", default=address, help=text)
  text = "number of processes; default: $JAX_NUM_PROCESSES"
  parser.add_argument("--processes", metavar="N", type=int, default=count, help=text)
  text = "index of this process, from 0; default: $JAX_PROCESS_ID"
  parser.add_argument("--process", metavar="I", type=int, default=index, help=text)


def check_process_flags(options: argparse.Namespace, arguments: Sequence[str]) -> None:
  """Raises ValueError for flags of many processes without `--distributed`."""
  flags = [a.split("=")[0] for a in arguments]
  for flag in ("--coordinator", "--processes", "--process"):
    if flag in flags and not options.distributed:
      raise ValueError(f"{flag} is for runs of many processes: add --distributed.")


def start_devices(options: argparse.Namespace, devices: int | None) -> None:
  """Requests CPU devices for a single process, or joins the other processes of a run."""
  if not options.distributed:
    request_cpu_devices(devices)
    return
  if devices is not None and options.processes:
    request_cpu_devices(
      max(1, devices // options.processes)
    )  # `devices` counts those of the whole run.
  from jaxmerge.cli import watchdog
  from jaxmerge.parallel import processes

  processes.start(options.coordinator, options.processes, options.process)
  if not processes.is_first():
    watchdog.quiet()


def request_cpu_devices(count: int | None) -> None:
  """Splits the CPU into `count` devices before jax starts; a user's flag takes precedence.

  It has no effect where jax finds an accelerator.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  name = "--xla_force_host_platform_device_count"
  if count is not None and name not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {name}={count}".strip()
