"""Sweeps: what is parsed, where runs lie, the one table; and runs that are compared later."""

import json

import numpy as np
import pytest
import report_records

from jaxmerge.cli import main
from jaxmerge.experiments import joined, sweep
from jaxmerge.report import output, record

TASKS = ("ant", "bee")


def plain(seed, shift=0.0, **sections):
  """A record without what only one run has."""
  made = report_records.record(TASKS, 2, seed=seed, **sections)
  for name in ("atm", "atm_nesterov"):
    made["models"][name]["mean"] += shift
    for task in TASKS:
      made["models"][name]["per_task"][task] += shift
  made["gap_closed"] = record.comparisons.gap_closed(made["models"])
  made["differences"] = []
  return record.plain(made)


@pytest.mark.parametrize(
  ("text", "seeds"), [("0,1,2", (0, 1, 2)), ("0:3", (0, 1, 2)), ("7", (7,)), ("2:4", (2, 3))]
)
def test_seeds_are_parsed(text, seeds):
  assert sweep.parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["3:3", "2:0"])
def test_an_empty_range_of_seeds_is_refused(text):
  with pytest.raises(ValueError, match="has no seeds: the end must be larger than the start"):
    sweep.parse_seeds(text)


@pytest.mark.parametrize("text", ["", "1,1", "a", "0-3", "0:"])
def test_other_seeds_are_refused(text):
  with pytest.raises(ValueError, match="--seeds must be different seeds, such as 0,1,2 or 0:3"):
    sweep.parse_seeds(text)


def test_values_of_a_key_are_parsed():
  assert sweep.parse_sweep("config.rounds=2,4") == ("rounds", ("2", "4"))
  text = "baselines.ties.scales=(0.5, 1.0),(0.3,)"
  assert sweep.parse_sweep(text) == ("baselines.ties.scales", ("(0.5, 1.0)", "(0.3,)"))
  for wrong in ("rounds", "rounds=", "rounds=2,2", "=2"):
    with pytest.raises(ValueError, match="--sweep must be KEY=VALUE,VALUE of different values"):
      sweep.parse_sweep(wrong)


def test_every_combination_has_every_seed_in_a_folder_of_its_own():
  made = sweep.combinations((0, 1), [("rounds", ("2", "4")), ("learning_rate", ("1e-3",))])
  folders = [folder for each in made for folder in each.runs]
  assert folders == [
    "rounds=2/learning_rate=1e-3/seed0",
    "rounds=2/learning_rate=1e-3/seed1",
    "rounds=4/learning_rate=1e-3/seed0",
    "rounds=4/learning_rate=1e-3/seed1",
  ]
  assert made[1].runs[folders[3]] == [("rounds", "4"), ("learning_rate", "1e-3"), ("seed", "1")]
  assert [*sweep.combinations((3,), [])[0].runs] == ["seed3"]
  assert [*sweep.combinations((), [("rounds", ("2",))])[0].runs] == ["rounds=2"]


@pytest.mark.parametrize(
  ("sweeps", "message"),
  [
    ([("a", ("1",))] * 2, "one or two different keys, got a, a"),
    ([(k, ("1",)) for k in "abc"], "one or two different keys, got a, b, c"),
    ([("seed", ("1",))], "--seeds=0:3 runs several seeds"),
    ([("mesh.task", ("1",))], "all runs share the devices"),
  ],
)
def test_what_cannot_be_swept_is_refused(sweeps, message):
  with pytest.raises(ValueError, match=message):
    sweep.combinations((), sweeps)


def test_one_table_has_mean_and_spread_of_all(tmp_path):
  """Each run is begun once, in order, and none before all configs are loaded."""
  order = []

  def load(changes):
    order.append("load")
    return dict(changes)

  def start(config, folder, words):
    order.append(words)
    shift = 0.1 if config["rounds"] == "4" else 0.0
    return plain(int(config["seed"]), shift)

  planned = sweep.load(sweep.combinations((0, 1), [("rounds", ("2", "4"))]), load)
  facts = sweep.run(planned, tmp_path, start)
  assert order[:4] == ["load"] * 4
  assert order[4:] == [
    f"run {i + 1} of 4: rounds={r}/seed{s}"
    for i, (r, s) in enumerate([(2, 0), (2, 1), (4, 0), (4, 1)])
  ]
  table = sweep.table(facts)
  assert table.head == ["rounds", "Model", "Mean (%)", "Gap closed (%)", *TASKS]
  by_row = {(row[0].text, row[1].text): row[2].text for row in table.rows}
  means = [facts["combinations"][k]["summary"]["models"]["atm"]["mean"] for k in (0, 1)]
  assert by_row["2", "ATM"] == f"{100 * means[0]['mean']:.1f} ± {100 * means[0]['spread']:.1f}"
  assert means[1]["mean"] == pytest.approx(means[0]["mean"] + 0.1)
  assert {m for _, m in by_row} == {"ATM", "ATM (nesterov)"}
  assert json.loads((tmp_path / "sweep.json").read_text()) == facts
  assert "Mean ± standard deviation over 2 seeds" in (tmp_path / "sweep.md").read_text()


