"""Whatever the moment of a kill, the resumed merge of files ends with the same bytes."""

import collections
import itertools
import re

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


def redone(answer):
  """What a run has written of weights."""
  made = "os.mkdir .out.merging/state"
  written = [e for e in answer["events"] if e.startswith("os.pwrite") and not e.endswith(".lock")]
  return written + [e for e in answer["events"] if e == made]


def last(events, event):
  """The number of the last event of a kind."""
  return max(i for i, e in enumerate(events, start=1) if e.startswith(event))


@pytest.mark.parametrize(
  "event",
  ["os.remove .out.merging/journal.jsonl", "os.fsync .out.merging", "os.rename .out.merging"],
)
def test_killed_when_all_is_written_it_is_only_moved(child, inputs, whole, tmp_path, event):
  directory, number = tmp_path / "run", last(whole["events"], event)
  directory.mkdir()
  assert child.run("files", directory, inputs=inputs, kill_event=number)["killed"]
  answer = child.run("files", directory, inputs=inputs)
  assert answer["digest"] == whole["digest"]
  assert redone(answer) == []
  assert len(redone(whole)) > 13


@pytest.mark.parametrize(
  "event",
  [
    "os.remove .out.merging/journal",
    "os.remove .out.merging/model-00003",
    "os.rename .out.merging",
  ],
)
def test_a_checkpoint_that_is_written_is_only_moved(
  child, inputs, whole_checkpoint, tmp_path, event
):
  directory, number = tmp_path / "run", last(whole_checkpoint["events"], event)
  options = {"inputs": inputs, "out_format": "orbax"}
  directory.mkdir()
  assert child.run("files", directory, kill_event=number, **options)["killed"]
  answer = child.run("files", directory, **options)
  assert answer["digest"] == whole_checkpoint["digest"]
  assert redone(answer) == []


def stale(directory):
  """A folder with another result, which is to be replaced."""
  (directory / "out").mkdir(parents=True)
  (directory / "out" / "stale.safetensors").write_text("stale")
  return directory


@pytest.fixture(scope="module")
def replacing(child, inputs, tmp_path_factory):
  """The events of an uninterrupted merge that replaces a folder."""
  directory = stale(tmp_path_factory.mktemp("replacing"))
  *events, end = child.run("files", directory, inputs=inputs, replace=True)["events"]
  assert end == "os.remove .out.lock"
  return events


@pytest.mark.parametrize(
  ("event", "there"),
  [
    ("os.rename out", "stale"),
    ("os.rename .out.merging", None),
    ("os.fsync .", "new"),
    ("os.remove .out.", "new"),
    ("os.rmdir .out.", "new"),
  ],
)
def test_a_replacement_killed_at_every_event_of_it(
  child, inputs, whole, replacing, tmp_path, event, there
):
  """One of both is always there, whole; nothing stays of the other, and nothing is redone."""
  options = {"inputs": inputs, "replace": True}
  assert len(replacing) - replacing.index("os.rename out") == 5
  directory, number = stale(tmp_path / "run"), last(replacing, event)
  assert child.run("files", directory, kill_event=number, **options)["killed"]
  out, (old, *_) = directory / "out", [*directory.glob(".out.*.old"), None]
  if there == "stale":
    assert [p.name for p in out.iterdir()] == ["stale.safetensors"]
  elif there is None:
    assert [p.name for p in old.iterdir()] == ["stale.safetensors"]
  else:
    assert (out / "jaxmerge_provenance.json").exists()
  answer = child.run("files", directory, **options)
  assert answer["digest"] == whole["digest"]
  assert redone(answer) == []


def ends_of_each_kind(events):
  """Numbers of the first and the last event of each kind: an act on a file, whatever its number."""
  kinds = collections.defaultdict(list)
  for number, event in enumerate(events, start=1):
    kinds[re.sub(r"\d+", "", event)].append(number)
  return sorted({n for numbers in kinds.values() for n in (numbers[0], numbers[-1])})


@pytest.mark.slow
@pytest.mark.parametrize(
  "event",
  [
    "os.mkdir .out.merging/state",
    "open .out.merging/state/_METADATA",
    "os.rename .out.merging/.manifest.json",
    "open .out.merging/.jaxmerge_provenance.json",
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
  digests = child.kill_at_random("files", tmp_path, kills=4, **options)
  assert set(digests) == {whole_checkpoint["digest"]}


@pytest.mark.slow
def test_killed_at_events_of_every_kind(child, inputs, whole, tmp_path):
  """Every tensor and every shard goes through the same ones: the first and the last of each."""
  for event in ends_of_each_kind(whole["events"]):
    killed, digest = kill_and_resume(child, inputs, tmp_path / str(event), event)
    assert killed, event
    assert digest == whole["digest"], whole["events"][event - 1]


@pytest.mark.slow
def test_killed_at_random_moments_again_and_again(child, inputs, whole, tmp_path):
  digests = child.kill_at_random("files", tmp_path, inputs=inputs)
  assert set(digests) == {whole["digest"]}
