"""What becomes of input tensors is a record; words and numbers follow from it."""

import pathlib

import numpy as np
import pytest

from jaxmerge.core import running_statistics
from jaxmerge.files import outcomes, plan
from jaxmerge.files.plan import Outcome
from jaxmerge.io.huggingface import folder
from jaxmerge.io.tensors.tensor import Tensor

JOBS = (plan.Job(None, {"method": "ties"}, ("a", "b")), plan.Job(None, "mean", ("a",)))
ROWS = Outcome("rewritten", reason="rows by the tokenizer")


@pytest.mark.parametrize(
  ("outcome", "text"),
  [
    (Outcome("merged", 0), "merged by ties, job 1"),
    (Outcome("base", 0), "base of ties, job 1"),
    (Outcome("merged", 1, reason="mean of the models"), "mean of the models, job 2"),
    (Outcome("merged", reason=running_statistics.FATE), "averaged, as running statistics are"),
    (outcomes.LACKED, "copied from the base, as not all models have it"),
    (outcomes.ASIDE, "dropped: only the models are merged"),
    (Outcome("tied", target="wte"), "dropped: tied to wte"),
    (Outcome("tied", target="wte", reason="its equal"), "tied to wte, its equal"),
    (Outcome("rewritten", target="up.weight", reason="adapter, added"), "adapter, added"),
  ],
)
def test_every_kind_of_outcome_has_its_words(outcome, text):
  assert outcomes.summarize([outcome], JOBS) == text
  written = outcomes.describe([outcome], JOBS)
  moves = " -> up.weight" if outcome.kind == "rewritten" else ""
  assert written == text + moves
  assert folder.without_target(written) == text


def test_a_tensor_may_go_into_several():
  each = (ROWS, Outcome("merged", 0, "x"), Outcome("copied", target="y", reason="from a"))
  text = "rows by the tokenizer; merged by ties, job 1"
  assert outcomes.describe(each, JOBS) == f"{text} -> x; copied from a -> y"
  assert outcomes.summarize(each, JOBS) == text


def test_tensors_are_counted_by_their_records():
  tensor = Tensor("t", np.dtype(np.float32), (1,), None)
  copies = tuple(plan.Output(n, tensor.dtype, tensor, (), None) for n in ("y", "z"))
  excluded = Outcome("dropped", reason="excluded")
  base = {"x": (outcomes.ASIDE._replace(target="w"),), "y": (outcomes.LACKED,)}
  other = {
    "x": (excluded,),
    "y": (ROWS, excluded),
    "z1": (outcomes.LACKED._replace(target="z"),),
    "head": (Outcome("tied", target="wte"),),
  }
  whole = plan.Plan(copies, JOBS, {"base": base, "a": other}, pathlib.Path(), frozenset())
  counts = outcomes.counts(whole)
  assert counts == {"merged": 0, "copied": 2, "lacked": 2, "dropped": {"excluded": 2}}
