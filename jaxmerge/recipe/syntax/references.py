"""Reads references to models, and the tokenizer, which is put together from models."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from typing import NamedTuple

from jaxmerge.io.huggingface import reference as reference_text
from jaxmerge.recipe.errors import Problem, listed, note, shown
from jaxmerge.recipe.records import Model, Token, Tokenizer
from jaxmerge.recipe.syntax import fields
from jaxmerge.recipe.syntax.yaml_reader import Node

_SOURCES = ("union", "base")
_ARCHITECTURE = "override_architecture"


class Context(NamedTuple):
  """What reading needs to know beside the text.

  Attributes:
    found: takes the problems.
    names: names of the recipes of the file, if it has several.
    is_folder: tells whether a path is a folder.
  """

  found: list[Problem]
  names: Collection[str]
  is_folder: Callable[[str], bool]


def model(node: Node, what: str, context: Context) -> Model:
  """Returns a reference: `path@revision+adapter`, or a mapping that spells the parts out.

  A text that is a folder as a whole, or the name of a recipe of the file, is not taken apart.
  """
  if isinstance(node.value, dict):
    return _spelt_out(node, what, context)
  text = fields.text(node, what, context.found)
  if text in context.names or context.is_folder(text):
    return Model(text, place=node.place)
  parts = reference_text.split(text, context.is_folder)
  path, revision = _location(parts[0], node, what, context)
  if revision and path in context.names:
    note(context.found, node.place, f"{what} {path!r} is a recipe, which has no revision.")
  elif context.names and path not in context.names and _is_word(path, context):
    close = difflib.get_close_matches(path, context.names, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"Recipes: {listed(context.names)}."
    text = f"{what} {shown(path)} is neither a recipe of this file nor a folder. {hint} For a model"
    note(
      context.found,
      node.place,
      f"{text} of the hub, write {{model: {{path: {path[:60]}, revision: main}}}}.",
    )
  adapters = tuple(_location(part, node, what, context) for part in parts[1:])
  return Model(path, revision, adapters, place=node.place)


def _spelt_out(node: Node, what: str, context: Context) -> Model:
  keys = ("model", "adapter", "lora", _ARCHITECTURE)
  given = fields.mapping(node, what, keys, context.found, needed=("model",))
  if _ARCHITECTURE in given:
    text = f"{_ARCHITECTURE} changes nothing: no architecture is asked for."
    note(context.found, node.keys[_ARCHITECTURE], text, ignored=True)
  if "adapter" in given and "lora" in given:
    note(context.found, node.keys["lora"], f"{what} has both an adapter and a lora: remove one.")
  path, revision = _part(given.get("model"), f"model of {what}", context)
  own = _part(given.get("adapter", given.get("lora")), f"adapter of {what}", context)
  adapters = () if own[0] is None else ((own[0], own[1]),)
  return Model(path or "?", revision, adapters, place=node.place)


def _part(node: Node | None, what: str, context: Context) -> tuple[str | None, str | None]:
  """Returns path and revision of {path, revision}, taken literally, or of `path@revision`."""
  if node is None:
    return None, None
  if not isinstance(node.value, dict):
    return _location(fields.text(node, what, context.found), node, what, context)
  found = context.found
  given = fields.mapping(node, what, ("path", "revision"), found, needed=("path",))
  path = fields.maybe(fields.text, given.get("path"), f"path of {what}", found)
  revision = fields.maybe(fields.text, given.get("revision"), f"revision of {what}", found)
  return path or "?", revision


def _location(text: str, node: Node, what: str, context: Context) -> tuple[str, str | None]:
  path, *revision = [text] if context.is_folder(text) else text.split("@")
  if len(revision) > 1:
    note(context.found, node.place, f"{what} has more than one @: {shown(text)}{_spell('@')}.")
  elif not path or revision == [""]:
    note(context.found, node.place, f"{what} has an empty part: {shown(node.value)}.")
  return path or "?", revision[0] if revision else None


def _spell(mark: str) -> str:
  form = "{model: {path: ..., revision: ...}, adapter: {path: ...}}"
  return f"; if {mark} belongs to a path, there is no such folder here: write {form}"


def _is_word(path: str, context: Context) -> bool:
  return "/" not in path and not context.is_folder(path)


def source(node: Node, what: str, models: Collection[Model], context: Context) -> Model | str:
  """Returns "union", "base", or the model whose vocabulary is taken.

  A single word must be one of the two, a model of the recipe, or a folder, so that none is misspelt
  unnoticed.
  """
  if node.value in _SOURCES:
    return str(node.value)
  if isinstance(node.value, str):  # Older recipes of mergekit say `model:org/name`.
    node = node._replace(value=node.value.removeprefix("model:"))
  own = model(node, what, context)
  paths = {m.path for m in models}
  word = isinstance(node.value, str) and _is_word(own.path, context)
  if word and own.path not in paths | set(context.names):
    near = fields.nearest(own.path, (*_SOURCES, *paths))
    note(context.found, node.place, f"{what} cannot be {shown(own.path)}{near}.")
  return own


def tokenizer(node: Node, models: Collection[Model], context: Context) -> Tokenizer:
  """Returns what the key `tokenizer` says; `models` are those of the recipe."""
  keys, found = ("source", "tokens", "pad_to_multiple_of"), context.found
  given = fields.mapping(node, "tokenizer", keys, found)
  own = fields.maybe(source, given.get("source"), "source of tokenizer", models, context)
  pad = given.get("pad_to_multiple_of")
  tokens = {}
  if "tokens" in given:
    inside = given["tokens"].value
    names = tuple(inside) if isinstance(inside, dict) else ()
    inside = fields.mapping(given["tokens"], "tokens", names, found)
    tokens = {name: _token(each, name, models, context) for name, each in inside.items()}
  return Tokenizer(
    own or "union",
    tokens,
    fields.maybe(fields.whole, pad, "pad_to_multiple_of", 1, 2**20, found),
    place=node.place,
  )


def _token(node: Node, name: str, models: Collection[Model], context: Context) -> Token:
  what, found = f"token {shown(name)}", context.found
  given = fields.mapping(node, what, ("source", "force"), found, needed=("source",))
  force = fields.maybe(fields.truth, given.get("force"), f"force of {what}", found) or False
  if "source" not in given:
    return Token(None, force=force, place=node.place)
  own = given["source"]
  if isinstance(own.value, dict) and "kind" in own.value:
    return _kind(own, f"source of {what}", force, models, context)
  donor = _donor(own, f"source of {what}", models, context)
  return Token(donor, force=force, place=own.place)


def _kind(node: Node, what: str, force: bool, models: Collection[Model], context: Context) -> Token:
  found = context.found
  kind = fields.choice(node.value["kind"], f"kind of {what}", ("model_token", "zero"), found)
  if kind == "zero":
    fields.mapping(node, what, ("kind",), found)
    return Token(None, force=force, place=node.place)
  keys = ("kind", "model", "token", "token_id")
  given = fields.mapping(node, what, keys, found, needed=("model",))
  if ("token" in given) == ("token_id" in given):
    note(found, node.place, f"{what} needs either token or token_id.")
  return Token(
    fields.maybe(_donor, given.get("model"), f"model of {what}", models, context),
    fields.maybe(fields.text, given.get("token"), f"token of {what}", found),
    fields.maybe(fields.whole, given.get("token_id"), f"token_id of {what}", 0, 2**31 - 1, found),
    force,
    place=node.place,
  )


def _donor(node: Node, what: str, models: Collection[Model], context: Context) -> Model:
  own = model(node, what, context)
  if own not in models:
    near = fields.nearest(str(own), map(str, models))
    zero = "; for a zero embedding, write {kind: zero}" if str(own) == "zero" else ""
    note(context.found, node.place, f"{what} must be a model of the recipe{zero}{near}.")
  return own
