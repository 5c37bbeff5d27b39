"""Transplants a tokenizer: embedding and head rows of a model in the order of a donor's tokens.

Shared tokens keep their rows. The row of a new token is a sum of the model's rows of shared tokens.
Its coefficients are those that approximate the donor's row of that token by the donor's rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple  # Any: a record is JSON.

import numpy as np

from jaxmerge.files import assemble, execute, inputs, plan
from jaxmerge.io.huggingface import folder, hub, vocabulary
from jaxmerge.io.huggingface.vocabulary import Vocabulary
from jaxmerge.io.tensors import pieces
from jaxmerge.io.tensors.tensor import Files, Tensor, widen
from jaxmerge.recipe import layers
from jaxmerge.recipe.tokenizer import approximation, build, embeddings, token_keys
from jaxmerge.recipe.tokenizer.token_keys import Key

Path = str | os.PathLike[str]
Record = dict[str, Any]

_CARD = """\
---
tags: [jaxmerge]
---

# A model with the tokenizer of another one

Tokens that both models had keep their rows of the embedding and of the output head; rows of new
ones were made by {method}. `jaxmerge_provenance.json` says which models they were, and how many
tokens were matched in which way.
"""
METHODS = ("omp", "interpolate", "mean", "zero")
_READ = 2**20  # Matrix entries per read.


class Match(NamedTuple):
  """The sources of the rows of the result.

  Attributes:
    rows: the model's row id for each row of the result; -1 where it has none.
    counts: number of tokens by kind of match.
    shared: row ids of shared tokens, in the donor and in the model.
    new: rows of the result that are sums of shared ones.
  """

  rows: np.ndarray
  counts: dict[str, int]
  shared: tuple[np.ndarray, np.ndarray]
  new: np.ndarray


def transplant(
  model: Path,
  donor: Path,
  out: Path,
  *,
  method: str = "omp",
  k: int = 64,
  cosine: bool = False,
  match_bytes: bool = False,
  match_prefixes: bool = False,
  batch: int = 512,
  replace: bool = False,
  download: bool = False,
  progress: Callable[[str, int], Callable[[int], None]] | None = None,
) -> Record:
  """Writes a model with the tokenizer of a donor.

  Args:
    model: a folder, or any other model reference that `merge_files` takes.
    donor: the model whose tokenizer and files are used; its weights give the coefficients.
    out: folder of the result.
    method: source of the rows of new tokens: "omp", orthogonal matching pursuit; "interpolate",
      the nearest rows; "mean", the mean of all rows of the model; "zero".
    k: largest number of rows in a sum.
    cosine: whether "interpolate" uses cosines instead of distances.
    match_bytes: whether a byte token, `<0x41>`, matches its character.
    match_prefixes: whether a new token takes the row of its longest prefix in the model.
    batch: new tokens per batch.
    replace: whether an existing folder is replaced.
    download: whether models that are not in the hub's cache are downloaded.
    progress: (name, total bytes) -> function that is called with the bytes done.

  Returns:
    A record, which is part of the provenance: `tokens`, their number by kind of match, and
    `errors`, for each matrix the mean relative error of the donor's rows of new tokens.

  Raises:
    ValueError: naming the option, the file or the tensor that is wrong.
    FileExistsError: if `out` exists and `replace` is not set.
  """
  _check(method, k, batch)
  files, find = Files(), hub.Finder(download=download)
  try:
    pair = [("the model", model), ("the donor", donor)]
    ours, theirs = inputs.open_all(pair, files, find)
    tokens = [vocabulary.read(build.files_of(m)) for m in (ours, theirs)]
    tables: dict[str, Tensor] = {}
    record: Record = {"model": os.fspath(model), "donor": os.fspath(donor), "method": method}
    record |= {"k": k} if method in ("omp", "interpolate") else {}
    for name, matrix, of_donor in _matrices(ours, theirs):
      match = _match(tokens[0], tokens[1], matrix, of_donor, match_bytes, match_prefixes)
      sums, error = _combinations(match, of_donor, method, k, cosine, batch)
      tables[name] = _rearranged(matrix, match, sums, method)
      record.setdefault("tokens", match.counts)
      record.setdefault("errors", {})[name] = error
    changed = ours._replace(tensors={**ours.tensors, **_vectors(ours, tables, tokens), **tables})
    written = _plan(changed, theirs, tokens, tables, {**record, **find.facts})
    written = written._replace(stamps=dict(files.stamps))
    options: dict[str, Any] = {"replace": replace}
    if progress is not None:
      options["progress"] = progress("writing", written.bytes_written)
    execute.run(written, out, **options)
  finally:
    files.close()
  return record


def _check(method: str, k: int, batch: int) -> None:
  if method not in METHODS:
    raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
  for name, value in (("k", k), ("batch", batch)):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(f"{name} must be a whole number from 1, got {value!r}.")


def _matrices(model: plan.Model, donor: plan.Model) -> list[tuple[str, Tensor, Tensor]]:
  """Returns name and tensor of a model's embedding and head, each with the donor's tensor.

  Raises:
    ValueError: where a model has no embedding, or several.
  """
  ours, theirs = _tables(model), _tables(donor)
  embedding = ours["embedding"]
  matrices = [(*embedding, theirs["embedding"][1])]
  if "head" in ours:  # Without a head, the donor's embedding serves as one.
    matrices.append((*ours["head"], theirs.get("head", theirs["embedding"])[1]))
  return matrices


def _tables(model: plan.Model) -> dict[str, tuple[str, Tensor]]:
  tables: dict[str, tuple[str, Tensor]] = {}
  for name, tensor in sorted(model.tensors.items()):
    if not embeddings.is_token_matrix(name, tensor) or len(tensor.shape) != 2:
      continue
    kind = "embedding" if layers.is_input(name) else "head"
    if kind in tables:
      raise ValueError(
        f"{model.name} has two tensors of kind {kind}: {tables[kind][0]!r}, {name!r}."
      )
    tables[kind] = (name, tensor)
  if "embedding" not in tables:
    raise ValueError(f"{model.name}, {model.folder}, has no token embedding.")
  return tables


def _match(
  ours: Vocabulary,
  theirs: Vocabulary,
  matrix: Tensor,
  of_donor: Tensor,
  match_bytes: bool,
  match_prefixes: bool,
) -> Match:
  """Finds the model's row for each token of the donor."""
  have: dict[Key, int] = {}
  for token, key in token_keys.keys(ours).items():
    if ours.ids[token] < matrix.shape[0]:
      have.setdefault(key, ours.ids[token])
  size = theirs.size
  rows = np.full(size, -1, np.int64)
  counts = dict.fromkeys(("same", "byte", "prefix", "new", "without a row"), 0)
  shared: list[int] = []
  new: list[int] = []
  for token, key in token_keys.keys(theirs).items():
    row = theirs.ids[token]
    if row >= of_donor.shape[0]:
      how, source = "without a row", None
    else:
      how, source = _row(key, have, match_bytes, match_prefixes)
    counts[how] += 1
    if source is not None:
      rows[row] = source
    if how == "same":
      shared.append(row)
    elif how == "new":
      new.append(row)
  if not shared:
    raise ValueError("the two tokenizers have no token in common; choose another donor.")
  places = np.array(sorted(shared))
  return Match(rows, counts, (places, rows[places]), np.array(sorted(new), np.int64))


