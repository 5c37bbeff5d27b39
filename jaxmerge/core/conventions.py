"""How libraries lay out their weights: matrix views of leaves by their names and shapes.

A Flax `kernel` is [in, out], a PyTorch `weight` is [out, in]; an embedding is a lookup table, not a
matrix. If the name does not decide the layout, neighbouring leaves do: the length of the bias, the
other matrices of the same experts, an axis shared by a whole stack of layers. If nothing decides,
the rule is marked as open. Does not import jax.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from jaxmerge.core import kernel_axes, leaf_names
from jaxmerge.core.kernel_axes import Rule, Shape, Shapes
from jaxmerge.core.leaf_names import DOWN, UP, Name

FUSED = "experts one after the other in one matrix, which no view tells apart"

_VECTOR = re.compile(r"(.*_)?(bias|scale|gamma|beta|mean|var)|b|a_log")
_STACK = re.compile(r"(.*_)?(layers?|blocks?|stack|scan|repeat|h)|(scan|vmap).*")
_ONE = re.compile(r"(.*_)?(layer|block)")  # It may be a single one as well.
_CONV1D = {
  "c_attn": 0,
  "q_attn": 0,
  "c_fc": 0,
  "c_proj": 1,
}  # Which axis of [in, out] is longer: 0.


def rules(shapes: Shapes) -> dict[str, Rule]:
  """Returns the rule of each leaf of a model, by names and shapes alone.

  Args:
    shapes: shapes of all leaves, without a task axis. Pass every leaf: neighbours help to decide.

  Example:
    >>> table = rules({"up/kernel": (4, 8), "up/bias": (8,), "wte.weight": (50, 4)})
    >>> {name: rule.view for name, rule in table.items()}
    {'up/kernel': 'io', 'up/bias': None, 'wte.weight': 'li'}
  """
  model = _Model(shapes)
  return {name: model.rule(name) for name in shapes}


class _Model:
  """The names and shapes of a whole model."""

  def __init__(self, shapes: Shapes) -> None:
    self.shapes = shapes
    self.by_parts = {leaf_names.name(n).parts: n for n in shapes}
    self.names = {n: leaf_names.name(n) for n in shapes}
    self.stacks = self._stacks()
    self.alone = sum(self._reads_one_channel(n) for n in shapes)

  def rule(self, name: str) -> Rule:
    """The rule of one leaf."""
    shape, words = self.shapes[name], self.names[name]
    if len(shape) < 2:
      return Rule(None, "vector")
    if _VECTOR.fullmatch(words.leaf):
      return self._vectors(name)
    matrix = words.leaf in ("kernel", "weight", "w") or words.leaf.endswith("_weight")
    if not matrix and sum(n > 1 for n in shape) < 2:
      return Rule(None, "vector")
    if self._is_lookup(name):
      return Rule("l" * (len(shape) - 1) + "i", "lookup")
    unclear = words.leaf == "weight" and leaf_names.may_be_table(words.module)
    if unclear and len(shape) == 2 and self._beside(name, None) is None:
      return _open(shape)  # A table, or a layer that makes embeddings.
    if len(shape) == 2 and words.is_fused:
      return _open(shape)._replace(reason=FUSED)
    return self._stacked(name) or _open(shape)

  def _vectors(self, name: str) -> Rule:
    """Reads a bias or scale of several axes as one vector per layer or expert, if its matrix is."""
    words, shape = self.names[name], self.shapes[name]
    word = re.sub(r"_?bias$", "", words.leaf)
    beside = (word, f"{word}_weight") if word not in ("", words.leaf) else ("kernel", "weight", "w")
    matrices = [self.by_parts.get((*words.parts[:-1], leaf)) for leaf in beside]
    view = next((self.rule(n).view for n in matrices if n), None)
    axis = next((self.stacks[p] for p in self._paths(name) if p in self.stacks), None)
    if axis is not None and axis < len(shape):
      return Rule("i" * axis + "l" + "i" * (len(shape) - axis - 1), "vectors")
    many = len(shape) - 1 if view is None else min(view.count("b"), len(shape) - 1)
    return Rule("l" * many + "i" * (len(shape) - many) if many else None, "vectors")

  def _is_lookup(self, name: str) -> bool:
    """Returns whether a leaf is a lookup table, such as an embedding."""
    words = self.names[name]
    fits = len(self.shapes[name]) == 2 and self._beside(name, None) is None
    return leaf_names.is_table(words) and (fits or words.leaf != "weight")

  # --- Stacks of layers ---

  def _stacks(self) -> dict[tuple[str, ...], int | None]:
    """Maps the path of each stack of layers to the axis its leaves share, or None if unsure."""
    inside: dict[tuple[str, ...], list[str]] = {}
    for name in self.names:
      for path in self._paths(name):
        inside.setdefault(path, []).append(name)
    axis_of: dict[tuple[str, ...], int | None] = {}
    for path, leaves in inside.items():
      each = [self.shapes[n] for n in leaves]
      axes = [p for p in range(min(map(len, each))) if len({s[p] for s in each}) == 1]
      # Vectors decide: those of a single layer have one axis, stacked ones have two.
      sure = len(axes) == 1 and any(self._is_stacked_vector(n) for n in leaves)
      sure = sure and all(len(s) > 1 for s in each)
      if axes and any(len(s) > 2 for s in each) and len(set(each)) > 1 and (sure or _many(path)):
        axis_of[path] = axes[0] if sure else None
    return axis_of

  def _is_stacked_vector(self, name: str) -> bool:
    words = self.names[name]
    vector = _VECTOR.fullmatch(words.leaf) or (words.leaf == "weight" and "norm" in words.module)
    return bool(vector) and len(self.shapes[name]) > 1

  def _paths(self, name: str) -> list[tuple[str, ...]]:
    """Lists the paths to a leaf that end in a name for a stack of layers, without a number."""
    parts = self.names[name].parts
    ends = [at + 1 for at, p in enumerate(parts[:-1]) if _STACK.fullmatch(p.lower())]
    return [parts[:at] for at in ends if not parts[at].isdigit()]

  def _stacked(self, name: str) -> Rule | None:
    """Returns the rule of a matrix, without the layer axis if it is part of a stack of layers."""
    shape, paths = self.shapes[name], self._paths(name)
    axes = [self.stacks[p] for p in paths if p in self.stacks]
    if len(shape) < 3 or not paths:
      return self._matrix(name, shape, None)
    axis = axes[0] if axes else None
    if axis is None:  # Whether layers are stacked in it only a bias beside it tells.
      beside, single = self._beside(name, None), not axes and not any(map(_many, paths))
      tells = beside is not None and (not axes or len(beside) == 1)
      return self._matrix(name, shape, None) if single or tells else None
    if self._beside(name, None) == shape[1:] and not any(map(_many, paths)):
      return None  # One attention of as many heads as its inputs are looks the same.
    rule = self._matrix(name, shape[:axis] + shape[axis + 1 :], axis)
    if rule is None or rule.view is None or rule.open:
      return rule
    view = rule.view[:axis] + "b" + rule.view[axis:]
    return Rule(view, f"{rule.reason}, layers along axis {axis}")

  def _beside(self, name: str, axis: int | None) -> Shape | None:
    """Returns the shape of the bias next to a leaf, without the layer axis."""
    words = self.names[name]
    biases = [re.sub(r"(kernel|weight)$", "bias", words.leaf), f"{words.leaf}_bias"]
    for word in ["b"] if words.leaf == "w" else biases:
      bias = self.by_parts.get((*words.parts[:-1], word)) if word != words.leaf else None
      if bias is not None:
        shape = self.shapes[bias]
        return shape if axis is None else shape[:axis] + shape[axis + 1 :]
    return None

  def _matrix(self, name: str, shape: Shape, axis: int | None) -> Rule | None:
    """Returns the rule of a leaf of two or more axes, from its name and its neighbours."""
    words, bias = self.names[name], self._beside(name, axis)
    raw = words.leaf != "kernel" and words.is_up_or_down and not words.is_of_attention
    if len(shape) == 3 and (raw or words.is_of_experts):
      return self._experts(name, shape, axis, bias)
    if words.leaf == "kernel":
      heads = words.is_inward if len(shape) > 3 else words.is_inward or words.is_outward
      if len(shape) > 2 and bias is None and heads:
        return self._heads(words, shape, axis)
      return kernel_axes.kernel(words, shape, bias, alone=self.alone == 1)
    if words.leaf == "weight" or words.leaf.endswith("_weight"):
      if len(shape) == 2:
        return self._two(name, shape, bias)
      return kernel_axes.torch_convolution(words.module, shape, bias, alone=self.alone == 1)
    if words.leaf == "w" and len(shape) == 2 and bias is not None:
      return _by_bias(shape, bias)
    return None

  def _heads(self, words: Name, shape: Shape, axis: int | None) -> Rule | None:
    """Returns the rule of an attention kernel with a head axis, if its neighbours agree."""
    if len(set(shape)) == 1 or (len(shape) > 3 and "kv" not in words.module):
      return None
    for parts, other in self.by_parts.items():
      if parts[:-2] != words.parts[:-2] or self.names[other].is_inward == words.is_inward:
        continue
      there = self.shapes[other]
      there = there if axis is None else there[:axis] + there[axis + 1 :]
      inward, outward = (shape, there) if words.is_inward else (there, shape)
      is_pair = self.names[other].is_outward or not words.is_inward
      if is_pair and len(outward) == 3 and inward[:1] + inward[-1:] == outward[2:] + outward[1:2]:
        view = "i" + "o" * (len(shape) - 1) if words.is_inward else "iio"
        return Rule(view, "kernel of attention")
    return None

  def _reads_one_channel(self, name: str) -> bool:
    """Returns whether a leaf is a convolution of one channel: of the input, or depthwise."""
    words, shape = self.names[name], self.shapes[name]
    if len(shape) < 3 or words.leaf not in ("kernel", "weight"):
      return False
    return shape[-2 if words.leaf == "kernel" else 1] == 1

  # --- PyTorch's weights of two axes ---

  @functools.cached_property
  def turned(self) -> dict[str, set[str]]:
    """Maps module names to the views of two-axis weights that biases and shapes decide."""
    views: dict[str, set[str]] = {}
    for name, words in self.names.items():
      shape = self.shapes[name]
      if words.leaf == "weight" and len(shape) == 2 and not self._is_lookup(name):
        rule = _by_bias(shape, self._beside(name, None)) or _conv1d(words, shape)
        if rule is not None and rule.view is not None:
          views.setdefault(words.module, set()).add(rule.view)
    return views

  def _two(self, name: str, shape: Shape, bias: Shape | None) -> Rule | None:
    """Returns the rule of a two-axis weight: [out, in], or [in, out] as in GPT-2's Conv1D."""
    words = self.names[name]
    rule = _by_bias(shape, bias) or _conv1d(words, shape)
    if rule is not None:
      return rule
    if words.module in _CONV1D:  # Square: as the others of this kind lie.
      alike: set[str] = set().union(*(self.turned.get(n, set()) for n in _CONV1D))
      return Rule(alike.pop(), "as those beside it") if len(alike) == 1 else None
    alike = self.turned.get(words.module) or set().union(*self.turned.values())
    if shape[0] == shape[1] and alike == {"io"}:
      return Rule("io", "as those beside it")
    return Rule("oi", "weight")

  # --- Experts in one tensor ---

  @functools.cached_property
  def width(self) -> int | None:
    """Returns the width of the model, which is that of its lookup tables, if they agree."""
    widths = {s[-1] for n, s in self.shapes.items() if len(s) == 2 and self._is_lookup(n)}
    return widths.pop() if len(widths) == 1 else None

  def _experts(self, name: str, shape: Shape, axis: int | None, bias: Shape | None) -> Rule | None:
    """Returns the rule of experts stored in one tensor; its neighbours decide the order."""
    words = self.names[name]
    if bias is not None and len(bias) == 2 and shape[1] != shape[2] and bias[1] in shape[1:]:
      return Rule("boi" if bias[1] == shape[1] else "bio", "experts")
    if words.leaf == "kernel" and words.is_up_or_down:
      return Rule("bio", "experts")
    orders = self._orders(name, axis)
    return Rule(orders.pop(), "experts") if len(orders) == 1 else None

  def _orders(self, name: str, axis: int | None) -> set[str]:
    """Returns the orders that fit both the up and the down projections of the same experts."""
    path = self.names[name].parts
    at = len(path) - (2 if self.names[name].leaf in ("weight", "kernel") else 1)
    ups, downs = [], []
    for parts, other in self.by_parts.items():
      if len(parts) != len(path) or parts[:at] != path[:at] or parts[at + 1 :] != path[at + 1 :]:
        continue
      shape = self.shapes[other]
      shape = shape if axis is None else shape[:axis] + shape[axis + 1 :]
      if len(shape) == 3:
        ups += [shape[1:]] if UP.fullmatch(parts[at].lower()) else []
        downs += [shape[1:]] if DOWN.fullmatch(parts[at].lower()) else []
    if not self.names[name].is_up_or_down:
      return set()
    orders = {"boi", "bio"}
    for up in ups:  # As [out, in]: up is [inner or twice that, width], down [width, inner].
      orders &= _orders_of(up, downs, self.width)
    for down in downs if not ups else []:
      orders &= _orders_of(down[::-1], [], self.width)
    return orders


