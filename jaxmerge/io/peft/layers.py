"""Applies the modules of an adapter to the tensors of a base, and checks their parts.

Only headers are read. Matrices are computed when they are read, those of LoRA row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from jaxmerge.io.peft import dense, lora, parameters
from jaxmerge.io.peft.base import Base, Target
from jaxmerge.io.peft.parts import TOKENS, Contents
from jaxmerge.io.peft.settings import Settings, shown
from jaxmerge.io.tensors import pieces
from jaxmerge.io.tensors.tensor import Tensor

Key = tuple[str, int]  # A module, and its depth of nesting.


def change(base: Base, contents: Contents, config: Settings) -> dict[Key, str]:
  """Applies the modules of an adapter to the tensors of a base.

  Returns:
    By module and depth of nesting, the tensor that it changes.

  Raises:
    ValueError: naming the tensor that does not fit.
  """
  names: dict[Key, str] = {}
  rows, wholes = lora.Rows(config), pieces.Wholes()
  for key, target in _targets(base, contents, config):
    if target.name in names.values():
      raise ValueError(f"{target.where}: another module adapts {target.name!r} too.")
    names[key] = target.name
    if TOKENS in target.parts:
      base.changed[target.name] = _with_tokens(target, config)
    elif config.kind in ("LORA", "ADALORA"):
      rows.add(base, target, wholes)
    else:
      dense.change(base, target, contents.shared, config, wholes)
  if config.values.get("trainable_token_indices") and not any(
    TOKENS in parts for parts in contents.modules.values()
  ):
    raise config.refusal("trainable_token_indices", f"is set, but no tensor is {TOKENS}")
  base.changed |= rows.tensors()
  return names


def _targets(base: Base, contents: Contents, config: Settings) -> Iterator[tuple[Key, Target]]:
  grouped: dict[str, dict[int, Mapping[str, Tensor]]] = {}
  for (module, depth), tensors in contents.modules.items():
    grouped.setdefault(module, {})[depth] = tensors
  for module, nested in grouped.items():
    name = base.name(f"{module}.weight")
    if name is not None and len(nested) == 1:
      ((depth, parts),) = nested.items()
      yield (module, depth), Target(module, name, base.tensor(name), parts)
    elif config.values.get("target_parameters"):
      for depth, target in parameters.targets(base, module, nested, config):
        yield (module, depth), target
    else:
      where = next(iter(nested[min(nested)].values())).where
      raise base.missing(where, f"{module}.weight")


def tokens(config: Settings, module: str) -> list[int]:
  """Returns the ids of the tokens whose rows an adapter has for an embedding.

  Raises:
    ValueError: if the config does not list them.
  """
  key = "token_indices" if config.kind == "TRAINABLE_TOKENS" else "trainable_token_indices"
  value = config.values.get(key)
  if isinstance(value, dict):
    ends = [k for k in value if module == k or module.endswith(f".{k}")]
    value = value[max(ends, key=len)] if ends else None
  if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
    text = f"must list the tokens of {module!r}, got {shown(value)}"
    raise ValueError(f"{config.path}: {key} {text}.")
  return value


def _with_tokens(target: Target, config: Settings) -> Tensor:
  """Returns an embedding with the rows of an adapter in it."""
  rows, values = tokens(config, target.module), target.parts[TOKENS]
  if len(target.parts) > 1:
    raise ValueError(f"{values.where}: the other parts of {target.module!r} are not supported.")
  if len(target.tensor.shape) != 2 or values.shape != (len(rows), target.tensor.shape[1]):
    raise ValueError(
      f"{values.where}: is {list(values.shape)}, but the config has {len(rows)} tokens, and "
      f"{target.tensor.where} is {list(target.tensor.shape)}."
    )
  if len(set(rows)) < len(rows) or max(rows, default=0) >= target.tensor.shape[0]:
    raise ValueError(
      f"{config.path}: tokens {shown(rows)} must be different rows of {target.tensor.where}, which "
      f"has {target.tensor.shape[0]}; if tokens were added, the adapter must include the resized "
      "embedding: save it with save_embedding_layers=True."
    )
  return pieces.with_rows(target.tensor, rows, values)
