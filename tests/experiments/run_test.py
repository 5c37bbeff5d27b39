"""From a config to a report, on a made problem: what is compared, what it cost, going on."""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small_tasks as small

from jaxmerge.catalog import lookup
from jaxmerge.evaluation import metrics
from jaxmerge.experiments import config as configs
from jaxmerge.experiments import merges, run
from jaxmerge.experiments import problem as problems
from jaxmerge.io.checkpoints import manifest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TRAINED = ["experts", "experts_longer", "multitask"]
MODELS = ["base", *TRAINED, "average", "task_arithmetic", "dare", "atm", "plain"]
DEVICES = 2


def config(**changes):
  """The quick config of the images, on the made problem, with few methods."""
  path = ROOT / "configs" / "images4_quick.py"
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config()
  with c.unlocked():
    c.experiment = f"{__name__}:three_tasks"
    c.final, c.rounds, c.epochs, c.batch_size, c.learning_rate = True, 3, 6.0, 4, 0.02
    c.baselines = dict(
      multitask=dict(),
      experts_longer=dict(epochs=12.0),
      task_arithmetic=dict(scales=(0.1, 0.4, 0.8)),
      dare=dict(drop_rate=0.2, scales=(0.2, 0.4)),
    )
    c.also = dict(plain=dict(outer="none"))
    c.mesh = dict(task=DEVICES, data=1, model=1, devices=DEVICES)
    for name, value in changes.items():
      c[name] = value
  return c.lock()


def three_tasks(config, cache):
  def save(folder, params, readme):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    np.savez(folder / "model.npz", **{k: np.asarray(v) for k, v in params["dense"].items()})

  params = cache(small.weights(), small.weights)
  return problems.Problem(small.network, params, small.three(), save=save)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp("run") / "made"


@pytest.fixture(scope="module")
def events():
  return []


@pytest.fixture(scope="module")
def record(workdir, events):
  """The record of an uninterrupted run."""
  return run.run(config(), workdir, progress=events.append)


def lasting(record):
  """A record without what differs from run to run."""
  text = json.loads(json.dumps(record))
  for row in [*text["rounds"], *(r for c in text["curves"].values() for r in c)]:
    del row["seconds"]
  return {k: v for k, v in text.items() if k not in ("seconds", "created")}


def test_everything_is_compared(record):
  assert sorted(record["models"]) == sorted(MODELS)
  assert record["tasks"] == ["ant", "bee", "cat"]
  for name, model in record["models"].items():
    assert sorted(model["per_task"]) == ["ant", "bee", "cat"], name
    assert model["mean"] == pytest.approx(np.mean(list(model["per_task"].values())))
  assert [r["round"] for r in record["rounds"]] == [1, 2, 3]
  assert record["models"]["task_arithmetic"]["scale"] in (0.1, 0.4, 0.8)


def test_experts_are_scored_each_on_its_task(record):
  for name, score in record["models"]["experts"]["per_task"].items():
    assert score == record["transfer"][name][name]


def test_gap_closed_by_hand(record):
  models = record["models"]
  base, best = models["base"]["mean"], models["experts"]["mean"]
  for name, closed in record["gap_closed"].items():
    assert closed == pytest.approx((models[name]["mean"] - base) / (best - base))


def test_budgets_are_equal_where_they_should_be(record):
  cost = record["budget"]
  assert list(cost["base"].values()) == [0, 0, 0, 0, 0, 0]
  # 12, 20 and 9 rows, six times, in batches of 4: 18, 30 and 14 (of 13.5) steps.
  steps = {"gradient_steps": 62, "samples": 248}
  for name in ("experts", "average", "task_arithmetic", "dare", "atm", "plain"):
    assert {k: cost[name][k] for k in steps} == steps, name
    assert cost[name]["sequential_steps"] == 30
  exchanges = {name: c["exchanges"] for name, c in cost.items()}
  assert exchanges == dict.fromkeys(MODELS, 1) | {
    **dict.fromkeys(["base", *TRAINED], 0), "atm": 3, "plain": 3
  }  # fmt: skip
  assert cost["experts_longer"]["gradient_steps"] == 36 + 60 + 27
  trials = {name: c["trials"] for name, c in cost.items()}
  assert (trials["task_arithmetic"], trials["dare"], trials["multitask"]) == (3, 2, 2)


