"""`compare`: methods on experts in memory, and what the loop's result is compared with."""

import jax
import numpy as np
import pytest
import small_tasks as small

import jaxmerge
from jaxmerge.report import leaderboard, record

SETTINGS = jaxmerge.Settings(rounds=2, epochs=4.0, batch_size=4, learning_rate=0.05)


@pytest.fixture(scope="module")
def result():
  return jaxmerge.tune_and_merge(
    small.network,
    small.weights(),
    small.three(),
    settings=SETTINGS,
    test=True,
    baselines=("experts", "average", "ties"),
  )


@pytest.fixture(scope="module")
def compared(result):
  return jaxmerge.compare(
    small.network,
    small.weights(),
    result.experts,
    small.three(),
    methods=("average", "ties", "iso_c", "dare"),
    trials=3,
    models={"atm": result},
  )


@pytest.mark.slow
def test_a_result_has_what_it_is_compared_with(result):
  assert set(result.scores) == {"validation", "test"}
  names = {"base", "average", "ties", "atm", "experts"}
  assert set(result.scores["test"]) == set(result.record["models"]) == names
  assert result.scores["validation"]["atm"]["mean"] == result.rounds[-1]["mean"]
  assert [*result.merges] == ["average", "ties"]
  mean = jax.tree.map(lambda x: x.mean(0), result.experts)
  small.assert_close(result.merges["average"], mean, atol=1e-6)
  assert result.record["split"] == "test"
  assert result.record["budget"]["experts"]["gradient_steps"] > 0


def test_a_plain_result_has_a_record_of_its_rounds(tmp_path):
  plain = jaxmerge.tune_and_merge(small.network, small.weights(), small.three(), settings=SETTINGS)
  assert plain.scores == {}
  assert plain.experts is None
  assert plain.record["models"]["atm"]["mean"] == plain.rounds[-1]["mean"]
  written = jaxmerge.report(plain, tmp_path, with_plots=False)
  assert written["rounds"][1]["mean"] == plain.rounds[1]["mean"]
  assert "2 rounds" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_methods_are_chosen_on_validation_and_scored_once(compared, result):
  record.check(record.plain(compared))
  assert compared["split"] == "test"
  assert {"base", "experts", "average", "ties", "iso_c", "dare", "atm"} == set(compared["models"])
  assert compared["methods"]["ties"]["trials"] == 3
  assert compared["methods"]["average"] == {
    "settings": {}, "trials": 1, "validation": compared["validation"]["average"],
  }  # fmt: skip
  assert set(compared["methods"]["ties"]["settings"]) == {"density", "scale"}
  for name in ("base", "experts", "average", "atm"):
    theirs = result.scores["test"][name]
    assert compared["models"][name]["mean"] == pytest.approx(theirs["mean"], abs=1e-6)


@pytest.mark.slow
def test_the_best_merge_is_compared_with_the_others(compared):
  best = {d["a"] for d in compared["differences"]}
  assert len(best) == 1
  means = {n: compared["validation"][n] for n in compared["methods"]}
  assert means[best.pop()] == max(means.values())
  assert len(compared["differences"]) == 3


@pytest.mark.slow
def test_the_record_is_drawn_and_is_a_leaderboard(compared, tmp_path):
  jaxmerge.report(compared, tmp_path)
  assert (tmp_path / "plots" / "mean.png").is_file()
  table = leaderboard.table(leaderboard.from_records([record.plain(compared)]))
  assert table.rows[0][0].text == "Experts"
  assert table.rows[-1][0].text == "Base"


@pytest.mark.slow
def test_settings_and_methods_may_be_given(result):
  made = jaxmerge.compare(
    small.network,
    small.weights(),
    jaxmerge.unstack(result.experts),
    small.three(),
    methods={
      "ties": {"density": (0.2, 0.5), "scale": (0.5, 1.0)},
      "mine": jaxmerge.methods.task_arithmetic(0.4),
    },
    split="validation",
  )
  assert made["methods"]["ties"]["trials"] == 4
  assert made["methods"]["mine"]["trials"] == 1
  assert made["methods"]["mine"]["settings"] == {"scale": pytest.approx(0.4)}
  assert "validation" not in made


