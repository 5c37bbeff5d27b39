"""PEFT LoRA adapters, checked strictly: the tensors of a base as an adapter leaves them.

Only headers are read here; `lora.py` computes what is read of an adapted matrix, when it is read.
"""

from __future__ import annotations

import difflib
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any  # What JSON holds is any object until it is checked.

import numpy as np

from jaxmerge.io import folder as folders
from jaxmerge.io import kinds, lora, safetensors, ties
from jaxmerge.io.tensor import Files, Tensor, stored

Path = str | os.PathLike[str]

CONFIG = kinds.ADAPTER
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"
_PAIR = ("lora_A.weight", "lora_B.weight")
_LAYER = re.compile(
  rf"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|{_MAGNITUDE})"
)
# Keys of the config that decide about the result.
_USED = (
  "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
  "fan_in_fan_out", "bias", "init_lora_weights",
)  # fmt: skip
# Keys that only say how the adapter was trained, or what the names of its tensors say as well.
_UNUSED = (
  "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
  "inference_mode", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
  "layers_pattern", "modules_to_save", "ensure_weight_tying", "megatron_config", "megatron_core",
  "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
  "qalora_group_size", "runtime_config",
)  # fmt: skip
# Others (pissa, olora, corda, loftq, lora_ga) change the base, which then is not the one on disk.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_UNTIED = ", untied (tie_word_embeddings: false, and a head) if the tensor is one of a tied pair"
_MERGE = "merge it with PEFT (merge_and_unload) and give the result in place of base and adapter"


def is_adapter(folder: Path) -> bool:
  """Tells whether a folder holds an adapter."""
  return (pathlib.Path(folder) / CONFIG).is_file()