def _row(
  key: Key, have: Mapping[Key, int], match_bytes: bool, match_prefixes: bool
) -> tuple[str, int | None]:
  if key in have:
    return "same", have[key]
  other = token_keys.byte_key(key) if match_bytes else None
  if other is not None and other in have:
    return "byte", have[other]
  for prefix in token_keys.prefix_keys(key) if match_prefixes else ():
    if prefix in have:
      return "prefix", have[prefix]
  return "new", None


def _combinations(
  match: Match, of_donor: Tensor, method: str, k: int, cosine: bool, batch: int
) -> tuple[approximation.Combination | None, float | None]:
  """Returns the sums for new tokens' rows, and their mean relative error on the donor's rows."""
  if method not in ("omp", "interpolate") or not len(match.new):
    return None, None
  atoms, targets = (_rows_of(of_donor, places) for places in (match.shared[0], match.new))
  sums = approximation.combine(targets, atoms, method=method, k=k, cosine=cosine, batch=batch)
  missed = []
  for first in range(0, len(targets), batch):
    part = slice(first, first + batch)
    near = np.einsum("nk,nkd->nd", sums.coefficients[part], atoms[sums.indices[part]])
    sizes = np.linalg.norm(targets[part], axis=1)
    missed.append(np.linalg.norm(near - targets[part], axis=1) / np.where(sizes > 0, sizes, 1))
  return sums, float(np.concatenate(missed).mean())


