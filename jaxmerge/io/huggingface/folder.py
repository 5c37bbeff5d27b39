"""Hugging Face folders: weights in safetensors, config.json, and the tokenizer's files.

Modules of sentence-transformers, such as 2_Dense, are subfolders with weights: the tensor
`linear.weight` in 2_Dense/model.safetensors is named 2_Dense/linear.weight here.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Collection, Iterable, Mapping
from typing import Any  # Any: a value of JSON before it is checked.

import numpy as np

from jaxmerge.io import other_formats
from jaxmerge.io.disk import atomic, links, strict_json
from jaxmerge.io.huggingface import raw
from jaxmerge.io.tensors import safetensors

Path = str | os.PathLike[str]

WEIGHTS, INDEX = other_formats.WEIGHTS, other_formats.INDEX
CONFIG = "config.json"
README = "README.md"
MODULES = "modules.json"  # sentence-transformers: which modules follow the encoder.
MODULE = "[1-9]_*"  # A module's folder: number and kind. The encoder has none.
_WEIGHTED = ("CNN", "Dense", "LSTM", "LayerNorm", "WeightedLayerPooling")  # Pooling has no weights.
PROVENANCE = "jaxmerge_provenance.json"  # How a model was merged, and checksums of its tensors.
ARROW = " -> "  # In a provenance: from the outcome of an input tensor to the tensor of the result.
_LONGEST_PROVENANCE = 10 * strict_json.LONGEST  # Bytes; one line per tensor of each input.
_LONGEST_NAME = 255  # Characters of a file's name, on every common disk.
# Files of a tokenizer, without its chat template.
TOKENIZER = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.txt",
  "vocab.json",
  "merges.txt",
  "normalizer.json",  # Whisper: spellings.
  "*.model",
  "*.tiktoken",
  "*.spm",  # Marian: source and target language.
  "vocab-*.json",
  "bpe.codes",
  "tekken.json",
  "entity_vocab.json",
)
# Files that a folder with new weights copies from the base's folder, if they exist. Weights, code
# and the base's model card are not copied.
COPIED = (
  CONFIG,
  "generation_config.json",
  "preprocessor_config.json",
  "video_preprocessor_config.json",
  "processor_config.json",
  *TOKENIZER,
  "chat_template.*",
  "additional_chat_templates/*.jinja",
  MODULES,
  "config_sentence_transformers.json",
  "sentence_bert_config.json",
  f"{MODULE}/config.json",
)


def load(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Reads all tensors of a folder by name, and its config.

  The weights are in `model.safetensors`, or in the shards listed in `model.safetensors.index.json`,
  or else in all safetensors of the folder. Modules of sentence-transformers have theirs in
  subfolders.

  >>> tensors, config = load("all-MiniLM-L6-v2")  # doctest: +SKIP

  Raises:
    FileNotFoundError: if the folder, its config.json, its weights or a shard are missing.
    ValueError: naming the file and the tensor that is damaged, misplaced or in two shards; or if
      there are both a single file of weights and an index of other files.
  """
  folder = pathlib.Path(folder)
  settings, places = config(folder), entries(folder)
  read = {path: safetensors.load(path) for path in {path for path, _ in places.values()}}
  return {
    name: read[path][inner(str(path.relative_to(folder)), name)]
    for name, (path, _) in places.items()
  }, settings


def entries(folder: Path) -> dict[str, tuple[pathlib.Path, safetensors.Entry]]:
  """Returns the place of each tensor of a folder, from the headers of its files alone.

  Raises as `load` does.
  """
  folder = pathlib.Path(folder)
  entries_by_name: dict[str, tuple[pathlib.Path, safetensors.Entry]] = {}
  for path in weights(folder):
    prefix = "" if folder in (path, path.parent) else f"{path.parent.name}/"
    for inner_name, entry in safetensors.header(path).tensors.items():
      name = prefix + inner_name
      if name in entries_by_name:
        other = entries_by_name[name][0].name
        hint = "" if is_usual(folder) else "; if these are two models, use the path of one file"
        raise ValueError(f"{path}: tensor {name!r} is also in {other}{hint}.")
      entries_by_name[name] = (path, entry)
  homes = {name: path for name, (path, _) in entries_by_name.items() if path.parent == folder}
  _check_index(folder, homes)
  return entries_by_name


def modules(folder: Path) -> list[str]:
  """Returns the names of the module folders of sentence-transformers in a folder."""
  folder = pathlib.Path(folder)
  if not (folder / MODULES).is_file():
    return []
  return sorted(path.name for path in folder.glob(MODULE) if path.is_dir())


def inner(file: str, name: str) -> str:
  """Returns the name of a tensor in its file.

  >>> inner("2_Dense/model.safetensors", "2_Dense/linear.weight")
  'linear.weight'
  >>> inner("model.safetensors", "embeddings/kernel")
  'embeddings/kernel'
  """
  return name.removeprefix(f"{pathlib.PurePath(file).parent}/")


