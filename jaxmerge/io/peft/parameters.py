"""Parameters that are adapted without a module of their own (target_parameters): fused experts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from jaxmerge.io.peft.base import Base, Target
from jaxmerge.io.peft.settings import Settings
from jaxmerge.io.tensors.tensor import Tensor

# The order in which models make them: PEFT wraps the first one first, and the last is outermost.
_ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def targets(
  base: Base, module: str, nested: Mapping[int, Mapping[str, Tensor]], own: Settings
) -> Iterator[tuple[int, Target]]:
  """Yields the parameters of a module that are adapted, by how their parts are nested.

  Raises:
    ValueError: where it cannot be told which parts are whose.
  """
  wanted = [str(p) for p in own.values["target_parameters"]]
  found = {}
  for name in dict.fromkeys(p.rpartition(".")[2] for p in wanted):
    full = f"{module}.{name}"
    here = base.name(full)
    if here is not None and any(full == p or full.endswith(f".{p}") for p in wanted):
      found[name] = here
  where = next(iter(nested[min(nested)].values())).where
  if not found:
    raise base.lacking(where, f"{module}.{wanted[0].rpartition('.')[2]}")
  if len(found) != len(nested):
    raise ValueError(
      f"{where}: {len(nested)} parameters of {module!r} are adapted, but target_parameters names "
      f"{', '.join(found)} of the base's."
    )
  for depth, name in _assigned(base, found, nested, own, where).items():
    tensor = base.tensor(found[name])
    yield depth, Target(f"{module}.{name}", found[name], tensor, nested[depth])


def _assigned(
  base: Base,
  found: Mapping[str, str],
  nested: Mapping[int, Mapping[str, Tensor]],
  own: Settings,
  where: str,
) -> dict[int, str]:
  """Which parameter the parts are of: by their shapes, or by the order of the parameters."""
  depths = sorted(nested, reverse=True)  # The innermost first.
  fitting = [
    dict(zip(depths, order, strict=True))
    for order in itertools.permutations(found)
    if all(
      _fits(base.tensor(found[name]), nested[depth])
      for depth, name in zip(depths, order, strict=True)
    )
  ]
  usual = [n for n in _ORDER if n in found]
  if len(fitting) > 1 and len(usual) == len(found):
    fitting = [f for f in fitting if list(f.values()) == usual]
  if len(fitting) != 1:
    what = "cannot be told from the shapes" if fitting else "does not fit the shapes"
    names = ", ".join(f"{n} {list(base.tensor(t).shape)}" for n, t in found.items())
    raise ValueError(f"{where}: which of {names} it adapts {what}; {own.path.name} is not enough.")
  return fitting[0]


def _fits(tensor: Tensor, parts: Mapping[str, Tensor]) -> bool:
  a, b = parts.get("lora_A.weight"), parts.get("lora_B.weight")
  if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
    return False
  sizes = (b.shape[0], a.shape[1])
  if len(tensor.shape) == 3:
    return sizes in (tensor.shape[1:], tensor.shape[:0:-1])
  return sizes == tensor.shape
