"""What `--dry-run` says a merge reads, writes and needs, counted by hand and while it is done."""

import json
import pathlib

import folders
import ml_dtypes
import numpy as np
import pytest

from jaxmerge import methods
from jaxmerge.catalog import lookup
from jaxmerge.cli import main
from jaxmerge.core import layouts
from jaxmerge.files import describe, estimate, execute, plan
from jaxmerge.io.tensors.tensor import Tensor

family, plan_of = folders.family_here, folders.plan_of

# A folder of `folders.family`: embedding, head and last norm, three layers; and four integers.
FLOATS = 60 + 60 + 6 + 3 * (6 + 72 + 36)
INTEGERS = 4 * 4
TIES = """
merge_method: ties
base_model: base
models: [{model: m0}, {model: m2}]
parameters: {weight: 1, density: 0.5}
"""
SLERP = """
merge_method: slerp
base_model: base
models: [{model: m0}]
parameters: {t: 0.5}
exclude: [lm_head]
"""
SUM = """
merge_method: task_arithmetic
base_model: base
models: [{model: m0}, {model: m1}]
parameters: {weight: 1}
exclude: [lm_head]
"""


def said(capsys, text, *options):
  """The lines of a dry run, without the room on the disk, which is another at any time."""
  pathlib.Path("recipe.yml").write_text(text)
  assert main.main(["merge", "recipe.yml", "out", "--dry-run", *options]) == 0
  assert not pathlib.Path("out").exists()
  *lines, disk = capsys.readouterr().out.splitlines()
  assert disk.startswith("disk: ")
  return lines


def test_what_is_read_and_written_is_told_in_bytes(family, capsys):
  """Of four bytes an entry: 468 of the base and two models, and the integers of the base alone."""
  assert FLOATS == 468
  lines = said(capsys, TIES)
  assert lines[:4] == [
    "result: 13 tensors, 1.89 kB, 1 file",  # 1888
    "tensors: 12 merged, 1 copied, 0 dropped",
    "inputs: 5 files, 5.63 kB in one reading",  # 1 + 1 + 3 files; 5632
    "memory: 360 MB or less",
  ]
  assert any(line.startswith("job 1: 12 tensors of 2 models, read 3 times, {") for line in lines)
  plan = plan_of(TIES)
  assert (plan.bytes_written, plan.bytes_read) == (4 * FLOATS + INTEGERS, 3 * 4 * FLOATS + INTEGERS)


@pytest.mark.parametrize(
  ("options", "line"),
  [
    # Two of 240; 24 + 288 + 144 + 24; 288 + 144 + 24; 288 + 144 + 24 + 16.
    (["--shard-size=500B"], "result: 13 tensors, 1.89 kB, 4 files"),
    (
      ["--out-format=orbax"],
      "result: 13 tensors, 1.89 kB, a checkpoint; while it is made, 3.78 kB on the disk",
    ),
  ],
)
def test_the_files_of_the_result_are_told(family, capsys, options, line):
  assert said(capsys, TIES, *options)[0] == line


def test_narrow_weights_are_half_as_many_bytes(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  folders.family(tmp_path, dtype=ml_dtypes.bfloat16)
  lines = said(capsys, SUM + "out_dtype: float32\n")
  assert lines[0] == "result: 13 tensors, 1.89 kB, 1 file"
  assert lines[2] == "inputs: 4 files, 2.58 kB in one reading"  # 2 * (468 + 2 * 408) + 16
  assert any(line.startswith("job 1: 11 tensors of 2 models, {") for line in lines)


def test_memory_is_that_of_slices_and_not_of_models():
  """Of 30 bytes for each entry of a slice, of 2**20 each of three models and a base."""
  shapes = {"small": (2**10,), "large": (2**16, 2**16)}
  job = plan.Job(None, {"method": "task_arithmetic"}, ("a", "b", "c"))

  def needed(*names, **words):
    parts = {n: Tensor(n, np.dtype(np.float16), shapes[n], None) for n in names}
    outputs = tuple(plan.Output(n, t.dtype, t, (), 0) for n, t in parts.items())
    own = job._replace(spec=job.spec | words)
    return estimate.memory(plan.Plan(outputs, (own,), {}, pathlib.Path(), frozenset()))

  start = 240_000_000
  assert needed() == start
  assert needed("small") == start + 30 * 4 * 2**10
  assert needed("large", "small") == start + 30 * 4 * 2**20
  # Samples, and the values near a threshold; whole matrices.
  assert needed("small", method="ties") == start + 30 * 4 * 2**10 + 120_000_000
  assert needed("large", scope="column") == start + 30 * 4 * 2**32
  assert needed("large", "small", method="tsv") == start + 30 * 4 * 2**32
  # Rows come in slices where they lie one after the other.
  table = layouts.table({"large": layouts.Rule("oi", "weight")})
  sliced, job = needed("large", scope="row"), job._replace(layout=table)
  assert (sliced, needed("large", scope="row")) == (start + 30 * 4 * 2**32, start + 30 * 4 * 2**20)


def test_what_a_job_has_in_memory_is_what_its_stages_see():
  """A plan knows by name and settings, without jax, what the stages of a method ask for."""
  order = ("entry", "row", "matrix")
  for name, entry in lookup.METHODS.items():
    choices = [(p, c) for p, about in entry.parameters.items() for c in about.choices or ()]
    # Settings of a decay say nothing of another kind of average, and are refused there.
    needs = {p: {"kind": "decay"} for p in ("decay", "zero_at")}
    for setting in ({}, *(needs.get(p, {}) | {p: c} for p, c in choices)):
      unit = max((step.unit for step in getattr(methods, name)(**setting)), key=order.index)
      assert layouts.unit_of({"method": name, **setting}).unit == unit, (name, setting)


@pytest.mark.parametrize(("text", "readings"), [(SUM, 1), (SLERP, 2)], ids=["sum", "slerp"])
def test_as_much_is_read_as_a_dry_run_says(family, capsys, text, readings):
  """What is merged once for each reading, what is copied once."""
  plan, counts = plan_of(text), []

  def counting(tensor):
    def read(start, out):
      counts.append(out.nbytes)
      tensor.read(start, out)

    return None if tensor is None else tensor._replace(read=read)

  outputs = tuple(
    o._replace(base=counting(o.base), models=tuple(map(counting, o.models))) for o in plan.outputs
  )
  execute.run(plan._replace(outputs=outputs), "done", entries=16)
  copied = sum(o.size for o in outputs if o.job is None)
  assert sum(counts) == readings * (plan.bytes_read - copied) + copied
  often = f", read {readings} times" if readings > 1 else ""
  assert f" models{often}, {{" in next(x for x in said(capsys, text) if x.startswith("job 1: "))


def test_notes_of_a_plan_are_in_dry_run_card_and_provenance(family, tmp_path):
  plan = plan_of(SUM)._replace(notes=("a | note",))
  assert describe.dry_run(plan, shard_size=10**6)[-1] == "note: a | note"
  out = execute.run(plan, tmp_path / "out")
  assert "## Notes\n\n- a \\| note\n" in (out / "README.md").read_text()
  assert json.loads((out / execute.PROVENANCE).read_text())["notes"] == ["a | note"]
