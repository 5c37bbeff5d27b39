"""Typed records of a recipe, from the parser to the planner."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from jaxmerge.recipe.errors import Place, Problem
from jaxmerge.recipe.mergekit.methods import Method

Scalar = float | int | bool | str
Missing = Literal["error", "base", "mean", "skip"]


@dataclasses.dataclass(frozen=True)
class Model:
  """A reference to a model; comparisons ignore its place.

  Attributes:
    path: a local folder, a hub id, or the name of another recipe of the file.
    revision: of the hub's repository.
    adapters: paths of adapters to add to the model, each with its revision.
    step: the step of a run; None: not a run.
    hint: advice for the error if the model cannot be opened.
    place: where the reference stands.
  """

  path: str
  revision: str | None = None
  adapters: tuple[tuple[str, str | None], ...] = ()
  step: int | None = dataclasses.field(default=None, kw_only=True, compare=False)
  hint: str = dataclasses.field(default="", kw_only=True, compare=False)
  place: Place = dataclasses.field(kw_only=True, compare=False)

  def __str__(self) -> str:
    """Returns the reference in mergekit's notation: `path@revision+adapter@revision`, ..."""
    parts = [(self.path, self.revision), *self.adapters]
    return "+".join(path + (f"@{revision}" if revision else "") for path, revision in parts)


@dataclasses.dataclass(frozen=True)
class Where:
  """A selection of tensors by conditions, which must all match; without any, all tensors.

  Attributes:
    filter: a substring of the tensor's name.
    pattern: a regular expression to search in the name.
    layers: layers of the merged model, as ranges [first, last).
    place: where this stands.
  """

  filter: str | None = None
  pattern: str | None = None
  layers: tuple[tuple[int, int], ...] | None = None
  place: Place = dataclasses.field(kw_only=True, compare=False)

  @property
  def everywhere(self) -> bool:
    """Returns whether there is no condition."""
    return self.filter is None and self.pattern is None and self.layers is None

  def holds(self, name: str, layer: int | None) -> bool:
    """Returns whether a tensor matches; its layer is None outside the layers."""
    return (
      (self.filter is None or self.filter in name)
      and (self.pattern is None or re.search(self.pattern, name) is not None)
      and (
        self.layers is None or (layer is not None and any(a <= layer < b for a, b in self.layers))
      )
    )

  def __str__(self) -> str:
    """Returns the conditions as text."""
    texts = {"filter": self.filter, "pattern": self.pattern}
    words = [f"{key} {value!r}" for key, value in texts.items() if value is not None]
    if self.layers is not None:
      spans = (f"{a}-{b - 1}" if b - a > 1 else str(a) for a, b in self.layers)
      words.append(f"layers {', '.join(spans)}")
    return " and ".join(words)


@dataclasses.dataclass(frozen=True)
class Case:
  """A parameter value for the tensors that `where` selects.

  Attributes:
    value: a tuple is a gradient over depth.
    where: the tensors.
    place: where the value stands.
  """

  value: Scalar | tuple[Scalar, ...]
  where: Where
  place: Place = dataclasses.field(kw_only=True, compare=False)


# By parameter name; the first case that matches a tensor has its value.
Parameters = Mapping[str, tuple[Case, ...]]


@dataclasses.dataclass(frozen=True)
class Source:
  """A model to merge, or a range [first, last) of its layers."""

  model: Model
  parameters: Parameters
  layers: tuple[int, int] | None = None
  place: Place = dataclasses.field(kw_only=True, compare=False)


@dataclasses.dataclass(frozen=True)
class Slice:
  """A range of layers of the merged model, whose sources are merged layer by layer."""

  sources: tuple[Source, ...]
  base_model: Model | None
  parameters: Parameters
  place: Place = dataclasses.field(kw_only=True, compare=False)


@dataclasses.dataclass(frozen=True)
class Module:
  """A part of the merged model, such as a vision tower, with its models or slices."""

  models: tuple[Source, ...]
  slices: tuple[Slice, ...]
  parameters: Parameters
  place: Place = dataclasses.field(kw_only=True, compare=False)


@dataclasses.dataclass(frozen=True)
class Token:
  """The origin of a token's embedding.

  Attributes:
    model: the model whose embedding is taken; None: the embedding is zero.
    token: the token of that model; None with `token_id` None: the token of the same text.
    token_id: or its number.
    force: whether models that have the token get this embedding as well.
  """

  model: Model | None
  token: str | None = None
  token_id: int | None = None
  force: bool = False
  place: Place = dataclasses.field(kw_only=True, compare=False)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """The merged model's tokenizer.

  Attributes:
    source: where the vocabulary comes from: "union", "base" or a model.
    tokens: tokens whose embedding is specified.
    pad_to_multiple_of: the number of rows of the embedding is rounded up to a multiple of it.
    place: where it is described.
  """

  source: str | Model
  tokens: Mapping[str, Token]
  pad_to_multiple_of: int | None = None
  place: Place = dataclasses.field(kw_only=True, compare=False)


