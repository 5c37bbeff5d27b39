"""Small problems for the tests of the loop: quadratics with known answers, and a tiny network."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.tasks import task
from jaxmerge.training import settings


def quadratic(params, inputs, head):
  """The loss of each row: 0.5 (theta - c)^T A (theta - c)."""
  d = params["theta"][None] - inputs["c"]
  return 0.5 * jnp.einsum("bi,bij,bj->b", d, inputs["a"], d)


def quadratics(*pairs):
  """One task of one row for each (A, c)."""
  out = []
  for t, (a, c) in enumerate(pairs):
    split = task.Split({"a": np.array([a]), "c": np.array([c])}, np.zeros(1, np.int32))
    out.append(task.Task(f"q{t}", split, split))
  return out


def as_given(outputs, labels):
  """A loss or a metric that is the model's own output."""
  return outputs


def descent(rounds, steps, rate, **changes):
  """Settings of plain gradient descent with some local steps a round, on tasks of one batch."""
  plain = dict(batch_size=1, optimizer="sgd", clip_norm=0.0, learning_rate=rate)
  return settings.Settings(rounds=rounds, epochs=float(rounds * steps), **plain | changes)


def network(params, inputs, head):
  """A layer of tanh, and the head."""
  hidden = jnp.tanh(inputs @ params["dense"]["kernel"] + params["dense"]["bias"][None])
  return hidden @ head


def weights(seed=0, dtype=np.float32, features=5):
  """Parameters of `network` for rows of four numbers."""
  r = np.random.default_rng(seed)
  kernel = r.standard_normal((4, features)).astype(dtype)
  return {"dense": {"kernel": kernel, "bias": r.standard_normal(features).astype(dtype) / 4}}


def classified(name, rows, classes=3, dtype=np.float32, features=5):
  """A task of random rows whose labels a hidden network gives."""
  r = np.random.default_rng(sum(name.encode()))
  head = r.standard_normal((features, classes)).astype(dtype)
  hidden = weights(rows, dtype, features)

  def split(n):
    x = r.standard_normal((n, 4)).astype(dtype)
    out = np.tanh(x @ hidden["dense"]["kernel"] + hidden["dense"]["bias"]) @ head
    return task.Split(x, out.argmax(-1).astype(np.int32))

  return task.Task(name, split(rows), split(9), split(7), head=head)


def three():
  """Tasks of different sizes and numbers of classes."""
  return [classified("ant", 12), classified("bee", 20, 2), classified("cat", 9, 4)]


def assert_same_bits(a, b):
  """Two trees hold the same bytes."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype
    assert x.tobytes() == y.tobytes()


def assert_close(a, b, **tolerance):
  """Two trees agree."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def differ(a, b):
  """Whether two trees differ anywhere."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return any(np.any(np.asarray(x) != np.asarray(y)) for x, y in pairs)
