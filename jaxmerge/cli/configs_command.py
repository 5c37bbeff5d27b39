"""`jaxmerge configs`: lists the configs shipped with the package, and copies one."""

from __future__ import annotations

import argparse
from typing import Any  # This command has no config.

from jaxmerge.cli import progress
from jaxmerge.cli.command import Command

_NEEDS = """\
atm and bench need the extra demo, for plots, digits and tokenizer: pip install 'jaxmerge[demo]'
compile needs the compiler of TPUs, not a TPU: pip install 'jaxmerge[tpu]'
To change one: jaxmerge configs copy NAME [PATH], then --config=PATH; or --config.KEY=VALUE."""


def _add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("action", nargs="?", metavar="copy", help="copy one, to edit it")
  parser.add_argument("name", nargs="?", metavar="NAME", help="which one")
  text = "the new file, or its folder; default: the working directory"
  parser.add_argument("path", nargs="?", metavar="PATH", help=text)


def run(options: argparse.Namespace, config: Any) -> None:
  """Lists the configs, or copies one.

  Raises:
    ValueError: for a copy of an unknown config, or of none.
    FileExistsError: if the new file exists.
  """
  from jaxmerge.experiments import shipped_configs

  names = shipped_configs.paths()
  if options.action == "copy":
    if options.name is None:
      raise ValueError(f"jaxmerge configs copy needs a name. Configs: {', '.join(names)}.")
    progress.output(str(shipped_configs.copy(options.name, options.path)))
    return
  if options.action is not None:
    name = options.action
    known = name in names
    hint = f"jaxmerge configs copy {name}" if known else f"`jaxmerge configs` lists {len(names)}"
    raise ValueError(f"{name!r} is {'a config' if known else 'no action'}: {hint}.")
  for name in names:
    header = shipped_configs.header(name)
    progress.output(f"{name}: {header.about}")
    progress.output(f"  {header.command}")
    if header.time:
      progress.output(f"  time: {header.time}")
    if header.needs:
      progress.output(f"  needs: {header.needs}")
  progress.output(f"\n{_NEEDS}")


CONFIGS = Command("list the configs that come with jaxmerge, or copy one to edit", _add_flags, run)
