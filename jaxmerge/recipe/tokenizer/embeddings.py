"""Recognises embeddings and output heads, and chooses the sources of their rows in the result."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jaxmerge.files import plan
from jaxmerge.io.huggingface.vocabulary import Vocabulary
from jaxmerge.io.tensors import rows
from jaxmerge.io.tensors.tensor import Tensor
from jaxmerge.recipe import layers
from jaxmerge.recipe.errors import Problem, join_some
from jaxmerge.recipe.records import Model, Token, Tokenizer

Opened = Mapping[Model, plan.Model]
Vocabularies = Mapping[Model, Vocabulary]

# Embeddings of something other than tokens.
_OTHERS = re.compile(r"(^|[._])(pos|positions?|wpe|type|patch)([._]|$)")
_OUTPUTS = re.compile(
  r"(^|\.)(\w*lm_head|embed_out|proj_out|output|vocab_projector|predictions"
  r"|(lm_head|predictions)\.decoder)\.(weight|bias)$"
)


def is_token_matrix(name: str, tensor: Tensor) -> bool:
  """Returns whether a tensor's name is that of a token embedding or an output head.

  >>> matrix = Tensor("", np.dtype(np.float32), (9, 2), lambda start, out: None)
  >>> names = ("model.embed_tokens.weight", "bert.position_embeddings.weight")
  >>> [is_token_matrix(name, matrix) for name in names]
  [True, False]
  """
  if _OUTPUTS.search(name):  # Inside a layer, such a name is a projection.
    return len(tensor.shape) in (1, 2) and layers.place(name) is None
  return len(tensor.shape) == 2 and layers.is_input(name) and not _OTHERS.search(name)


def has_token_matrix(request: plan.TensorRequest) -> bool:
  """Returns whether a tensor of the result is computed from embeddings or output heads."""
  parts = [p for p in (request.base, *request.models) if p is not None]
  return any(p.tensor is not None and is_token_matrix(p.name, p.tensor) for p in parts)


def token_matrix_names(vocabularies: Vocabularies, models: Opened) -> frozenset[str]:
  """Returns the names of token matrices that have a row for each token in at least one model."""
  return frozenset(
    name
    for model, opened in models.items()
    for name, tensor in opened.tensors.items()
    if is_token_matrix(name, tensor) and tensor.shape[0] >= vocabularies[model].size
  )


def narrow_problems(
  vocabularies: Vocabularies, models: Opened, names: frozenset[str]
) -> Iterator[Problem]:
  """Yields a problem for each model whose token matrices have fewer rows than it has tokens."""
  for model, opened in models.items():
    row_counts = {n: t.shape[0] for n, t in opened.tensors.items() if is_token_matrix(n, t)}
    size = vocabularies[model].size
    short = {n: rows for n, rows in row_counts.items() if rows < size and (n in names or not names)}
    if short or not row_counts.keys() & names:
      words = join_some(f"{n} has {rows} rows" for n, rows in (short or row_counts).items())
      text = f"{model}: its tokenizer needs {size} rows, but {words or 'there is no embedding'}"
      yield Problem(model.place, f"{text}; give it the tokenizer that it was trained with.")


def uneven_problems(models: Opened, names: frozenset[str]) -> Iterator[Problem]:
  """Yields a problem where rows have another shape than in the first model with that tensor."""
  for name in sorted(names):
    (first, expected), *others = [(m, t.shape[1:]) for m, t in _having(name, models).items()]
    for model, shape in others:
      if shape != expected:
        text = f"{name} has rows of {list(shape)} in {model}, but of {list(expected)} in {first}."
        yield Problem(model.place, text)


def row_problems(
  tokenizer: Tokenizer, vocabularies: Vocabularies, models: Opened, names: frozenset[str]
) -> Iterator[Problem]:
  """Yields a problem for each row that a recipe chooses for a token but that does not exist."""
  for text, token in tokenizer.tokens.items():
    if token.model is None:
      continue
    source_text = text if token.token is None else token.token
    if token.token_id is None and source_text not in vocabularies[token.model].ids:
      yield Problem(token.place, f"{token.model} has no token {source_text!r}.")
    for name in sorted(names):
      tensor = models[token.model].input(name).tensor
      if tensor is None:
        yield Problem(token.place, f"{token.model} has no tensor {name!r} to take the row from.")
      elif token.token_id is not None and token.token_id >= tensor.shape[0]:
        place = f"{name} of {token.model} has {tensor.shape[0]} rows"
        yield Problem(token.place, f"token_id {token.token_id} is out of range: {place}.")


class Order(NamedTuple):
  """The order of the rows of the result.

  Attributes:
    tokenizer: the recipe's tokenizer section.
    base: the recipe's base, if any.
    vocabularies: the vocabularies of the models.
    merged: the vocabulary of the result.
    size: number of rows of the result.
  """

  tokenizer: Tokenizer
  base: Model | None
  vocabularies: Vocabularies
  merged: Vocabulary
  size: int


def reorder(models: Opened, names: frozenset[str], order: Order) -> dict[Model, plan.Model]:
  """Returns the models with the rows of these tensors in the order of the result.

  A head that is tied to its embedding stays tied where the models agree.
  """
  empty = np.ones(order.size, bool)
  empty[list(order.merged.ids.values())] = False
  row_ids = {m: _rows(order, m) for m in models}
  tensors = {m: dict(opened.tensors) for m, opened in models.items()}
  tied = {m: dict(opened.tied) for m, opened in models.items()}
  gathered: dict[object, Tensor] = {}
  for name in sorted(names):
    fills = _fills(order, name, models)
    fills_key = tuple((row, tuple(sources)) for row, sources in sorted(fills.items()))
    for m in models:
      for by_name in (tensors[m], tied[m]):
        if name in by_name:
          key = m, by_name[name], fills_key
          if key not in gathered:
            gathered[key] = rows.gather(by_name[name], row_ids[m], fills, empty)
          by_name[name] = gathered[key]
  return {m: o._replace(tensors=tensors[m], tied=tied[m]) for m, o in models.items()}


def _having(name: str, models: Opened) -> dict[Model, Tensor]:
  """Returns each model's tensor of a name; for a tied head, that is its embedding."""
  tensors = {m: opened.input(name).tensor for m, opened in models.items()}
  return {m: tensor for m, tensor in tensors.items() if tensor is not None}


