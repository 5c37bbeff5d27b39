"""`compat: mergekit` computes in the dtypes and by the thresholds of mergekit."""

import pathlib

import folders
import ml_dtypes
import numpy as np
import pytest
import small
from marking import some_fast

import jaxmerge
from jaxmerge import methods
from jaxmerge.files import describe
from jaxmerge.recipe import RecipeError

family, plan_of, run = folders.family_here, folders.plan_of, folders.run


TIES = """
merge_method: ties
base_model: base
models:
  - model: m0
    parameters: {weight: 1.0, density: 0.5}
  - model: m1
    parameters: {weight: 0.5, density: 0.3}
"""


SUM = """
merge_method: task_arithmetic
base_model: base
models:
  - {model: m0, parameters: {weight: 0.3}}
  - {model: m1, parameters: {weight: 0.7}}
exclude: [lm_head]
"""


def summed(base, first, second, dtype):
  """What `SUM` is where every operation rounds to a dtype; a sum over the models is one."""
  low = [x.astype(dtype) for x in (base, first, second)]
  terms = [dtype(w) * (x - low[0]) for w, x in zip((0.3, 0.7), low[1:], strict=True)]
  return low[0] + sum(x.astype(np.float32) for x in terms).astype(dtype)


def assert_summed(found, family, dtype):
  for name, x in found.items():
    parts = [tree[name] for tree in family[:3]]
    if name != "position_ids":
      expected = parts[0].astype(dtype) if name == "lm_head.weight" else summed(*parts, dtype)
      np.testing.assert_array_equal(x.astype(np.float32), expected.astype(np.float32), name)


@pytest.mark.slow
def test_compat_has_mergekits_thresholds(family):
  base, first, second, _ = family
  expected = jaxmerge.merge(
    methods.ties(weight=(1.0, 0.5), scope="leaf", rule="exact", zero_sum="plus"),
    jaxmerge.stack([first, second]),
    base,
    names=["m0", "m1"],
    hparams={"density": (0.5, 0.3)},
  )
  small.same(run(TIES + "compat: mergekit\n"), expected)


@pytest.mark.parametrize("dtype", some_fast([ml_dtypes.bfloat16, np.float16], [ml_dtypes.bfloat16]))
def test_compat_computes_in_the_dtype_of_the_recipe(family, dtype):
  name = np.dtype(dtype).name
  found = run(SUM + f"compat: mergekit\ndtype: {name}\n")
  assert found["model.norm.weight"].dtype == dtype
  assert_summed(found, family, dtype)
  wide = run(SUM + f"compat: mergekit\ndtype: {name}\nout_dtype: float32\n", "wide")
  assert wide["model.norm.weight"].dtype == np.float32
  assert_summed(wide, family, dtype)
  once = run(SUM + f"dtype: {name}\n", "once")
  embedding = "model.embed_tokens.weight"
  assert (once[embedding] != found[embedding]).any()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_compat_computes_in_the_dtype_of_the_files(tmp_path, monkeypatch, dtype):
  monkeypatch.chdir(tmp_path)
  own = folders.family(tmp_path, dtype=dtype)
  text = SUM + "compat: mergekit\n"
  name = np.dtype(dtype).name
  assert f"computed in {name}: 11 tensors" in describe.dry_run(plan_of(text), shard_size=10**9)
  found = run(text)
  assert found["model.norm.weight"].dtype == dtype
  assert_summed(found, own, dtype)


def test_compat_computes_in_float32_what_has_several_dtypes(family):
  """As mergekit does, which also stores it in float32."""
  low = {
    n: x.astype(ml_dtypes.bfloat16) if x.dtype == np.float32 else x for n, x in family[0].items()
  }
  folders.write(pathlib.Path("base"), low)
  found = run(SUM + "compat: mergekit\n")
  assert found["model.norm.weight"].dtype == np.float32
  assert found["lm_head.weight"].dtype == ml_dtypes.bfloat16
  name = "model.embed_tokens.weight"
  base, first, second = (tree[name].astype(np.float32) for tree in (low, *family[1:3]))
  expected = base + 0.3 * (first - base) + 0.7 * (second - base)
  np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6)


def test_compat_that_cannot_be_had_is_refused(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folders.family(tmp_path, 1, dtype=ml_dtypes.bfloat16)
  text = "merge_method: arcee_fusion\nbase_model: base\nmodels: [{model: m0}]\ncompat: mergekit\n"
  with pytest.raises(RecipeError, match=r"recipe.yml:4:1: .* write dtype: float32 and out_dtype"):
    plan_of(text)
  with pytest.raises(RecipeError, match=r"(?s)write dtype: float32.*5:11: .*'lm_head'"):
    plan_of(text + "exclude: [lm_haed]\n")
  assert plan_of(text + "dtype: float32\nout_dtype: bfloat16\n").outputs[0].precision is None
