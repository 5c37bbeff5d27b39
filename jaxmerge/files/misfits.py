"""What does not fit between the models of a merge: a line for each, or one for many of a kind."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from jaxmerge.files.assemble import there
from jaxmerge.files.plan import Model, Part, Want
from jaxmerge.io.tensors import safetensors

FEW = 3  # As many tensors are told one by one.
_MOST = 6  # Patterns of names in a line.

Pair = tuple[str, str]  # The names of two models: the one to go by, and the other.


def lines(wants: Sequence[Want], models: Sequence[Model], missing: str) -> list[str]:
  """Says what does not fit: other architectures, parts that are missing or of other shapes.

  Of models that differ in architecture nothing else is said: no tensor of theirs belongs together.

  >>> import pathlib
  >>> own = Model("a", pathlib.Path(), {}, ())
  >>> lines([Want("w", None, (Part("a", "w", None),))], [own], "mean")
  ["tensor 'w' is wanted of a, which has none; with `missing: skip` it is left out."]

  Args:
    wants: the tensors of the result.
    models: all inputs, the donor first.
    missing: what becomes of a tensor that some models lack.
  """
  lacking, misshapen = _lacking(wants), _misshapen(wants)
  idle = [] if missing == "error" else list(_idle(wants, missing))
  unlike = _unlike(models, {name for pair in (*lacking, *misshapen) for name in pair})
  strangers = {name for name, line in unlike.items() if line.endswith(_FOREIGN)}
  if missing != "error" and not idle:  # The others may have what these lack.
    unlike = {name: line for name, line in unlike.items() if name in strangers}
  told = [*unlike.values(), *_absent(wants, missing)]
  if missing == "error":
    told += _lines_of_lacking(lacking, strangers, wants)
  told += _lines_of_shapes(misshapen, strangers)
  return told + idle


def grouped(names: Iterable[str]) -> str:
  """Returns names in one line: numbers as `*`, with how many there are of each kind.

  >>> grouped(["layers.0.up.weight", "layers.1.up.weight", "norm.weight"])
  'layers.*.up.weight (2), norm.weight'
  """
  kinds = [re.sub(r"(?<![^./])\d+(?![^./])", "*", name) for name in names]
  for depth in (9, 4, 3, 2, 1):
    found: dict[str, list[str]] = {}
    for kind in kinds:
      found.setdefault("".join(re.split(r"([./])", kind)[: 2 * depth - 1]), []).append(kind)
    if len(found) <= _MOST:
      break
  ordered = sorted(found.items(), key=lambda item: -len(item[1]))
  words = [
    (own[0] if len(set(own)) == 1 else f"{head}.**") + (f" ({len(own)})" if len(own) > 1 else "")
    for head, own in ordered[:_MOST]
  ]
  rest = sum(len(own) for _, own in ordered[_MOST:])
  return ", ".join(words) + (f" and {rest} more" if rest else "")


def _named(want: Want) -> list[Part]:
  return [p for p in (want.base, *want.models) if p is not None]


def _absent(wants: Sequence[Want], missing: str) -> Iterator[str]:
  for want in wants if missing != "skip" else ():
    if not there(want):
      text = f"tensor {want.name!r} is wanted of {_named(want)[0].model}, which has none"
      yield f"{text}; with `missing: skip` it is left out."


def _lacking(wants: Sequence[Want]) -> dict[Pair, list[str]]:
  """The tensors that a model lacks, and the first that has them."""
  found: dict[Pair, list[str]] = {}
  for want in wants:
    own = there(want)
    for p in _named(want) if own else ():
      if p.tensor is None:
        found.setdefault((own[0].model, p.model), []).append(p.name)
  return found


def _lines_of_lacking(
  found: Mapping[Pair, Sequence[str]], strangers: set[str], wants: Sequence[Want]
) -> Iterator[str]:
  others: dict[tuple[str, tuple[str, ...]], list[str]] = {}
  for (first, other), names in found.items():
    if not {first, other} & strangers:
      others.setdefault((first, tuple(names)), []).append(other)
  hint = "`missing` says what to do: base, mean or skip"
  for (first, names), lacking in others.items():
    where = " and ".join(lacking)
    if len(names) <= FEW:
      yield from (f"tensor {n!r} is in {first} but not in {where}; {hint}." for n in names)
      continue
    every = sum(any(p.model == first for p in there(want)) for want in wants)
    end = f"; {hint}" if len(names) < every else "; `rename` gives a model's tensors other names"
    yield f"{len(names)} of {every} tensors of {first} are not in {where}: {grouped(names)}{end}."


def _misshapen(wants: Sequence[Want]) -> dict[Pair, list[tuple[Part, Part]]]:
  """Parts of another shape or kind than the first of a tensor's parts."""
  found: dict[Pair, list[tuple[Part, Part]]] = {}
  for want in wants:
    for p in there(want)[1:]:
      first = there(want)[0]
      if _mismatch(first, p):
        found.setdefault((first.model, p.model), []).append((first, p))
  return found


