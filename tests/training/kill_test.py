"""Whatever the moment of a kill, the resumed run ends with the bits of the uninterrupted one."""

import shutil

import kill_child
import pytest

from jaxmerge.io.checkpoints import manifest


@pytest.fixture(scope="module")
def child():
  with kill_child.connect() as client:
    yield client


@pytest.fixture(scope="module")
def whole(child, tmp_path_factory):
  """The uninterrupted run of four steps."""
  return child.run("counting", tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def one_step(child, tmp_path_factory):
  """A directory that holds one step; resumed to two steps with `keep=1`, it saves and retires."""
  directory = tmp_path_factory.mktemp("one")
  child.run("counting", directory, steps=1)
  return directory


@pytest.fixture(scope="module")
def second_save(child, one_step, tmp_path_factory):
  """The uninterrupted second step: its digest and its events."""
  directory = tmp_path_factory.mktemp("second") / "run"
  shutil.copytree(one_step, directory)
  return child.run("counting", directory, steps=2, keep=1)


def kill_and_resume(child, start, directory, event):
  """Kills the second save before an event; gives whether it was killed, and the resumed digest."""
  shutil.copytree(start, directory)
  killed = child.run("counting", directory, steps=2, keep=1, kill_event=event)["killed"]
  # Before anything is tidied: a step is still there, and what has a number is whole.
  steps = [path for path in directory.iterdir() if path.name.isdigit()]
  assert steps
  assert all(manifest.damage(path) is None for path in steps)
  return killed, child.run("counting", directory, steps=2, keep=1)["digest"]


def test_events_of_a_save_are_seen_in_the_order_that_makes_it_safe(second_save):
  events = second_save["events"]
  sealed = next(i for i, e in enumerate(events) if "manifest.json" in e and "rename" in e)
  named, retired = events.index("os.rename unfinished/2"), events.index("os.rename 1")
  assert sealed < named < retired
  synced = {e.split()[1] for e in events[:named] if e.startswith("os.fsync")}
  assert {"unfinished/2", "unfinished/2/record.json", "unfinished/2/state/_METADATA"} <= synced
  assert sum("ocdbt" in name for name in synced) >= 4  # the native writer's files as well
  assert any(e.startswith("os.remove retired/1/") for e in events[retired:])


@pytest.mark.parametrize("event", ["os.rename unfinished/2", "os.rename 1", "os.rmdir retired/1"])
def test_killed_before_a_turning_point_of_a_save(child, one_step, second_save, tmp_path, event):
  number = second_save["events"].index(event) + 1
  killed, digest = kill_and_resume(child, one_step, tmp_path / "run", number)
  assert killed
  assert digest == second_save["digest"]


@pytest.mark.slow
def test_killed_at_every_other_event_of_a_save(child, one_step, second_save, tmp_path):
  events = range(1, len(second_save["events"]) + 1, 2)
  kills = 0
  for event in events:
    directory = tmp_path / str(event)
    killed, digest = kill_and_resume(child, one_step, directory, event)
    assert digest == second_save["digest"], second_save["events"][event - 1]
    kills += killed
    shutil.rmtree(directory)
  # Orbax's threads may save an event or two from run to run, so the last ones may not come.
  assert kills >= len(events) - 3


@pytest.mark.slow
def test_killed_at_events_of_the_very_first_save(child, tmp_path):
  first = child.run("counting", tmp_path / "whole", steps=1)
  for event in range(1, len(first["events"]), 8):
    directory = tmp_path / str(event)
    assert child.run("counting", directory, steps=1, kill_event=event)["killed"]
    assert child.run("counting", directory, steps=1)["digest"] == first["digest"]


@pytest.mark.slow
def test_killed_at_random_moments_again_and_again(child, whole, tmp_path):
  digests = child.kill_at_random("counting", tmp_path)
  assert set(digests) == {whole["digest"]}
