"""The loop: order, repetition, interruption, other devices, bad input."""

import contextlib
import dataclasses
import json

import jax
import jax.monitoring
import jax.numpy as jnp
import kill_child
import numpy as np
import pytest
import small_tasks as small
from jax.sharding import PartitionSpec as P

from jaxmerge import methods
from jaxmerge.core import random_masks, stage
from jaxmerge.io.checkpoints import store as stores
from jaxmerge.parallel import mesh as meshes
from jaxmerge.tasks import batch, losses
from jaxmerge.training import finetune, local_steps, loop, optimizers, schedule, settings


def chosen(**changes):
  plain = dict(rounds=3, epochs=6.0, batch_size=4, learning_rate=0.05, weight_decay=0.01)
  return settings.Settings(**plain | changes)


def run(tasks=None, method=None, *, start=None, store=None, **changes):
  """The loop on three tasks of different sizes and classes, on one device."""
  names = ("hparams", "mesh", "save_every", "score_every", "on_round", "sharding")
  given = {"mesh": meshes.make(1)} | {n: changes.pop(n) for n in names if n in changes}
  return loop.tune_and_merge(
    small.network,
    small.weights() if start is None else start,
    small.three() if tasks is None else tasks,
    method,
    chosen(**changes),
    checkpoints=store,
    **given,
  )


def timeless(records):
  """Records without what differs from run to run."""
  return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def assert_same_run(a, b):
  small.assert_same_bits(a.params, b.params)
  assert timeless(a.rounds) == timeless(b.rounds)
  assert a.budget == b.budget


class Stopped(Exception):
  """Ends a run at a chosen round."""


def stop_after(k):
  def on_round(record):
    if record["round"] == k:
      raise Stopped

  return on_round


@contextlib.contextmanager
def compilations():
  """Counts what the backend compiles."""
  names = []

  def listen(event, duration, **facts):
    if event == "/jax/core/compile/backend_compile_duration":
      names.append(facts.get("fun_name"))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


# What a run is.


def test_the_order_of_the_tasks_does_not_matter():
  tasks, weight = small.three(), {"ant": 1.0, "bee": 0.25, "cat": 2.0}
  method = methods.dare(drop_rate=0.5, scale=0.4)

  def ordered(order):
    given = [tasks[k] for k in order]
    return run(
      given, method, hparams={"weight": np.float32([weight[t.name] for t in given])}, rounds=2
    )

  first = ordered([0, 1, 2])
  assert_same_run(ordered([2, 0, 1]), first)
  # The weights do what their tasks' names say, and not by accident the same for all.
  alike = run(tasks, method, rounds=2)
  assert small.differ(alike.params, first.params)


@pytest.mark.slow
def test_a_method_to_which_order_matters_gets_the_callers():
  """Slerp at 0 is the first task vector: merging the first task alone, whatever the names."""
  one, two, _ = small.three()
  for pair in ((one, two), (two, one)):
    found = run(list(pair), methods.slerp(t=0.0), rounds=1)
    alone = run([pair[0]], methods.average(), rounds=1)
    left, right = (x.params["dense"]["kernel"] for x in (found, alone))
    np.testing.assert_allclose(left, right, atol=1e-5)


@pytest.mark.parametrize(
  "changes",
  [
    dict(schedule="cosine", outer="nesterov", outer_momentum=0.5, outer_schedule="cosine"),
    pytest.param(dict(at_once=1), marks=pytest.mark.slow),
    pytest.param(dict(local_state="kept", early_stopping=True), marks=pytest.mark.slow),
    pytest.param(dict(mesh=(2, 1, 2), local_state="kept"), marks=pytest.mark.slow),
  ],
)
def test_all_rounds_run_what_the_first_one_compiled(changes):
  seen = []
  with compilations() as names:
    sizes = changes.get("mesh", (2,))
    given = changes | dict(mesh=meshes.make(*sizes), sharding=RULES if len(sizes) > 1 else ())
    run(rounds=4, on_round=lambda r: seen.append(len(names)), **given)
  # In turn, the waves after the first compile in round one as well.
  assert sum("run_round" in n or "tune_wave" in n for n in names[: seen[0]]) == 1
  assert seen == [seen[0]] * 4, names[seen[0] :]


