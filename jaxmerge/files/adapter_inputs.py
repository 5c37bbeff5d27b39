"""Applies an adapter to an open model: tensors, config and tokenizer files."""

from __future__ import annotations

import fnmatch
import json
import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import Any  # What a config.json holds.

from jaxmerge.files.plan import Model, Outcome
from jaxmerge.io.disk import links
from jaxmerge.io.huggingface import folder, tied_embeddings
from jaxmerge.io.peft import adapter
from jaxmerge.io.tensors import quantized
from jaxmerge.io.tensors.tensor import Files

Text = str | bytes | None  # Of a file; None: it is not there.

# Of these one must be there: the vocabulary itself.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "*.spm")
_TEMPLATES = ("chat_template.*", "additional_chat_templates/*.jinja")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


def add_adapter(
  model: Model,
  path: str | os.PathLike[str],
  files: Files,
  *,
  home: str | None = None,
  rename: Mapping[str, str] | None = None,
) -> Model:
  """Returns a model with an adapter applied.

  Args:
    model: the model.
    path: folder of the adapter.
    files: open files of the models.
    home: name of the adapter's folder in records, if its path only exists on this machine.
    rename: prefixes of the adapter's module names to those of the model.

  Raises:
    FileNotFoundError: if a file of the adapter is missing.
    ValueError: naming the file or tensor that is damaged or does not fit.
  """
  files.note([*adapter.paths(path), *folder.small_files(pathlib.Path(path))])
  adapted = adapter.apply(
    model.tensors,
    path,
    files,
    home=home,
    tied=model.tied,
    heads=heads(model),
    rename=rename,
  )
  touched = {n for n, t in adapted.tensors.items() if t is not model.tensors.get(n)}
  if line := quantized.problem(model.name, model.tensors, touched, model.config, model.folder):
    raise ValueError(f"{path} is added to {line}")
  outcomes = {n: o for n, o in model.outcomes.items() if n not in adapted.untied}
  outcomes |= {n: _outcome(use) for n, use in adapted.uses.items()}
  changed = model._replace(
    tensors=adapted.tensors,
    tied=adapted.tied,
    outcomes=outcomes,
    files=(*model.files, *adapter.paths(path)),
  )
  config = _config(model.config, adapted)
  if config == model.config:
    return changed
  texts = {**model.texts, folder.CONFIG: json.dumps(config, indent=2) + "\n"}
  return changed._replace(config=config, texts=texts)


def _outcome(use: adapter.Use) -> Outcome:
  """Returns the outcome of an adapter's tensor, from the way the adapter uses it."""
  match use.kind:
    case "copy":
      return Outcome("dropped", reason="a copy of a module that the adapter holds whole")
    case "shared":
      return Outcome("rewritten", reason="adapter, shared by its modules")
    case "added":
      return Outcome("rewritten", target=use.target, reason="adapter, added")
  return Outcome("rewritten", target=use.target, reason="adapter, in place of the model's")


def tokenizer_files(
  path: pathlib.Path, base: pathlib.Path, planned: Mapping[str, Text] = types.MappingProxyType({})
) -> dict[str, Text]:
  """Returns the files of an adapter's tokenizer and chat template, by name.

  The model's tokenizer files are dropped if the adapter has a tokenizer without them; the model's
  chat template stays if the adapter has none.

  Args:
    path: folder of the adapter.
    base: that of the model.
    planned: files that the model will have in addition to its folder's, or in their place.
  """
  files = _texts(path, folder.TOKENIZER)
  templates = _texts(path, _TEMPLATES)
  settings = files.get("tokenizer_config.json")
  if not any(any(path.glob(name)) for name in _VOCABULARIES):
    files = {}
  elif not templates and settings and b"chat_template" in _bytes(settings):
    templates = dict.fromkeys(_names(base, _TEMPLATES, planned))
  if files:
    files = {**dict.fromkeys(_names(base, folder.TOKENIZER, planned)), **files}
  files |= templates
  return {n: text for n, text in files.items() if not _same(base / n, text, planned.get(n, ...))}


def _names(
  path: pathlib.Path, patterns: Sequence[str], planned: Mapping[str, Text] | None = None
) -> list[str]:
  names = [str(p.relative_to(path)) for name in patterns for p in path.glob(name) if p.is_file()]
  names += [n for n in planned or {} if any(fnmatch.fnmatch(n, name) for name in patterns)]
  return [n for n in dict.fromkeys(names) if (planned or {}).get(n, "") is not None]


def _texts(path: pathlib.Path, patterns: Sequence[str]) -> dict[str, Text]:
  texts: dict[str, Text] = {}
  for name in _names(path, patterns):
    links.check(path / name, path)
    content = (path / name).read_bytes()
    try:
      texts[name] = content.decode()
    except UnicodeDecodeError:
      texts[name] = content
  return texts


def _bytes(text: Text) -> bytes:
  return text.encode() if isinstance(text, str) else text or b""


def _same(path: pathlib.Path, text: Text, planned: Text | EllipsisType) -> bool:
  if planned is not ...:
    return planned == text if None in (planned, text) else _bytes(planned) == _bytes(text)
  if text is None or not path.is_file():
    return text is None and not path.is_file()
  return path.read_bytes() == _bytes(text)


def heads(model: Model) -> list[str]:
  """Returns the names of a model's output heads that are tied to its embedding."""
  stored = [n for n in model.tied if n.endswith(tied_embeddings.HEADS) and n in model.outcomes]
  name = tied_embeddings.head(model.config)
  return stored or [n for n in model.tied if n == name]


def _config(config: Mapping[str, Any], adapted: adapter.Adapted) -> dict[str, Any]:
  """Returns the config of a model with an adapter: its tokens, layers and ties."""
  changed = dict(config)
  if adapted.rows is not None:
    changed = _replace(changed, ("vocab_size",), adapted.rows)
  if adapted.layers is not None:
    changed = _with_layers(changed, adapted.layers)
  # If the class ties by default, its files do not say so.
  return tied_embeddings.untie(adapted.tensors, changed) if adapted.untied else changed


def _replace(config: Mapping[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
  """Replaces the value of some keys if the config, or its text part, has them."""
  changed = {k: value if k in keys else v for k, v in config.items()}
  if isinstance(inner := config.get("text_config"), Mapping):
    changed["text_config"] = _replace(inner, keys, value)
  return changed


def _with_layers(config: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
  """Returns a config for another order of layers: their number, and lists with one entry each."""
  heights = {config[k] for k in _LAYERS if k in config}
  lists = [
    k
    for k, v in config.items()
    if isinstance(v, list) and len(v) in heights and max(order) < len(v)
  ]
  changed = {**config, **{k: [config[k][i] for i in order] for k in lists}}
  return {**changed, **{k: len(order) for k in _LAYERS if k in config}}
