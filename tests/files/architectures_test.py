"""Files of any architecture are merged by names and shapes alone, and as NumPy does."""

import functools
import json

import architectures
import folders
import numpy as np
import pytest
import recipes
from marking import some_fast
from reference import spheres

from jaxmerge import methods
from jaxmerge.files import execute, merge
from jaxmerge.io.tensors.tensor import Files

SUM = methods.task_arithmetic(0.5, (1.0, 2.0))
NAMES = ("red", "green")
SLERP = """\
merge_method: slerp
base_model: {0}/base
models: [{{model: {0}/m0}}]
parameters: {{t: [0.2, 0.8]}}
"""
STOCK = """\
merge_method: model_stock
base_model: {0}/base
models: [{{model: {0}/m0}}, {{model: {0}/m1}}]
parameters: {{filter_wise: true}}
"""


def written(root, name):
  """Writes a base and two models; the second one's head is stored, if any may be."""
  own = architectures.ALL[name]
  base = architectures.tensors(own, 0)
  models = [architectures.tensors(own, seed, base) for seed in (1, 2)]
  extra = {own.left_out: models[1][_embedding(own)]} if own.left_out else {}
  folders.write(root / "base", base, config=own.config, shards=3)
  folders.write(root / "m0", models[0], config=own.config)
  folders.write(root / "m1", models[1] | extra, config=own.config, shards=2)
  return own, base, models


def _embedding(own):
  return next(n for n in own.shapes if n.endswith(("shared.weight", "embed_tokens.weight")))


def check(out, own, base, expected):
  """Asserts that all is there and right: floats as expected, in the base's dtype, integers copied.

  Of the floats, half a unit of the dtype is rounding, the rest is that of float32 on the way.
  """
  found = folders.read(out)
  assert found.keys() == base.keys()
  for name, x in found.items():
    assert (x.dtype, x.shape) == (base[name].dtype, base[name].shape), name
    if name in own.integers:
      np.testing.assert_array_equal(x, base[name])
      continue
    unit = 2.0 ** {"float32": -20, "bfloat16": -8}[x.dtype.name]
    right = expected(name)
    atol = 4e-6 + 1e-3 * unit
    np.testing.assert_allclose(
      x.astype(np.float64), right, rtol=1.02 * unit, atol=atol, err_msg=name
    )
  for head, embedding in own.equal.items():
    assert found[head].tobytes() == found[embedding].tobytes()


@pytest.mark.parametrize("name", some_fast(architectures.ALL, ["t5", "clip", "mixtral"]))
def test_task_vectors_are_added(tmp_path, name):
  own, base, models = written(tmp_path, name)
  folder = [tmp_path / "m0", tmp_path / "m1"]
  out = merge.merge_files(SUM, folder, tmp_path / "out", base=tmp_path / "base", names=NAMES)

  def expected(name):
    start, first, second = (t[name].astype(np.float64) for t in (base, *models))
    return start + 0.5 * (first - start) + (second - start)

  check(out, own, base, expected)
  assert json.loads((out / "config.json").read_text()) == own.config
  told = json.loads((out / execute.PROVENANCE).read_text())["inputs"]
  for head, embedding in own.equal.items():
    assert told["red"][head] == f"tied to {embedding}, its equal"
  if own.left_out:
    assert told["green"][own.left_out].startswith("dropped: tied to ")


def depth(name, stacks):
  """How deep a tensor lies in its own stack of layers; outside of all it counts as the first."""
  for stack, count in stacks.items():
    if name.startswith(stack):
      return int(name.removeprefix(stack).split(".")[0]) / (count - 1)
  return 0.0


def run(text, root):
  (root / "recipe.yml").write_text(text.format(root))
  return execute.run(recipes.plan_of_file(root / "recipe.yml", Files()), root / "out")


# One for all, so that all share its programs.
slerp = functools.cache(methods.slerp)


@pytest.mark.slow
@pytest.mark.parametrize("name", some_fast(architectures.ALL, ["clip", "llama"]))
def test_a_gradient_goes_through_each_stack_of_layers(tmp_path, monkeypatch, name):
  monkeypatch.setattr(methods, "slerp", slerp)
  own, base, (first, _) = written(tmp_path, name)
  out = run(SLERP, tmp_path)

  def expected(name):
    pair = [{name: t[name].astype(np.float64)} for t in (base, first)]
    return spheres.slerp(pair, 0.2 + 0.6 * depth(name, own.stacks))[name]

  check(out, own, base, expected)


def test_rows_of_kernels_are_outputs(tmp_path):
  """Model Stock with a step for every one of them."""
  own, base, models = written(tmp_path, "clip")
  out = run(STOCK, tmp_path)

  def expected(name):
    start = base[name].astype(np.float64)
    views = {name: "o" + "i" * (start.ndim - 1)} if start.ndim > 1 else {}
    taus = [{name: t[name] - start} for t in models]
    return start + spheres.model_stock(taus, "row", views)[name]

  check(out, own, base, expected)
