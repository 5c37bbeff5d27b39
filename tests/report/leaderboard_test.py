"""The plot of a leaderboard says what is in it, and is readable."""

import drawn
import report_records

from jaxmerge.report import leaderboard, record


def facts(seeds, references=True):
  records = [report_records.record(seed=s) for s in range(seeds)]
  if not references:
    for r in records:
      for name in ("atm", "atm_nesterov", "multitask"):
        del r["models"][name]
  runs = [{"settings": {}, "trials": 1}] * seeds
  names = ("average", "task_arithmetic", "ties", "dare", "breadcrumbs")
  return {"summary": record.merge_seeds(records), "methods": dict.fromkeys(names, runs)}


def test_the_plot_says_what_bars_dashes_and_hollow_points_are(monkeypatch):
  texts = [t for t, _ in drawn.assert_readable(leaderboard.figure(facts(3)), monkeypatch)]
  note = "".join(texts)
  for words in ("mean of 3 seeds", "bars: one standard deviation", "Dashed line: the experts"):
    assert words in note
  assert "Hollow points are no one-shot merges" in note
  assert {"ATM", "ATM (nesterov)", "Joint training", "ties"} <= set(texts)


def test_one_seed_without_references_has_neither_bars_nor_hollow_points(monkeypatch):
  made = facts(1, references=False)
  texts = [t for t, _ in drawn.assert_readable(leaderboard.figure(made), monkeypatch)]
  assert "Points: one seed. Dashed line: the experts, 100." in texts
  assert leaderboard.references(made) == []


def test_references_stand_above_the_methods_of_the_table():
  rows = [row[0].text for row in leaderboard.table(facts(2)).rows]
  assert rows[0] == "Experts"
  assert set(rows[1:4]) == {"Joint training", "ATM", "ATM (nesterov)"}
  assert rows[-1] == "Base"
