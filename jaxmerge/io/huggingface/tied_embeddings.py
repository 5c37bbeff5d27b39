"""Finds tensors tied to the embedding: output heads, and embeddings of encoder and decoder.

A config says whether they are tied, but the bytes decide: a head that differs is not tied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable  # Any: values of a config.json.

import numpy as np

from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import NotYetMade, Tensor

FLAG = "tie_word_embeddings"
# Name endings by priority: T5 stores its shared embedding under the names of its stacks too.
_SHARED = ".shared.weight"
_EMBEDDINGS = (
  _SHARED, ".decoder.embed_tokens.weight", "embed_tokens.weight", "wte.weight",
  "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight", "tokens_embed.weight",
  "word_embedding.weight", ".backbone.embeddings.weight", ".rwkv.embeddings.weight",
)  # fmt: skip
HEADS = (
  "lm_head.weight", "embed_out.weight", "proj_out.weight", "lm_head.decoder.weight",
  "cls.predictions.decoder.weight", "predictions.decoder.weight", "vocab_projector.weight",
  "output_projection.weight", "lm_head.out_proj.weight", "lm_loss.weight", "output_layer.weight",
  "mlm_score.decoder.weight", "head.decoder.weight",
)  # fmt: skip
_STACKS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_PARTS = ("text_config", "llm_config", "language_config")  # The decoder's part of a config.
# Here the flag says whether outputs are scaled; tensors are tied if their bytes are equal.
_SCALED = {"t5", "mt5", "umt5", "longt5", "pop2piano", "udop", "switch_transformers"}
HEAD = 32  # Entries that are compared first.
CHUNK = 2**20


@runtime_checkable
class Shaped(Protocol):
  """An object with a shape."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns the shape."""


class Ties(NamedTuple):
  """An embedding, and the stored tensors that may be tied to it.

  Attributes:
    embedding: its name.
    heads: names of output heads of its shape.
    stacks: names of the embeddings of encoder and decoder, if it is the shared one.
    flag: whether the config ties them, explicitly or by its kind; None: it does not say.
  """

  embedding: str
  heads: tuple[str, ...]
  stacks: tuple[str, ...]
  flag: bool | None

  @property
  def absent(self) -> Iterator[str]:
    """Yields names under which another model of this kind may store a tied tensor."""
    parts = self.embedding.split(".")[:-1]
    for depth in range(len(parts)):
      prefix = "".join(f"{part}." for part in parts[:depth])
      yield from (prefix + end for end in HEADS if not self.heads)
    yield from (name for name in stacks(self.embedding) if name not in self.stacks)


def find(tensors: Mapping[str, Shaped], config: Mapping[str, Any]) -> Ties | None:
  """Returns the embedding among tensors, and tensors that may be tied; None without an embedding.

  A head has the embedding's shape and lies outside the layers, where such names are projections.

  >>> import numpy as np
  >>> tensors = {n: np.zeros((9, 2)) for n in ("shared.weight", "lm_head.weight")}
  >>> find(tensors, {"tie_word_embeddings": True})
  Ties(embedding='shared.weight', heads=('lm_head.weight',), stacks=(), flag=True)
  """
  embedding = next(
    (name for end in _EMBEDDINGS for name in tensors if f".{name}".endswith(end)), None
  )
  if embedding is None:
    return None
  alike = [n for n, t in tensors.items() if t.shape == tensors[embedding].shape and _outside(n)]
  shared = stacks(embedding)
  heads = tuple(n for n in alike if n.endswith(HEADS))
  flag = _flag(config)
  if flag is None and not heads and _is_language_model(config):
    flag = True  # Classes that tie by default may omit the flag.
  return Ties(embedding, heads, tuple(n for n in alike if n in shared), flag)


def stacks(embedding: str) -> tuple[str, ...]:
  """Returns the names of a shared embedding in encoder and decoder, which look tokens up there.

  >>> stacks("model.shared.weight"), stacks("model.embed_tokens.weight")
  (('model.encoder.embed_tokens.weight', 'model.decoder.embed_tokens.weight'), ())
  """
  shared = f".{embedding}".endswith(_SHARED)
  prefix = embedding.removesuffix(_SHARED[1:])
  return tuple(prefix + end for end in _STACKS) if shared else ()


