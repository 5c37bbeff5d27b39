import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmerge.core import matrix_views, sharding

words = st.text("boi", min_size=1, max_size=4)


@given(words, st.data())
def test_from_rows_undoes_rows(view, data):
  shape = tuple(data.draw(st.integers(1, 3)) for _ in view)
  x = np.arange(2 * math.prod(shape), dtype=np.float32).reshape(2, *shape)
  seen = matrix_views.rows(jnp.asarray(x), view)
  columns = math.prod(n for n, letter in zip(shape, view, strict=True) if letter == "i")
  assert seen.shape == (2, math.prod(shape) // columns, columns)
  np.testing.assert_array_equal(matrix_views.from_rows(seen, view, shape), x)


@pytest.mark.parametrize(
  ("view", "formula"),
  [
    ("io", lambda x: x.T),
    ("oi", lambda x: x),
    ("o", lambda x: x[:, None]),
    ("i", lambda x: x[None]),
    ("ioo", lambda x: x.reshape(x.shape[0], -1).T),
    ("ooi", lambda x: x.reshape(-1, x.shape[-1])),
    ("boi", lambda x: x.reshape(-1, x.shape[-1])),
    ("bio", lambda x: np.concatenate([layer.T for layer in x])),
    ("iiio", lambda x: x.reshape(-1, x.shape[-1]).T),
  ],
)
def test_rows_of_known_layouts(view, formula):
  """Flax kernels, files' weights, attention, scanned layers, convolutions."""
  x = np.arange(math.prod((2, 3, 4, 5)[: len(view)])).reshape((2, 3, 4, 5)[: len(view)])
  np.testing.assert_array_equal(matrix_views.rows(jnp.asarray(x)[None], view)[0], formula(x))


def test_a_view_of_another_rank_is_refused():
  with pytest.raises(ValueError, match="view 'io' names 2 axes, but the leaf has 3"):
    matrix_views.rows(jnp.zeros((1, 2, 3, 4)), "io")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_leaves_come_whole_with_the_same_values(kind):
  mesh = jax.make_mesh((2, 2, 2), ("task", "row", "column"), axis_types=(kind,) * 3)
  x = jnp.arange(64.0).reshape(2, 4, 8)
  with jax.set_mesh(mesh):
    spread = jax.device_put(x, NamedSharding(mesh, P("task", "row", "column")))

    @jax.jit
    def through(x):
      seen = matrix_views.rows(sharding.gather(x), "io")
      return (
        seen,
        matrix_views.from_rows(seen, "io", (4, 8)),
        sharding.replicate(x.sum(axis=(1, 2))),
      )

    seen, back, small = through(spread)
  np.testing.assert_array_equal(seen, x.transpose(0, 2, 1))
  np.testing.assert_array_equal(back, x)
  np.testing.assert_array_equal(small, x.sum(axis=(1, 2)))
  if kind == AxisType.Explicit:
    assert jax.typeof(seen).sharding.spec == P("task", None, None)
    assert jax.typeof(small).sharding.spec == P(None)