def paths(folder: Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Returns the files of an adapter: its config and its weights.

  Raises:
    FileNotFoundError: naming the one that is missing, or is a pickle.
  """
  folder = pathlib.Path(folder)
  if not is_adapter(folder):
    raise FileNotFoundError(kinds.missing(folder, "adapter"))
  if not (folder / WEIGHTS).is_file():
    pickled = (folder / "adapter_model.bin").is_file()
    hint = (
      "; adapter_model.bin is a pickle, which is not read: load it with PEFT and save it again, "
      "save_pretrained writes safetensors"
    )
    raise FileNotFoundError(f"{folder}: {WEIGHTS} is not there{hint if pickled else ''}.")
  return folder / CONFIG, folder / WEIGHTS


def adapted(
  base: Mapping[str, Tensor], folder: Path, files: Files, *, home: str | None = None
) -> dict[str, Tensor]:
  """Returns the tensors of a base as an adapter leaves them.

  Matrices that are adapted are float32, computed when they are read; tensors that the adapter holds
  whole (modules_to_save) take the place of the base's; all others are passed through. They say that
  they are from `home`, where that is given, in place of the folder.

  >>> tensors = adapted(planning.model("base", files).tensors, "adapter", files)  # doctest: +SKIP

  Raises:
    FileNotFoundError: where a file of the adapter is missing.
    ValueError: naming the file, and the key or tensor, that is not understood or does not fit.
  """
  path, weights = paths(folder)
  config = _settings(path)
  parts, out = _sorted(weights, base, files, home)
  layers = {f"{m}.weight": _layer(path, m, own, out, config) for m, own in parts.items()}
  plain = [layers[f"{m}.weight"] for m, own in parts.items() if "lora_A.weight" in own]
  _check_square(plain, config["fan_in_fan_out"])
  return {**out, **lora.computed(layers)}


def fates(folder: Path) -> dict[str, str]:
  """Says of each tensor of an adapter which one of the model it is added to, or stands for.

  >>> fates("adapter")  # doctest: +SKIP
  {'base_model.model.q_proj.lora_A.weight': 'adapter, added -> q_proj.weight', ...}

  Raises:
    FileNotFoundError: where a file of the adapter is missing.
  """
  found = {}
  for key in safetensors.header(paths(folder)[1]).tensors:
    name = _in_model(key)
    part = _LAYER.fullmatch(name)
    words = f"added -> {part['module']}.weight" if part else f"in place of the model's -> {name}"
    found[key] = f"adapter, {words}"
  return found


def factors(folder: Path, files: Files) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
  """Reads the factors of an adapter: module to A [r, in], B [out, r], and the factor on B @ A.

  Raises:
    FileNotFoundError: where a file of the adapter is missing.
    ValueError: naming the tensor that is no factor of a plain LoRA layer.
  """
  path, weights = paths(folder)
  config = _settings(path)
  found: dict[str, dict[str, np.ndarray]] = {}
  for key, entry in safetensors.header(weights).tensors.items():
    tensor = stored(files, weights, key, entry)
    part = _LAYER.fullmatch(key.removeprefix(_PREFIX))
    if not key.startswith(_PREFIX) or not part or part["part"] not in _PAIR:
      raise ValueError(
        f"{tensor.where}: is no factor of a plain LoRA layer; apply the adapter to its base, and "
        "merge the models."
      )
    x = np.empty(tensor.shape, tensor.dtype)
    tensor.read(0, x.reshape(-1))
    found.setdefault(part["module"], {})[part["part"]] = x
  for module, parts in found.items():
    if parts.keys() != set(_PAIR) or parts[_PAIR[0]].shape[:1] != parts[_PAIR[1]].shape[1:]:
      raise ValueError(f"{weights}: {module!r} has no pair of factors, A [r, in] and B [out, r].")
  return {m: (own[_PAIR[0]], own[_PAIR[1]], _scale(path, config, m)) for m, own in found.items()}


# --- What the files say ---


def _settings(path: pathlib.Path) -> dict[str, Any]:
  """Reads and checks the config; missing keys have the values that PEFT gives them."""
  config = folders.read_json(path)
  if config.get("peft_type") != "LORA":
    raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}, not 'LORA'; {_MERGE}.")
  for key, value in config.items():
    if key not in (*_USED, *_UNUSED) and value not in (None, False, [], {}):
      raise ValueError(f"{path}: {key} = {value!r:.100} is not supported; {_MERGE}.")
  if config.get("bias", "none") != "none":
    raise ValueError(f"{path}: bias is {config['bias']!r}, only 'none' is supported; {_MERGE}.")
  if config.get("init_lora_weights") not in _STARTS:
    raise ValueError(
      f"{path}: init_lora_weights = {config['init_lora_weights']!r} changed the base before the "
      "training; save the adapter with PEFT's path_initial_model_for_weight_conversion."
    )
  for key in ("use_rslora", "use_dora", "fan_in_fan_out"):
    if not isinstance(config.setdefault(key, False), bool):
      raise ValueError(f"{path}: {key} must be true or false, got {config[key]!r}.")
  _check_numbers(path, config, "r", "rank_pattern")
  _check_numbers(path, config, "lora_alpha", "alpha_pattern")
  return config


def _check_numbers(path: pathlib.Path, config: dict[str, Any], key: str, pattern: str) -> None:
  """Completes a number and the pattern of its exceptions, and raises ValueError for other types."""
  config.setdefault(key, 8)
  config[pattern] = config.get(pattern) or {}
  if not isinstance(config[pattern], dict):
    raise ValueError(f"{path}: {pattern} must map modules to numbers, got {config[pattern]!r}.")
  values = {key: config[key], **{f"{pattern}: {k!r}": v for k, v in config[pattern].items()}}
  for place, value in values.items():
    if key == "r" and (type(value) is not int or value < 1):
      raise ValueError(f"{path}: {place} must be a whole number, 1 or more, got {value!r}.")
    if type(value) not in (int, float):
      raise ValueError(f"{path}: {place} must be a number, got {value!r}.")


def _sorted(
  path: pathlib.Path, base: Mapping[str, Tensor], files: Files, home: str | None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
  """Sorts the adapter's tensors: parts by module; and the base's, some of them replaced whole."""
  parts: dict[str, dict[str, Tensor]] = {}
  out = dict(base)
  for key, entry in safetensors.header(path).tensors.items():
    tensor = stored(files, path, key, entry, home=home)
    if not key.startswith(_PREFIX):
      raise ValueError(f"{tensor.where}: names of an adapter's tensors begin with {_PREFIX!r}.")
    name = _in_model(key)
    if found := _LAYER.fullmatch(name):
      parts.setdefault(found["module"], {})[found["part"]] = tensor
    elif name not in base:
      raise ValueError(
        f"{tensor.where}: is neither a part of a LoRA layer (lora_A.weight, lora_B.weight, "
        f"lora_embedding_A, lora_embedding_B, {_MAGNITUDE}) nor in the base{_near(name, base)}"
        f"{f'; give the base{_UNTIED}' if name.endswith(ties.HEADS) else ''}."
      )
    elif tensor.shape != base[name].shape:
      raise ValueError(
        f"{tensor.where}: is {list(tensor.shape)}, but {list(base[name].shape)} in the base, whose "
        "tensor it replaces; give a base of that shape."
      )
    else:
      out[name] = _like(tensor, base[name])
  return parts, out


def _like(tensor: Tensor, own: Tensor) -> Tensor:
  """A tensor that takes the place of the base's own: a result stores it as it would store that."""
  kept = own.kept or own.dtype
  alike = safetensors.is_floating(kept) == safetensors.is_floating(tensor.dtype)
  return tensor._replace(kept=kept) if alike else tensor


def _in_model(key: str) -> str:
  """What a tensor, or its module, is called in the model; PEFT may save it beside its adapter."""
  return key.removeprefix(_PREFIX).replace(".base_layer.", ".")


def _near(name: str, base: Mapping[str, Tensor]) -> str:
  near = difflib.get_close_matches(name, base, n=1)
  return f", whose nearest is {near[0]!r}" if near else ""


def _layer(
  path: pathlib.Path,
  module: str,
  parts: Mapping[str, Tensor],
  base: Mapping[str, Tensor],
  config: Mapping[str, Any],
) -> lora.Layer:
  """Brings the parts of a layer together with the base's matrix."""
  where, name = next(iter(parts.values())).where, f"{module}.weight"
  if name not in base:
    raise ValueError(
      f"{where}: the base has no tensor {name!r}{_near(name, base)}; give the base that the "
      f"adapter was trained on{_UNTIED}."
    )
  embedding = any("embedding" in part for part in parts)
  pair = [f"lora_embedding_{x}" if embedding else f"lora_{x}.weight" for x in "AB"]
  wanted = [*pair, _MAGNITUDE] if config["use_dora"] else pair
  if parts.keys() != set(wanted):
    raise ValueError(
      f"{where}: module {module!r} has {', '.join(parts)}, but needs {', '.join(wanted)}, as "
      f"use_dora is {config['use_dora']} in {path.name}."
    )
  (a, b), own, magnitude = (parts[p] for p in pair), base[name], parts.get(_MAGNITUDE)
  _check_matrices(own, a, b, embedding)
  if magnitude is not None and magnitude.shape != b.shape[:1]:
    raise ValueError(f"{magnitude.where}: must be {list(b.shape[:1])}, is {list(magnitude.shape)}.")
  rank = _number(path, config["rank_pattern"], module, config["r"])
  if a.shape[0] != rank:
    raise ValueError(f"{a.where}: its rank is {a.shape[0]}, but {rank} by r or rank_pattern.")
  square = own.shape == (a.shape[1], b.shape[0]) == (b.shape[0], a.shape[1])
  transposed = config["fan_in_fan_out"] if square else own.shape == (a.shape[1], b.shape[0])
  scale = _scale(path, config, module)
  return lora.Layer(own, a, b, magnitude, scale, embedding or transposed)


def _scale(path: pathlib.Path, config: Mapping[str, Any], module: str) -> float:
  """The factor on B @ A."""
  rank = _number(path, config["rank_pattern"], module, config["r"])
  alpha = _number(path, config["alpha_pattern"], module, config["lora_alpha"])
  return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def _check_matrices(own: Tensor, a: Tensor, b: Tensor, embedding: bool) -> None:
  """Raises ValueError where A, B and the base's matrix do not belong together."""
  for tensor in (own, a, b):
    if not safetensors.is_floating(tensor.dtype):
      raise ValueError(f"{tensor.where}: is {tensor.dtype}; give weights that are not quantized.")
    if len(tensor.shape) != 2:
      raise ValueError(
        f"{tensor.where}: is {list(tensor.shape)}, not a matrix; convolutions are not supported: "
        f"{_MERGE}."
      )
  if a.shape[0] != b.shape[1]:
    raise ValueError(f"{a.where}: its rank is {a.shape[0]}, but {b.shape[1]} in {b.where}.")
  plain, transposed = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
  fits = [transposed] if embedding else [plain, transposed]
  if own.shape not in fits:
    raise ValueError(
      f"{a.where}: A is {list(a.shape)} and B {list(b.shape)}, which is for a matrix "
      f"{' or '.join(str(list(f)) for f in fits)}; it is {list(own.shape)} in {own.where}."
    )


def _number(path: pathlib.Path, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
  """The number of a module: that of the first pattern which is its name, or the name's end."""
  for pattern, value in patterns.items():
    try:
      found = re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module)
    except re.error as error:
      raise ValueError(f"{path}: {pattern!r} is no regular expression ({error}).") from error
    if found:
      return value
  return default


def _check_square(layers: Sequence[lora.Layer], transposed: bool) -> None:
  """Raises ValueError where the layout of a square matrix cannot be told.

  PEFT sets fan_in_fan_out right for one layer after the other and saves the last value: in a model
  of both kinds of layers it says nothing about the others.
  """
  square = [layer for layer in layers if layer.base.shape[0] == layer.base.shape[1]]
  wrong = [layer for layer in layers if layer.transposed != transposed]
  if square and wrong:
    raise ValueError(
      f"{square[0].a.where}: the base's matrix is square, and fan_in_fan_out does not tell its "
      f"layout, because it is wrong for {wrong[0].base.where}; {_MERGE}."
    )
