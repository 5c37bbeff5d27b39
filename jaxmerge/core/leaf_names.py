"""Parses leaf names into the kinds of modules that libraries agree on. Does not import jax."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

_BOXES = {"value", "raw_value"}  # Flax wraps a parameter in its metadata.
_PATCHES = re.compile(r"patch|proj|mapping|linear|dense|norm|conv|(^|_)out(_|$)|head")
_LOOKUP = re.compile(r"embed|(^|_)emb(_|$)|^wte$|^wpe$|^shared$|_table$|relative_attention_bias")
_KIND = (
  "in(put)?|tok(en)?s?|words?|vocab|char|pos(ition(al)?)?s?|(token_)?type|segment|lang(uage)?|"
  "(token_)?class|cls|mask|distance|letter|wordpiece|query|level|row|col(umn)?|speaker|codebook|object|rel(ative)?(_pos)?"
)
_TABLES = re.compile(
  rf"wte|wpe|shared|emb|embedder|.*_embeddings|relative_attention_bias|.*_table|"
  rf"((.*_)?({_KIND})_?)?(embd?|embeds?|embeddings?)|embed_(in|tokens.*|positions)|.*_embeds_layers?"
)
_HEADS = re.compile(r"un_?embed|^(out|output)_|_out(put)?$|logit")
_TOKENS = re.compile(r"(.*_)?(cls|class|mask|dist|register|query|prompt|sep)?_?tokens?|latents")
_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)
_ATTENTION = re.compile(r"att(n|ention)|^mha", re.IGNORECASE)
_INWARD = re.compile(r"w?(q|k|v|kv|qkv)(_[ab])?(_proj)?|query|key|value|to_(q|k|v|qkv)")
_OUTWARD = re.compile(r"out|wo|o|output|(o|out|output)_proj|attn_out|to_out")
UP = re.compile(r"gate_up(_proj)?|(gate|up)(_proj)?|w[13]|wi(_[01])?|v1|fc1|input_linear")
DOWN = re.compile(r"down(_proj)?|w2|wo|fc2|output_linear")


class Name(NamedTuple):
  """A parsed leaf name: `layers/0/query/kernel/value` is the kernel of query.

  Attributes:
    parts: parts of the path, without a library's metadata boxes around the leaf.
  """

  parts: tuple[str, ...]

  @property
  def leaf(self) -> str:
    """The last part."""
    return self.parts[-1].lower()

  @property
  def module(self) -> str:
    """The nearest part before the leaf that is not a number."""
    return next((p.lower() for p in reversed(self.parts[:-1]) if not p.isdigit()), "")

  @property
  def word(self) -> str:
    """The part that says what the leaf is for."""
    return self.module if self.leaf in ("weight", "kernel") else self.leaf

  @property
  def is_inward(self) -> bool:
    """Whether it projects into the heads of an attention."""
    return bool(_INWARD.fullmatch(self.word))

  @property
  def is_outward(self) -> bool:
    """Whether it projects out of the heads of an attention, or may do so."""
    return bool(_OUTWARD.fullmatch(self.word))

  @property
  def is_up_or_down(self) -> bool:
    """Whether its name is that of a feed-forward matrix."""
    return bool(UP.fullmatch(self.word) or DOWN.fullmatch(self.word))

  @property
  def is_of_attention(self) -> bool:
    """Whether it is part of attention, by the part of the name that experts do not have."""
    after = self.parts[self._experts_at() + 1 :]
    apart = self.is_inward or (self.is_outward and not self.is_up_or_down)
    return apart or any(_ATTENTION.search(part) for part in after)

  @property
  def is_of_experts(self) -> bool:
    """Whether it lies in the part of a model that holds experts; attention and windows do not."""
    apart = self.is_of_attention or "conv" in self.word
    return self._experts_at() >= 0 and not apart

  @property
  def is_fused(self) -> bool:
    """Whether it is one matrix of all experts: no number follows their part of the name."""
    after = self.parts[self._experts_at() + 1 :]
    is_matrix = self.leaf not in ("weight", "kernel") and self.is_up_or_down
    return is_matrix and self.is_of_experts and not any(part.isdigit() for part in after)

  def _experts_at(self) -> int:
    return max((at for at, p in enumerate(self.parts) if _EXPERTS.search(p)), default=-1)


@functools.lru_cache(2**16)
def name(text: str) -> Name:
  """Parses a leaf's name.

  Example:
    >>> name("layers/0/query/kernel/value").module
    'query'
  """
  parts = [p for p in re.split(r"[/.]", text) if p]
  while len(parts) > 1 and parts[-1] in _BOXES:
    parts.pop()
  return Name(tuple(parts) or (text,))


def may_be_table(word: str) -> bool:
  """Returns whether a word refers to embeddings: a table, or a layer that computes them."""
  return bool(_LOOKUP.search(word)) and not (_PATCHES.search(word) or _HEADS.search(word))


def is_table(words: Name) -> bool:
  """Returns whether a leaf has the name of a lookup table.

  Example:
    >>> [is_table(name(f"{n}.weight")) for n in ("embed_tokens", "time_embed", "unembedding")]
    [True, False, False]
  """
  if words.leaf == "kernel":
    return False
  if words.leaf == "weight":
    return may_be_table(words.module) and bool(_TABLES.fullmatch(words.module))
  return may_be_table(words.leaf) or bool(_TOKENS.fullmatch(words.leaf))
