"""`jaxmerge methods`: lists the methods, or explains one."""

from __future__ import annotations

import argparse
import inspect
import re
from typing import Any  # This command has no config.

from jaxmerge.cli import progress
from jaxmerge.cli.command import Command


def _add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "name", nargs="?", metavar="NAME", help="the method to explain; default: list all"
  )


def run(options: argparse.Namespace, config: Any) -> None:
  """Lists the methods, or explains one of them.

  Raises:
    ValueError: for an unknown name.
  """
  if options.name is None:
    _list()
  else:
    progress.output(explain(options.name))


def _list() -> None:
  from jaxmerge.catalog import lookup, tables

  width = max(map(len, lookup.METHODS))
  for name, entry in lookup.METHODS.items():
    rest = f"; leaves without a matrix view: {entry.fallback}" if entry.fallback else ""
    progress.output(f"{name:{width}}  {entry.formula}{tables.mark(entry)}")
    progress.output(f"{'':{width}}  {entry.paper}; needs {tables.needs(name)}")
    progress.output(f"{'':{width}}  {tables.cost(name)}{rest}")
    for parameter, p in entry.parameters.items():
      progress.output(f"{'':{width}}    {parameter}={p.default!r}: {p.doc}, {p.range}")
  progress.output("\nIn Python alone, on arrays in memory:")
  for name, other in lookup.OTHERS.items():
    progress.output(f"jaxmerge.{name}  {other.formula}{tables.mark(other)}")
    progress.output(f"{'':{width}}  {other.paper}; needs {other.needs}; gives {other.gives}")


def explain(name: str) -> str:
  """Returns what a method does, its formula, paper, parameters, needs and cost, and examples.

  Raises:
    ValueError: for an unknown name.
  """
  from jaxmerge.catalog import lookup

  if name in lookup.OTHERS:
    return _explain_other(name)
  if name not in lookup.METHODS:
    from jaxmerge import errors

    known = [*lookup.METHODS, *lookup.OTHERS]
    raise ValueError(f"no method is called {name!r}{errors.nearest(name, known)}.")
  return _explain_method(name)


def _explain_method(name: str) -> str:
  from jaxmerge import methods
  from jaxmerge.catalog import lookup, tables

  entry = lookup.METHODS[name]
  about, example = _docstring(getattr(methods, name))
  models = {(1, None): "any number", (2, 2): "two"}.get(
    entry.models, f"{entry.models[0]} or more" if entry.models[1] is None else str(entry.models)
  )
  lines = [
    f"{name}{tables.mark(entry)}: {about}",
    "",
    f"formula  {entry.formula}",
    f"paper    {entry.paper}",
    f"merges   {entry.on.replace('either', 'weights or task vectors')} of {models} of models",
    f"needs    {tables.needs(name)}",
    f"cost     {tables.cost(name)}",
  ]
  if entry.fallback:
    lines.append(f"leaves without a matrix view: {entry.fallback}")
  lines += ["", "parameters" if entry.parameters else "no parameters"]
  for parameter, p in entry.parameters.items():
    kind = "" if p.number else "; a setting, fixed when the method is made"
    each = "; one for each model, or one for all" if p.each and "per model" not in p.doc else ""
    lines.append(f"  {parameter} = {p.default!r}  {p.doc}; {p.range}{each}{kind}")
  base = "" if entry.on == "weights" else ", base"
  seed = ", seed=0" if "seed" in entry.needs else ""
  lines += ["", "in Python", f"  jaxmerge.merge(jaxmerge.methods.{name}(), models{base}{seed})"]
  lines += ["in a recipe", f"  merge_method: {name}", "", *example]
  return "\n".join(lines).rstrip()


def _explain_other(name: str) -> str:
  import importlib

  from jaxmerge.catalog import lookup, tables

  other = lookup.OTHERS[name]
  package, _, function = name.partition(".")
  about, example = _docstring(getattr(importlib.import_module(f"jaxmerge.{package}"), function))
  lines = [
    f"jaxmerge.{name}{tables.mark(other)}: {about}",
    "",
    f"formula  {other.formula}",
    f"paper    {other.paper}",
    f"needs    {other.needs}",
    f"gives    {other.gives}",
    "",
    *example,
  ]
  return "\n".join(lines).rstrip()


def _docstring(function: Any) -> tuple[str, list[str]]:
  """Returns a function's docstring up to its arguments, and its example."""
  text = inspect.getdoc(function) or ""
  about, *_ = re.split(r"\n\n(?=(?:Args|Reference|Example|Raises|Returns):)", text)
  example = re.search(r"^Example:\n((?:  .*\n?|\n)+)", text, re.M)
  return about, ["example", *example[1].rstrip().split("\n")] if example else []


METHODS = Command(
  "list the merging methods, or explain one: formula, settings, paper", _add_flags, run
)
