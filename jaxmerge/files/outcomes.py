"""Formats and counts the outcomes of the input tensors of a merge.

Everywhere else an outcome is a record, `plan.Outcome`; only this module formats it.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any  # Counts are JSON: a number, or numbers by reason.

from jaxmerge.files.plan import Job, Outcome, Plan, job_name
from jaxmerge.io.huggingface.folder import ARROW

Counts = Mapping[str, Any]

ASIDE = Outcome("dropped", reason="only the models are merged")  # Of a base that is not merged.
LACKED = Outcome("copied", reason="from the base, as not all models have it")


def describe(outcomes: Sequence[Outcome], jobs: Sequence[Job]) -> str:
  """Describes the outcomes of a tensor, as stored in the provenance.

  >>> jobs = [Job(lambda: None, {"method": "ties"}, ("chat", "code"))]
  >>> describe([Outcome("merged", 0), Outcome("copied", target="b", reason="from chat")], jobs)
  'merged by ties, job 1; copied from chat -> b'
  """
  return "; ".join(_words(o, jobs) + (ARROW + o.target) * _moves(o) for o in outcomes)


def texts(plan: Plan) -> dict[str, dict[str, str]]:
  """Describes the outcomes of all input tensors, by model and name."""
  return {
    model: {name: describe(outcomes, plan.jobs) for name, outcomes in by_name.items()}
    for model, by_name in plan.outcomes.items()
  }


def summarize(outcomes: Sequence[Outcome], jobs: Sequence[Job]) -> str:
  """Describes the outcomes of a tensor up to the first that gives it another name, without it.

  >>> summarize([Outcome("copied", target="b", reason="from chat")], [])
  'copied from chat'
  """
  moved = next((i for i, o in enumerate(outcomes) if _moves(o)), len(outcomes))
  return "; ".join(_words(o, jobs) for o in outcomes[: moved + 1])


def _moves(outcome: Outcome) -> bool:
  return outcome.target != "" and outcome.kind != "tied"


def _words(outcome: Outcome, jobs: Sequence[Job]) -> str:
  """Describes an outcome without the name of its output tensor."""
  job = "" if outcome.job is None else job_name(jobs, outcome.job)
  match outcome.kind:
    case "tied" if outcome.reason:
      return f"tied to {outcome.target}, {outcome.reason}"
    case "tied":
      return f"dropped: tied to {outcome.target}"
    case "dropped":
      return f"dropped: {outcome.reason}"
    case "copied":
      return f"copied {outcome.reason}"
    case "base":
      return f"base of {job}"
    case "merged" if not outcome.reason:
      return f"merged by {job}"
  return ", ".join(part for part in (outcome.reason, job) if part)


def counts(plan: Plan) -> Counts:
  """Counts merged and copied tensors of the result, and dropped input tensors.

  Returns:
    `merged` and `copied`, counts; `lacked`, the number of tensors copied because not all models
    have them; `dropped`, counts by reason. An unmerged base and tied heads are not counted.
  """
  merged = sum(o.job is not None for o in plan.outputs)
  copied = {o.name for o in plan.outputs if o.job is None}
  lacked: set[str] = set()
  dropped: collections.Counter[str] = collections.Counter()
  for by_name in plan.outcomes.values():
    for name, outcomes in by_name.items():
      lacked.update(o.target or name for o in outcomes if o._replace(target="") == LACKED)
      last = outcomes[-1]._replace(target="")  # Rows may have been rewritten before.
      dropped.update([last.reason] if last.kind == "dropped" and last != ASIDE else [])
  return {
    "merged": merged,
    "copied": len(plan.outputs) - merged,
    "lacked": len(lacked & copied),
    "dropped": dict(sorted(dropped.items())),
  }


def line(counts: Counts) -> str:
  """Formats counts in one line.

  >>> line({"merged": 9, "copied": 3, "lacked": 2, "dropped": {"excluded": 4}})
  '9 merged, 3 copied (2 of them as not all models have them), 4 dropped (4 excluded)'
  """
  lacked, dropped = counts["lacked"], counts["dropped"]
  why = f" ({lacked} of them as not all models have them)" if lacked else ""
  reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
  lost = f"{sum(dropped.values())} dropped" + (f" ({reasons})" if reasons else "")
  return f"{counts['merged']} merged, {counts['copied']} copied{why}, {lost}"
