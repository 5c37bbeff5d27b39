"""Tensors that are one, stored twice: they stay one, and count once."""

import json

import folders
import numpy as np
import pytest
import small

import jaxmerge
from jaxmerge import catalog, files, methods, stage

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def family(root, untied=()):
  """A base and models whose head is their embedding, but for some of them."""
  trees = folders.family(root)
  for k, (name, tree) in enumerate(zip(("base", "m0", "m1", "m2"), trees, strict=True)):
    if name not in untied:
      tree[HEAD] = tree[EMBEDDING]
    folders.write(root / name, tree, shards=max(k, 1))
  return trees


def merged(root, method, **options):
  models = [root / f"m{k}" for k in range(3)]
  return files.merge_files(method, models, root / "out", base=root / "base", **options)


@pytest.mark.parametrize(
  ("method", "seed"),
  [(methods.dare(0.5), 3), (methods.ties(0.3, rule="exact"), None), (methods.average(), None)],
  ids=["dare", "ties", "average"],
)
def test_a_head_that_is_the_embedding_stays_it(tmp_path, method, seed):
  """As if it were not there: masks are not drawn twice, thresholds do not count it twice."""
  trees = family(tmp_path)
  out = merged(tmp_path, method, seed=seed, entries=16)
  found = folders.read(out)
  assert found[HEAD].tobytes() == found[EMBEDDING].tobytes()
  base, *models = [{n: x for n, x in t.items() if n != HEAD} for t in trees]
  names = [str(tmp_path / f"m{k}") for k in range(3)]
  options = {} if seed is None else {"seed": seed}
  expected = jaxmerge.merge(method, base, jaxmerge.stack(models), names=names, **options)
  small.close({n: found[n] for n in expected}, expected)
  told = json.loads((out / files.PROVENANCE).read_text())
  assert told["inputs"][names[0]][HEAD] == f"tied to {EMBEDDING}, its equal"
  checksum = told["tensors"][EMBEDDING]["xxh3_128"]
  assert told["tensors"][HEAD] == {"xxh3_128": checksum, "inputs": {}}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """Folders of a base and five models: an embedding, and the head that it is."""
  root, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
  base = rng.normal(size=(4, 6)).astype(np.float32)
  for name in ("base", *(f"m{k}" for k in range(5))):
    x = base if name == "base" else base + rng.normal(size=(4, 6)).astype(np.float32) / 8
    folders.write(root / name, {EMBEDDING: x, HEAD: x})
  return root


@pytest.mark.parametrize("name", catalog.METHODS)
def test_each_method_merges_a_head_and_its_embedding_once(pairs, tmp_path, name):
  least, most = catalog.entry(name).models
  method = getattr(methods, name)()
  models = [pairs / f"m{k}" for k in range(most or max(least, 2))]
  seed = 3 if "seed" in stage.numbers(method) else None
  options = {"base": pairs / "base", "seed": seed, "layout": (("weight$", "oi"),)}
  out = files.merge_files(method, models, tmp_path / "out", **options)
  found, base = folders.read(out), folders.read(pairs / "base")
  assert found[HEAD].tobytes() == found[EMBEDDING].tobytes()
  assert (found[HEAD] != base[HEAD]).any()
  fates = json.loads((out / files.PROVENANCE).read_text())["inputs"].values()
  assert all(own[HEAD] == f"tied to {EMBEDDING}, its equal" for own in fates)


@pytest.mark.parametrize("untied", ["base", "m1"])
def test_a_head_that_differs_anywhere_is_merged(tmp_path, untied):
  trees = family(tmp_path, untied=(untied,))
  found = folders.read(merged(tmp_path, methods.dare(0.5), seed=3))
  assert (found[HEAD] != found[EMBEDDING]).any()
  expected = jaxmerge.merge(
    methods.dare(0.5),
    trees[0],
    jaxmerge.stack(trees[1:]),
    names=[str(tmp_path / f"m{k}") for k in range(3)],
    seed=3,
  )
  small.close(found, expected)


def test_heads_with_numbers_of_their_own_are_merged_apart(tmp_path):
  family(tmp_path)
  scales = {n: np.float32(0.5) for n in folders.tensors(0) if n != "position_ids"}
  scales[HEAD] = np.float32(1.0)
  found = folders.read(merged(tmp_path, methods.task_arithmetic(), aux={"scale": scales}))
  assert (found[HEAD] != found[EMBEDDING]).any()
  again = {n: np.float32(0.5) for n in scales}
  out = merged(tmp_path, methods.task_arithmetic(), aux={"scale": again}, replace=True)
  assert folders.read(out)[HEAD].tobytes() == found[EMBEDDING].tobytes()
