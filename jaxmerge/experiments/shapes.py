"""What an experiment or a merge would run on, in shapes alone: from a config, without any data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple  # Any: configs are plain trees.

import jax
import jax.numpy as jnp

from jaxmerge.core import layouts
from jaxmerge.models import bert, cnn, encoder, llama
from jaxmerge.parallel import mesh as meshes
from jaxmerge.tasks import batch, images, text

Struct = jax.ShapeDtypeStruct


class Shapes(NamedTuple):
  """An experiment without its numbers.

  Attributes:
    apply: the model, (params, inputs, head) -> outputs.
    params: tree of the shapes of one model, float32.
    counts: by name of each task, its rows to tune on.
    inputs: tree of the shapes of one row.
    labels: shape of the labels of one row.
    head: features and classes of the widest frozen head, or None.
    layout: matrix views of the leaves.
    rules: how weights are split over the mesh's model axis.
  """

  apply: batch.Apply
  params: Any
  counts: dict[str, int]
  inputs: Any
  labels: tuple[int, ...]
  head: tuple[int, int] | None
  layout: layouts.Said
  rules: meshes.Rules = ()

  def rows(self, height: int) -> batch.Rows:
    """The rows of all tasks, stacked and padded to a number of slots."""
    longest = max(self.counts.values())

    def stacked(*shape: int, dtype: Any = jnp.int32) -> Any:  # It stands for an array.
      return Struct((height, *shape), dtype)

    return batch.Rows(
      jax.tree.map(lambda s: stacked(longest, *s.shape, dtype=s.dtype), self.inputs),
      stacked(longest, *self.labels),
      None if self.head is None else stacked(*self.head, dtype=jnp.float32),
      stacked(),
      stacked(),
    )


def images4(config: Mapping[str, Any]) -> Shapes:
  """The small CNN, and as many pictures as the config asks for."""
  rows = dict(config["data"])["train"]
  # The digits are fewer, see `images.load`.
  counts = {n: max(1, rows * 1797 // images.ROWS) if n == "digits" else rows for n in images.NAMES}
  params = jax.eval_shape(cnn.init, jax.random.key(0))
  picture, head = Struct((28, 28), jnp.uint8), (cnn.FEATURES, 10)
  return Shapes(cnn.apply, params, counts, picture, (), head, layouts.check(cnn.VIEWS))


# all-MiniLM-L6-v2, by its config.json.
MINILM = encoder.Config(30522, 384, 6, 12, 1536, 512)


def minilm8(config: Mapping[str, Any]) -> Shapes:
  """The MiniLM encoder, and texts of the config's length."""
  data = dict(config["data"])
  names = data.get("tasks") or text.NAMES
  head = (MINILM.hidden_size, max(len(text.classes(n)) for n in names))
  counts = {n: min(data.get("train") or text.TRAIN[n], text.TRAIN[n]) for n in names}
  ids = Struct((config["model"]["length"],), jnp.int32)
  params = jax.eval_shape(lambda: bert.init(MINILM, jax.random.key(0)))
  model = bert.apply(MINILM, jnp.dtype(config["compute_dtype"]))
  row = {"ids": ids, "mask": ids}
  return Shapes(model, params, counts, row, (), head, layouts.check(bert.VIEWS))


def decoder(config: Mapping[str, Any]) -> Shapes:
  """A decoder, and rows of the config's length: each token's label is the next one.

  A task has as many rows as the config asks for; one of fewer documents would have fewer.
  """
  own, model = llama.of_fields(dict(config["model"]), jnp.dtype(config["compute_dtype"]))
  data = dict(config["data"])
  params = jax.eval_shape(lambda: llama.init(own, jax.random.key(0)))
  counts = {str(name): int(data["train"]) for name in data["domains"]}
  row = Struct((data["length"],), jnp.int32)
  layout = layouts.check(llama.VIEWS)
  return Shapes(model, params, counts, row, (data["length"],), None, layout, llama.SHARDING)


MAKERS: Mapping[str, Callable[[Mapping[str, Any]], Shapes]] = {
  "images4": images4,
  "minilm8": minilm8,
  "domains6": decoder,
  "decoder": decoder,
}


def make(config: Mapping[str, Any]) -> Shapes:
  """Returns the shapes of the experiment that a config names.

  Raises:
    ValueError: for an experiment whose shapes are not known.
  """
  name = config["experiment"]
  if name not in MAKERS:
    raise ValueError(f"experiment must be one of {', '.join(MAKERS)}, got {name!r}.")
  return MAKERS[name](config)
