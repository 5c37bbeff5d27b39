"""Reads the checkpoints of a run in a recipe: {run, steps}, or {run, tokens}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any  # Any: values of YAML.

from jaxmerge.files import runs
from jaxmerge.io.checkpoints import places
from jaxmerge.recipe.errors import Problem, add, join_some
from jaxmerge.recipe.records import Model
from jaxmerge.recipe.syntax import fields
from jaxmerge.recipe.syntax.yaml_reader import Node

RUN = "run"
KEYS = (RUN, "steps", "tokens", "tokens_per_step")


def models(node: Node, nodes: Mapping[str, Node], problems: list[Problem]) -> tuple[Model, ...]:
  """Returns a model for each selected checkpoint, in the order of steps.

  The run is read from disk, because only its folder says which steps are the last.

  Args:
    node: the item of the recipe.
    nodes: the item's values by key.
    problems: list to which problems are added.
  """
  if RUN not in nodes:
    return ()
  path = fields.text(nodes[RUN], RUN, problems)
  wanted = {key: _plain(nodes[key]) for key in KEYS[1:] if key in nodes}
  place = nodes.get("steps", nodes.get("tokens", nodes[RUN])).place
  try:
    run = runs.open_run(path)
    chosen = runs.select(run, wanted.pop("steps", None), **wanted)
  except (OSError, ValueError) as error:
    add(problems, place, str(error))
    return ()
  if run.unfinished:
    names = join_some([p.name for p in run.unfinished], most=3)
    text = f"{run.folder}: {names} {'is' if len(run.unfinished) == 1 else 'are'} half written"
    add(problems, node.place, f"{text}: not read.", ignored=True)
  return tuple(
    Model(
      places.place(c.folder).text, step=c.step, hint=_hint(c, chosen, run), place=nodes[RUN].place
    )
    for c in chosen
  )


def _hint(broken: runs.Checkpoint, chosen: tuple[runs.Checkpoint, ...], run: runs.Run) -> str:
  """Returns advice on how to merge without a broken checkpoint."""
  others = [c.step for c in chosen if c is not broken]
  if not others:
    return f" Or choose another step of {run.folder}."
  return f" Without this step: steps: [{', '.join(map(str, others))}]."


def _plain(node: Node) -> Any:
  """Returns the value of a node, or a list of the values of its items."""
  if isinstance(node.value, tuple):
    return [_plain(each) for each in node.value]
  return {} if isinstance(node.value, dict) else node.value
