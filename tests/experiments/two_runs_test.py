"""Two runs never share a folder, nor two stores one directory."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jaxmerge.io.checkpoints import store as stores

TESTS = pathlib.Path(__file__).parents[1]


def test_a_store_is_used_once_at_a_time_and_again_when_it_is_closed(tmp_path, monkeypatch):
  monkeypatch.setattr(stores, "PATIENCE", 0.0)
  state = {"w": np.ones(3, np.float32)}
  with stores.Checkpoints(tmp_path) as store:
    store.save(1, state, {})
    words = r"these checkpoints are in use; .* by this process\.\)"
    with stores.Checkpoints(tmp_path) as other, pytest.raises(ValueError, match=words):
      other.restore(state)
    store.close()
    with stores.Checkpoints(tmp_path) as other:
      assert other.restore(state).step == 1
    store.save(2, state, {})


def test_two_runs_in_one_folder():
  """Some tries of the script beside, which CI and people run with more."""
  command = [sys.executable, str(TESTS / "support" / "two_runs.py"), "12"]
  done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
  found = json.loads(done.stdout)
  assert found["tries"] == 12
  assert found["refused"] > 0
  assert found["wrong"] == []
