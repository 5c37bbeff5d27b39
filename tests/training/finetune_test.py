"""Experts, joint training, and one-shot merges with the best scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_tasks as small

import jaxmerge
from jaxmerge import methods
from jaxmerge.evaluation import scoring
from jaxmerge.parallel import mesh as meshes
from jaxmerge.search import scales as search_scales
from jaxmerge.tasks import batch, losses
from jaxmerge.training import budget, finetune, schedule, settings
from jaxmerge.training import joint as training_joint


def chosen(**changes):
  plain = dict(rounds=1, epochs=2.0, batch_size=4, learning_rate=0.05)
  return settings.Settings(**plain | changes)


def experts(tasks=None, devices=1, **changes):
  tasks = small.three() if tasks is None else tasks
  return finetune.experts(
    small.network, small.weights(), tasks, chosen(**changes), mesh=meshes.make(devices)
  )


def joint(mixed, tasks=None, **changes):
  tasks = small.three() if tasks is None else tasks
  return training_joint.train(small.network, small.weights(), tasks, chosen(**changes), mixed=mixed)


@pytest.fixture(scope="module")
def whole():
  return experts(schedule="cosine")


@pytest.mark.slow
def test_parts_of_the_training_change_nothing(whole):
  seen = []
  parts, cost = finetune.experts(
    small.network,
    small.weights(),
    small.three(),
    chosen(rounds=3, schedule="cosine", local_state="fresh", round_warmup=0.5),
    mesh=meshes.make(1),
    on_part=lambda k, n: seen.append((k, n)),
  )
  assert seen == [(1, 3), (2, 3), (3, 3)]
  small.assert_same_bits(parts, whole[0])
  assert cost == whole[1]


def test_an_expert_knows_nothing_of_other_tasks(whole):
  ant, bee, cat = small.three()
  other = small.classified("dog", 20, 2)
  found, _ = experts([ant, other, cat], schedule="cosine")
  for k, same in enumerate((True, False, True)):
    a, b = (jax.tree.map(lambda x, k=k: x[k], s) for s in (found, whole[0]))
    assert small.differ(a, b) != same
  small.assert_same_bits(experts([cat, ant, bee], schedule="cosine")[0], _rolled(whole[0]))


def _rolled(stack):
  return jax.tree.map(lambda x: np.roll(np.asarray(x), 1, axis=0), stack)


def test_empty_slots_of_the_mesh_are_left_out(whole):
  found, cost = experts(devices=2, schedule="cosine")
  small.assert_same_bits(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, whole[0]))
  assert cost == whole[1]


def test_costs_by_hand(whole):
  # 12, 20 and 9 rows twice in batches of 4: 6, 10 and 4 (of 4.5) steps.
  epochs = (2 + 2 + 16 / 9) / 3
  assert whole[1] == budget.Budget(pytest.approx(epochs), 20, 10, 80, 0, 1)
  # The same steps, one after another.
  assert joint(mixed=False)[1] == budget.Budget(pytest.approx(epochs), 20, 20, 80, 0, 1)
  # Three batches a step: six steps, two batches are left over.
  found = joint(mixed=True)[1]
  assert found[1:] == (6, 6, 72, 0, 1)
  assert found.epochs_per_task < epochs


def test_joint_training_takes_the_batches_of_the_experts():
  names, rows, s = ("ant", "bee", "cat"), (12, 20, 9), chosen(rounds=7)
  task, index, rate = training_joint._plan(names, rows, s, 1)
  assert len(task) == 20
  for t, (name, n) in enumerate(zip(names, rows, strict=True)):
    steps = schedule.totals(rows, s)[t]
    seen = index[task[:, 0] == t].ravel()
    np.testing.assert_array_equal(seen, schedule.stream(name, n, s.seed, 0, 4 * steps))
  assert (rate == np.float32(s.learning_rate)).all()
  # Tasks take turns as evenly as their sizes allow: every half has half of each task's batches.
  half = np.bincount(task[:10, 0], minlength=3)
  assert half.tolist() == [3, 5, 2]


def test_joint_training_on_quadratics_is_descent_on_their_sum():
  a = (np.diag([1.0, 4.0]).astype(np.float32), np.diag([3.0, 2.0]).astype(np.float32))
  c = (np.float32([1.0, 0.0]), np.float32([0.0, 2.0]))
  start = {"theta": np.float32([0.5, -1.0])}
  s = small.descent(1, 3, 0.125)
  tasks = small.quadratics(*zip(a, c, strict=True))
  theta = start["theta"]
  for _ in range(3):
    theta = theta - 0.125 * sum(m @ (theta - p) for m, p in zip(a, c, strict=True)) / 2
  found, _ = training_joint.train(small.quadratic, start, tasks, s, mixed=True, loss=small.as_given)
  np.testing.assert_allclose(found["theta"], theta, rtol=1e-6)
  # In turn: one task after the other, in the order of their tags.
  order = sorted(range(2), key=lambda k: jaxmerge.core.tree.tag(tasks[k].name))
  theta = start["theta"]
  for _ in range(3):
    for k in order:
      theta = theta - 0.125 * a[k] @ (theta - c[k])
  found, _ = training_joint.train(
    small.quadratic, start, tasks, s, mixed=False, loss=small.as_given
  )
  np.testing.assert_allclose(found["theta"], theta, rtol=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
def test_joint_training_in_parts_and_in_any_order_of_tasks(mixed):
  expected = joint(mixed, schedule="cosine")
  found = joint(mixed, small.three()[::-1], rounds=3, schedule="cosine")
  small.assert_same_bits(found[0], expected[0])
  assert found[1][1:] == expected[1][1:]


def test_the_best_scale_is_the_best_of_all():
  tasks, base = small.three(), small.weights()
  names = [t.name for t in tasks]
  models, _ = experts(tasks, epochs=8.0)
  mesh = meshes.make(1)
  score = scoring.scorer(small.network, losses.accuracy, mesh=mesh)
  rows = meshes.put(batch.stack(tasks, "validation"), meshes.task_sharding(mesh))
  counts = [len(t.validation.labels) for t in tasks]
  method, scales = methods.task_arithmetic(), (0.0, 0.2, 0.4, 0.8, 5.0)
  given = (method, models, base, scales, score, rows, counts)
  found = search_scales.best_scale(*given, names=names)

  def judged(params):
    right = [
      np.asarray(small.network(params, t.validation.inputs, t.head)).argmax(-1)
      == t.validation.labels
      for t in tasks
    ]
    return np.mean([r.mean() for r in right])

  singly = [
    jaxmerge.merge(method, models, base, hparams={"scale": jnp.float32(s)}, names=names)
    for s in scales
  ]
  means = [trial.score for trial in found.trials]
  np.testing.assert_allclose(means, [judged(p) for p in singly])
  best = int(np.argmax(means))
  assert 0 < best < 4
  assert found.candidate.scale == scales[best]
  small.assert_close(found.params, singly[best], rtol=1e-6)
  # Cut into several programs, the last one short.
  cut = search_scales.best_scale(*given, names=names, at_once=2)
  assert cut[1:] == found[1:]
  small.assert_close(cut.params, found.params, rtol=1e-6)


def test_divergence_names_the_task():
  tasks = small.three()
  changes = dict(optimizer="sgd", learning_rate=1e3, weight_decay=1e3, epochs=8.0)
  with pytest.raises(ValueError, match=r"'(ant|bee|cat)' diverged in part 1 of its expert"):
    experts(tasks, **changes)
  with pytest.raises(ValueError, match="'joint training' diverged in part 1 of 1"):
    joint(False, tasks, **changes)


def test_bad_data_and_parameters_are_found_first():
  task = small.classified("ant", 5)
  task.train.inputs[2] = np.nan
  for go in (lambda: experts([task]), lambda: joint(False, [task])):
    with pytest.raises(ValueError, match="task 'ant', train split, inputs, row 2: NaN"):
      go()
  whole = {"w": np.arange(3)}
  with pytest.raises(ValueError, match="'w' is int64; only floating point is tuned"):
    finetune.experts(small.network, whole, small.three(), chosen())


def test_parameters_are_tuned_in_float32():
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small.weights())
  found, _ = finetune.experts(
    small.network, narrow, small.three(), chosen(epochs=0.5), mesh=meshes.make(1)
  )
  assert {x.dtype.name for x in jax.tree.leaves(found)} == {"float32"}
