"""Pipelines of diffusers: folders of several models, `unet/`, `vae/`, `text_encoder/`, ...

The tensors of a part are named `unet/...`, and are written to its folder. Tokenizers, schedulers
and configs are copied.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple  # Any: values of a config.json.

from jaxmerge.io.disk import links
from jaxmerge.io.huggingface import folder
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.safetensors import Entry

INDEX = "model_index.json"
STEMS = ("diffusion_pytorch_model", "model")  # Weight files of diffusers and of transformers.
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm")
_END = ".safetensors"
_CONFIG = "_config"  # Suffix of a part's key in the config of a pipeline.


class Part(NamedTuple):
  """A part of a pipeline with weights.

  Attributes:
    name: its folder.
    stem: stem of its file names: "diffusion_pytorch_model" or "model".
    variant: "", "fp16" or the like.
    files: its weight files.
    others: variants that are not read.
  """

  name: str
  stem: str
  variant: str
  files: tuple[pathlib.Path, ...]
  others: tuple[str, ...]


def is_pipeline(path: str | os.PathLike[str]) -> bool:
  """Returns whether a folder is a pipeline of diffusers."""
  return (pathlib.Path(path) / INDEX).is_file()


def parts(path: pathlib.Path) -> list[Part]:
  """Returns the parts of a pipeline that have weights.

  The variant without a name is read, or the only one.

  Raises:
    FileNotFoundError: if there are no weights, or a shard is missing.
    ValueError: naming a part with several variants but none without a name.
  """
  folders = sorted(p for p in path.iterdir() if p.is_dir() and any(p.glob(f"*{_END}")))
  weighted = [part for home in folders if (part := _part(home)) is not None]
  if not weighted:
    raise FileNotFoundError(f"{path}: has {INDEX}, but no part with safetensors.")
  return weighted


def _part(home: pathlib.Path) -> Part | None:
  for stem in STEMS:
    variants = _variants(home, stem)
    if not variants:
      continue
    if "" not in variants and len(variants) > 1:
      several = ", ".join(sorted(variants))
      raise ValueError(f"{home}: has the variants {several}: remove the files of all but one.")
    variant = "" if "" in variants else next(iter(variants))
    for file in variants[variant]:
      if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, but the index in its folder names it.")
    others = sorted(variants.keys() - {variant})
    return Part(home.name, stem, variant, tuple(variants[variant]), tuple(others))
  return None


def _variants(home: pathlib.Path, stem: str) -> dict[str, list[pathlib.Path]]:
  """Returns the weight files of a part by variant."""
  variants: dict[str, list[pathlib.Path]] = {}
  escaped = re.escape(stem)
  for path in sorted(home.iterdir()):
    if match := re.fullmatch(rf"{escaped}{_END}\.index(?:\.(\w+))?\.json", path.name):
      names = folder.weight_map(path).values()
      variants[match[1] or ""] = sorted({home / name for name in names})
  for path in sorted(home.glob(f"{stem}*{_END}")):
    if match := re.fullmatch(rf"{escaped}(?:\.(\w+))?{_END}", path.name):
      variants.setdefault(match[1] or "", [path])
  return variants


def entries(path: pathlib.Path) -> dict[str, tuple[pathlib.Path, Entry]]:
  """Returns the place of each tensor of a pipeline, from the headers of its files."""
  places: dict[str, tuple[pathlib.Path, Entry]] = {}
  for part in parts(path):
    for file in part.files:
      for inner, entry in safetensors.header(file).tensors.items():
        name = f"{part.name}/{inner}"
        if name in places:
          raise ValueError(f"{file}: tensor {inner!r} is also in {places[name][0].name}.")
        places[name] = (file, entry)
  return places


def notes(path: pathlib.Path) -> list[str]:
  """Returns notes on which files of a pipeline are read, and which are not."""
  every = parts(path)
  lines = [f"is a pipeline of diffusers: its parts {', '.join(p.name for p in every)} are merged."]
  for variant in sorted({p.variant for p in every if p.variant}):
    names = ", ".join(p.name for p in every if p.variant == variant)
    lines.append(f"has {names} only as the variant {variant}, which is read.")
  for variant in sorted({v for p in every for v in p.others}):
    names = ", ".join(p.name for p in every if variant in p.others)
    lines.append(f"also has the variant {variant} of {names}, which is not read.")
  return lines


def config(path: pathlib.Path) -> dict[str, Any]:
  """Returns the configs of the parts with weights, `unet_config` and so on."""
  return {
    f"{part.name}{_CONFIG}": folder.config(path / part.name)
    for part in parts(path)
    if (path / part.name / folder.CONFIG).is_file()
  }


def config_texts(
  path: pathlib.Path, before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, str]:
  """Returns the files of a changed config: config.json, or those of a pipeline's parts.

  >>> config_texts(pathlib.Path("none"), {"a": 1}, {"a": 1})
  {}
  """
  if not is_pipeline(path):
    return {} if before == after else {folder.CONFIG: json.dumps(after, indent=2) + "\n"}
  return {
    f"{key.removesuffix(_CONFIG)}/{folder.CONFIG}": json.dumps(value, indent=2) + "\n"
    for key, value in after.items()
    if isinstance(value, Mapping) and value != before.get(key)
  }


def small_files(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files of a pipeline that are copied next to new weights.

  Raises:
    ValueError: if one of them is a link to a file elsewhere.
  """
  matches = [p for name in COPIED for p in (*path.glob(name), *path.glob(f"*/{name}"))]
  paths = sorted({p for p in matches if p.is_file() and not _is_left(p.relative_to(path))})
  for each in paths:
    links.check(each, path)
  return paths


