"""Several processes on one mesh: the numbers of one, killed and resumed, asked to stop."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys

import folders
import kill_child
import numpy as np
import pytest

from jaxmerge.io.checkpoints import manifest

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
GONE = "lost another process of the run"


@pytest.fixture(scope="module")
def child():
  with kill_child.connect() as client:
    yield client


@pytest.fixture(scope="module")
def whole(child, tmp_path_factory):
  """The uninterrupted run in two processes of four devices: the answers, and the model."""
  folder = tmp_path_factory.mktemp("whole")
  answers = child.run_many("spread", folder / "run", out=str(folder / "model.npz"))
  assert [a["status"] for a in answers] == [0, 0], answers
  return answers, np.load(folder / "model.npz")


def model(child, directory, out, **options):
  """Runs what is in a directory to its end; the model."""
  answers = child.run_many("spread", directory, out=str(out), **options)
  assert [a["status"] for a in answers] == [0] * len(answers), answers
  return np.load(out)


def close(a, b):
  """Sums over tasks and rows are made in another order, which Adam amplifies."""
  for leaf in ("kernel", "bias"):
    np.testing.assert_allclose(a[leaf], b[leaf], rtol=1e-4, atol=1e-5)


def test_two_processes_have_the_numbers_of_one(child, whole, tmp_path):
  answers, found = whole
  assert answers[0]["digest"] == answers[1]["digest"]
  close(found, model(child, tmp_path / "run", tmp_path / "one.npz", processes=1, devices=8))
  # Process 0 alone writes what is not a shard, and seals.
  own = {e for e in answers[1]["events"] if "array_metadatas" not in e}
  assert not own, own


def test_merges_of_entries_have_the_bits_of_one_process(child, tmp_path):
  one = child.run_many("merges", tmp_path, processes=1, devices=8)
  two = child.run_many("merges", tmp_path)
  assert {a["digest"] for a in (*one, *two)} == {one[0]["digest"]}, (one, two)
  assert one[0]["digest"]


def test_weights_are_split_between_processes(child, tmp_path):
  """The devices of a copy belong to both processes: no process has a whole model."""
  sizes = dict(sizes=(1, 2, 4), rounds=1)
  one = model(child, tmp_path / "a", tmp_path / "a.npz", processes=1, devices=8, **sizes)
  close(model(child, tmp_path / "b", tmp_path / "b.npz", **sizes), one)


def stopped(answers, which):
  """Checks that the process that was left alone has stopped in time and said why."""
  other = answers[1 - which]
  assert other["status"] not in (0, None), other["said"]
  assert GONE in other["said"]
  assert other["after"] < 30


def test_killed_again_and_again_either_of_two(child, whole, tmp_path):
  """At renames and other events of a save, and at random moments; bit for bit in the end."""
  answers, _ = whole
  events = answers[0]["events"]
  renames = [i + 1 for i, e in enumerate(events) if e.startswith("os.rename")]
  moments, kills, run = random.Random(0), 0, 0
  while kills < 4:
    directory = tmp_path / str(run)
    for k in range(4):
      which = (run + k // 2) % 2
      # The events of process 1 are few: both its saves' metadata, of every round.
      event = moments.choice(renames) if which == 0 else moments.randint(1, 4)
      moment = event if k % 2 else moments.uniform(0.1, 2.0)
      heartbeat = 4 if run or k else None  # The first time as users have it.
      given = dict(kill=(which, signal.SIGKILL, moment), heartbeat=heartbeat)
      found = child.run_many("spread", directory, **given)
      if found[which]["status"] != -signal.SIGKILL:
        break  # It came to its end before the moment.
      kills += 1
      stopped(found, which)
      steps = [path for path in directory.glob("[0-9]*") if path.is_dir()]
      assert all(manifest.damage(path) is None for path in steps)
    final = child.run_many("spread", directory)
    assert [a["status"] for a in final] == [0, 0], final
    assert final[0]["digest"] == answers[0]["digest"]
    run += 1


def test_resumed_on_other_devices_and_by_other_processes(child, whole, tmp_path):
  """Stopped by SIGTERM during the first save, then finished elsewhere."""
  _, expected = whole
  for number, (count, devices, sizes) in enumerate([(2, 2, (2, 1, 2)), (1, 1, (1, 1, 1))]):
    directory = tmp_path / str(number)
    kill = (number % 2, signal.SIGTERM, 3)
    answers = child.run_many("spread", directory, slow=0.5, kill=kill)
    assert [a["status"] for a in answers] == [143, 143], answers
    given = dict(processes=count, devices=devices, sizes=sizes)
    close(model(child, directory, tmp_path / f"{number}.npz", **given), expected)


def test_asked_to_stop_and_resumed_with_the_same_bits(child, whole, tmp_path):
  """Whichever process hears of it, both stop after the same round."""
  answers, _ = whole
  for which in (0, 1):
    directory = tmp_path / str(which)
    found = child.run_many("spread", directory, slow=0.5, kill=(which, signal.SIGTERM, 3))
    assert [a["status"] for a in found] == [143, 143], found
    # The connection may tell of the other's end afterwards.
    said = [a["said"].strip().splitlines() for a in found]
    stopped = [[line for line in own if line.startswith("stopped after round")] for own in said]
    assert [len(own) for own in stopped] == [1, 1], said
    assert stopped[0] == stopped[1]
    final = child.run_many("spread", directory)
    assert final[0]["digest"] == answers[0]["digest"]


def test_folders_that_are_not_shared_are_refused_before_anything_is_saved(child, tmp_path):
  """Else each process would keep its own shards, and none of them a checkpoint."""
  answers = child.run_many("apart", tmp_path, devices=1)
  assert all(a["status"] not in (0, None) for a in answers), answers
  assert "is not one folder for all processes" in answers[0]["said"]
  assert "not visible to process 1 of 2" in answers[0]["said"]
  assert not list((tmp_path / "disk of 0").iterdir())


def test_files_are_merged_to_the_bytes_of_one_process(child, tmp_path):
  """With a threshold over the whole model; killed at some of its events, and resumed by others."""
  folders.family(tmp_path / "inputs")
  options = dict(inputs=str(tmp_path / "inputs"))
  (tmp_path / "one").mkdir()
  expected = child.run("files", tmp_path / "one", **options)["digest"]
  whole = child.run_many("files", tmp_path / "two", devices=1, **options)
  assert [a["digest"] for a in whole] == [expected, expected], whole
  written = [sum("pwrite" in e for e in a["events"]) for a in whole]
  assert min(written) > 1  # Both had something to do.
  for which, share, count in [(0, 0.5, 2), (1, 0.7, 1), (0, 0.9, 3)]:
    directory = tmp_path / f"{which}-{share}"
    kill = (which, signal.SIGKILL, int(share * len(whole[which]["events"])))
    found = child.run_many("files", directory, devices=1, kill=kill, heartbeat=4, **options)
    stopped(found, which)
    assert not (directory / "out").exists()
    final = child.run_many("files", directory, processes=count, devices=1, **options)
    assert [a["digest"] for a in final] == [expected] * count, final


def commanded(*arguments, count):
  """Runs the command, as users do, in so many processes; what each prints."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  many = ["--distributed", f"--coordinator=127.0.0.1:{port}", f"--processes={count}"]
  each = [[*many, f"--process={i}"] for i in range(count)] if count > 1 else [[]]
  # How many devices there are is the config's to say.
  flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
  env = os.environ | {"XLA_FLAGS": " ".join(flags)}
  pipes = dict(cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  command = [sys.executable, "-m", "jaxmerge", *arguments]
  running = [subprocess.Popen([*command, *own], **pipes) for own in each]
  said = [process.communicate(timeout=300) for process in running]
  assert [process.returncode for process in running] == [0] * count, said
  return [out for out, _ in said]


SMALL = {
  **{f"data.{split}": "24" for split in ("train", "validation", "test")},
  "pretrain.rows": "16",
  "pretrain.steps": "2",
  "rounds": "1",
  "epochs": "1.0",
  "also": "{}",
  "baselines": "{}",
  "mesh.devices": "4",
}


def test_an_experiment_in_two_processes_has_one_report(tmp_path):
  changes = [f"--config.{key}={value}" for key, value in SMALL.items()]
  given = ["--config=configs/images4_quick.py", f"--workdir={tmp_path / 'run'}", *changes]
  first, other = commanded("atm", *given, count=2)
  assert f"report: {tmp_path / 'run' / 'report.html'}" in first
  assert other == ""
  record = json.loads((tmp_path / "run" / "report.json").read_text())
  assert sorted(record["models"]) == ["atm", "average", "base", "experts"]
  assert record["versions"]["devices"] == "4 x cpu"


def test_a_recipe_in_two_processes_has_the_bytes_of_one(tmp_path):
  inputs = tmp_path / "inputs"
  folders.family(inputs)
  models = "".join(
    f"  - {{model: {inputs}/m{k}, parameters: {{weight: 1, density: 0.5}}}}\n" for k in range(3)
  )
  recipe = tmp_path / "recipe.yml"
  recipe.write_text(f"merge_method: ties\nbase_model: {inputs}/base\nmodels:\n{models}")
  for count in (1, 2):
    first, *others = commanded("merge", str(recipe), str(tmp_path / f"out{count}"), count=count)
    assert first.splitlines()[-1].startswith("merged: ")
    assert others == [""] * (count - 1)
  one, two = ({p.name: p.read_bytes() for p in (tmp_path / f"out{n}").iterdir()} for n in (1, 2))
  assert one == two
