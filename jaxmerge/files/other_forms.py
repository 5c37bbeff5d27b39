"""Reads models in the form of the base: trees of other programs as Hugging Face's, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxmerge.files.plan import Model, Outcome
from jaxmerge.io.checkpoints import name_maps, value_changes
from jaxmerge.io.checkpoints.name_maps import Form, Place
from jaxmerge.io.tensors import permuted
from jaxmerge.io.tensors.tensor import Tensor

_QUERY = re.compile(r"(?P<prefix>(?:.+\.)?)layers\.\d+\.self_attn\.q_proj\.weight")
_HEAD, _LAYERS = "lm_head.weight", "num_hidden_layers"
_USUAL = "model."
_BUFFER = re.compile(r".*\brotary_emb\.(inv_freq|cos_cached|sin_cached)")


class Map(NamedTuple):
  """The map of a tree to the names of Hugging Face.

  Attributes:
    form: of the tree.
    shapes: of its tensors.
    places: by Hugging Face's name, where it lies in the tree.
  """

  form: Form
  shapes: Mapping[str, tuple[int, ...]]
  places: Mapping[str, Place]


def align(models: Sequence[Model]) -> list[Model]:
  """Returns the models in the form of the first, where a name map leads from theirs to it.

  Raises:
    ValueError: naming model, tensor and family, where a map does not fit.
  """
  donor = models[0]
  return [donor, *(_align(model, donor, models) for model in models[1:])]


def _align(model: Model, donor: Model, models: Sequence[Model]) -> Model:
  source, target = name_maps.find(model.tensors), name_maps.find(donor.tensors)
  prefixes = [_prefix(m) for m in (model, donor)]
  if source == target or not (source or prefixes[0]) or not (target or prefixes[1]):
    return model
  if source:
    model = _to_names(model, _map(model, source, models, prefixes[1] or _USUAL), donor)
  if target:
    prefix = prefixes[0] if not source and prefixes[0] else _USUAL
    model = _to_tree(model, _map(donor, target, models, prefix), donor)
  return model


def _prefix(model: Model) -> str | None:
  """Returns the prefix of the decoder's tensors, None where it is none of Hugging Face's."""
  names = {m["prefix"] for n in model.tensors if (m := _QUERY.fullmatch(n))}
  decoders = [prefix for prefix in names if f"{prefix}embed_tokens.weight" in model.tensors]
  return decoders[0] if len(decoders) == 1 else None


def _map(model: Model, forms: Sequence[Form], models: Sequence[Model], prefix: str) -> Map:
  """Returns the map of a tree."""
  kinds = sorted({str(m.config["model_type"]) for m in models if "model_type" in m.config})
  fitting = [f for f in forms if all(kind in f.types for kind in kinds)]
  if len(fitting) != 1:
    listed = " or ".join(map(str, forms))
    types = " and ".join(kinds)
    why = f"model_type is {types}: there is no name map" if kinds else "no config.json says which"
    raise ValueError(f"{model.name} is a tree of {listed}, and {why}; merge models of one form.")
  shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
  places: dict[str, Place] = {}
  for tree, shape in shapes.items():
    try:
      for name, place in name_maps.places(fitting[0], tree, shape):
        if name in places:
          both = f"{places[name].tree!r} and {tree!r}"
          raise ValueError(f"tensors {both} are both {name!r} by the map of {fitting[0]}")
        places[name] = place
    except ValueError as error:
      raise ValueError(f"{model.name}: {error}; merge models of one form.") from error
  _check_numbers(model, fitting[0], places, models)
  named = {_with_prefix(name, prefix): place for name, place in places.items()}
  return Map(fitting[0], shapes, named)


def _with_prefix(name: str, prefix: str) -> str:
  return prefix + name.removeprefix(_USUAL) if name.startswith(_USUAL) else name


def _check_numbers(
  model: Model, form: Form, places: Mapping[str, Place], models: Sequence[Model]
) -> None:
  """Raises where the tree has another number of heads or layers than a config says."""
  counted = [place for place in places.values() if place.rule.heads]
  scanned = [p for p in places.values() if "layer" in dict(p.rule.stacked)]
  for m in models:
    config = {**m.config, **(m.config.get("text_config") or {})}
    for place in scanned:
      axis, step = dict(place.rule.stacked)["layer"], place.rule.every[0]
      layers = step * model.tensors[place.tree].shape[axis]
      if config.get(_LAYERS, layers) != layers:
        raise ValueError(
          f"{model.name}: tensor {place.tree!r} of {form} has {layers} layers, and {_LAYERS} of "
          f"{m.name} is {config[_LAYERS]}."
        )
    for place in counted:
      shape, key = model.tensors[place.tree].shape, place.rule.heads
      order = _axes(place, len(shape)).order
      # The first of the two axes, heads and their size, that are one at Hugging Face.
      first = next(i for i, group in enumerate(place.rule.groups) if len(group) == 2)
      heads = shape[order[first]]
      if config.get(key, heads) != heads:
        raise ValueError(
          f"{model.name}: tensor {place.tree!r} of {form} has {heads} heads, and {key} of "
          f"{m.name} is {config[key]}."
        )


def _axes(place: Place, rank: int) -> permuted.Axes:
  stacked = tuple(axis for _, axis in place.rule.stacked)
  rest = [i for i in range(rank) if i not in stacked]
  order = sum(place.rule.groups, ()) or range(len(rest))
  return permuted.Axes(stacked, tuple(rest[i] for i in order))


def _shape(place: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape of a tensor at Hugging Face, from that in the tree."""
  rest = [n for i, n in enumerate(shape) if i not in {axis for _, axis in place.rule.stacked}]
  groups = place.rule.groups or tuple((i,) for i in range(len(rest)))
  return tuple(math.prod(rest[i] for i in group) for group in groups)