def test_a_record_tells_losses_scores_and_geometry():
  tasks = small.three()
  found = run(tasks, rounds=1, epochs=2.0)
  copies, cost = finetune.experts(
    small.network, small.weights(), tasks, chosen(rounds=1, epochs=2.0), mesh=meshes.make(1)
  )
  (record,) = found.rounds
  names = [t.name for t in tasks]
  start = jax.tree.leaves(small.weights())
  vectors = np.stack(
    [
      np.concatenate([np.asarray(x[k] - p).ravel() for x, p in zip(leaves, start, strict=True)])
      for k, leaves in enumerate([jax.tree.leaves(copies)] * 3)
    ]
  )
  norms = np.linalg.norm(vectors, axis=1)
  order = sorted(range(3), key=lambda k: list(record["norms"]).index(names[k]))
  np.testing.assert_allclose([record["norms"][n] for n in names], norms, rtol=1e-5)
  cosines = (vectors @ vectors.T / np.outer(norms, norms))[np.ix_(order, order)]
  np.testing.assert_allclose(record["cosines"], cosines, atol=1e-5)
  conflict = ((vectors > 0).any(0) & (vectors < 0).any(0)).mean()
  assert record["sign_conflict"] == pytest.approx(conflict)
  for t in tasks:
    logits = np.asarray(small.network(found.params, t.validation.inputs, t.head))
    score = (logits.argmax(-1) == t.validation.labels).mean()
    assert record["per_task"][t.name] == pytest.approx(score)
  assert record["mean"] == pytest.approx(np.mean(list(record["per_task"].values())))
  assert (record["round"], record["exchanges"], record["epochs"]) == (1, 1, 2.0)
  # 12, 20 and 9 rows twice, in batches of 4: 6, 10 and 4.5 steps, the last rounded to even.
  assert found.budget == cost._replace(exchanges=1)
  assert found.budget[1:] == (20, 10, 80, 1, 1)
  assert found.budget.epochs_per_task == pytest.approx((2 + 2 + 16 / 9) / 3)


def test_training_lowers_the_losses():
  found = run(rounds=6, epochs=30.0)
  first, last = found.rounds[0]["loss"], found.rounds[-1]["loss"]
  assert all(last[n] < 0.8 * first[n] for n in first)


def test_a_round_without_steps_of_a_task_has_no_loss_of_it():
  # 12, 20 and 9 rows once, in batches of 10: 1, 2 and 1 steps in three rounds.
  result = run(epochs=1.0, batch_size=10)
  note = "some of the 3 rounds have no step: the longest task, 'bee', has 2 in the whole run"
  assert result.messages[-1].startswith(note)
  losses = [r["loss"] for r in result.rounds]
  taken = [n for loss in losses for n, x in loss.items() if x is not None]
  assert sorted(taken) == ["ant", "bee", "bee", "cat"]
  assert all(x > 0 for loss in losses for x in loss.values() if x is not None)


def test_a_model_axis_without_rules_is_refused():
  with pytest.raises(ValueError, match="model axis is 2, but there are no sharding rules"):
    run(mesh=meshes.make(1, 1, 2))
  with pytest.raises(ValueError, match="no sharding rule matches leaf 'dense/bias'"):
    run(mesh=meshes.make(1, 1, 2), sharding=[("kernel$", P(None, "model"))])
  with pytest.raises(ValueError, match=r"'dense/kernel' .* 5 entries over 2 devices"):
    run(mesh=meshes.make(1, 1, 2), sharding=[("kernel$", P(None, "model")), ("", P())])


def one_by_one(s, kept):
  """Tunes one task in stretches of a round, and nothing else."""
  task = small.classified("ant", 12)
  local = optimizers.local(s, small.weights())
  step = local_steps.step(small.network, losses.cross_entropy, s, local)
  rows = jax.tree.map(lambda x: x[0], batch.stack([task], "train"))
  go = jax.jit(lambda *given: local_steps.tune_one(step, *given))
  params = jax.tree.map(jnp.asarray, small.weights())
  state = local.init(params)
  for k in range(s.rounds):
    plan = schedule.plan([task.name], [12], s, k, rounds=s.rounds)
    state = state if kept else local.init(params)
    params, state, _ = go(params, state, rows, jax.tree.map(lambda x: x[0], plan))
  return params


