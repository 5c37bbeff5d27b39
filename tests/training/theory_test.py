"""What is known about alternating tuning and merging, on problems with known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_tasks as small

import jaxmerge
from jaxmerge import methods
from jaxmerge.core import interpreter, layouts
from jaxmerge.parallel import mesh as meshes
from jaxmerge.training import finetune, loop, settings
from jaxmerge.training import joint as training_joint
from jaxmerge.training import round as rounds

A = (np.diag([1.0, 4.0]), np.diag([3.0, 2.0]))
C = (np.array([1.0, 0.0]), np.array([0.0, 2.0]))
START = np.array([0.5, -1.0])


@pytest.fixture(autouse=True)
def _double():
  with jax.enable_x64():
    yield


def run(a, c, start, chosen, method=None):
  """Runs the loop on quadratics; the model that it ends with."""
  found = loop.tune_and_merge(
    small.quadratic,
    {"theta": np.array(start)},
    small.quadratics(*zip(a, c, strict=True)),
    method,
    chosen,
    loss=small.as_given,
    metric=small.as_given,
    mesh=meshes.make(1),
  )
  return np.asarray(found.params["theta"])


def joint(a, c, start, steps, rate):
  """Gradient descent on the sum of the losses: all iterates."""
  theta = [np.array(start)]
  for _ in range(steps):
    theta.append(theta[-1] - rate * sum(m @ (theta[-1] - p) for m, p in zip(a, c, strict=True)))
  return theta


def mean_loss(theta):
  return np.mean([0.5 * (theta - c) @ a @ (theta - c) for a, c in zip(A, C, strict=True)])


def random_quadratics(seed, n=3, d=4):
  r = np.random.default_rng(seed)
  roots = r.standard_normal((n, d, d))
  return [m @ m.T / d for m in roots], list(r.standard_normal((n, d))), r.standard_normal(d)


def test_one_full_batch_step_is_minus_rate_times_mean_gradient():
  tasks = [small.classified(n, k, dtype=np.float64) for n, k in [("a", 6), ("b", 6), ("c", 6)]]
  start, rate = small.weights(dtype=np.float64), 0.125
  chosen = settings.Settings(
    rounds=1, epochs=1, batch_size=6, optimizer="sgd", clip_norm=0.0, learning_rate=rate
  )
  found = loop.tune_and_merge(small.network, start, tasks, None, chosen).params

  def loss(params):
    total = 0.0
    for t in tasks:
      logits = small.network(params, t.train.inputs, t.head)
      total += -jax.nn.log_softmax(logits)[np.arange(6), t.train.labels.astype(np.int64)].mean()
    return total / len(tasks)

  gradient = jax.grad(loss)(start)
  vector = jax.tree.map(lambda a, b: np.asarray(a - b), found, start)
  scale = max(np.abs(x).max() for x in jax.tree.leaves(gradient))
  small.assert_close(
    vector, jax.tree.map(lambda g: -rate * g, gradient), rtol=0, atol=1e-12 * rate * scale
  )
  # Joint training on mixed batches takes the same step.
  together, _ = training_joint.train(small.network, start, tasks, chosen, mixed=True)
  small.assert_close(together, found, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize(
  ("steps", "expected", "joint_expected"),
  [
    (1, (-0.05, 0.5), (-0.05, 0.5)),
    (2, (-0.08, 0.86), (-0.09, 0.85)),
    (3, (-0.0965, 1.124), (-0.122, 1.095)),
  ],
)
def test_worked_task_vectors(steps, expected, joint_expected):
  # The learning rate is a float32, whose 0.1 is off by 1.5e-8 of itself.
  vector = run(A, C, START, small.descent(1, steps, 0.1)) - START
  np.testing.assert_allclose(vector, expected, atol=1e-7)
  np.testing.assert_allclose(joint(A, C, START, steps, 0.05)[-1] - START, joint_expected, atol=1e-9)


@pytest.mark.parametrize("alpha", [1 / 3, 0.7])
def test_second_order_term_of_two_steps_is_exact_for_quadratics(alpha):
  a, c, start = random_quadratics(0)
  rate = 2.0**-6
  method = methods.task_arithmetic(scale=alpha)
  merged = run(a, c, start, small.descent(1, 2, rate), method)
  theta = joint(a, c, start, 2, alpha * rate)
  own = [m @ (start - p) for m, p in zip(a, c, strict=True)]
  second = alpha * rate**2 * sum(m @ (g - alpha * sum(own)) for m, g in zip(a, own, strict=True))
  # The scale is a float64 inside, so only rounding is left.
  np.testing.assert_allclose(merged - theta[-1], second, rtol=1e-9, atol=1e-15)


def test_second_order_term_of_more_steps_leaves_a_third_order_residual():
  a, c, start = random_quadratics(1)
  steps, alpha, relative = 3, 1 / 3, []
  for rate in (2.0**-9, 2.0**-10):
    merged = run(a, c, start, small.descent(1, steps, rate))
    theta = joint(a, c, start, steps, alpha * rate)
    own = [[m @ (x - p) for m, p in zip(a, c, strict=True)] for x in theta]
    gaps = [[g - alpha * sum(each) for g in each] for each in own]
    inner = [
      m @ sum(gaps[i][t] for i in range(j)) for j in range(1, steps) for t, m in enumerate(a)
    ]
    second = alpha * rate**2 * sum(inner)
    relative.append(np.abs(merged - theta[-1] - second).max() / np.abs(second).max())
  assert relative[0] < 0.02
  assert relative[1] == pytest.approx(relative[0] / 2, rel=0.05)


@pytest.mark.parametrize("steps", [1, 7])
def test_common_hessian_gives_no_error(steps):
  a, c, start = random_quadratics(2)
  a, rate = [a[0]] * 3, 0.125
  merged = run(a, c, start, small.descent(1, steps, rate))
  np.testing.assert_allclose(merged, joint(a, c, start, steps, rate / 3)[-1], rtol=1e-12)


@pytest.mark.parametrize(
  ("rounds_", "steps", "expected"),
  [
    (120, 1, (0.25, 0.666667)),
    (40, 5, (0.329867, 0.843267)),
    (6, 50, (0.498708, 0.999993)),
  ],
)
def test_fixed_points_drift_to_the_mean_of_the_optima(rounds_, steps, expected):
  found = run(A, C, START, small.descent(rounds_, steps, 0.1))
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_fixed_point_of_one_step_is_the_joint_optimum():
  a, c, start = random_quadratics(3)
  found = run(a, c, start, small.descent(400, 1, 0.25))
  optimum = np.linalg.solve(sum(a), sum(m @ p for m, p in zip(a, c, strict=True)))
  slowest = 1 - 0.25 * np.linalg.eigvalsh(sum(a) / 3).min()
  np.testing.assert_allclose(found, optimum, atol=3 * slowest**400 * np.abs(start - optimum).max())


@pytest.mark.parametrize(
  ("rounds_", "steps", "expected"),
  [(10, 1, 1.524879), (5, 2, 1.523133), (2, 5, 1.546977), (1, 10, 1.592664)],
)
def test_worked_losses_of_one_budget(rounds_, steps, expected):
  assert mean_loss(START) == 5.75
  found = run(A, C, START, small.descent(rounds_, steps, 0.1))
  assert mean_loss(found) == pytest.approx(expected, abs=1e-6)


def test_merged_losses_of_convex_tasks_are_below_the_mean_of_the_copies():
  a, c, start = random_quadratics(4)
  tasks, chosen = small.quadratics(*zip(a, c, strict=True)), small.descent(1, 9, 0.125)
  start = {"theta": start}
  copies, _ = finetune.experts(
    small.quadratic, start, tasks, chosen, loss=small.as_given, mesh=meshes.make(1)
  )
  merged = np.asarray(jaxmerge.merge(methods.average(), copies, start)["theta"])

  def total(theta):
    return sum(0.5 * (theta - p) @ m @ (theta - p) for m, p in zip(a, c, strict=True))

  assert total(merged) < np.mean([total(theta) for theta in np.asarray(copies["theta"])])


@pytest.mark.parametrize(
  ("method", "reference", "expected"),
  [
    (methods.average(), (1.0, 1.0), (1.5, 2.0)),
    (methods.average(), (0.0, 0.0), (1.5, 2.0)),
    (methods.task_arithmetic(scale=0.25), (1.0, 1.0), (1.25, 1.5)),
    (methods.task_arithmetic(scale=0.25), (0.0, 0.0), (0.75, 1.0)),
  ],
)
def test_worked_example_of_the_reference_point(method, reference, expected):
  copies = {"theta": jnp.array([[2.0, 1.0], [1.0, 3.0]])}
  ready = interpreter.prepare(method, {"theta": (2,)}, 2, {}, ["a", "b"])._replace(order=None)
  found = rounds.merge(method, copies, {"theta": jnp.array(reference)}, ready, layouts.NONE)
  np.testing.assert_allclose(found["theta"], expected, rtol=1e-14)


def test_reference_base_and_current_agree_for_the_mean_alone():
  def both(method, rounds_):
    chosen = [small.descent(rounds_, 2, 0.125, reference=r) for r in ("current", "base")]
    return [run(A, C, START, s, method) for s in chosen]

  np.testing.assert_allclose(*both(methods.average(), 3), rtol=1e-12)
  half = methods.task_arithmetic(scale=0.25)
  np.testing.assert_array_equal(*both(half, 1))
  current, base = both(half, 2)
  assert np.abs(current - base).max() > 0.01
  # From the second round on the base pulls back: base + (tuned - base) / 2.
  first = both(half, 1)[0]
  tuned = [
    first - (joint([a], [c], first, 2, 0.125)[0] - joint([a], [c], first, 2, 0.125)[-1])
    for a, c in zip(A, C, strict=True)
  ]
  np.testing.assert_allclose(base, START + 0.5 * (np.mean(tuned, axis=0) - START), rtol=1e-12)
  np.testing.assert_allclose(current, first + 0.5 * (np.mean(tuned, axis=0) - first), rtol=1e-12)


def test_one_round_is_task_arithmetic_with_one_over_n():
  tasks, start = small.quadratics(*zip(A, C, strict=True)), {"theta": START}
  chosen = small.descent(1, 4, 0.125)
  copies, _ = finetune.experts(
    small.quadratic, start, tasks, chosen, loss=small.as_given, mesh=meshes.make(1)
  )
  once = jaxmerge.merge(methods.task_arithmetic(scale=0.5), copies, start)["theta"]
  np.testing.assert_allclose(run(A, C, START, chosen), once, rtol=1e-14)


def test_one_task_is_plain_descent():
  found = run(A[:1], C[:1], START, small.descent(5, 3, 0.125))
  np.testing.assert_allclose(found, joint(A[:1], C[:1], START, 15, 0.125)[-1], rtol=1e-12)
