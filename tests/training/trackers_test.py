"""Numbers of rounds, written by a tracker; the libraries of trackers are optional."""

import json
import pathlib
import types

import pytest
import small_tasks as small

import jaxmerge
from jaxmerge.training import trackers


class Memory:
  """A tracker of one's own."""

  where = "memory"

  def __init__(self):
    self.lines = []

  def write(self, group, step, numbers):
    self.lines.append((group, step, dict(numbers)))

  def close(self):
    self.lines.append("closed")


@pytest.mark.slow
def test_a_run_tells_a_tracker_each_round():
  tracker = Memory()
  result = jaxmerge.tune_and_merge(
    small.network,
    small.weights(),
    small.three(),
    settings=jaxmerge.Settings(rounds=2, epochs=2.0, batch_size=4),
    on_round=trackers.on_round(tracker, "atm"),
  )
  assert [(group, step) for group, step, _ in tracker.lines] == [("atm", 1), ("atm", 2)]
  last = tracker.lines[-1][2]
  assert last["mean"] == result.rounds[-1]["mean"]
  assert last["per_task/bee"] == result.rounds[-1]["per_task"]["bee"]
  assert {"loss/ant", "norms/cat", "sign_conflict", "seconds"} <= {*last}


def test_final_scores_are_a_group():
  tracker = Memory()
  model = {"mean": 0.5, "per_task": {"ant": 0.5, "bee": None}}
  trackers.write_final(tracker, {"models": {"base": model}})
  assert tracker.lines == [("final", 0, {"base/mean": 0.5, "base/ant": 0.5})]


def test_tensorboard_reads_what_is_written(tmp_path):
  pytest.importorskip("tensorboardX")
  tracker = trackers.open_tracker("tensorboard", tmp_path)
  tracker.write("atm", 1, {"mean": 0.25})
  tracker.write("atm", 2, {"mean": 0.75, "loss/ant": 1.5})
  tracker.close()
  assert scalars(pathlib.Path(tracker.where)) == {
    "atm/mean": [(1, 0.25), (2, 0.75)],
    "atm/loss/ant": [(2, 1.5)],
  }


def scalars(folder):
  """Scalars of event files: TFRecords of tensorboardX's own protocol buffers."""
  from tensorboardX.proto import event_pb2

  found = {}
  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:
      size = int.from_bytes(data[:8], "little")  # Then a checksum of the size, and one behind.
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      for value in event.summary.value:
        found.setdefault(value.tag, []).append((event.step, value.simple_value))
      data = data[16 + size :]
  return found


def test_wandb_runs_offline_and_is_one_run_when_resumed(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  for step in (1, 2):
    tracker = trackers.open_tracker("wandb", tmp_path, {"rounds": 2})
    tracker.write("atm", step, {"mean": step / 4})
    tracker.close()
  folders = list((tmp_path / "wandb").glob("offline-run-*"))
  ids = {f.name.rsplit("-", 1)[1] for f in folders}
  assert ids == {json.loads((tmp_path / "wandb_run.json").read_text())["id"]}
  assert all(list(f.glob("*.wandb")) for f in folders)


def test_wandb_is_told_the_step_of_each_group(tmp_path, monkeypatch):
  """With a library in its place that notes its calls."""
  calls = []
  run = types.SimpleNamespace(
    url="https://there",
    define_metric=lambda *a, **k: calls.append(("metric", a, k)),
    log=lambda values: calls.append(("log", values)),
    finish=lambda: calls.append("finished"),
  )
  library = types.SimpleNamespace(
    init=lambda **options: calls.append(options) or run, Settings=lambda **k: k
  )
  monkeypatch.setattr(trackers, "_package", lambda kind: library)
  tracker = trackers.open_tracker("wandb", tmp_path / "run", {"rounds": 2})
  tracker.write("atm", 1, {"mean": 0.5})
  tracker.write("atm", 2, {"mean": 0.6})
  tracker.close()
  assert calls[0]["config"] == {"rounds": 2}
  assert calls[0]["name"] == "run"
  assert calls[1:] == [
    ("metric", ("atm/*",), {"step_metric": "atm/step"}),
    ("log", {"atm/step": 1, "atm/mean": 0.5}),
    ("log", {"atm/step": 2, "atm/mean": 0.6}),
    "finished",
  ]
  assert tracker.where == "https://there"


def test_what_is_no_tracker_or_not_installed_is_refused(tmp_path, monkeypatch):
  assert trackers.open_tracker("none", tmp_path) is None
  with pytest.raises(
    ValueError, match="tracker cannot be 'tensorbord'; did you mean 'tensorboard'"
  ):
    trackers.open_tracker("tensorbord", tmp_path)

  def missing(name):
    raise ModuleNotFoundError(name)

  monkeypatch.setattr(trackers.importlib, "import_module", missing)
  with pytest.raises(ValueError, match=r"needs tensorboardX.*pip install 'jaxmerge\[log\]'"):
    trackers.open_tracker("tensorboard", tmp_path)
