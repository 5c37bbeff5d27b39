"""Checks that layers with different sets of tensors are stacked where their class expects them.

Only the first block of RWKV has a norm before it, and only that of ModernBERT lacks one. A model
class decides this by position: tensors at other positions are ignored or randomly initialised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any  # Any: what a config.json holds.

from jaxmerge.files import plan
from jaxmerge.recipe import layers
from jaxmerge.recipe.errors import Problem, RecipeError
from jaxmerge.recipe.layer_config import Layers, entries
from jaxmerge.recipe.plan import rows as result_rows
from jaxmerge.recipe.records import Model

Config = Mapping[str, Any]
Layout = dict[int, frozenset[str]]

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")


def check(
  rows: Sequence[result_rows.Row],
  models: Mapping[Model, plan.Model],
  before: Config,
  after: Config,
) -> None:
  """Raises RecipeError if layers have other tensors than their new position needs.

  Args:
    rows: the tensors of the result.
    models: all models that the recipe names.
    before: config of the donor.
    after: config of the result.
  """
  problems = []
  for stack in result_rows.stacks_of(rows).values():
    model = models[stack.group.sources[0].model]
    num_layers = layers.stacks(model.tensors).get(stack.stack, 0)
    if [*stack.order.values()] == [*range(num_layers)]:
      continue
    reason = _by_place(rows, stack, models, before, after) or _outside(model, stack.stack, before)
    if reason:
      problems.append(Problem(stack.group.place, reason))
  if problems:
    raise RecipeError(problems)


def _by_place(
  rows: Sequence[result_rows.Row],
  stack: result_rows.Stack,
  models: Mapping[Model, plan.Model],
  before: Config,
  after: Config,
) -> str:
  """Returns, in words, which layer does not fit its new position; "" if all fit."""
  layouts: dict[tuple[Model, Model], Layout] = {}
  order = Layers(0, tuple(old for _, old in sorted(stack.order.items())))
  groups = {
    row.tensor.layer: row.group
    for row in rows
    if row.tensor.layer is not None and row.tensor.name.startswith(stack.stack)
  }
  for new, old in sorted(stack.order.items()):
    source, base = groups[new].sources[0].model, groups[new].base or groups[new].sources[0].model
    if (source, base) not in layouts:  # A base has tensors that layers of its fine-tunes may lack.
      names = {**models[source].tensors, **models[base].tensors}
      layouts[source, base] = _layout(names, stack.stack)
    layout = layouts[source, base]
    if new == old or old not in layout:
      continue
    # Behind all layers that there were, it is only known that this is not the first place.
    expected = layout.get(new)
    alone = [layout[0]] == [s for s in layout.values() if s == layout[0]] if 0 in layout else False
    differs = (
      expected != layout[old] if expected is not None else (old == 0 and alone and len(layout) > 2)
    )
    if differs and not _is_explained(before, after, order, layout, new, old):
      other = layout.get(new, layout[max(layout)])
      first = min(layout[old] ^ other)
      have = "has" if first in layout[old] else "lacks"
      return (
        f"layer {old} of {source} {have} {first!r}, unlike the layer that was layer {new}, and "
        "nothing in the config says which layers are so: the class decides it by the place. Choose "
        f"slices that keep layer {old if layout[old] != layout.get(1) else new} where it was."
      )
  return ""


def _layout(names: Mapping[str, Any], stack: str) -> Layout:
  """Returns the relative names of the tensors of each layer, without computed buffers."""
  names_by_layer: dict[int, set[str]] = {}
  for name in names:
    at = layers.place(name)
    if at and at.stack == stack and not at.rest.endswith(("inv_freq", "attn.bias", "masked_bias")):
      names_by_layer.setdefault(at.layer, set()).add(at.rest)
  return {layer: frozenset(rests) for layer, rests in names_by_layer.items()}


def _is_explained(
  before: Config, after: Config, order: Layers, layout: Layout, new: int, old: int
) -> bool:
  """Returns whether the config treats the new place as it treated the layer before.

  By its lists alone, which may take the place of rules that stay in it, or by both.
  """
  num_layers, size = len(layout), len(order.order)
  for rules in (False, True):
    ours = dict(entries(before, num_layers, rules))
    theirs = dict(entries(after, size, rules))
    shared = [k for k in ours if k in theirs]
    kind = [theirs[k][new] for k in shared]
    alike = [n for n in layout if n < num_layers and [ours[k][n] for k in shared] == kind]
    if _is_rewritten(before, after, ours, theirs) or (
      alike and all(layout[n] == layout[old] for n in alike)
    ):
      return True
  return False


def _is_rewritten(before: Config, after: Config, ours: Config, theirs: Config) -> bool:
  """Returns whether a rule was changed, or written as a list of more than attention kinds."""
  for key in theirs.keys() - ours.keys() - _keys_with_value(before):
    if not set(map(str, theirs[key])) <= _ATTENTION:
      return True
  return any(_rule_changed(key, value, before.get(key)) for key, value in after.items())


def _keys_with_value(config: Config) -> set[str]:
  """Returns the keys of a config and its parts that have a value."""
  parts = [_keys_with_value(value) for value in config.values() if isinstance(value, Mapping)]
  return {key for key, value in config.items() if value}.union(*parts)


def _rule_changed(key: str, value: Any, before: Any) -> bool:
  if isinstance(value, Mapping) and isinstance(before, Mapping):
    return any(_rule_changed(k, v, before.get(k)) for k, v in value.items())
  rule = re.search(r"first_k|dense_layers|sparse_step|kv_shared|linear_attn", key)
  return bool(rule) and value != before


def _outside(model: plan.Model, stack: str, config: Config) -> str:
  """Returns which tensor outside of the layers has a column for each head of each layer (ESM)."""
  num_layers = layers.stacks(model.tensors)[stack]
  heads = next((config[k] for k in _HEADS if type(config.get(k)) is int), 0)
  within = {n for name in _of(model, stack, True) for n in model.tensors[name].shape}
  for name in _of(model, stack, False):
    columns = num_layers * heads not in within and model.tensors[name].shape == (
      1,
      num_layers * heads,
    )
    if num_layers > 1 < heads and columns:
      return (
        f"tensor {name!r} of {model.name} has {num_layers * heads} columns, one for each of "
        f"{heads} heads of {num_layers} layers, so that these cannot be stacked anew."
      )
  return ""


def _of(model: plan.Model, stack: str, inside: bool) -> Iterator[str]:
  """Yields the names of tensors within a stack, or in none."""
  return (n for n in model.tensors if (n.startswith(stack) if inside else layers.place(n) is None))
