"""How many tensors a merge merges, copies and drops, and why: one line, wherever it is told."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any  # Counts are JSON: a number, or numbers by reason.

from jaxmerge.files.assemble import ASIDE, LACKED
from jaxmerge.files.plan import Plan

Counts = Mapping[str, Any]


def counts(plan: Plan) -> Counts:
  """Returns how many tensors of the result are merged and copied, and of the inputs are dropped.

  Returns:
    `merged` and `copied`, numbers; `lacked`, how many of those copied are so because not all models
    have them; `dropped`, numbers by reason. A base that is not merged is not counted, nor are heads
    that are an embedding.
  """
  merged = sum(o.job is not None for o in plan.outputs)
  every = [words.split(" -> ")[0] for own in plan.fates.values() for words in own.values()]
  lost = [w.removeprefix("dropped: ") for w in every if w.startswith("dropped: ") and w != ASIDE]
  reasons = collections.Counter(w for w in lost if not w.startswith("tied to "))
  result = {o.name for o in plan.outputs if o.job is None}
  lacked = {n for own in plan.fates.values() for n, words in own.items() if words == LACKED}
  return {
    "merged": merged,
    "copied": len(plan.outputs) - merged,
    "lacked": len(lacked & result),
    "dropped": dict(sorted(reasons.items())),
  }


def line(counts: Counts) -> str:
  """Says it in a line.

  >>> line({"merged": 9, "copied": 3, "lacked": 2, "dropped": {"excluded": 4}})
  '9 merged, 3 copied (2 of them as not all models have them), 4 dropped (4 excluded)'
  """
  lacked, dropped = counts["lacked"], counts["dropped"]
  why = f" ({lacked} of them as not all models have them)" if lacked else ""
  reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
  lost = f"{sum(dropped.values())} dropped" + (f" ({reasons})" if reasons else "")
  return f"{counts['merged']} merged, {counts['copied']} copied{why}, {lost}"