@pytest.mark.slow
def test_one_task_is_fine_tuning_with_restarts_or_one_long_run():
  task, long = small.classified("ant", 12), chosen(rounds=1)
  fresh, kept = run([task]), run([task], local_state="kept")
  # The merge adds a difference back to its reference, which costs a rounding.
  close = dict(rtol=1e-5, atol=1e-6)
  small.assert_close(fresh.params, one_by_one(chosen(), kept=False), **close)
  small.assert_close(kept.params, one_by_one(chosen(), kept=True), **close)
  # One round of the same steps, that is without any merge on the way.
  unbroken, _ = finetune.experts(small.network, small.weights(), [task], long)
  small.assert_close(kept.params, jax.tree.map(lambda x: x[0], unbroken), **close)
  assert small.differ(fresh.params, kept.params)


def test_frozen_leaves_keep_their_bits():
  found = run(freeze="bias", outer="nesterov", outer_momentum=0.5, weight_decay=0.1)
  before = small.weights()["dense"]
  small.assert_same_bits(np.asarray(found.params["dense"]["bias"]), before["bias"])
  assert small.differ(found.params["dense"]["kernel"], before["kernel"])


@pytest.mark.slow
def test_masks_differ_from_round_to_round_and_with_the_seed():
  # A method that returns its random numbers: with the base as reference, the model is base + mask.
  method = stage.leafwise(
    lambda x, leaf: random_masks.uniform(x, leaf)[:1], hparams={"seed": None}, combines=True
  )

  def masks(rounds, seed=0):
    found = run(method=method, rounds=rounds, reference="base", seed=seed, epochs=1.0)
    return np.asarray(found.params["dense"]["kernel"]) - small.weights()["dense"]["kernel"]

  first, second = masks(1), masks(2)
  assert (np.abs(first - second) > 1e-3).mean() > 0.9
  assert (np.abs(masks(1, seed=1) - first) > 1e-3).mean() > 0.9
  assert -1e-6 <= first.min() < 0.2 < 0.8 < first.max() <= 1 + 1e-6


def test_early_stopping_returns_the_best_round():
  # An outer rate that overshoots more and more: later rounds are worse.
  changes = dict(outer="sgd", outer_learning_rate=6.0, rounds=4, epochs=12.0)
  last, best = run(**changes), run(early_stopping=True, **changes)
  means = [r["mean"] for r in best.rounds]
  assert timeless(last.rounds) == timeless(best.rounds)
  k = int(np.argmax(means))
  assert k < 3
  assert small.differ(best.params, last.params)
  score = np.mean(
    [
      (
        np.asarray(small.network(best.params, t.validation.inputs, t.head)).argmax(-1)
        == t.validation.labels
      ).mean()
      for t in small.three()
    ]
  )
  assert score == pytest.approx(means[k])


def test_rounds_between_scores_have_none_and_the_same_model(tmp_path):
  changes = dict(rounds=3, epochs=6.0, early_stopping=True)
  every = run(**changes)
  with stores.Checkpoints(tmp_path) as store:
    some = run(score_every=2, store=store, **changes)
  assert [r["mean"] is None for r in some.rounds] == [True, False, False]
  assert some.rounds[0]["per_task"] == dict.fromkeys(every.rounds[0]["per_task"])
  kept = [r for r in timeless(some.rounds) if r["mean"] is not None]
  assert kept == timeless(every.rounds)[1:]
  best = max(kept, key=lambda r: r["mean"])["mean"]
  with stores.Checkpoints(tmp_path) as store:
    again = run(score_every=2, store=store, **changes)
  small.assert_same_bits(again.params, some.params)
  assert best == max(r["mean"] for r in again.rounds if r["mean"] is not None)
  with pytest.raises(ValueError, match="score_every must be at least 1 round, got 0"):
    run(score_every=0, **changes)


