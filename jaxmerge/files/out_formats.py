"""The output formats of a merge of files."""

from __future__ import annotations

from jaxmerge.files.plan import Plan
from jaxmerge.io.checkpoints import like

FORMATS = ("safetensors", "orbax", "like:base")
LIKE_BASE = FORMATS[2]


def is_checkpoint(out_format: str) -> bool:
  """Returns whether a format is an Orbax checkpoint, which is written from finished shards."""
  return out_format != "safetensors"


def prepare(plan: Plan, out_format: str) -> Plan:
  """Checks that a plan can be written in a format; adds a note on arrays that are not merged.

  Raises:
    ValueError: for an unknown format, or if the result does not have the layout of the base.
  """
  if out_format not in FORMATS:
    raise ValueError(f"out_format must be one of {', '.join(FORMATS)}, got {out_format!r}.")
  if out_format != LIKE_BASE:
    return plan
  if plan.orbax is None:
    raise ValueError(
      f"out_format cannot be {out_format!r}: the base, or the first model, {plan.donor}, is no "
      "Orbax checkpoint of another program; write 'orbax' or 'safetensors'."
    )
  checkpoint = like.with_step(plan.orbax)
  misfit = like.misfit(checkpoint, {o.name: o.shape for o in plan.outputs})
  if misfit is not None:
    raise ValueError(f"out_format cannot be {out_format!r}: {misfit}; write 'orbax'.")
  notes = tuple(dict.fromkeys([*plan.notes, like.note(checkpoint)]))
  return plan._replace(notes=notes, orbax=checkpoint)
