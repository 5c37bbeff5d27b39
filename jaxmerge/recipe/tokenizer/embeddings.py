"""Embeddings and output heads: which they are, and where the rows of the merged ones come from."""

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
Own = Mapping[Model, Vocabulary]

# Embeddings, but not of tokens.
_OTHERS = re.compile(r"(^|[._])(pos|positions?|wpe|type|patch)([._]|$)")
_OUTPUTS = re.compile(
  r"(^|\.)(\w*lm_head|embed_out|proj_out|output|vocab_projector|predictions"
  r"|(lm_head|predictions)\.decoder)\.(weight|bias)$"
)


def named(name: str, tensor: Tensor) -> bool:
  """Tells whether a tensor is called as an embedding of tokens, or as an output head.

  >>> own = Tensor("", np.dtype(np.float32), (9, 2), lambda start, out: None)
  >>> named("model.embed_tokens.weight", own), named("bert.position_embeddings.weight", own)
  (True, False)
  """
  if _OUTPUTS.search(name):  # Projections of such names within the layers are none.
    return len(tensor.shape) in (1, 2) and layers.place(name) is None
  return len(tensor.shape) == 2 and layers.is_input(name) and not _OTHERS.search(name)


def wanted(want: plan.TensorRequest) -> bool:
  """Tells whether any of the parts of what is wanted is called so."""
  parts = [p for p in (want.base, *want.models) if p is not None]
  return any(p.tensor is not None and named(p.name, p.tensor) for p in parts)


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
      words = join_some(f"{n} has {rows} rows" for n, rows in (short or called).items())
      text = f"{model}: its tokenizer needs {size} rows, but {words or 'there is no embedding'}"
      yield Problem(model.place, f"{text}; give it the tokenizer that it was trained with.")


def uneven(models: Opened, names: frozenset[str]) -> Iterator[Problem]:
  """Finds tensors whose rows are not like those of the first model that has them."""
  for name in sorted(names):
    (first, own), *others = [(m, t.shape[1:]) for m, t in _having(name, models).items()]
    for model, shape in others:
      if shape != own:
        text = f"{name} has rows of {list(shape)} in {model}, but of {list(own)} in {first}."
        yield Problem(model.place, text)


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
      tensor = models[token.model].part(name).tensor
      if tensor is None:
        yield Problem(token.place, f"{token.model} has no tensor {name!r} to take the row from.")
      elif token.token_id is not None and token.token_id >= tensor.shape[0]:
        place = f"{name} of {token.model} has {tensor.shape[0]} rows"
        yield Problem(token.place, f"token_id {token.token_id} is out of range: {place}.")


class Order(NamedTuple):
  """How the rows of the result go together.

  Attributes:
    said: what the recipe says.
    base: its base, if it has one.
    own: the vocabularies of the models.
    merged: that of the result.
    size: rows of the result.
  """

  said: Tokenizer
  base: Model | None
  own: Own
  merged: Vocabulary
  size: int


def reordered(models: Opened, names: frozenset[str], order: Order) -> dict[Model, plan.Model]:
  """Returns the models with the tensors of these names as they are in the result.

  A head that is tied to its embedding stays the same tensor, where models agree about that.
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
  """The tensors of a name; an embedding stands in for a head that is tied to it."""
  found = {m: opened.part(name).tensor for m, opened in models.items()}
  return {m: tensor for m, tensor in found.items() if tensor is not None}


def _rows(order: Order, model: Model) -> np.ndarray:
  """For each row of the result the model's own row of that token; -1 where it has none."""
  found, ids = np.full(order.size, -1, np.int64), order.own[model].ids
  forced = {text for text, token in order.said.tokens.items() if token.force}
  for text, row in order.merged.ids.items():
    if text in ids and text not in forced:
      found[row] = ids[text]
  return found


def _fills(order: Order, name: str, models: Opened) -> dict[int, list[rows.Row]]:
  """The rows for models that lack a token: the base's, else all those whose mean it is."""
  tensors = _having(name, models)
  found = {}
  for text, row in order.merged.ids.items():
    have = [(m, order.own[m].ids[text]) for m in tensors if text in order.own[m].ids]
    if text in order.said.tokens:
      have = _donor(order.said.tokens[text], text, order.own)
    elif len(have) == len(tensors):
      continue
    elif have and have[0][0] == order.base:
      have = have[:1]
    # In an order of their own: a sum must not depend on how the models are listed.
    found[row] = [(tensors[m], number) for m, number in sorted(have, key=lambda own: str(own[0]))]
  return found


def _donor(token: Token, text: str, own: Own) -> list[tuple[Model, int]]:
  """The row that a token shall have: none for zero."""
  if token.model is None:
    return []
  if token.token_id is not None:
    return [(token.model, token.token_id)]
  return [(token.model, own[token.model].ids[text if token.token is None else token.token])]
