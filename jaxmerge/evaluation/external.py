"""Evaluates the folder of a finished merge with a command or a function."""

from __future__ import annotations

import json
import math
import os
import pathlib
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from typing import Any  # Any: values of JSON, or of a user's function.

from jaxmerge.io.disk import atomic

NAME = "jaxmerge_evaluation.json"
OUT = "{out}"

Evaluate = Callable[[pathlib.Path], Mapping[str, Any]]


def command(text: str) -> Evaluate:
  """Returns a function that runs a command on a folder and parses the numbers it prints.

  No shell is used. The output, or its last line, is a JSON object of numbers.

  Args:
    text: the command, with `{out}` for the folder.

  Raises:
    ValueError: for a command that cannot be run.
  """
  try:
    words = shlex.split(text)
  except ValueError as error:
    raise ValueError(f"the command {text!r} cannot be parsed: {error}.") from error
  if not any(OUT in word for word in words):
    raise ValueError(f"the command {text!r} must have {OUT} in place of the folder's path.")
  if shutil.which(words[0]) is None:
    raise ValueError(f"the command {text!r}: there is no program {words[0]!r}.")

  def run(out: pathlib.Path) -> Mapping[str, Any]:
    arguments = [word.replace(OUT, str(out)) for word in words]
    process = subprocess.run(arguments, stdout=subprocess.PIPE, check=False)
    if process.returncode:
      raise ValueError(f"{shlex.join(arguments)} ended with status {process.returncode}.")
    return parse(process.stdout.decode("utf-8", "replace"))

  return run


def parse(text: str) -> Mapping[str, Any]:
  r"""Reads a JSON object from a text, or from its last line.

  >>> parse('{"accuracy": 0.5}'), parse('loading\n{"accuracy": 0.5}\n')
  ({'accuracy': 0.5}, {'accuracy': 0.5})
  """
  last = (text.strip().splitlines() or [""])[-1]
  for candidate in (text, last):
    try:
      value = json.loads(candidate)
    except ValueError:
      continue
    if isinstance(value, dict):
      return value
  raise ValueError(f"the last line that it prints must be a JSON object, got {last!r:.200}.")


def run(out: str | os.PathLike[str], evaluate: Evaluate) -> dict[str, int | float]:
  """Evaluates a complete folder, writes the numbers into it, and returns them.

  Args:
    out: the folder; the numbers are in its `jaxmerge_evaluation.json`.
    evaluate: folder -> numbers by name.

  Raises:
    ValueError: if `evaluate` fails, or returns something else; the folder stays as it is.
  """
  out = pathlib.Path(out)
  try:
    numbers = check_numbers(evaluate(out))
  except (OSError, ValueError) as error:
    complete = f"the merge is complete, in {out}, but its evaluation failed"
    raise ValueError(f"{complete}: {error}") from error
  with atomic.write(out / NAME) as file:
    file.write((json.dumps(numbers, indent=1) + "\n").encode())
  return numbers


def check_numbers(values: Mapping[str, Any]) -> dict[str, int | float]:
  """Returns finite numbers by name; array scalars become Python numbers."""
  if not isinstance(values, Mapping) or not values:
    raise ValueError(f"an evaluation must return numbers by name, got {values!r:.200}.")
  numbers = {str(name): x.item() if hasattr(x, "item") else x for name, x in values.items()}
  for name, x in numbers.items():
    is_number = isinstance(x, int | float) and not isinstance(x, bool)
    if not is_number or (isinstance(x, float) and not math.isfinite(x)):
      raise ValueError(f"{name} must be a finite number, got {x!r:.200}.")
  return numbers