def _is_language_model(config: Mapping[str, Any]) -> bool:
  classes = config.get("architectures")
  words = " ".join(map(str, classes if isinstance(classes, list) else ()))
  return re.search("ForCausalLM|LMHead|ForConditionalGeneration|ForMaskedLM", words) is not None


def _outside(name: str) -> bool:
  return not any(part.isdigit() for part in name.split("."))


def _flag(config: Mapping[str, Any]) -> bool | None:
  if config.get("model_type") in _SCALED:
    return True
  flags = [part.get(FLAG) for part in (config, *_parts(config).values())]
  return True if True in flags else False if False in flags else None


def _parts(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  return {key: config[key] for key in _PARTS if isinstance(config.get(key), Mapping)}


def untie(tensors: Mapping[str, Shaped], config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a config that ties no head to the embedding.

  The config is unchanged if its flag also controls something that is not stored: a scale, the bias
  of a head, or the embeddings of encoder and decoder.

  >>> untie({}, {"text_config": {"tie_word_embeddings": True}})
  {'text_config': {'tie_word_embeddings': False}, 'tie_word_embeddings': False}
  """
  ties = find(tensors, config)
  heads = ties.heads if ties else ()
  biases = [n.removesuffix("weight") + "bias" for n in heads if n.endswith("decoder.weight")]
  shared = ties is not None and f".{ties.embedding}".endswith(_SHARED)
  if shared or config.get("model_type") in _SCALED or any(n not in tensors for n in biases):
    return dict(config)
  parts = {k: {**part, FLAG: False} for k, part in _parts(config).items() if part.get(FLAG)}
  return {**config, **parts, FLAG: False}


def lacks_head(tensors: Mapping[str, Shaped], config: Mapping[str, Any]) -> bool:
  """Returns whether a language model has no output head although its config ties none."""
  ties = find(tensors, config)
  if ties is None or ties.flag is not False or not _is_language_model(config):
    return False
  shape = tensors[ties.embedding].shape
  return [n for n, t in tensors.items() if t.shape == shape and _outside(n)] == [ties.embedding]


def equal(a: Tensor, b: Tensor) -> bool:
  """Returns whether two tensors are equal bit for bit; of different dtypes, entry by entry.

  A tensor that does not exist yet is equal to no other.
  """
  if a.shape != b.shape or safetensors.is_floating(a.dtype) != safetensors.is_floating(b.dtype):
    return False
  size = math.prod(a.shape)
  spans = [(0, min(HEAD, size)), *((i, min(i + CHUNK, size)) for i in range(0, size, CHUNK))]
  try:
    return all(_same(a, b, start, stop) for start, stop in spans)
  except NotYetMade:
    return False


def _same(a: Tensor, b: Tensor, start: int, stop: int) -> bool:
  x, y = np.empty(stop - start, a.dtype), np.empty(stop - start, b.dtype)
  a.read(start, x)
  b.read(start, y)
  if a.dtype == b.dtype:
    return bool((x.view(np.uint8) == y.view(np.uint8)).all())
  return bool((x.astype(np.float64) == y.astype(np.float64)).all())


def is_vocabulary(name: str) -> bool:
  """Returns whether a tensor of this name has a row per token: an embedding, or a head.

  >>> is_vocabulary("model.embed_tokens.weight"), is_vocabulary("layers.0.lm_head.weight")
  (True, False)
  """
  heads = name.endswith((*HEADS, *(f"{h.removesuffix('weight')}bias" for h in HEADS)))
  embedding = any(f".{name}".endswith(end) for end in _EMBEDDINGS)
  return (heads or embedding) and _outside(name)


def head(config: Mapping[str, Any]) -> str | None:
  """Returns the name under which a model's head is stored; None for a model without a head.

  >>> head({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
  'lm_head.weight'
  """
  if not _is_language_model(config):
    return None
  named = {
    "gpt_neox": "embed_out.weight",
    "whisper": "proj_out.weight",
    "bert": "cls.predictions.decoder.weight",
    "roberta": "lm_head.decoder.weight",
    "distilbert": "vocab_projector.weight",
  }
  return named.get(str(config.get("model_type")), "lm_head.weight")