# Other devices.


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2), (3, 1)])
def test_the_mesh_changes_rounding_alone(sizes):
  # Means over tasks and rows are added up in another order, which Adam amplifies.
  found, expected = (run(mesh=meshes.make(*s), rounds=2) for s in (sizes, (1, 1)))
  small.assert_close(found.params, expected.params, rtol=1e-4, atol=1e-5)


RULES = (("kernel$", P("model", None)), ("bias$", P()))


@pytest.mark.slow
def test_tasks_rows_and_weights_are_spread_together(tmp_path):
  """A kernel of four rows over two devices of each copy; kept states and outer ones lie with it."""
  mesh = meshes.make(2, 2, 2)
  found = run(mesh=mesh, sharding=RULES, **ALL)
  expected = run(**ALL)
  kernel = found.params["dense"]["kernel"]
  assert kernel.sharding.spec == P("model")
  assert {s.data.shape for s in kernel.addressable_shards} == {(2, 5)}
  # Rows, tasks and inputs are added up in another order, which Adam amplifies.
  small.assert_close(found.params, expected.params, rtol=1e-4, atol=1e-5)
  with stores.Checkpoints(tmp_path) as store, pytest.raises(Stopped):
    run(mesh=mesh, sharding=RULES, store=store, on_round=stop_after(2), **ALL)
  with stores.Checkpoints(tmp_path) as store:
    assert_same_run(run(mesh=mesh, sharding=RULES, store=store, **ALL), found)


@pytest.mark.slow
def test_a_round_moves_nothing_between_host_and_devices(monkeypatch):
  """All that a round needs is placed before it. On a CPU the guard does not see what comes back."""
  real, rounds = loop.rounds.program, []

  def guarded(parts):
    program = real(parts)

    def once(state, base, rows, plan, ready, rate):
      with jax.transfer_guard("disallow"):
        found = program(state, base, rows, plan, ready, rate)
        jax.block_until_ready(found)
      host, next_ = plan._replace(steps=np.asarray(plan.steps)), found[0]
      with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed"):
        program(next_, base, rows, host, ready, rate)
      rounds.append(found)
      return found

    return once

  monkeypatch.setattr(loop.rounds, "program", guarded)
  found = run(mesh=meshes.make(2, 2, 2), sharding=RULES, rounds=2)
  assert len(rounds) == len(found.rounds) == 2


# Interruption.


ALL = dict(local_state="kept", outer="nesterov", outer_momentum=0.5, early_stopping=True)


@pytest.fixture(scope="module")
def whole():
  """An uninterrupted run with everything that a checkpoint must hold."""
  return run(method=methods.dare(0.3, 0.4), **ALL)


@pytest.mark.parametrize("k", [1, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 3))])
def test_a_run_that_stops_after_any_round_ends_with_the_same_bits(tmp_path, whole, k):
  method = methods.dare(0.3, 0.4)
  with stores.Checkpoints(tmp_path) as store, pytest.raises(Stopped):
    run(method=method, store=store, on_round=stop_after(k), **ALL)
  with stores.Checkpoints(tmp_path) as store:
    seen = []
    found = run(method=method, store=store, on_round=lambda r: seen.append(r["round"]), **ALL)
  assert seen == list(range(k + 1, 4))
  assert found.messages == (f"resumed after round {k}",)
  assert_same_run(found, whole)


def test_rounds_may_go_unsaved_but_not_the_last(tmp_path, whole):
  method = methods.dare(0.3, 0.4)
  given = dict(method=method, save_every=2, **ALL)
  with stores.Checkpoints(tmp_path, keep=None) as store, pytest.raises(Stopped):
    run(store=store, on_round=stop_after(1), **given)
  assert not tmp_path.exists() or not any(p.name.isdigit() for p in tmp_path.iterdir())
  with stores.Checkpoints(tmp_path, keep=None) as store:
    assert_same_run(run(store=store, **given), whole)
  assert {p.name for p in tmp_path.iterdir() if p.name.isdigit()} == {"2", "3"}
  with pytest.raises(ValueError, match="save_every must be at least 1 round, got 0"):
    run(**given | dict(save_every=0))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 1, 2)])
