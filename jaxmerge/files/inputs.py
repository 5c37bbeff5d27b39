"""Opens a model from a folder or a hub id, either with adapters."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxmerge import display, errors
from jaxmerge.files import adapter_inputs, name_variants
from jaxmerge.files import plan as plans
from jaxmerge.io import formats
from jaxmerge.io.huggingface import folder, hub, pipeline, tied_embeddings
from jaxmerge.io.huggingface import reference as reference_text
from jaxmerge.io.tensors import quantized, scaled
from jaxmerge.io.tensors.tensor import Files

_NO_CONFIG = (
  "{} has no config.json: heads, rope and the like are not compared with those of other models; as "
  "the base, or the first model, it gives a result without one."
)


class Reference(NamedTuple):
  """A reference to a model and the adapters that are added to it.

  Attributes:
    path: a folder, or an id of the hub.
    revision: of the hub's repository.
    adapters: folders or ids of adapters, each with its revision; they are added in this order.
  """

  path: str
  revision: str | None = None
  adapters: tuple[tuple[str, str | None], ...] = ()


def split(reference: str | os.PathLike[str]) -> Reference:
  """Parses `model@revision+adapter@revision`; an existing folder or a `Path` is not parsed.

  >>> split("org/model@main+org/adapter")
  Reference(path='org/model', revision='main', adapters=(('org/adapter', None),))

  Raises:
    ValueError: if a part before or after a `+` is empty.
  """
  if not isinstance(reference, str) or "+" not in reference or os.path.isdir(reference):
    return Reference(*hub.split(reference))
  parts = reference_text.split(reference, os.path.isdir)
  if not all(parts):
    raise ValueError(
      f"{reference}: no such folder, and not `model+adapter`; a Path is not taken apart."
    )
  return Reference(*hub.split(parts[0]), tuple(hub.split(part) for part in parts[1:]))


def open_reference(
  reference: Reference,
  files: Files,
  find: hub.Finder,
  name: str,
  rename: Mapping[str, str] | None = None,
) -> plans.Model:
  """Opens a model: only headers are read. An adapted matrix is computed when it is read.

  Args:
    reference: the model.
    files: open files of the models.
    find: finds folders and models in the hub's cache.
    name: name of the model.
    rename: old to new prefixes of its tensor names, and of its adapters'.

  Raises:
    FileNotFoundError: if the model or an adapter does not exist.
    ValueError: naming the file or tensor that is damaged or does not fit.
  """
  location = find(reference.path, reference.revision)
  model = open_model(location.folder, files, name=name, home=location.home)
  return add_adapters(model, reference, files, find, rename)


def add_adapters(
  model: plans.Model,
  reference: Reference,
  files: Files,
  find: hub.Finder,
  rename: Mapping[str, str] | None = None,
) -> plans.Model:
  """Adds the adapters of a reference to a model; arguments as for `open_reference`.

  The model has the tokenizer and the chat template of an adapter whose folder has them.
  """
  brought: dict[str, adapter_inputs.Text] = {}
  planned = model.texts  # Files of a model that is not merged yet.
  for path, revision in reference.adapters:
    added = find(path, revision)
    model = adapter_inputs.add_adapter(model, added.folder, files, home=added.home, rename=rename)
    texts = adapter_inputs.tokenizer_files(added.folder, model.folder, planned)
    if other := [n for n in texts if n in brought and brought[n] != texts[n]]:
      raise ValueError(f"{added.folder}: its {other[0]} is not that of the adapter before it.")
    brought |= texts
    if texts:
      note = f"{model.name} has the tokenizer files of {added.home or added.folder}."
      model = model._replace(texts={**model.texts, **texts}, notes=(*model.notes, note))
  return name_variants.rename(model, rename or {})


def open_all(
  references: Iterable[tuple[str, str | os.PathLike[str]]],
  files: Files,
  find: hub.Finder,
  rename: Mapping[str, str] | None = None,
) -> list[plans.Model]:
  """Opens models from their names and references; raises all errors together."""
  models: list[plans.Model] = []
  wrong: list[OSError | ValueError] = []
  for name, reference in references:
    try:
      models.append(open_reference(split(reference), files, find, name, rename))
    except (OSError, ValueError) as error:
      wrong.append(error)
  if len(wrong) == 1:
    raise wrong[0]
  if wrong:
    raise errors.Problems([str(error) for error in wrong])
  return models


def open_model(
  path: str | os.PathLike[str], files: Files, *, name: str | None = None, home: str | None = None
) -> plans.Model:
  """Opens a folder, a checkpoint or a raw file: only headers and manifests are read.

  Errors name `home`, if it is set, in place of the folder.
  """
  weights = formats.open_model(path, files, home=home)
  name = name or display.readable(str(pathlib.Path(path)))
  config = formats.config(weights.folder)
  model = plans.Model(name, weights.folder, weights.tensors, weights.files, config, home=home)
  model = model._replace(notes=tuple(f"{name}: {note}" for note in weights.notes))
  if weights.orbax is not None:
    model = model._replace(home=weights.orbax.reference, orbax=weights.orbax)
  known = config or folder.provenance_file(weights.folder).is_file()
  if weights.kind == "model" and not known:
    model = model._replace(notes=(*model.notes, _NO_CONFIG.format(name)))
  return with_ties(_dequantize(model))


def _dequantize(model: plans.Model) -> plans.Model:
  """Returns a model whose weights in 8-bit floats with scales are read as numbers, and says so."""
  result = scaled.dequantize(model.tensors, model.config)
  if not result.weights:
    return model
  dtypes = sorted({model.tensors[n].dtype.name for n in result.weights})
  note = (
    f"{len(result.weights)} weights of {model.name}, in {' and '.join(dtypes)}, are multiplied by "
    f"their scales while they are read, and count as {scaled.stored_dtype(model.config)}."
  )
  of_activations = plans.Outcome("dropped", reason="scales of activations")
  outcomes = {
    scale: plans.Outcome("rewritten", target=name, reason="multiplied into the weight")
    if name
    else of_activations
    for scale, name in result.scales.items()
  }
  model = model._replace(
    tensors=result.tensors,
    outcomes={**model.outcomes, **outcomes},
    notes=(*model.notes, note),
  )
  config = scaled.strip(model.config)
  if config == model.config or quantized.find_codes(model.tensors):
    return model
  texts = pipeline.config_texts(model.folder, model.config, config)
  return model._replace(config=config, texts={**model.texts, **texts})


def with_ties(model: plans.Model) -> plans.Model:
  """Ties an output head to the embedding if the model's config and bytes agree.

  A stored head with other values is a separate tensor, whatever the config says.
  """
  ties = tied_embeddings.find(model.tensors, model.config)
  if ties is None or not ties.flag:
    return model
  embedding = model.tensors[ties.embedding]
  equal = [
    n for n in (*ties.heads, *ties.stacks) if tied_embeddings.equal(embedding, model.tensors[n])
  ]
  others = ties._replace(heads=tuple(n for n in ties.heads if n not in equal))
  absent = [n for n in others.absent if n not in model.tensors]
  return model._replace(
    tensors={n: t for n, t in model.tensors.items() if n not in equal},
    tied=dict.fromkeys([*equal, *absent], embedding),
    outcomes=dict.fromkeys(equal, plans.Outcome("tied", target=ties.embedding)),
  )


def short_names(paths: Sequence[str]) -> list[str]:
  """Returns names of models: the last parts of their paths, as many as make them unique.

  >>> short_names(["runs/chat", "runs/code/"]), short_names(["runs/chat/last", "runs/code/last"])
  (['chat', 'code'], ['chat/last', 'code/last'])

  Raises:
    ValueError: if two paths are equal.
  """
  parts = [pathlib.PurePath(path).parts or (path,) for path in paths]
  for each, path in zip(parts, paths, strict=True):
    if parts.count(each) > 1:
      raise ValueError(f"{path} is given twice; compare different models.")
  ends = ([each[-n:] for each in parts] for n in range(1, 1 + max(map(len, parts))))
  shortest = next(short for short in ends if len(set(short)) == len(short))
  return [str(pathlib.PurePath(*end)) for end in shortest]
