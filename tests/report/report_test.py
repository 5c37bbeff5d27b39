import copy
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import report_records
from hypothesis import given
from hypothesis import strategies as st
from report_records import LONG, minimal

from jaxmerge import report
from jaxmerge.report import card, comparisons, labels, output, plots, record, tables


def changed(path, value):
  """A full record with one value replaced, or removed where the value is `...`."""
  result = copy.deepcopy(report_records.record())
  *parents, last = path
  at = result
  for key in parents:
    at = at[key]
  if value is ...:
    del at[last]
  else:
    at[last] = value
  return result


def test_full_and_minimal_records_pass():
  record.check(report_records.record())
  record.check(report_records.record(LONG, 50))
  record.check(minimal())
  record.check(minimal(rounds=[]))


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    (["tasks"], ..., "'tasks' is missing"),
    (["versions"], ..., "'versions' is missing"),
    (["gap_close"], {}, "did you mean 'gap_closed'"),
    (["tasks"], [], "tasks must be a list of names"),
    (["tasks"], ["mnist", "mnist"], "tasks has a name twice"),
    (["split"], "train", "split must be 'validation' or 'test', got 'train'"),
    (["seed"], "0", "seed must be an integer"),
    (["seed"], True, "seed must be an integer"),
    (["models", "ties"], 0.7, "models.ties must be an object"),
    (["models", "ties", "mean"], ..., "models.ties.mean is missing"),
    (["models", "ties", "mean"], math.nan, "models.ties.mean must be a finite number"),
    (["models", "ties", "scale"], "1", "models.ties.scale must be a finite number"),
    (["models", "ties", "per_task", "digits"], ..., "models.ties.per_task.digits is missing"),
    (["models", "ties", "per_task", "cifar"], 0.1, "models.ties.per_task.cifar is none of"),
    (["rounds", 1, "round"], 1, r"rounds\[1\].round must be an integer above 1"),
    (["rounds", 0, "norms", "mnist"], "x", r"rounds\[0\].norms.mnist must be a finite"),
    (["rounds", 0, "cosines"], [[1.0]], r"rounds\[0\].cosines must be 4 x 4"),
    (["rounds", 0, "cosines", 1, 2], math.inf, r"rounds\[0\].cosines\[1\]\[2\].* must be a finite"),
    (["curves", "atm_nesterov"], {}, "curves.atm_nesterov must be a list"),
    (["gap_closed", "atm"], 0.1, "gap_closed.atm is 0.1, but"),
    (["budget", "atm", "samples"], "many", "budget.atm.samples must be a finite number"),
    (["chance", "mnist"], ..., "chance.mnist is missing"),
    (["transfer", "cifar"], {}, "transfer.cifar is none of the tasks"),
    (["notes"], [1], "notes must be a list of strings"),
    (["differences"], [{"a": "atm", "b": "x"}], r"differences\[0\].b is no model: 'x'"),
  ],
)
def test_a_wrong_record_is_refused_by_the_name_of_the_key(path, value, message):
  with pytest.raises(ValueError, match=message):
    record.check(changed(path, value))


def test_gap_closed_is_nought_at_base_and_one_at_experts():
  means = {"base": 0.25, "experts": 0.75, "ties": 0.5, "atm": 0.625, "worse": 0.125}
  closed = comparisons.gap_closed({name: {"mean": mean} for name, mean in means.items()})
  assert closed == {"base": 0.0, "experts": 1.0, "ties": 0.5, "atm": 0.75, "worse": -0.25}


@pytest.mark.parametrize(
  "models",
  [
    {"atm": {"mean": 0.5}},
    {"base": {"mean": 0.5}, "atm": {"mean": 0.6}},
    {"base": {"mean": 0.5}, "experts": {"mean": 0.5}, "atm": {"mean": 0.6}},
    {"base": {"mean": None}, "experts": {"mean": 0.5}},
  ],
)
def test_without_a_gap_none_is_closed(models):
  assert comparisons.gap_closed(models) == {}


