"""One process at a place: a second one is told so, whatever disk it is on and however one ends."""

import errno
import fcntl
import multiprocessing
import os
import signal
import threading

import pytest

from jaxmerge.experiments import workdir
from jaxmerge.io.disk import locks


def hold(place, ready, release):
  with locks.hold(place, "it is busy."):
    ready.set()
    release.wait()


@pytest.fixture
def holder(tmp_path):
  """Starts a process that holds the lock of a place."""
  context, started = multiprocessing.get_context("spawn"), []

  def start():
    ready, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "out", ready, release))
    process.start()
    started.append(process)
    assert ready.wait(60)
    return process, release

  yield start
  for process in started:
    process.kill()
    process.join()


def test_a_second_process_is_told_and_a_killed_one_leaves_the_place_free(tmp_path, holder):
  place = tmp_path / "out"
  process, _ = holder()
  for attempt in (locks.check, lambda *given: locks.hold(*given).__enter__()):
    with pytest.raises(
      locks.Busy, match=rf"it is busy\..*\.out\.lock is locked by process {process.pid} on this"
    ):
      attempt(place, "it is busy.")
  os.kill(process.pid, signal.SIGKILL)
  process.join()
  locks.check(place, "")
  with locks.hold(place, ""):
    assert locks.path_of(place).exists()
  assert list(tmp_path.iterdir()) == []


def test_of_many_at_once_one_is_inside(tmp_path):
  """Also while the one before removes its file: nobody holds a file that is not there."""
  inside, most, entered = [], [], []

  def enter():
    for _ in range(20):
      try:
        with locks.hold(tmp_path / "out", ""):
          inside.append(1)
          most.append(len(inside))
          inside.pop()
          entered.append(1)
      except locks.Busy:
        pass

  threads = [threading.Thread(target=enter) for _ in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert set(most) == {1}
  assert len(entered) > 20


def test_a_disk_without_locks_is_marked_with_the_machine(tmp_path, monkeypatch):
  flock = fcntl.flock

  def refused(handle, kind):
    if os.readlink(f"/proc/self/fd/{handle}").startswith(str(tmp_path)):
      raise OSError(errno.EOPNOTSUPP, "not supported")
    return flock(handle, kind)

  monkeypatch.setattr(fcntl, "flock", refused)
  place, mark = tmp_path / "out", tmp_path / ".out.lock.machine"
  with locks.hold(place, "it is busy."):
    assert mark.read_bytes() == locks._machine()
    with pytest.raises(locks.Busy), locks.hold(place, "it is busy."):
      pass  # Another process of this machine: the lock on its own disk decides.
  assert list(tmp_path.iterdir()) == []
  mark.write_bytes(locks._machine())  # Of one that was killed.
  with locks.hold(place, ""):
    pass
  mark.write_bytes(b"node7 12 0")
  for attempt in (locks.check, lambda *given: locks.hold(*given).__enter__()):
    with pytest.raises(locks.Busy, match=r"machine 'node7'.*remove .*\.out\.lock\.machine"):
      attempt(place, "it is busy.")
  assert mark.read_bytes() == b"node7 12 0"


def test_a_run_that_has_not_said_what_it_is_yet_is_told(tmp_path):
  (tmp_path / "base").mkdir()
  with pytest.raises(ValueError, match="is not empty and holds no run"):
    workdir.check(tmp_path, {}, "auto")
  with (
    locks.hold(tmp_path / "run", ""),
    pytest.raises(ValueError, match=r"another run is using this folder.* by this process"),
  ):
    workdir.check(tmp_path, {}, "auto")