def test_seeds_alone_have_a_table_of_all_models(tmp_path):
  planned = sweep.load(sweep.combinations((0, 1), []), dict)
  facts = sweep.run(planned, tmp_path, lambda config, *rest: plain(int(config["seed"])))
  table = sweep.table(facts)
  assert table.head[0] == "Model"
  assert {"Base", "Average", "ATM", "Experts"} <= {row[0].text for row in table.rows}


def test_a_wrong_value_is_an_error_before_any_run():
  def load(changes):
    raise ValueError(f"{changes[0][1]} is no number")

  with pytest.raises(ValueError, match="x is no number"):
    sweep.load(sweep.combinations((), [("rounds", ("x",))]), load)
  same = sweep.combinations((), [("freeze", ("a b", "a/b"))])
  with pytest.raises(ValueError, match="two values of --sweep would run in the same folder"):
    sweep.load(same, dict)


def written(folder, made, rows):
  """A finished run."""
  output.write(made, folder, with_plots=False)
  np.savez(folder / "rows.npz", **rows)
  return str(folder)


def rows(models, shift=0.0):
  random = np.random.default_rng(0)
  shared = {t: random.random(50) for t in TASKS}
  return {f"{m}/{t}": shared[t] + (shift if m == "atm" else 0.0) for m in models for t in TASKS}


def test_runs_are_compared_row_by_row(tmp_path, capsys, monkeypatch):
  """A shift of all scores is a difference without doubt; what is the same appears once."""
  monkeypatch.chdir(tmp_path)
  digests = dict.fromkeys(TASKS, "ab")
  made = [plain(0, shift, rows=digests) for shift in (0.0, 0.25)]
  for each, name in zip(made, ("one", "two"), strict=True):
    for model in list(each["models"]):
      if model == "atm_nesterov":
        del each["models"][model], each["budget"][model], each["gap_closed"][model]
    each["curves"] = {}
    written(tmp_path / name, each, rows(each["models"], 0.25 if name == "two" else 0.0))
  both = joined.record(joined.read([str(tmp_path / "one"), str(tmp_path / "two")]))
  record.check(both)
  assert {n for n in both["models"] if n.startswith("atm")} == {"atm_one", "atm_two"}
  assert {"base", "ties", "experts"} <= {*both["models"]}
  assert [*both["curves"]] == ["atm_one", "atm_two"]
  (difference,) = both["differences"]
  assert (difference["a"], difference["b"]) == ("atm_two", "atm_one")
  assert difference["low"] == pytest.approx(0.25) == difference["high"]
  assert main.main(["report", "one", "two"]) == 0
  told = capsys.readouterr().out
  assert "ATM (two) − ATM (one)" in told
  assert (tmp_path / "runs/comparison/plots/mean.png").is_file()


def test_other_rows_have_no_interval_and_a_note(tmp_path):
  for name, digest in (("one", "ab"), ("two", "cd")):
    made = plain(0, rows=dict.fromkeys(TASKS, digest))
    written(tmp_path / name, made, rows(made["models"]))
  both = joined.record(joined.read([str(tmp_path / n) for n in ("one", "two")]))
  assert both["differences"] == []
  assert both["notes"] == [
    "two and one have no interval of their difference: the rows of ant differ."
  ]


def test_runs_of_before_are_paired_where_the_base_saw_the_same(tmp_path):
  for name in ("one", "two"):
    made = plain(0, 0.1 if name == "two" else 0.0)
    written(tmp_path / name, made, rows(made["models"], 0.1 if name == "two" else 0.0))
  both = joined.record(joined.read([str(tmp_path / n) for n in ("one", "two")]))
  assert len(both["differences"]) == 1


def test_runs_of_other_tasks_and_the_same_run_twice_are_refused(tmp_path):
  first = written(tmp_path / "one", plain(0), {})
  other = report_records.record(("ant", "cat"), 2)
  second = written(tmp_path / "two", record.plain(other), {})
  with pytest.raises(ValueError, match="must have the same tasks: two has"):
    joined.read([first, second])
  with pytest.raises(ValueError, match="is listed twice"):
    joined.read([first, first])


def test_out_is_for_several_runs(tmp_path, capsys):
  assert main.main(["report", str(tmp_path), "--out", "x"]) == 1
  assert "--out is for the comparison of several runs" in capsys.readouterr().err