def test_plain_makes_json_and_says_what_was_not_finite():
  made = record.plain(
    minimal(
      rounds=[{"round": np.int64(1), "mean": np.float32(0.5), "loss": {"a": math.nan, "b": 1.0}}],
      config={"clip": math.inf, "shape": (1, 2), "path": pathlib.PurePosixPath("runs/x")},
    )
  )
  assert made["rounds"] == [{"round": 1, "mean": 0.5, "loss": {"a": None, "b": 1.0}}]
  assert made["config"] == {"clip": None, "shape": [1, 2], "path": "runs/x"}
  assert made["notes"] == ["Not finite, recorded as null: rounds[0].loss.a, config.clip."]
  with pytest.raises(ValueError, match=r"config.f is a function"):
    record.plain({"config": {"f": minimal}})


booleans = st.lists(st.booleans(), min_size=1, max_size=20)


@given(st.lists(booleans, min_size=1, max_size=3))
def test_a_model_does_not_differ_from_itself(correct):
  assert comparisons.paired_difference(correct, correct, samples=50) == (0.0, 0.0, 0.0)


def test_swapping_the_models_flips_the_interval():
  random = np.random.default_rng(0)
  a, b = ([random.random(n) < p for n in (30, 50)] for p in (0.8, 0.6))
  there, back = comparisons.paired_difference(a, b), comparisons.paired_difference(b, a)
  np.testing.assert_allclose(there, [-back.mean, -back.high, -back.low], atol=1e-12)
  assert there == comparisons.paired_difference(a, b)
  assert there != comparisons.paired_difference(a, b, seed=1)


def test_interval_is_that_of_the_normal_distribution_for_many_rows():
  random = np.random.default_rng(0)
  counts = (2000, 1000)
  a, b = ([random.random(n) < p for n in counts] for p in (0.8, 0.7))
  found = comparisons.paired_difference(a, b, samples=4000)
  d = [x.astype(float) - y for x, y in zip(a, b, strict=True)]
  mean = np.mean([x.mean() for x in d])
  half = 1.96 * np.sqrt(sum(x.var() / x.size for x in d)) / len(d)
  np.testing.assert_allclose(found, [mean, mean - half, mean + half], rtol=0, atol=0.1 * half)


def test_what_two_models_share_cancels():
  random = np.random.default_rng(0)
  a = random.random(1000) < 0.5
  b = a.copy()
  b[:10] = ~a[:10]
  paired = comparisons.paired_difference([a], [b])
  apart = comparisons.paired_difference([a], [random.permutation(b)])
  assert paired.high - paired.low < (apart.high - apart.low) / 4


def test_seeds_widen_the_interval_only_where_they_differ():
  random = np.random.default_rng(0)
  one = random.random(400) < 0.7
  zeros = np.zeros_like(one)
  same = np.stack([one] * 3)
  differ = np.stack([one, np.ones_like(one), zeros])

  def width(x, **kw):
    return np.ptp(comparisons.paired_difference([x], [np.zeros_like(x)], **kw)[1:])

  np.testing.assert_allclose(width(same), width(one), rtol=0.15)
  assert width(differ) > 3 * width(differ, seeds=False)


@pytest.mark.parametrize(
  ("a", "b", "message"),
  [
    ([[True]], [], "scores_a has 1 tasks and scores_b 0"),
    ([], [], "one at least"),
    ([[True, False]], [[True]], "same rows"),
    ([[0.5]], [[True]], "must be booleans or floats, got float64"),
    ([[[True], [True]], [[True]]], [[[True], [True]], [[True]]], "task 1: 1 seeds, task 0: 2"),
  ],
)
def test_rows_that_are_not_paired_are_refused(a, b, message):
  with pytest.raises(ValueError, match=message):
    comparisons.paired_difference(a, b)


def seeded(seed, mean):
  models = {"atm": {"mean": mean, "per_task": {"a": mean, "b": mean}}}
  models["base"] = {"mean": 0.5, "per_task": {"a": 0.5, "b": 0.5}}
  models["experts"] = {"mean": 1.0, "per_task": {"a": 1.0, "b": 1.0}}
  return minimal(seed=seed, models=models)