def test_the_folder_holds_the_run(workdir, record):
  assert json.loads((workdir / "report.json").read_text())["models"] == record["models"]
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [(x["run"], x["round"]) for x in lines] == [
    (run, k) for run in ("atm", "plain") for k in (1, 2, 3)
  ]
  rows = np.load(workdir / "rows.npz")
  for name in MODELS:
    for task, score in record["models"][name]["per_task"].items():
      assert rows[f"{name}/{task}"].mean() == pytest.approx(score)
  assert "<html" in (workdir / "report.html").read_text()
  assert list((workdir / "plots").glob("*.png"))
  assert (workdir / "merged" / "model.npz").exists()
  assert sorted(p.name for p in (workdir / "experts").iterdir()) == ["ant", "bee", "cat"]


def test_progress_is_told(events):
  atm = [e for e in events if e.get("phase") == "atm"]
  assert [(e["done"], e["total"]) for e in atm] == [(0, 3), (1, 3), (2, 3), (3, 3)]
  assert all("mean" in e["numbers"] for e in atm[1:])
  phases = list(dict.fromkeys(e["phase"] for e in events if "phase" in e))
  assert phases.index("experts") < phases.index("one-shot merges") < phases.index("atm")


def test_a_finished_run_is_shown_and_not_run_again(workdir, record, monkeypatch):
  def prepare(*given):
    raise AssertionError("something is run")

  monkeypatch.setattr(run.setup, "prepare", prepare)
  assert run.run(config(), workdir, resume="must") == json.loads(json.dumps(record))


def test_a_finished_run_is_shown_without_jax(workdir, record):
  """As by `jaxmerge atm`: nothing that takes seconds is imported."""
  code = """
import json, pathlib, sys
from jaxmerge import report
from jaxmerge.experiments import workdir
folder = pathlib.Path(sys.argv[1])
found = workdir.read_finished(folder, json.loads((folder / "config.json").read_text()))
print(report.text(found))
assert not {"jax", "matplotlib"} & sys.modules.keys()
"""
  command = [sys.executable, "-c", code, str(workdir)]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert "Results on test" in done.stdout


def test_what_a_run_lacks_is_made_again_of_what_is_saved(tmp_path, workdir, record):
  """The report alone: no model is trained, merged or scored; bit for bit."""
  folder = tmp_path / "run"
  shutil.copytree(workdir, folder)
  (folder / "report.json").unlink()
  said = []
  assert lasting(run.run(config(), folder, progress=said.append)) == lasting(record)
  messages = {e["message"] for e in said if "message" in e}
  phases = ["base", *TRAINED, "scores_test", "scores_validation"]
  phases += [f"one_shot/{n}" for n in ("average", "task_arithmetic", "dare")]
  assert messages == {f"{p}: restored" for p in phases} | {
    f"{n}: resumed after round 3" for n in ("atm", "plain")
  }


@pytest.mark.slow
@pytest.mark.usefixtures("record")
def test_merges_of_other_experts_are_made_again(tmp_path, workdir):
  folder, said = tmp_path / "run", []
  shutil.copytree(workdir, folder)
  (folder / "report.json").unlink()
  record = next((folder / "checkpoints/one_shot/dare").glob("*/record.json"))
  record.write_text(record.read_text().replace('"of": "', '"of": "0'))
  step = record.parent
  facts = manifest.facts(step)
  (step / manifest.NAME).unlink()
  manifest.seal(step, facts)
  run.run(config(), folder, progress=said.append)
  messages = [e["message"] for e in said if "message" in e]
  words = "one_shot/dare: the saved result is of other models; computed again"
  assert words in messages


@pytest.mark.parametrize(
  ("name", "spoil", "words"),
  [
    ("report.json", lambda text: text[:-9], r"report.json: not JSON .* Remove it, and"),
    ("report.json", lambda text: "[" * 10**5, r"report.json: not JSON \(nested too deep"),
    ("report.json", lambda text: text.replace('"tasks"', '"task"'), "report.json: .*did you mean"),
    ("config.json", lambda text: "[1]", r"config.json: must be a JSON object, .* Restore it"),
    ("config.json", lambda text: text[:-9], r"config.json: not JSON"),
  ],
)
def test_a_file_that_was_spoilt_is_named(tmp_path, workdir, name, spoil, words):
  folder = tmp_path / "run"
  shutil.copytree(workdir, folder)
  (folder / name).write_text(spoil((folder / name).read_text()))
  with pytest.raises(ValueError, match=words) as error:
    run.run(config(), folder)
  assert "\n" not in str(error.value)


