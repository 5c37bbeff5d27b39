"""Merges that are not alone end right, or with an error: some tries of the script, which see."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "support" / "actors.py"


@pytest.mark.slow
def test_no_merge_is_wrong_whatever_others_do():
  """As many tries of each kind as ACTORS says; 200 were made when this was written."""
  command = [sys.executable, "-W", "ignore", str(SCRIPT), os.environ.get("ACTORS", "4")]
  run = subprocess.run(command, capture_output=True, text=True, check=False)
  assert run.returncode in (0, 1), run.stderr
  record = json.loads(run.stdout)
  assert [line for own in record.values() for line in own["wrong"]] == []
  assert len(record) == 4
