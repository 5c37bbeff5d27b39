"""Applies adapters of PEFT to the tensors of a base; files are checked strictly.

Only headers are read here, unless an output head and its embedding are compared; what is adapted is
computed when it is read. `peft` holds the kinds of adapters.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxmerge.io import other_formats
from jaxmerge.io.huggingface import tied as tied_names
from jaxmerge.io.peft import layers, parts, replication, settings
from jaxmerge.io.peft.base import UNTIED, Base
from jaxmerge.io.peft.parts import Contents
from jaxmerge.io.peft.settings import Settings
from jaxmerge.io.tensors import pieces, safetensors
from jaxmerge.io.tensors.tensor import Files, Tensor

Path = str | os.PathLike[str]

CONFIG = other_formats.ADAPTER
WEIGHTS = "adapter_model.safetensors"

# Of transformers: what a model is loaded by that has the head of a task.
_CLASSES = {
  "SEQ_CLS": "AutoModelForSequenceClassification",
  "TOKEN_CLS": "AutoModelForTokenClassification",
  "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_PAIR = ("lora_A.weight", "lora_B.weight")


class Use(NamedTuple):
  """The use of an adapter's tensor.

  Attributes:
    kind: "added" to a tensor of the base, in its "place", "shared" by several modules, or a "copy"
      of others, which is not read.
    target: the tensor of the base.
  """

  kind: Literal["added", "place", "shared", "copy"]
  target: str = ""


class Adapted(NamedTuple):
  """The tensors of a base with an adapter applied.

  Attributes:
    tensors: by name.
    tied: output heads that are still tied to the embedding.
    untied: output heads that were tied, and that the adapter makes separate tensors.
    layers: if the adapter reorders layers, the base's layer for each.
    rows: rows of the embedding, if the adapter has more or fewer tokens than the base.
    uses: use of each tensor of the adapter.
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
    transposed: whether the config says that models store the matrix as [in, out].
  """

  a: np.ndarray
  b: np.ndarray
  scale: float
  transposed: bool


def is_adapter(folder: Path) -> bool:
  """Returns whether a folder holds an adapter."""
  return (pathlib.Path(folder) / CONFIG).is_file()


def paths(folder: Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Returns the files of an adapter: its config and its weights.

  Raises:
    FileNotFoundError: naming the one that is missing, or is a pickle.
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
    raise FileNotFoundError(f"{folder}: {WEIGHTS} is not there{hint if pickled else ''}.")
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

  Matrices that are adapted are float32, computed when they are read; tensors that the adapter holds
  whole (modules_to_save) take the place of the base's; all others are passed through.

  >>> adapted = apply(inputs.open_model("base", files).tensors, "adapter", files)  # doctest: +SKIP

  Args:
    base: its tensors.
    folder: of the adapter.
    files: that are open.
    home: name of the folder in errors and records.
    tied: names of output heads to the embedding that each is.
    heads: those of them that a model has, or would have if it were not tied.
    rename: beginnings of names of the adapter's modules to those of the base.

  Raises:
    FileNotFoundError: where a file of the adapter is missing.
    ValueError: naming the file, and the key or tensor, that is not understood or does not fit.
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
  """Reads the factors of an adapter by their modules.

  Raises:
    FileNotFoundError: where a file of the adapter is missing.
    ValueError: naming the tensor that is no factor of a plain LoRA layer, or the key of the config
      by which the adapter is more than its factors.
  """
  path, weights = paths(folder)
  config, contents = settings.read(path), parts.read(weights, files)
  use = "apply the adapter to its base, as model+adapter, and merge the models"
  for key in ("use_dora", "lora_bias", "layer_replication", "target_parameters"):
    if config.values.get(key):
      raise ValueError(f"{path}: {key} makes it more than its factors; {use}.")
  if config.kind != "LORA" or config.values.get("init_lora_weights") in ("pissa", "olora"):
    kind = config.values["init_lora_weights"] if config.kind == "LORA" else config.kind
    raise ValueError(f"{path}: {kind} makes it more than its factors; {use}.")
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
    raise ValueError(f"{strange[0].where}: is no factor of a plain LoRA layer; {use}.")
  return factors_by_module


# --- Tensors that an adapter has whole ---


def _replace(base: Base, contents: Contents, config: Settings) -> dict[str, str]:
  """Replaces tensors of the base; returns the base's name of each."""
  names = {}
  for name, tensor in contents.whole.items():
    name_in_base = base.name(name)
    if name_in_base is None:
      raise ValueError(f"{tensor.where}: {_unknown(name, tensor, base, config)}.")
    old = base.tensor(name_in_base)
    is_vocabulary = tied_names.is_vocabulary(name_in_base)
    resized = is_vocabulary and tensor.shape[1:] == old.shape[1:] != ()
    if tensor.shape != old.shape and not resized:
      raise ValueError(
        f"{tensor.where}: is {list(tensor.shape)}, but {list(old.shape)} in the base, whose "
        "tensor it replaces; give a base of that shape."
      )
    base.changed[name_in_base], names[name] = _like(tensor, old), name_in_base
  return names


