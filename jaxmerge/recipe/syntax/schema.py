"""Reads a recipe file strictly: returns its records, or raises one error with all problems."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal  # Any: values of a Python dict.

from jaxmerge.recipe.errors import Place, Problem, RecipeError, add, show
from jaxmerge.recipe.mergekit.methods import METHODS
from jaxmerge.recipe.records import Missing, Model, Recipe, Tokenizer, Where, models_of
from jaxmerge.recipe.syntax import (
  fields,
  inputs,
  python_values,
  references,
  validate,
  yaml_reader,
)
from jaxmerge.recipe.syntax.references import Context
from jaxmerge.recipe.syntax.yaml_reader import Node

MOST_DOCUMENTS = 100
MOST_OVERRIDES = 200
DTYPES = ("float32", "bfloat16", "float16")
CHAT_TEMPLATES = ("auto", "alpaca", "chatml", "llama3", "mistral", "exaone")
COMPAT: tuple[Literal["mergekit"], ...] = ("mergekit",)
MISSING: tuple[Missing, ...] = ("error", "base", "mean", "skip")
INPUTS = ("models", "slices", "modules")
KEYS = (
  "merge_method",
  *INPUTS,
  "base_model",
  "parameters",
  "dtype",
  "out_dtype",
  "tokenizer_source",
  "tokenizer",
  "chat_template",
  "name",
  "strict",
  "compat",
  "missing",
  "allow",
  "exclude",
  "overrides",
  "layout",
  "rename",
  "seed",
)
_OTHERS = {
  "mergekit-moe": ("experts", "gate_mode", "shared_experts"),
  "mergekit-evolve": ("genome",),
}
_REFUSED = {
  key: f"{key}: this is a recipe of {program}, which is not supported."
  for program, keys in _OTHERS.items()
  for key in keys
}


_IGNORED = {"pad_to_multiple_of": "pad_to_multiple_of belongs under tokenizer; here"}


def read(path: str | os.PathLike[str], *, strict: bool = False) -> tuple[Recipe, ...]:
  """Reads a recipe file: one record for each document, each after those that it builds on.

  Args:
    path: path of the file.
    strict: whether keys without effect, which mergekit ignores, are errors; a recipe of the file
      may set this too.

  Raises:
    FileNotFoundError: if the file does not exist.
    RecipeError: a ValueError with all problems, one per line: `file:line:column: problem`.
  """
  return parse(text_of(path), str(path), strict=strict)


def text_of(path: str | os.PathLike[str]) -> str:
  """Returns the text of a recipe file; errors as for `read`."""
  name = str(path)
  is_yaml = "\n" in name or (": " in name and not name.endswith((".yml", ".yaml")))
  if is_yaml and not os.path.exists(name):
    short = f"{name[:40]!r}{', ...' if len(name) > 40 else ''}"
    raise ValueError(
      f"a recipe must be the path of a file or a dict, got YAML text, {short}: pass the path, or "
      "yaml.safe_load(text)."
    )
  path = pathlib.Path(path)
  if path.exists() and not path.is_file():
    raise ValueError(f"{path}: not a regular file; a recipe is read twice, so save it to a file.")
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such recipe file.")
  with path.open("rb") as file:
    content = file.read(4 * yaml_reader.LONGEST + 1)
  if len(content) > 4 * yaml_reader.LONGEST:
    raise RecipeError([Problem(Place(str(path), 1, 1), "too long for a recipe.")])
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    before = content[: error.start].decode("utf-8")
    place = yaml_reader.position(before, len(before), str(path))
    raise RecipeError([Problem(place, f"not UTF-8: {error.reason}.")]) from error


def parse(
  text: str,
  file: str = "recipe.yml",
  is_folder: Callable[[str], bool] = os.path.isdir,
  *,
  strict: bool = False,
) -> tuple[Recipe, ...]:
  """Reads the text of a recipe file, as `read` does.

  Args:
    text: the YAML.
    file: name of the file in errors.
    is_folder: returns whether a reference is a local folder, relative to the current directory.
    strict: as for `read`.

  Example:
    >>> (recipe,) = parse("{merge_method: linear, models: [{model: a, parameters: {weight: 1}}]}")
    >>> str(recipe.models[0].model), recipe.models[0].parameters["weight"][0].value
    ('a', 1)
  """
  problems: list[Problem] = []
  return _parse_nodes(
    yaml_reader.documents(text, file, problems), file, problems, is_folder, strict
  )


def parse_values(
  documents: Sequence[Mapping[str, Any]],
  is_folder: Callable[[str], bool] = os.path.isdir,
  *,
  strict: bool = False,
) -> tuple[Recipe, ...]:
  """Reads recipes that are Python dicts; errors name paths in them.

  Args:
    documents: plain values, as `python_values.plain_documents` returns them.
    is_folder: as for `parse`.
    strict: as for `read`.

  Example:
    >>> (recipe,) = parse_values([{"merge_method": "karcher", "models": [{"model": "a"}]}])
    >>> str(recipe.models[0].place)
    'models[0].model'
  """
  nodes = python_values.nodes(documents)
  return _parse_nodes(nodes, "recipe", [], is_folder, strict)


def _parse_nodes(
  nodes: Sequence[Node],
  file: str,
  problems: list[Problem],
  is_folder: Callable[[str], bool],
  strict: bool,
) -> tuple[Recipe, ...]:
  """Reads the documents of a recipe, and raises all problems together."""
  if not nodes or len(nodes) > MOST_DOCUMENTS:
    what = f"more than {MOST_DOCUMENTS} recipes" if nodes else "no recipe"
    raise RecipeError([*problems, Problem(Place(file, 1, 1), f"{what} in this file.")])
  context = Context(problems, _names(nodes, problems) if len(nodes) > 1 else (), is_folder)
  recipes = tuple(recipe for node in nodes if (recipe := _read_document(node, context)))
  ordered = _sort(recipes, problems)
  if strict or any(recipe.strict for recipe in recipes):
    refused = "strict refuses what is ignored: remove it."
    problems[:] = [p._replace(text=f"{p.text} {refused}") if p.ignored else p for p in problems]
  elif all(problem.ignored for problem in problems):
    problems.clear()
  if problems:
    wrong = {problem.place for problem in problems}
    named = dict.fromkeys(m for recipe in recipes for m in models_of(recipe))
    raise RecipeError(
      problems, (m for m in named if m.place not in wrong and m.path not in context.names)
    )
  return ordered


def _names(nodes: Sequence[Node], problems: list[Problem]) -> dict[str, Place]:
  """Returns the names of recipes with their positions; one recipe may have no name."""
  names: dict[str, Place] = {}
  nameless = None
  for node in nodes:
    name = node.value.get("name") if isinstance(node.value, dict) else None
    if name is None:
      if nameless and isinstance(node.value, dict):
        text = f"only one recipe of a file may be without a name; so is that in {nameless}."
        add(problems, node.place, text)
      nameless = node.place.short
    elif isinstance(name.value, str) and name.value in names:
      text = f"the name {show(name.value)} is already in {names[name.value].short}."
      add(problems, name.place, text)
    elif isinstance(name.value, str):
      names[name.value] = name.place
  return names


def _read_document(node: Node, context: Context) -> Recipe | None:
  """Returns the record of one document, with its ignored keys; None if it is no mapping."""
  problems = context.problems
  before = len(problems)
  recipe = _recipe(node, context)
  for problem in validate.problems(recipe) if recipe else ():
    add(problems, *problem)
  ignored = tuple(problem for problem in problems[before:] if problem.ignored)
  return dataclasses.replace(recipe, ignored=ignored) if recipe else None


def _recipe(node: Node, context: Context) -> Recipe | None:
  """Returns the record of one document; None if it is no mapping."""
  problems = context.problems
  if node.value is None:
    add(problems, node.place, "this document is empty; remove the --- before or after it.")
    return None
  foreign = isinstance(node.value, dict) and _REFUSED.keys() & node.value.keys()
  nodes = fields.mapping(
    node,
    "the recipe",
    KEYS,
    problems,
    needed=() if foreign else ("merge_method",),
    refused=_REFUSED,
    ignored=inputs.PARAMETERS | _IGNORED,
  )
  if not isinstance(node.value, dict) or foreign:
    return None
  inputs.one_of(nodes, INPUTS, "the recipe", node, problems)
  changes = fields.maybe(fields.items, nodes.get("overrides"), "overrides", problems) or ()
  if len(changes) > MOST_OVERRIDES:
    add(problems, nodes["overrides"].place, f"there are more than {MOST_OVERRIDES} overrides.")
    changes = ()
  methods = _methods(nodes.get("merge_method"), changes, problems)
  known = inputs.known_parameters(methods)
  recipe = Recipe(
    methods[0],
    fields.maybe(inputs.sources, nodes.get("models"), "models", known, False, context) or (),
    fields.maybe(inputs.slices, nodes.get("slices"), known, context) or (),
    fields.maybe(inputs.modules, nodes.get("modules"), known, context) or {},
    fields.maybe(references.model, nodes.get("base_model"), "base_model", context),
    inputs.level(nodes.get("parameters"), known, problems),
    fields.maybe(_dtype, nodes.get("dtype"), "dtype", problems),
    fields.maybe(_dtype, nodes.get("out_dtype"), "out_dtype", problems),
    chat_template=fields.maybe(_chat_template, nodes.get("chat_template"), problems),
    name=fields.maybe(_name, nodes.get("name"), problems),
    strict=fields.maybe(fields.truth, nodes.get("strict"), "strict", problems) or False,
    compat=fields.maybe(fields.choice, nodes.get("compat"), "compat", COMPAT, problems),
    missing=fields.maybe(fields.choice, nodes.get("missing"), "missing", MISSING, problems)
    or "error",
    allow=fields.maybe(_allow, nodes.get("allow"), problems) or (),
    exclude=fields.maybe(_exclude, nodes.get("exclude"), problems) or (),
    overrides=inputs.overrides(changes, methods[1:], problems),
    layout=fields.maybe(inputs.layout, nodes.get("layout"), problems) or (),
    rename=fields.maybe(inputs.rename, nodes.get("rename"), problems) or {},
    seed=fields.maybe(fields.whole, nodes.get("seed"), "seed", 0, 2**32 - 1, problems) or 0,
    place=node.place,
    places=node.keys,
  )
  recipe = dataclasses.replace(recipe, tokenizer=_tokenizer(nodes, recipe, context))
  return dataclasses.replace(recipe, uses=_uses(recipe, context.names))


def _methods(
  method_node: Node | None, changes: Sequence[Node], problems: list[Problem]
) -> list[str]:
  """Returns the method of the recipe and those of its overrides; "" for an unknown one."""

  def method(node: Node) -> str:
    near = fields.choice(node, "merge_method", tuple(METHODS), problems)
    word = node.value if isinstance(node.value, str) else ""
    return near if fields.closest(word, METHODS) else ""

  first = fields.maybe(method, method_node) or ""
  insides = [node.value if isinstance(node.value, dict) else {} for node in changes]
  others = [inside.get("merge_method") for inside in insides]
  return [first, *(method(n) if n and n.value is not None else first for n in others)]


def _dtype(node: Node, what: str, problems: list[Problem]) -> str:
  if isinstance(node.value, str):
    node = node._replace(value=node.value.removeprefix("torch."))
  return fields.choice(node, what, DTYPES, problems)


def _chat_template(node: Node, problems: list[Problem]) -> str:
  """Returns the name of a template, or the Jinja text of one."""
  jinja = isinstance(node.value, str) and ("{{" in node.value or "{%" in node.value)
  return node.value if jinja else fields.choice(node, "chat_template", CHAT_TEMPLATES, problems)


def _name(node: Node, problems: list[Problem]) -> str:
  """Returns a recipe's name, which must be valid as a folder name and in a reference."""
  name = fields.text(node, "name", problems)
  if name != "?" and not re.fullmatch(r"\w[\w.-]{0,99}", name):
    text = f"name may have letters, digits, '.', '-' and '_', got {show(name)}"
    add(problems, node.place, f"{text}.")
  return name


