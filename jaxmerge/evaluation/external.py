"""Evaluates a merged model once it is complete: by a command, or by a function of its folder."""

from __future__ import annotations

import json
import math
import os
import pathlib
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from typing import Any  # Any: what JSON, or a function of the user's, holds.

from jaxmerge.io.disk import atomic

NAME = "jaxmerge_evaluation.json"
OUT = "{out}"

Evaluate = Callable[[pathlib.Path], Mapping[str, Any]]


def command(text: str) -> Evaluate:
  """Returns what runs a command on a folder and reads the numbers that it prints.

  No shell is used. What the command prints is a JSON object of numbers, or its last line is.

  Args:
    text: the command; `{out}` in it stands for the folder.

  Raises:
    ValueError: for a command that cannot be run.
  """
  try:
    words = shlex.split(text)
  except ValueError as error:
    raise ValueError(f"the command {text!r} cannot be read: {error}.") from error
  if not any(OUT in word for word in words):
    raise ValueError(f"the command {text!r} must have {OUT}, where the folder's path belongs.")
  if shutil.which(words[0]) is None:
    raise ValueError(f"the command {text!r}: there is no program {words[0]!r}.")

  def run(out: pathlib.Path) -> Mapping[str, Any]:
    own = [word.replace(OUT, str(out)) for word in words]
    done = subprocess.run(own, stdout=subprocess.PIPE, check=False)
    if done.returncode:
      raise ValueError(f"{shlex.join(own)} ended with status {done.returncode}.")
    return printed(done.stdout.decode("utf-8", "replace"))

  return run


def printed(text: str) -> Mapping[str, Any]:
  r"""Reads the JSON object that a text is, or that its last line is.

  >>> printed('{"accuracy": 0.5}'), printed('loading\n{"accuracy": 0.5}\n')
  ({'accuracy': 0.5}, {'accuracy': 0.5})
  """
  last = (text.strip().splitlines() or [""])[-1]
  for candidate in (text, last):
    try:
      found = json.loads(candidate)
    except ValueError:
      continue
    if isinstance(found, dict):
      return found
  raise ValueError(f"the last line that it prints must be a JSON object, got {last!r:.200}.")


def evaluated(out: str | os.PathLike[str], evaluate: Evaluate) -> dict[str, int | float]:
  """Evaluates a folder that is complete, writes the numbers into it, and returns them.

  Args:
    out: the folder; the numbers are in its `jaxmerge_evaluation.json`.
    evaluate: folder -> numbers by name.

  Raises:
    ValueError: where that fails, or returns what is no number; the folder stays as it is.
  """
  out = pathlib.Path(out)
  try:
    found = numbers(evaluate(out))
  except (OSError, ValueError) as error:
    complete = f"the merge is complete, in {out}, but its evaluation failed"
    raise ValueError(f"{complete}: {error}") from error
  with atomic.write(out / NAME) as file:
    file.write((json.dumps(found, indent=1) + "\n").encode())
  return found


def numbers(found: Mapping[str, Any]) -> dict[str, int | float]:
  """Returns finite numbers by name as plain ones, also where they are arrays' scalars."""
  if not isinstance(found, Mapping) or not found:
    raise ValueError(f"an evaluation must give numbers by name, got {found!r:.200}.")
  own = {str(name): x.item() if hasattr(x, "item") else x for name, x in found.items()}
  for name, x in own.items():
    number = isinstance(x, int | float) and not isinstance(x, bool)
    if not number or (isinstance(x, float) and not math.isfinite(x)):
      raise ValueError(f"{name} must be a finite number, got {x!r:.200}.")
  return own