def shards(
  sizes: Mapping[str, int], limit: int, modules: Collection[str] = ()
) -> dict[str, list[str]]:
  """Distributes tensors, in order, over files of at most `limit` bytes.

  `sizes` are in bytes. A tensor over the limit has a file to itself; a module has one of any size.

  >>> shards({"a": 3, "b": 3, "c": 9}, limit=8)
  {'model-00001-of-00002.safetensors': ['a', 'b'], 'model-00002-of-00002.safetensors': ['c']}
  >>> shards({"a": 3, "2_Dense/w": 9}, limit=8, modules=["2_Dense"])
  {'model.safetensors': ['a'], '2_Dense/model.safetensors': ['2_Dense/w']}
  """
  groups: list[list[str]] = [[]]
  module_files: dict[str, list[str]] = {}
  left = limit
  for name, size in sizes.items():
    module, inside, _ = name.partition("/")
    if inside and module in modules:
      module_files.setdefault(f"{module}/{WEIGHTS}", []).append(name)
      continue
    if size > left and groups[-1]:
      groups.append([])
      left = limit
    groups[-1].append(name)
    left -= size
  if len(groups) == 1:
    return {WEIGHTS: groups[0], **module_files}
  count = len(groups)
  return {
    f"model-{i + 1:05d}-of-{count:05d}.safetensors": g for i, g in enumerate(groups)
  } | module_files


def index(files: Mapping[str, list[str]], sizes: Mapping[str, int]) -> str:
  """Returns the text of the index of several shards; it leaves out modules."""
  places = {name: file for file, names in files.items() if "/" not in file for name in names}
  content = {
    "metadata": {"total_size": sum(sizes[name] for name in places)},
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
  """Writes a folder that other programs can open; it appears complete or not at all.

  Args:
    folder: its path; parents are created.
    tensors: the weights, for one `model.safetensors` and one more per module.
    source: the base's folder, whose config.json and tokenizer files are copied byte for byte.
    readme: text of the model card, README.md; None writes none.
    metadata: metadata of the weights' header; None: {"format": "pt"}, which transformers requires.
    replace: whether to replace an existing folder.

  Returns:
    The path of the folder.

  Raises:
    FileExistsError: if the folder exists and `replace` is not set.
  """
  config(source)
  with atomic.folder(folder, replace=replace) as beside:
    surround(beside, source, readme)
    sizes = dict.fromkeys(tensors, 0)
    for file, names in shards(sizes, 0, modules(source)).items():
      tensors_of_file = {inner(file, name): tensors[name] for name in names}
      (beside / file).parent.mkdir(exist_ok=True)
      safetensors.save(beside / file, tensors_of_file, metadata or {"format": "pt"})
  return pathlib.Path(folder)


def surround(folder: pathlib.Path, source: Path, readme: str | None = None) -> None:
  """Copies the small files that new weights need from `source`, and writes a model card."""
  for path in files_to_copy(source):
    target = folder / path.relative_to(source)
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, target)
  if readme is not None:
    (folder / README).write_text(readme, encoding="utf-8")


def config(folder: Path) -> dict[str, Any]:
  """Returns the contents of a folder's config.json."""
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise FileNotFoundError(other_formats.explain_missing(folder))
  if (folder / CONFIG).exists():
    links.check(folder / CONFIG, folder)
  return read_json(folder / CONFIG)


def is_usual(folder: Path) -> bool:
  """Returns whether a folder has weights under the names of Hugging Face folders."""
  folder = pathlib.Path(folder)
  return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def weights(folder: Path) -> list[pathlib.Path]:
  """Returns the paths of a folder's weight files, including those of its modules."""
  folder = pathlib.Path(folder)
  single, several = (folder / WEIGHTS).is_file(), (folder / INDEX).is_file()
  if not single and not several:
    return raw.files(folder)
  homes = weight_map(folder / INDEX) if several else {}
  if single and (others := set(homes.values()) - {WEIGHTS}):
    raise ValueError(
      f"{folder}: has both {WEIGHTS} and an index of other files, such as {min(others)}; "
      f"remove {WEIGHTS}, or {INDEX} and its files, whichever is not the model."
    )
  for name, shard in homes.items():
    if not (folder / shard).is_file():
      raise FileNotFoundError(f"{folder / INDEX}: tensor {name!r} is in {shard}, which is missing.")
  return [folder / shard for shard in sorted(set(homes.values()) or {WEIGHTS})] + _module_weights(
    folder
  )


