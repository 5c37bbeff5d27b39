"""The merged model's tokenizer: its vocabulary and files, and embeddings with rows in its order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple  # Any: what a config.json holds.

from jaxmerge.files import plan
from jaxmerge.io.huggingface import folder as folders
from jaxmerge.io.huggingface import vocabulary
from jaxmerge.io.huggingface.vocabulary import Flags, TokenizerFiles, Vocabulary
from jaxmerge.recipe import errors
from jaxmerge.recipe.errors import Problem, RecipeError, join_some
from jaxmerge.recipe.records import Model, Recipe, Tokenizer, groups
from jaxmerge.recipe.tokenizer import chat_template, embeddings

Opened = Mapping[Model, plan.Model]
Own = Mapping[Model, Vocabulary]
Texts = Mapping[str, str | None]
PapersOf = Callable[[Model], TokenizerFiles]

GENERATION = "generation_config.json"


class Built(NamedTuple):
  """What comes of a recipe's tokenizer and chat template.

  Attributes:
    models: the models; their embeddings and output heads have a row for each token of the result.
    texts: files of the result by name; None: it is not taken over from the donor.
    size: how many rows; None: they are as they were.
    names: the tensors with other rows.
    numbers: of special tokens, for the config, where the vocabulary is not the donor's.
  """

  models: Opened
  texts: Texts
  size: int | None = None
  names: frozenset[str] = frozenset()
  numbers: Mapping[str, Any] | None = None

  def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json as it holds for the result."""
    changed = {**config, **{k: v for k, v in (self.numbers or {}).items() if k in config}}
    inner = config.get("text_config") or {}
    if self.size is not None and "vocab_size" in inner:
      changed["text_config"] = {**inner, "vocab_size": self.size}
    if self.size is not None and ("vocab_size" in config or "vocab_size" not in inner):
      changed["vocab_size"] = self.size
    return changed

  def outcomes(self, outcomes: plan.Outcomes) -> plan.Outcomes:
    """Returns the outcomes of tensors, those with other rows first rewritten."""
    rows = plan.Outcome("rewritten", reason="rows by the tokenizer")
    return {
      model: {n: (rows, *each) if n in self.names else each for n, each in by_name.items()}
      for model, by_name in outcomes.items()
    }


def built(recipe: Recipe, models: Opened, papers_of: PapersOf) -> Built:
  """Does what a recipe says about the tokenizer and the chat template.

  Args:
    recipe: the recipe.
    models: all that it names; the result takes over the files of the first.
    papers_of: returns the files of a model of which only the vocabulary is wanted.

  Raises:
    RecipeError: for tokenizers that cannot be read or brought together, and embeddings without a
      row for each token.
  """
  found: list[Exception] = []
  made, home = Built(models, {}), papers(next(iter(models.values())))
  if recipe.tokenizer is not None:
    with errors.collect(found):
      made, home = _built(recipe, recipe.tokenizer, models, papers_of)
  if recipe.chat_template is not None:
    with errors.collect(found):
      made = _with_template(made, recipe.chat_template, models, home)
  errors.raise_all(found)
  return made


def papers(model: plan.Model) -> TokenizerFiles:
  """Returns the small files of a model that is opened."""
  return TokenizerFiles(model.folder, model.texts)


def _with_template(made: Built, said: str, models: Opened, home: TokenizerFiles) -> Built:
  template = chat_template.chosen(said, map(papers, models.values()))
  if template is None:
    return made
  own = chat_template.texts(template, home, made.texts.get(vocabulary.SETTINGS))
  return made._replace(texts={**made.texts, **own})