def test_optimizer_states_do_not_pass_through_the_host_where_a_run_goes_on(
  tmp_path, monkeypatch, sizes
):
  """Those of all tasks may be more than a host holds; the second mesh has empty slots for some."""
  tasks = [*small.three(), small.classified("dog", 16)]
  given = dict(mesh=meshes.make(*sizes), sharding=RULES, **ALL)
  expected = run(tasks, **given)
  with stores.Checkpoints(tmp_path) as store, pytest.raises(Stopped):
    run(tasks, store=store, on_round=stop_after(2), **given)
  fetched, fetch = [], meshes.fetch
  monkeypatch.setattr(meshes, "fetch", lambda x: fetched.extend(jax.tree.leaves(x)) or fetch(x))
  with stores.Checkpoints(tmp_path) as store:
    assert_same_run(run(tasks, store=store, **given), expected)
  assert not any(np.shape(x)[1:] == (4, 5) for x in fetched)


@pytest.mark.slow
def test_the_best_round_is_remembered_over_an_interruption(tmp_path):
  changes = dict(outer="sgd", outer_learning_rate=6.0, epochs=9.0, early_stopping=True)
  expected = run(**changes)
  assert int(np.argmax([r["mean"] for r in expected.rounds])) < 2
  with stores.Checkpoints(tmp_path) as store, pytest.raises(Stopped):
    run(store=store, on_round=stop_after(2), **changes)
  with stores.Checkpoints(tmp_path) as store:
    assert_same_run(run(store=store, **changes), expected)


@pytest.mark.slow
def test_waves_of_tasks_resume_with_the_same_bits(tmp_path):
  changes = dict(at_once=2, local_state="kept", outer="damped", outer_momentum=0.2)
  expected = run(**changes)
  with stores.Checkpoints(tmp_path) as store, pytest.raises(Stopped):
    run(store=store, on_round=stop_after(2), **changes)
  with stores.Checkpoints(tmp_path) as store:
    assert_same_run(run(store=store, **changes), expected)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  """A store that holds one round."""
  directory = tmp_path_factory.mktemp("stored")
  with stores.Checkpoints(directory) as store, pytest.raises(Stopped):
    run(store=store, on_round=stop_after(1))
  return directory


def bee(**changes):
  ant, old, cat = small.three()
  return [ant, dataclasses.replace(old, **changes), cat]


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (dict(learning_rate=0.06), "settings 'learning_rate' is 0.05 there and 0.06 here"),
    (dict(seed=1), "settings 'seed' is 0 there and 1 here"),
    (dict(rounds=4), "settings 'rounds' is 3 there and 4 here"),
    (
      dict(method=methods.average(weight=2.0)),
      r"method 'weight' is \[1.0\] there and \[2.0\] here",
    ),
    (dict(method=methods.ties()), r"method 'density' is None there and \[0.2\] here"),
    (dict(tasks=bee(name="bug")), "tasks 'bee' is '20 rows, .*' there and None here"),
    (dict(tasks=bee(train=small.classified("x", 20, 2).train)), "tasks 'bee' is '20 rows, crc32"),
    (
      dict(start=jax.tree.map(lambda x: 2 * x, small.weights())),
      "leaf .* of the initial model differs",
    ),
    (dict(local_state="kept"), "settings 'local_state' is 'fresh' there and 'kept' here"),
    (dict(outer="adam"), "settings 'outer' is .* there and 'adam' here"),
  ],
)
def test_another_run_in_the_store_is_refused_with_the_difference(stored, changes, words):
  before = sorted(p.name for p in stored.iterdir())
  with stores.Checkpoints(stored) as store, pytest.raises(ValueError, match=words):
    run(store=store, **changes)
  assert sorted(p.name for p in stored.iterdir()) == before


@pytest.mark.slow
def test_saved_on_eight_devices_resumed_on_others(tmp_path):
  tasks = [*small.three(), small.classified("dog", 16)]
  expected = run(tasks, mesh=meshes.make(4, 2), **ALL)
  for sizes in ((1, 1), (3, 1), (4, 1)):
    directory = tmp_path / str(sizes)
    with stores.Checkpoints(directory) as store, pytest.raises(Stopped):
      run(tasks, mesh=meshes.make(4, 2), store=store, on_round=stop_after(2), **ALL)
    with stores.Checkpoints(directory) as store:
      found = run(tasks, mesh=meshes.make(*sizes), store=store, **ALL)
    # Another order of additions in one round, which Adam amplifies.
    small.assert_close(found.params, expected.params, rtol=1e-4, atol=1e-5)
    assert timeless(found.rounds[:2]) == timeless(expected.rounds[:2])