def _module_weights(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the weight files of modules; some modules have none."""
  folders = [folder / module for module in modules(folder)]
  for path in folders:
    hint = other_formats.pickle_hint(path)
    if not (path / WEIGHTS).is_file() and (hint or path.name[2:] in _WEIGHTED):
      raise FileNotFoundError(f"{path}: {WEIGHTS} is missing{'; ' * bool(hint)}{hint}.")
  return [path / WEIGHTS for path in folders if (path / WEIGHTS).is_file()]


def small_files(folder: Path) -> list[pathlib.Path]:
  """Returns the paths of the files other than weights: index, configs, tokenizer."""
  return _files(pathlib.Path(folder), (INDEX, *COPIED))


def files_to_copy(folder: Path) -> list[pathlib.Path]:
  """Returns the paths of the files that a folder with new weights copies from this one.

  Raises:
    ValueError: if one of them is a link to a file elsewhere, see `links.check`.
  """
  folder = pathlib.Path(folder)
  paths = _files(folder, COPIED)
  for path in paths:
    links.check(path, folder)
  return paths


def _files(folder: pathlib.Path, names: Iterable[str]) -> list[pathlib.Path]:
  return sorted({path for name in names for path in folder.glob(name) if path.is_file()})


def read_json(path: pathlib.Path, longest: int = strict_json.LONGEST) -> dict[str, Any]:
  """Returns the JSON object in a file.

  >>> read_json(pathlib.Path("all-MiniLM-L6-v2/config.json"))["model_type"]  # doctest: +SKIP
  'bert'

  Args:
    path: path of the file.
    longest: largest size, in bytes.

  Raises:
    FileNotFoundError: if the file does not exist.
    ValueError: naming the file, if it is not a JSON object, is too long, or repeats a key.
  """
  if not path.is_file():
    what = "not a regular file" if path.exists() else "no such file"
    raise FileNotFoundError(f"{path}: {what}.")
  size = path.stat().st_size
  if size > longest:
    raise ValueError(f"{path}: {size} bytes are over the limit of {longest} for JSON.")
  return strict_json.parse(str(path), path.read_bytes())


def text(folder: pathlib.Path, name: str) -> str:
  """Returns the text of a small file of a model's folder.

  Raises:
    ValueError: naming the file, if it is not text, too long, or a link out of the folder.
  """
  path = folder / name
  links.check(path, folder)
  if (size := path.stat().st_size) > strict_json.LONGEST:
    raise ValueError(
      f"{path}: {size} bytes are over the limit of {strict_json.LONGEST} for a text."
    )
  try:
    return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 text: {error}.") from error


def provenance(folder: Path) -> dict[str, Any]:
  """Returns the provenance of a merged model; errors as for `read_json`."""
  return read_json(provenance_file(pathlib.Path(folder)), _LONGEST_PROVENANCE)


def provenance_file(path: pathlib.Path) -> pathlib.Path:
  """Returns the path of a merged model's provenance: in its folder, or next to its file.

  >>> provenance_file(pathlib.Path("out/merged.safetensors")).name
  'merged.jaxmerge_provenance.json'
  """
  is_file = path.suffix == raw.ENDING and not path.is_dir()
  return path.with_name(f"{path.stem}.{PROVENANCE}") if is_file else path / PROVENANCE


def without_target(outcome: str) -> str:
  """Returns the outcome of an input tensor in a provenance, without the tensor of the result.

  >>> without_target("merged by ties, job 1 -> lm_head.weight")
  'merged by ties, job 1'
  """
  return outcome.split(ARROW)[0]


def _check_index(folder: pathlib.Path, homes: Mapping[str, pathlib.Path]) -> None:
  if not (folder / INDEX).is_file():
    return
  index = weight_map(folder / INDEX)
  for name in sorted(index.keys() | homes.keys()):
    by_index, on_disk = index.get(name), homes[name].name if name in homes else None
    if by_index != on_disk:
      raise ValueError(
        f"{folder / INDEX}: tensor {name!r} is in {by_index or 'no shard'} according to the index, "
        f"but in {on_disk or 'no shard'} on disk."
      )


def weight_map(path: pathlib.Path) -> dict[str, str]:
  """Returns the file name of each tensor from an index."""
  shards = read_json(path).get("weight_map")
  if not isinstance(shards, dict) or not shards:
    raise ValueError(
      f"{path}: weight_map must map names of tensors to shards, got {shards!r:.200}."
    )
  for name, shard in shards.items():
    # A shard must be a plain name, so that an index cannot point outside its folder.
    if (
      not isinstance(shard, str)
      or not shard
      or len(shard) > _LONGEST_NAME
      or pathlib.PurePath(shard).name != shard
      or "\\" in shard
    ):
      raise ValueError(
        f"{path}: tensor {name!r}: {shard!r:.300} is not the name of a file in its folder."
      )
  return shards


def state_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
  """Returns a config with the dtype of the stored weights, under the key that it uses.

  >>> state_dtype({"torch_dtype": "float32"}, "bfloat16")
  {'torch_dtype': 'bfloat16'}
  """
  return {**config, "dtype" if "dtype" in config else "torch_dtype": dtype}
