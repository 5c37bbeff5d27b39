"""Results that later recipes of a file use: known at planning, readable once they are merged."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxmerge.files import inputs
from jaxmerge.files import plan as plans
from jaxmerge.io import formats
from jaxmerge.io.huggingface import folder
from jaxmerge.io.tensors.tensor import Files, NotYetMade, Tensor


class Intermediate(NamedTuple):
  """The result of a recipe that later recipes of the same file use as a model.

  Attributes:
    model: the future model, as planned; until `open` is called, reading a merged tensor raises
      NotYetMade, and a copied tensor has the bytes of its source.
    tensors: tensors of the opened folder, by name.
  """

  model: plans.Model
  tensors: dict[str, Tensor]

  def open(self, path: pathlib.Path, files: Files) -> None:
    """Opens the folder of the result, from which all tensors are then read."""
    files.forget(path)  # It may have been merged again.
    name = self.model.name
    opened = inputs.open_model(path, files, name=name, home=name)
    self.tensors.update({**opened.tied, **opened.tensors})


def of_plan(name: str, plan: plans.Plan, shard_size: int) -> Intermediate:
  """Returns the future result of a plan, under its recipe's name.

  Args:
    name: name of the recipe.
    plan: plan of the merge.
    shard_size: largest size of a weight file, in bytes.
  """
  tensors: dict[str, Tensor] = {}
  files = {n: file for file, names in plan.shards(shard_size).items() for n in names}
  planned = {
    o.name: Tensor(
      f"{name}/{files[o.name]}: tensor {o.name!r}", o.dtype, o.shape, _read(name, o, tensors)
    )
    for o in plan.outputs
  }
  text = plan.texts.get(folder.CONFIG)
  config = formats.config(plan.donor) if text is None else json.loads(text)
  model = plans.Model(name, plan.donor, planned, (), config, texts=plan.texts)
  return Intermediate(inputs.with_ties(model), tensors)


def _read(
  name: str, output: plans.Output, tensors: dict[str, Tensor]
) -> Callable[[int, np.ndarray], None]:
  """Returns a function that reads a tensor from the folder of the result, once it is open."""

  def read(start: int, out: np.ndarray) -> None:
    if output.name in tensors:
      tensors[output.name].read(start, out)
    elif output.job is None and output.base is not None and output.base.dtype == output.dtype:
      output.base.read(start, out)
    else:
      raise NotYetMade(f"{name} has not been merged yet.")

  return read
