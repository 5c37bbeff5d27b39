import re
import subprocess
import sys

import drawn
import numpy as np
import pytest
import report_records
from hypothesis import given
from hypothesis import strategies as st
from marking import some_fast
from report_records import LONG, minimal
from sklearn import isotonic

from jaxmerge.report import figure_elements as figures
from jaxmerge.report import plots, record, task_vector_plots

CASES = {
  "four tasks": report_records.record(),
  "eight tasks, fifty rounds": report_records.record(LONG, 50),
  "one round": report_records.record(rounds=1, curves=None),
  "fourteen tasks": report_records.record([f"task {i}" for i in range(14)], 3),
}
values = st.lists(st.floats(0, 10), min_size=1, max_size=12)


@given(values, st.floats(0.01, 0.5))
def test_spread_values_are_a_gap_apart_in_order_and_inside(xs, gap):
  placed = np.array(figures.spread(xs, gap, 0.0, 10.0))
  order = np.argsort(xs, kind="stable")
  assert (np.diff(placed[order]) >= gap - 1e-9).all()
  assert placed.min() >= -1e-9
  assert placed.max() <= 10 + 1e-9


@given(values, st.floats(0.01, 0.5))
def test_spread_moves_as_little_as_isotonic_regression_does(xs, gap):
  xs = sorted(xs)
  steps = gap * np.arange(len(xs))
  fitted = isotonic.isotonic_regression(np.array(xs) - steps) + steps
  np.testing.assert_allclose(figures.spread(xs, gap, -100.0, 100.0), fitted, atol=1e-9)


def test_values_that_are_apart_stay():
  assert figures.spread([3.0, 1.0, 7.0], 1.0, 0.0, 9.0) == [3.0, 1.0, 7.0]
  assert figures.spread([5.0] * 5, 9.0, 0.0, 8.0) == [0.0, 2.0, 4.0, 6.0, 8.0]
  assert figures.spread([], 1.0, 0.0, 1.0) == []


@pytest.mark.parametrize("name", plots.NAMES)
@pytest.mark.parametrize("case", some_fast(CASES, ["four tasks"]))
def test_no_text_overlaps_another_or_leaves_the_figure(case, name, monkeypatch):
  for width in (figures.WIDTH, figures.NARROW):
    drawn.assert_readable(plots.figures(CASES[case], width)[name], monkeypatch)


def test_rounds_that_are_not_scored_leave_a_curve_through_those_that_are():
  made = report_records.record(rounds=4)
  for k in (0, 2):
    made["rounds"][k] |= {"mean": None, "per_task": dict.fromkeys(made["tasks"])}
  record.check(record.plain(made))
  (axes,) = plots.mean(made).axes
  curve = next(line for line in axes.lines if line.get_linewidth() == 2.2)
  assert curve.get_xdata().tolist() == [2, 4]
  assert set(plots.figures(made)) == set(plots.NAMES)


def test_curves_are_the_numbers_of_the_record():
  made = report_records.record(rounds=3)
  (axes,) = plots.mean(made).axes
  curve = next(line for line in axes.lines if line.get_linewidth() == 2.2)
  np.testing.assert_allclose(curve.get_xdata(), [1, 2, 3])
  np.testing.assert_allclose(curve.get_ydata(), [100 * r["mean"] for r in made["rounds"]])
  levels = [100 * made["models"][n]["mean"] for n in ("base", "ties", "experts")]
  drawn = {round(line.get_ydata()[0], 6) for line in axes.lines}
  assert {round(x, 6) for x in levels} <= drawn


def test_one_shot_merges_close_their_gap_at_one_exchange():
  made = report_records.record()
  (axes,) = plots.gap_closed(made).axes
  points = [line for line in axes.lines if line.get_marker() == "D"]
  names = ("average", "task_arithmetic", "ties", "dare", "breadcrumbs")
  assert all(line.get_xdata() == [1] for line in points)
  np.testing.assert_allclose(
    [line.get_ydata()[0] for line in points], [100 * made["gap_closed"][n] for n in names]
  )


def test_every_plot_of_results_names_its_split():
  for split in ("validation", "test"):
    figures = plots.figures(report_records.record(split=split))
    for name in ("mean", "per_task", "gap_closed"):
      (axes,) = figures[name].axes
      assert split in axes.get_xlabel() + axes.get_ylabel()


def test_validation_curves_are_never_shares_of_a_test_gap():
  made = report_records.record(split="test")
  (axes,) = plots.gap_closed(made).axes
  points = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
  assert [list(x) for x in points] == [[4.0], [4.0]]  # the exchanges of the whole run
  means = {name: model["mean"] for name, model in made["models"].items()}
  (axes,) = plots.gap_closed(made | {"validation": means}).axes
  curves = [line for line in axes.lines if line.get_marker() == "o"]
  assert [len(line.get_xdata()) for line in curves] == [4, 8]
  assert "validation" in axes.get_ylabel()


def test_figures_are_those_that_the_record_has_numbers_for():
  assert list(plots.figures(report_records.record())) == list(plots.NAMES)
  assert list(plots.figures(minimal())) == ["mean", "per_task"]
  assert list(plots.figures(minimal(rounds=[]))) == ["per_task"]
  one = report_records.record(["only"], 2)
  assert "cosines" not in plots.figures(one)


def test_missing_numbers_leave_holes():
  made = report_records.record()
  made["rounds"][1]["mean"] = None
  made["rounds"][1]["norms"]["mnist"] = None
  made["rounds"][0]["cosines"][0][1] = None
  made["models"]["ties"]["mean"] = None
  made["models"]["atm"]["per_task"]["mnist"] = None
  assert list(plots.images(made)) == list(plots.NAMES)


def test_names_are_never_formulas(monkeypatch):
  made = report_records.record(["$x^2$", "a $5 task", "b_\\alpha{"], 2)
  figure = task_vector_plots.norms(made)
  texts = [text for text, _ in drawn.boxes(figure, monkeypatch)]
  assert any(text.startswith("a \\$5 task") for text in texts)
  assert plots.images(made)


def test_the_same_record_gives_the_same_bytes(tmp_path):
  made = minimal()
  paths = plots.write(made, tmp_path / "plots")
  assert [p.name for p in paths] == ["mean.png", "per_task.png"]
  assert [p.read_bytes() for p in paths] == list(plots.images(made).values())
  assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)


def test_every_color_of_a_drawing_has_one_on_a_dark_page():
  for name, drawing in plots.drawings(CASES["eight tasks, fifty rounds"]).items():
    for text in drawing:
      assert not re.findall(r"#[0-9a-f]{6}\b", text), name
      assert "var(--c222222)" in text
      assert "<style" not in text
      assert "<metadata" not in text


def test_drawings_are_the_same_for_the_same_record_and_their_ids_are_apart():
  first, second = (plots.drawings(report_records.record()) for _ in range(2))
  assert first == second
  ids = [re.findall(r' id="([^"]*)"', text) for drawing in first.values() for text in drawing]
  every = [x for in_one in ids for x in in_one]
  assert len(every) == len(set(every)) > 0


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  with pytest.raises(ImportError, match=r'pip install "jaxmerge\[demo\]"'):
    plots.figures(minimal())


def test_pyplot_is_left_alone():
  code = (
    "import sys; from jaxmerge.report import figure_elements as figures;"
    "made, axes = figures.figure(2.0);"
    "figures.png(made); print('matplotlib.pyplot' in sys.modules, 'jax' in sys.modules)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout == "False False\n"