def _built(
  recipe: Recipe, said: Tokenizer, models: Opened, papers_of: PapersOf
) -> tuple[Built, TokenizerFiles]:
  """Brings the vocabularies together; with the files of the tokenizer that is taken."""
  own: dict[Model, Vocabulary] = {}
  found: list[Exception] = []
  for m in models:
    with errors.collect(found):
      own[m] = _read(m, lambda m: papers(models[m]))
  errors.raise_all(found)
  merged = _merged(recipe, said, own, papers_of)
  names = embeddings.names(own, models)
  _check(said, own, models, names)
  made = Built(
    _stamped(models),
    _texts(merged, papers(next(iter(models.values())))),
    numbers=_numbers(merged, own),
  )
  pad = said.pad_to_multiple_of
  size = -(-merged.size // (pad or 1)) * (pad or 1)
  heights = {m.tensors[n].shape[0] for m in models.values() for n in names & m.tensors.keys()}
  forced = any(token.force for token in said.tokens.values())
  alike = len(heights) == 1 and all(v.ids == merged.ids for v in own.values())
  if alike and not forced and (pad is None or heights == {size}):
    return made, merged.files
  order = embeddings.Order(said, recipe.base_model, own, merged, size)
  ordered = embeddings.reordered(made.models, names, order)
  return made._replace(models=ordered, size=size, names=names), merged.files


def _check(said: Tokenizer, own: Own, models: Opened, names: frozenset[str]) -> None:
  problems = [
    *embeddings.narrow(own, models, names),
    *embeddings.uneven(models, names),
    *embeddings.misplaced(said, own, models, names),
  ]
  if problems:
    raise RecipeError(problems)


def _stamped(models: Opened) -> Opened:
  """The models, with the tokenizer's files among those that are read, where they are there yet."""
  found = {m: [o.folder / name for name in vocabulary.FILES if o.files] for m, o in models.items()}
  return {
    m: o._replace(files=(*o.files, *(path for path in found[m] if path.is_file())))
    for m, o in models.items()
  }


# --- The vocabulary ---


def _read(model: Model, papers_of: PapersOf) -> Vocabulary:
  try:
    return vocabulary.read(papers_of(model))
  except (OSError, ValueError) as error:
    raise RecipeError([Problem(model.place, str(error))]) from error


def _merged(recipe: Recipe, said: Tokenizer, own: Own, papers_of: PapersOf) -> Vocabulary:
  """The vocabulary of the result: that of one model, and what is added to it."""
  first, model = next(iter(own.values())), said.source
  if model == "base":  # Of slices each may have its own.
    model = recipe.base_model or groups(recipe)[0].base or model
  if isinstance(model, Model):
    first = own[model] if model in own else _read(model, papers_of)
  more = _others(recipe, said, own, first) if said.source == "union" else {}
  named = {t: vocabulary.PLAIN for t in said.tokens if t not in first.ids and t not in more}
  return vocabulary.extend(first, {**more, **named})


def _others(recipe: Recipe, said: Tokenizer, own: Own, first: Vocabulary) -> dict[str, Flags]:
  """What a union adds to the first model's vocabulary, in the order of the models and numbers."""
  ordinary: dict[str, Model] = {}
  more: dict[str, Flags] = {}
  for model, other in own.items():
    for text in sorted(other.ids, key=other.ids.__getitem__):
      if text in other.added:
        if text not in first.added:
          more.setdefault(text, other.added[text])
      elif text not in first.ids:
        ordinary.setdefault(text, model)
  lost = {t: m for t, m in ordinary.items() if t not in more and t not in said.tokens}
  if recipe.compat == "mergekit":
    return {**dict.fromkeys(lost, vocabulary.PLAIN), **more}
  if lost:
    names = join_some((f"{text!r} of {model}" for text, model in lost.items()), 4)
    text = (
      f"union: ordinary tokens that {next(iter(own))} lacks: {names}. Added to it, they would "
      "cut words in another way: name a model as the source, or, to have them added all the same, "
      "list them under tokens or write compat: mergekit."
    )
    raise RecipeError([Problem(said.place, text)])
  return more


def _texts(merged: Vocabulary, home: TokenizerFiles) -> Texts:
  """The tokenizer's files as far as they differ from those that are taken over."""
  made: dict[str, str | None] = {}
  if merged.files != home:
    made = dict.fromkeys(home.names(*vocabulary.FILES, "*.model"))
    numbers = _special(merged.files, GENERATION)
    if numbers and home.has(GENERATION):
      made[GENERATION] = vocabulary.text(home.json(GENERATION) | numbers)
  for name, text in vocabulary.texts(merged).items():
    if merged.files != home or home.text(name) != text:
      made[name] = text
  return made


def _special(papers: TokenizerFiles, name: str) -> dict[str, Any]:
  """The numbers of special tokens that a config says."""
  return {key: value for key, value in papers.json(name).items() if key.endswith("_token_id")}


def _numbers(merged: Vocabulary, own: Own) -> dict[str, Any]:
  same = merged.files == next(iter(own.values())).files
  return {} if same else _special(merged.files, folders.CONFIG)
