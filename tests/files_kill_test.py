"""Whatever the moment of a kill, the resumed merge of files ends with the same bytes."""

import itertools

import folders
import kill_child
import pytest


@pytest.fixture(scope="module")
def child():
  with kill_child.connect() as client:
    yield client


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  root = tmp_path_factory.mktemp("inputs")
  folders.family(root)
  return str(root)


@pytest.fixture(scope="module")
def whole(child, inputs, tmp_path_factory):
  """The uninterrupted merge."""
  return child.run("files", tmp_path_factory.mktemp("whole"), inputs=inputs)


@pytest.fixture(scope="module")
def whole_checkpoint(child, inputs, tmp_path_factory):
  """The uninterrupted merge to a checkpoint."""
  directory = tmp_path_factory.mktemp("whole_checkpoint")
  return child.run("files", directory, inputs=inputs, out_format="orbax")


def kill_and_resume(child, inputs, directory, event, **options):
  """Kills a merge before an event; whether it was killed, and the digest of the resumed one."""
  directory.mkdir()
  killed = child.run("files", directory, inputs=inputs, kill_event=event, **options)["killed"]
  return killed, child.run("files", directory, inputs=inputs, **options)["digest"]


def test_events_come_in_the_order_that_makes_them_safe(whole):
  """What is written is synced before the journal says so, and all of it before the rename."""
  events = whole["events"]
  journal = [i for i, e in enumerate(events) if e == "os.fsync .out.merging/journal.jsonl"]
  assert len(journal) >= 10
  for before, after in itertools.pairwise(journal[:-1]):
    between = events[before + 1 : after]
    last = max(i for i, e in enumerate(between) if e.startswith("os.pwrite"))
    assert any(e.startswith("os.fsync") and "model-" in e for e in between[last:])
  renamed = events.index("os.rename .out.merging")
  assert "os.fsync .out.merging" in events[:renamed]
  assert "os.fsync ." in events[renamed:]


@pytest.mark.parametrize(
  "event", ["os.rename .out.merging", "os.remove .out.merging/journal.jsonl"]
)
def test_killed_before_a_turning_point(child, inputs, whole, tmp_path, event):
  number = whole["events"].index(event) + 1
  killed, digest = kill_and_resume(child, inputs, tmp_path / "run", number)
  assert killed
  assert digest == whole["digest"]


@pytest.mark.parametrize(
  "event",
  [
    "os.mkdir .out.merging/state",
    "open .out.merging/state/_METADATA",
    "os.rename .out.merging/.manifest.json",
    "open .out.merging/jaxmerge_provenance.json",
    "os.remove .out.merging/model-00003",
    "os.remove .out.merging/journal.jsonl",
    "os.rename .out.merging",
  ],
)
def test_a_checkpoint_killed_before_a_turning_point(
  child, inputs, whole_checkpoint, tmp_path, event
):
  events = whole_checkpoint["events"]
  number = 1 + next(i for i, e in enumerate(events) if e.startswith(event))
  killed, digest = kill_and_resume(child, inputs, tmp_path / "run", number, out_format="orbax")
  assert killed
  assert digest == whole_checkpoint["digest"]


@pytest.mark.slow
def test_a_checkpoint_killed_at_random_moments(child, inputs, whole_checkpoint, tmp_path):
  """The arrays are written by threads that make no events."""
  options = {"inputs": inputs, "out_format": "orbax"}
  digests = child.kill_at_random("files", tmp_path, kills=10, **options)
  assert set(digests) == {whole_checkpoint["digest"]}


@pytest.mark.slow
def test_killed_at_every_event(child, inputs, whole, tmp_path):
  for event in range(1, len(whole["events"]) + 1):
    killed, digest = kill_and_resume(child, inputs, tmp_path / str(event), event)
    assert killed, event
    assert digest == whole["digest"], whole["events"][event - 1]


@pytest.mark.slow
def test_killed_at_random_moments_again_and_again(child, inputs, whole, tmp_path):
  digests = child.kill_at_random("files", tmp_path, inputs=inputs)
  assert set(digests) == {whole["digest"]}
