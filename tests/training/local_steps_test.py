"""Local tuning and scoring: every task by itself, padding that does nothing."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_tasks as small

from jaxmerge import methods
from jaxmerge.core import interpreter, layouts, tree
from jaxmerge.evaluation import scoring
from jaxmerge.parallel import mesh as meshes
from jaxmerge.tasks import batch, losses
from jaxmerge.training import local_steps, optimizers, schedule, settings
from jaxmerge.training import round as rounds

COLLECTIVES = re.compile(r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)")


def chosen(**changes):
  plain = dict(rounds=1, epochs=2.0, batch_size=4, learning_rate=0.05, weight_decay=0.01)
  return settings.Settings(**plain | changes)


def pieces(tasks, s, params=None):
  """The step, the optimiser, the rows and the plan."""
  local = optimizers.local(s, small.weights() if params is None else params)
  step = local_steps.step(small.network, losses.cross_entropy, s, local)
  counts = [len(t.train.labels) for t in tasks]
  plan = schedule.plan([t.name for t in tasks], counts, s, 0, rounds=1)
  return step, local, batch.stack(tasks, "train"), plan


def one_of(stack, k):
  return jax.tree.map(lambda x: x[k], stack)


def all_tuned(step, local, mesh, height):
  """The compiled tuning of all tasks: (params, rows, plan) -> (copies, states, losses)."""

  @jax.jit
  def run(params, rows, plan):
    copies = local_steps.copies(params, height, mesh)
    return local_steps.tune_all(step, copies, jax.vmap(local.init)(copies), rows, plan, mesh=mesh)

  return run


def placed(mesh, params, rows, plan):
  everywhere, spread = meshes.replicated(mesh), meshes.task_sharding(mesh)
  return meshes.put(params, everywhere), meshes.put(rows, spread), meshes.put(plan, spread)


@pytest.fixture(scope="module")
def four():
  return [*small.three(), small.classified("dog", 16)]


@pytest.fixture(scope="module")
def alone(four):
  """Four tasks, tuned one after another by one plain program."""
  step, local, rows, plan = pieces(four, chosen())
  params = small.weights()
  run = jax.jit(lambda *own: local_steps.tune_one(step, params, local.init(params), *own))
  return [run(one_of(rows, k), one_of(plan, k)) for k in range(4)]


@pytest.mark.parametrize("devices", [1, 4, pytest.param(2, marks=pytest.mark.slow)])
def test_tuned_copies_have_the_bits_of_tuning_one_after_another(four, alone, devices):
  step, local, rows, plan = pieces(four, chosen())
  mesh = meshes.make(devices)
  found = all_tuned(step, local, mesh, 4)(*placed(mesh, small.weights(), rows, plan))
  for k, expected in enumerate(alone):
    small.assert_same_bits(one_of(found, k), expected)
  assert small.differ(one_of(found[0], 0), one_of(found[0], 1))


def test_no_word_between_tasks_before_the_merge(four):
  step, local, rows, plan = pieces(four, chosen())
  mesh = meshes.make(4)
  given = placed(mesh, small.weights(), rows, plan)
  tuned = all_tuned(step, local, mesh, 4)
  assert not COLLECTIVES.search(tuned.lower(*given).compile().as_text())
  # The same with the merge behind it must talk, or the search above finds nothing anywhere.
  method = methods.average()
  shapes = {n: x.shape for n, x in tree.named(small.weights()).items()}
  names = sorted((t.name for t in four), key=tree.tag)
  ready = interpreter.prepare(method, shapes, 4, {}, names)

  @jax.jit
  def merged(params, rows, plan):
    copies = tree.named(tuned(params, rows, plan)[0])
    return rounds.merge(method, copies, params, ready, layouts.NONE)

  assert COLLECTIVES.search(merged.lower(*given).compile().as_text())


def groups(text):
  """Which devices each collective of a program joins, as sets of numbers."""
  found = []
  for line in text.splitlines():
    if not COLLECTIVES.search(line) or "replica_groups" not in line:
      continue
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](T\(([\d,]+)\))?", line)
    if listed:
      found += [set(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", listed[1])]
    else:
      shape = [int(n) for n in iota[3].split(",")]
      order = [int(n) for n in iota[5].split(",")] if iota[5] else range(len(shape))
      numbers = np.arange(np.prod(shape)).reshape(shape).transpose(order)
      found += [set(g) for g in numbers.reshape(int(iota[1]), int(iota[2])).tolist()]
  return found


def test_rows_are_shared_out_over_the_data_axis_alone(four, alone):
  step, local, rows, plan = pieces(four, chosen())
  mesh = meshes.make(2, 2)
  given = placed(mesh, small.weights(), rows, plan)
  compiled = all_tuned(step, local, mesh, 4).lower(*given).compile()
  # Devices 0 and 1 hold the first tasks, 2 and 3 the others.
  text = compiled.as_text()
  assert "all-reduce" in text
  assert all(g in ({0, 1}, {2, 3}) for g in groups(text))
  # Gradients are added up in another order, and Adam divides by their size.
  for k, expected in enumerate(alone):
    small.assert_close(one_of(compiled(*given), k), expected, rtol=1e-4, atol=1e-5)


def test_a_batch_that_the_data_axis_does_not_divide_is_refused(four):
  step, local, rows, plan = pieces(four, chosen())
  mesh = meshes.make(2, 3)
  with pytest.raises(
    ValueError, match="batch_size 4 must be a multiple of the mesh's data axis, 3"
  ):
    all_tuned(step, local, mesh, 4)(small.weights(), rows, plan)


def test_padded_steps_leave_parameters_and_counters_alone():
  tasks = [small.classified("ant", 12)]
  step, local, rows, plan = pieces(tasks, chosen())
  own, params = one_of(rows, 0), small.weights()
  go = jax.jit(lambda own, plan: local_steps.tune_one(step, params, local.init(params), own, plan))
  short = jax.tree.map(lambda x: x[0], plan)
  spare = 5
  # The padding would matter much if it were taken.
  padded = schedule.Plan(
    np.concatenate([short.rows, np.ones((spare, 4), np.int32)]),
    np.concatenate([short.learning_rate, np.full(spare, 9.0, np.float32)]),
    short.steps,
  )
  plain = go(own, short)
  small.assert_same_bits(go(own, padded), plain)
  counters = [int(x) for x in jax.tree.leaves(plain[1]) if x.dtype == jnp.int32]
  assert counters == [int(short.steps)]
  nothing = go(own, short._replace(steps=np.int32(0)))
  small.assert_same_bits(nothing[:2], (jax.tree.map(jnp.asarray, params), local.init(params)))
  assert float(nothing[2]) == 0


def test_padded_rows_are_never_read(four, alone):
  step, local, rows, plan = pieces(four, chosen())
  inputs, labels = np.array(rows.inputs), np.array(rows.labels)
  for k, n in enumerate(rows.filled):
    inputs[k, n:], labels[k, n:] = np.nan, 10**6
  mesh = meshes.make(1)
  spoilt = rows._replace(inputs=inputs, labels=labels)
  found = all_tuned(step, local, mesh, 4)(small.weights(), spoilt, plan)
  for k, expected in enumerate(alone):
    small.assert_same_bits(one_of(found, k), expected)


def test_padded_classes_are_masked():
  # Two classes in a head of four columns: the loss and its gradient are those of two columns.
  task = small.classified("bee", 6, 2)
  wide = np.concatenate([task.head, np.full((5, 2), 50.0, np.float32)], axis=1)
  params = small.weights()

  def loss(params, head, classes):
    out = batch.outputs(small.network, params, task.train.inputs, head, jnp.int32(classes))
    return losses.cross_entropy(out, task.train.labels).mean()

  masked = batch.outputs(small.network, params, task.train.inputs, wide, jnp.int32(2))
  assert (np.asarray(masked)[:, 2:] == -np.inf).all()
  assert np.isfinite(np.asarray(masked)[:, :2]).all()
  gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  narrow, padded = gradients(params, task.head, 2), gradients(params, wide, 2)
  assert float(narrow[0]) == pytest.approx(float(padded[0]), rel=1e-6)
  small.assert_close(narrow[1][0], padded[1][0], rtol=1e-5, atol=1e-7)
  assert not np.asarray(padded[1][1])[:, 2:].any()
  assert np.asarray(padded[1][1])[:, :2].any()


def taken(s, params, gradient, times=1):
  """Local steps under a loss whose gradient is given; the parameters and the state."""
  local = optimizers.local(s, params)
  flat = jax.tree.leaves(jax.tree.map(jnp.asarray, gradient))

  def linear(params, inputs, head):
    total = sum(jnp.vdot(g, p) for g, p in zip(flat, jax.tree.leaves(params), strict=True))
    return total[None]

  step = local_steps.step(linear, small.as_given, s, local)
  params, state = jax.tree.map(jnp.asarray, params), local.init(params)
  for _ in range(times):
    batch = (np.zeros((1, 1), np.float32), jnp.zeros(1, jnp.int32), None, jnp.int32(1))
    params, state, _ = step(params, state, batch, jnp.float32(s.learning_rate))
  return params, state


def test_frozen_leaves_keep_their_bits_and_do_not_count_in_the_norm():
  params = {"a": np.float32([1.0, -0.0]), "b": np.float32([2.0])}
  gradient = {"a": np.float32([300.0, 400.0]), "b": np.float32([2.0])}
  s = chosen(freeze="^a$", optimizer="sgd", clip_norm=1.0, learning_rate=0.5, weight_decay=0.1)
  found, _ = taken(s, params, gradient)
  small.assert_same_bits(found["a"], params["a"])
  # The gradient 2 of the free leaf is clipped to 1; with the frozen leaf in it would be 0.004.
  assert found["b"].tolist() == [1.5]


def test_running_statistics_are_not_tuned():
  """Gradients of a variance would make it negative; a change of zero moves no outer optimiser."""
  params = {"batch_stats": {"var": np.float32([0.05, -0.0])}, "w": np.float32([2.0])}
  gradient = {"batch_stats": {"var": np.float32([300.0, 400.0])}, "w": np.float32([2.0])}
  s = chosen(optimizer="sgd", clip_norm=1.0, learning_rate=0.5)
  found, _ = taken(s, params, gradient)
  small.assert_same_bits(found["batch_stats"]["var"], params["batch_stats"]["var"])
  assert found["w"].tolist() == [1.5]
  with pytest.raises(ValueError, match=r"'batch_stats/var' .* is a variance below zero"):
    local_steps.master_weights({"batch_stats": {"var": np.float32([-0.1])}, "w": params["w"]})


def test_clipping_by_the_global_norm():
  params = {"a": np.float32([0.0]), "b": np.float32([0.0])}
  gradient = {"a": np.float32([30.0]), "b": np.float32([40.0])}
  s = chosen(optimizer="sgd", learning_rate=1.0, weight_decay=0.0, clip_norm=10.0)
  assert jax.tree.map(lambda x: x.tolist(), taken(s, params, gradient)[0]) == {
    "a": [-6.0],
    "b": [-8.0],
  }
  free = dataclasses.replace(s, clip_norm=0.0)
  assert taken(free, params, gradient)[0]["b"].tolist() == [-40.0]


def test_weight_decay_spares_embeddings_norms_and_biases():
  names = ["dense/kernel", "embedding/table", "LayerNorm/scale", "dense/bias", "vector"]
  params = {n: np.ones((2, 2) if n != "vector" else 2, np.float32) for n in names}
  gradient = jax.tree.map(np.zeros_like, params)
  s = chosen(optimizer="sgd", learning_rate=0.5, weight_decay=0.5, clip_norm=0.0)
  found, _ = taken(s, params, gradient)
  moved = {n for n in names if float(found[n].ravel()[0]) != 1}
  assert moved == {"dense/kernel"}
  assert float(found["dense/kernel"][0, 0]) == 0.75


def test_adamw_is_that_of_optax():
  params = {"kernel": np.float32([[1.0, 2.0]]), "bias": np.float32([3.0])}
  gradient = {"kernel": np.float32([[0.3, -2.0]]), "bias": np.float32([0.01])}
  s = chosen(learning_rate=0.125, weight_decay=0.25, clip_norm=0.0)
  found, _ = taken(s, params, gradient, times=3)
  mask = {"kernel": True, "bias": False}
  optimizer = optax.adamw(0.125, weight_decay=0.25, mask=mask)
  expected, state = jax.tree.map(jnp.asarray, params), optimizer.init(params)
  for _ in range(3):
    updates, state = optimizer.update(gradient, state, expected)
    expected = optax.apply_updates(expected, updates)
  small.assert_close(found, expected, rtol=1e-6)


def test_bfloat16_computes_narrow_and_keeps_wide(four):
  s = chosen(compute_dtype="bfloat16")
  _, local, rows, plan = pieces(four, s)
  seen = []

  def watched(params, inputs, head):
    seen.append({x.dtype.name for x in jax.tree.leaves((params, head))})
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
    return small.network(params, narrow, head)

  step = local_steps.step(watched, losses.cross_entropy, s, local)
  params = small.weights()
  run = jax.jit(lambda *own: local_steps.tune_one(step, params, local.init(params), *own))
  found = run(one_of(rows, 0), one_of(plan, 0))
  assert seen
  assert all(s == {"bfloat16"} for s in seen)
  floats = [x for x in jax.tree.leaves(found) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert {x.dtype.name for x in floats} == {"float32"}


def test_a_freeze_that_finds_nothing_or_everything_is_refused():
  with pytest.raises(ValueError, match="matches no leaf; leaves: dense/bias, dense/kernel"):
    optimizers.local(chosen(freeze="denze"), small.weights())
  with pytest.raises(ValueError, match="every leaf"):
    optimizers.local(chosen(freeze="dense"), small.weights())


def test_tasks_that_do_not_belong_together_are_refused():
  ant, bee = small.three()[:2]
  other = bee.train._replace(inputs=bee.train.inputs[:, :3])
  with pytest.raises(ValueError, match=r"'inputs' is \(4,\) in a row of task 'ant' but \(3,\)"):
    batch.stack([ant, dataclasses.replace(bee, train=other)], "train")
  with pytest.raises(ValueError, match="'ant': 'a head', 'bee': 'none'"):
    batch.stack([ant, dataclasses.replace(bee, head=None)], "train")
  with pytest.raises(ValueError, match=r"head of task 'bee' is \(6, 2\), but that of 'ant' is \(5"):
    batch.stack([ant, dataclasses.replace(bee, head=np.zeros((6, 2), np.float32))], "train")
  with pytest.raises(ValueError, match="'bee' has no test split, only train, validation"):
    batch.stack([ant, dataclasses.replace(bee, test=None)], "test")


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_scores_are_those_of_single_rows(four, chunk):
  mesh = meshes.make(4)
  models = [small.weights(k) for k in range(2)]
  rows = meshes.put(batch.stack(four, "train"), meshes.task_sharding(mesh))
  score = scoring.scorer(small.network, losses.accuracy, mesh=mesh, chunk=chunk)
  found = np.asarray(score(tree.stack(models), rows))
  counts = [len(t.train.labels) for t in four]
  assert found.shape == (2, 4, 20)
  for m, params in enumerate(models):
    parts = scoring.per_row(found[m], counts)
    for k, t in enumerate(four):
      logits = np.asarray(small.network(params, t.train.inputs, t.head))
      right = (logits.argmax(-1) == t.train.labels).astype(np.float32)
      np.testing.assert_array_equal(parts[k], right)
      assert scoring.means(found[m], counts)[k] == pytest.approx(right.mean())
      assert not found[m, k, counts[k] :].any()


@pytest.mark.parametrize("limit", [0.5, 3.0, 100.0])
def test_clipping_is_that_of_optax(limit):
  draw = np.random.default_rng(4).normal
  grads = {"a": draw(size=(3, 4)).astype(np.float32), "b": draw(size=5).astype(np.float32)}
  own, theirs = (
    clip.update(grads, clip.init(grads))[0]
    for clip in (optimizers._clip(limit), optax.clip_by_global_norm(limit))
  )
  for name in grads:
    np.testing.assert_allclose(own[name], theirs[name], rtol=1e-6)
