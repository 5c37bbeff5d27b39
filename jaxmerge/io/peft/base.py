"""The base of an adapter: its tensors by the adapter's names, in the form it needs."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Mapping
from typing import NamedTuple

from jaxmerge.io.huggingface import tied_embeddings
from jaxmerge.io.tensors import experts, names
from jaxmerge.io.tensors.tensor import Tensor

UNTIED = ", untied (tie_word_embeddings: false, and a head) if the tensor is one of a tied pair"


class Target(NamedTuple):
  """An adapted module, or an adapted parameter of one.

  Attributes:
    module: its name in the adapter; patterns of the config are matched with it.
    name: of the base's tensor.
    tensor: the base's tensor.
    parts: the adapter's tensors for it.
  """

  module: str
  name: str
  tensor: Tensor
  parts: Mapping[str, Tensor]

  @property
  def where(self) -> str:
    """Place of one of the adapter's parts, for errors."""
    return next(iter(self.parts.values())).where


class Base:
  """Tensors of a base with changes.

  Attributes:
    tensors: as the base stores them; heads that are tied to an embedding are it.
    rename: beginnings of names of the adapter to those of the base.
    changed: tensors that are others, by names of the base or of `experts.forms`.
  """

  def __init__(self, tensors: Mapping[str, Tensor], rename: Mapping[str, str]):
    self.tensors, self.rename = tensors, rename
    self.changed: dict[str, Tensor] = {}

  @functools.cached_property
  def forms(self) -> Mapping[str, experts.Form]:
    """Tensors in another form than the base stores them, as the adapter may name them."""
    return experts.forms(self.tensors)

  def name(self, name: str) -> str | None:
    """Returns the base's name of a tensor of the adapter; None if the base lacks it."""
    renamed = names.rename(name, self.rename)
    return names.find(renamed, self.tensors) or names.find(renamed, self._all_names)

  @functools.cached_property
  def _all_names(self) -> Collection[str]:
    return self.tensors.keys() | self.forms.keys()

  def tensor(self, name: str) -> Tensor:
    """Returns a tensor with all changes so far."""
    if name in self.changed:
      return self.changed[name]
    return self.tensors[name] if name in self.tensors else self.forms[name].tensor

  def near(self, name: str) -> str:
    """Returns a hint with the name closest to a missing one."""
    matches = difflib.get_close_matches(names.rename(name, self.rename), self.tensors, n=1)
    return f", whose nearest is {matches[0]!r}" if matches else ""

  def missing(self, where: str, name: str) -> ValueError:
    """Returns the error for an adapted tensor that the base lacks."""
    renamed = names.rename(name, self.rename)
    hint = "; give the base that the adapter was trained on"
    hint += UNTIED if renamed.endswith(tied_embeddings.HEADS) or self.near(name) == "" else ""
    more = ", or say with `rename` how its names begin in the base"
    return ValueError(f"{where}: the base has no tensor {renamed!r}{self.near(name)}{hint}{more}.")

  def as_stored(self) -> dict[str, Tensor]:
    """Returns the changed tensors in the form in which the base stores them."""
    if self.changed.keys() <= self.tensors.keys():
      return dict(self.changed)
    return experts.replace(self.tensors, self.changed, self.forms)