def _is_left(path: pathlib.Path) -> bool:
  """Returns whether a file is hidden, an index, or the record of an earlier merge."""
  is_index = re.search(r"\.index(\.\w+)?\.json$", path.name) is not None
  is_hidden = any(part.startswith(".") for part in path.parts)
  return is_index or is_hidden or path.name in (folder.PROVENANCE, "jaxmerge_evaluation.json")


def shards(sizes: Mapping[str, int], limit: int, stems: Mapping[str, str]) -> dict[str, list[str]]:
  """Distributes the tensors of a pipeline over files of its parts, of at most `limit` bytes each.

  >>> shards({"vae/a": 3, "unet/b": 3, "unet/c": 9}, 9, {"unet": "model", "vae": "model"})
  ... # doctest: +NORMALIZE_WHITESPACE
  {'vae/model.safetensors': ['vae/a'],
   'unet/model-00001-of-00002.safetensors': ['unet/b'],
   'unet/model-00002-of-00002.safetensors': ['unet/c']}
  """
  files: dict[str, list[str]] = {}
  for part in dict.fromkeys(name.partition("/")[0] for name in sizes):
    part_sizes = {name: size for name, size in sizes.items() if name.startswith(f"{part}/")}
    for file, names in folder.shards(part_sizes, limit).items():
      end = file.removeprefix("model")
      files[f"{part}/{stems.get(part, STEMS[0])}{end}"] = names
  return files


def indices(files: Mapping[str, Collection[str]], sizes: Mapping[str, int]) -> dict[str, str]:
  """Returns the index texts, by name, of parts with several weight files."""
  texts: dict[str, str] = {}
  for part in dict.fromkeys(file.partition("/")[0] for file in files):
    part_files = {f.partition("/")[2]: n for f, n in files.items() if f.startswith(f"{part}/")}
    if len(part_files) > 1:
      stem = re.sub(r"-\d{5}-of-\d{5}\.safetensors$", "", next(iter(part_files)))
      inner = {
        file: [folder.inner(f"{part}/x", n) for n in names] for file, names in part_files.items()
      }
      lengths = {
        folder.inner(f"{part}/x", n): sizes[n] for names in part_files.values() for n in names
      }
      texts[f"{part}/{stem}{_END}.index.json"] = folder.index(inner, lengths)
  return texts
