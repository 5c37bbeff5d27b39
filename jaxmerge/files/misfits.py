"""Reports mismatches between the models of a merge, similar ones in one line."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from jaxmerge.files.assemble import inputs_present
from jaxmerge.files.plan import InputTensor, Model, TensorRequest
from jaxmerge.io.tensors import safetensors

FEW = 3  # Up to this many tensors have a line each.
_MOST = 6  # Patterns of names in a line.

Pair = tuple[str, str]  # Names of two models: the reference, and the other.


def lines(requests: Sequence[TensorRequest], models: Sequence[Model], missing: str) -> list[str]:
  """Lists mismatches: architectures that differ, missing tensors, other shapes.

  Models of different architectures get one line only, as none of their tensors correspond.

  >>> import pathlib
  >>> model = Model("a", pathlib.Path(), {}, ())
  >>> lines([TensorRequest("w", None, (InputTensor("a", "w", None),))], [model], "mean")
  ["tensor 'w' is wanted of a, which has none; with `missing: skip` it is left out."]

  Args:
    requests: the tensors of the result.
    models: all inputs, the donor first.
    missing: what to do with a tensor that some models lack.
  """
  lacking, misshapen = _find_missing(requests), _find_misshapen(requests)
  idle = [] if missing == "error" else list(_idle(requests, missing))
  unlike = _unlike(models, {name for pair in (*lacking, *misshapen) for name in pair})
  strangers = {name for name, (_, foreign) in unlike.items() if foreign}
  if missing != "error" and not idle:  # Other models may have what these lack.
    unlike = {name: unlike[name] for name in unlike if name in strangers}
  problems = [*(line for line, _ in unlike.values()), *_absent(requests, missing)]
  if missing == "error":
    problems += _lines_of_missing(lacking, strangers, requests)
  problems += _lines_of_shapes(misshapen, strangers)
  return problems + idle


def group_names(names: Iterable[str]) -> str:
  """Formats names in one line, with numbers as `*` and counts.

  >>> group_names(["layers.0.up.weight", "layers.1.up.weight", "norm.weight"])
  'layers.*.up.weight (2), norm.weight'
  """
  kinds = [re.sub(r"(?<![^./])\d+(?![^./])", "*", name) for name in names]
  for depth in (9, 4, 3, 2, 1):
    groups: dict[str, list[str]] = {}
    for kind in kinds:
      groups.setdefault("".join(re.split(r"([./])", kind)[: 2 * depth - 1]), []).append(kind)
    if len(groups) <= _MOST:
      break
  ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
  words = [
    (group[0] if len(set(group)) == 1 else f"{head}.**")
    + (f" ({len(group)})" if len(group) > 1 else "")
    for head, group in ordered[:_MOST]
  ]
  rest = sum(len(group) for _, group in ordered[_MOST:])
  return ", ".join(words) + (f" and {rest} more" if rest else "")


def _inputs(request: TensorRequest) -> list[InputTensor]:
  return [p for p in (request.base, *request.models) if p is not None]


def _absent(requests: Sequence[TensorRequest], missing: str) -> Iterator[str]:
  for request in requests if missing != "skip" else ():
    if not inputs_present(request):
      text = f"tensor {request.name!r} is wanted of {_inputs(request)[0].model}, which has none"
      yield f"{text}; with `missing: skip` it is left out."


def _find_missing(requests: Sequence[TensorRequest]) -> dict[Pair, list[str]]:
  """Returns missing tensors, by the first model that has them and the model that lacks them."""
  lacking: dict[Pair, list[str]] = {}
  for request in requests:
    present = inputs_present(request)
    for p in _inputs(request) if present else ():
      if p.tensor is None:
        lacking.setdefault((present[0].model, p.model), []).append(p.name)
  return lacking


def _lines_of_missing(
  lacking: Mapping[Pair, Sequence[str]], strangers: set[str], requests: Sequence[TensorRequest]
) -> Iterator[str]:
  others: dict[tuple[str, tuple[str, ...]], list[str]] = {}
  for (first, other), names in lacking.items():
    if not {first, other} & strangers:
      others.setdefault((first, tuple(names)), []).append(other)
  hint = "`missing` says what to do: base, mean or skip"
  for (first, names), models in others.items():
    where = " and ".join(models)
    if len(names) <= FEW:
      yield from (f"tensor {n!r} is in {first} but not in {where}; {hint}." for n in names)
      continue
    count = sum(any(p.model == first for p in inputs_present(request)) for request in requests)
    end = f"; {hint}" if len(names) < count else "; `rename` gives a model's tensors other names"
    text = f"{len(names)} of {count} tensors of {first} are not in {where}"
    yield f"{text}: {group_names(names)}{end}."


def _find_misshapen(
  requests: Sequence[TensorRequest],
) -> dict[Pair, list[tuple[InputTensor, InputTensor]]]:
  """Returns input tensors whose shape or kind differs from the first one's."""
  misshapen: dict[Pair, list[tuple[InputTensor, InputTensor]]] = {}
  for request in requests:
    for p in inputs_present(request)[1:]:
      first = inputs_present(request)[0]
      if _mismatch(first, p):
        misshapen.setdefault((first.model, p.model), []).append((first, p))
  return misshapen


