import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmerge.core import tree

MODEL = {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "list": [jnp.ones(1), 2.0]}
keys = st.text("abc", min_size=1, max_size=2)
trees = st.recursive(
  st.integers(0, 9),
  lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3),
  max_leaves=6,
)


def test_names_join_the_path_and_come_in_order():
  assert list(tree.named(MODEL)) == ["layer/bias", "layer/kernel", "list/0", "list/1"]


@given(trees)
def test_rebuild_undoes_named(x):
  assert tree.rebuild(x, tree.named(x)) == x


def test_two_leaves_of_one_name_are_refused():
  with pytest.raises(ValueError, match="two leaves are named 'a/b'"):
    tree.named({"a": {"b": 1}, "a/b": 2})


@given(st.text())
def test_a_tag_is_the_checksum_of_the_name(name):
  assert tree.tag(name) == zlib.crc32(name.encode())


def test_a_tag_does_not_change_from_run_to_run():
  code = "from jaxmerge.core import tree; print(tree.tag('encoder/layer_0/kernel'))"
  found = subprocess.check_output([sys.executable, "-c", code], text=True)
  assert int(found) == tree.tag("encoder/layer_0/kernel")


def test_unstack_undoes_stack():
  models = [{"w": jnp.arange(3.0) + k, "n": jnp.int32(k)} for k in range(4)]
  stacked = tree.stack(models)
  assert stacked["w"].shape == (4, 3)
  assert stacked["n"].dtype == jnp.int32
  assert tree.num_models(stacked) == 4
  for before, after in zip(models, tree.unstack(stacked), strict=True):
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_keys_stack_too():
  stacked = tree.stack([{"key": jax.random.key(k)} for k in range(2)])
  assert stacked["key"].shape == (2,)
  assert not tree.is_floating(stacked["key"])


@pytest.mark.parametrize(
  ("models", "message"),
  [
    ([], "at least one tree, got none"),
    ([{"w": jnp.ones(2)}, {"v": jnp.ones(2)}], "leaf 'v' is in model 1 but not in model 0"),
    ([{"w": jnp.ones(2)}] * 2 + [{}], "leaf 'w' is in model 0 but not in model 2"),
    (
      [{"w": jnp.ones(2)}, {"w": jnp.ones(3)}],
      r"leaf 'w' is \(2,\) in model 0 but \(3,\) in model 1",
    ),
    (
      [{"w": jnp.ones(2)}, {"w": jnp.ones(2, jnp.int32)}],
      "leaf 'w' is float32 in model 0 but int32 in model 1",
    ),
  ],
)
def test_models_that_differ_do_not_stack(models, message):
  with pytest.raises(ValueError, match=message):
    tree.stack(models)


@pytest.mark.parametrize(
  ("models", "message"),
  [
    ({}, "at least one leaf, got an empty tree"),
    ({"w": jnp.float32(1)}, "leaf 'w' is a scalar"),
    ({"a": jnp.ones((2, 3)), "b": jnp.ones(3)}, "leaf 'b' holds 3 models, but 'a' holds 2"),
  ],
)
def test_height_refuses_what_is_no_stack(models, message):
  with pytest.raises(ValueError, match=message):
    tree.num_models(models)


@pytest.mark.parametrize(
  ("dtype", "floating", "computed"),
  [
    ("float32", True, "float32"),
    ("float16", True, "float32"),
    ("bfloat16", True, "float32"),
    ("float8_e4m3fn", True, "float32"),
    ("int8", False, None),
    ("bool", False, None),
  ],
)
def test_dtype_policy(dtype, floating, computed):
  leaf = jnp.zeros(2, dtype)
  assert tree.is_floating(leaf) == floating
  if floating:
    assert tree.compute_dtype(leaf.dtype) == computed


def test_the_widest_dtype_wins():
  with jax.enable_x64():
    assert tree.compute_dtype(jnp.bfloat16, jnp.float64) == np.float64
