"""Tensors that models store under another known name, or once where others store them twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from jaxmerge.files.plan import Model, Outcome
from jaxmerge.io.huggingface import tied
from jaxmerge.io.tensors import experts
from jaxmerge.io.tensors import names as spellings

ENDS = ((".gamma", ".weight"), (".beta", ".bias"))  # What norms were called, and are called now.
# Ends of names of embeddings and heads, which may be one tensor under several of them.
_COPIES = (
  *("shared.weight", "embed_tokens.weight", "word_embeddings.weight", "wte.weight", *tied.HEADS),
  *("predictions.bias", "predictions.decoder.bias", "lm_head.bias", "lm_head.decoder.bias"),
)


def align(models: Sequence[Model]) -> list[Model]:
  """Returns models whose tensors go by the names that the first of them has for them.

  A norm's `gamma` and `beta` are its `weight` and `bias`. Names that differ by a prefix that is
  known, as the wrappers of models have them, are one; so are experts in one tensor and in a matrix
  each. An embedding that some models store under
  two names, equal bit for bit, is one tensor: where the others store it once, it is that one.
  """
  donor = models[0]
  spelt = [donor, *(_formed(_respelt(m, donor), donor) for m in models[1:])]
  return [_once(m, spelt) for m in spelt]


def _respelt(model: Model, donor: Model) -> Model:
  names: dict[str, str] = {}
  for name, tensor in model.tensors.items():
    for old, new in (*ENDS, *(pair[::-1] for pair in ENDS)):
      other = name.removesuffix(old) + new
      if name.endswith(old) and _lacks(donor, name) and _lacks(model, other):
        own = donor.tensors.get(other)
        names |= {name: other} if own is not None and own.shape == tensor.shape else {}
    if name not in names and _lacks(donor, name):
      found = spellings.find(name, donor.tensors)
      if found and _lacks(model, found) and donor.tensors[found].shape == tensor.shape:
        names[name] = found
  return _called(model, names)


def rename(model: Model, table: Mapping[str, str]) -> Model:
  """Returns a model with other names: by what they begin with, see `io.names.renamed`.

  Raises:
    ValueError: where two tensors would have one name.
  """
  names = {n: spellings.rename(n, table) for n in (*model.tensors, *model.tied)}
  return _called(model, {old: new for old, new in names.items() if old != new})


def _called(model: Model, names: Mapping[str, str]) -> Model:
  """A model of which some tensors have other names."""
  if not names:
    return model
  made = [names.get(n, n) for n in model.tensors]
  if len(set(made)) < len(made):
    twice = next(n for n in made if made.count(n) > 1)
    raise ValueError(f"two tensors of {model.name} would be called {twice!r}.")
  tensors = {names.get(n, n): t for n, t in model.tensors.items()}
  tied = {names.get(n, n): t for n, t in model.tied.items()}
  outcomes = {
    old: Outcome("rewritten", target=new, reason="spelt otherwise")
    for old, new in names.items()
    if old in model.tensors
  }
  return model._replace(tensors=tensors, tied=tied, outcomes={**model.outcomes, **outcomes})


def _formed(model: Model, donor: Model) -> Model:
  """A model whose experts are in the form that the donor has: one tensor, or a matrix each."""
  lacking = [n for n in donor.tensors if ".experts." in n and n not in model.tensors]
  forms = experts.forms(model.tensors) if lacking else {}
  made = {n: forms[n] for n in lacking if n in forms}
  made = {n: f for n, f in made.items() if f.tensor.shape == donor.tensors[n].shape}
  if not made:
    return model
  targets: dict[str, list[str]] = {}
  for name, form in made.items():
    for stretch in form.stretches:
      targets.setdefault(stretch.name, []).append(name)
  outcomes = {
    old: Outcome("rewritten", target=", ".join(sorted(names)[:2]), reason="in another form")
    for old, names in targets.items()
  }
  others = {n: t for n, t in model.tensors.items() if n not in targets or n in donor.tensors}
  tensors = {**others, **{n: f.tensor for n, f in made.items()}}
  return model._replace(tensors=tensors, outcomes={**model.outcomes, **outcomes})


def _lacks(model: Model, name: str) -> bool:
  return model.part(name).tensor is None


def _once(model: Model, models: Sequence[Model]) -> Model:
  """Lets the embedding stand in for copies of it that only the others have, and drops its own."""
  donor, stand_ins, extra = models[0], {}, {}
  for name in {n: None for m in models for n in m.tensors if _copied(n)}:
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


def _copied(name: str) -> bool:
  return name.endswith(_COPIES) and not any(part.isdigit() for part in name.split("."))


def _twins(name: str, having: Sequence[Model], models: Sequence[Model]) -> Iterator[str]:
  """Finds tensors that all models have and that equal one, bit for bit, wherever it is stored.

  Of models that are still to be made that is assumed; it is compared once they are there.
  """
  for other in filter(_copied, having[0].tensors):
    if other == name or not all(other in m.tensors for m in models):
      continue
    if all(not m.files or tied.equal(m.tensors[name], m.tensors[other]) for m in having):
      yield other