def _unknown(name: str, tensor: Tensor, base: Base, config: Settings) -> str:
  """Returns the error text for a tensor that is no part of an adapter's kind, nor in the base."""
  task = config.values.get("task_type")
  if isinstance(task, str) and task in _CLASSES:
    labels = f", num_labels={tensor.shape[0]}" if task in ("SEQ_CLS", "TOKEN_CLS") else ""
    written = f"{_CLASSES[task]}.from_pretrained(BASE{labels}).save_pretrained(FOLDER)"
    return (
      f"was trained beside the adapter, on a model for {task}, and the base has no {name!r}: give "
      f"the base as such a model, which transformers' {written} writes"
    )
  untied = f"; give the base{UNTIED}" if name.endswith(tied_names.HEADS) else ""
  return (
    f"is neither a part that {config.kind} has (lora_A.weight, lora_B.weight, lora_embedding_A, "
    f"lora_embedding_B, {parts.MAGNITUDE}) nor in the base{base.near(name)}{untied}"
  )


def _like(tensor: Tensor, old: Tensor) -> Tensor:
  """Returns a tensor that a result stores as it would store the base's, which it replaces."""
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
  """Returns the heads that still are the embedding, and those that no longer are.

  PEFT trains a head only where the adapter says so: else it stays as the embedding was. Rows of
  single tokens are those of both.
  """
  names = {id(t): n for n, t in base.items()}
  still, untied = {}, {}
  for head, tensor in tied.items():
    embedding = names[id(tensor)]
    new = changed.get(embedding, tensor)
    apart = head in changed or (new is not tensor and embedding not in tokens)
    new_head = changed.get(head, tensor)
    if apart and (head in changed or head in heads) and not tied_names.equal(new_head, new):
      untied[head] = new_head
    else:
      still[head] = new
  # The config of a decoder then ties none; that of models which share an embedding stays.
  alone = untied and not any(map(tied_names.stacks, base))
  return ({}, untied) if alone else (still, untied)


def _refuse_idle(
  base: Mapping[str, Tensor],
  changed: Mapping[str, Tensor],
  tied: Mapping[str, Tensor],
  embeddings: set[str],
) -> None:
  """Raises ValueError where an adapter was trained of an embedding's module that never runs.

  Encoder and decoder look tokens up in separate modules, to whose weights that of the shared
  one is tied. PEFT wraps one module, and the others stay as they are.

  Args:
    base: its tensors.
    changed: those of them that the adapter changes.
    tied: names of heads and copies to the embedding that each is.
    embeddings: tensors that are changed as weights, not as a module: in all that is tied to them.
  """
  for name in changed.keys() - embeddings:
    used = [
      n for n in tied_names.stacks(name) if tied.get(n, 0) is base.get(name) and n not in changed
    ]
    if used and not tied_names.equal(changed[name], base[name]):
      module = name.removesuffix(".weight")
      raise ValueError(
        f"{changed[name].where}: the model never runs {module!r}: it looks tokens up in "
        f"{' and '.join(n.removesuffix('.weight') for n in used)}, which the adapter leaves as "
        f"they are. As trained, it has no effect there: take the tensors of {module!r} out of the "
        "adapter's file; target_modules=['embed_tokens'] trains what is looked up."
      )


def _rows(base: Base, out: Mapping[str, Tensor]) -> int | None:
  """Returns the rows of embedding and head, where the adapter has others than the base.

  Raises:
    ValueError: where not all of them have.
  """
  known = {n: t for n, t in out.items() if tied_names.is_vocabulary(n) and n in base.tensors}
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
        "those of tokens that were added are in no file; save the adapter with both "
        "(modules_to_save, or save_embedding_layers=True)."
      )
  return first.shape[0]


def _uses(weights: pathlib.Path, names: Mapping[tuple[str, int], str]) -> dict[str, Use]:
  """Returns what the tensors of an adapter are used for, by the tensors of the base."""
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