def test_a_manifest_that_was_spoilt_is_named(tmp_path, workdir):
  folder = tmp_path / "run"
  shutil.copytree(workdir, folder)
  (folder / "report.json").unlink()
  path = next((folder / "checkpoints/base").glob("*/manifest.json"))
  path.write_text("[" * 10**5)
  words = "no good checkpoint in .*base: step 1: manifest.json is damaged: .*nested too deep"
  with pytest.raises(ValueError, match=words):
    run.run(config(), folder)


class Stopped(Exception):
  """Ends a run at a chosen event."""


@pytest.mark.slow
@pytest.mark.parametrize(
  "phase", ["experts", "one-shot merges", "multitask, in turn", "atm", "plain"]
)
def test_a_run_that_stops_in_any_phase_ends_with_the_same_record(tmp_path, record, phase):
  def stop(event):
    if event.get("phase") == phase and event["done"]:
      raise Stopped

  with pytest.raises(Stopped):
    run.run(config(), tmp_path, progress=stop)
  assert lasting(run.run(config(), tmp_path)) == lasting(record)


def test_an_experiment_of_shapes_alone_says_what_to_do_with_it(tmp_path):
  shapes = configs.load(str(ROOT / "configs" / "decoder_1b.py"))
  words = "'decoder' has shapes only, no weights and no rows. `jaxmerge compile` compiles it"
  with pytest.raises(ValueError, match=words):
    run.run(shapes, tmp_path / "run")
  assert not list((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_a_run_goes_on_with_another_mesh(tmp_path, workdir, record):
  def stop(event):
    if event.get("phase") == "atm" and event["done"] == 2:
      raise Stopped

  with pytest.raises(Stopped):
    run.run(config(), tmp_path, progress=stop)
  places = dict(task=1, data=2, model=1, devices=DEVICES)
  found = run.run(config(mesh=places), tmp_path, resume="must")
  assert [r["round"] for r in found["rounds"]] == [r["round"] for r in record["rounds"]]
  one, two = (np.load(folder / "merged" / "model.npz") for folder in (workdir, tmp_path))
  for name, x in one.items():
    # Sums over tasks and rows are made in another order, which Adam amplifies.
    np.testing.assert_allclose(two[name], x, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_folder_of_another_config_is_refused(workdir, record):
  with pytest.raises(ValueError, match="rounds is 3 there and 4 here"):
    run.run(config(rounds=4), workdir)
  with pytest.raises(ValueError, match="holds a run already"):
    run.run(config(), workdir, resume="never")
  with pytest.raises(ValueError, match="no run to resume"):
    run.run(config(), workdir / "elsewhere", resume="must")


@pytest.mark.slow
def test_post_hoc_starts_from_the_best_merge_and_costs_on_top(tmp_path):
  found = run.run(config(variant="ph", also=dict(), rounds=2), tmp_path)
  cost = found["budget"]
  best = max(
    (n for n in found["models"] if n in lookup.METHODS), key=lambda n: found["validation"][n]
  )
  # Half of nine validation rows, 5, six times in batches of 4: 8 (of 7.5) steps a task.
  assert cost["atm"]["gradient_steps"] == cost[best]["gradient_steps"] + 3 * 8
  assert cost["atm"]["exchanges"] == 1 + 2
  assert cost["atm"]["epochs_per_task"] == pytest.approx(cost[best]["epochs_per_task"] + 8 * 4 / 5)


def test_a_method_that_a_config_names():
  method = merges.make_method({"name": "ties", "density": 0.3})
  assert len(method) > 1
  with pytest.raises(ValueError, match="densty"):
    merges.make_method({"name": "ties", "densty": 0.3})


def test_chance_is_the_most_frequent_class():
  task = small.classified("ant", 4)
  task.test.labels[:] = [0, 1, 1, 1, 2, 1, 0]
  assert metrics.ACCURACY.chance(task.test.labels) == pytest.approx(4 / 7)


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
  (tmp_path / "thesis.txt").write_text("mine")
  with pytest.raises(ValueError, match="is not empty and holds no run"):
    run.run(config(), tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_notes_say_which_leaves_methods_of_matrices_take_for_matrices():
  problem = three_tasks(config(), lambda shapes, make: make())
  settings = {"baselines": {"tsv": {"scales": (0.5, 1.0)}, "dare": {"drop_rate": 0.2}}}
  settings["method"] = {"name": "iso_c"}
  notes = merges.layout_notes(problem.layout, problem.params, settings)
  leaves = "outputs and inputs: 1 io (kernel), 1 no matrix (vector)"
  assert notes == [f"tsv: {leaves}", f"atm: {leaves}"]
