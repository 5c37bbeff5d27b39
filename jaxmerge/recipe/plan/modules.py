"""Suggests `modules` for a recipe whose slices do not say which stack of layers they mean."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from jaxmerge.recipe.records import Group, Source

_LIKELY = ("decoder", "language_model", "text_model", "text")


def hint(groups: Sequence[Group], names: Sequence[str], stacks: Collection[str]) -> str:
  """Returns `modules` with the same slices, as one line to paste into the recipe.

  Args:
    groups: the slices.
    names: names of the first model's tensors.
    stacks: stacks of layers that may be meant; the hint is empty without any.
  """
  if len(stacks) < 2:
    return ""
  parts = {module(name, stacks): None for name in sorted(names)}
  parts_of_stacks = [module(stack, stacks) for stack in stacks]
  mine = next((part for part in _LIKELY if part in parts_of_stacks), parts_of_stacks[0])
  slices = ", ".join(f"{{sources: [{_write_sources(group.sources)}]}}" for group in groups)
  whole = f"{{models: [{_write_sources(groups[0].sources, ranges=False)}]}}"
  blocks = [f"{p}: " + (f"{{slices: [{slices}]}}" if p == mine else whole) for p in parts]
  return f" Write, for layers of {mine}: modules: {{{', '.join(blocks)}}}"


def module(name: str, stacks: Collection[str]) -> str:
  """Returns the part of a tensor's name that distinguishes the modules of a model.

  >>> module("model.encoder.layers.0.w", ["model.encoder.layers.", "model.decoder.layers."])
  'encoder'
  """
  every = [stack.split(".") for stack in stacks]
  depth = next(i for i, parts in enumerate(zip(*every, strict=False)) if len(set(parts)) > 1)
  name_parts = name.split(".")
  return (
    name_parts[depth]
    if name_parts[:depth] == every[0][:depth] and depth < len(name_parts)
    else name_parts[0]
  )


def _write_sources(sources: Sequence[Source], *, ranges: bool = True) -> str:
  return ", ".join(f"{{{', '.join(_write_source(source, ranges))}}}" for source in sources)


def _write_source(source: Source, ranges: bool) -> list[str]:
  items = [f"model: {source.model}"]
  if ranges and source.layers is not None:
    items.append(f"layer_range: [{source.layers[0]}, {source.layers[1]}]")
  values = {n: cases[0].value for n, cases in source.parameters.items() if len(cases) == 1}
  plain = [f"{n}: {v}" for n, v in values.items() if not isinstance(v, bool | str | tuple)]
  return items + ([f"parameters: {{{', '.join(plain)}}}"] if plain else [])
