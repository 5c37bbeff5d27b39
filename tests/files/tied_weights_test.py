"""Tensors that are one, stored twice: they stay one, and count once."""

import json

import folders
import numpy as np
import pytest
import small
from marking import some_fast

import jaxmerge
from jaxmerge import methods
from jaxmerge.catalog import lookup
from jaxmerge.core import stage
from jaxmerge.files import execute, inputs, merge, plan
from jaxmerge.io.tensors.tensor import Files

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
  return merge.merge_files(method, models, root / "out", base=root / "base", **options)


@pytest.mark.parametrize(
  ("method", "seed"),
  [
    (methods.average(), None),
    pytest.param(methods.dare(0.5), 3, marks=pytest.mark.slow),
    pytest.param(methods.ties(0.3, rule="exact"), None, marks=pytest.mark.slow),
  ],
  ids=["average", "dare", "ties"],
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
  expected = jaxmerge.merge(method, jaxmerge.stack(models), base, names=names, **options)
  small.close({n: found[n] for n in expected}, expected)
  told = json.loads((out / execute.PROVENANCE).read_text())
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


FAST = ("average", "ties", "dare", "tsv", "krum", "slerp", "arcee_fusion")


@pytest.mark.parametrize("name", some_fast(lookup.METHODS, FAST))
def test_each_method_merges_a_head_and_its_embedding_once(pairs, tmp_path, name):
  least, most = lookup.entry(name).models
  method = getattr(methods, name)()
  models = [pairs / f"m{k}" for k in range(most or max(least, 2))]
  seed = 3 if "seed" in stage.hparams(method) else None
  options = {"base": pairs / "base", "seed": seed, "layout": (("weight$", "oi"),)}
  out = merge.merge_files(method, models, tmp_path / "out", **options)
  found, base = folders.read(out), folders.read(pairs / "base")
  assert found[HEAD].tobytes() == found[EMBEDDING].tobytes()
  assert (found[HEAD] != base[HEAD]).any()
  fates = json.loads((out / execute.PROVENANCE).read_text())["inputs"].values()
  assert all(own[HEAD] == f"tied to {EMBEDDING}, its equal" for own in fates)


@pytest.mark.parametrize("untied", ["base", "m1"])
def test_a_head_that_differs_anywhere_is_merged(tmp_path, untied):
  trees = family(tmp_path, untied=(untied,))
  found = folders.read(merged(tmp_path, methods.dare(0.5), seed=3))
  assert (found[HEAD] != found[EMBEDDING]).any()
  expected = jaxmerge.merge(
    methods.dare(0.5),
    jaxmerge.stack(trees[1:]),
    trees[0],
    names=[str(tmp_path / f"m{k}") for k in range(3)],
    seed=3,
  )
  small.close(found, expected)


def test_heads_with_numbers_of_their_own_are_merged_apart(tmp_path):
  family(tmp_path)
  scales = {n: np.float32(0.5) for n in folders.tensors(0) if n != "position_ids"}
  scales[HEAD] = np.float32(1.0)
  found = folders.read(merged(tmp_path, methods.task_arithmetic(), hparams={"scale": scales}))
  assert (found[HEAD] != found[EMBEDDING]).any()
  again = {n: np.float32(0.5) for n in scales}
  out = merged(tmp_path, methods.task_arithmetic(), hparams={"scale": again}, replace=True)
  assert folders.read(out)[HEAD].tobytes() == found[EMBEDDING].tobytes()


def config(flag, **more):
  return {**folders.CONFIG, "tie_word_embeddings": flag, **more}


def copy_of(tree, head=None):
  """A model without an output head, or with another one."""
  return {n: x for n, x in tree.items() if n != HEAD} | ({} if head is None else {HEAD: head})


@pytest.mark.parametrize(
  "where", [{}, {"text_config": {"tie_word_embeddings": True, "hidden_size": 6}}]
)
@pytest.mark.parametrize("donor", ["headless", "differs", "equal"])
def test_a_head_that_differs_is_kept_though_the_config_ties_it(tmp_path, where, donor):
  base, first, second, _ = folders.family(tmp_path)
  heads = {"headless": None, "differs": base[HEAD], "equal": base[EMBEDDING]}
  flag = where or {"tie_word_embeddings": True}
  trees = copy_of(base, heads[donor]), first, copy_of(second)
  for name, tree in zip(("base", "m0", "m1"), trees, strict=True):
    folders.write(tmp_path / name, tree, config=folders.CONFIG | flag)
  models = [tmp_path / "m0", tmp_path / "m1"]
  options = {"base": tmp_path / "base"}
  out = merge.merge_files(methods.task_arithmetic(scale=1.0), models, tmp_path / "out", **options)
  found = folders.read(out)
  start = base[HEAD] if donor == "differs" else base[EMBEDDING]
  expected = first[HEAD] + second[EMBEDDING] - start
  np.testing.assert_allclose(found[HEAD], expected, atol=1e-6)
  made = json.loads((out / "config.json").read_text())
  assert made["tie_word_embeddings"] is False
  assert made.get("text_config", {}).get("tie_word_embeddings", False) is False
  told = json.loads((out / execute.PROVENANCE).read_text())
  assert told["notes"][0].startswith(f"{HEAD} and {EMBEDDING} differ in some models")


def test_a_head_that_is_the_embedding_in_all_models_stays_tied_by_the_flag_of_the_base(tmp_path):
  """Whatever the others say of theirs, and where one stores it in a wider dtype."""
  base, first, second, _ = folders.family(tmp_path)
  folders.write(tmp_path / "base", copy_of(base), config=config(True))
  folders.write(tmp_path / "m0", copy_of(first, first[EMBEDDING]), config=config(False))
  wide = second[EMBEDDING].astype(np.float64)
  folders.write(tmp_path / "m1", copy_of(second, wide), config=config(True))
  models = [tmp_path / "m0", tmp_path / "m1"]
  out = merge.merge_files(methods.average(), models, tmp_path / "out", base=tmp_path / "base")
  assert HEAD not in folders.read(out)
  assert json.loads((out / "config.json").read_text()) == config(True)


def test_copies_of_a_shared_embedding_are_it(tmp_path):
  """T5: in some files they are stored, in others not; the flag says how outputs are scaled."""
  x, rng = np.ones((5, 2), np.float32), np.random.default_rng(0)
  names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD]
  y, z = x + rng.normal(size=x.shape).astype(np.float32), 3 * x
  own = {"model_type": "t5", "tie_word_embeddings": False}
  whole = {"shared.weight": y, names[0]: y, names[1]: y, HEAD: z}
  for name, tree in (("base", {"shared.weight": x, HEAD: z}), ("m0", whole)):
    folders.write(tmp_path / name, tree, config=own)
  base, models = tmp_path / "base", [tmp_path / "m0"]
  out = merge.merge_files(methods.task_arithmetic(scale=1.0), models, tmp_path / "out", base=base)
  found = folders.read(out)
  assert found.keys() == {"shared.weight", HEAD}
  np.testing.assert_allclose(found["shared.weight"], y, atol=1e-6)
  assert json.loads((out / "config.json").read_text()) == own
  out = merge.merge_files(methods.average(), [*models, base], tmp_path / "mean")
  assert folders.read(out).keys() == {"shared.weight", HEAD}


