"""Reads references to models, and the tokenizer section, which refers to models."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from typing import NamedTuple

from jaxmerge.io.huggingface import reference as reference_text
from jaxmerge.recipe.errors import Problem, add, join_some, show
from jaxmerge.recipe.records import Model, Token, Tokenizer
from jaxmerge.recipe.syntax import fields
from jaxmerge.recipe.syntax.yaml_reader import Node

_SOURCES = ("union", "base")
_ARCHITECTURE = "override_architecture"


class Context(NamedTuple):
  """The context in which references are read.

  Attributes:
    problems: list to which problems are added.
    names: names of the recipes of the file, if it has several.
    is_folder: returns whether a path is a folder.
  """

  problems: list[Problem]
  names: Collection[str]
  is_folder: Callable[[str], bool]


def model(node: Node, what: str, context: Context) -> Model:
  """Returns a model from `path@revision+adapter`, or from a mapping with these parts.

  A text that is an existing folder, or the name of a recipe of the file, is not split.
  """
  if isinstance(node.value, dict):
    return _mapping(node, what, context)
  text = fields.text(node, what, context.problems)
  if text in context.names or context.is_folder(text):
    return Model(text, place=node.place)
  parts = reference_text.split(text, context.is_folder)
  path, revision = _location(parts[0], node, what, context)
  if revision and path in context.names:
    add(context.problems, node.place, f"{what} {path!r} is a recipe, which has no revision.")
  elif context.names and path not in context.names and _is_word(path, context):
    close = difflib.get_close_matches(path, context.names, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"Recipes: {join_some(context.names)}."
    text = f"{what} {show(path)} is neither a recipe of this file nor a folder. {hint} For a model"
    add(
      context.problems,
      node.place,
      f"{text} of the hub, write {{model: {{path: {path[:60]}, revision: main}}}}.",
    )
  adapters = tuple(_location(part, node, what, context) for part in parts[1:])
  return Model(path, revision, adapters, place=node.place)


def _mapping(node: Node, what: str, context: Context) -> Model:
  keys = ("model", "adapter", "lora", _ARCHITECTURE)
  nodes = fields.mapping(node, what, keys, context.problems, needed=("model",))
  if _ARCHITECTURE in nodes:
    text = f"{_ARCHITECTURE} has no effect: no architecture is needed here."
    add(context.problems, node.keys[_ARCHITECTURE], text, ignored=True)
  if "adapter" in nodes and "lora" in nodes:
    add(context.problems, node.keys["lora"], f"{what} has both an adapter and a lora: remove one.")
  path, revision = _part(nodes.get("model"), f"model of {what}", context)
  adapter = _part(nodes.get("adapter", nodes.get("lora")), f"adapter of {what}", context)
  adapters = () if adapter[0] is None else ((adapter[0], adapter[1]),)
  return Model(path or "?", revision, adapters, place=node.place)


def _part(node: Node | None, what: str, context: Context) -> tuple[str | None, str | None]:
  """Returns path and revision from {path, revision}, unsplit, or from `path@revision`."""
  if node is None:
    return None, None
  if not isinstance(node.value, dict):
    return _location(fields.text(node, what, context.problems), node, what, context)
  problems = context.problems
  nodes = fields.mapping(node, what, ("path", "revision"), problems, needed=("path",))
  path = fields.maybe(fields.text, nodes.get("path"), f"path of {what}", problems)
  revision = fields.maybe(fields.text, nodes.get("revision"), f"revision of {what}", problems)
  return path or "?", revision


def _location(text: str, node: Node, what: str, context: Context) -> tuple[str, str | None]:
  path, *revision = [text] if context.is_folder(text) else text.split("@")
  if len(revision) > 1:
    add(
      context.problems, node.place, f"{what} has more than one @: {show(text)}{_mapping_hint('@')}."
    )
  elif not path or revision == [""]:
    add(context.problems, node.place, f"{what} has an empty part: {show(node.value)}.")
  return path or "?", revision[0] if revision else None


def _mapping_hint(mark: str) -> str:
  form = "{model: {path: ..., revision: ...}, adapter: {path: ...}}"
  return f"; if {mark} belongs to a path, there is no such folder here: write {form}"


def _is_word(path: str, context: Context) -> bool:
  return "/" not in path and not context.is_folder(path)


def source(node: Node, what: str, models: Collection[Model], context: Context) -> Model | str:
  """Returns "union", "base", or the model whose vocabulary is used.

  A single word must be one of the two, a model of the recipe, or a folder, so that a misspelling is
  an error.
  """
  if node.value in _SOURCES:
    return str(node.value)
  if isinstance(node.value, str):  # Older recipes of mergekit say `model:org/name`.
    node = node._replace(value=node.value.removeprefix("model:"))
  reference = model(node, what, context)
  paths = {m.path for m in models}
  word = isinstance(node.value, str) and _is_word(reference.path, context)
  if word and reference.path not in paths | set(context.names):
    near = fields.nearest(reference.path, (*_SOURCES, *paths))
    add(context.problems, node.place, f"{what} cannot be {show(reference.path)}{near}.")
  return reference


def tokenizer(node: Node, models: Collection[Model], context: Context) -> Tokenizer:
  """Returns the tokenizer of a recipe; `models` are its models."""
  keys, problems = ("source", "tokens", "pad_to_multiple_of"), context.problems
  nodes = fields.mapping(node, "tokenizer", keys, problems)
  vocabulary_source = fields.maybe(
    source, nodes.get("source"), "source of tokenizer", models, context
  )
  pad = nodes.get("pad_to_multiple_of")
  tokens = {}
  if "tokens" in nodes:
    token_nodes = nodes["tokens"].value
    names = tuple(token_nodes) if isinstance(token_nodes, dict) else ()
    token_nodes = fields.mapping(nodes["tokens"], "tokens", names, problems)
    tokens = {name: _token(each, name, models, context) for name, each in token_nodes.items()}
  return Tokenizer(
    vocabulary_source or "union",
    tokens,
    fields.maybe(fields.whole, pad, "pad_to_multiple_of", 1, 2**20, problems),
    place=node.place,
  )


def _token(node: Node, name: str, models: Collection[Model], context: Context) -> Token:
  what, problems = f"token {show(name)}", context.problems
  nodes = fields.mapping(node, what, ("source", "force"), problems, needed=("source",))
  force = fields.maybe(fields.truth, nodes.get("force"), f"force of {what}", problems) or False
  if "source" not in nodes:
    return Token(None, force=force, place=node.place)
  source_node = nodes["source"]
  if isinstance(source_node.value, dict) and "kind" in source_node.value:
    return _kind(source_node, f"source of {what}", force, models, context)
  donor = _donor(source_node, f"source of {what}", models, context)
  return Token(donor, force=force, place=source_node.place)


def _kind(node: Node, what: str, force: bool, models: Collection[Model], context: Context) -> Token:
  problems = context.problems
  kind = fields.choice(node.value["kind"], f"kind of {what}", ("model_token", "zero"), problems)
  if kind == "zero":
    fields.mapping(node, what, ("kind",), problems)
    return Token(None, force=force, place=node.place)
  keys = ("kind", "model", "token", "token_id")
  nodes = fields.mapping(node, what, keys, problems, needed=("model",))
  if ("token" in nodes) == ("token_id" in nodes):
    add(problems, node.place, f"{what} needs either token or token_id.")
  return Token(
    fields.maybe(_donor, nodes.get("model"), f"model of {what}", models, context),
    fields.maybe(fields.text, nodes.get("token"), f"token of {what}", problems),
    fields.maybe(
      fields.whole, nodes.get("token_id"), f"token_id of {what}", 0, 2**31 - 1, problems
    ),
    force,
    place=node.place,
  )


def _donor(node: Node, what: str, models: Collection[Model], context: Context) -> Model:
  donor = model(node, what, context)
  if donor not in models:
    near = fields.nearest(str(donor), map(str, models))
    zero = "; for a zero embedding, write {kind: zero}" if str(donor) == "zero" else ""
    add(context.problems, node.place, f"{what} must be a model of the recipe{zero}{near}.")
  return donor
