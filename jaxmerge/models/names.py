"""Name tables: the parameters of a model here, and the tensors of a Hugging Face file.

A table is a list of rules that is read in both directions; `{layer}` stands for a layer's number.
Dense kernels are [in, out] here and [out, in] in files: rules say which tensors are transposed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
  """One line of a table: a name here, the name in files, and whether the matrix is transposed."""

  ours: str
  theirs: str
  transposed: bool = False


def dense(ours: str, theirs: str) -> tuple[Rule, Rule]:
  """Returns the rules of a dense layer: a transposed kernel and a bias."""
  return (
    Rule(f"{ours}/kernel", f"{theirs}.weight", transposed=True),
    Rule(f"{ours}/bias", f"{theirs}.bias"),
  )


def norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
  """Returns the rules of a layer norm: a scale and a bias."""
  return Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")


def expand(rules: Iterable[Rule], num_layers: int) -> tuple[Rule, ...]:
  """Writes out the rules that hold for every layer.

  >>> expand([Rule("h_{layer}/bias", "h.{layer}.bias")], 2)[1]
  Rule(ours='h_1/bias', theirs='h.1.bias', transposed=False)
  """
  return tuple(
    Rule(rule.ours.format(layer=k), rule.theirs.format(layer=k), rule.transposed)
    for rule in rules
    for k in range(num_layers if "{layer}" in rule.theirs else 1)
  )


def to_ours(
  tensors: Mapping[str, np.ndarray], rules: Sequence[Rule], rest: str, *, where: str = "the file"
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Splits the tensors of a file into our leaves by name, and the rest that the model does not use.

  Args:
    tensors: the tensors of a file by name.
    rules: an expanded table.
    rest: regular expression for names that may be there and that the model does not use.
    where: the file, for errors.

  Raises:
    ValueError: naming each tensor that is missing, and each that table and `rest` do not know.
  """
  wanted = {rule.theirs: rule for rule in rules}
  check(tensors, wanted, rest, where=where)
  ours = {rule.ours: _transpose(tensors[name], rule, where) for name, rule in wanted.items()}
  return ours, {name: x for name, x in tensors.items() if name not in wanted}


def check(
  tensors: Iterable[str], wanted: Iterable[str], rest: str, *, where: str = "the file"
) -> None:
  """Compares the names of a file's tensors with those that a model has.

  Raises:
    ValueError: naming each that is missing, and each that neither the model nor `rest` knows.
  """
  present, expected = set(tensors), set(wanted)
  missing = [name for name in wanted if name not in present]
  unknown = [name for name in tensors if name not in expected and not re.fullmatch(rest, name)]
  if missing or unknown:
    raise ValueError(f"{where}: {_difference(missing, unknown)}")


def to_theirs(leaves: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> dict[str, np.ndarray]:
  """Returns the tensors of a file from our leaves by name; the inverse of `to_ours`.

  Raises:
    ValueError: naming each leaf that is missing, and each that the table does not know.
  """
  wanted = {rule.ours: rule for rule in rules}
  missing = [name for name in wanted if name not in leaves]
  unknown = [name for name in leaves if name not in wanted]
  if missing or unknown:
    raise ValueError(f"the parameters: {_difference(missing, unknown)}")
  return {
    rule.theirs: _transpose(leaves[name], rule, "the parameters") for name, rule in wanted.items()
  }


def _transpose(x: np.ndarray, rule: Rule, where: str) -> np.ndarray:
  if not rule.transposed:
    return x
  if x.ndim != 2:
    raise ValueError(
      f"{where}: {rule.theirs!r} ({rule.ours!r} here) must be a matrix, got shape {list(x.shape)}."
    )
  return np.ascontiguousarray(x.T)


def _difference(missing: list[str], unknown: list[str]) -> str:
  parts = []
  if missing:
    parts.append(f"{len(missing)} missing ({_some(missing)})")
  if unknown:
    near = difflib.get_close_matches(unknown[0], missing, 1)
    hint = f"; is {unknown[0]!r} meant to be {near[0]!r}?" if near else ""
    parts.append(f"{len(unknown)} unknown ({_some(unknown)}){hint}")
  return "names do not match the model's table: " + ", ".join(parts) + "."


def _some(names: list[str], most: int = 8) -> str:
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(repr(name) for name in names[:most]) + more
