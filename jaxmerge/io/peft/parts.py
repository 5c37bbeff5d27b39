"""The tensors of an adapter's file: parts of adapted modules, and whole tensors."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Container
from typing import NamedTuple

from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Files, Tensor, stored_tensor

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
TOKENS = "trainable_tokens_delta"
_PARTS = (
  r"lora_[AB]\.weight", r"lora_B\.bias", "lora_[ABE]", "lora_embedding_[AB]",
  rf"{MAGNITUDE}(\.weight)?", "ia3_l", "hada_w[12]_[ab]", "hada_t[12]", "lokr_w[12](_[ab])?",
  "lokr_t2", r"oft_R\.weight", "boft_[Rs]", "vera_lambda_[bd]", rf"(token_adapter\.)?{TOKENS}",
)  # fmt: skip
_WRAPPED = ("modules_to_save", "original_module")  # Submodules of a fully trained module.
_PART = re.compile(rf"(?P<module>.+?)(?P<nested>(\.base_layer)*)\.(?P<part>{'|'.join(_PARTS)})")


class Key(NamedTuple):
  """A parsed tensor name of an adapter's file.

  Attributes:
    module: the module's name in the model; or the name of a whole tensor.
    part: the part of the module; "" for a whole tensor.
    nested: depth of nesting, where several parameters of a module are adapted.
  """

  module: str
  part: str
  nested: int = 0


class Contents(NamedTuple):
  """The tensors of an adapter's file.

  Attributes:
    modules: by module and depth of nesting, its parts by name.
    whole: tensors that replace the base's, by name.
    shared: matrices that all modules share.
  """

  modules: dict[tuple[str, int], dict[str, Tensor]]
  whole: dict[str, Tensor]
  shared: dict[str, Tensor]


def key(name: str) -> Key | None:
  """Parses a tensor name of an adapter's file; returns None without the expected prefix.

  >>> key("base_model.model.layers.0.mlp.experts.base_layer.lora_A.weight")
  Key(module='layers.0.mlp.experts', part='lora_A.weight', nested=1)
  """
  if name in ("base_model.vera_A", "base_model.vera_B"):
    return Key("", name.removeprefix("base_model."))
  if not name.startswith(PREFIX):
    return None
  inside = name.removeprefix(PREFIX)
  if match := _PART.fullmatch(inside):
    part = match["part"].removeprefix("token_adapter.")
    part = MAGNITUDE if part.startswith(MAGNITUDE) else part
    return Key(match["module"], part, match["nested"].count("."))
  # PEFT may save a tensor of a module next to its adapter.
  for wrapper in (".token_adapter.", ".base_layer.", ".ln_tuning_layers.", f".{_WRAPPED[0]}."):
    inside = inside.replace(wrapper, ".")
  return Key(inside, "")


def is_copy(name: str, names: Container[str]) -> bool:
  """Returns whether a tensor is a copy, of which PEFT reads the other one.

  A fully trained module is saved under its plain name. For resized embeddings and heads, PEFT also
  saves the wrapped module: the trained weights, and the original ones.

  >>> names = ["base_model.model.lm_head.weight", "base_model.model.lm_head.original_module.weight"]
  >>> [is_copy(name, names) for name in names]
  [False, True]
  """
  trained, before = (name.replace(f".{word}.", ".") for word in _WRAPPED)
  if before != name:
    return before in names or name.replace(f".{_WRAPPED[1]}.", f".{_WRAPPED[0]}.") in names
  return trained != name and trained in names


def read(path: pathlib.Path, files: Files, home: str | None = None) -> Contents:
  """Reads the header of an adapter's file, and groups its tensors.

  Raises:
    ValueError: naming the tensor whose name lacks the prefix, or occurs twice.
  """
  contents = Contents({}, {}, {})
  header = safetensors.header(path).tensors
  for name, entry in header.items():
    if is_copy(name, header):
      continue
    tensor = stored_tensor(files, path, name, entry, home=home)
    parsed = key(name)
    if parsed is None:
      raise ValueError(f"{tensor.where}: names of an adapter's tensors must begin with {PREFIX!r}.")
    group, place = contents.whole, parsed.module
    if not parsed.module:
      group, place = contents.shared, parsed.part
    elif parsed.part:
      module = parsed.module, parsed.nested
      group, place = contents.modules.setdefault(module, {}), parsed.part
    if place in group:
      raise ValueError(f"{tensor.where}: is the same as {group[place].where}.")
    group[place] = tensor
  return contents