@pytest.mark.slow
def test_a_method_that_fails_says_why(result):
  made = jaxmerge.compare(
    small.network,
    small.weights(),
    result.experts,
    small.three(),
    methods=("average", "krum"),
  )
  assert "krum" in made["failed"]
  assert "average" in made["models"]
  with pytest.raises(ValueError, match="no method could be merged and scored; krum: "):
    jaxmerge.compare(
      small.network, small.weights(), result.experts, small.three(), methods=("krum",)
    )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"methods": "ties"}, r"write \['ties'\]"),
    ({"methods": ("tie",)}, "no method is called 'tie'; did you mean 'ties'"),
    ({"methods": ("slerp",)}, "slerp does not merge the task vectors of any number"),
    ({"methods": {"ties": {"density": (2.0,)}}}, r"ties: density must be in \(0, 1\], got 2.0"),
    ({"trials": 0}, "trials must be a whole number, 1 or more, got 0"),
    ({"methods": [jaxmerge.methods.ties()]}, r"or methods by name, such as {'mine': method}"),
    ({"methods": jaxmerge.methods.ties()}, r"or methods by name, such as {'mine': method}"),
    ({"models": [0]}, "models must be a dict of models by name"),
    ({"experts": None}, r"baselines=\['experts'\]"),
    ({"models": {"Ties": 0}}, "models: the name 'Ties' is taken by one of the methods of that"),
    ({"models": {"base": 0}}, "models: the name 'base' is taken by the reference of that name"),
    ({"models": {"a_b": 0, "a b": 0}}, "models: the name 'a b' is taken by another model"),
    ({"models": {"expert_1": 0}}, "models: the name 'expert_1' is taken by an expert"),
    ({"methods": {"experts": {"name": "ties"}}}, "methods: the name 'experts' is taken"),
    ({"split": "train"}, "split must be 'validation' or 'test', got 'train'"),
  ],
)
def test_what_cannot_be_compared_is_refused(changes, message):
  experts = jaxmerge.stack([small.weights(s) for s in range(3)])
  changes = {"experts": experts} | changes
  with pytest.raises(ValueError, match=message):
    jaxmerge.compare(small.network, small.weights(), tasks=small.three(), **changes)


def test_experts_by_name_are_those_of_the_tasks():
  tasks = small.three()
  experts = {t.name: small.weights(k) for k, t in enumerate(tasks)}
  changes = {"methods": ("average",), "trials": 1}
  listed, named = (
    jaxmerge.compare(small.network, small.weights(), some, tasks, **changes)
    for some in ([*experts.values()], dict(reversed(experts.items())))
  )
  assert named["transfer"] == listed["transfer"]
  assert len({str(row) for row in named["transfer"].values()}) > 1
  experts["zebra"] = experts.pop(tasks[0].name)
  with pytest.raises(ValueError, match="'zebra' is no task; give a dict by the names of the tasks"):
    jaxmerge.compare(small.network, small.weights(), experts, tasks)
  with pytest.raises(ValueError, match="the task under 'zebra' has the name 'ant'"):
    jaxmerge.tune_and_merge(small.network, small.weights(), {"zebra": tasks[0]})


def test_experts_are_one_a_task():
  experts = [small.weights(s) for s in range(2)]
  with pytest.raises(ValueError, match="an expert for each task: 3, got 2"):
    jaxmerge.compare(small.network, small.weights(), experts, small.three())


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"baselines": "ties"}, r"write \['ties'\]"),
    ({"baselines": ["tie"]}, "'tie' is neither 'experts' nor a method; did you mean 'ties'"),
    ({"baselines": ["slerp"]}, "slerp does not merge 3 models"),
  ],
)
def test_what_a_result_cannot_have_is_refused_before_the_run(changes, message):
  with pytest.raises(ValueError, match=message):
    jaxmerge.tune_and_merge(small.network, small.weights(), small.three(), **changes)


def test_test_scores_need_test_rows():
  tasks = [jaxmerge.Task(t.name, t.train, t.validation, head=t.head) for t in small.three()]
  with pytest.raises(ValueError, match="test=True scores test rows, and task 'ant' has none"):
    jaxmerge.tune_and_merge(small.network, small.weights(), tasks, test=True)


def test_report_says_what_it_draws(tmp_path):
  with pytest.raises(ValueError, match="report needs the result of tune_and_merge, or a record"):
    jaxmerge.report(np.ones(3), tmp_path)
