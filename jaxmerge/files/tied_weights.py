"""Tied weights of a result: an embedding and an output head that are one tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any  # Any: JSON of a config.

import numpy as np

from jaxmerge.files.plan import Model, Outcome, Outcomes, Output, Plan
from jaxmerge.io.huggingface import tied_embeddings
from jaxmerge.io.tensors.tensor import Tensor


def resolve_ties(
  plan: Plan, donor: Model, config: Mapping[str, Any]
) -> tuple[Plan, dict[str, Any]]:
  """Returns a plan and its result's config, consistent about tied weights.

  A head that is tied to the embedding in all models is left out. One that differs in some of them
  is merged separately, and the config says so.

  Args:
    plan: the plan.
    donor: the model that provides the config.
    config: that config, updated so far.
  """
  outputs = {o.name: o for o in plan.outputs}
  ties = tied_embeddings.find(outputs, config)
  if tied_embeddings.lacks_head(outputs, config):
    text = (
      f"the config of {donor.name} says {tied_embeddings.FLAG}: false, but the result has no "
      "output head; if it is the embedding, set it to true there: a library would start from a "
      "random head."
    )
    return plan._replace(notes=(*plan.notes, text)), dict(config)
  if ties is None or ties.flag is False:
    return plan, dict(config)
  first, twins = outputs[ties.embedding], (*ties.heads, *ties.stacks)
  one = [n for n in twins if n in donor.tied and _alike(plan, first, outputs[n])]
  plan = _without(plan, one, ties.embedding)
  apart = [
    n
    for n in ties.heads
    if n not in one and (n in donor.tied or (ties.flag and not _alike(plan, first, outputs[n])))
  ]
  if not apart:
    return plan, dict(config)
  changed = tied_embeddings.untie(outputs, config)
  words = (
    f"{tied_embeddings.FLAG} is false in the config of the result"
    if changed != config
    else f"the config still says {tied_embeddings.FLAG}, as more hangs on it: transformers keeps "
    "them apart from version 5 on"
  )
  text = f"{', '.join(apart)} and {ties.embedding} differ in some models, and are merged apart"
  return plan._replace(notes=(*plan.notes, f"{text}; {words}.")), changed


def _without(plan: Plan, names: list[str], embedding: str) -> Plan:
  """Leaves out tensors that duplicate the embedding."""
  if not names:
    return plan
  tie = Outcome("tied", target=embedding)
  outputs = tuple(o for o in plan.outputs if o.name not in names)
  return plan._replace(
    outputs=outputs, outcomes=_replace_outcomes(plan.outcomes, dict.fromkeys(names, tie))
  )


def _replace_outcomes(outcomes: Outcomes, ties: Mapping[str, Outcome]) -> Outcomes:
  """Replaces the outcomes of some tensors in every model."""
  return {
    model: {n: (ties[n],) if n in ties else each for n, each in by_name.items()}
    for model, by_name in outcomes.items()
  }


def share_twins(plan: Plan) -> Plan:
  """Merges a tensor that is stored twice only once, so that both stay equal for any method.

  These are tensors of two or more axes, outside of layers, that one job merges with the same
  hyperparameters, and that are equal bit for bit in the base and in every model.

  Returns:
    The plan in which all but the first, which is no head, are copies of its result.
  """
  outputs_by_kind: dict[object, list[Output]] = {}
  same: dict[str, str] = {}
  for output in sorted(plan.outputs, key=lambda o: o.name.endswith(tied_embeddings.HEADS)):
    if output.job is None or len(output.shape) < 2 or _in_layers(output.name):
      continue
    others = outputs_by_kind.setdefault(_kind(plan, output), [])
    twin = next((o for o in others if _equal(o, output)), None)
    if twin is None:
      others.append(output)
    else:
      same[output.name] = twin.name
  outputs = (
    o._replace(job=None, copy_of=same[o.name]) if o.name in same else o for o in plan.outputs
  )
  ties = {n: Outcome("tied", target=twin, reason="its equal") for n, twin in same.items()}
  outcomes = _replace_outcomes(plan.outcomes, ties)
  return plan._replace(outputs=tuple(outputs), outcomes=outcomes) if same else plan


def _in_layers(name: str) -> bool:
  return any(part.isdigit() for part in re.split("[./]", name))


def _kind(plan: Plan, output: Output) -> object:
  """Returns the properties that tensors must share before their entries are compared."""
  numbers = plan.jobs[output.job].hparams if output.job is not None else {}
  of_tensor = [
    (n, np.asarray(v[output.name]).tolist()) for n, v in numbers.items() if isinstance(v, dict)
  ]
  return repr((output.job, output.shape, output.dtype, output.precision, of_tensor))


def _alike(plan: Plan, a: Output, b: Output) -> bool:
  """Returns whether two tensors have the same result."""
  return _kind(plan, a) == _kind(plan, b) and _equal(a, b)


def _parts(output: Output) -> Iterator[Tensor]:
  yield from (t for t in (output.base, *output.models) if t is not None)


def _equal(a: Output, b: Output) -> bool:
  pairs = list(zip(_parts(a), _parts(b), strict=True))
  if any(x.dtype != y.dtype for x, y in pairs):
    return False
  return all(x is y or tied_embeddings.equal(x, y) for x, y in pairs)
