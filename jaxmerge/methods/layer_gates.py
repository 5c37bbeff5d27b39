"""Whole layers of task vectors that are merged or zeroed, by a score (LwPTV)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, Literal  # Any: reduction results are trees of arrays.

import jax.numpy as jnp
import numpy as np

from jaxmerge.catalog import lookup
from jaxmerge.core import magnitudes, sharding, stage, tree, wide_counts
from jaxmerge.core.stage import Array, Group, Leaf, Method, Stage, chain
from jaxmerge.methods import averages
from jaxmerge.methods.factory import named

Score = Callable[[Array, Leaf], Array]


def layer_of(name: str) -> str:
  """Returns the layer of a leaf: its name up to the first number, or without its last part.

  Layers that are stacked in one leaf count as one.

  Example:
    >>> layer_of("model.layers.11.mlp.up_proj.weight"), layer_of("embeddings/word/embedding")
    ('model.layers.11', 'embeddings/word')
  """
  numbered = re.match(r"(?:.*?[./_])??\d+(?=[./_]|$)", name)
  return numbered[0] if numbered else re.sub(r"[./][^./]*$", "", name)


@named
def gate(
  prune_ratio: float = 0.5,
  score: Literal["deviation", "relative_norm", "rms"] | Score = "deviation",
  prune: Literal["lowest", "highest"] = "lowest",
  layer: Callable[[str], str] = layer_of,
) -> Method:
  """Zeroes the layers of least score of each task vector; see `lwptv`.

  A method follows: `chain(gate(0.3), ties())`.

  Args:
    prune_ratio: floor(prune_ratio * L) of L layers are zeroed in each model.
    score: see `lwptv`; or a function (x [K, *s], leaf) -> [K] of a part of a leaf, whose values are
      added up over a layer and divided by the number of its entries.
    prune: see `lwptv`.
    layer: the layer that a leaf belongs to, by their names.

  Example:
    >>> import jaxmerge
    >>> x = {"0/w": jnp.array([[4.0], [1.0]]), "1/w": jnp.array([[1.0], [2.0]])}
    >>> jaxmerge.merge(chain(gate(score="rms"), averages.weighted_sum()), x)
    {'0/w': Array([4.], dtype=float32), '1/w': Array([2.], dtype=float32)}
  """
  lookup.check("lwptv", {"prune_ratio": prune_ratio, "prune": prune})
  if not callable(score):
    lookup.check("lwptv", {"score": score})

  def measure(x: Array, leaf: Leaf, known: Any) -> list[Array]:
    x = sharding.gather_models(x)
    if callable(score):
      parts = [magnitudes.plain(score(x, leaf))]
    elif score == "deviation":
      parts = [magnitudes.bin_sums(_sum, jnp.abs(x - jnp.mean(x, axis=0, keepdims=True)))]
    else:
      parts = [magnitudes.bin_sums(_squares, x)]
    if score == "relative_norm":
      parts.append(magnitudes.bin_sums(_squares, leaf.compared("gate").astype(x.dtype)[None]))
    is_layer = jnp.arange(known["sizes"].shape[0], dtype=jnp.int32) == _layer_index(leaf, known)
    return [jnp.where(is_layer[None, :, None], part[:, None], 0) for part in parts]

  def survivors(parts: list[Array], known: Any) -> Array:
    total, *bases = (magnitudes.join_bins(x, 1 if score == "deviation" else 2)[0] for x in parts)
    if score == "relative_norm":
      most = jnp.max(total, axis=0, keepdims=True)
      scores = total / jnp.where(most > 0, most, 1) / jnp.where(bases[0] > 0, bases[0], 1e-30)
    else:
      scores = total / jnp.asarray(known["sizes"], total.dtype)[:, None]
    count = scores.shape[0]
    order = jnp.argsort(jnp.argsort(scores, axis=0, stable=True), axis=0).astype(jnp.uint32)
    pruned = jnp.asarray(known["pruned"])[None]
    return order >= pruned if prune == "lowest" else order + pruned < count

  def update(x: Array, leaf: Leaf, known: Any) -> Array:
    mask = known["kept"][_layer_index(leaf, known)]
    return jnp.where(mask.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0)

  measured = stage.Sum("kept", measure, finish=survivors)
  init = functools.partial(_layers, layer)
  return Method((Stage(update, (measured,), init, {"prune_ratio": prune_ratio}),))


def _layers(layer: Callable[[str], str], group: Group) -> dict[str, Any]:
  """Returns the layer of each leaf by its tag, the layers' sizes, and how many are pruned."""
  layers = sorted({layer(n) for n in group.shapes})
  places = [layers.index(layer(n)) for n in group.shapes]
  sizes = np.zeros(len(layers))
  np.add.at(sizes, places, [np.prod(s) for s in group.shapes.values()])
  pruned = wide_counts.share(group.hparam("prune_ratio"), len(layers), group.num_models)
  return {
    "tags": np.array([tree.tag(n) for n in group.shapes], np.uint32),
    "places": np.array(places, np.int32),
    "sizes": np.maximum(sizes, 1).astype(np.float32),
    "pruned": pruned[1],
  }


def _layer_index(leaf: Leaf, known: Any) -> Array:
  return jnp.asarray(known["places"])[jnp.argmax(jnp.asarray(known["tags"]) == leaf.tag)]


def _sum(x: Array) -> Array:
  return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def _squares(x: Array) -> Array:
  return _sum(x * x)


@named
def lwptv(
  prune_ratio: float = 0.5,
  scale: float = 0.3,
  weight: float | tuple[float, ...] = 1.0,
  score: Literal["deviation", "relative_norm", "rms"] = "deviation",
  prune: Literal["lowest", "highest"] = "lowest",
) -> Method:
  """Adds up the task vectors without those layers of each that hardly stand out.

  Experimental: the paper's score could not be read; "deviation" is a reconstruction.

  Args:
    prune_ratio: floor(prune_ratio * L) of L layers are left out in each model; layers are those of
      `layer_of`.
    scale: factor on the sum.
    weight: weight of each task vector, scalar or one per model.
    score: of a layer: "deviation", the mean distance from the mean task vector; "relative_norm",
      the norm beside the base's; "rms", the root of the mean square.
    prune: whether layers of lowest or of highest score are left out; among equal ones, the first by
      name is the lowest.

  Reference: Zhang et al. 2025, Merging smarter, generalizing better (arXiv:2506.09093).

  Example:
    >>> import jaxmerge
    >>> x = {"0/w": jnp.array([[4.0], [1.0]]), "1/w": jnp.array([[1.0], [2.0]])}
    >>> jaxmerge.merge(lwptv(0.5, scale=1.0, score="rms"), x, deltas=True)
    {'0/w': Array([4.], dtype=float32), '1/w': Array([2.], dtype=float32)}
  """
  lookup.check("lwptv", {"scale": scale, "weight": weight})
  pruned = gate(prune_ratio, score, prune)
  return chain(pruned, averages.weighted_sum(weight), averages.scaled(scale))
