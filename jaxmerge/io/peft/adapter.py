"""Applies PEFT adapters to the tensors of a base; checks their files strictly.

Only headers are read here, unless an output head is compared with its embedding. Adapted tensors
are computed when they are read.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxmerge.io import other_formats
from jaxmerge.io.huggingface import tied_embeddings
from jaxmerge.io.peft import layers, parts, replication, settings
from jaxmerge.io.peft.base import UNTIED, Base
from jaxmerge.io.peft.parts import Contents
from jaxmerge.io.peft.settings import Settings
from jaxmerge.io.tensors import pieces, safetensors
from jaxmerge.io.tensors.tensor import Files, Tensor

Path = str | os.PathLike[str]

CONFIG = other_formats.ADAPTER
WEIGHTS = "adapter_model.safetensors"

# Classes of transformers for models with a task head.
_CLASSES = {
  "SEQ_CLS": "AutoModelForSequenceClassification",
  "TOKEN_CLS": "AutoModelForTokenClassification",
  "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_PAIR = ("lora_A.weight", "lora_B.weight")


class Use(NamedTuple):
  """The use of an adapter's tensor.

  Attributes:
    kind: "added" to a tensor of the base, in "place" of one, "shared" by several modules, or a
      "copy" of another one, which is not read.
    target: the tensor of the base.
  """

  kind: Literal["added", "place", "shared", "copy"]
  target: str = ""


class Adapted(NamedTuple):
  """The tensors of a base with an adapter applied.

  Attributes:
    tensors: all tensors by name.
    tied: output heads that are still tied to the embedding.
    untied: output heads that were tied, and that the adapter makes separate tensors.
    layers: if the adapter reorders layers, the base's layer for each.
    rows: number of rows of the embedding, if the adapter has more or fewer tokens than the base.
    uses: the use of each tensor of the adapter.
  """

  tensors: dict[str, Tensor]
  tied: dict[str, Tensor]
  untied: tuple[str, ...]
  layers: tuple[int, ...] | None
  rows: int | None
  uses: dict[str, Use]


class Factors(NamedTuple):
  """The factors of a matrix: scale * B @ A.

  Attributes:
    a: [r, in].
    b: [out, r].
    scale: number.
    transposed: whether models store the matrix as [in, out], according to the config.
  """

  a: np.ndarray
  b: np.ndarray
  scale: float
  transposed: bool


def is_adapter(folder: Path) -> bool:
  """Returns whether a folder has an adapter config."""
  return (pathlib.Path(folder) / CONFIG).is_file()


def paths(folder: Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Returns the files of an adapter: its config and its weights.

  Raises:
    FileNotFoundError: naming a file that is missing, or is a pickle.
  """
  folder = pathlib.Path(folder)
  if not is_adapter(folder):
    raise FileNotFoundError(other_formats.explain_missing(folder, "adapter"))
  if not (folder / WEIGHTS).is_file():
    pickled = (folder / "adapter_model.bin").is_file()
    hint = (
      "; adapter_model.bin is a pickle, which is not read: load it with PEFT and save it again, "
      "save_pretrained writes safetensors"
    )
    raise FileNotFoundError(f"{folder}: {WEIGHTS} is missing{hint if pickled else ''}.")
  return folder / CONFIG, folder / WEIGHTS


def apply(
  base: Mapping[str, Tensor],
  folder: Path,
  files: Files,
  *,
  home: str | None = None,
  tied: Mapping[str, Tensor] | None = None,
  heads: Sequence[str] = (),
  rename: Mapping[str, str] | None = None,
) -> Adapted:
  """Returns the tensors of a base with an adapter applied.

  Adapted matrices are float32, and are computed when they are read. Whole tensors of the adapter
  (modules_to_save) replace those of the base. All others are passed through.

  >>> adapted = apply(inputs.open_model("base", files).tensors, "adapter", files)  # doctest: +SKIP

  Args:
    base: tensors of the base.
    folder: folder of the adapter.
    files: the open files.
    home: name of the folder in errors and records.
    tied: by the name of a tied output head, its embedding.
    heads: the tied heads that the model has, or would have if it were not tied.
    rename: by prefix of the adapter's module names, the prefix in the base.

  Raises:
    FileNotFoundError: if a file of the adapter is missing.
    ValueError: naming the file, and the key or tensor that is unknown or does not fit.
  """
  path, weights = paths(folder)
  config, contents = settings.read(path), parts.read(weights, files, home)
  order, tensors = replication.replicate(base, config)
  all_tensors = Base({**(tied or {}), **tensors}, rename or {})
  whole = _replace(all_tensors, contents, config)
  names = layers.change(all_tensors, contents, config)
  changed = all_tensors.as_stored()
  tokens = {n for key, n in names.items() if parts.TOKENS in contents.modules[key]}
  stored = {n for n in whole.values() if not config.saves(n)}
  _refuse_idle(tensors, changed, tied or {}, tokens | stored)
  out = {n: changed.get(n, t) for n, t in tensors.items()}
  still, untied = _ties(tensors, changed, tied or {}, heads, tokens)
  rows = _rows(all_tensors, {**out, **untied})
  uses = _uses(weights, {**names, **{(n, -1): to for n, to in whole.items()}})
  return Adapted({**out, **untied}, still, tuple(untied), order, rows, uses)