@pytest.mark.parametrize("flag", [True, False])
def test_a_language_model_without_a_head_is_tied_or_it_is_said(tmp_path, flag):
  """A class that ties by default leaves the flag out; one that says no has lost its head."""
  base, first, *_ = folders.family(tmp_path)
  told = {} if flag else {"tie_word_embeddings": False}
  own = folders.CONFIG | told | {"architectures": ["GemmaForCausalLM"]}
  folders.write(tmp_path / "base", copy_of(base), config=own)
  folders.write(tmp_path / "m0", copy_of(first, first[EMBEDDING]) if flag else first, config=own)
  job = methods.average(), [tmp_path / "m0"], tmp_path / "out"
  if flag:
    assert HEAD not in folders.read(merge.merge_files(*job, base=tmp_path / "base"))
    return
  with pytest.raises(ValueError, match=r"is in .*m0 but not in the base"):
    merge.merge_files(*job, base=tmp_path / "base")
  out = merge.merge_files(*job, base=tmp_path / "base", missing="skip")
  (note,) = json.loads((out / execute.PROVENANCE).read_text())["notes"]
  assert "has no output head" in note


def test_tied_heads_stay_tied(tmp_path):
  """By the configs: a head that some files hold all the same is left out of the result."""
  base, *models = folders.family(tmp_path)
  tied = folders.CONFIG | {"tie_word_embeddings": True}
  headless = {n: x for n, x in base.items() if n != "lm_head.weight"}
  folders.write(tmp_path / "base", headless, config=tied)
  for k, own in enumerate(models):
    equal = own | {"lm_head.weight": own["model.embed_tokens.weight"]}
    folders.write(tmp_path / f"m{k}", equal, config=tied)
  out = merge.merge_files(
    methods.average(),
    [tmp_path / f"m{k}" for k in range(3)],
    tmp_path / "out",
    base=tmp_path / "base",
    names=("red", "green", "blue"),
  )
  assert "lm_head.weight" not in folders.read(out)
  told = json.loads((out / execute.PROVENANCE).read_text())["inputs"]
  assert told["red"]["lm_head.weight"] == "dropped: tied to model.embed_tokens.weight"