def _rows_of(matrix: Tensor, places: np.ndarray) -> np.ndarray:
  """Reads rows of a matrix as float32, block by block."""
  width = matrix.shape[1]
  out = np.empty((len(places), width), np.float32)
  step = max(1, _READ // width)
  for first in range(0, matrix.shape[0], step):
    count = min(step, matrix.shape[0] - first)
    block = pieces.load(pieces.stretch(matrix, first * width, (count, width)))
    inside = (places >= first) & (places < first + step)
    out[inside] = block[places[inside] - first]
  return out


def _rearranged(
  matrix: Tensor, match: Match, sums: approximation.Combination | None, method: str
) -> Tensor:
  """Returns a lazy matrix with a row for each token of the donor."""
  width, wide = matrix.shape[1], widen(matrix, np.dtype(np.float32))
  order = np.full(len(match.rows), -1, np.int64)
  order[match.new] = np.arange(len(match.new))
  mean = _mean(matrix) if method == "mean" else np.zeros(width, np.float32)

  def row(number: int) -> np.ndarray:
    values = np.zeros(width, np.float32)
    if match.rows[number] >= 0:
      wide.read(int(match.rows[number]) * width, values)
    elif order[number] >= 0 and sums is not None:
      part = np.empty(width, np.float32)
      sources = match.shared[1][sums.indices[order[number]]]
      for source, weight in zip(sources, sums.coefficients[order[number]], strict=True):
        wide.read(int(source) * width, part)
        values += weight * part
    elif order[number] >= 0:
      values = mean
    return values

  def read(start: int, out: np.ndarray) -> None:
    done = 0
    while done < out.size:
      number, offset = divmod(start + done, width)
      part = out[done : done + width - offset]
      part[...] = row(number)[offset : offset + part.size]
      done += part.size

  where = f"{matrix.where}, {len(match.rows)} rows by the donor's tokenizer"
  return Tensor(where, np.dtype(np.float32), (len(match.rows), width), read, matrix.stored_dtype)


def _mean(matrix: Tensor) -> np.ndarray:
  total, width = np.zeros(matrix.shape[1]), matrix.shape[1]
  step = max(1, _READ // width)
  for first in range(0, matrix.shape[0], step):
    count = min(step, matrix.shape[0] - first)
    total += pieces.load(pieces.stretch(matrix, first * width, (count, width))).sum(0, np.float64)
  return (total / matrix.shape[0]).astype(np.float32)


def _vectors(
  model: plan.Model, tables: Mapping[str, Tensor], tokens: list[Vocabulary]
) -> dict[str, Tensor]:
  """Returns head biases with an entry for each token of the donor; zero for new tokens."""
  vectors = {}
  for name, tensor in model.tensors.items():
    if len(tensor.shape) == 1 and embeddings.is_token_matrix(name, tensor):
      column = tensor._replace(shape=(*tensor.shape, 1))
      match = _match(tokens[0], tokens[1], column, next(iter(tables.values())), False, False)
      vector = _rearranged(column, match, None, "zero")
      vectors[name] = vector._replace(shape=vector.shape[:1])
  return vectors


def _plan(
  model: plan.Model,
  donor: plan.Model,
  tokens: list[Vocabulary],
  tables: Mapping[str, Tensor],
  facts: Record,
) -> plan.Plan:
  """Plans the result: the model's tensors, with files and config for the donor's tokenizer."""
  requests = [plan.TensorRequest(n, model.input(n)) for n in sorted(model.tensors)]
  home = build.files_of(model)
  result = build.TokenizerResult(
    {},
    build.texts_of(tokens[1], home),
    size=next(iter(tables.values())).shape[0],
    numbers=build.special_numbers(tokens[1].files, folder.CONFIG),
  )
  planned = assemble.make_plan(requests, [], (model,))
  config = json.dumps(result.config(model.config), indent=2) + "\n"
  card = _CARD.format(method=facts["method"])
  texts = {**model.texts, **result.texts, folder.CONFIG: config, folder.README: card}
  folders = {**planned.facts["folders"], donor.name: donor.home or str(donor.folder)}
  note = f"tokenizer of {facts['donor']}: " + ", ".join(
    f"{count} tokens {how}" for how, count in facts["tokens"].items() if count
  )
  return planned._replace(
    texts=texts,
    inputs=planned.inputs | frozenset(donor.files),
    facts={**planned.facts, "folders": folders, "transplant": facts},
    notes=(*planned.notes, f"{note}."),
  )
