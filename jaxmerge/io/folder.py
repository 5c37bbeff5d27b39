"""Hugging Face folders: weights in safetensors, config.json, and the tokenizer's files."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any  # What JSON holds is any object until it is checked.

import numpy as np

from jaxmerge.io import atomic, parsing, safetensors

Path = str | os.PathLike[str]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
README = "README.md"
PROVENANCE = "jaxmerge_provenance.json"  # How a merged model came to be; checksums of its tensors.
PICKLES = (".bin", ".pt", ".pth")  # Endings of weights that are not read.
_LONGEST_PROVENANCE = 10 * parsing.LONGEST  # Bytes; a line for every tensor of every input.
_LONGEST_NAME = 255  # Characters of a file's name, on every common disk.
# What a folder with new weights takes over from the base's folder, where it is there. Weights, code
# and the base's own model card are not taken over.
COPIED = (
  CONFIG,
  "generation_config.json",
  "preprocessor_config.json",
  "video_preprocessor_config.json",
  "processor_config.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.txt",
  "vocab.json",
  "merges.txt",
  "normalizer.json",  # Whisper's, of spellings.
  "*.model",
  "*.tiktoken",
  "*.spm",  # Marian's, of two languages.
  "vocab-*.json",
  "bpe.codes",
  "tekken.json",
  "entity_vocab.json",
  "chat_template.*",
  "additional_chat_templates/*.jinja",
  # sentence-transformers: which modules follow the encoder, and their settings.
  "modules.json",
  "config_sentence_transformers.json",
  "sentence_bert_config.json",
  "[0-9]_*/config.json",
)


def load(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Reads all tensors of a folder by name, and its config.

  The weights are in `model.safetensors`, else in the shards that its index, a file of that name
  with `.index.json` added, lists.

  >>> tensors, config = load("all-MiniLM-L6-v2")  # doctest: +SKIP

  Raises:
    FileNotFoundError: where the folder, its config.json, its weights or a shard are missing.
    ValueError: naming the file and the tensor that is damaged, misplaced or in two shards.
  """
  settings, places = config(folder), entries(folder)
  files = dict.fromkeys(path for path, _ in places.values())
  return {name: x for path in files for name, x in safetensors.load(path).items()}, settings


def entries(folder: Path) -> dict[str, tuple[pathlib.Path, safetensors.Entry]]:
  """Returns where each tensor of a folder lies, from the headers of its files alone.

  Raises as `load` does.
  """
  folder = pathlib.Path(folder)
  found: dict[str, tuple[pathlib.Path, safetensors.Entry]] = {}
  for path in weights(folder):
    for name, entry in safetensors.header(path).tensors.items():
      if name in found:
        raise ValueError(f"{path}: tensor {name!r} is in {found[name][0].name} as well.")
      found[name] = (path, entry)
  _check_index(folder, {name: path for name, (path, _) in found.items()})
  return found


def shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
  """Deals tensors, of so many bytes each, to files of at most `limit` bytes, in their order.

  A tensor that is larger has a file of its own.

  >>> shards({"a": 3, "b": 3, "c": 9}, limit=8)
  {'model-00001-of-00002.safetensors': ['a', 'b'], 'model-00002-of-00002.safetensors': ['c']}
  >>> shards({"a": 3}, limit=8)
  {'model.safetensors': ['a']}
  """
  groups: list[list[str]] = [[]]
  room = limit
  for name, size in sizes.items():
    if size > room and groups[-1]:
      groups.append([])
      room = limit
    groups[-1].append(name)
    room -= size
  if len(groups) == 1:
    return {WEIGHTS: groups[0]}
  return {
    f"model-{i:05d}-of-{len(groups):05d}.safetensors": g for i, g in enumerate(groups, start=1)
  }


def index(files: Mapping[str, list[str]], sizes: Mapping[str, int]) -> str:
  """Returns the text of the index of several shards."""
  places = {name: file for file, names in files.items() for name in names}
  content = {
    "metadata": {"total_size": sum(sizes.values())},
    "weight_map": dict(sorted(places.items())),
  }
  return json.dumps(content, indent=2) + "\n"


def save(
  folder: Path,
  tensors: Mapping[str, Any],
  *,
  source: Path,
  readme: str | None = None,
  metadata: Mapping[str, str] | None = None,
  replace: bool = False,
) -> pathlib.Path:
  """Writes a folder that other tools open; it appears whole or not at all.

  Args:
    folder: its path; parents are made.
    tensors: the weights, for one `model.safetensors`.
    source: the base's folder, whose config.json and tokenizer files are copied byte for byte.
    readme: text of the model card, README.md; None writes none.
    metadata: for the header of the weights, {"format": "pt"} if None: transformers demands it.
    replace: whether a folder that is there is replaced.

  Returns:
    The path of the folder.

  Raises:
    FileExistsError: where the folder is there and `replace` is not set.
  """
  config(source)
  with atomic.folder(folder, replace=replace) as beside:
    surround(beside, source, readme)
    safetensors.save(beside / WEIGHTS, tensors, metadata or {"format": "pt"})
  return pathlib.Path(folder)


