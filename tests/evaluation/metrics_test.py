"""Metrics of which less is better: the same choices as by their negative, and the words of it."""

import jax.numpy as jnp
import numpy as np
import pytest
import report_records
import small_tasks as small

from jaxmerge import methods
from jaxmerge.evaluation import metrics, scoring
from jaxmerge.parallel import mesh as meshes
from jaxmerge.report import card, comparisons, labels, leaderboard, plots, record, tables
from jaxmerge.search import scales
from jaxmerge.tasks import batch, losses
from jaxmerge.training import finetune, loop, settings


def test_bits_of_bytes_by_hand():
  """Two bytes, one of which is told for sure; of four symbols, equally likely, one costs 2 bits."""
  sure = jnp.array([0.0, 200.0, 0.0, 0.0])
  logits = jnp.stack([sure, jnp.zeros(4)])[None]
  found = metrics.bits_per_byte(logits, np.array([[1, 3]]))
  np.testing.assert_allclose(found, [1.0], rtol=1e-6)


def test_a_function_is_a_metric_of_which_more_is_better():
  metric = metrics.metric_of(losses.accuracy)
  assert (metric.name, metric.gain(0.5)) == ("accuracy", 0.5)
  assert metrics.BITS_PER_BYTE.gain(0.5) == -0.5
  assert metrics.metric_of(metric) is metric


def loss(outputs, labels):
  return losses.cross_entropy(outputs, labels)


def gain(outputs, labels):
  return -losses.cross_entropy(outputs, labels)


LOSS, GAIN = metrics.Metric("loss", loss, lower_is_better=True), gain


@pytest.mark.slow
def test_choices_by_a_loss_are_those_by_its_negative():
  tasks, base = small.three(), small.weights()
  own = settings.Settings(rounds=4, epochs=8.0, batch_size=4, learning_rate=0.3, schedule="cosine")
  early = settings.dataclasses.replace(own, early_stopping=True)
  given = (small.network, base, tasks)
  mesh = meshes.make(1)
  runs = [loop.tune_and_merge(*given, None, early, metric=m, mesh=mesh) for m in (LOSS, GAIN)]
  small.assert_same_bits(runs[0].params, runs[1].params)
  means = [r["mean"] for r in runs[0].rounds]
  assert means == [-r["mean"] for r in runs[1].rounds]
  stacks = [finetune.experts(*given, early, metric=m, mesh=mesh)[0] for m in (LOSS, GAIN)]
  small.assert_same_bits(*stacks)
  rows = meshes.put(batch.stack(tasks, "validation"), meshes.task_sharding(mesh))
  counts = [len(t.validation.labels) for t in tasks]
  chosen = []
  for metric in (LOSS, metrics.metric_of(GAIN)):
    score = scoring.scorer(small.network, metric.rowwise, mesh=mesh)
    found = (methods.task_arithmetic(), stacks[0], base, (0.0, 0.3, 9.0), score, rows, counts)
    chosen.append(
      scales.best_scale(*found, names=[t.name for t in tasks], metric=metric, at_once=2)
    )
  assert chosen[0].candidate.scale == chosen[1].candidate.scale
  assert chosen[0].score == max(trial.score for trial in chosen[0].trials) < 0


def turned(made):
  """The record with 3 minus every score, of which less is better."""

  def one(row):
    return row | {
      "mean": 3 - row["mean"],
      "per_task": {t: 3 - v for t, v in row["per_task"].items()},
    }

  out = dict(made, metric="bits per byte", lower_is_better=True)
  out["models"] = {n: one(m) for n, m in made["models"].items()}
  out["rounds"] = [one(r) for r in made["rounds"]]
  out["curves"] = {n: [one(r) for r in c] for n, c in made["curves"].items()}
  return {k: v for k, v in out.items() if k != "chance"}


@pytest.fixture
def both():
  made = {k: v for k, v in report_records.record().items() if k != "chance"}
  return made, turned(made)