def _lines_of_shapes(
  found: Mapping[Pair, Sequence[tuple[Part, Part]]], strangers: set[str]
) -> Iterator[str]:
  for (first, other), parts in found.items():
    if {first, other} & strangers:
      continue
    yield from (f"{_mismatch(*pair)}." for pair in parts[:FEW])
    if more := [p.name for _, p in parts[FEW:]]:
      yield f"{len(more)} more tensors do not fit between {other} and {first}: {grouped(more)}."


def _mismatch(first: Part, p: Part) -> str:
  """Says how a part differs from the first; empty where it fits."""
  ours, theirs = first.tensor, p.tensor
  if ours is None or theirs is None:
    return ""
  if ours.shape != theirs.shape:
    return (
      f"tensor {p.name!r} is {list(theirs.shape)} in {p.model} but {first.name!r} is "
      f"{list(ours.shape)} in {first.model}{_vocabulary(ours.shape, theirs.shape)}"
    )
  if safetensors.is_floating(ours.dtype) != safetensors.is_floating(theirs.dtype):
    return f"tensor {p.name!r} is {theirs.dtype} in {p.model} but {ours.dtype} in {first.model}"
  return ""


def _vocabulary(ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
  if len(ours) == len(theirs) == 2 and ours[1:] == theirs[1:]:
    return "; if these are vocabularies, the recipe's tokenizer key brings them together"
  return ""


def _idle(wants: Sequence[Want], missing: str) -> Iterator[str]:
  """Finds jobs, and models of them, of which nothing would be merged: all would be copied."""
  jobs: dict[int, list[Want]] = {}
  for want in wants:
    if want.models and any(safetensors.is_floating(p.tensor.dtype) for p in there(want)):  # type: ignore[union-attr]
      jobs.setdefault(want.job, []).append(want)
  for own in jobs.values():
    members = dict.fromkeys(p.model for want in own for p in want.models)
    merged = [p for want in own for p in _together(want, missing)]
    lazy = [m for m in members if not any(p.model == m for p in merged)]
    if lazy:
      which = "" if len(lazy) == len(members) else f"of {' and '.join(lazy)} "
      every = dict.fromkeys(p.model for want in own for p in _named(want))
      text = (
        f"nothing {which}would be merged: of {len(own)} tensors, {grouped(w.name for w in own)},"
      )
      yield f"{text} none is in all of {', '.join(every)}, and `missing: {missing}` only copies."


def _together(want: Want, missing: str) -> list[Part]:
  """The models' parts of a tensor that are merged with each other, or with a base."""
  parts = [p for p in want.models if p.tensor is not None]
  if len(parts) == len(want.models) and (want.raw or there(want)[0] is want.base):
    return parts
  return parts if missing == "mean" and len(parts) > 1 else []


_FOREIGN = "models of one architecture can be merged."


def _unlike(models: Sequence[Model], apart: Collection[str]) -> dict[str, str]:
  """Says which of some models are, by their configs, of another architecture than the donor."""
  donor, told = models[0], {}
  for m in models[1:]:
    (name, kind), (other, another) = _architecture(donor), _architecture(m)
    foreign, differs = _differ(kind, another), _differ(name, other)
    if m.name not in apart or not (foreign or differs):
      continue
    same = sum(n in m.tensors and m.tensors[n].shape == t.shape for n, t in donor.tensors.items())
    words = [f"{a} ({b})" if a and b else str(a or b) for a, b in ((name, kind), (other, another))]
    text = f"{donor.name} is {words[0]}, {m.name} is {words[1]}: {same} of {len(donor.tensors)}"
    end = f"; {_FOREIGN}" if foreign and 2 * same < len(donor.tensors) else "."
    told[m.name] = f"{text} tensors are in both, of one shape{end}"
  return told


def _differ(one: str | None, other: str | None) -> bool:
  return one != other and None not in (one, other)


def _architecture(model: Model) -> tuple[str | None, str | None]:
  """Returns the class and the type of a model, as far as its config says them.

  >>> import pathlib
  >>> config = {"architectures": ["BertModel"], "model_type": "bert"}
  >>> _architecture(Model("a", pathlib.Path(), {}, (), config))
  ('BertModel', 'bert')
  """
  every, kind = model.config.get("architectures"), model.config.get("model_type")
  name = every[0] if isinstance(every, list) and every else None
  return name if isinstance(name, str) else None, kind if isinstance(kind, str) else None