@pytest.mark.parametrize(
  ("embedding", "head", "others"),
  [
    ("shared.weight", "lm_head.weight", ("decoder.block.0.lm_head.weight",)),  # T5
    ("model.decoder.embed_tokens.weight", "proj_out.weight", ()),  # Whisper
    ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", ()),
    ("embeddings.word_embeddings.weight", "vocab_projector.weight", ()),  # DistilBERT
    ("model.embed_tokens.weight", "lm_head.weight", ("vision.layers.0.proj_out.weight",)),
  ],
)
def test_the_pair_that_a_config_ties_is_found_by_names_and_shapes(
  tmp_path, embedding, head, others
):
  x = np.ones((5, 2), np.float32)
  made = {embedding: x, head: x, **dict.fromkeys(others, 3 * x)}
  tied = {"model_type": "x", "tie_word_embeddings": True}
  opened = inputs.open_model(folders.write(tmp_path / "m", made, config=tied), Files())
  assert opened.tensors.keys() == {embedding, *others}
  assert opened.outcomes == {head: plan.Outcome("tied", target=embedding)}
  assert opened.input(head).tensor == opened.tensors[embedding]
  other = folders.write(tmp_path / "o", {**made, head: x[:3]}, config=tied)
  assert head in inputs.open_model(other, Files()).tensors  # It cannot be the embedding.
  made.pop(head)
  opened = inputs.open_model(folders.write(tmp_path / "h", made, config=tied), Files())
  assert opened.input(head).tensor == opened.tensors[embedding]
  assert opened.outcomes == {}


def test_an_embedding_stands_in_for_a_head_that_is_tied_to_it(tmp_path):
  _, first, second, third = folders.family(tmp_path)
  tied = folders.CONFIG | {"tie_word_embeddings": True}
  headless = {n: x for n, x in first.items() if n != "lm_head.weight"}
  folders.write(tmp_path / "m0", headless, config=tied)
  out = merge.merge_files(
    methods.average(),
    [tmp_path / name for name in ("m1", "m2", "m0")],
    tmp_path / "o",
  )
  heads = [first["model.embed_tokens.weight"], second["lm_head.weight"], third["lm_head.weight"]]
  np.testing.assert_allclose(folders.read(out)["lm_head.weight"], np.mean(heads, 0), atol=1e-6)
  out = merge.merge_files(
    methods.average(), [tmp_path / f"m{k}" for k in range(3)], tmp_path / "other"
  )
  np.testing.assert_allclose(folders.read(out)["lm_head.weight"], np.mean(heads, 0), atol=1e-6)
  assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
