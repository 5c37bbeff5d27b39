"""Locks: who holds one is named, who has died holds none, and two runs never share a folder."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from jaxmerge.io import locking, orbax

TESTS = pathlib.Path(__file__).parent
HOLD = """
import sys, time
from jaxmerge.io import locking
with locking.held(sys.argv[1], "in use"):
  print("held", flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  """A process that holds a lock."""
  command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()


def test_another_process_is_named_and_holds_nothing_once_it_is_killed(holder, tmp_path):
  words = f"in use by process {holder.pid} on this machine"
  with pytest.raises(ValueError, match=words), locking.held(tmp_path / ".lock", "in use"):
    pass
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert (tmp_path / ".lock").exists()
  with locking.held(tmp_path / ".lock", "in use"):
    assert (tmp_path / ".lock").read_text() == f"{os.getpid()} {socket.gethostname()}"
  assert not (tmp_path / ".lock").exists()


def test_a_folder_that_is_only_read_needs_no_lock(tmp_path, monkeypatch):
  def refused(path, flags, *mode):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(os, "open", refused)
  with locking.held(tmp_path / ".lock", "in use"):
    pass


def test_a_store_is_used_once_at_a_time_and_again_when_it_is_closed(tmp_path, monkeypatch):
  monkeypatch.setattr(orbax, "PATIENCE", 0.0)
  state = {"w": np.ones(3, np.float32)}
  with orbax.Checkpoints(tmp_path) as store:
    store.save(1, state, {})
    words = "these checkpoints are in use; .* by this very process, which has not closed it yet"
    with orbax.Checkpoints(tmp_path) as other, pytest.raises(ValueError, match=words):
      other.restore(state)
    store.close()
    with orbax.Checkpoints(tmp_path) as other:
      assert other.restore(state).step == 1
    store.save(2, state, {})


def test_two_runs_in_one_folder():
  """Some tries of the script beside, which CI and people run with more."""
  command = [sys.executable, str(TESTS / "two_runs.py"), "12"]
  done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
  found = json.loads(done.stdout)
  assert found["tries"] == 12
  assert found["refused"] > 0
  assert found["wrong"] == []
