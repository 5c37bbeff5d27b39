"""Adapted parameters of a module (target_parameters), such as fused experts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from jaxmerge.io.peft.base import Base, Target
from jaxmerge.io.peft.settings import Settings
from jaxmerge.io.tensors.tensor import Tensor

# The order in which models create them. PEFT wraps the first one first; the last is outermost.
_ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def targets(
  base: Base, module: str, nested: Mapping[int, Mapping[str, Tensor]], config: Settings
) -> Iterator[tuple[int, Target]]:
  """Yields the adapted parameters of a module, by the depth of nesting of their parts.

  Raises:
    ValueError: if it is unknown which parts belong to which parameter.
  """
  wanted = [str(p) for p in config.values["target_parameters"]]
  names: dict[str, str] = {}
  for name in dict.fromkeys(p.rpartition(".")[2] for p in wanted):
    full = f"{module}.{name}"
    name_in_base = base.name(full)
    if name_in_base is not None and any(full == p or full.endswith(f".{p}") for p in wanted):
      names[name] = name_in_base
  where = next(iter(nested[min(nested)].values())).where
  if not names:
    raise base.missing(where, f"{module}.{wanted[0].rpartition('.')[2]}")
  if len(names) != len(nested):
    raise ValueError(
      f"{where}: {len(nested)} parameters of {module!r} are adapted, but target_parameters names "
      f"{', '.join(names)} in the base."
    )
  for depth, name in _assign(base, names, nested, config, where).items():
    tensor = base.tensor(names[name])
    yield depth, Target(f"{module}.{name}", names[name], tensor, nested[depth])


def _assign(
  base: Base,
  names: Mapping[str, str],
  nested: Mapping[int, Mapping[str, Tensor]],
  config: Settings,
  where: str,
) -> dict[int, str]:
  """Returns the parameter of the parts at each depth, by their shapes or by the usual order."""
  depths = sorted(nested, reverse=True)  # The innermost first.
  fitting = [
    dict(zip(depths, order, strict=True))
    for order in itertools.permutations(names)
    if all(
      _fits(base.tensor(names[name]), nested[depth])
      for depth, name in zip(depths, order, strict=True)
    )
  ]
  usual = [n for n in _ORDER if n in names]
  if len(fitting) > 1 and len(usual) == len(names):
    fitting = [f for f in fitting if list(f.values()) == usual]
  if len(fitting) != 1:
    what = "several assignments fit" if fitting else "no assignment fits"
    shapes = ", ".join(f"{n} {list(base.tensor(t).shape)}" for n, t in names.items())
    raise ValueError(
      f"{where}: it is unknown which of {shapes} it adapts, as {what} the shapes; "
      f"{config.path.name} does not list them in order."
    )
  return fitting[0]


def _fits(tensor: Tensor, parts: Mapping[str, Tensor]) -> bool:
  a, b = parts.get("lora_A.weight"), parts.get("lora_B.weight")
  if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
    return False
  sizes = (b.shape[0], a.shape[1])
  if len(tensor.shape) == 3:
    return sizes in (tensor.shape[1:], tensor.shape[:0:-1])
  return sizes == tensor.shape