def factors(folder: Path, files: Files) -> dict[str, Factors]:
  """Reads the factors of an adapter by module.

  Raises:
    FileNotFoundError: if a file of the adapter is missing.
    ValueError: naming the tensor that is no factor of a plain LoRA layer, or the key of the config
      that needs more than factors.
  """
  path, weights = paths(folder)
  config, contents = settings.read(path), parts.read(weights, files)
  use = "apply the adapter to its base, as model+adapter, and merge the models"
  for key in ("use_dora", "lora_bias", "layer_replication", "target_parameters"):
    if config.values.get(key):
      raise ValueError(f"{path}: {key} needs more than the factors; {use}.")
  if config.kind != "LORA" or config.values.get("init_lora_weights") in ("pissa", "olora"):
    kind = config.values["init_lora_weights"] if config.kind == "LORA" else config.kind
    raise ValueError(f"{path}: {kind} needs more than the factors; {use}.")
  factors_by_module: dict[str, Factors] = {}
  strange = [*contents.whole.values(), *contents.shared.values()]
  for (module, nested), each in contents.modules.items():
    strange += [t for part, t in each.items() if part not in _PAIR or len(t.shape) != 2 or nested]
    if strange:
      break
    a, b = (each.get(part) for part in _PAIR)
    if a is None or b is None or a.shape[0] != b.shape[1]:
      raise ValueError(f"{weights}: {module!r} has no pair of factors, A [r, in] and B [out, r].")
    if a.shape[0] != config.rank(module):
      raise ValueError(
        f"{a.where}: its rank is {a.shape[0]}, but {config.rank(module)} by r or rank_pattern."
      )
    pair = pieces.load(a), pieces.load(b)
    factors_by_module[module] = Factors(
      *pair, config.scale(module), config.values["fan_in_fan_out"]
    )
  if strange:
    raise ValueError(f"{strange[0].where}: not a factor of a plain LoRA layer; {use}.")
  return factors_by_module


# --- Whole tensors of an adapter ---


def _replace(base: Base, contents: Contents, config: Settings) -> dict[str, str]:
  """Replaces tensors of the base; returns their names in the base."""
  names = {}
  for name, tensor in contents.whole.items():
    name_in_base = base.name(name)
    if name_in_base is None:
      raise ValueError(f"{tensor.where}: {_unknown(name, tensor, base, config)}.")
    old = base.tensor(name_in_base)
    is_vocabulary = tied_embeddings.is_vocabulary(name_in_base)
    resized = is_vocabulary and tensor.shape[1:] == old.shape[1:] != ()
    if tensor.shape != old.shape and not resized:
      raise ValueError(
        f"{tensor.where}: is {list(tensor.shape)}, but {list(old.shape)} in the base, whose "
        "tensor it replaces; use a base of that shape."
      )
    base.changed[name_in_base], names[name] = _like(tensor, old), name_in_base
  return names


def _unknown(name: str, tensor: Tensor, base: Base, config: Settings) -> str:
  """Returns the error for a tensor that is neither a part of the adapter's kind nor in the base."""
  task = config.values.get("task_type")
  if isinstance(task, str) and task in _CLASSES:
    labels = f", num_labels={tensor.shape[0]}" if task in ("SEQ_CLS", "TOKEN_CLS") else ""
    written = f"{_CLASSES[task]}.from_pretrained(BASE{labels}).save_pretrained(FOLDER)"
    return (
      f"was trained with the adapter, on a model for {task}, and the base has no {name!r}: use "
      f"such a model as the base, as written by transformers' {written}"
    )
  untied = f"; give the base{UNTIED}" if name.endswith(tied_embeddings.HEADS) else ""
  return (
    f"is neither a part of {config.kind} (lora_A.weight, lora_B.weight, lora_embedding_A, "
    f"lora_embedding_B, {parts.MAGNITUDE}) nor in the base{base.near(name)}{untied}"
  )


