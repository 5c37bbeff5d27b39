"""Reads and writes adapters in PEFT's format."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmerge.adapters import combine
from jaxmerge.adapters.lora import Adapter, Lora, Swapped
from jaxmerge.core import double_precision
from jaxmerge.drivers import arguments
from jaxmerge.io.disk import atomic
from jaxmerge.io.peft import adapter as peft
from jaxmerge.io.tensors import names, safetensors
from jaxmerge.io.tensors.tensor import Files

Path = str | os.PathLike[str]


def load(folder: Path, *, rename: Mapping[str, str] | None = None) -> dict[str, Lora]:
  """Reads a PEFT adapter; its factors have the dtype of the files.

  Args:
    folder: folder of the adapter.
    rename: by prefix of its matrices' names, the model's prefix.

  Raises:
    FileNotFoundError: for a missing file.
    ValueError: naming a tensor that is no plain LoRA factor of a matrix. Merge such adapters as
      models, in recipes or with `merge_files`.
  """
  with contextlib.closing(Files()) as files:
    factors = peft.factors(folder, files)
    return {
      names.rename(name, rename or {}): (Swapped if x.transposed else Lora)(
        double_precision.copy_leaf(x.a), double_precision.copy_leaf(x.b), x.scale
      )
      for name, x in factors.items()
    }


def save(folder: Path, adapter: Adapter | Any, *, replace: bool = False) -> pathlib.Path:
  """Writes an adapter in PEFT's format; scales are multiplied into `a`.

  Raises:
    FileExistsError: if the folder exists and `replace` is not set.
    ValueError: if models store some of its matrices as [in, out] and others as [out, in], and for
      NaN or infinity.
  """
  adapter = arguments.adapter(adapter)
  swapped = {isinstance(x, Swapped) for x in adapter.values()}
  if len(swapped) > 1:
    raise ValueError("some matrices are [in, out] and others [out, in]: save two adapters.")
  ranks = {name: x.rank for name, x in adapter.items()}
  tensors = {}
  for name, lora in adapter.items():
    for part, x in {"A": combine.times(lora.scale, lora.a), "B": lora.b}.items():
      if not bool(jnp.isfinite(x).all()):
        text = f"lora_{part} of {name!r} has NaN or infinity in {x.dtype}, with its scale in A"
        raise ValueError(f"{text}; save an adapter of finite numbers, or of a wider dtype.")
      tensors[f"base_model.model.{name}.lora_{part}.weight"] = np.asarray(x)
  config: dict[str, Any] = {"peft_type": "LORA", "bias": "none"}
  config |= {"r": max(ranks.values(), default=1), "lora_alpha": max(ranks.values(), default=1)}
  # PEFT also matches a pattern with the end of a name, and a dot with any character.
  other = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != config["r"]}
  config["fan_in_fan_out"] = swapped == {True}
  config |= {"rank_pattern": other, "alpha_pattern": other, "target_modules": sorted(ranks)}
  with atomic.folder(folder, replace=replace) as beside:
    safetensors.save(beside / peft.WEIGHTS, tensors)
    (beside / peft.CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
  return pathlib.Path(folder)