@dataclasses.dataclass(frozen=True)
class Override:
  """A different method, or different parameters, for some tensors."""

  where: Where
  merge_method: str
  parameters: Parameters
  place: Place = dataclasses.field(kw_only=True, compare=False)


@dataclasses.dataclass(frozen=True)
class View:
  """The matrix view of some tensors: which axes are outputs (rows) and which inputs.

  Attributes:
    where: the tensors.
    axes: a letter for each axis, `o`, `i` or `b`, as in `jaxmerge.core.matrix_views`; None: no
      matrix.
    place: where this stands.
  """

  where: Where
  axes: str | None
  place: Place = dataclasses.field(kw_only=True, compare=False)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """One document of a recipe file. Exactly one of models, slices, modules is not empty.

  Attributes:
    merge_method: a name in `methods.METHODS`.
    dtype: as the recipe says it, without a leading `torch.`.
    out_dtype: likewise.
    tokenizer: from either of the keys `tokenizer` and `tokenizer_source`.
    name: by which later documents refer to the result.
    strict: whether keys without effect are errors.
    compat: "mergekit" takes the rules of mergekit where they differ from the papers.
    missing: what happens to a tensor that some models lack.
    allow: settings of configs in which models may differ, or "tokens", the order of these.
    exclude: tensors that are copied from the base.
    overrides: overrides; the first whose `where` holds wins.
    layout: matrix views; the first whose `where` holds wins.
    rename: old to new prefixes of tensor names, in models and adapters.
    seed: of random masks; 0 where the recipe gives none.
    uses: names of the recipes of the same file that this one builds on.
    ignored: the keys without effect.
    places: where the keys stand.
  """

  merge_method: str
  models: tuple[Source, ...] = ()
  slices: tuple[Slice, ...] = ()
  modules: Mapping[str, Module] = dataclasses.field(default_factory=dict)
  base_model: Model | None = None
  parameters: Parameters = dataclasses.field(default_factory=dict)
  dtype: str | None = None
  out_dtype: str | None = None
  tokenizer: Tokenizer | None = None
  chat_template: str | None = None
  name: str | None = None
  strict: bool = False
  compat: Literal["mergekit"] | None = None
  missing: Missing = "error"
  allow: tuple[str, ...] = ()
  exclude: tuple[Where, ...] = ()
  overrides: tuple[Override, ...] = ()
  layout: tuple[View, ...] = ()
  rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
  seed: int = 0
  uses: tuple[str, ...] = ()
  ignored: tuple[Problem, ...] = dataclasses.field(default=(), compare=False)
  place: Place = dataclasses.field(kw_only=True, compare=False)
  places: Mapping[str, Place] = dataclasses.field(kw_only=True, compare=False)

  @property
  def parts(self) -> Mapping[str | None, Module]:
    """Returns the modules by name; a model without modules is a single one, named None.

    mergekit writes `default` for it.
    """
    whole = Module(self.models, self.slices, {}, place=self.place)
    named: dict[str | None, Module] = dict(self.modules.items())
    return named if self.modules.keys() - {"default"} else {None: named.get("default", whole)}


class Group(NamedTuple):
  """Sources that are merged with each other.

  Attributes:
    sources: the models as listed; a base that is not among them is not here.
    base: the base that counts here, if any.
    levels: parameters of slice, module and recipe, the narrowest first.
    module: name of the module, None if the recipe has none.
    sliced: whether the sources are layers, so that a base must be among them to take part.
    place: where the group is written.
  """

  sources: tuple[Source, ...]
  base: Model | None
  levels: tuple[Parameters, ...]
  module: str | None
  sliced: bool
  place: Place

  def merged(self, source: Source, method: Method) -> bool:
    """Returns whether a source is merged: it is, unless the method takes it as the base."""
    return method.base == "ignored" or source.model != self.base

  def copied(self, method: Method) -> bool:
    """Returns whether the only source of a slice is copied.

    It is copied if it is the base, or if the method needs a pair of models. This allows stacks with
    some layers merged and others copied.
    """
    if not self.sliced or len(self.sources) != 1 or method.base == "ignored":
      return False
    return self.sources[0].model == self.base or method.others[1] in (1, 2)


def groups(recipe: Recipe) -> tuple[Group, ...]:
  """Returns the groups of a recipe: one for whole models, else one per slice."""
  every = []
  for name, part in recipe.parts.items():
    levels = (part.parameters, recipe.parameters)
    if part.models:
      place = part.models[0].place
      every.append(Group(part.models, recipe.base_model, levels, name, False, place))
    for s in part.slices:
      base = s.base_model or recipe.base_model
      every.append(Group(s.sources, base, (s.parameters, *levels), name, True, s.place))
  return tuple(every)


def models_of(recipe: Recipe) -> tuple[Model, ...]:
  """Returns all distinct models and bases, in order of appearance."""
  models = [recipe.base_model] if recipe.base_model else []
  for group in groups(recipe):
    models += [s.model for s in group.sources] + ([group.base] if group.base else [])
  return tuple(dict.fromkeys(models))