def _orders_of(up: Shape, downs: Iterable[Shape], width: int | None) -> set[str]:
  orders = set()
  for order, (inner, wide) in (("boi", up), ("bio", up[::-1])):
    each = downs if order == "boi" else [d[::-1] for d in downs]
    fits = all(down[0] == wide and inner in (down[1], 2 * down[1]) for down in each)
    if fits and width in (None, wide):
      orders.add(order)
  return orders


def _many(path: tuple[str, ...]) -> bool:
  """Returns whether a path ends in a name that is only used for several layers."""
  return not _ONE.fullmatch(path[-1].lower())


def _open(shape: Shape) -> Rule:
  return Rule("l" * (len(shape) - 1) + "i", "neither name nor shape decide", open=True)


def _by_bias(shape: Shape, bias: Shape | None) -> Rule | None:
  """Returns the view of two axes if only one is as long as the bias: that is the output axis."""
  if bias is None or len(bias) != 1 or shape[0] == shape[1] or bias[0] not in shape:
    return None
  return Rule("oi" if bias[0] == shape[0] else "io", "length of its bias")


def _conv1d(words: Name, shape: Shape) -> Rule | None:
  """Returns the view of weights that are [in, out] in GPT-2 and [out, in] in other models."""
  longer = _CONV1D.get(words.module)
  if longer is None or shape[0] == shape[1]:
    return None
  inputs_longer = longer == 1
  return Rule("io" if (shape[0] > shape[1]) == inputs_longer else "oi", "name and shape")