def _rows(order: Order, model: Model) -> np.ndarray:
  """Returns the model's row id for each row of the result; -1 where it lacks the token."""
  row_ids, ids = np.full(order.size, -1, np.int64), order.vocabularies[model].ids
  forced = {text for text, token in order.tokenizer.tokens.items() if token.force}
  for text, row in order.merged.ids.items():
    if text in ids and text not in forced:
      row_ids[row] = ids[text]
  return row_ids


def _fills(order: Order, name: str, models: Opened) -> dict[int, list[rows.Row]]:
  """Returns the rows that replace a missing token's: the base's, else all, which are averaged."""
  tensors = _having(name, models)
  fills = {}
  for text, row in order.merged.ids.items():
    have = [
      (m, order.vocabularies[m].ids[text]) for m in tensors if text in order.vocabularies[m].ids
    ]
    if text in order.tokenizer.tokens:
      have = _donor(order.tokenizer.tokens[text], text, order.vocabularies)
    elif len(have) == len(tensors):
      continue
    elif have and have[0][0] == order.base:
      have = have[:1]
    # Sorted, so that a sum does not depend on the order of the models.
    fills[row] = [(tensors[m], number) for m, number in sorted(have, key=lambda pair: str(pair[0]))]
  return fills


def _donor(token: Token, text: str, vocabularies: Vocabularies) -> list[tuple[Model, int]]:
  """Returns the row that a recipe chooses for a token; an empty list for a zero row."""
  if token.model is None:
    return []
  if token.token_id is not None:
    return [(token.model, token.token_id)]
  return [
    (token.model, vocabularies[token.model].ids[text if token.token is None else token.token])
  ]