def test_spread_over_seeds_is_the_sample_standard_deviation():
  summary = record.merge_seeds([seeded(i, m) for i, m in enumerate((0.7, 0.8, 0.9))])
  atm = summary["models"]["atm"]
  assert summary["seeds"] == [0, 1, 2]
  assert atm["mean"]["values"] == [0.7, 0.8, 0.9]
  np.testing.assert_allclose([atm["mean"]["mean"], atm["mean"]["spread"]], [0.8, 0.1])
  np.testing.assert_allclose([atm["gap_closed"]["mean"], atm["gap_closed"]["spread"]], [0.6, 0.2])
  table = tables.seeds(summary)
  assert "Mean ± standard deviation over 3 seeds, accuracy on validation." in table
  assert "| ATM | 80.0 ± 10.0 | 60 ± 20 | 80.0 ± 10.0 | 80.0 ± 10.0 |" in table


def test_a_family_counts_once_in_the_second_mean():
  families = {"a": "sentiment", "b": "sentiment", "c": "c"}
  per_task = {"a": 0.2, "b": 0.4, "c": 0.9}
  assert comparisons.family_mean(per_task, families) == pytest.approx((0.3 + 0.9) / 2)
  assert comparisons.family_mean(per_task | {"b": None}, families) is None
  made = report_records.record(("a", "b", "c"), families=families)
  column = tables.results(made).head.index("Families once (%)")
  for row in tables.results(made).rows[1:]:
    name = next(n for n in made["models"] if labels.label(n) == row[0].text)
    own = made["models"][name]["per_task"]
    assert float(row[column].text) == pytest.approx(
      100 * ((own["a"] + own["b"]) / 2 + own["c"]) / 2, abs=0.051
    )
  alone = report_records.record(("a", "b"), families={"a": "a", "b": "b"})
  assert "Families once (%)" not in tables.results(alone).head
  with pytest.raises(ValueError, match="families must name one for each"):
    record.check(report_records.record(("a", "b"), families={"a": "x"}))
  several = [report_records.record(("a", "b", "c"), families=families, seed=s) for s in range(2)]
  summary = record.merge_seeds(several)
  expected = [comparisons.family_mean(x["models"]["atm"]["per_task"], families) for x in several]
  assert summary["models"]["atm"]["family_mean"]["values"] == expected
  assert "| Families once (%) |" in tables.seeds(summary)


def test_gaps_by_task_leave_out_tasks_without_a_gap():
  models = {
    "base": {"mean": 0.5, "per_task": {"a": 0.5, "b": 0.5}},
    "atm": {"mean": 0.6, "per_task": {"a": 0.65, "b": 0.55}},
    "experts": {"mean": 0.67, "per_task": {"a": 0.8, "b": 0.54}},
  }
  assert comparisons.task_gaps(models, ["a", "b"])["atm"] == {"a": pytest.approx(0.5)}
  table = tables.gaps(minimal(models=models))
  assert table.head == ["Gap closed (%)", "a"]
  assert [[c.text for c in row] for row in table.rows] == [["ATM", "50"]]
  assert tables.gaps(minimal()) is None


def test_one_seed_has_no_spread():
  summary = record.merge_seeds([seeded(0, 0.7)])
  assert summary["models"]["atm"]["mean"] == {"mean": 0.7, "spread": None, "values": [0.7]}
  assert "| ATM | 70.0 | 40 | 70.0 | 70.0 |" in tables.seeds(summary)


@pytest.mark.parametrize(
  ("other", "message"),
  [
    (seeded(0, 0.8), "seeds must differ"),
    (seeded(1, 0.8) | {"split": "test"}, "split of seed 1 differ"),
    (minimal(seed=1), "models of seed 1 differ"),
  ],
)
def test_records_that_do_not_compare_are_refused(other, message):
  with pytest.raises(ValueError, match=message):
    record.merge_seeds([seeded(0, 0.7), other])


def test_best_is_marked_among_merges_alone_and_ties_are_shared():
  made = report_records.record()
  made["models"]["average"]["per_task"]["mnist"] = 0.999  # as written equal: 99.9
  made["models"]["ties"]["per_task"]["mnist"] = 0.9991
  made["models"]["experts"]["per_task"]["mnist"] = 1.0
  table = tables.results(made)
  column = table.head.index("mnist")
  assert [row[0].text for row in table.rows if row[column].best] == ["Average", "TIES"]
  names = [row[0].text for row in table.rows]
  assert names[:2] == ["Chance", "Base"]
  assert names[-1] == "Experts"