@pytest.fixture(scope="module")
def child():
  with kill_child.connect() as client:
    yield client


@pytest.fixture(scope="module")
def unkilled(child, tmp_path_factory):
  return child.run("merging", tmp_path_factory.mktemp("unkilled"))


def test_the_child_runs_this_loop(unkilled):
  assert any(e.startswith("os.rename unfinished/3") for e in unkilled["events"])


@pytest.mark.parametrize(
  "event",
  ["os.rename unfinished/2", pytest.param("os.rename unfinished/1", marks=pytest.mark.slow)],
)
def test_killed_at_a_save(child, unkilled, tmp_path, event):
  number = unkilled["events"].index(event) + 1
  assert child.run("merging", tmp_path, kill_event=number)["killed"]
  assert child.run("merging", tmp_path)["digest"] == unkilled["digest"]


@pytest.mark.slow
def test_killed_at_random_moments(child, unkilled, tmp_path):
  digests = child.kill_at_random("merging", tmp_path, kills=4)
  assert set(digests) == {unkilled["digest"]}


# Bad input.


def spoilt(value):
  """The second task with another value in its data."""
  train = small.three()[1].train
  inputs = train.inputs.copy()
  inputs[3, 1] = value
  return bee(train=train._replace(inputs=inputs))


def relabelled(label):
  train = small.three()[1].train
  labels = train.labels.copy()
  labels[5] = label
  return bee(train=train._replace(labels=labels))


@pytest.mark.parametrize(
  ("tasks", "words"),
  [
    (spoilt(np.nan), "task 'bee', train split, inputs, row 3: NaN or infinity"),
    (spoilt(np.inf), "task 'bee', train split, inputs, row 3: NaN or infinity"),
    (relabelled(2), "task 'bee', train split, row 5: label 2 is out of range; 2 classes"),
    (relabelled(-1), "task 'bee', train split, row 5: label -1 is out of range"),
    ([*small.three(), small.classified("ant", 5)], "names must differ"),
    ([], "at least one task"),
    (bee(head=None, classes=("x", "y")), "'bee': 'none'"),
  ],
)
def test_bad_tasks_are_refused_by_name(tasks, words):
  with pytest.raises(ValueError, match=words):
    run(tasks)


@pytest.mark.parametrize(
  ("leaf", "words"),
  [
    (np.float32([1, 2, 3, 4, np.nan]), "'dense/bias' of the model to start from has NaN"),
    (np.arange(5, dtype=np.int32), "'dense/bias' is int32; only floating point is tuned"),
  ],
)
def test_bad_parameters_are_refused_by_name(leaf, words):
  params = {"dense": {"kernel": small.weights()["dense"]["kernel"], "bias": leaf}}
  with pytest.raises(ValueError, match=words):
    loop.tune_and_merge(small.network, params, small.three(), None, chosen())


def test_divergence_names_task_and_round(tmp_path):
  # One task's rows are so large that its loss overflows; the others are well.
  train = small.three()[1].train
  tasks = bee(head=small.three()[1].head * np.float32(1e25))
  assert np.isfinite(train.inputs).all()
  with (
    stores.Checkpoints(tmp_path) as store,
    pytest.raises(ValueError, match=r"'bee' diverged in round 1: .* lower learning_rate \(1000\)"),
  ):
    run(tasks, store=store, learning_rate=1e3, optimizer="sgd", clip_norm=0.0)
  assert not (tmp_path / "1").exists()


def test_unknown_numbers_are_refused():
  with pytest.raises(ValueError, match=r"has no hyperparameter 'wait'.*weight"):
    run(hparams={"wait": 1.0})


def test_records_are_plain(tmp_path):
  found = run(rounds=1)
  assert json.loads(json.dumps(found.rounds)) == found.rounds