def test_the_same_cells_are_best_and_the_same_gaps_are_closed(both):
  for table in (tables.results, tables.gaps):
    marked = [[[c.best for c in row] for row in table(r).rows] for r in both]
    assert marked[0] == marked[1]
    assert table(both[0]).rows[0][0] == table(both[1]).rows[0][0]
  closed = [comparisons.gap_closed(r["models"]) for r in both]
  assert closed[0] == pytest.approx(closed[1])
  for kind in ("loop", "one-shot"):
    assert labels.best(both[0], kind) == labels.best(both[1], kind)
  record.check(record.plain(both[1]))


def test_words_say_the_unit_and_never_percent(both):
  mean = both[1]["models"]["atm"]["mean"]
  sentence = labels.sentence(both[1])
  assert sentence.startswith(f"The best of 2 ATM runs, ATM, reaches {mean:.3f} bits per byte over")
  assert tables.results(both[1]).head[1] == "Mean (bits per byte)"
  text = tables.markdown(both[1])
  assert "Bits per byte on validation rows; less is better." in text
  assert "where the experts lead by over 0.05 bits per byte" in text
  assert f"{mean:.3f} mean bits per byte" in card.model_card(both[1], "base", "atm")
  small_values = dict(both[1], models={"atm": {"mean": 0.5, "per_task": {}}}, rounds=[])
  assert not labels.percent(small_values)


def test_plots_of_a_loss_say_that_less_is_better(both):
  texts = [
    t.get_text() for t in plots.mean(both[1]).findobj(match=lambda x: hasattr(x, "get_text"))
  ]
  assert any("Mean bits per byte, validation (less is better)" in t for t in texts)
  assert not any("%" in t for t in texts)


def test_seeds_of_a_loss(both):
  records = [dict(both[1], seed=s) for s in range(2)]
  summary = record.merge_seeds(records)
  assert summary["lower_is_better"] is True
  shown = tables.seeds(summary)
  assert (
    "Mean ± standard deviation over 2 seeds, bits per byte on validation; less is better." in shown
  )
  assert "| Mean (bits per byte) |" in shown
  with pytest.raises(ValueError, match="lower_is_better of seed 1 differ"):
    record.merge_seeds(
      [records[0], {k: v for k, v in records[1].items() if k != "lower_is_better"}]
    )


def test_a_leaderboard_of_a_loss_has_the_least_first(both):
  records = [dict(both[1], seed=s) for s in range(2)]
  runs = [{"settings": {"scale": 0.5}, "trials": 3}] * 2
  facts = {
    "summary": record.merge_seeds(records),
    "methods": {"average": runs, "ties": runs, "dare": runs},
    "noise": [0.01, 0.02],
  }
  means = {n: both[1]["models"][n]["mean"] for n in facts["methods"]}
  assert leaderboard.rank(facts) == sorted(means, key=means.get)
  table = leaderboard.table(facts)
  assert table.head[1] == "Mean (bits per byte)"
  first = next(row for row in table.rows if row[0].text in facts["methods"])
  assert first[1] == tables.Cell(f"{min(means.values()):.3f} ± 0.000", best=True)
  assert leaderboard.top(facts, 1).head[:2] == table.head[:2]
  # Test rows rank, and do not choose: marked is the best on validation.
  seen = {n: [dict(r, validation=3.0 - k) for r in runs] for k, n in enumerate(facts["methods"])}
  marked = [r[0].text for r in leaderboard.table(facts | {"methods": seen}).rows if r[1].best]
  assert marked == ["dare"] == [leaderboard.best(facts | {"methods": seen})]
  facts["summary"]["models"]["ties"]["gap_closed"] = {"mean": -0.004, "spread": 0.001}
  assert next(r[2].text for r in leaderboard.table(facts).rows if r[0].text == "ties") == "0 ± 0"
  shown = leaderboard.markdown(facts)
  assert "bits per byte on validation; less is better" in shown
  assert "a standard error of 0.020 bits per byte on a mean" in shown


def test_paired_differences_of_scores():
  a, b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.5, 3.0])
  found = comparisons.paired_difference([a], [b])
  assert found.mean == pytest.approx(-0.5)
  assert found.low <= -0.5 <= found.high
