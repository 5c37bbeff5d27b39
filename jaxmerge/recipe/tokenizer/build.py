"""Builds the merged model's tokenizer, and puts embedding rows into the order of its vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple  # Any: values of a config.json.

from jaxmerge.files import plan
from jaxmerge.io.huggingface import folder as folders
from jaxmerge.io.huggingface import vocabulary
from jaxmerge.io.huggingface.vocabulary import Flags, TokenizerFiles, Vocabulary
from jaxmerge.recipe import errors
from jaxmerge.recipe.errors import Problem, RecipeError, join_some
from jaxmerge.recipe.records import Model, Recipe, Tokenizer, groups
from jaxmerge.recipe.tokenizer import chat_template, embeddings

Opened = Mapping[Model, plan.Model]
Vocabularies = Mapping[Model, Vocabulary]
Texts = Mapping[str, str | None]
ReadFiles = Callable[[Model], TokenizerFiles]

GENERATION = "generation_config.json"


class TokenizerResult(NamedTuple):
  """The result of a recipe's tokenizer and chat template.

  Attributes:
    models: the models; their embeddings and output heads have a row for each token of the result.
    texts: files of the result by name; None: the donor's file is left out.
    size: number of rows; None: unchanged.
    names: the tensors whose rows changed.
    numbers: ids of special tokens for the config, where the vocabulary is not the donor's.
  """

  models: Opened
  texts: Texts
  size: int | None = None
  names: frozenset[str] = frozenset()
  numbers: Mapping[str, Any] | None = None

  def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json with the result's vocabulary size and special tokens."""
    changed = {**config, **{k: v for k, v in (self.numbers or {}).items() if k in config}}
    inner = config.get("text_config") or {}
    if self.size is not None and "vocab_size" in inner:
      changed["text_config"] = {**inner, "vocab_size": self.size}
    if self.size is not None and ("vocab_size" in config or "vocab_size" not in inner):
      changed["vocab_size"] = self.size
    return changed

  def outcomes(self, outcomes: plan.Outcomes) -> plan.Outcomes:
    """Returns the outcomes of tensors; those with changed rows are rewritten first."""
    rows = plan.Outcome("rewritten", reason="rows by the tokenizer")
    return {
      model: {n: (rows, *each) if n in self.names else each for n, each in by_name.items()}
      for model, by_name in outcomes.items()
    }


def build(recipe: Recipe, models: Opened, read_files: ReadFiles) -> TokenizerResult:
  """Builds the tokenizer and the chat template of a recipe.

  Args:
    recipe: the recipe.
    models: all models of the recipe; the result copies the files of the first.
    read_files: returns the files of a model of which only the vocabulary is used.

  Raises:
    RecipeError: for tokenizers that cannot be read or combined, and for embeddings without a row
      for each token.
  """
  problems: list[Exception] = []
  result, home = TokenizerResult(models, {}), files_of(next(iter(models.values())))
  if recipe.tokenizer is not None:
    with errors.collect(problems):
      result, home = _build(recipe, recipe.tokenizer, models, read_files)
  if recipe.chat_template is not None:
    with errors.collect(problems):
      result = _with_template(result, recipe.chat_template, models, home)
  errors.raise_all(problems)
  return result


def files_of(model: plan.Model) -> TokenizerFiles:
  """Returns the small files of an open model."""
  return TokenizerFiles(model.folder, model.texts)


def _with_template(
  result: TokenizerResult, choice: str, models: Opened, home: TokenizerFiles
) -> TokenizerResult:
  """Returns the result with the chat template that a recipe chooses, in the files that hold it."""
  template = chat_template.choose(choice, map(files_of, models.values()))
  if template is None:
    return result
  texts = chat_template.texts(template, home, result.texts.get(vocabulary.SETTINGS))
  return result._replace(texts={**result.texts, **texts})