def _exclude(node: Node, problems: list[Problem]) -> tuple[Where, ...]:
  listed = fields.items(node, "exclude", problems)
  return tuple(
    Where(pattern=fields.pattern(each, "an item of exclude", problems), place=each.place)
    for each in listed
  )


def _allow(node: Node, problems: list[Problem]) -> tuple[str, ...]:
  listed = fields.items(node, "allow", problems)
  return tuple(fields.text(each, "an item of allow", problems) for each in listed)


def _tokenizer(nodes: Mapping[str, Node], recipe: Recipe, context: Context) -> Tokenizer | None:
  """Returns the tokenizer from the key `tokenizer` or `tokenizer_source`."""
  models, old = dict.fromkeys(models_of(recipe)), nodes.get("tokenizer_source")
  new = fields.maybe(references.tokenizer, nodes.get("tokenizer"), models, context)
  if old is None:
    return new
  source = references.source(old, "tokenizer_source", models, context)
  if new:
    text = "a recipe cannot have both tokenizer_source and tokenizer: move it to tokenizer.source."
    add(context.problems, old.place, text)
  return new or Tokenizer(source, {}, place=old.place)


def _uses(recipe: Recipe, names: Collection[str]) -> tuple[str, ...]:
  """Returns the names of the recipes that a recipe refers to, in the order of the file."""
  models = [*models_of(recipe)]
  if recipe.tokenizer:
    models += [token.model for token in recipe.tokenizer.tokens.values() if token.model]
    models += [m for m in (recipe.tokenizer.source,) if isinstance(m, Model)]
  # With a revision it is a model of the hub, of the same name.
  paths = {m.path for m in models if m.revision is None}
  return tuple(name for name in names if name in paths)


def _sort(recipes: Sequence[Recipe], problems: list[Problem]) -> tuple[Recipe, ...]:
  """Returns the recipes, each after those that it uses, otherwise in the order of the file.

  The last one gives the result; a recipe without a name comes last.
  """
  named = {r.name: r for r in recipes if r.name}
  done: list[Recipe] = []
  open_: list[Recipe] = []

  def visit(recipe: Recipe) -> None:
    if any(recipe is r for r in open_):
      circle = ", ".join(repr(r.name) for r in (*open_[open_.index(recipe) :], recipe))
      add(
        problems,
        recipe.places.get("name", recipe.place),
        f"recipes build on each other in a circle: {circle}.",
      )
    elif not any(recipe is r for r in done):
      open_.append(recipe)
      for name in recipe.uses:
        if name in named:
          visit(named[name])
      done.append(open_.pop())

  for recipe in sorted(recipes, key=lambda recipe: recipe.name is None):
    visit(recipe)
  return tuple(done)