def surround(made: pathlib.Path, source: Path, readme: str | None = None) -> None:
  """Copies what a folder with new weights takes over from `source`, and writes a model card."""
  for path in copied(source):
    target = made / path.relative_to(source)
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, target)
  if readme is not None:
    (made / README).write_text(readme, encoding="utf-8")


def config(folder: Path) -> dict[str, Any]:
  """Returns the contents of a folder's config.json."""
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder}: {_not_a_folder(folder)}.")
  return read_json(folder / CONFIG)


def weights(folder: Path) -> list[pathlib.Path]:
  """Returns the paths of the files that hold a folder's weights."""
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder}: {_not_a_folder(folder)}.")
  if (folder / WEIGHTS).is_file():
    return [folder / WEIGHTS]
  if not (folder / INDEX).is_file():
    pickled = [path for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
    # Beside weights there are those of the optimizer, of the arguments of training.
    own = [path for path in pickled if "model" in path.name] + pickled
    hint = f"; {_conversion(own[0])}" if own else ""
    raise FileNotFoundError(f"{folder}: neither {WEIGHTS} nor {INDEX} is there{hint}.")
  return sorted({folder / shard for shard in _weight_map(folder).values()})


def _not_a_folder(path: pathlib.Path) -> str:
  if not path.is_file():
    return "no such folder"
  if path.suffix in PICKLES:
    return f"no folder; {_conversion(path)}"
  return "is a file; give the folder that it lies in"


def _conversion(path: pathlib.Path) -> str:
  """Says how a pickle, which can hold code, becomes what is read."""
  return (
    f"{path.name} is a pickle, which is not read. To convert it, load it by its class in "
    f"transformers, whose save_pretrained writes safetensors; or, where it holds tensors by name, "
    f"safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), {WEIGHTS!r})"
  )


def copied(folder: Path) -> list[pathlib.Path]:
  """Returns the paths of the files that a folder with new weights takes over from this one."""
  folder = pathlib.Path(folder)
  return sorted({path for name in COPIED for path in folder.glob(name) if path.is_file()})


def read_json(path: pathlib.Path, longest: int = parsing.LONGEST) -> dict[str, Any]:
  """Returns the JSON object in a file.

  >>> read_json(pathlib.Path("all-MiniLM-L6-v2/config.json"))["model_type"]  # doctest: +SKIP
  'bert'

  Args:
    path: of the file.
    longest: bytes that it may have.

  Raises:
    FileNotFoundError: where there is no file.
    ValueError: naming the file that does not hold one, is too long, or names a key twice.
  """
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file.")
  size = path.stat().st_size
  if size > longest:
    raise ValueError(f"{path}: {size} bytes are over the limit of {longest} for JSON.")
  return parsing.parsed(str(path), path.read_bytes())


def provenance(folder: Path) -> dict[str, Any]:
  """Returns how the model of a folder came to be; errors as for `read_json`."""
  return read_json(pathlib.Path(folder) / PROVENANCE, _LONGEST_PROVENANCE)


def _check_index(folder: pathlib.Path, homes: Mapping[str, pathlib.Path]) -> None:
  if (folder / WEIGHTS).is_file():
    return
  index = _weight_map(folder)
  for name in sorted(index.keys() | homes.keys()):
    said, found = index.get(name), homes[name].name if name in homes else None
    if said != found:
      raise ValueError(
        f"{folder / INDEX}: tensor {name!r} is in {said or 'no shard'} by the index, "
        f"but in {found or 'no shard'} on disk."
      )


def _weight_map(folder: pathlib.Path) -> dict[str, str]:
  path = folder / INDEX
  shards = read_json(path).get("weight_map")
  if not isinstance(shards, dict) or not shards:
    raise ValueError(
      f"{path}: weight_map must map names of tensors to shards, got {shards!r:.200}."
    )
  for name, shard in shards.items():
    # A shard is a plain name, so that no index reads outside of its folder.
    if (
      not isinstance(shard, str)
      or not shard
      or len(shard) > _LONGEST_NAME
      or pathlib.PurePath(shard).name != shard
      or "\\" in shard
    ):
      raise ValueError(
        f"{path}: tensor {name!r}: {shard!r:.300} is not the name of a file beside it."
      )
    if not (folder / shard).is_file():
      raise FileNotFoundError(f"{path}: tensor {name!r} is in {shard}, which is missing.")
  return shards