def _like(tensor: Tensor, old: Tensor) -> Tensor:
  """Returns a tensor that is stored in the dtype of the base's tensor, which it replaces."""
  dtype = old.stored_dtype
  alike = safetensors.is_floating(dtype) == safetensors.is_floating(tensor.dtype)
  return tensor._replace(store_as=dtype) if alike else tensor


# --- Heads and embeddings ---


def _ties(
  base: Mapping[str, Tensor],
  changed: Mapping[str, Tensor],
  tied: Mapping[str, Tensor],
  heads: Sequence[str],
  tokens: set[str],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
  """Returns the heads that are still tied to the embedding, and those that are not any more.

  PEFT trains a head only if the adapter has it; otherwise the head keeps the embedding's old
  weights. Rows of single tokens change in both.
  """
  names = {id(t): n for n, t in base.items()}
  still, untied = {}, {}
  for head, tensor in tied.items():
    embedding = names[id(tensor)]
    new = changed.get(embedding, tensor)
    apart = head in changed or (new is not tensor and embedding not in tokens)
    new_head = changed.get(head, tensor)
    if apart and (head in changed or head in heads) and not tied_embeddings.equal(new_head, new):
      untied[head] = new_head
    else:
      still[head] = new
  # A decoder's config then ties nothing; that of models with a shared embedding is unchanged.
  alone = untied and not any(map(tied_embeddings.stacks, base))
  return ({}, untied) if alone else (still, untied)


def _refuse_idle(
  base: Mapping[str, Tensor],
  changed: Mapping[str, Tensor],
  tied: Mapping[str, Tensor],
  embeddings: set[str],
) -> None:
  """Raises ValueError if an adapter changes an embedding module that the model never calls.

  Encoder and decoder look tokens up in separate modules, whose weights are tied to the shared one.
  PEFT wraps one module, and the others stay unchanged.

  Args:
    base: tensors of the base.
    changed: the tensors that the adapter changes.
    tied: by the name of a head or copy, the embedding that it is tied to.
    embeddings: tensors that change as weights, with everything tied to them, not as one module.
  """
  for name in changed.keys() - embeddings:
    used = [
      n
      for n in tied_embeddings.stacks(name)
      if tied.get(n, 0) is base.get(name) and n not in changed
    ]
    if used and not tied_embeddings.equal(changed[name], base[name]):
      module = name.removesuffix(".weight")
      raise ValueError(
        f"{changed[name].where}: the model never calls {module!r}: it looks tokens up in "
        f"{' and '.join(n.removesuffix('.weight') for n in used)}, which the adapter does not "
        f"change. The adapter has no effect there: remove the tensors of {module!r} from its file; "
        "target_modules=['embed_tokens'] trains the modules that are called."
      )


def _rows(base: Base, out: Mapping[str, Tensor]) -> int | None:
  """Returns the number of rows of embedding and head, if the adapter changes it.

  Raises:
    ValueError: if it changes only some of them.
  """
  known = {n: t for n, t in out.items() if tied_embeddings.is_vocabulary(n) and n in base.tensors}
  grown = {n: t for n, t in known.items() if t.shape[0] != base.tensors[n].shape[0]}
  if not grown:
    return None
  (name, first), *_ = grown.items()
  for other, tensor in known.items():
    if base.tensors[other].shape[0] == base.tensors[name].shape[0] and (
      tensor.shape[0] != first.shape[0]
    ):
      raise ValueError(
        f"{first.where}: {name!r} has {first.shape[0]} rows, but {other!r} has {tensor.shape[0]}: "
        "the rows of added tokens are in no file; save the adapter with both (modules_to_save, or "
        "save_embedding_layers=True)."
      )
  return first.shape[0]


def _uses(weights: pathlib.Path, names: Mapping[tuple[str, int], str]) -> dict[str, Use]:
  """Returns the use of each tensor of an adapter."""
  uses: dict[str, Use] = {}
  header = safetensors.header(weights).tensors
  for name in header:
    key = parts.key(name)
    if parts.is_copy(name, header):
      uses[name] = Use("copy")
    elif key is None or not key.module:
      uses[name] = Use("shared")
    elif key.part:
      uses[name] = Use("added", names[key.module, key.nested])
    else:
      uses[name] = Use("place", names[key.module, -1])
  return uses
