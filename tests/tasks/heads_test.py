"""Facts about zero-shot heads: columns of one length, the right argmax, scale-free embeddings."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.tasks import heads

IDS = np.array([[1, 2], [3, 0]], np.int32)
MASK = np.array([[1, 1], [1, 0]], np.int32)
TABLE = np.array([[9, 9], [3, 0], [0, 4], [0, 2]], np.float32)


def embed(ids, mask):
  """The mean of the tokens' vectors."""
  m = jnp.asarray(mask, jnp.float32)[..., None]
  return (jnp.asarray(TABLE)[ids] * m).sum(1) / m.sum(1)


def test_closed_form():
  # Means (1.5, 2) and (0, 2): directions (.6, .8) and (0, 1).
  head = heads.zero_shot(embed, IDS, MASK, scale=10.0)
  assert head.dtype == np.float32
  np.testing.assert_allclose(head, [[6, 0], [8, 10]], rtol=1e-6)


def test_every_column_has_the_length_scale():
  np.testing.assert_allclose(
    np.linalg.norm(heads.zero_shot(embed, IDS, MASK), axis=0), 20, rtol=1e-6
  )


def test_the_length_of_the_embeddings_does_not_matter():
  a, b = (heads.zero_shot(lambda i, m, c=c: c * embed(i, m), IDS, MASK) for c in (0.25, 4.0))
  np.testing.assert_array_equal(a, b)


def test_a_prompt_is_classified_as_its_own_class():
  head = heads.zero_shot(embed, IDS, MASK)
  np.testing.assert_array_equal((np.asarray(embed(IDS, MASK)) @ head).argmax(1), [0, 1])


def test_errors_name_shape_and_prompt():
  with pytest.raises(ValueError, match=r"prompts_ids \(2, 2\) and prompts_mask \(2,\)"):
    heads.zero_shot(embed, IDS, MASK[0])
  with pytest.raises(ValueError, match=r"embed must return \[2, D\], got \(2, 2, 1\)"):
    heads.zero_shot(lambda i, m: embed(i, m)[..., None], IDS, MASK)
  with pytest.raises(ValueError, match=r"prompt 1: its embedding has norm 0\.0"):
    heads.zero_shot(lambda i, m: jnp.array([[1.0, 0], [0, 0]]), IDS, MASK)
