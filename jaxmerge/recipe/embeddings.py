"""Embeddings and output heads: which they are, and where the rows of the merged ones come from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from jaxmerge import planning
from jaxmerge.io import rows
from jaxmerge.io.tensor import Tensor
from jaxmerge.recipe import layers
from jaxmerge.recipe.places import Problem, listed
from jaxmerge.recipe.records import Model, Token, Tokenizer
from jaxmerge.recipe.vocabulary import Vocabulary

Opened = Mapping[Model, planning.Model]
Own = Mapping[Model, Vocabulary]

# Embeddings, but not of tokens.
_OTHERS = re.compile(r"(^|[._])(pos|positions?|wpe|type|patch)([._]|$)")
_OUTPUTS = re.compile(
  r"(^|\.)(\w*lm_head|embed_out|output|vocab_projector|predictions|(lm_head|predictions)\.decoder)"
  r"\.(weight|bias)$"
)


def named(name: str, tensor: Tensor) -> bool:
  """Tells whether a tensor is called as an embedding of tokens, or as an output head.

  >>> own = Tensor("", np.dtype(np.float32), (9, 2), lambda start, out: None)
  >>> named("model.embed_tokens.weight", own), named("bert.position_embeddings.weight", own)
  (True, False)
  """
  if _OUTPUTS.search(name):
    return len(tensor.shape) in (1, 2)
  return len(tensor.shape) == 2 and layers.is_input(name) and not _OTHERS.search(name)


def names(own: Own, models: Opened) -> frozenset[str]:
  """Returns the tensors that are called so and have enough rows, in one of the models at least."""
  return frozenset(
    name
    for model, opened in models.items()
    for name, tensor in opened.tensors.items()
    if named(name, tensor) and tensor.shape[0] >= own[model].size
  )


def narrow(own: Own, models: Opened, names: frozenset[str]) -> Iterator[Problem]:
  """Finds tensors with fewer rows than the model has tokens."""
  for model, opened in models.items():
    called = {n: t.shape[0] for n, t in opened.tensors.items() if named(n, t)}
    size = own[model].size
    short = {n: rows for n, rows in called.items() if rows < size and (n in names or not names)}
    if short or not called.keys() & names:
      words = listed(f"{n} has {rows} rows" for n, rows in (short or called).items())
      text = f"{model}: its tokenizer needs {size} rows, but {words or 'there is no embedding'}"
      yield Problem(model.place, f"{text}; give it the tokenizer that it was trained with.")


def misplaced(
  said: Tokenizer, own: Own, models: Opened, names: frozenset[str]
) -> Iterator[Problem]:
  """Finds embeddings that tokens shall have, but that are not there."""
  for text, token in said.tokens.items():
    if token.model is None:
      continue
    wanted = text if token.token is None else token.token
    if token.token_id is None and wanted not in own[token.model].ids:
      yield Problem(token.place, f"{token.model} has no token {wanted!r}.")
    for name in sorted(names):
      tensor = models[token.model].tensors.get(name)
      if tensor is None:
        yield Problem(token.place, f"{token.model} has no tensor {name!r} to take the row from.")
      elif token.token_id is not None and token.token_id >= tensor.shape[0]:
        place = f"{name} of {token.model} has {tensor.shape[0]} rows"
        yield Problem(token.place, f"token_id {token.token_id} is out of range: {place}.")


def order(own: Vocabulary, merged: Vocabulary, size: int, forced: set[str]) -> np.ndarray:
  """Returns for each row of the result the model's own row of that token; -1 where it has none."""
  found = np.full(size, -1, np.int64)
  for text, row in merged.ids.items():
    if text in own.ids and text not in forced:
      found[row] = own.ids[text]
  return found


def fills(
  name: str, said: Tokenizer, merged: Vocabulary, own: Own, models: Opened, base: Model | None
) -> dict[int, list[rows.Row]]:
  """Returns the rows for models that lack a token: the base's, else all those whose mean it is."""
  there = [m for m in models if name in models[m].tensors]
  found = {}
  for text, row in merged.ids.items():
    have = [(m, own[m].ids[text]) for m in there if text in own[m].ids]
    if text in said.tokens:
      have = _donor(said.tokens[text], text, own)
    elif len(have) == len(there):
      continue
    elif have and have[0][0] == base:
      have = have[:1]
    found[row] = [(models[m].tensors[name], number) for m, number in have]
  return found


def _donor(token: Token, text: str, own: Own) -> list[tuple[Model, int]]:
  """The row that a token shall have: none for zero."""
  if token.model is None:
    return []
  if token.token_id is not None:
    return [(token.model, token.token_id)]
  return [(token.model, own[token.model].ids[text if token.token is None else token.token])]