def _build(
  recipe: Recipe, tokenizer: Tokenizer, models: Opened, read_files: ReadFiles
) -> tuple[TokenizerResult, TokenizerFiles]:
  """Returns the models with one vocabulary, and the files of its tokenizer."""
  vocabularies: dict[Model, Vocabulary] = {}
  problems: list[Exception] = []
  for m in models:
    with errors.collect(problems):
      vocabularies[m] = _read_vocabulary(m, lambda m: files_of(models[m]))
  errors.raise_all(problems)
  merged = _merge(recipe, tokenizer, vocabularies, read_files)
  names = embeddings.token_matrix_names(vocabularies, models)
  _check(tokenizer, vocabularies, models, names)
  result = TokenizerResult(
    _with_files(models),
    texts_of(merged, files_of(next(iter(models.values())))),
    numbers=_numbers(merged, vocabularies),
  )
  pad = tokenizer.pad_to_multiple_of
  size = -(-merged.size // (pad or 1)) * (pad or 1)
  row_counts = {m.tensors[n].shape[0] for m in models.values() for n in names & m.tensors.keys()}
  forced = any(token.force for token in tokenizer.tokens.values())
  alike = len(row_counts) == 1 and all(v.ids == merged.ids for v in vocabularies.values())
  if alike and not forced and (pad is None or row_counts == {size}):
    return result, merged.files
  order = embeddings.Order(tokenizer, recipe.base_model, vocabularies, merged, size)
  ordered = embeddings.reorder(result.models, names, order)
  return result._replace(models=ordered, size=size, names=names), merged.files


def _check(
  tokenizer: Tokenizer, vocabularies: Vocabularies, models: Opened, names: frozenset[str]
) -> None:
  problems = [
    *embeddings.narrow_problems(vocabularies, models, names),
    *embeddings.uneven_problems(models, names),
    *embeddings.row_problems(tokenizer, vocabularies, models, names),
  ]
  if problems:
    raise RecipeError(problems)


def _with_files(models: Opened) -> Opened:
  """Returns the models with their tokenizer files added to the files that are read."""
  paths = {m: [o.folder / name for name in vocabulary.FILES if o.files] for m, o in models.items()}
  return {
    m: o._replace(files=(*o.files, *(path for path in paths[m] if path.is_file())))
    for m, o in models.items()
  }


# --- The vocabulary ---


def _read_vocabulary(model: Model, read_files: ReadFiles) -> Vocabulary:
  try:
    return vocabulary.read(read_files(model))
  except (OSError, ValueError) as error:
    raise RecipeError([Problem(model.place, str(error))]) from error


def _merge(
  recipe: Recipe, tokenizer: Tokenizer, vocabularies: Vocabularies, read_files: ReadFiles
) -> Vocabulary:
  """Returns the vocabulary of the result: that of one model, with the tokens a recipe adds."""
  first, model = next(iter(vocabularies.values())), tokenizer.source
  if model == "base":  # Each slice may have another base.
    model = recipe.base_model or groups(recipe)[0].base or model
  if isinstance(model, Model):
    first = vocabularies[model] if model in vocabularies else _read_vocabulary(model, read_files)
  more = (
    _added_by_union(recipe, tokenizer, vocabularies, first) if tokenizer.source == "union" else {}
  )
  listed = {t: vocabulary.PLAIN for t in tokenizer.tokens if t not in first.ids and t not in more}
  return vocabulary.extend(first, {**more, **listed})


def _added_by_union(
  recipe: Recipe, tokenizer: Tokenizer, vocabularies: Vocabularies, first: Vocabulary
) -> dict[str, Flags]:
  """Returns the tokens that a union adds to the first vocabulary, by model and then by id."""
  ordinary: dict[str, Model] = {}
  more: dict[str, Flags] = {}
  for model, other in vocabularies.items():
    for text in sorted(other.ids, key=other.ids.__getitem__):
      if text in other.added:
        if text not in first.added:
          more.setdefault(text, other.added[text])
      elif text not in first.ids:
        ordinary.setdefault(text, model)
  lost = {t: m for t, m in ordinary.items() if t not in more and t not in tokenizer.tokens}
  if recipe.compat == "mergekit":
    return {**dict.fromkeys(lost, vocabulary.PLAIN), **more}
  if lost:
    names = join_some((f"{text!r} of {model}" for text, model in lost.items()), 4)
    text = (
      f"union: ordinary tokens that {next(iter(vocabularies))} lacks: {names}. Adding them would "
      "change how words are split: name a model as the source, or, to add them anyway, list them "
      "under tokens or write compat: mergekit."
    )
    raise RecipeError([Problem(tokenizer.place, text)])
  return more


def texts_of(merged: Vocabulary, home: TokenizerFiles) -> Texts:
  """Returns the files of the tokenizer that differ from those of the donor."""
  texts: dict[str, str | None] = {}
  if merged.files != home:
    texts = dict.fromkeys(home.names(*vocabulary.FILES, "*.model"))
    numbers = special_numbers(merged.files, GENERATION)
    if numbers and home.has(GENERATION):
      texts[GENERATION] = vocabulary.text(home.json(GENERATION) | numbers)
  for name, text in vocabulary.texts(merged).items():
    if merged.files != home or home.text(name) != text:
      texts[name] = text
  return texts


def special_numbers(files: TokenizerFiles, name: str) -> dict[str, Any]:
  """Returns the ids of special tokens in a config."""
  return {key: value for key, value in files.json(name).items() if key.endswith("_token_id")}


def _numbers(merged: Vocabulary, vocabularies: Vocabularies) -> dict[str, Any]:
  same = merged.files == next(iter(vocabularies.values())).files
  return {} if same else special_numbers(merged.files, folders.CONFIG)