def _lines_of_shapes(
  misshapen: Mapping[Pair, Sequence[tuple[InputTensor, InputTensor]]], strangers: set[str]
) -> Iterator[str]:
  for (first, other), parts in misshapen.items():
    if {first, other} & strangers:
      continue
    yield from (f"{_mismatch(*pair)}." for pair in parts[:FEW])
    if more := [p.name for _, p in parts[FEW:]]:
      yield f"{len(more)} more tensors do not fit between {other} and {first}: {group_names(more)}."


def _mismatch(first: InputTensor, p: InputTensor) -> str:
  """Describes how a part differs from the first; empty where it fits."""
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
    return "; if these are vocabularies, the recipe's `tokenizer` key unifies them"
  return ""


def _idle(requests: Sequence[TensorRequest], missing: str) -> Iterator[str]:
  """Yields lines on jobs, or their models, of which nothing would be merged."""
  jobs: dict[int, list[TensorRequest]] = {}
  for request in requests:
    floating = (p.tensor and safetensors.is_floating(p.tensor.dtype) for p in _inputs(request))
    if request.models and any(floating):
      jobs.setdefault(request.job, []).append(request)
  for group in jobs.values():
    members = dict.fromkeys(p.model for request in group for p in request.models)
    merged = [p for request in group for p in _together(request, missing)]
    lazy = [m for m in members if not any(p.model == m for p in merged)]
    if lazy:
      which = "" if len(lazy) == len(members) else f"of {' and '.join(lazy)} "
      models = ", ".join(dict.fromkeys(p.model for request in group for p in _inputs(request)))
      names = group_names(request.name for request in group)
      text = f"nothing {which}would be merged: of {len(group)} tensors, {names},"
      yield f"{text} none is in all of {models}, and `missing: {missing}` only copies."


def _together(request: TensorRequest, missing: str) -> list[InputTensor]:
  """Returns the input tensors that are merged with each other or with a base."""
  parts = [p for p in request.models if p.tensor is not None]
  if len(parts) == len(request.models) and (
    request.of_weights or inputs_present(request)[0] is request.base
  ):
    return parts
  return parts if missing == "mean" and len(parts) > 1 else []


def _unlike(models: Sequence[Model], apart: Collection[str]) -> dict[str, tuple[str, bool]]:
  """Finds models whose config has another architecture than the donor's.

  Returns:
    A line for each, and whether it is unrelated: of another type, with few common tensors.
  """
  donor, unlike = models[0], {}
  for m in models[1:]:
    (name, kind), (other, another) = _architecture(donor), _architecture(m)
    other_kind, other_name = _differ(kind, another), _differ(name, other)
    if m.name not in apart or not (other_kind or other_name):
      continue
    same = sum(n in m.tensors and m.tensors[n].shape == t.shape for n, t in donor.tensors.items())
    words = [f"{a} ({b})" if a and b else str(a or b) for a, b in ((name, kind), (other, another))]
    text = f"{donor.name} is {words[0]}, {m.name} is {words[1]}: {same} of {len(donor.tensors)}"
    foreign = other_kind and 2 * same < len(donor.tensors)
    end = "; models of one architecture can be merged." if foreign else "."
    unlike[m.name] = f"{text} tensors are in both, of one shape{end}", foreign
  return unlike


def _differ(one: str | None, other: str | None) -> bool:
  return one != other and None not in (one, other)


def _architecture(model: Model) -> tuple[str | None, str | None]:
  """Returns class and type of a model, as far as its config names them.

  >>> import pathlib
  >>> config = {"architectures": ["BertModel"], "model_type": "bert"}
  >>> _architecture(Model("a", pathlib.Path(), {}, (), config))
  ('BertModel', 'bert')
  """
  every, kind = model.config.get("architectures"), model.config.get("model_type")
  name = every[0] if isinstance(every, list) and every else None
  return name if isinstance(name, str) else None, kind if isinstance(kind, str) else None
