"""Aligns tensor names between models: known variants, other forms, redundant copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from jaxmerge.files import other_forms
from jaxmerge.files.plan import Model, Outcome
from jaxmerge.io.huggingface import tied_embeddings
from jaxmerge.io.tensors import experts
from jaxmerge.io.tensors import names as spellings

ENDS = ((".gamma", ".weight"), (".beta", ".bias"))  # Old and new names of norm parameters.
# Suffixes of embeddings and heads, under which one tensor may be stored several times.
_COPIES = (
  *(
    "shared.weight",
    "embed_tokens.weight",
    "word_embeddings.weight",
    "wte.weight",
    *tied_embeddings.HEADS,
  ),
  *("predictions.bias", "predictions.decoder.bias", "lm_head.bias", "lm_head.decoder.bias"),
)


def align(models: Sequence[Model]) -> list[Model]:
  """Returns the models with tensors named as in the first model.

  Models in the form of another program are read in the first one's form (`other_forms`).
  A norm's `gamma` and `beta` are its `weight` and `bias`. Names that differ by a known wrapper's
  prefix are the same tensor; so are fused and single experts. An embedding that some models store
  under two names, equal bit for bit, is one tensor where other models store it once.
  """
  models = other_forms.align(models)
  donor = models[0]
  respelled = [donor, *(_with_form(_respell(m, donor), donor) for m in models[1:])]
  return [_without_copies(m, respelled) for m in respelled]


def _respell(model: Model, donor: Model) -> Model:
  names: dict[str, str] = {}
  for name, tensor in model.tensors.items():
    for old, new in (*ENDS, *(pair[::-1] for pair in ENDS)):
      other = name.removesuffix(old) + new
      if name.endswith(old) and _lacks(donor, name) and _lacks(model, other):
        match = donor.tensors.get(other)
        names |= {name: other} if match is not None and match.shape == tensor.shape else {}
    if name not in names and _lacks(donor, name):
      other = spellings.find(name, donor.tensors) or ""
      if other and _lacks(model, other) and donor.tensors[other].shape == tensor.shape:
        names[name] = other
  return _with_names(model, names)


def rename(model: Model, table: Mapping[str, str]) -> Model:
  """Returns a model with renamed tensors, by prefix; see `io.tensors.names.rename`.

  Raises:
    ValueError: where two tensors would get the same name.
  """
  names = {n: spellings.rename(n, table) for n in (*model.tensors, *model.tied)}
  return _with_names(model, {old: new for old, new in names.items() if old != new})


def _with_names(model: Model, names: Mapping[str, str]) -> Model:
  """Returns a model with some tensors renamed."""
  if not names:
    return model
  renamed = [names.get(n, n) for n in model.tensors]
  if len(set(renamed)) < len(renamed):
    twice = next(n for n in renamed if renamed.count(n) > 1)
    raise ValueError(f"two tensors of {model.name} would be called {twice!r}.")
  tensors = {names.get(n, n): t for n, t in model.tensors.items()}
  tied = {names.get(n, n): t for n, t in model.tied.items()}
  outcomes = {
    old: Outcome("rewritten", target=new, reason="spelt otherwise")
    for old, new in names.items()
    if old in model.tensors
  }
  return model._replace(tensors=tensors, tied=tied, outcomes={**model.outcomes, **outcomes})


def _with_form(model: Model, donor: Model) -> Model:
  """Returns a model with experts in the donor's form, fused or single."""
  lacking = [n for n in donor.tensors if ".experts." in n and n not in model.tensors]
  forms = experts.forms(model.tensors) if lacking else {}
  forms = {n: forms[n] for n in lacking if n in forms}
  forms = {n: f for n, f in forms.items() if f.tensor.shape == donor.tensors[n].shape}
  if not forms:
    return model
  targets: dict[str, list[str]] = {}
  for name, form in forms.items():
    for stretch in form.stretches:
      targets.setdefault(stretch.name, []).append(name)
  outcomes = {
    old: Outcome("rewritten", target=", ".join(sorted(names)[:2]), reason="in another form")
    for old, names in targets.items()
  }
  others = {n: t for n, t in model.tensors.items() if n not in targets or n in donor.tensors}
  tensors = {**others, **{n: f.tensor for n, f in forms.items()}}
  return model._replace(tensors=tensors, outcomes={**model.outcomes, **outcomes})


def _lacks(model: Model, name: str) -> bool:
  return model.input(name).tensor is None


def _without_copies(model: Model, models: Sequence[Model]) -> Model:
  """Drops copies of the embedding that other models lack, and ties them to it."""
  donor, stand_ins, extra = models[0], {}, {}
  for name in {n: None for m in models for n in m.tensors if _may_be_copy(n)}:
    having = [m for m in models if name in m.tensors]
    if len(having) == len(models):
      continue
    twin = next(_twins(name, having, models), None)
    if twin is None:
      continue
    if name in donor.tensors and _lacks(model, name):
      stand_ins[name] = model.tensors[twin]
    elif _lacks(donor, name) and name in model.tensors:
      extra[name] = Outcome("tied", target=twin)
  if not stand_ins and not extra:
    return model
  tensors = {n: t for n, t in model.tensors.items() if n not in extra}
  tied, outcomes = {**model.tied, **stand_ins}, {**model.outcomes, **extra}
  return model._replace(tensors=tensors, tied=tied, outcomes=outcomes)


def _may_be_copy(name: str) -> bool:
  return name.endswith(_COPIES) and not any(part.isdigit() for part in name.split("."))


def _twins(name: str, having: Sequence[Model], models: Sequence[Model]) -> Iterator[str]:
  """Finds tensors of all models that equal a given one bit for bit, wherever both are stored.

  For models that do not exist yet this is assumed, and compared once they do.
  """
  for other in filter(_may_be_copy, having[0].tensors):
    if other == name or not all(other in m.tensors for m in models):
      continue
    if all(not m.files or tied_embeddings.equal(m.tensors[name], m.tensors[other]) for m in having):
      yield other