def _to_names(model: Model, mapping: Map, donor: Model) -> Model:
  """Returns a tree with names and shapes of Hugging Face."""
  views, tensors, notes = permuted.Views(), dict[str, Tensor](), list[str]()
  for name, place in mapping.places.items():
    tensor = model.tensors[place.tree]
    axes, shape = _axes(place, len(tensor.shape)), _shape(place, tensor.shape)
    rows = donor.tensors[name].shape[0] if place.rule.padded and name in donor.tensors else None
    if rows is not None and rows < shape[0]:
      notes.append(f"Of {name!r} of {model.name}, rows from {rows} are padding and left out.")
      shape = (rows, *shape[1:])
    change = value_changes.compose(place.rule.changes, to_tree=False)
    if change is None and _is_same(axes, tensor.shape):
      tensors[name] = tensor._replace(shape=shape)
    else:
      tensors[name] = views.part(tensor, axes, place.at, shape, change)
  embedding = next((n for n in tensors if n.endswith("embed_tokens.weight")), None)
  tied = {} if _HEAD in tensors or embedding is None else {_HEAD: tensors[embedding]}
  targets = _inverse(mapping)
  model = model._replace(notes=(*model.notes, *notes))
  return _replace(model, tensors, tied, targets, donor, f"{mapping.form} to Hugging Face's")


def _is_same(axes: permuted.Axes, shape: tuple[int, ...]) -> bool:
  return not axes.stacked and axes.order == tuple(range(len(shape)))


def _inverse(mapping: Map) -> dict[str, list[str]]:
  targets: dict[str, list[str]] = {}
  for name, place in mapping.places.items():
    targets.setdefault(place.tree, []).append(name)
  return targets


def _to_tree(model: Model, mapping: Map, donor: Model) -> Model:
  """Returns a model with names of Hugging Face in the form of a tree."""
  buffers = [n for n in model.tensors if _BUFFER.fullmatch(n)]
  unknown = [n for n in model.tensors if n not in mapping.places and n not in buffers]
  if unknown:
    raise ValueError(
      f"{model.name}: tensor {unknown[0]!r} has no place in the tree of {donor.name} by the map of "
      f"{mapping.form}; merge models of one form."
    )
  views, tensors, notes = permuted.Views(), dict[str, Tensor](), list[str]()
  for tree, names in _inverse(mapping).items():
    parts = {mapping.places[n].at: model.input(n).tensor for n in names}
    present = {index: t for index, t in parts.items() if t is not None}
    if not present:
      continue  # Reported as missing, or what `missing` says.
    if len(present) < len(parts):
      lacking = next(n for n in names if model.input(n).tensor is None)
      raise ValueError(f"{model.name}: tensor {lacking!r} is missing, a part of {tree!r}.")
    place, rows = mapping.places[names[0]], next(iter(present.values())).shape[0]
    if place.rule.padded and rows < mapping.shapes[tree][0]:
      notes.append(f"Of {tree!r} of {model.name}, rows from {rows} are zeros, as padding.")
    tensors[tree] = _stack(model, views, present, place, mapping)
  targets = {n: [p.tree] for n, p in mapping.places.items() if n in model.tensors}
  model = model._replace(notes=(*model.notes, *notes))
  result = _replace(model, tensors, {}, targets, donor, f"Hugging Face's to {mapping.form}")
  dropped = dict.fromkeys(buffers, Outcome("dropped", reason="a buffer"))
  return result._replace(outcomes={**result.outcomes, **dropped})


def _stack(
  model: Model,
  views: permuted.Views,
  parts: Mapping[tuple[int, ...], Tensor],
  place: Place,
  mapping: Map,
) -> Tensor:
  shape = mapping.shapes[place.tree]
  axes, expected = _axes(place, len(shape)), _shape(place, shape)
  if place.rule.padded:
    parts = {at: permuted.pad(tensor, expected) for at, tensor in parts.items()}
  first = next(iter(parts.values()))
  for tensor in parts.values():
    if tensor.shape != expected:
      raise ValueError(
        f"{tensor.where} is {list(tensor.shape)}, and {place.tree!r} of {mapping.form} takes "
        f"{list(expected)}."
      )
    if tensor.dtype != first.dtype:
      raise ValueError(f"{tensor.where} is {tensor.dtype}, others of {place.tree!r} {first.dtype}.")
  change = value_changes.compose(place.rule.changes, to_tree=True)
  if change is None and _is_same(axes, shape):
    return first._replace(shape=shape)
  return views.stack(parts, axes, shape, change)


def _replace(
  model: Model,
  tensors: Mapping[str, Tensor],
  tied: Mapping[str, Tensor],
  targets: Mapping[str, Sequence[str]],
  donor: Model,
  words: str,
) -> Model:
  outcomes = {
    old: Outcome("rewritten", target=", ".join(sorted(new)[:2]), reason="by a name map")
    for old, new in targets.items()
  }
  note = f"{model.name} is read in the form of {donor.name}, by the name map of {words} names."
  return model._replace(
    tensors=tensors,
    tied=tied,
    outcomes={**model.outcomes, **outcomes},
    notes=(*model.notes, note),
  )
