"""Parameters of a module that are adapted one by one (target_parameters): fused experts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from jaxmerge.io.peft.base import Base, Target
from jaxmerge.io.peft.settings import Settings
from jaxmerge.io.tensors.tensor import Tensor

# The order in which models make them: PEFT wraps the first one first, and the last is outermost.
_ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def targets(
  base: Base, module: str, nested: Mapping[int, Mapping[str, Tensor]], config: Settings
) -> Iterator[tuple[int, Target]]:
  """Yields the parameters of a module that are adapted, by how their parts are nested.

  Raises:
    ValueError: where it is unknown which parts belong to which parameter.
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
      f"{', '.join(names)} of the base's."
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
  """Returns which parameter the parts are of: by their shapes, or by the order of parameters."""
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
    what = "cannot be told from the shapes" if fitting else "does not fit the shapes"
    shapes = ", ".join(f"{n} {list(base.tensor(t).shape)}" for n, t in names.items())
    raise ValueError(
      f"{where}: which of {shapes} it adapts {what}; {config.path.name} is not enough."
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