def test_tables_say_which_split_they_show():
  for split in ("validation", "test"):
    made = report_records.record(split=split)
    for text in (tables.markdown(made), tables.text(made)):
      assert f"Results on {split}" in text
  assert "Results on validation" in tables.text(minimal())


def test_columns_are_there_only_where_there_are_numbers():
  assert tables.results(minimal()).head == ["Model", "Mean (%)", "a", "b"]
  assert [title for title, _, _ in tables.headings(minimal())] == ["Results on validation"]
  titles = [title for title, _, _ in tables.headings(report_records.record())]
  assert titles == ["Results on validation", "Gap closed by task", "Budget", "Transfer"]


def test_terminal_columns_are_aligned():
  cell = tables.Cell
  table = tables.Table(
    ["M", "x", "a rather long heading"],
    [[cell("a"), cell("10", True), cell("1")], [cell("b")] + [cell("200")] * 2],
  )
  assert tables.to_text(table).splitlines() == [
    "       a rather long",
    "M   x        heading",
    "─────────────────────",
    "a  10*             1",
    "b 200            200",
  ]


@pytest.mark.parametrize("width", [60, 100, 1000])
def test_terminal_tables_fit_and_lose_nothing(width):
  made = report_records.record(LONG)
  text = tables.text(made, width=width)
  assert max(map(len, text.splitlines())) <= width
  shown = text.split()
  for model in made["models"].values():
    for value in (model["mean"], *model["per_task"].values()):
      assert any(x.rstrip("*") == f"{100 * value:.1f}" for x in shown)


def test_names_cannot_break_a_markdown_table():
  task = "a|b <script> [x](y)\n*z*"
  made = minimal(tasks=[task], models={"atm": {"mean": 0.5, "per_task": {task: 0.5}}})
  lines = tables.to_markdown(tables.results(made)).splitlines()
  assert len(lines) == 3
  assert lines[0] == r"| Model | Mean (%) | a\|b &lt;script&gt; \[x\](y) \*z\* |"


def test_transfer_ends_with_the_base():
  table = tables.transfer(report_records.record())
  assert [row[0].text for row in table.rows] == ["mnist", "fashion", "animals", "digits", "Base"]
  assert [[cell.best for cell in row[1:]] for row in table.rows[:4]] == np.eye(
    4, dtype=bool
  ).tolist()


def four(**means):
  return minimal(
    models={n: {"mean": m, "per_task": {"a": m, "b": m}} for n, m in means.items()}, rounds=[]
  )


def test_the_summary_is_a_sentence_with_the_numbers():
  made = four(base=0.5, ties=0.6, average=0.55, atm=0.75, experts=1.0)
  made["models"]["ties"]["scale"] = 1.0
  assert labels.sentence(made) == (
    "ATM reaches 75.0 % over 2 tasks (validation): 50 % of the gap between base and experts; "
    "the best one-shot merge (TIES, scale 1.0) closes 20 %."
  )
  assert labels.sentence(four(atm=0.75)) == "ATM reaches 75.0 % over 2 tasks (validation)."
  two = labels.sentence(four(atm=0.7, atm_nesterov=0.8))
  assert two == "The best of 2 ATM runs, ATM (nesterov), reaches 80.0 % over 2 tasks (validation)."
  # Test rows choose neither the merge nor the run.
  seen = {"validation": {"atm": 0.8, "atm_nesterov": 0.7, "ties": 0.4, "average": 0.5}}
  models = four(base=0.5, ties=0.6, average=0.55, atm=0.7, atm_nesterov=0.75, experts=1.0)
  tested = models | {"split": "test"} | seen
  assert labels.sentence(tested) == (
    "The best of 2 ATM runs, ATM, reaches 70.0 % over 2 tasks (test): 40 % of the gap between base "
    "and experts; the best one-shot merge (Average) closes 10 %."
  )
  assert plots.models_of_bars(tested) == ["base", "average", "atm", "experts"]
  assert labels.sentence(four(ties=0.6)) == "TIES reaches 60.0 % over 2 tasks (validation)."
  assert labels.sentence(four(atm=-3.5) | {"metric": "log likelihood"}) == (
    "ATM reaches -3.5 log likelihood over 2 tasks (validation)."
  )


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=6, unique=True))
def test_short_names_stay_apart(names):
  short = labels.shorts(names, 6)
  assert len(set(short.values())) == len(names)
  assert all(short[n] == n for n in names if len(n) <= 6)


