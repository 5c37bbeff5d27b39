"""The checkpoints of a run, by step and by tokens."""

import json
import re

import pytest

from jaxmerge.files import runs


def made(folder, names):
  for name in names:
    (folder / name).mkdir(parents=True)
  return folder


def steps(run, *wanted, **options):
  return [c.step for c in runs.checkpoints(run, *wanted, **options)]


@pytest.mark.parametrize(
  "names",
  [
    ["900", "1000", "10000"],
    ["000900", "001000", "010000"],
    ["checkpoint-900", "checkpoint-1000", "checkpoint-10000"],
    ["step_900", "step_1000", "step_10000"],
    ["iter_0000900", "iter_0001000", "iter_0010000"],
  ],
)
def test_steps_are_ordered_by_number(tmp_path, names):
  run = made(tmp_path, [*names, "logs", "v2"])
  assert steps(run, "all") == [900, 1000, 10000]
  assert [c.folder.name for c in runs.checkpoints(run, "last 2")] == names[1:]


@pytest.mark.parametrize(
  ("wanted", "expected"),
  [
    ("last", [5000]),
    ("last 2", [4000, 5000]),
    ("1000:5000:2000", [1000, 3000, 5000]),
    ("1000:4500:1000", [1000, 2000, 3000, 4000]),
    ("3500:", [4000, 5000]),
    (":2000", [1000, 2000]),
    ([5000, 1000], [1000, 5000]),
    (3000, [3000]),
    (range(1000, 4000, 1000), [1000, 2000, 3000]),
  ],
)
def test_forms_of_steps(tmp_path, wanted, expected):
  run = made(tmp_path, [str(n) for n in (1000, 2000, 3000, 4000, 5000)])
  assert steps(run, wanted) == expected


@pytest.mark.parametrize(
  ("wanted", "text"),
  [
    ("last 4", "there are 3, 1000, 2000, 4000: write 'last 3'"),
    ("1000:4000:1000", "step 3000 is missing; there are 1000, 2000, 4000"),
    ([1000, 1000], "step 1000 is listed twice"),
    ("5000:9000", "no step from 5000 to 9000; there are 1000, 2000, 4000"),
    ("4000:1000", "is an empty range"),
    ([], "steps must be"),
    (True, "steps must be"),
    ([-5], "steps must be"),
  ],
)
def test_steps_that_are_not_there(tmp_path, wanted, text):
  run = made(tmp_path, ["1000", "2000", "4000"])
  with pytest.raises(ValueError, match=re.escape(text)):
    steps(run, wanted)


def test_half_written_steps_are_no_steps(tmp_path):
  half = ["3000.orbax-checkpoint-tmp-1", "tmp-checkpoint-4", "unfinished/5000"]
  run = made(tmp_path, ["1000", "2000", *half])
  assert steps(run, "all") == [1000, 2000]
  assert {p.name for p in runs.open_run(run).unfinished} == {half[0], half[1], "5000"}
  with pytest.raises(ValueError, match=r"step 3000 is missing \(3000.orbax-checkpoint-tmp-1 is"):
    steps(run, [3000])


def test_a_folder_that_holds_no_single_run(tmp_path):
  with pytest.raises(ValueError, match="step_2 look like steps of two runs"):
    steps(made(tmp_path / "mixed", ["checkpoint-1", "step_2"]), "all")
  with pytest.raises(ValueError, match="0100 and 100 are both step 100"):
    steps(made(tmp_path / "twice", ["100", "0100"]), "all")
  with pytest.raises(ValueError, match="such as 1000 or checkpoint-1000; this folder has logs"):
    steps(made(tmp_path / "none", ["logs"]), "all")
  with pytest.raises(FileNotFoundError, match="no such folder"):
    steps(tmp_path / "absent", "all")


def test_the_folder_checkpoints_of_a_run_is_the_run(tmp_path):
  assert steps(made(tmp_path / "a", ["checkpoints/10", "checkpoints/20"]), "all") == [10, 20]
  ours = made(tmp_path / "b", ["checkpoints/atm/1", "checkpoints/joint/2"])
  assert steps(ours, "all") == [1]
  with pytest.raises(ValueError, match="has several runs"):
    steps(made(tmp_path / "c", ["checkpoints/x/1", "checkpoints/y/2"]), "all")


@pytest.mark.parametrize(
  ("wanted", "expected"),
  [
    ("last 4B", [3000, 4000, 5000]),
    ("2B:6B", [1000, 2000, 3000]),
    ("7B:", [4000, 5000]),
    (["2B", 8_100_000_000], [1000, 4000]),
  ],
)
def test_tokens(tmp_path, wanted, expected):
  run = made(tmp_path, [str(n) for n in (1000, 2000, 3000, 4000, 5000)])
  assert steps(run, tokens=wanted, tokens_per_step="2M") == expected


def test_tokens_that_the_trainer_counted(tmp_path):
  run = made(tmp_path, ["checkpoint-10", "checkpoint-20"])
  for step in (10, 20):
    state = {"global_step": step, "num_input_tokens_seen": step * 1000}
    (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
  assert steps(run, tokens="15K:") == [20]
  with pytest.raises(ValueError, match="no checkpoint is near 90,000 tokens; the nearest, step 20"):
    steps(run, tokens=["90K"])
  with pytest.raises(
    ValueError, match="has seen 1 to 2 tokens; choose a range within 10,000 to 20,000"
  ):
    steps(run, tokens="1:2")
  with pytest.raises(ValueError, match="tokens must be a number such as"):
    steps(run, tokens="last lots")
  with pytest.raises(ValueError, match="is for tokens"):
    steps(run, "all", tokens_per_step=5)