def test_order_is_from_base_over_merges_to_experts():
  names = ["experts_longer", "experts", "atm_adam", "atm", "slerp", "ties", "multitask", "base"]
  expected = ["base", "ties", "slerp", "atm", "atm_adam", "multitask", "experts", "experts_longer"]
  assert labels.order(dict.fromkeys(names)) == expected
  assert labels.label("experts_longer") == "Experts (longer)"


def test_report_is_written_whole_and_as_strict_json(tmp_path):
  made = report_records.record(LONG[:2], 2)
  made["rounds"][0]["loss"][LONG[0]] = math.nan
  report.write(made, tmp_path)
  files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
  assert [str(f) for f in files] == [
    "plots/cosines.png",
    "plots/gap_closed.png",
    "plots/mean.png",
    "plots/norms.png",
    "plots/per_task.png",
    "plots/sign_conflict.png",
    "report.html",
    "report.json",
  ]

  def refuse(name):
    raise AssertionError(f"{name} is not JSON")

  read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
  assert read == record.plain(made)
  record.check(read)


def test_the_same_record_in_another_order_gives_the_same_bytes(tmp_path):
  made = minimal()
  other = dict(reversed(made.items()))
  other["rounds"] = [dict(reversed(x.items())) for x in made["rounds"]]
  report.write(made, tmp_path / "a")
  report.write(other, tmp_path / "b")
  for file in ("report.json", "report.html", "plots/mean.png", "plots/per_task.png"):
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_refused_record_leaves_the_old_report(tmp_path):
  output.write(minimal(), tmp_path, with_plots=False)
  before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  assert sorted(before) == ["report.html", "report.json"]
  with pytest.raises(ValueError, match="models"):
    output.write(minimal(models=3), tmp_path)
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_new_report_does_not_keep_plots_of_the_old(tmp_path):
  (tmp_path / "plots").mkdir()
  (tmp_path / "plots/norms.png").write_bytes(b"old")
  (tmp_path / "plots/own.png").write_bytes(b"the user's")
  output.write(minimal(), tmp_path, with_plots=False)
  assert [p.name for p in (tmp_path / "plots").iterdir()] == ["own.png"]


def test_the_card_has_a_yaml_head_that_no_name_breaks():
  base = 'org/"model"\n- tag: x'
  text = card.model_card(report_records.record(), base, "atm", license="apache-2.0")
  opening, head, body = text.split("---\n", 2)
  assert opening == ""
  lines = head.splitlines()
  assert json.loads(lines[0].removeprefix("license: ")) == "apache-2.0"
  assert json.loads(lines[1].removeprefix("base_model: ")) == base
  assert lines[2:] == ["tags:", "- merge", "- jaxmerge"]
  assert "| ATM |" in body
  assert "judged on validation" in body
  assert "method.name = task_arithmetic" in body
  assert "ATM" in card.model_card(minimal(), "b", "atm")
  with pytest.raises(ValueError, match=r"a model of the record \(atm\), got 'tie'"):
    card.model_card(minimal(), "b", "tie")


def test_tables_and_page_import_neither_jax_nor_matplotlib():
  code = (
    "import sys; from jaxmerge import report; report.html; report.text; report.model_card;"
    "report.write; print([m for m in ('jax', 'matplotlib') if m in sys.modules])"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout == "[]\n"


def test_public_names_are_found():
  assert set(report.__all__) <= set(dir(report))
  for name in report.__all__:
    assert getattr(report, name) is not None
  with pytest.raises(AttributeError, match="no attribute 'tabels'"):
    report.tabels  # noqa: B018
